// SPDX-License-Identifier: Apache-2.0
/** The addon's ring: fetch, completion, memory, pins and revocation, over a kernel made of files. */
import { closeSync, ftruncateSync, openSync } from 'node:fs';
import { afterEach, expect, test } from 'vitest';
import {
  COMPLETE_KEEP_BUF,
  COMPLETE_READ_LEN,
  COMPLETE_SENSE,
  EVENT_RESET,
  EVENT_TMR,
  INFO_BIDI_BYTES,
  INFO_DATA_BYTES,
  INFO_ID,
  INFO_SEGMENTS,
  INFO_STRIDE,
  native,
} from '../lib/native.js';
import {
  complete,
  DATA_OFFSET,
  FakeKernel,
  MAP_BYTES,
  ringOptions,
  type Served,
  serve as serveRing,
  settle,
  until,
} from './native-kernel.js';

const served: Served[] = [];

function serve(...args: Parameters<typeof serveRing>): Served {
  const one = serveRing(...args);
  served.push(one);
  return one;
}

afterEach(() => {
  for (const { ring, kernel } of served.splice(0)) {
    ring.close();
    closeSync(kernel.memory);
    closeSync(kernel.event);
    closeSync(kernel.doorbell);
    kernel.remove();
  }
});

function bytes(length: number, value: number): Uint8Array {
  return new Uint8Array(length).fill(value);
}

/** Fetches one command without completing it. */
async function oneCommand(pieces: [number, number][] = [[0, 512]]): Promise<Served> {
  const one = serve();
  one.kernel.queue({ id: 1, pieces });
  one.kernel.ring();
  await until(() => one.seen.batches.length === 1, 'a batch');
  return one;
}

test('a batch of commands comes in one dispatch and goes with one doorbell', async () => {
  const { kernel, ring, seen } = serve((events, { ring }) => {
    for (const slot of events) complete(ring, slot, { status: slot });
  });
  for (let id = 1; id <= 5; id++) kernel.queue({ id, cdb: bytes(10, id) });
  kernel.ring();
  await until(() => ring.stats().completions === 5, 'completions');
  expect(seen.batches).toEqual([[0, 1, 2, 3, 4]]);
  expect(kernel.doorbells()).toBe(1);
  expect(kernel.collect().map(({ id, status }) => [id, status])).toEqual([
    [1, 0],
    [2, 1],
    [3, 2],
    [4, 3],
    [5, 4],
  ]);
  expect(ring.cdbs[2 * 32]).toBe(3);
  expect(ring.info[2 * INFO_STRIDE + INFO_ID]).toBe(3);
  expect(ring.inFlight()).toBe(0);
});

test('what is on the ring before start is fetched without an event', async () => {
  const { kernel, ring, seen } = serve(undefined, { start: false });
  kernel.queue({ id: 9 });
  kernel.setWord(12, 120);
  await settle();
  expect(seen.batches).toEqual([]);
  ring.start();
  expect(seen.batches).toEqual([]);
  await until(() => seen.batches.length === 1, 'a batch');
});

test('more commands than a batch holds come in several, in order, without another event', async () => {
  const { kernel, ring, seen } = serve(
    (events, { ring }) => {
      for (const slot of events) complete(ring, slot);
    },
    { batchSize: 1 },
  );
  for (let id = 1; id <= 40; id++) kernel.queue({ id });
  kernel.ring();
  await until(() => seen.batches.length === 40, '40 batches');
  expect(kernel.collect().map(({ id }) => id)).toEqual(Array.from({ length: 40 }, (_, i) => i + 1));
  expect(ring.stats().wakeups).toBe(1);
});

test('microtasks of a dispatch are over before its flush', async () => {
  const { kernel, ring } = serve(async (events, { ring }) => {
    await undefined;
    await undefined;
    for (const slot of events) complete(ring, slot);
  });
  kernel.queue({ id: 1 });
  kernel.ring();
  await until(() => ring.stats().batches === 1, 'a batch');
  expect(ring.stats()).toMatchObject({ completions: 1, doorbells: 1 });
});

