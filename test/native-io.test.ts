// SPDX-License-Identifier: Apache-2.0
/** The addon's file operations: at once, queued, pinning, on command memory and ordinary memory. */
import { execFileSync } from 'node:child_process';
import {
  closeSync,
  constants,
  fstatSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  readSync,
  rmSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { IO_INLINE, IO_NOWAIT, moveFile, type NativeIo, native } from '../lib/native.js';
import {
  complete,
  DATA_OFFSET,
  MAP_BYTES,
  type Served,
  serve,
  settle,
  until,
} from './native-kernel.js';

setFlagsFromString('--expose-gc');
const gc = runInNewContext('gc') as () => void;

let folder: string;
let fd: number;
let fifo: number;
let io: NativeIo;
let results: [number, number][];
let batches: number[];
const served: Served[] = [];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'tcmu-io-'));
  fd = openSync(join(folder, 'file'), constants.O_RDWR | constants.O_CREAT, 0o600);
  execFileSync('mkfifo', [join(folder, 'fifo')]);
  fifo = openSync(join(folder, 'fifo'), constants.O_RDWR);
  results = [];
  batches = [];
  io = new native.IoQueue((count) => {
    batches.push(count);
    for (let i = 0; i < count; i++) {
      results.push([io.results[2 * i] as number, io.results[2 * i + 1] as number]);
    }
  });
});

afterEach(() => {
  for (const { ring, kernel } of served.splice(0)) {
    ring.close();
    for (const each of [kernel.memory, kernel.event, kernel.doorbell]) closeSync(each);
    kernel.remove();
  }
  closeSync(fd);
  closeSync(fifo);
  rmSync(folder, { recursive: true });
});

/** A ring with commands in flight, one a list of segments, using `io`. */
async function commands(...pieces: [number, number][][]): Promise<Served> {
  const one = serve(undefined, { io });
  served.push(one);
  for (const [i, list] of pieces.entries()) one.kernel.queue({ id: i + 1, pieces: list });
  one.kernel.ring();
  await until(() => one.ring.inFlight() === pieces.length, 'the commands');
  return one;
}

function text(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('latin1');
}

for (const [name, mode] of [
  ['queued', 0],
  ['without waiting', IO_NOWAIT],
  ['inline', IO_INLINE],
] as const) {
  test(`${name}: command memory from and to a file, in pieces`, async () => {
    const { kernel, ring } = await commands([
      [0, 4],
      [100, 4],
    ]);
    writeSync(fd, 'abcdefghij');
    const finish = async (result: number): Promise<number> => {
      if (result >= 0) return result;
      await until(() => results.length > 0, 'the result');
      const [id, value] = results.pop() as [number, number];
      expect(id).toBe(-result);
      return value;
    };
    expect(await finish(moveFile(ring, false, 0, 1, 6, fd, 2, mode))).toBe(6);
    expect(text(kernel.data(0, 4))).toBe('\0cde');
    expect(text(kernel.data(100, 4))).toBe('fgh\0');
    // Behind the end of the file: zeros.
    kernel.setData(0, Buffer.from('xxxx'));
    kernel.setData(100, Buffer.from('yyyy'));
    expect(await finish(moveFile(ring, false, 0, 0, 8, fd, 7, mode))).toBe(3);
    expect(text(kernel.data(0, 4)) + text(kernel.data(100, 4))).toBe('hij\0\0\0\0\0');
    expect(await finish(moveFile(ring, false, 0, 0, 8, fd, 100, mode))).toBe(0);
    kernel.setData(0, Buffer.from('1234'));
    kernel.setData(100, Buffer.from('5678'));
    expect(await finish(moveFile(ring, true, 0, 2, 5, fd, 20, mode))).toBe(5);
    const back = Buffer.alloc(30);
    expect(readSync(fd, back, 0, 30, 0)).toBe(25);
    expect(back.subarray(20, 25).toString()).toBe('34567');
    expect(await finish(moveFile(ring, false, 0, 0, 0, fd, 0, mode))).toBe(0);
  });

  test(`${name}: ordinary memory`, async () => {
    const finish = async (result: number): Promise<number> => {
      if (result >= 0) return result;
      await until(() => results.length > 0, 'the result');
      return (results.pop() as [number, number])[1];
    };
    expect(await finish(io.write(Buffer.from('hello'), fd, 3, mode))).toBe(5);
    const target = new Uint8Array(12).fill(1);
    expect(await finish(io.read(target.subarray(1, 11), fd, 0, mode))).toBe(8);
    expect(text(target)).toBe('\x01\0\0\0hello\0\0\x01');
    expect(await finish(io.datasync(fd, mode))).toBe(0);
    expect(await finish(io.truncate(fd, 100_000, mode))).toBe(0);
    expect(fstatSync(fd).size).toBe(100_000);
    expect(await finish(io.copy(fd, 3, fd, 50_000, 5, mode))).toBe(5);
    expect(await finish(io.read(target.subarray(0, 5), fd, 50_000, mode))).toBe(5);
    expect(text(target.subarray(0, 5))).toBe('hello');
    expect(await finish(io.allocate(fd, 0, 100_000, 4096, mode))).toBe(0);
    expect(fstatSync(fd).size).toBe(104_096);
  });
}

