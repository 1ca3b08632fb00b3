// SPDX-License-Identifier: Apache-2.0
/** The simulated kernel alone: what an initiator and an administrator see, against a raw handler. */
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { decodeSense } from '../lib/scsi/sense.js';
import { SimulatedDevice, type SimulatedDeviceOptions } from '../lib/sim/index.js';
import { RawHandler } from './sim-raw-handler.js';

let sim: SimulatedDevice;
let handler: RawHandler;

function start(options: SimulatedDeviceOptions = {}): void {
  sim?.close();
  sim = new SimulatedDevice(options);
  handler = new RawHandler(sim);
}

const read = (blocks: number) => ({
  cdb: [0x28, 0, 0, 0, 0, 0, 0, 0, blocks, 0],
  dataInLength: 512 * blocks,
});
const TEST_UNIT_READY = { cdb: [0, 0, 0, 0, 0, 0] };

function key(sense: Uint8Array | undefined): string {
  const { key, asc, ascq } = decodeSense(sense as Uint8Array) ?? {};
  return [key, asc, ascq].map((part) => part?.toString(16)).join('/');
}

/** Where promises stand without waiting for them. */
async function settled(promise: Promise<unknown>): Promise<boolean> {
  await sleep(5);
  return Promise.race([promise.then(() => true), Promise.resolve(false)]);
}

beforeEach(() => start());
afterEach(() => sim.close());

describe('commands', () => {
  test('a command reaches the ring and its completion comes back', async () => {
    const pending = sim.submit({ cdb: [0x12, 0, 0, 0, 96, 0], dataInLength: 96 });
    expect(handler.takeEvent()).toBe(1);
    expect(handler.takeEvent()).toBe(undefined);
    const [entry] = handler.commands();
    expect(entry).toMatchObject({
      op: 'command',
      at: 0,
      length: 120,
      id: 1,
      segments: [{ offset: 8 << 20, length: 96 }],
    });
    expect([...(entry?.cdb ?? [])]).toEqual([0x12, 0, 0, 0, 96, 0, 0, 0]);
    handler.complete(1, { data: new Uint8Array(96).fill(7) });
    const result = await pending;
    expect(result).toMatchObject({ status: 0, sense: undefined, residual: 0 });
    expect(result.data).toEqual(new Uint8Array(96).fill(7));
    expect(sim.state()).toMatchObject({ commands: 1, completions: 1, doorbells: 1, inFlight: 0 });
  });

  test('Data-Out is copied when it is submitted, also when it has to wait for room', async () => {
    start({ dataAreaBytes: 4096 });
    const bytes = new Uint8Array(512).fill(1);
    const first = sim.submit({ cdb: [0x2a], dataOut: bytes });
    const second = sim.submit({ cdb: [0x2a], dataOut: bytes });
    bytes.fill(2);
    expect(sim.state().waiting).toBe(1);
    for (const pending of [first, second]) {
      const [entry] = handler.commands();
      expect(handler.dataOut(entry as never)).toEqual(Buffer.alloc(512, 1));
      handler.complete(entry?.id as number);
      expect((await pending).status).toBe(0);
    }
  });

  test('bidirectional: Data-Out segments first', async () => {
    const pending = sim.submit({
      cdb: [0x53],
      dataOut: new Uint8Array(4096).fill(1),
      dataInLength: 512,
      bidirectional: true,
    });
    const [entry] = handler.commands();
    expect(entry?.segments).toEqual([{ offset: 8 << 20, length: 4096 }]);
    expect(entry?.bidirectional).toEqual([{ offset: (8 << 20) + 4096, length: 512 }]);
    handler.complete(1, { data: new Uint8Array(512).fill(9) });
    expect((await pending).data).toEqual(new Uint8Array(512).fill(9));
  });

  test('both directions without saying so are refused', () => {
    expect(() => sim.submit({ cdb: [0], dataOut: new Uint8Array(1), dataInLength: 1 })).toThrow(
      /bidirectional: true/,
    );
  });

  test('READ_LEN cuts the data', async () => {
    const pending = sim.submit(read(2));
    handler.complete(1, { flags: 2, readLength: 100, data: new Uint8Array(1024).fill(3) });
    const { data, buffer, residual } = await pending;
    expect(data).toEqual(new Uint8Array(100).fill(3));
    expect(residual).toBe(924);
    expect(buffer.subarray(100).every((byte) => byte === 0)).toBe(true);
  });

  test('sense data is cut to its own length', async () => {
    const sense = new Uint8Array(96).fill(0xff);
    sense.set([0x70, 0, 3, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x11, 0]);
    const pending = sim.submit(read(1));
    handler.complete(1, { status: 2, sense });
    const result = await pending;
    expect(result.status).toBe(2);
    expect(result.sense?.length).toBe(18);
    expect(key(result.sense)).toBe('3/11/0');
    expect(result.data.length).toBe(0);
  });

  test('completion out of order', async () => {
    const order: number[] = [];
    const all = [1, 2, 3].map((id) => sim.submit(TEST_UNIT_READY).then(() => order.push(id)));
    expect(handler.commands().map((entry) => entry.id)).toEqual([1, 2, 3]);
    for (const id of [3, 1, 2]) handler.complete(id, {}, false);
    handler.ring();
    await Promise.all(all);
    expect(order).toEqual([3, 1, 2]);
  });

  test('more results at once than one table holds', async () => {
    const all = Array.from({ length: 1000 }, () => sim.submit(TEST_UNIT_READY));
    for (const { id } of handler.commands()) handler.complete(id, {}, false);
    handler.ring();
    expect((await Promise.all(all)).every(({ status }) => status === 0)).toBe(true);
  });

  test('too big for the data area', async () => {
    start({ dataAreaBytes: 8192 });
    const result = await sim.submit({ cdb: [0x28], dataInLength: 8193 });
    expect(key(result.sense)).toBe('5/24/0');
  });
});