test('every response field is written anew', async () => {
  const { kernel, ring } = await oneCommand();
  complete(ring, 0, { status: 2, flags: COMPLETE_SENSE, sense: bytes(96, 0x70) });
  ring.flush();
  expect(kernel.collect()).toEqual([
    { id: 1, userFlags: 0, status: 2, readLength: 0, sense: bytes(96, 0x70) },
  ]);
  kernel.queue({ id: 2, pieces: [[0, 512]] });
  kernel.ring();
  await until(() => ring.inFlight() === 1, 'the second');
  complete(ring, 0, { flags: COMPLETE_READ_LEN, readLength: 100 });
  ring.flush();
  expect(kernel.collect()).toEqual([
    { id: 2, userFlags: 2, status: 0, readLength: 100, sense: bytes(96, 0) },
  ]);
});

test('a bidirectional command has its Data-In behind its Data-Out', async () => {
  const { kernel, ring, seen } = serve();
  kernel.queue({
    id: 1,
    pieces: [[0, 512]],
    bidi: [
      [4096, 256],
      [8192, 256],
    ],
  });
  kernel.setData(0, bytes(512, 7));
  kernel.ring();
  await until(() => seen.batches.length === 1, 'a batch');
  expect([...ring.info.subarray(INFO_DATA_BYTES, INFO_SEGMENTS + 2)]).toEqual([512, 512, 1, 2]);
  expect(ring.info[INFO_BIDI_BYTES]).toBe(512);
  const out = new Uint8Array(512);
  ring.copyOut(0, 0, 512, out, 0);
  expect(out).toEqual(bytes(512, 7));
  ring.copyIn(0, 512 + 128, bytes(256, 9));
  expect(kernel.data(4096, 256)).toEqual(new Uint8Array([...bytes(128, 0), ...bytes(128, 9)]));
  expect(kernel.data(8192, 256)).toEqual(new Uint8Array([...bytes(128, 9), ...bytes(128, 0)]));
  expect(ring.segments(0, 0, 1024).map((view) => view.length)).toEqual([512, 256, 256]);
});

test('memory functions work across segments', async () => {
  const { ring } = await oneCommand([
    [0, 10],
    [100, 10],
    [200, 10],
  ]);
  expect(ring.isZero(0, 0, 30)).toBe(true);
  ring.fill(0, 5, 20, 0x1ff);
  const out = bytes(32, 1);
  ring.copyOut(0, 0, 30, out, 1);
  expect(out).toEqual(new Uint8Array([1, ...bytes(5, 0), ...bytes(20, 0xff), ...bytes(5, 0), 1]));
  expect(ring.isZero(0, 0, 5)).toBe(true);
  expect(ring.isZero(0, 0, 6)).toBe(false);
  expect(ring.mismatch(0, 5, bytes(20, 0xff))).toBe(-1);
  expect(ring.mismatch(0, 5, bytes(25, 0xff))).toBe(20);
  expect(ring.mismatch(0, 30, new Uint8Array(0))).toBe(-1);
});

test('slots, ranges and kinds of argument are checked', async () => {
  const { ring } = await oneCommand();
  const range = expect.objectContaining({ code: 'ERR_TCMU_BUFFER_RANGE' });
  const revoked = expect.objectContaining({ code: 'ERR_TCMU_BUFFER_REVOKED' });
  expect(() => ring.copyIn(0, 1, new Uint8Array(512))).toThrow(range);
  expect(() => ring.copyIn(0, 513, new Uint8Array(0))).toThrow(range);
  expect(() => ring.fill(0, 0, 2 ** 53 - 1, 0)).toThrow(range);
  expect(() => ring.copyOut(0, 0, 512, new Uint8Array(512), 1)).toThrow(range);
  expect(() => ring.copyOut(0, 0, 512, new Uint8Array(0), 0)).toThrow(range);
  expect(() => ring.segments(0, 512, 1)).toThrow(range);
  for (const slot of [1, 5000, 2 ** 32 - 1]) {
    expect(() => ring.isZero(slot, 0, 0)).toThrow(revoked);
    expect(() => ring.pin(slot)).toThrow(revoked);
    expect(() => ring.longCdb(slot)).toThrow(revoked);
  }
  expect(() => ring.unpin(0)).toThrow(revoked);
  expect(() => ring.fill(0, -1, 1, 0)).toThrow(RangeError);
  expect(() => ring.fill(0, Number.NaN, 1, 0)).toThrow(RangeError);
  expect(() => ring.copyIn(0, 0, new Uint16Array(1) as unknown as Uint8Array)).toThrow(TypeError);
  // Methods know their ring.
  const { isZero } = ring;
  expect(isZero(0, 0, 512)).toBe(true);
});

