/**
 * npm run test:zero-copy [-- part of a name…]: the scenarios of test/zero-copy in QEMU, on Debian's kernel with the
 * module of kernel/.
 *
 * Builds into build/zero-copy: the module and the test module against the installed linux-headers, the handler in C,
 * the bundled TypeScript. Build the package first (`npm run build`). TCMU_ZERO_COPY_KERNEL names the directory of
 * another kernel (kernel/debug makes one), TCMU_ZERO_COPY_HEADERS its build tree.
 */
import { spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readdirSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { missingPackages } from './packages.mjs';
import { projectRoot } from './setup.mjs';

const out = join(projectRoot, 'build/zero-copy');

/** Runs a step; ends the process when it fails. */
function run(command, args, options = {}) {
  const { status, error } = spawnSync(command, args, { stdio: 'inherit', ...options });
  if (status !== 0) {
    if (error) console.error(String(error));
    console.log('0 passed, 1 failed, 0 skipped');
    process.exit(1);
  }
}

/** The release of the newest headers that are installed whole. */
function newestHeaders() {
  const releases = readdirSync('/usr/src')
    .map((name) => /^linux-headers-(6\.1\..*-amd64)$/.exec(name)?.[1])
    .filter((release) => release !== undefined && !/-(rt|cloud)-/.test(release))
    .sort((a, b) => b.localeCompare(a, 'en', { numeric: true }));
  return releases[0];
}

const missing = missingPackages(['kernel', 'peer', 'zero-copy', 'bench']);
if (missing.length > 0) {
  console.log(`missing packages: ${missing.map(({ name }) => name).join(' ')}`);
  console.log('0 passed, 0 failed, 1 skipped');
  process.exit(1);
}
const headers = process.env.TCMU_ZERO_COPY_HEADERS;
const release = process.env.TCMU_ZERO_COPY_RELEASE ?? newestHeaders();
mkdirSync(join(out, 'bidi'), { recursive: true });

/** Whether `target` is younger than all of `sources`. */
function isFresh(target, sources) {
  if (!existsSync(target)) return false;
  const { mtimeMs } = statSync(target);
  return sources.every((source) => statSync(source).mtimeMs < mtimeMs);
}

const kernelDir = join(projectRoot, 'kernel');
const patches = readdirSync(join(kernelDir, 'patches'), { recursive: true })
  .filter((name) => String(name).endsWith('.patch'))
  .map((name) => join(kernelDir, 'patches', String(name)));
const stamp = join(out, `built-for-${release}`);
if (
  !isFresh(stamp, [
    ...patches,
    join(kernelDir, 'build.sh'),
    join(kernelDir, 'test/tcmu_bidi_test.c'),
  ])
) {
  for (const name of readdirSync(out)) {
    if (name.startsWith('built-for-')) spawnSync('rm', [join(out, name)]);
  }
  const where = headers === undefined ? [] : ['--headers', headers];
  run(join(kernelDir, 'build.sh'), ['--kernel', release, ...where, '--out', out]);
  cpSync(join(kernelDir, 'test/tcmu_bidi_test.c'), join(out, 'bidi/tcmu_bidi_test.c'));
  writeFileSync(join(out, 'bidi/Kbuild'), 'obj-m := tcmu_bidi_test.o\n');
  run('make', [
    '-s',
    '-C',
    headers ?? `/usr/src/linux-headers-${release}`,
    `M=${join(out, 'bidi')}`,
    'modules',
  ]);
  cpSync(join(out, 'bidi/tcmu_bidi_test.ko'), join(out, 'tcmu_bidi_test.ko'));
  writeFileSync(stamp, '');
}
const source = join(projectRoot, 'test/zero-copy/programs/consumer.c');
run('gcc', ['-O2', '-Wall', '-Wextra', '-Werror', '-o', join(out, 'consumer'), source]);

const { build } = await import('esbuild');
await build({
  absWorkingDir: projectRoot,
  entryPoints: ['host.ts', 'guest.ts', 'programs/stray.ts'].map((file) =>
    join(projectRoot, 'test/zero-copy', file),
  ),
  outbase: join(projectRoot, 'test/zero-copy'),
  outdir: join(out, 'scenarios'),
  bundle: true,
  platform: 'node',
  format: 'esm',
  target: 'node20',
  packages: 'external',
  logLevel: 'warning',
});
const { status } = spawnSync(
  process.execPath,
  [join(out, 'scenarios/host.js'), release, ...process.argv.slice(2)],
  { cwd: projectRoot, stdio: 'inherit' },
);
process.exit(status ?? 1);