test('errors at once are thrown, later ones are results', async () => {
  const { ring } = await commands([[0, 512]]);
  const system = (code: string, syscall: string) => expect.objectContaining({ code, syscall });
  expect(() => moveFile(ring, false, 0, 0, 512, 9999, 0, IO_INLINE)).toThrow(
    system('EBADF', 'read'),
  );
  expect(() => io.write(new Uint8Array(1), 9999, 0, IO_NOWAIT)).toThrow(system('EBADF', 'write'));
  expect(() => io.truncate(9999, 0, IO_INLINE)).toThrow(system('EBADF', 'ftruncate'));
  expect(() => io.datasync(9999, IO_INLINE)).toThrow(system('EBADF', 'fdatasync'));
  const full = openSync('/dev/full', 'r+');
  expect(() => moveFile(ring, true, 0, 0, 512, full, 0, IO_INLINE)).toThrow(
    system('ENOSPC', 'write'),
  );
  const ids = [
    moveFile(ring, false, 0, 0, 512, 9999, 0, 0),
    moveFile(ring, true, 0, 0, 512, full, 0, 0),
    io.seek(fd, 0, 3, 0),
  ];
  await until(() => results.length === 3, 'results');
  expect(Object.fromEntries(results)).toEqual({
    [-(ids[0] as number)]: -9,
    [-(ids[1] as number)]: -28,
    [-(ids[2] as number)]: -6,
  });
  closeSync(full);
  expect(() => moveFile(ring, false, 0, 1, 512, fd, 0, 0)).toThrow(
    expect.objectContaining({ code: 'ERR_TCMU_BUFFER_RANGE' }),
  );
  expect(() => moveFile(ring, false, 1, 0, 0, fd, 0, 0)).toThrow(
    expect.objectContaining({ code: 'ERR_TCMU_BUFFER_REVOKED' }),
  );
  expect(() => moveFile(ring, false, 0, 0, 1, fd, -2, 0)).toThrow(RangeError);
  expect(() => moveFile(ring, false, 0, 0, 1, fd, 2 ** 60, 0)).toThrow(RangeError);
});

test('SEEK_DATA and SEEK_HOLE leave the file offset alone', async () => {
  ftruncateSync(fd, 1 << 20);
  writeSync(fd, Buffer.alloc(4096, 1), 0, 4096, 65536);
  readSync(fd, Buffer.alloc(10));
  const one = async (result: number): Promise<number> => {
    if (result >= 0) return result;
    await until(() => results.length === 1, 'the result');
    return (results.pop() as [number, number])[1];
  };
  expect(await one(io.seek(fd, 0, 3, 0))).toBe(65536);
  expect(await one(io.seek(fd, 65536, 4, IO_INLINE))).toBe(69632);
  expect(readSync(fd, Buffer.alloc(65536))).toBe(65536);
  const next = Buffer.alloc(1);
  readSync(fd, next);
  expect(next[0]).toBe(1);
});

