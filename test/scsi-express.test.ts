// SPDX-License-Identifier: Apache-2.0
/**
 * The express lane: plain reads and writes past the handler. What an initiator sees must be the same with
 * and without it, whatever state the unit is in.
 */
import diagnostics from 'node:diagnostics_channel';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { DataIn, DataOut, MaybePromise } from '../lib/device/data.js';
import { Device } from '../lib/device/device.js';
import { BackingFile } from '../lib/io/backing-file.js';
import { FileMap } from '../lib/io/file-map.js';
import { BlockDevice } from '../lib/scsi/block-device.js';
import { sense } from '../lib/scsi/sense.js';
import {
  type CommandRequest,
  SimulatedDevice,
  type SimulatedDisk,
  type SimulateOptions,
  simulate,
} from '../lib/sim/index.js';
import type { BlockStore, StoreSpace, WriteContext } from '../lib/store/index.js';
import { cases } from './cases.js';
import { e4, list1, segment, xcopy } from './scsi-copy-lists.js';

const BLOCK = 512;
const BLOCKS = 256;

let folder: string;
const disks: SimulatedDisk[] = [];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'tcmu-express-'));
});

afterEach(async () => {
  for (const disk of disks.splice(0)) await disk.close();
  rmSync(folder, { recursive: true });
});

/** A file, byte for byte, that tells how often it was asked. */
class LinearStore implements BlockStore {
  readonly fileMap: FileMap;
  readonly supportsFua = true;
  size = BLOCKS * BLOCK;
  calls = 0;
  flushes = 0;
  /** What reading and unmapping wait for. */
  gate: Promise<void> | undefined;
  #end = this.size;

  constructor(readonly file: BackingFile) {
    this.fileMap = FileMap.linear(file);
    this.cut(this.size);
  }

  /** As if somebody had cut the file there. */
  cut(end: number): void {
    this.#end = end;
    this.fileMap.allow(end, end);
  }

