// SPDX-License-Identifier: Apache-2.0
import { channel } from 'node:diagnostics_channel';
import { EventEmitter } from 'node:events';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { DeviceError } from '../lib/errors.js';
import { Program, type ServedDisk, UsageError } from '../lib/program/index.js';
import { sense } from '../lib/scsi/sense.js';

let out: string;
let told: string;
beforeEach(() => {
  out = '';
  told = '';
  vi.spyOn(process.stdout, 'write').mockImplementation((text: unknown, written?: unknown) => {
    out += text;
    if (typeof written === 'function') written();
    return true;
  });
  vi.spyOn(process.stderr, 'write').mockImplementation((text) => {
    told += text;
    return true;
  });
});
afterEach(() => {
  vi.restoreAllMocks();
  vi.useRealTimers();
});

const program = () =>
  new Program({
    name: 'disk',
    help: 'how to use it\n',
    manifest: new URL('../package.json', import.meta.url),
  });

/** A disk as far as a program knows it. */
function served() {
  const device = Object.assign(new EventEmitter(), {
    lost: undefined as Error | undefined,
    closed: false,
  });
  const disk = {
    name: 'd0',
    uioPath: '/dev/uio0',
    disk: '/dev/sda' as string | undefined,
    reach: '/dev/sda',
    device: device as unknown as ServedDisk['device'],
    close: vi.fn(async () => {
      device.closed = true;
    }),
  };
  return { device, disk };
}

const send = (name: NodeJS.Signals) => process.emit(name, name);
const heard = () => ['SIGINT', 'SIGTERM', 'SIGHUP'].map((name) => process.listenerCount(name));

test('people are told on standard error, the same trouble once in ten seconds', () => {
  vi.useFakeTimers();
  const one = program();
  one.tell('info', 'tcmu: begun');
  one.tell('info', 'tcmu: begun');
  one.warn('slow');
  one.warn('slow');
  one.warn('slower');
  vi.advanceTimersByTime(10_000);
  // Somebody sets the clock back.
  vi.setSystemTime(0);
  one.warn('slow');
  expect(told.split('\n')).toEqual([
    'disk: begun',
    'disk: begun',
    'disk: warning: slow',
    'disk: warning: slower',
    'disk: warning: slow',
    '',
  ]);
  expect(out).toBe('');
});

test('an error with a code says it all; of another the stack is wanted', () => {
  const one = program();
  one.tellError(new DeviceError('ERR_TCMU_DEVICE_GONE', 'tcmu: d0 is gone'));
  one.tellError(new UsageError('which?'));
  one.tellError(Object.assign(new Error('EACCES: no'), { code: 'EACCES' }), 'warning');
  one.tellError('text');
  expect(told).toBe(
    'disk: error: d0 is gone\ndisk: error: which?\nTry disk --help.\ndisk: warning: EACCES: no\ndisk: error: text\n',
  );
  one.tellError(new TypeError('a defect'));
  expect(told).toMatch(/error: TypeError: a defect\n {4}at /);
});

test('results go to standard output; as JSON everything is a line', () => {
  const one = program();
  one.say('fine', { n: 1n });
  one.say('', []);
  expect(out).toBe('fine\n');
  one.json = true;
  one.say('fine', { n: 1n });
  one.tellError(new DeviceError('ERR_TCMU_DEVICE_GONE', 'tcmu: d0 is gone'));
  expect(out).toBe('fine\n{"n":1}\n');
  expect(JSON.parse(told)).toEqual({
    level: 'error',
    message: 'd0 is gone',
    code: 'ERR_TCMU_DEVICE_GONE',
  });
});

test('serves until a signal, also one that came while starting', async () => {
  const before = heard();
  const { disk } = served();
  const end = program().serve(async () => {
    expect(heard()).toEqual(before.map((count, i) => count + (i < 2 ? 1 : 0)));
    send('SIGTERM');
    return { served: disk, what: 'a.img (1 MiB)' };
  });
  expect(await end).toBe(0);
  expect(disk.close).toHaveBeenCalledOnce();
  expect(out).toBe('ready name=d0 uio=/dev/uio0 disk=/dev/sda\n');
  expect(told).toBe('disk: serving a.img (1 MiB) as d0: /dev/sda\n');
  expect(heard()).toEqual(before);
});

test('the ready line as JSON has the facts, and no disk where there is none', async () => {
  const { disk } = served();
  disk.disk = undefined;
  const one = program();
  one.json = true;
  const end = one.serve(async () => ({ served: disk, what: 'a.img', facts: { size: 512 } }));
  await expect.poll(() => out).not.toBe('');
  send('SIGINT');
  expect(await end).toBe(0);
  expect(JSON.parse(out)).toEqual({ ready: { name: 'd0', uio: '/dev/uio0', size: 512 } });
});

