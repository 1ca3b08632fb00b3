// SPDX-License-Identifier: Apache-2.0
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, test } from 'vitest';
import {
  CommandLine,
  DEVICE_OPTIONS,
  deviceOptions,
  FLAG,
  LIST,
  secretFile,
  sizeOf,
  TEXT,
  UsageError,
} from '../lib/program/index.js';

const dir = mkdtempSync(join(tmpdir(), 'tcmu-program-'));
afterAll(() => rmSync(dir, { recursive: true }));

const KINDS = { thick: FLAG, name: TEXT, list: LIST, help: { ...FLAG, short: 'h' } } as const;
const line = (text: string) => new CommandLine(text === '' ? [] : text.split(' '), KINDS);
const mistake = (use: () => unknown): string => {
  try {
    use();
  } catch (error) {
    if (error instanceof UsageError && error.code === 'ERR_TCMU_USAGE') return error.message;
    throw error;
  }
  return 'none';
};

test('what was said is read by kind, and what was not is undefined', () => {
  const said = line('a --thick --name x b --list 1 --list 2');
  expect(said.words).toEqual(['a', 'b']);
  expect(said.flag('thick')).toBe(true);
  expect(said.text('name')).toBe('x');
  expect(said.list('list')).toEqual(['1', '2']);
  expect(line('-h').flag('help')).toBe(true);
  const nothing = line('');
  expect([nothing.has('thick'), said.has('thick')]).toEqual([false, true]);
  expect(nothing.flag('thick')).toBe(false);
  expect(nothing.list('list')).toEqual([]);
  expect(nothing.text('name')).toBeUndefined();
  expect(nothing.number('name')).toBeUndefined();
  expect(nothing.size('name')).toBeUndefined();
  expect(nothing.choice('name', ['x'])).toBeUndefined();
  expect(nothing.secret('name')).toBeUndefined();
  expect(mistake(() => line('--other'))).toMatch(/--other/);
  expect(mistake(() => line('--name'))).toMatch(/--name/);
});

test.each([
  ['7', {}, 7],
  ['0', { least: 0 }, 0],
  ['9007199254740991', {}, Number.MAX_SAFE_INTEGER],
  ['9007199254740993', {}, /from 1 on/],
  ['0', {}, '--name 0: give a whole number from 1 on'],
  ['20', { least: 0, most: 19 }, '--name 20: give a whole number from 0 to 19'],
  ['-1', {}, /argument/],
  ['1.5', {}, /whole number/],
  ['0x10', {}, /whole number/],
  ['1e3', {}, /whole number/],
  ['512', { oneOf: [512, 4096] }, 512],
  ['513', { oneOf: [512, 4096] }, '--name 513: give 512, 4096'],
] as const)('the number %s under %j is %s', (text, rule, answer) => {
  if (typeof answer === 'number') expect(line(`--name ${text}`).number('name', rule)).toBe(answer);
  else expect(mistake(() => line(`--name ${text}`).number('name', rule))).toMatch(answer);
});

test('sizes and choices', () => {
  expect(line('--name 1.5G').size('name')).toBe(1.5 * 1024 ** 3);
  for (const wrong of ['0', '1X', '1.5']) {
    expect(mistake(() => line(`--name ${wrong}`).size('name'))).toMatch(`--name ${wrong}: give a`);
    expect(mistake(() => sizeOf('resize', wrong))).toMatch(`resize ${wrong}: give a size`);
  }
  expect(line('--name b').choice('name', ['a', 'b'])).toBe('b');
  expect(mistake(() => line('--name c').choice('name', ['a', 'b']))).toBe('--name c: give a, b');
});

test('a secret is the first line of a file that not everybody may read', () => {
  const file = join(dir, 'secret');
  const secret = () => line(`--name ${file}`).secret('name');
  writeFileSync(file, 'from the file\nnot this\n', { mode: 0o600 });
  expect(secret()).toBe('from the file');
  expect(secretFile('x', file).toString()).toBe('from the file\nnot this\n');
  chmodSync(file, 0o644);
  expect(mistake(secret)).toMatch(`--name ${file}: everybody may read it; chmod 640 ${file}`);
  chmodSync(file, 0o600);
  writeFileSync(file, '\n');
  expect(mistake(secret)).toMatch(/its first line is empty/);
  expect(mistake(() => line(`--name ${dir}/none`).secret('name'))).toMatch(/none: ENOENT/);
});

const device = (text: string, env = {}) =>
  deviceOptions(new CommandLine(text === '' ? [] : text.split(' '), DEVICE_OPTIONS), env);

test('without a word a device is a disk of this machine, and nothing else is said of it', () => {
  expect(device('')).toEqual({ export: 'loopback', recover: false });
  expect(deviceOptions(new CommandLine([], DEVICE_OPTIONS), {}, 'none').export).toBe('none');
});

test('the kernel side of a device', () => {
  const said =
    '--export vhost --max-sectors 256 --data-area-mb 64 --ring-mb 2 --timeout 0 --concurrency 8 --recover';
  expect(device(said)).toEqual({
    export: 'vhost',
    recover: 'auto',
    maxSectors: 256,
    dataAreaMiB: 64,
    ringMiB: 2,
    commandTimeout: 0,
    concurrency: 8,
  });
});

test('an iSCSI export', () => {
  const said =
    '--export iscsi --iqn i --portal ::1 --portal 10.0.0.1:3261 --initiator a --initiator b --chap-user me';
  const chap = { user: 'me', password: 'secret' };
  expect(device(said, { TCMU_CHAP_PASSWORD: 'secret' }).export).toEqual({
    type: 'iscsi',
    iqn: 'i',
    portals: ['::1', '10.0.0.1:3261'],
    initiators: [
      { name: 'a', chap },
      { name: 'b', chap },
    ],
  });
  const file = join(dir, 'password');
  writeFileSync(file, 'from the file\n', { mode: 0o600 });
  // The file goes before the environment.
  const anyone = `--export iscsi --iqn i --anyone --chap-user me --chap-password-file ${file}`;
  expect(device(anyone, { TCMU_CHAP_PASSWORD: 'secret' }).export).toEqual({
    type: 'iscsi',
    iqn: 'i',
    anyone: { chap: { user: 'me', password: 'from the file' } },
  });
  expect(device('--export iscsi --iqn i --anyone').export).toEqual({
    type: 'iscsi',
    iqn: 'i',
    anyone: {},
  });
});

test.each([
  ['--export nfs', /loopback, iscsi, vhost, none/],
  ['--iqn i', /--iqn goes with --export iscsi/],
  ['--anyone', /--anyone goes with --export iscsi/],
  ['--export vhost --initiator a', /--initiator goes with/],
  ['--export iscsi', /needs --iqn/],
  ['--export iscsi --iqn i', /who may log in/],
  ['--export iscsi --iqn i --anyone --initiator j', /who may log in/],
  ['--export iscsi --iqn i --anyone --chap-user u', /TCMU_CHAP_PASSWORD/],
  ['--export iscsi --iqn i --anyone --chap-password-file f', /needs --chap-user/],
  ['--export iscsi --iqn i --anyone --chap-user u --chap-password-file /none', /ENOENT/],
  ['--max-sectors 0', /from 1 on/],
])('a device is refused for %j', (text, message) => {
  expect(mistake(() => device(text))).toMatch(message);
});
