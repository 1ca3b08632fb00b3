// SPDX-License-Identifier: Apache-2.0
/**
 * The tarball in empty projects, as users have them: no scripts, no compiler, nothing on PATH but Node. The
 * handler runs on the simulated kernel. TCMU_TEST_NODES names more Node.js binaries, `npm run test:nodes` sets it.
 */
import { spawnSync } from 'node:child_process';
import {
  mkdirSync,
  mkdtempSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { build } from 'esbuild';
import { afterAll, beforeAll, describe, expect, inject, test } from 'vitest';
import { root } from './tarball.js';

/** Each may be a command with arguments: an emulator and its Node. */
const nodes = (process.env['TCMU_TEST_NODES'] ?? process.execPath)
  .split(':')
  .map((text) => text.split(' '));

/** Compiling takes a minute or two: `npm run test:nodes` does it, `npm test` not. */
const everything = process.env['TCMU_TEST_EVERYTHING'] !== undefined;

const HANDLER = `
class Ram {
  memory = new Uint8Array(1 << 20);
  size = this.memory.length;
  flushes = 0;
  read(position, data) { data.copyFrom(this.memory.subarray(position, position + data.length)); }
  write(position, data) { data.copyTo(this.memory, position); }
  async flush() { this.flushes++; }
}
async function main() {
  const store = new Ram();
  const disk = await simulate(store);
  const data = new Uint8Array(4096).fill(7);
  await disk.write(8, data);
  await disk.flush();
  const back = await disk.read(8, 8);
  if (Buffer.compare(back, data) !== 0 || store.flushes !== 1 || store.memory[4096] !== 7) throw new Error('wrong data');
  const wrong = await disk.read(1 << 20, 8).catch((error) => error);
  if (!SenseError.is(wrong) || !(wrong instanceof TcmuError)) throw new Error('wrong error');
  await disk.close();
  console.log('fine', Object.keys(target).includes('createBackstore'), new MemoryStore({ size: 512 }).size);
}
main();
`;
const ESM = `
import { TcmuError } from 'tcmu';
import { SenseError } from 'tcmu/scsi';
import { simulate } from 'tcmu/sim';
import { MemoryStore } from 'tcmu/store';
import * as target from 'tcmu/target';
${HANDLER}`;
const CJS = `
const { TcmuError } = require('tcmu');
const { SenseError } = require('tcmu/scsi');
const { simulate } = require('tcmu/sim');
const { MemoryStore } = require('tcmu/store');
const target = require('tcmu/target');
${HANDLER}`;
/** ESM and CJS in one process are two copies: errors are known by their brand. */
const BOTH = `
import { createRequire } from 'node:module';
import { TcmuError } from 'tcmu';
import { simulate } from 'tcmu/sim';
const other = createRequire(import.meta.url)('tcmu');
const disk = await simulate({ size: 4096, read() { throw new Error('no'); }, write() {} });
const error = await disk.read(0, 1).catch((error) => error);
await disk.close();
console.log(TcmuError === other.TcmuError ? 'one copy' : 'two copies', TcmuError.is(error) && other.TcmuError.is(error));
`;
const TYPES = `
import { type BlockStore, type CommandHandler, type DataIn, type DataOut, Device, serve, Status } from 'tcmu';
import { SenseError } from 'tcmu/scsi';
import { SimulatedDevice, simulate } from 'tcmu/sim';
import { MemoryStore, readOnly } from 'tcmu/store';
import { createBackstore } from 'tcmu/target';

class Ram implements BlockStore {
  readonly #memory = new Uint8Array(1 << 20);
  readonly size = this.#memory.length;
  read(position: number, data: DataIn): void {
    data.copyFrom(this.#memory.subarray(position, position + data.length));
  }
  write(position: number, data: DataOut): void {
    data.copyTo(this.#memory, position);
  }
}
const handler: CommandHandler = { handle: (command) => command.complete(Status.GOOD) };
export async function main(): Promise<void> {
  const disk = await simulate(readOnly(new Ram()));
  const bytes: Uint8Array = await disk.read(0, 1);
  await disk.write(0, bytes).catch((error: unknown) => console.log(SenseError.is(error) && error.key));
  await disk.close();
  const kernel = new SimulatedDevice();
  const device = await Device.open(kernel.open(), { handler });
  await device.close();
  kernel.close();
}
export const later = [serve, createBackstore, MemoryStore] as const;
void main();
`;

let folder: string;
let bin: string;
let tarball: string;

beforeAll(() => {
  tarball = inject('tarball');
  folder = mkdtempSync(join(tmpdir(), 'tcmu-package-'));
  bin = join(folder, 'bin');
  mkdirSync(bin);
  symlinkSync(process.execPath, join(bin, 'node'));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** An empty project with the package installed. */
function project(name: string, manifest: object = {}): string {
  const path = join(folder, name);
  mkdirSync(path);
  writeFileSync(join(path, 'package.json'), JSON.stringify({ name, private: true, ...manifest }));
  const install = ['install', '--ignore-scripts', '--offline', '--no-audit', '--no-fund', tarball];
  const { status, output } = run([process.execPath], [inject('npm'), ...install], path);
  expect(output).not.toMatch(/allow-scripts|EBADENGINE/);
  expect({ status, output }).toMatchObject({ status: 0 });
  return path;
}

function run(command: string[], args: string[], cwd: string, path = bin) {
  const [program = '', ...first] = command;
  const { status, stdout, stderr, error } = spawnSync(program, [...first, ...args], {
    cwd,
    encoding: 'utf8',
    env: { PATH: path, HOME: folder },
  });
  return { status, output: `${stdout}${stderr}${error?.message ?? ''}` };
}

test('the tarball holds what it should and no more', () => {
  const files = inject('files');
  for (const entry of ['index', 'scsi', 'store', 'target', 'sim', 'program']) {
    for (const ending of ['js', 'cjs', 'd.ts', 'd.cts']) {
      expect(files).toContain(`dist/${entry}.${ending}`);
    }
  }
  expect(files).toContain(`prebuilds/linux-${process.arch}/tcmu.glibc.node`);
  for (const needed of [
    'LICENSE',
    'README.md',
    'CMakeLists.txt',
    'addon/binding/addon.cc',
    'scripts/compile.mjs',
    'dist/cli.js',
  ]) {
    expect(files).toContain(needed);
  }
  const stray = files.filter(
    (path) =>
      !/^(dist|prebuilds|addon|lib|docs)\/|^(LICENSE|README\.md|CMakeLists\.txt|package\.json|scripts\/compile\.mjs)$/.test(
        path,
      ),
  );
  expect(stray).toEqual([]);
  expect(files.filter((path) => /^docs\/reference|\/test\//.test(path))).toEqual([]);
});

describe.each(nodes.map((node) => [node.at(-1) as string, node] as const))('%s', (name, node) => {
  const suffix = name.replaceAll(/\W/g, '-');
  let path: string;
  beforeAll(() => {
    path = project(`run${suffix}`);
    writeFileSync(join(path, 'handler.mjs'), ESM);
    writeFileSync(join(path, 'handler.cjs'), CJS);
    writeFileSync(join(path, 'both.mjs'), BOTH);
  });

  test.each(['handler.mjs', 'handler.cjs'])('%s runs', (file) => {
    expect(run(node, [file], path)).toEqual({ status: 0, output: 'fine true 512\n' });
  });

  test('both kinds of module in one process', () => {
    expect(run(node, ['both.mjs'], path)).toEqual({ status: 0, output: 'two copies true\n' });
  });

  test('npx tcmu', () => {
    const cli = join(path, 'node_modules/.bin/tcmu');
    const { version } = JSON.parse(
      run(node, ['-p', 'JSON.stringify(require("tcmu/package.json"))'], path).output,
    );
    expect(run(node, [cli, '--version'], path)).toEqual({ status: 0, output: `${version}\n` });
    const { output } = run(node, [cli, 'doctor', '--json'], path);
    const { findings } = JSON.parse(output) as { findings: { name: string; verdict: string }[] };
    expect(findings.find(({ name }) => name === 'addon')?.verdict).toBe('ok');
    expect(run(node, [cli, 'doctor', '--root', path], path).status).toBe(1);
    expect(run(node, [cli, 'bleed'], path).status).toBe(2);
    expect(run(node, [cli, '--bleed'], path).status).toBe(2);
  });

  test('a bundle with the addon left out', async () => {
    const outfile = join(path, 'bundle/handler.cjs');
    await build({
      entryPoints: [join(path, 'handler.mjs')],
      outfile,
      bundle: true,
      platform: 'node',
      format: 'cjs',
      external: ['tcmu', 'tcmu/*'],
      logLevel: 'silent',
    });
    expect(run(node, [outfile], path)).toEqual({ status: 0, output: 'fine true 512\n' });
  });
});

describe('the addon', () => {
  const LOAD = ['-e', "require('tcmu')"];

  /** A project whose package lacks its binaries, unless `edit` gives it others. */
  function without(name: string, edit: (prebuilds: string) => void = () => {}): string {
    const path = project(name);
    const prebuilds = join(path, 'node_modules/tcmu/prebuilds');
    const kept = join(path, 'prebuilds');
    renameSync(prebuilds, kept);
    edit(prebuilds);
    writeFileSync(join(path, 'handler.mjs'), ESM);
    return path;
  }

  test('is compiled by the explicit command', () => {
    const path = without('compiled');
    const compile = [join(path, 'node_modules/.bin/tcmu'), 'compile'];
    const first = run([process.execPath], compile, path);
    expect(first.status).toBe(1);
    expect(first.output).toMatch(/node-api-headers is missing;.*apt-get install cmake/s);
    for (const name of ['node-api-headers', 'node-addon-api'])
      symlinkSync(join(root, 'node_modules', name), join(path, 'node_modules', name));
    const second = run([process.execPath], compile, path);
    expect(second.status).toBe(1);
    expect(second.output).toMatch(/cmake is missing;/);
    if (!everything) return;

    const { PATH = '' } = process.env;
    const made = run([process.execPath], compile, path, `${bin}:${PATH}`);
    const addon = join(realpathSync(path), 'node_modules/tcmu/build/addon/Release/tcmu.node');
    expect(made).toEqual({ status: 0, output: `compiled ${addon}\n` });
    expect(run([process.execPath], ['handler.mjs'], path)).toEqual({
      status: 0,
      output: 'fine true 512\n',
    });
  }, 900_000);

  test('is not in the package', () => {
    const { status, output } = run([process.execPath], LOAD, without('left-out'));
    expect(status).toBe(1);
    expect(output).toMatch(/prebuilds: not there; a bundler or a copy left it out/);
    expect(output).toMatch(/npx tcmu compile/);
    expect(output).toMatch(/code: 'ERR_TCMU_ADDON'/);
  });

  test('is in the package for other processors only', () => {
    const path = without('other-processor', (prebuilds) =>
      mkdirSync(join(prebuilds, 'linux-riscv64'), { recursive: true }),
    );
    const { status, output } = run([process.execPath], LOAD, path);
    expect(status).toBe(1);
    expect(output).toContain(`linux-${process.arch}/tcmu.glibc.node: not there`);
    expect(output).toContain('the package has linux-riscv64');
  });

  test('wants a newer glibc', () => {
    const file = `linux-${process.arch}/tcmu.glibc.node`;
    const path = without('old-glibc', (prebuilds) => {
      const binary = readFileSync(join(prebuilds, '../../../prebuilds', file));
      // The name in its table of versions; as long as another, so that nothing moves.
      const at = binary.indexOf('\0GLIBC_2.28\0');
      expect(at).toBeGreaterThan(0);
      binary.write('GLIBC_9.99', at + 1, 'latin1');
      mkdirSync(dirname(join(prebuilds, file)), { recursive: true });
      writeFileSync(join(prebuilds, file), binary);
    });
    const { status, output } = run([process.execPath], LOAD, path);
    expect(status).toBe(1);
    expect(output).toMatch(/version `GLIBC_9\.99' not found/);
    expect(output).toMatch(/linux-\w+, glibc 2\.\d+, Node/);
    expect(output).toMatch(/need glibc 2\.28 or later/);
  });

  test('on musl', () => {
    const path = project('musl');
    // What Node's report says there: no version of glibc.
    const stub = join(path, 'musl.cjs');
    writeFileSync(stub, 'process.report.getReport = () => ({ header: {} });');
    const { status, output } = run([process.execPath], ['-r', stub, ...LOAD], path);
    expect(status).toBe(1);
    expect(output).toMatch(/tcmu\.musl\.node: not there; the package has linux-/);
    expect(output).toMatch(/are for glibc \(Debian, Fedora …\), this is musl \(Alpine\)/);
    const cli = join(path, 'node_modules/.bin/tcmu');
    const doctor = run([process.execPath], ['-r', stub, cli, 'doctor', '--json'], path);
    const { findings } = JSON.parse(doctor.output) as {
      findings: { name: string; verdict: string; mend?: string }[];
    };
    const addon = findings.find(({ name }) => name === 'addon');
    expect(addon).toMatchObject({ verdict: 'missing', mend: expect.stringContaining('compile') });
  });
});

test.each([
  ['node16', { module: 'node16', moduleResolution: 'node16' }, 'main.mts'],
  ['node16, CommonJS', { module: 'node16', moduleResolution: 'node16' }, 'main.cts'],
  ['bundler', { module: 'esnext', moduleResolution: 'bundler' }, 'main.ts'],
])('TypeScript, strict, %s', (name, options, file) => {
  const path = project(`types-${name.replaceAll(/\W/g, '')}`);
  writeFileSync(join(path, file), TYPES);
  const compilerOptions = {
    ...options,
    target: 'es2022',
    lib: ['es2022', 'esnext.disposable'],
    strict: true,
    exactOptionalPropertyTypes: true,
    skipLibCheck: false,
    outDir: 'out',
    types: ['node'],
    typeRoots: [join(root, 'node_modules/@types')],
  };
  writeFileSync(join(path, 'tsconfig.json'), JSON.stringify({ compilerOptions, files: [file] }));
  const tsc = join(root, 'node_modules/typescript/bin/tsc');
  expect(run([process.execPath], [tsc, '-p', '.'], path)).toEqual({ status: 0, output: '' });
  if (name !== 'bundler') {
    const made = join('out', file.replace(/ts$/, 'js'));
    expect(run([process.execPath], [made], path)).toEqual({ status: 0, output: '7\n' });
  }
});