test('a disk that is mounted is served on, and the next signal tries again', async () => {
  const { disk } = served();
  disk.close.mockRejectedValueOnce(new DeviceError('ERR_TCMU_TARGET_BUSY', 'tcmu: mounted'));
  const end = program().serve(async () => ({ served: disk, what: 'a.img' }));
  await expect.poll(() => out).not.toBe('');
  send('SIGINT');
  await expect.poll(() => told).toContain('error: mounted');
  send('SIGINT');
  expect(await end).toBe(0);
  expect(disk.close).toHaveBeenCalledTimes(2);
});

test('a close that fails after the device has gone ends with 1', async () => {
  const { disk, device } = served();
  disk.close.mockImplementation(async () => {
    device.closed = true;
    throw new DeviceError('ERR_TCMU_MAPPING_LEAKED', 'tcmu: leaked');
  });
  const end = program().serve(async () => {
    send('SIGINT');
    return { served: disk, what: 'a.img' };
  });
  expect(await end).toBe(1);
  expect(told).toContain('error: leaked');
});

test('the loss of the device ends serving with 1; its other errors are told', async () => {
  const { disk, device } = served();
  const reasons: string[] = [];
  const end = program().serve(async () => ({
    served: disk,
    what: 'a.img',
    close: async (reason) => {
      reasons.push(reason);
    },
  }));
  await expect.poll(() => out).not.toBe('');
  device.emit('error', new DeviceError('ERR_TCMU_BUFFER_ESCAPED', 'tcmu: escaped'));
  device.lost = new DeviceError('ERR_TCMU_DEVICE_GONE', 'tcmu: gone');
  device.emit('error', device.lost);
  expect(await end).toBe(1);
  expect(reasons).toEqual(['lost']);
  expect(told).toContain('warning: escaped\ndisk: warning: gone\n');
});

test('a device lost while starting ends serving too', async () => {
  const { disk, device } = served();
  device.lost = new DeviceError('ERR_TCMU_DEVICE_GONE', 'tcmu: gone');
  expect(await program().serve(async () => ({ served: disk, what: 'a.img' }))).toBe(1);
});

test('SIGHUP reloads, and a reload that fails is told', async () => {
  const { disk } = served();
  const reload = vi.fn(async () => {});
  reload.mockRejectedValueOnce(new DeviceError('ERR_TCMU_IO', 'tcmu: no size'));
  const serving = { served: disk, what: 'a.img' };
  const end = program().serve(async () => serving, reload);
  await expect.poll(() => out).not.toBe('');
  send('SIGHUP');
  send('SIGHUP');
  await expect.poll(() => reload.mock.calls.length).toBe(2);
  expect(reload).toHaveBeenCalledWith(serving);
  expect(told).toContain('error: no size');
  send('SIGTERM');
  expect(await end).toBe(0);
});

test('failures of the store are told as what they came from', async () => {
  const { disk } = served();
  const failures = channel('tcmu:scsi:error');
  const end = program().serve(async () => ({ served: disk, what: 'a.img' }));
  await expect.poll(() => out).not.toBe('');
  const cause = new DeviceError('ERR_TCMU_IO', 'tcmu: the bucket is full');
  failures.publish({ error: sense.mediumError('write', { cause }) });
  send('SIGTERM');
  await end;
  expect(told).toContain('warning: the bucket is full');
  expect(failures.hasSubscribers).toBe(false);
});

test('what starting throws is thrown, and no signal is waited for', async () => {
  const before = heard();
  const failing = program().serve(() => Promise.reject(new UsageError('which?')));
  await expect(failing).rejects.toThrow('which?');
  expect(heard()).toEqual(before);
});

type Main = Parameters<Program['run']>[0];
test.each<[Main, number, string | RegExp, string | RegExp]>([
  [async () => 3, 3, '', ''],
  [async () => 'help', 0, 'how to use it\n', ''],
  [async () => 'version', 0, /^\d+\.\d+\.\d+.*\n$/, ''],
  [() => Promise.reject(new UsageError('which?')), 2, '', /which\?\nTry disk --help/],
  [() => Promise.reject(new DeviceError('ERR_TCMU_IO', 'tcmu: no')), 1, '', 'disk: error: no\n'],
])('main %# decides the exit code and what is printed', async (main, code, said, trouble) => {
  const exit = vi.spyOn(process, 'exit').mockReturnValue(undefined as never);
  const before = process.exitCode;
  try {
    await program().run(main);
    expect(process.exitCode).toBe(code);
  } finally {
    process.exitCode = before;
  }
  expect(out).toMatch(said);
  expect(told).toMatch(trouble);
  // Not before all was written.
  expect(exit).toHaveBeenCalledOnce();
});