test('a queued read keeps its slot pinned until its result is taken', async () => {
  const { kernel, ring } = await commands([[0, 8]]);
  kernel.setData(0, Buffer.from('oldbytes'));
  const id = -moveFile(ring, false, 0, 0, 8, fifo, -1, 0);
  expect(id).toBeGreaterThan(0);
  const [view] = ring.segments(0, 0, 8);
  complete(ring, 0, { status: 2 });
  ring.flush();
  await settle();
  expect(kernel.collect()).toEqual([]);
  expect(view?.length).toBe(8);
  writeSync(fifo, 'abcdefgh');
  await until(() => results.length === 1, 'the result');
  expect(results).toEqual([[id, 8]]);
  await until(() => kernel.doorbells() === 1, 'the doorbell');
  expect(kernel.collect()).toMatchObject([{ id: 1, status: 2 }]);
  expect(text(kernel.data(0, 8))).toBe('abcdefgh');
  expect(view?.length).toBe(0);
});

test('close under a running read frees nothing before it is over', async () => {
  const { kernel, ring } = await commands([[0, 8]]);
  moveFile(ring, false, 0, 0, 8, fifo, -1, 0);
  await sleep(10);
  expect(ring.close()).toBe(false);
  writeSync(fifo, 'abcdefgh');
  await until(() => results.length === 1, 'the result');
  expect(text(kernel.data(0, 8))).toBe('abcdefgh');
  expect(ring.close()).toBe(true);
});

test('an operation that blocks holds up neither results before it nor operations behind it', async () => {
  writeSync(fd, Buffer.alloc(4096));
  const target = () => new Uint8Array(16);
  const { ring } = await commands([[0, 16]]);
  // Handed over together, as from a dispatch: quick, blocked, quick.
  const blocked = -io.read(target(), fifo, -1, 0);
  const quick = [-io.read(target(), fd, 0, 0), -io.read(target(), fd, 16, 0)];
  await until(() => results.length === 2, 'the quick ones');
  expect(results.map(([id]) => id).sort()).toEqual(quick.sort());
  // With three of four jobs blocked, the last does all the others.
  const more = [-io.read(target(), fifo, -1, 0), -io.read(target(), fifo, -1, 0)];
  const many = Array.from({ length: 100 }, (_, i) => -io.read(target(), fd, i, 0));
  await until(() => results.length === 102, 'the others');
  expect(many.length).toBe(100);
  writeSync(fifo, Buffer.alloc(48));
  await until(() => results.length === 105, 'all');
  expect(
    results
      .slice(-3)
      .map(([id]) => id)
      .sort(),
  ).toEqual([blocked, ...more].sort());
  expect(ring.inFlight()).toBe(1);
});

test('what one dispatch queues comes back in batches, and its commands go with few doorbells', async () => {
  writeSync(fd, Buffer.alloc(1 << 20, 1));
  const slotOf = new Map<number, number>();
  const read = () =>
    Array.from({ length: 60 }, (_, i) => one.kernel.data((i + 1) * 512 + 511, 1)[0]);
  io = new native.IoQueue((count) => {
    // A thread that is late finds the results of all the others.
    const end = performance.now() + 60_000;
    while (batches.length === 0 && read().includes(0) && performance.now() < end);
    batches.push(count);
    for (let i = 0; i < count; i++) {
      const slot = slotOf.get(io.results[2 * i] as number) as number;
      expect(io.results[2 * i + 1]).toBe(512);
      complete(one.ring, slot);
    }
  });
  const one: Served = serve(
    (events, { ring }) => {
      for (const slot of events)
        slotOf.set(-moveFile(ring, false, slot, 0, 512, fd, slot * 512, 0), slot);
    },
    { io, batchSize: 64 },
  );
  served.push(one);
  for (let id = 1; id <= 60; id++) one.kernel.queue({ id, pieces: [[id * 512, 512]] });
  one.kernel.ring();
  await until(() => one.ring.stats().completions === 60, 'all');
  expect(batches.length).toBeLessThan(20);
  expect(one.kernel.doorbells()).toBe(batches.length);
  expect(new Set(one.kernel.collect().map(({ id }) => id)).size).toBe(60);
});