describe('time-outs', () => {
  test('a command that is not completed ends with NOT READY; its late completion is taken', async () => {
    start({ commandTimeout: 20 });
    const result = await sim.submit(read(1));
    expect(key(result.sense)).toBe('2/8/0');
    expect(sim.state()).toMatchObject({ idsInUse: 1, blocksInUse: 1, inFlight: 0, expired: 1 });
    handler.commands();
    handler.complete(1, { data: new Uint8Array(512).fill(1) });
    expect(sim.state()).toMatchObject({ idsInUse: 0, blocksInUse: 0, broken: null });
    expect(result.buffer.every((byte) => byte === 0)).toBe(true);
  });

  test('a time-out shorter than the one that ran when the thread went to sleep', async () => {
    sim.setAttributes({ commandTimeout: 10 });
    const result = await sim.submit(read(1));
    expect(result.status).toBe(2);
  });

  test('a command that waits for room ends with TASK SET FULL', async () => {
    start({ dataAreaBytes: 4096, queueFullTimeout: 10 });
    const first = sim.submit(read(1));
    expect((await sim.submit(read(1))).status).toBe(0x28);
    sim.setAttributes({ queueFullTimeout: 0 });
    expect((await sim.submit(read(1))).status).toBe(0x28);
    handler.complete(1);
    expect((await first).status).toBe(0);
  });

  test('expire() lets one pass at once', async () => {
    const pending = sim.submit(read(1));
    expect(sim.expire(pending)).toBe(true);
    expect((await pending).status).toBe(2);
    expect(sim.expire(pending)).toBe(false);
  });
});