test('segments are views on the mapping, cached, and detached at publish', async () => {
  const { kernel, ring, seen } = await oneCommand([
    [0, 100],
    [4096, 100],
  ]);
  const views = ring.segments(0, 50, 100);
  expect(views.map((view) => [view.byteOffset, view.length])).toEqual([
    [50, 50],
    [0, 50],
  ]);
  expect(ring.segments(0, 0, 100)[0]?.buffer).toBe(views[0]?.buffer);
  views[0]?.fill(3);
  views[1]?.fill(4);
  expect(kernel.data(49, 2)).toEqual(new Uint8Array([0, 3]));
  expect(kernel.data(4096, 51)).toEqual(new Uint8Array([...bytes(50, 4), 0]));
  expect(ring.stats().externalBuffers).toBe(2);
  complete(ring, 0);
  ring.flush();
  expect(views.map((view) => view.length)).toEqual([0, 0]);
  expect(views.map((view) => view.buffer.byteLength)).toEqual([0, 0]);
  await settle();
  expect(seen.escaped).toEqual([]);
});

const takers: [string, (view: Uint8Array<ArrayBuffer>) => void][] = [
  [
    'a BYOB read',
    (view) => void new ReadableStream({ type: 'bytes' }).getReader({ mode: 'byob' }).read(view),
  ],
];
const { transfer } = ArrayBuffer.prototype as { transfer?(): ArrayBuffer };
if (transfer !== undefined) takers.push(['transfer()', (view) => void transfer.call(view.buffer)]);

test.for(takers)('a buffer that %s took over has escaped', async ([, take]) => {
  const { ring, seen } = await oneCommand();
  const [view] = ring.segments(0, 0, 512);
  take(view as Uint8Array<ArrayBuffer>);
  expect(view?.length).toBe(0);
  expect(seen.escaped).toEqual([]);
  complete(ring, 0);
  ring.flush();
  await until(() => seen.escaped.length === 1, 'escaped');
  expect(seen.escaped).toEqual([0]);
});

test('a pin postpones publishing and revocation', async () => {
  const { kernel, ring } = await oneCommand();
  const [view] = ring.segments(0, 0, 512);
  ring.pin(0);
  ring.pin(0);
  complete(ring, 0, { status: 2, flags: COMPLETE_SENSE, sense: bytes(96, 5) });
  ring.flush();
  expect(kernel.collect()).toEqual([]);
  expect(view?.length).toBe(512);
  expect(ring.inFlight()).toBe(1);
  ring.unpin(0);
  expect(kernel.collect()).toEqual([]);
  ring.sense.fill(0);
  ring.unpin(0);
  expect(kernel.collect()).toMatchObject([{ id: 1, status: 2, sense: bytes(96, 5) }]);
  expect(kernel.doorbells()).toBe(1);
  expect(view?.length).toBe(0);
});

test('unwritten bytes are zeroed as the completion says', async () => {
  const { kernel, ring } = serve();
  kernel.setData(0, bytes(1024, 0xaa));
  kernel.queue({
    id: 1,
    pieces: [
      [0, 100],
      [500, 100],
    ],
  });
  kernel.ring();
  await until(() => ring.inFlight() === 1, 'a command');
  complete(ring, 0, { zeroFrom: 150 });
  ring.flush();
  expect(kernel.data(0, 100)).toEqual(bytes(100, 0xaa));
  expect(kernel.data(500, 100)).toEqual(new Uint8Array([...bytes(50, 0xaa), ...bytes(50, 0)]));
  expect(kernel.data(600, 1)).toEqual(bytes(1, 0xaa));
});

test('a second completion is an error and reaches nobody', async () => {
  const { kernel, ring } = await oneCommand();
  complete(ring, 0);
  complete(ring, 0);
  const twice = expect.objectContaining({ code: 'ERR_TCMU_RING_COMPLETION' });
  expect(() => ring.flush()).toThrow(twice);
  expect(kernel.collect().length).toBe(1);
  complete(ring, 77);
  expect(() => ring.flush()).toThrow(twice);
  expect(() => ring.flush()).not.toThrow();
});

