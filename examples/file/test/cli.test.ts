// SPDX-License-Identifier: Apache-2.0
/** The built command, as far as it goes without a kernel that has TCMU. */
import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { HELP } from '../src/options.js';
import { scratch } from './util.js';

const here = dirname(fileURLToPath(import.meta.url));
const cli = join(here, '../dist/cli.js');
const dir = scratch();

function run(...args: string[]) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [cli, ...args], {
    encoding: 'utf8',
    timeout: 20_000,
  });
  return { status, stdout, stderr };
}

describe('tcmu-file', () => {
  it('helps on standard output', () => {
    expect(run('--help')).toEqual({ status: 0, stdout: HELP, stderr: '' });
    const manifest = JSON.parse(readFileSync(join(here, '../package.json'), 'utf8'));
    expect(run('--version').stdout).toBe(`${manifest.version}\n`);
  });

  it('ends with 2 when it is used wrongly', () => {
    for (const args of [[], ['/x'], ['/x', '--name', 'd0', '--nonsense']]) {
      const { status, stdout, stderr } = run(...args);
      expect({ status, stdout }).toEqual({ status: 2, stdout: '' });
      expect(stderr).toMatch(/^tcmu-file: error: .*\nTry tcmu-file --help\.\n$/);
    }
  });

  it('ends with 1 and one line when it fails', () => {
    const { status, stdout, stderr } = run(join(dir, 'none'), '--name', 'd0');
    expect({ status, stdout }).toEqual({ status: 1, stdout: '' });
    expect(stderr).toMatch(/^tcmu-file: error: open .*none: ENOENT; it does not exist.*\n$/);
    const structured = JSON.parse(run(join(dir, 'none'), '--name', 'd0', '--json').stderr);
    expect(structured).toMatchObject({ level: 'error', code: 'ERR_TCMU_IO' });
  });

  it('names the allowed directory that a path leads out of', () => {
    const { status, stderr } = run('/etc/hosts', '--name', 'd0', '--allow-dir', dir);
    expect(status).toBe(1);
    expect(stderr).toMatch(/\/etc\/hosts, outside the allowed directory/);
  });

  it('leaves no file that it made, and any other as it is, when it can not serve', () => {
    const path = join(dir, 'made');
    const { status, stderr } = run(path, '--size', '1M', '--uio', '/dev/uio999999');
    expect(status).toBe(1);
    expect(stderr).toMatch(/uio999999/);
    expect(existsSync(path)).toBe(false);
    writeFileSync(path, Buffer.alloc(4096));
    expect(run(path, '--uio', '/dev/uio999999').status).toBe(1);
    expect(statSync(path).size).toBe(4096);
  });

  it('refuses control characters in a name', () => {
    const path = join(dir, 'disk');
    writeFileSync(path, Buffer.alloc(4096));
    const { status, stderr } = run(path, '--name', 'a\nb');
    expect(status).toBe(1);
    expect(stderr).toMatch(/control characters/);
    expect(stderr.trim().split('\n')).toHaveLength(1);
  });
});