test('ids are small and come free only after they were reported', async () => {
  const ids = new Set<number>();
  for (let round = 0; round < 20; round++) {
    const id = -io.read(new Uint8Array(1), fd, 0, 0);
    ids.add(id);
    await until(() => results.length === round + 1, 'a result');
  }
  expect(Math.max(...ids)).toBeLessThan(4);
  // Queued from inside the report: another id than any of that report.
  const seen: number[] = [];
  let again = 3;
  io = new native.IoQueue((count) => {
    const reported = Array.from({ length: count }, (_, i) => io.results[2 * i] as number);
    seen.push(...reported);
    if (again-- > 0) expect(reported).not.toContain(-io.read(new Uint8Array(1), fd, 0, 0));
  });
  for (let i = 0; i < 8; i++) io.read(new Uint8Array(1), fd, 0, 0);
  await until(() => seen.length === 11, 'all');
});

test('memory of a queued read outlives its JavaScript object', async () => {
  const read = (): void => {
    io.read(new Uint8Array(1 << 20), fifo, -1, 0);
  };
  read();
  gc();
  await settle();
  writeSync(fifo, Buffer.alloc(65536));
  for (let i = 0; i < 15; i++) {
    await sleep(1);
    writeSync(fifo, Buffer.alloc(65536));
  }
  await until(() => results.length === 1, 'the result');
  expect(results[0]?.[1]).toBe(1 << 20);
});

test('reading into command memory that is gone is EFAULT', async () => {
  const { kernel, ring } = await commands([[MAP_BYTES - DATA_OFFSET - 4096, 4096]]);
  writeSync(fd, Buffer.alloc(4096, 1));
  ftruncateSync(kernel.memory, MAP_BYTES - 4096);
  expect(() => moveFile(ring, false, 0, 0, 4096, fd, 0, IO_INLINE)).toThrow(
    expect.objectContaining({ code: 'ERR_TCMU_RING_MEMORY' }),
  );
  // Behind the end of the file it is the addon that zeroes.
  expect(() => moveFile(ring, false, 0, 0, 4096, fd, 9999, IO_INLINE)).toThrow(
    expect.objectContaining({ code: 'ERR_TCMU_RING_MEMORY' }),
  );
  moveFile(ring, false, 0, 0, 4096, fd, 0, 0);
  await until(() => results.length === 1, 'the result');
  expect(results[0]?.[1]).toBe(-14);
});

test('a queue and a ring that are not used any more are collected', async () => {
  const refs: WeakRef<object>[] = [];
  const make = (): void => {
    const queue = new native.IoQueue(() => {});
    const { kernel, ring } = serve(undefined, { io: queue, start: false });
    refs.push(new WeakRef(queue), new WeakRef(ring));
    for (const each of [kernel.memory, kernel.event, kernel.doorbell]) closeSync(each);
    kernel.remove();
  };
  for (let i = 0; i < 20; i++) make();
  const left = () => refs.filter((ref) => ref.deref() !== undefined);
  for (let i = 0; i < 100; i++) {
    gc();
    await settle();
    if (left().length === 0) break;
    // What was looked at lives as long as the turn of the event loop.
    await settle();
  }
  expect(left()).toEqual([]);
});

test('a ring is not collected while it polls', async () => {
  let batches = 0;
  const make = (): Served['kernel'] => {
    const one = serve(
      (events, { ring }) => {
        for (const slot of events) complete(ring, slot);
        if (++batches === 2) ring.close();
      },
      { io },
    );
    return one.kernel;
  };
  const kernel = make();
  for (let id = 1; id <= 2; id++) {
    gc();
    await settle();
    kernel.queue({ id });
    kernel.ring();
    await until(() => batches === id, 'a batch');
  }
  for (const each of [kernel.memory, kernel.event, kernel.doorbell]) closeSync(each);
  kernel.remove();
});

test('facts of files', () => {
  ftruncateSync(fd, 12345);
  expect(native.fileFacts(fd)).toMatchObject({ kind: 'file', size: 12345, direct: false });
  expect(native.fileFacts(fd).blockSize).toBeGreaterThanOrEqual(512);
  expect(native.fileFacts(fifo)).toMatchObject({ kind: 'other', nowaitRead: false });
  const shm = openSync(`/dev/shm/tcmu-facts-${process.pid}`, 'w+');
  rmSync(`/dev/shm/tcmu-facts-${process.pid}`);
  expect(native.fileFacts(shm).memory).toBe(true);
  closeSync(shm);
  const readOnly = openSync(join(folder, 'file'), 'r');
  expect(native.fileFacts(readOnly).nowaitWrite).toBe(false);
  closeSync(readOnly);
  expect(() => native.fileFacts(9999)).toThrow(
    expect.objectContaining({ code: 'EBADF', syscall: 'fstat' }),
  );
});