test('a kept buffer stays usable until it is released', async () => {
  const { kernel, ring } = await oneCommand();
  const [view] = ring.segments(0, 0, 512);
  complete(ring, 0, { flags: COMPLETE_KEEP_BUF });
  ring.flush();
  expect(kernel.collect()).toMatchObject([{ id: 1, userFlags: 4 }]);
  expect(ring.inFlight()).toBe(0);
  view?.fill(6);
  ring.copyIn(0, 0, bytes(1, 7));
  expect(kernel.data(0, 2)).toEqual(new Uint8Array([7, 6]));
  ring.releaseKept(0);
  expect(view?.length).toBe(0);
  expect(() => ring.releaseKept(0)).toThrow(
    expect.objectContaining({ code: 'ERR_TCMU_BUFFER_REVOKED' }),
  );
});

test('a CDB longer than its row comes whole', async () => {
  const { kernel, ring } = serve();
  kernel.queue({ id: 1, cdb: Uint8Array.from({ length: 40 }, (_, i) => i) });
  kernel.ring();
  await until(() => ring.inFlight() === 1, 'a command');
  expect(ring.longCdb(0)).toEqual(Uint8Array.from({ length: 40 }, (_, i) => i));
});

test('a task management function names slots; unknown entries are passed over', async () => {
  const tmrs: { type: number; slots: number[] }[] = [];
  const { kernel, ring, seen } = serve((events, { ring }) => {
    for (const event of events) if (event === EVENT_TMR) tmrs.push(ring.takeTmr());
  });
  kernel.queue({ id: 4 });
  kernel.queue({ id: 5 });
  kernel.queueTmr(5, [5, 999]);
  kernel.ring();
  await until(() => tmrs.length === 1, 'a TMR');
  expect(seen.batches).toEqual([[0, 1, EVENT_TMR]]);
  expect(tmrs).toEqual([{ type: 5, slots: [1] }]);
  expect(ring.stats().tmrs).toBe(1);
});

test('a reset of the ring is an event, and old commands are answered to nobody', async () => {
  const { kernel, ring, seen } = serve();
  kernel.queue({ id: 1 });
  kernel.queue({ id: 2, pieces: [[0, 512]] });
  kernel.ring();
  await until(() => ring.inFlight() === 2, 'commands');
  complete(ring, 0);
  ring.flush();
  kernel.reset();
  kernel.setData(0, bytes(512, 0xaa));
  kernel.queue({ id: 2, pieces: [[0, 512]] });
  kernel.ring();
  const after = () => seen.batches.flat().slice(seen.batches.flat().indexOf(EVENT_RESET) + 1);
  await until(() => seen.batches.flat().includes(EVENT_RESET), 'the reset');
  await until(() => after().length === 1, 'the command behind it');
  complete(ring, 1, { zeroFrom: 0 });
  ring.flush();
  expect(kernel.collect()).toEqual([]);
  expect(kernel.data(0, 512)).toEqual(bytes(512, 0xaa));
  complete(ring, 0);
  ring.flush();
  expect(kernel.collect()).toMatchObject([{ id: 2 }]);
});

test('stop ends polling; what is in flight can be completed; start goes on', async () => {
  const { kernel, ring, seen } = await oneCommand();
  ring.stop();
  kernel.queue({ id: 2 });
  kernel.ring();
  await settle();
  expect(seen.batches.length).toBe(1);
  complete(ring, 0);
  ring.flush();
  expect(kernel.collect()).toMatchObject([{ id: 1 }]);
  ring.start();
  await until(() => seen.batches.length === 2, 'the second');
});

test('stop and close from inside a dispatch', async () => {
  const { kernel, seen } = serve(
    (events, { ring }) => {
      for (const slot of events) complete(ring, slot);
      ring.close();
      ring.close();
    },
    { batchSize: 1 },
  );
  kernel.queue({ id: 1 });
  kernel.queue({ id: 2 });
  kernel.ring();
  await until(() => seen.batches.length > 0, 'a batch');
  await settle();
  expect(seen.batches.length).toBe(1);
  expect(kernel.collect()).toMatchObject([{ id: 1 }]);
});