describe('task management', () => {
  test('an aborted signal sends ABORT TASK; the answer waits for the handler', async () => {
    const controller = new AbortController();
    const pending = sim.submit({ ...read(1), signal: controller.signal });
    controller.abort();
    expect(await settled(pending)).toBe(false);
    expect(sim.entries()[1]).toMatchObject({ op: 'task-management', type: 1, ids: [1] });
    handler.complete(1);
    expect(await pending).toMatchObject({ status: 0x40, data: new Uint8Array(0) });
    handler.passOver();
    handler.ring();
    expect(sim.entries()).toEqual([]);
  });

  test('a signal aborted before', async () => {
    const pending = sim.submit({ ...read(1), signal: AbortSignal.abort() });
    handler.complete(1);
    expect((await pending).status).toBe(0x40);
  });

  test('a command that waits is aborted at once', async () => {
    start({ dataAreaBytes: 4096 });
    const first = sim.submit(read(1));
    const second = sim.submit(read(1));
    expect(sim.abort(second)).toBe(true);
    expect((await second).status).toBe(0x40);
    expect(sim.abort(second)).toBe(false);
    handler.complete(1);
    expect((await first).status).toBe(0);
  });

  test('LUN reset', async () => {
    const all = [sim.submit(read(1)), sim.submit(read(1))];
    const reset = sim.lunReset();
    expect(sim.entries().at(-1)).toMatchObject({ type: 5, ids: [1, 2] });
    handler.complete(1);
    handler.complete(2);
    await reset;
    expect((await Promise.all(all)).map(({ status }) => status)).toEqual([0x40, 0x40]);
  });

  test('no entry without tmr_notification', async () => {
    sim.setAttributes({ tmrNotification: false });
    const pending = sim.submit(read(1));
    sim.abort(pending);
    expect(sim.entries()).toHaveLength(1);
  });
});

describe('opening', () => {
  test('a second open is refused; after a close the ring is as it was', async () => {
    const pending = sim.submit(read(1));
    expect(() => sim.open()).toThrow(
      expect.objectContaining({ code: 'ERR_TCMU_DEVICE_BUSY', errno: 'EBUSY' }),
    );
    handler.close();
    handler = new RawHandler(sim);
    expect(handler.takeEvent()).toBe(undefined); // as with uio: events before the open are not seen
    expect(handler.commands()).toHaveLength(1);
    handler.complete(1);
    expect((await pending).status).toBe(0);
  });

  test('wake-ups merge and count on', () => {
    for (let i = 0; i < 3; i++) void sim.submit(read(1));
    // One read takes all of them, and tells how many there have been.
    expect(handler.takeEvent()).toBe(3);
    expect(handler.takeEvent()).toBe(undefined);
    void sim.submit(read(1));
    expect(handler.takeEvent()).toBe(4);
    sim.kick();
    expect(handler.takeEvent()).toBe(5);
  });

  test('closing frees kept buffers', async () => {
    const pending = sim.submit(read(1));
    handler.complete(1, { flags: 4 });
    await pending;
    expect(sim.state().blocksInUse).toBe(1);
    handler.close();
    expect(sim.state().blocksInUse).toBe(0);
  });

  test('sizes that can not be', () => {
    expect(() => new SimulatedDevice({ ringBytes: 1000 })).toThrow(
      expect.objectContaining({ code: 'ERR_TCMU_INVALID_ARGUMENT' }),
    );
    expect(() => new SimulatedDevice({ dataAreaBytes: 4096, dataPagesPerBlock: 2 })).toThrow(
      /at least one block/,
    );
  });
});

describe('recovery', () => {
  test('block, reset, unblock', async () => {
    const inFlight = sim.submit(read(1));
    sim.block();
    expect((await sim.submit(read(1))).status).toBe(8);
    sim.resetRing(1);
    expect((await inFlight).status).toBe(8);
    expect(sim.state()).toMatchObject({ head: 0, tail: 0, blocked: true });
    sim.unblock();
    const next = sim.submit(read(1));
    handler.complete(1);
    expect((await next).status).toBe(0);
  });

  test('an unknown id breaks the device until reset_ring', async () => {
    const pending = sim.submit(read(1));
    handler.complete(99);
    expect(sim.state().broken).toMatch(/not in flight/);
    expect(key((await sim.submit(read(1))).sense)).toBe('2/8/0');
    sim.resetRing(2);
    expect(key((await pending).sense)).toBe('2/8/0');
    expect(sim.state().broken).toBe(null);
  });

  test('kept buffers are released by id', async () => {
    const pending = sim.submit(read(1));
    expect(() => sim.freeKeptBuffer(1)).toThrow(expect.objectContaining({ errno: 'EINVAL' }));
    handler.complete(1, { flags: 4 });
    await pending;
    sim.freeKeptBuffer(1);
    expect(sim.state()).toMatchObject({ idsInUse: 0, blocksInUse: 0 });
  });

  test('a corrupt tail breaks the device, nothing else', () => {
    void sim.submit(read(1));
    sim.poke(64, Uint8Array.of(0xff, 0xff, 0xff, 0xff));
    handler.ring();
    expect(sim.state().broken).toMatch(/cmd_tail/);
  });

  test('pages that were never used, or were taken away, are not there', async () => {
    const pending = sim.submit(read(16));
    expect(sim.peek(8 << 20, 8192)).toHaveLength(8192);
    expect(() => sim.peek(8 << 20, 8193)).toThrow(RangeError);
    expect(() => sim.poke(2 ** 40, new Uint8Array(1))).toThrow(RangeError);
    expect(() => sim.peek(-1, 1)).toThrow(RangeError);
    handler.complete(1);
    await pending;
    expect(sim.reclaim()).toBe(8192);
    expect(() => sim.peek(8 << 20, 1)).toThrow(RangeError);
  });
});