test('locks are held against other openings of the file', () => {
  const other = openSync(join(folder, 'file'), 'r+');
  expect(native.lockFile(fd, true, 0, 0)).toBe(true);
  expect(native.lockFile(other, false, 0, 0)).toBe(false);
  closeSync(fd);
  expect(native.lockFile(other, true, 0, 0)).toBe(true);
  fd = other;
  expect(() => native.lockFile(9999, true, 0, 0)).toThrow(
    expect.objectContaining({ code: 'EBADF' }),
  );
});

test('blocking calls run on threads of their own', async () => {
  const path = join(folder, 'made');
  await native.blockingCall('mkdir', path);
  await native.blockingCall('symlink', join(path, 'link'), '/target');
  await native.blockingCall('unlink', join(path, 'link'));
  await native.blockingCall('rmdir', path);
  await native.blockingCall('open-write', join(folder, 'file'), 'written');
  const back = Buffer.alloc(20);
  expect(back.toString('latin1', 0, readSync(fd, back, 0, 20, 0))).toBe('written');
  await expect(native.blockingCall('rmdir', path)).rejects.toMatchObject({
    code: 'ENOENT',
    errno: -2,
    syscall: 'rmdir',
  });
  await expect(native.blockingCall('open-write', folder, 'x')).rejects.toMatchObject({
    code: 'EISDIR',
    syscall: 'open',
  });
  await expect(native.blockingCall('open-write', '/dev/full', 'x')).rejects.toMatchObject({
    code: 'ENOSPC',
    syscall: 'write',
  });
  expect(() => native.blockingCall('chmod' as 'rmdir', path)).toThrow(TypeError);
  // Sixteen at once that all block: none waits for another, nor does the thread pool.
  const fifos = Array.from({ length: 16 }, (_, i) => join(folder, `fifo${i}`));
  execFileSync('mkfifo', fifos);
  const calls = fifos.map((each) => native.blockingCall('open-write', each, 'x'));
  await settle();
  io.read(new Uint8Array(1), fd, 0, 0);
  await until(() => results.length === 1, 'the pool');
  const readers = fifos.map((each) => openSync(each, constants.O_RDONLY | constants.O_NONBLOCK));
  await Promise.all(calls);
  for (const reader of readers) closeSync(reader);
});

test('a netlink socket talks to the kernel', async () => {
  const datagrams: Uint8Array[] = [];
  const socket = new native.NetlinkSocket({
    receiveBuffer: 1 << 20,
    message: (datagram) => datagrams.push(datagram),
    overrun: () => {},
    failed: () => {},
  });
  expect(socket.port).toBeGreaterThan(0);
  // CTRL_CMD_GETFAMILY of "nlctrl": every kernel has that family.
  const message = Buffer.alloc(32);
  message.writeUInt32LE(32, 0);
  message.writeUInt16LE(0x10, 4);
  message.writeUInt16LE(1, 6);
  message.writeUInt32LE(77, 8);
  message.writeUInt32LE(socket.port, 12);
  message[16] = 3;
  message[17] = 1;
  message.writeUInt16LE(11, 20);
  message.writeUInt16LE(2, 22);
  message.write('nlctrl\0', 24);
  socket.send(message);
  await until(() => datagrams.length > 0, 'the answer');
  const answer = Buffer.from(datagrams[0] as Uint8Array);
  expect(answer.readUInt32LE(8)).toBe(77);
  expect(answer.toString('latin1')).toContain('nlctrl');
  expect(() => socket.join(0x7fffffff)).toThrow(expect.objectContaining({ syscall: 'setsockopt' }));
  socket.close();
  socket.close();
  expect(() => socket.send(message)).toThrow(expect.objectContaining({ code: 'EBADF' }));
});