test('close waits for the last pin and publishes what was postponed', async () => {
  const { kernel, ring } = await oneCommand();
  const [view] = ring.segments(0, 0, 512);
  ring.pin(0);
  complete(ring, 0);
  expect(ring.close()).toBe(false);
  expect(ring.close()).toBe(false);
  view?.fill(1);
  expect(kernel.data(0, 1)).toEqual(bytes(1, 1));
  expect(kernel.collect()).toEqual([]);
  ring.unpin(0);
  expect(kernel.collect()).toMatchObject([{ id: 1 }]);
  expect(view?.length).toBe(0);
  expect(ring.close()).toBe(true);
  expect(() => ring.fill(0, 0, 1, 0)).toThrow(
    expect.objectContaining({ code: 'ERR_TCMU_RING_CLOSED' }),
  );
  expect(() => ring.start()).toThrow(expect.objectContaining({ code: 'ERR_TCMU_RING_CLOSED' }));
  expect(ring.stats().completions).toBe(1);
  expect(ring.inFlight()).toBe(0);
  ring.stop();
  ring.flush();
});

test('close revokes what is still in flight and closes the descriptors', async () => {
  const { kernel, ring } = serve(undefined, { start: false });
  const options = ringOptions(kernel);
  const other = new native.Ring({
    ...options,
    batchSize: 1,
    io: new native.IoQueue(() => {}),
    dispatch: () => {},
    lost: () => {},
    escaped: () => {},
  });
  kernel.queue({ id: 1, pieces: [[0, 512]] });
  kernel.ring();
  other.start();
  await until(() => other.inFlight() === 1, 'a command');
  const [view] = other.segments(0, 0, 512);
  expect(other.close()).toBe(true);
  expect(view?.length).toBe(0);
  for (const fd of [options.memoryFd, options.eventFd, options.doorbellFd]) {
    expect(() => closeSync(fd)).toThrow('EBADF');
  }
  expect(ring.inFlight()).toBe(0);
});

// ---- bad input ----

test('mailboxes no kernel writes are refused, and the descriptors stay the caller’s', () => {
  const cases: [number, number, string][] = [
    [0, 0x000f_0001, 'ERR_TCMU_RING_VERSION'],
    [0, 0x0000_0002, 'ERR_TCMU_RING_VERSION'],
    [4, 4, 'ERR_TCMU_RING_CORRUPT'],
    [4, 0xfffffff8, 'ERR_TCMU_RING_CORRUPT'],
    [8, 0, 'ERR_TCMU_RING_CORRUPT'],
    [8, MAP_BYTES, 'ERR_TCMU_RING_CORRUPT'],
    [64, 8192, 'ERR_TCMU_RING_CORRUPT'],
    [64, 3, 'ERR_TCMU_RING_CORRUPT'],
  ];
  for (const [offset, value, code] of cases) {
    const kernel = new FakeKernel();
    kernel.setWord(offset, value);
    const options = ringOptions(kernel);
    const make = () =>
      new native.Ring({
        ...options,
        batchSize: 1,
        io: new native.IoQueue(() => {}),
        dispatch: () => {},
        lost: () => {},
        escaped: () => {},
      });
    expect(make).toThrow(expect.objectContaining({ code }));
    for (const fd of [options.memoryFd, options.eventFd, options.doorbellFd]) closeSync(fd);
    for (const fd of [kernel.memory, kernel.event, kernel.doorbell]) closeSync(fd);
    kernel.remove();
  }
});

test('a mapping that cannot be made is a system error', () => {
  const { kernel, io } = serve();
  const event = openSync(kernel.path('event'), 'r+');
  const make = () =>
    new native.Ring({
      memoryFd: event,
      eventFd: event,
      doorbellFd: event,
      mapSize: 4096,
      batchSize: 1,
      io,
      dispatch: () => {},
      lost: () => {},
      escaped: () => {},
    });
  expect(make).toThrow(expect.objectContaining({ code: 'ENODEV', errno: -19, syscall: 'mmap' }));
  closeSync(event);
});

test('wrong options are refused', () => {
  const { kernel, io } = serve();
  const options = {
    ...ringOptions(kernel),
    batchSize: 1,
    io,
    dispatch: () => {},
    lost: () => {},
    escaped: () => {},
  };
  const without = (name: string, value?: unknown) => () =>
    new native.Ring({ ...options, [name]: value } as typeof options);
  for (const name of ['memoryFd', 'mapSize', 'batchSize', 'dispatch', 'lost', 'escaped', 'io']) {
    expect(without(name)).toThrow(TypeError);
  }
  expect(without('io', {})).toThrow(TypeError);
  expect(without('io', new Proxy(io, {}))).toThrow(TypeError);
  expect(without('mapSize', -1)).toThrow(RangeError);
  expect(() => new native.IoQueue(undefined as never)).toThrow(TypeError);
  expect(() => (native.Ring as unknown as () => void)()).toThrow(TypeError);
  for (const fd of [options.memoryFd, options.eventFd, options.doorbellFd]) closeSync(fd);
});