describe('removal', () => {
  test('waits for what is in flight, then the handler sees the end', async () => {
    const pending = sim.submit(read(1));
    handler.takeEvent();
    const removed = sim.remove();
    expect(key((await sim.submit(read(1))).sense)).toBe('5/25/0');
    expect(await settled(removed)).toBe(false);
    expect(handler.takeEvent()).toBe(undefined);
    handler.complete(1);
    expect((await pending).status).toBe(0);
    await removed;
    expect(handler.takeEvent()).toBe(0);
    expect(() => sim.open()).toThrow(expect.objectContaining({ code: 'ERR_TCMU_DEVICE_GONE' }));
  });

  test('with a deadline', async () => {
    const pending = sim.submit(read(1));
    await sim.remove(10);
    handler.takeEvent();
    expect(handler.takeEvent()).toBe(0);
    expect(await settled(pending)).toBe(false);
    sim.close();
    expect(key((await pending).sense)).toBe('2/8/0');
  });

  test('close ends everything at once', async () => {
    start({ dataAreaBytes: 4096 });
    const all = [sim.submit(read(1)), sim.submit(read(1))];
    sim.close();
    sim.close();
    for (const { sense } of await Promise.all(all)) expect(key(sense)).toBe('2/8/0');
    expect(() => sim.submit(read(1))).toThrow(expect.objectContaining({ errno: 'ENODEV' }));
  });
});

describe('faults', () => {
  test('held commands come late and in another order, the same ones in every run', async () => {
    const all = Array.from({ length: 12 }, (_, i) => i);
    const submitAll = (maxDelay: number) => {
      start();
      sim.setFaults({ seed: 7, holdCommand: 0.5, maxDelay });
      for (const i of all) void sim.submit({ cdb: [0, i] });
    };
    const arrived = () => handler.commands().map(({ cdb }) => cdb[1] as number);
    for (let run = 0; run < 2; run++) {
      // The first of the others is due after six minutes.
      submitAll(6_000_000);
      expect(arrived()).toEqual([0, 1, 2, 5, 6, 8, 9]);
    }
    submitAll(400);
    await expect.poll(() => arrived().length).toBe(12);
    const order = arrived();
    expect(order).not.toEqual(all);
    expect(order.sort((a, b) => a - b)).toEqual(all);
  });

  test('lost, late and spurious wake-ups', async () => {
    sim.setFaults({ lostWakeup: 1 });
    void sim.submit(read(1));
    expect(handler.takeEvent()).toBe(undefined);
    sim.kick();
    expect(handler.takeEvent()).toBe(1);

    sim.setFaults({ lateWakeup: 1, maxDelay: 20 });
    void sim.submit(read(1));
    await expect.poll(() => handler.takeEvent()).toBe(2);

    sim.setFaults({ spuriousWakeup: 1, maxDelay: 5 });
    void sim.submit(read(1));
    // The command's and one without a reason, together or one after the other.
    await expect.poll(() => handler.takeEvent()).toBe(4);
  });

  test('poison shows what a handler leaves unwritten', async () => {
    start({ poison: 0xdb });
    const write = sim.submit({ cdb: [0x2a], dataOut: new Uint8Array(512).fill(1) });
    handler.complete(1);
    await write;
    const pending = sim.submit(read(1));
    handler.complete(1);
    expect((await pending).buffer).toEqual(new Uint8Array(512).fill(0xdb));
  });
});
