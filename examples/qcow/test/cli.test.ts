// SPDX-License-Identifier: Apache-2.0
/** The built command, as far as it goes without a kernel that has TCMU. */
import { execFileSync, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, readFileSync, writeFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { UsageError } from 'tcmu/program';
import { expect, test } from 'vitest';
import { listen, send } from '../src/control.js';
import { HELP, parseCommand } from '../src/options.js';
import { failure, MiB, qemuImg, qemuIo, scratch } from './util.js';

const here = dirname(fileURLToPath(import.meta.url));
const cli = join(here, '../dist/cli.js');
const dir = scratch();

function run(...args: string[]) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [cli, ...args], {
    encoding: 'utf8',
    timeout: 60_000,
  });
  return { status, stdout, stderr };
}

test('helps on standard output', () => {
  expect(run('--help')).toEqual({ status: 0, stdout: HELP, stderr: '' });
  const manifest = JSON.parse(readFileSync(join(here, '../package.json'), 'utf8'));
  expect(run('--version').stdout).toBe(`${manifest.version}\n`);
});

test('an image from its making to its end, by the command line', { timeout: 120_000 }, () => {
  const base = join(dir, 'base.qcow2');
  const top = join(dir, 'top.qcow2');
  expect(run('create', base, '8M', '--cluster-size', '4K')).toMatchObject({
    status: 0,
    stderr: '',
  });
  expect(run('create', top, '--backing', 'base.qcow2', '--backing-format', 'qcow2')).toMatchObject({
    status: 0,
  });
  expect(JSON.parse(run('info', top, '--json').stdout)).toMatchObject({
    size: 8 * MiB,
    backingFile: 'base.qcow2',
    clusterSize: 65536,
  });
  expect(run('snapshot', 'create', 'empty', top).status).toBe(0);
  qemuIo(top, ['write -q -P 5 1M 64k']);
  expect(run('snapshot', 'list', top).stdout).toMatch(/^1\tempty\t.*\t8 MiB\n$/);
  expect(run('resize', '4M', top)).toMatchObject({ status: 2 });
  expect(run('resize', '16M', top).status).toBe(0);
  expect(run('commit', top).status).toBe(0);
  qemuIo(base, ['read -q -P 5 1M 64k', 'read -q -P 0 2M 14M']);
  expect(run('snapshot', 'revert', 'empty', top).status).toBe(0);
  expect(run('snapshot', 'delete', 'empty', top).status).toBe(0);
  expect(run('rebase', top).status).toBe(0);
  expect(qemuImg('info', top)).not.toContain('backing');
  qemuIo(top, ['read -q -P 5 1M 64k']);
  expect(run('check', top)).toMatchObject({
    status: 0,
    stdout: expect.stringContaining('0 errors, 0 leaked clusters\n'),
  });
  qemuImg('check', top);
});

test('a damaged image is told by the exit code, and repaired', () => {
  const path = join(dir, 'leak.qcow2');
  run('create', path, '8M');
  const bytes = readFileSync(path);
  // The refcount of a cluster behind the end: default layout, block in the third cluster.
  bytes.writeUInt16BE(0, 2 * 65536 + 3 * 2);
  writeFileSync(path, bytes);
  expect(run('check', path)).toMatchObject({ status: 4 });
  expect(run('check', path, '--repair', 'all')).toMatchObject({
    status: 0,
    stdout: expect.stringContaining('0 errors'),
  });
  qemuImg('check', path);
});

test('a wrong use ends with 2, a failure with 1 and one line', () => {
  for (const args of [
    [],
    ['x'],
    ['serve', '/x'],
    ['info'],
    ['info', 'a', 'b'],
    ['create', 'a', 'z'],
  ]) {
    const { status, stdout, stderr } = run(...args);
    expect({ status, stdout }).toEqual({ status: 2, stdout: '' });
    expect(stderr).toMatch(/^tcmu-qcow: error: .*\nTry tcmu-qcow --help\.\n$/);
  }
  const { status, stderr } = run('info', join(dir, 'none'));
  expect(status).toBe(1);
  expect(stderr).toMatch(/^tcmu-qcow: error: .*none.*\n$/);
});

test('a passphrase comes from a file that is not for everybody, or from the environment', () => {
  const file = join(dir, 'passphrase');
  writeFileSync(file, 'secret\nmore\n', { mode: 0o600 });
  const parse = (args: string[], env = {}) => parseCommand(['info', 'x', ...args], env).command;
  expect(parse(['--passphrase-file', file])).toMatchObject({ open: { passphrase: 'secret' } });
  expect(parse([], { TCMU_PASSPHRASE: 'p' })).toMatchObject({ open: { passphrase: 'p' } });
  chmodSync(file, 0o644);
  expect(() => parse(['--passphrase-file', file])).toThrow(UsageError);
});

test('a command that serves nothing ends by the signal at once', async () => {
  // It waits for the passphrase as long as nobody writes one.
  const fifo = join(dir, 'fifo');
  execFileSync('mkfifo', ['-m', '600', fifo]);
  const child = spawn(process.execPath, [cli, 'info', fifo, '--passphrase-file', fifo]);
  const ended = once(child, 'exit');
  const writer = await open(fifo, 'w');
  child.kill('SIGINT');
  expect(await ended).toEqual([null, 'SIGINT']);
  await writer.close();
});

test('a running server is spoken to over a socket', async () => {
  const socket = join(dir, 'control');
  const asked: unknown[] = [];
  const server = await listen(socket, async (request) => {
    asked.push(request);
    if (request.action === 'delete') throw new Error('it has no such snapshot');
    return '7';
  });
  try {
    expect(await send(socket, { action: 'create', name: 'a b' })).toBe('7');
    expect(await failure(() => send(socket, { action: 'delete', name: 'x' }))).toMatchObject({
      message: 'it has no such snapshot',
    });
    const nonsense = { action: 'fly' } as unknown as { action: 'list' };
    expect(await failure(() => send(socket, nonsense))).toMatchObject({
      message: 'this request is not understood',
    });
    expect(asked).toEqual([
      { action: 'create', name: 'a b' },
      { action: 'delete', name: 'x' },
    ]);
    expect(await failure(() => listen(socket, async () => undefined))).toMatchObject({
      message: expect.stringContaining('another server listens there'),
    });
  } finally {
    server.close();
  }
});