test('a corrupt entry ends the ring once; commands before it are served', async () => {
  const { kernel, ring, seen } = serve();
  kernel.queue({ id: 1 });
  const bad = kernel.queue({ id: 2 });
  kernel.setWord(128 + bad, 0xfffffff9);
  kernel.ring();
  await until(() => seen.lost.length === 1, 'lost');
  expect(seen.batches).toEqual([[0]]);
  expect(seen.lost[0]?.[0]).toBe('ERR_TCMU_RING_CORRUPT');
  expect(seen.lost[0]?.[1]).toMatch(
    /at ring offset 0x78: entry of 0xfffffff8 bytes where 0x78 are left/,
  );
  complete(ring, 0);
  ring.flush();
  expect(kernel.collect()).toMatchObject([{ id: 1 }]);
  kernel.ring();
  await settle();
  expect(seen.lost.length).toBe(1);
  expect(seen.batches.length).toBe(1);
});

test('an exception in dispatch is an uncaught one; the ring goes on', async () => {
  const { kernel, ring, seen } = serve(() => {
    if (seen.batches.length === 1) throw new Error('from dispatch');
  });
  const caught: unknown[] = [];
  const listeners = process.listeners('uncaughtException');
  process.removeAllListeners('uncaughtException');
  process.on('uncaughtException', (error) => caught.push(error));
  try {
    kernel.queue({ id: 1 });
    kernel.ring();
    await until(() => caught.length === 1, 'the exception');
    kernel.queue({ id: 2 });
    kernel.ring();
    await until(() => ring.inFlight() === 2, 'the second');
  } finally {
    process.removeAllListeners('uncaughtException');
    for (const listener of listeners) process.on('uncaughtException', listener);
  }
  expect(caught).toMatchObject([{ message: 'from dispatch' }]);
});

// ---- memory that goes away ----

test('native access to memory that is gone is an error, not a crash', async () => {
  const { kernel, ring } = await oneCommand([[MAP_BYTES - DATA_OFFSET - 4096, 4096]]);
  ftruncateSync(kernel.memory, MAP_BYTES - 4096);
  const gone = expect.objectContaining({ code: 'ERR_TCMU_RING_MEMORY' });
  expect(() => ring.fill(0, 0, 4096, 1)).toThrow(gone);
  expect(() => ring.copyIn(0, 0, new Uint8Array(4096))).toThrow(gone);
  expect(() => ring.copyOut(0, 0, 4096, new Uint8Array(4096), 0)).toThrow(gone);
  expect(() => ring.isZero(0, 0, 4096)).toThrow(gone);
  expect(() => ring.mismatch(0, 0, new Uint8Array(4096))).toThrow(gone);
});

test('the ring is lost when its own memory is gone', async () => {
  const { kernel, ring, seen } = await oneCommand();
  ftruncateSync(kernel.memory, 0);
  complete(ring, 0, { zeroFrom: 0 });
  ring.flush();
  await until(() => seen.lost.length === 1, 'lost');
  expect(seen.lost[0]?.[0]).toBe('ERR_TCMU_RING_MEMORY');
});

test('JavaScript that touches missing memory reads zeros, and the ring publishes nothing more', async () => {
  const { kernel, ring, seen } = await oneCommand([[MAP_BYTES - DATA_OFFSET - 4096, 4096]]);
  const [view] = ring.segments(0, 0, 4096);
  view?.fill(3);
  ftruncateSync(kernel.memory, MAP_BYTES - 4096);
  expect(view?.every((byte) => byte === 0)).toBe(true);
  complete(ring, 0);
  ring.flush();
  expect(kernel.collect()).toEqual([]);
  await until(() => seen.lost.length === 1, 'lost');
  expect(seen.lost[0]?.[0]).toBe('ERR_TCMU_RING_MEMORY');
});