  read(position: number, data: DataIn): MaybePromise<unknown> {
    this.calls++;
    if (position + data.length > this.#end) throw sense.unrecoveredReadError();
    if (this.gate === undefined) return data.readFrom(this.file, position);
    return this.gate.then(() => data.readFrom(this.file, position));
  }

  write(position: number, data: DataOut, context: WriteContext): MaybePromise<unknown> {
    this.calls++;
    if (position + data.length > this.#end) throw sense.writeError();
    const done = data.writeTo(this.file, position);
    if (context.fua) this.flush();
    return done;
  }

  flush(): void {
    this.flushes++;
  }

  unmap(position: number, length: number): MaybePromise<void> {
    if (this.gate !== undefined) return this.gate.then(() => this.file.punchHole(position, length));
    return this.file.punchHole(position, length);
  }

  space(): StoreSpace {
    return { used: 0, available: this.size };
  }

  async resize(size: number): Promise<void> {
    await this.file.truncate(size);
    this.size = size;
    this.cut(size);
  }

  close(): Promise<void> {
    return this.file.close();
  }
}

async function start(
  name: string,
  options: SimulateOptions = {},
): Promise<{ disk: SimulatedDisk; store: LinearStore }> {
  const file = await BackingFile.open(join(folder, name), { create: true, io: 'inline' });
  await file.truncate(BLOCKS * BLOCK);
  const store = new LinearStore(file);
  const disk = await simulate(store, options);
  disks.push(disk);
  return { disk, store };
}

function express(disk: SimulatedDisk): number {
  return disk.device.stats().express;
}

function filled(blocks: number, value: number): Uint8Array {
  return new Uint8Array(blocks * BLOCK).fill(value);
}

/** MODE SELECT (6) of one page: its code, and one byte of it. */
function modeSelect(page: number, length: number, at: number, value: number): CommandRequest {
  const list = new Uint8Array(4 + 2 + length);
  list[4] = page;
  list[5] = length;
  list[4 + at] = value;
  return { cdb: [0x15, 0x10, 0, 0, list.length, 0], dataOut: list };
}

const WCE = (on: boolean) => modeSelect(0x08, 0x12, 2, on ? 0x04 : 0);
const SWP = (on: boolean) => {
  const request = modeSelect(0x0a, 0x0a, 4, on ? 0x08 : 0);
  (request.dataOut as Uint8Array)[4 + 3] = 0x10;
  (request.dataOut as Uint8Array)[4 + 5] = 0x40;
  return request;
};

describe('the express lane', () => {
  test('carries plain reads and writes, and the store is not asked', async () => {
    const { disk, store } = await start('plain');
    await disk.write(3, filled(5, 0xa5));
    const whole = await disk.read(2, 7);
    expect(whole.subarray(BLOCK, 6 * BLOCK)).toEqual(filled(5, 0xa5));
    expect([whole[BLOCK - 1], whole[6 * BLOCK]]).toEqual([0, 0]);
    expect(express(disk)).toBe(2);
    expect(store.calls).toBe(0);
    expect(readFileSync(store.file.path).subarray(3 * BLOCK, 8 * BLOCK)).toEqual(
      Buffer.from(filled(5, 0xa5)),
    );
  });

  test("takes zero-copy commands: between the file and the initiator's own pages", async () => {
    const { disk, store } = await start('zero-copy', { zeroCopy: { minBytes: 0 } });
    await disk.write(8, filled(16, 0xa5));
    expect(Buffer.from(await disk.read(0, 32))).toEqual(
      Buffer.concat([filled(8, 0), filled(16, 0xa5), filled(8, 0)]),
    );
    expect(express(disk)).toBe(2);
    expect(store.calls).toBe(0);
    expect(disk.kernel.state()).toMatchObject({ zeroCopied: 2, blocksInUse: 0 });
  });

  test('a READ that brings Data-Out of zero copy is left to the handler, which refuses', async () => {
    const { disk, store } = await start('zero-copy-wrong-way', { zeroCopy: { minBytes: 0 } });
    const errors: unknown[] = [];
    disk.device.on('error', (error) => errors.push((error as { code?: unknown }).code));
    await disk.write(0, filled(16, 1));
    const dataOut = filled(16, 7);
    const cdb = [0x28, 0, 0, 0, 0, 0, 0, 0, 16, 0];
    expect((await disk.submit({ cdb, dataOut })).status).toBe(2);
    expect(dataOut).toEqual(filled(16, 7));
    expect(errors).toEqual(['ERR_TCMU_BUFFER_READ_ONLY']);
    expect(await disk.read(0, 16)).toEqual(filled(16, 1));
    expect([express(disk), store.calls]).toEqual([2, 1]);
  });

  test('is not there for a store that does not offer it, nor when it is refused', async () => {
    const { disk, store } = await start('refused', { express: false });
    await disk.write(0, filled(1, 1));
    expect(await disk.read(0, 1)).toEqual(filled(1, 1));
    expect(express(disk)).toBe(0);
    expect(store.calls).toBe(2);
  });

  test('leaves every option to the handler', async () => {
    const { disk, store } = await start('options');
    const data = filled(1, 9);
    const cdbs = [
      [0x2a, 0x08, 0, 0, 0, 0, 0, 0, 1, 0],
      [0x2a, 0x10, 0, 0, 0, 0, 0, 0, 1, 0],
      [0x2a, 0, 0, 0, 0, 0, 0x1f, 0, 1, 0],
      [0x8a, 0x08, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
    ];
    for (const cdb of cdbs) expect((await disk.submit({ cdb, dataOut: data })).status).toBe(0);
    expect(store.calls).toBe(cdbs.length);
    const refused = [
      [0x2a, 0x20, 0, 0, 0, 0, 0, 0, 1, 0],
      [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0x04],
      [0x2a, 0, 0, 0, 1, 0, 0, 0, 1, 0],
      [0x8a, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    ];
    for (const cdb of refused) expect((await disk.submit({ cdb, dataOut: data })).status).toBe(2);
    expect(express(disk)).toBe(0);
    expect((await disk.submit({ cdb: cdbs[0] as number[], dataOut: data })).status).toBe(0);
    await disk.write(0, data);
    expect(express(disk)).toBe(1);
  });

  test('a buffer of another length than the CDB says goes to the handler', async () => {
    const { disk, store } = await start('residual');
    const cdb = [0x28, 0, 0, 0, 0, 0, 0, 0, 2, 0];
    expect((await disk.submit({ cdb, dataInLength: BLOCK })).status).toBe(0);
    expect((await disk.submit({ cdb, dataInLength: 4 * BLOCK })).status).toBe(0);
    expect(express(disk)).toBe(0);
    expect(store.calls).toBe(2);
  });

  test('data in both directions, and more than one command may move, go to the handler', async () => {
    const { disk, store } = await start('limits', { scsi: { maxTransferLength: 4 * BLOCK } });
    await disk.write(0, filled(4, 1));
    expect(express(disk)).toBe(1);
    const cdb = [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    const both = { cdb, dataOut: filled(1, 2), dataInLength: BLOCK, bidirectional: true };
    await disk.submit(both);
    expect([express(disk), store.calls]).toEqual([1, 1]);
    await expect(disk.write(0, filled(5, 3))).rejects.toMatchObject({ key: 5, asc: 0x24 });
    await expect(disk.read(0, 5)).rejects.toMatchObject({ key: 5, asc: 0x24 });
    await expect(disk.read(BLOCKS - 1, 2)).rejects.toMatchObject({ key: 5, asc: 0x21 });
    await expect(disk.write(BLOCKS - 1, filled(2, 1))).rejects.toMatchObject({ key: 5, asc: 0x21 });
    expect(express(disk)).toBe(1);
  });

  test('a format under way refuses', async () => {
    const { disk, store } = await start('format');
    await disk.read(0, 1);
    let open = () => {};
    store.gate = new Promise((resolve) => {
      open = resolve;
    });
    // FORMAT UNIT with IMMED.
    const list = Uint8Array.of(0, 0x02, 0, 0);
    expect((await disk.submit({ cdb: [4, 0x10, 0, 0, 0, 0], dataOut: list })).status).toBe(0);
    await expect(disk.read(0, 1)).rejects.toMatchObject({ key: 2, asc: 0x04 });
    await disk.inquiry();
    await expect(disk.read(0, 1)).rejects.toMatchObject({ key: 2, asc: 0x04 });
    expect(express(disk)).toBe(1);
    open();
    while ((await disk.submit({ cdb: new Uint8Array(6) })).status !== 0);
    await disk.read(0, 1);
    expect(express(disk)).toBe(2);
  });

  test('with a threshold of space set, writes go to the handler', async () => {
    const { disk, store } = await start('threshold');
    // Logical Block Provisioning mode page: two thresholds, of what is available and what is used.
    const list = new Uint8Array(4 + 4 + 12 + 2 * 8);
    list.set([0x5c, 0x02, 0, list.length - 8], 4);
    const descriptor = (enabled: boolean) => {
      list.set([0x01, 1], 20);
      list.set([enabled ? 0x82 : 0x02, 2, 0, 0, 0, 0, 0, 1], 28);
      return { cdb: [0x15, 0x10, 0, 0, list.length, 0], dataOut: list };
    };
    expect((await disk.submit(descriptor(true))).status).toBe(0);
    await disk.write(0, filled(1, 1));
    await disk.read(0, 1);
    expect([express(disk), store.calls]).toEqual([1, 1]);
    expect((await disk.submit(descriptor(false))).status).toBe(0);
    await disk.write(0, filled(1, 1));
    expect([express(disk), store.calls]).toEqual([2, 1]);
  });

  test('a handler that is closed carries nothing, whatever ends later', async () => {
    const { store } = await start('closing');
    const handler = new BlockDevice(store, { serial: 'closing', powerOnAttention: false });
    store.close = async () => {};
    const kernel = new SimulatedDevice({});
    const device = await Device.open(kernel.open(), { handler });
    const cdb = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    const read = (flags = 0) =>
      kernel.submit({ cdb: [0x28, flags, ...cdb.slice(2)], dataInLength: BLOCK });
    await read();
    await read();
    expect(device.stats().express).toBe(1);
    let open = () => {};
    store.gate = new Promise((resolve) => {
      open = resolve;
    });
    const { calls } = store;
    const late = read(0x08);
    await expect.poll(() => store.calls).toBe(calls + 1);
    await handler.close();
    expect((await read()).status).toBe(2);
    open();
    expect((await late).status).toBe(0);
    expect((await read()).status).toBe(2);
    expect(device.stats().express).toBe(1);
    await device.close();
    kernel.close();
    await store.file.close();
  });

  test('a unit attention goes first', async () => {
    const { disk } = await start('attention');
    await disk.write(0, filled(1, 1));
    await disk.resize(2 * BLOCKS * BLOCK);
    // INQUIRY does not take it away.
    await disk.inquiry();
    await expect(disk.read(0, 1)).rejects.toMatchObject({ asc: 0x2a, ascq: 0x09 });
    await disk.write(2 * BLOCKS - 1, filled(1, 2));
    expect(express(disk)).toBe(2);
  });

  test('without a write cache, writes go to the handler and are durable', async () => {
    const { disk, store } = await start('through');
    expect((await disk.submit(WCE(false))).status).toBe(0);
    store.calls = 0;
    await disk.write(0, filled(1, 1));
    expect(store.calls).toBe(1);
    await disk.read(0, 1);
    expect(express(disk)).toBe(1);
    expect((await disk.submit(WCE(true))).status).toBe(0);
    await disk.write(0, filled(1, 1));
    expect(express(disk)).toBe(2);
  });

  test('write protection holds', async () => {
    const { disk } = await start('protected');
    expect((await disk.submit(SWP(true))).status).toBe(0);
    await expect(disk.write(0, filled(1, 1))).rejects.toMatchObject({ key: 7 });
    expect(await disk.read(0, 1)).toEqual(filled(1, 0));
    expect(express(disk)).toBe(1);
  });

  test('an ejected medium is not read', async () => {
    const { disk } = await start('ejected', { scsi: { removable: true } });
    await disk.read(0, 1);
    expect((await disk.submit({ cdb: [0x1b, 0, 0, 0, 0x02, 0] })).status).toBe(0);
    await expect(disk.read(0, 1)).rejects.toMatchObject({ key: 2, asc: 0x3a });
    expect(express(disk)).toBe(1);
  });

  test('a COMPARE AND WRITE keeps writes away until it is done', async () => {
    const { disk, store } = await start('compare');
    await disk.write(0, filled(1, 1));
    let open = () => {};
    store.gate = new Promise((resolve) => {
      open = resolve;
    });
    const compared = disk.compareAndWrite(0, filled(1, 1), filled(1, 2));
    await expect.poll(() => store.calls).toBe(1);
    const written = disk.write(0, filled(1, 3));
    await new Promise((resolve) => setTimeout(resolve, 20));
    expect(readFileSync(store.file.path)[0]).toBe(1);
    open();
    store.gate = undefined;
    expect(await compared).toBe(-1);
    await written;
    expect(await disk.read(0, 1)).toEqual(filled(1, 3));
  });

  test('a copy onto the disk keeps writes away until it is done', async () => {
    const scsi = { copyGroup: 'all' };
    const source = await start('copy-from', { scsi: { ...scsi, serial: 'from' } });
    const target = await start('copy-to', { scsi: { ...scsi, serial: 'to' } });
    await source.disk.write(0, filled(8, 1));
    const units = [];
    for (const { disk } of [source, target]) {
      units.push(e4((await disk.vpdPage(0x83)).subarray(8, 24)));
    }
    const list = list1(units, [segment({ blocks: 8, source: 0, target: 0 })]);
    let open = () => {};
    source.store.gate = new Promise((resolve) => {
      open = resolve;
    });
    await target.disk.write(100, filled(1, 1));
    expect(express(target.disk)).toBe(1);
    const copied = source.disk.submit({ cdb: xcopy(list), dataOut: list });
    await expect.poll(() => source.store.calls).toBe(1);
    const first = target.disk.write(5, filled(1, 2));
    await new Promise((resolve) => setTimeout(resolve, 20));
    // A command that ends on the target does not open its lane again.
    await target.disk.inquiry();
    const written = target.disk.write(4, filled(1, 3));
    await new Promise((resolve) => setTimeout(resolve, 20));
    const bytes = readFileSync(target.store.file.path);
    expect([bytes[4 * BLOCK], bytes[5 * BLOCK]]).toEqual([0, 0]);
    open();
    expect((await copied).status).toBe(0);
    await Promise.all([first, written]);
    expect(await target.disk.read(4, 1)).toEqual(filled(1, 3));
  });

  test('a changed port group is told before anything is read', async () => {
    const { store } = await start('ports');
    const handler = new BlockDevice(store, { serial: 'ports', powerOnAttention: false });
    const kernel = new SimulatedDevice({});
    const device = await Device.open(kernel.open(), { handler });
    const cdb = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    const read = () => kernel.submit({ cdb, dataInLength: BLOCK });
    expect([(await read()).status, (await read()).status]).toEqual([0, 0]);
    expect(device.stats().express).toBe(1);
    handler.portGroupsChanged();
    expect((await read()).status).toBe(2);
    await device.close();
    kernel.close();
  });

  test('a handler on two devices has one lane, and one that is opened again has it again', async () => {
    const { store } = await start('twice');
    const handler = new BlockDevice(store, { serial: 'twice', powerOnAttention: false });
    const cdb = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    const counts: number[][] = [];
    // The file stays open between the rounds.
    store.close = async () => {};
    for (let round = 0; round < 2; round++) {
      const kernels = [new SimulatedDevice({}), new SimulatedDevice({})];
      const devices: Device[] = [];
      for (const kernel of kernels) devices.push(await Device.open(kernel.open(), { handler }));
      for (let i = 0; i < 3; i++) {
        for (const kernel of kernels) await kernel.submit({ cdb, dataInLength: BLOCK });
      }
      counts.push(devices.map((device) => device.stats().express));
      for (const device of devices) await device.close();
      for (const kernel of kernels) kernel.close();
    }
    await store.file.close();
    // The first command opens the lane.
    expect(counts).toEqual([
      [2, 0],
      [2, 0],
    ]);
  });

  test('a reset that switches the write cache off is heeded', async () => {
    // The saved caching mode page says that there is no write cache.
    const saved = new Uint8Array(20);
    saved.set([0x88, 0x12]);
    const modePageStorage = { load: () => saved, save: () => {} };
    const { disk, store } = await start('reset', { scsi: { modePageStorage } });
    expect((await disk.submit(WCE(true))).status).toBe(0);
    await disk.write(0, filled(1, 1));
    expect([express(disk), store.flushes]).toEqual([1, 0]);
    await disk.kernel.lunReset();
    // Else both may come in one batch, where the reset goes first anyhow.
    await new Promise((resolve) => setTimeout(resolve, 20));
    await disk.write(0, filled(1, 2));
    expect([express(disk), store.flushes]).toEqual([1, 1]);
  });

  test('what a store takes back is asked of it again, at once', async () => {
    const { disk, store } = await start('taken-back');
    await disk.write(200, filled(1, 1));
    store.cut(100 * BLOCK);
    await expect(disk.read(200, 1)).rejects.toMatchObject({ key: 3 });
    await expect(disk.write(99, filled(2, 1))).rejects.toMatchObject({ key: 3 });
    await disk.read(99, 1);
    expect(express(disk)).toBe(2);
  });

  test('a file that ends early is the handler’s to report', async () => {
    const { disk, store } = await start('short');
    await disk.write(200, filled(1, 1));
    await store.file.truncate(100 * BLOCK);
    const cdb = [0x28, 0, 0, 0, 0, 99, 0, 0, 2, 0];
    await disk.submit({ cdb, dataInLength: 2 * BLOCK });
    expect(store.calls).toBe(1);
  });

  test('a closed file is never touched by its number', async () => {
    const { disk, store } = await start('closed');
    await disk.read(0, 1);
    await store.file.close();
    const other = await BackingFile.open(join(folder, 'other'), { create: true, io: 'inline' });
    await other.truncate(BLOCKS * BLOCK);
    const cdb = [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    expect((await disk.submit({ cdb, dataOut: filled(1, 7) })).status).toBe(2);
    store.cut(BLOCKS * BLOCK);
    expect((await disk.submit({ cdb, dataOut: filled(1, 7) })).status).toBe(2);
    expect(store.fileMap.readable).toBe(0);
    expect(readFileSync(other.path).every((byte) => byte === 0)).toBe(true);
    await other.close();
  });

  test('who traces commands sees them all', async () => {
    const seen: unknown[] = [];
    const listen = (message: unknown) => seen.push(message);
    diagnostics.subscribe('tcmu:command:start', listen);
    try {
      const { disk } = await start('traced');
      seen.length = 0;
      await disk.write(0, filled(1, 1));
      expect(seen).toHaveLength(1);
    } finally {
      diagnostics.unsubscribe('tcmu:command:start', listen);
    }
  });
});

// --- the same disk twice, with and without the lane ---

const CDB_LENGTHS = { 8: 6, 40: 10, 168: 12, 136: 16, 10: 6, 42: 10, 170: 12, 138: 16 };

const PLAIN = [0x28, 0x88, 0x2a, 0x8a];

const move = fc.record({
  kind: fc.constant('move' as const),
  opcode: fc.constantFrom(...PLAIN, ...PLAIN, 0x08, 0xa8, 0x0a, 0xaa),
  lba: fc.oneof(fc.integer({ min: 0, max: BLOCKS - 1 }), fc.integer({ min: 0, max: 2 * BLOCKS })),
  blocks: fc.oneof(fc.integer({ min: 0, max: 8 }), fc.integer({ min: 0, max: 64 })),
  options: fc.oneof(
    { arbitrary: fc.constant(0), weight: 6 },
    { arbitrary: fc.constantFrom(0x08, 0x10, 0x20, 0x01), weight: 1 },
  ),
  control: fc.oneof({ arbitrary: fc.constant(0), weight: 9 }, fc.constantFrom(0x04, 0x40)),
  // Blocks more or fewer than the CDB says.
  slack: fc.oneof({ arbitrary: fc.constant(0), weight: 9 }, fc.integer({ min: -2, max: 2 })),
  value: fc.integer({ min: 1, max: 255 }),
});
const REQUEST_SENSE = { cdb: [3, 0, 0, 0, 32, 0], dataInLength: 32 };

/** What changes the unit's state, and what puts it back. */
const CHANGES = {
  protect: [(disk) => disk.submit(SWP(true)), (disk) => disk.submit(SWP(false))],
  cacheOff: [(disk) => disk.submit(WCE(false)), (disk) => disk.submit(WCE(true))],
  eject: [
    (disk) => disk.submit({ cdb: [0x1b, 0, 0, 0, 0x02, 0] }),
    (disk) => disk.submit({ cdb: [0x1b, 0, 0, 0, 0x03, 0] }),
  ],
  // START STOP UNIT, POWER CONDITION standby.
  standBy: [(disk) => disk.submit({ cdb: [0x1b, 0, 0, 0, 0x30, 0] })],
  grow: [(disk, store) => disk.resize(store.size + 16 * BLOCK)],
  cut: [(_, store) => store.cut(store.size - 64 * BLOCK), (_, store) => store.cut(store.size)],
  ready: [(disk) => disk.submit({ cdb: [0, 0, 0, 0, 0, 0] })],
  sense: [(disk) => disk.submit(REQUEST_SENSE)],
  flush: [(disk) => disk.submit({ cdb: [0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0] })],
  unmap: [(disk) => disk.unmap({ lba: 4, blocks: 40 }).catch(String)],
  writeSame: [(disk) => disk.writeSame(60, 9, filled(1, 0x77)).catch(String)],
  lunReset: [(disk) => disk.kernel.lunReset()],
  format: [(disk) => disk.submit({ cdb: [4, 0, 0, 0, 0, 0] })],
} as const satisfies Record<
  string,
  readonly ((disk: SimulatedDisk, store: LinearStore) => unknown)[]
>;

const change = fc.record({
  kind: fc.constant('change' as const),
  what: fc.constantFrom(...(Object.keys(CHANGES) as (keyof typeof CHANGES)[])),
  meanwhile: fc.array(move, { maxLength: 4 }),
});
type Move = typeof move extends fc.Arbitrary<infer T> ? T : never;
type Step = Move | (typeof change extends fc.Arbitrary<infer T> ? T : never);

function moveRequest(step: Move): CommandRequest {
  const length = CDB_LENGTHS[step.opcode as keyof typeof CDB_LENGTHS];
  const cdb = new Uint8Array(length);
  const view = new DataView(cdb.buffer);
  cdb[0] = step.opcode;
  cdb[1] = step.options;
  cdb[length - 1] = step.control;
  if (length === 6) {
    cdb[1] = 0;
    view.setUint16(2, step.lba);
    cdb[4] = Math.max(1, step.blocks);
  } else if (length === 16) {
    view.setBigUint64(2, BigInt(step.lba));
    view.setUint32(10, step.blocks);
  } else {
    view.setUint32(2, step.lba);
    if (length === 10) view.setUint16(7, step.blocks);
    else view.setUint32(6, step.blocks);
  }
  const blocks = Math.max(0, (length === 6 ? (cdb[4] as number) : step.blocks) + step.slack);
  const isWrite = (step.opcode & 0x0f) === 0x0a;
  return isWrite
    ? { cdb, dataOut: filled(blocks, step.value) }
    : { cdb, dataInLength: blocks * BLOCK };
}

/** All answers, in order. */
async function perform(step: Step, disk: SimulatedDisk, store: LinearStore): Promise<unknown[]> {
  if (step.kind === 'move') return [await disk.submit(moveRequest(step))];
  const [enter, leave] = CHANGES[step.what] as readonly ((
    disk: SimulatedDisk,
    store: LinearStore,
  ) => unknown)[];
  const answers = [await enter?.(disk, store)];
  for (const each of step.meanwhile) {
    answers.push(await disk.submit(moveRequest(each)), await disk.submit(REQUEST_SENSE));
  }
  answers.push(await leave?.(disk, store));
  return answers;
}

/** LOG SENSE, General Statistics and Performance. */
function statistics(disk: SimulatedDisk): Promise<unknown> {
  return disk.submit({ cdb: [0x4d, 0, 0x59, 0, 0, 0, 0, 0, 96, 0], dataInLength: 96 });
}

test('an initiator sees no difference, and nor does the file', async () => {
  let carried = 0;
  let run = 0;
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.oneof({ arbitrary: move, weight: 3 }, { arbitrary: change, weight: 1 }), {
        minLength: 10,
        maxLength: 60,
      }),
      async (steps) => {
        run++;
        const scsi = { removable: true };
        const fast = await start(`fast-${run}`, { scsi });
        const slow = await start(`slow-${run}`, { scsi, express: false });
        for (const step of steps) {
          const answers = await perform(step, fast.disk, fast.store);
          const expected = await perform(step, slow.disk, slow.store);
          // Vitest's own comparison takes a second for a disk.
          if (!isDeepStrictEqual(answers, expected)) expect(answers).toEqual(expected);
        }
        expect(await statistics(fast.disk)).toEqual(await statistics(slow.disk));
        expect(fast.store.flushes).toBe(slow.store.flushes);
        const [bytes, wanted] = [fast, slow].map(({ store }) => readFileSync(store.file.path));
        expect(bytes?.equals(wanted as Buffer)).toBe(true);
        carried += express(fast.disk);
        expect(express(slow.disk)).toBe(0);
        for (const disk of disks.splice(0)) await disk.close();
      },
    ),
    cases(200),
  );
  // The comparison means something only if the lane was used.
  expect(carried).toBeGreaterThan(1000);
});
