// SPDX-License-Identifier: Apache-2.0
/** kernel/build.sh says what is missing before it compiles anything. */
import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';

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

test.each([
  ['5.10.0', /kernel 5\.10\.0 is too old: 6\.1 is the oldest/],
  ['6.0.19', /too old/],
  ['6.6.1', /no patches for kernel 6\.6, only for: 6\.1 6\.12/],
  ['7.0.0', /no patches for kernel 7\.0/],
])('a kernel that there are no patches for: %s', (version, message) => {
  makeHeaders(version);
  const { status, stderr } = build('--headers', headers);
  expect(status).toBe(2);
  expect(stderr).toMatch(message);
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
