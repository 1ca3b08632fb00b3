// SPDX-License-Identifier: Apache-2.0
/** kernel/build.sh says what is missing before it compiles anything, and takes the patches that belong to the kernel. */
import { spawnSync } from 'node:child_process';
import {
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';

const symbols = [
  'apply_to_page_range',
  'vm_insert_pages',
  'unmap_mapping_range',
  'vm_get_page_prot',
  'bitmap_find_next_zero_area_off',
  'ihold',
  'iput',
  'transport_backend_register',
  '__uio_register_device',
];
const options = ['TARGET_CORE', 'UIO', 'NET', 'CONFIGFS_FS', 'ARCH_HAS_PTE_SPECIAL'];
let headers: string;

beforeEach(() => {
  headers = mkdtempSync(join(tmpdir(), 'tcmu-headers-'));
});
afterEach(() => {
  rmSync(headers, { recursive: true, force: true });
});

/** A kernel's headers, as far as they are looked at. */
function makeHeaders(version: string, exported = symbols, configured = options): void {
  writeFileSync(join(headers, 'Makefile'), `kernelversion:\n\t@echo ${version}\n`);
  mkdirSync(join(headers, 'include/config'), { recursive: true });
  const lines = configured.map((option) => `CONFIG_${option}=y`);
  writeFileSync(join(headers, 'include/config/auto.conf'), `${lines.join('\n')}\n`);
  const rows = exported.map((symbol) => `0x00000000\t${symbol}\tvmlinux\tEXPORT_SYMBOL\t`);
  writeFileSync(join(headers, 'Module.symvers'), `${rows.join('\n')}\n`);
}

function build(...args: string[]): { status: number | null; stderr: string } {
  const all = ['--kernel', '9.9-test', ...args];
  const { status, stderr } = spawnSync('kernel/build.sh', all, { encoding: 'utf8' });
  return { status, stderr };
}

const bases = ['6.1', '6.12', '7.3'];

test('headers that are missing', () => {
  expect(build()).toEqual({
    status: 2,
    stderr:
      'tcmu zero copy: no headers of kernel 9.9-test; on Debian: apt-get install linux-headers-9.9-test\n',
  });
});

test('headers that are not prepared', () => {
  writeFileSync(join(headers, 'Makefile'), '');
  expect(build('--headers', headers)).toMatchObject({
    status: 2,
    stderr: expect.stringMatching(/is not prepared for building modules/),
  });
});

test.each(['5.10.0', '6.0.19'])('a kernel that is too old: %s', (version) => {
  makeHeaders(version);
  expect(build('--headers', headers)).toEqual({
    status: 2,
    stderr: `tcmu zero copy: kernel ${version} is too old: 6.1 is the oldest that the patches are for\n`,
  });
});

test.each([...bases, '6.6', '7.0', '7.4'])(
  'each kernel wants the source of its own series: %s',
  (series) => {
    makeHeaders(`${series}.4`);
    const { status, stderr } = build('--headers', headers, '--source', join(headers, 'none'));
    expect(status).toBe(2);
    expect(stderr).toContain(`no source of kernel ${series};`);
    expect(stderr).toContain(`apt-get install linux-source-${series},`);
  },
);

test('every base has the same steps, and build.sh finds the document among them', () => {
  expect(readdirSync('kernel/patches').sort()).toEqual([...bases].sort());
  const steps = (base: string) => readdirSync(join('kernel/patches', base)).sort();
  expect(steps('6.1')).toHaveLength(10);
  expect(steps('6.1').at(-1)).toMatch(/-Document-zero-copy\.patch$/);
  for (const base of bases) expect(steps(base)).toEqual(steps('6.1'));
});

test.each(bases)('patches/%s says in each patch what a mail of it would say', (base) => {
  for (const [index, name] of readdirSync(join('kernel/patches', base)).sort().entries()) {
    const text = readFileSync(join('kernel/patches', base, name), 'utf8');
    expect(text).toContain(
      `Subject: [PATCH ${String(index + 1).padStart(2, '0')}/10] scsi: target: tcmu: `,
    );
    expect(text).toMatch(/\nSigned-off-by: .+\n---\n/);
  }
});

/** With patches and sources of its own: a kernel line that each series spells in its way. */
describe('which patches are taken', () => {
  const module = 'drivers/target/target_core_user.c';
  const header = 'include/uapi/linux/target_core_user.h';
  const lines = (middle: string) => ['one', 'two', 'three', middle, 'four', 'five', 'six'];

  /** Copies build.sh next to a patch for 6.1 and one for 6.12. */
  function makeKernel(): void {
    copyFileSync('kernel/build.sh', join(headers, 'build.sh'));
    for (const base of ['6.1', '6.12']) {
      const dir = join(headers, 'patches', base);
      mkdirSync(dir, { recursive: true });
      const [one, two, three, middle, ...rest] = lines(`line of ${base}`);
      const body = [` ${one}`, ` ${two}`, ` ${three}`, `-${middle}`, `+patched for ${base}`];
      writeFileSync(
        join(dir, '0001-change.patch'),
        `--- a/${module}\n+++ b/${module}\n@@ -1,7 +1,7 @@\n${[...body, ...rest.map((line) => ` ${line}`)].join('\n')}\n`,
      );
    }
  }

  /** What comes out for a kernel of this series whose source has these lines; the "compiler" copies. */
  function outcome(series: string, source: readonly string[], compiled = '@true') {
    makeKernel();
    makeHeaders(`${series}.4`);
    writeFileSync(
      join(headers, 'Makefile'),
      `kernelversion:\n\t@echo ${series}.4\nmodules:\n\t${compiled}\n\t@cp $(M)/target_core_user.c $(M)/target_core_user.ko\n`,
    );
    const tree = join(headers, 'source');
    for (const file of [module, header]) {
      mkdirSync(join(tree, file, '..'), { recursive: true });
      writeFileSync(join(tree, file), `${source.join('\n')}\n`);
    }
    const { status, stdout, stderr } = spawnSync(
      join(headers, 'build.sh'),
      ['--kernel', series, '--headers', headers, '--source', tree, '--out', join(headers, 'out')],
      { encoding: 'utf8' },
    );
    const built =
      status === 0 ? readFileSync(join(headers, 'out/target_core_user.ko'), 'utf8') : '';
    return { status, said: stdout + stderr, patched: /patched for .*/.exec(built)?.[0] };
  }

  test('its own', () => {
    const { said, patched } = outcome('6.12', lines('line of 6.12'));
    expect(patched).toBe('patched for 6.12');
    expect(said).toMatch(/zero copy for kernel 6\.12\n$/);
  });

  test.each([
    ['6.6', '6.1'],
    ['6.6', '6.12'],
    ['7.0', '6.12'],
  ])('of a kernel that has none, %s, those of a neighbour that apply: %s', (series, base) => {
    const { said, patched } = outcome(series, lines(`line of ${base}`));
    expect(patched).toBe(`patched for ${base}`);
    expect(said).toMatch(new RegExp(`with the patches for ${base}: never tested on ${series}\\n$`));
  });

  test('a neighbour that is farther away is not asked', () => {
    const { status, said } = outcome('7.0', lines('line of 6.1'));
    expect(status).toBe(2);
    expect(said).toMatch(
      /no patches for kernel 7\.0, and those for 6\.12 don't apply to it \(there are patches for: 6\.1 6\.12\)\n$/,
    );
  });

  test('none apply', () => {
    const { status, said } = outcome('6.6', lines('line of 6.6'));
    expect(status).toBe(2);
    expect(said).toMatch(/no patches for kernel 6\.6, and those for 6\.1 and 6\.12 don't apply/);
  });

  test.each([
    [
      '@echo file.c:1: no such function; false',
      /no such function\n[\s\S]*compiling failed \(above\)/,
    ],
    [
      '@echo "file.c:1: warning: odd"',
      /file\.c:1: warning: odd\n[\s\S]*the compiler has warnings \(above\)/,
    ],
  ])("a neighbour's that apply and do not compile: %s", (compiled, message) => {
    const { status, said } = outcome('7.0', lines('line of 6.12'), compiled);
    expect(status).toBe(2);
    expect(said).toMatch(message);
    expect(said).toMatch(/for kernel 7\.0, with the patches for 6\.12: never tested on 7\.0\n$/);
  });

  test('a source that has changed beside a patch is not patched', () => {
    const { status, said } = outcome('6.12', ['changed', ...lines('line of 6.12').slice(1)]);
    expect(status).toBe(2);
    expect(said).toMatch(
      /0001-change\.patch doesn't apply to .*: it is of another version than 6\.12\n$/,
    );
  });
});

test('a symbol that is not exported', () => {
  makeHeaders(
    '6.1.100',
    symbols.filter((name) => name !== 'vm_insert_pages'),
  );
  const { status, stderr } = build('--headers', headers);
  expect(status).toBe(2);
  expect(stderr).toMatch(/kernel 9\.9-test doesn't export vm_insert_pages/);
});

test('an option that is off', () => {
  makeHeaders(
    '6.1.100',
    symbols,
    options.filter((name) => name !== 'UIO'),
  );
  expect(build('--headers', headers).stderr).toMatch(/is built without CONFIG_UIO/);
});

test('a source that is missing, or is none', () => {
  makeHeaders('6.1.100');
  const missing = build('--headers', headers, '--source', join(headers, 'none'));
  expect(missing.status).toBe(2);
  expect(missing.stderr).toMatch(
    /no source of kernel 6\.1; on Debian: apt-get install linux-source-6\.1/,
  );
  expect(build('--headers', headers, '--source', headers).stderr).toMatch(
    /is no kernel source tree/,
  );
});

test('an option of its own that it does not know', () => {
  expect(build('--fast', '1').stderr).toMatch(/unknown option --fast/);
  expect(build('--out').stderr).toMatch(/--out needs a value/);
});
