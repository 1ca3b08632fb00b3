// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import type { DataOut } from '../lib/device/data.js';
import { type BlockStore, faults, MemoryStore, type WriteContext } from '../lib/store/index.js';
import {
  asynchronous,
  CDB,
  cdb,
  expectBytes,
  FakeCommand,
  openDevice,
  run,
  STALE,
} from './scsi-fake-command.js';

const BLOCKS = 2048;
const memory = () => new MemoryStore({ size: BLOCKS * 512 });
const pattern = (blocks: number, seed = 1) =>
  Uint8Array.from({ length: blocks * 512 }, (_, i) => (i * 7 + (i >> 9) + seed) & 0xff);

const read6 = (lba: number, blocks: number) =>
  cdb(0x08, (lba >> 16) & 0x1f, [lba & 0xffff, 2], blocks, 0);
const write6 = (lba: number, blocks: number) =>
  cdb(0x0a, (lba >> 16) & 0x1f, [lba & 0xffff, 2], blocks, 0);
const read12 = (lba: number, blocks: number, options = 0) =>
  cdb(0xa8, options, [lba, 4], [blocks, 4], 0, 0);
const write12 = (lba: number, blocks: number, options = 0) =>
  cdb(0xaa, options, [lba, 4], [blocks, 4], 0, 0);

type Form = (lba: number, blocks: number, options?: number) => number[];
const reads: [string, Form][] = [
  ['(6)', read6],
  ['(10)', CDB.read10],
  ['(12)', read12],
  ['(16)', CDB.read16],
];
const writes: [string, Form][] = [
  ['(6)', write6],
  ['(10)', CDB.write10],
  ['(12)', write12],
  ['(16)', CDB.write16],
];
const wide = (forms: [string, Form][]) => forms.slice(1);

describe.each([
  ['synchronous', (store: BlockStore) => store],
  ['asynchronous', asynchronous],
])('%s store', (_, wrap) => {
  test.each(writes)('WRITE %s and every READ agree', async (_name, write) => {
    const device = await openDevice(wrap(memory()));
    const data = pattern(5);
    expect((await run(device, write(100, 5), { out: data })).outcome).toBe('GOOD');
    for (const [name, read] of reads) {
      const back = await run(device, read(100, 5), { in: data.length });
      expect(back.outcome, name).toBe('GOOD');
      expectBytes(back.data, data);
    }
    const around = await run(device, CDB.read10(99, 7), { in: 7 * 512 });
    expect(around.data.subarray(0, 512).every((byte) => byte === 0)).toBe(true);
    expect(around.data.subarray(6 * 512).every((byte) => byte === 0)).toBe(true);
  });

  test('the first and the last block', async () => {
    const device = await openDevice(wrap(memory()));
    for (const lba of [0, BLOCKS - 1]) {
      const data = pattern(1, lba & 0xff);
      expect((await run(device, CDB.write16(lba, 1), { out: data })).outcome).toBe('GOOD');
      expectBytes((await run(device, CDB.read16(lba, 1), { in: 512 })).data, data);
    }
  });

  test('a transfer shorter than the CDB says moves what fits', async () => {
    const device = await openDevice(wrap(memory()));
    const data = pattern(2);
    await run(device, CDB.write10(0, 2), { out: data });
    for (const length of [0, 200, 512, 712, 1024]) {
      const back = await run(device, CDB.read10(0, 2), { in: length });
      expect(back.outcome).toBe('GOOD');
      expectBytes(back.data, data.subarray(0, length));
    }
    for (const length of [0, 200, 512, 712]) {
      await run(device, CDB.write10(0, 2), { out: data });
      const fresh = new Uint8Array(length).fill(0x55);
      expect((await run(device, CDB.write10(0, 2), { out: fresh })).outcome).toBe('GOOD');
      const back = await run(device, CDB.read10(0, 2), { in: 1024 });
      expectBytes(back.data.subarray(0, length), fresh);
      expectBytes(back.data.subarray(length), data.subarray(length));
    }
  });

  test('a buffer longer than the CDB says is used up to the CDB only', async () => {
    const device = await openDevice(wrap(memory()));
    await run(device, CDB.write10(0, 3), { out: pattern(3) });
    const long = await run(device, CDB.write10(0, 1), { out: pattern(3, 99) });
    expect(long.outcome).toBe('GOOD');
    const back = await run(device, CDB.read10(0, 2), { in: 10_000 });
    expect(back.written).toBe(1024);
    expectBytes(
      back.data,
      Uint8Array.from([...pattern(3, 99).subarray(0, 512), ...pattern(3).subarray(512, 1024)]),
    );
    expect(back.dataIn.bytes[1024]).toBe(STALE);
  });
});

test('READ (6) and WRITE (6) take length 0 as 256 blocks', async () => {
  const device = await openDevice(memory());
  const data = pattern(256);
  expect((await run(device, write6(1000, 0), { out: data })).outcome).toBe('GOOD');
  const back = await run(device, read6(1000, 0), { in: data.length });
  expectBytes(back.data, data);
  const beyond = await run(device, read6(BLOCKS - 255, 0), { in: data.length });
  expect(beyond.outcome).toBe('5/21/0');
});

test('the other READs and WRITEs take length 0 as nothing', async () => {
  const device = await openDevice(memory());
  for (const [name, form] of [...wide(reads), ...wide(writes)]) {
    const command = await run(device, form(0, 0));
    expect(command.outcome, name).toBe('GOOD');
    expect((await run(device, form(BLOCKS + 1, 0))).outcome, name).toBe('5/21/0');
  }
});

describe('range', () => {
  test.each([...reads, ...writes])('%s past the end', async (_, form) => {
    const device = await openDevice(memory());
    const buffers = { in: 1024, out: pattern(2) };
    for (const lba of [BLOCKS, BLOCKS - 1]) {
      expect((await run(device, form(lba, 2), buffers)).outcome).toBe('5/21/0');
    }
  });

  test.each([
    2n ** 31n,
    2n ** 32n,
    2n ** 52n,
    2n ** 53n + 1n,
    2n ** 55n,
    2n ** 63n,
    2n ** 64n - 1n,
  ])('(16) at block %s', async (lba) => {
    const device = await openDevice(memory());
    expect((await run(device, CDB.read16(lba, 1), { in: 512 })).outcome).toBe('5/21/0');
    expect((await run(device, CDB.write16(lba, 1), { out: pattern(1) })).outcome).toBe('5/21/0');
  });

  test('blocks far beyond 32 bits of a large disk are addressed exactly', async () => {
    const seen: number[] = [];
    const device = await openDevice({
      size: 2 ** 52,
      read: (position) => seen.push(position),
      write: (position) => seen.push(position),
    });
    const last = 2 ** 43 - 1;
    expect((await run(device, CDB.read16(last, 1), { in: 512 })).outcome).toBe('GOOD');
    expect((await run(device, CDB.write16(last - 1, 2), { out: pattern(2) })).outcome).toBe('GOOD');
    expect((await run(device, CDB.read16(last, 2), { in: 1024 })).outcome).toBe('5/21/0');
    expect(seen).toEqual([2 ** 52 - 512, 2 ** 52 - 1024]);
  });

  test('above the MAXIMUM TRANSFER LENGTH', async () => {
    const device = await openDevice(memory(), { maxTransferLength: 4096 });
    const buffers = { in: 8192, out: pattern(16) };
    for (const [name, form] of [...reads, ...writes]) {
      expect((await run(device, form(0, 8), buffers)).outcome, name).toBe('GOOD');
      expect((await run(device, form(0, 9), buffers)).outcome, name).toBe('5/24/0');
    }
  });
});

test.each([...wide(reads), ...wide(writes)])(
  '%s refuses every protection option, pointing at it',
  async (_, form) => {
    const device = await openDevice(memory());
    for (let protect = 1; protect < 8; protect++) {
      const command = await run(device, form(0, 1, protect << 5), { in: 512, out: pattern(1) });
      expect(command.outcome).toBe('5/24/0');
      expect(command.sense?.field).toEqual({ in: 'cdb', byte: 1, bit: 7 });
      expect(command.written).toBe(0);
    }
  },
);

describe('DPO and FUA', () => {
  const FUA = 0x08;
  const DPO = 0x10;

  /** A disk with a cache that notes what is asked of it. */
  class CachedStore extends MemoryStore {
    readonly log: string[] = [];
    failFlush = false;
    constructor(readonly supportsFua = false) {
      super({ size: BLOCKS * 512 });
    }
    override read(...args: Parameters<MemoryStore['read']>) {
      this.log.push('read');
      super.read(...args);
    }
    override write(position: number, data: DataOut, context?: WriteContext) {
      this.log.push(context?.fua ? 'write+fua' : 'write');
      super.write(position, data);
    }
    async flush() {
      this.log.push('flush');
      await new Promise((resolve) => setImmediate(resolve));
      if (this.failFlush) throw Object.assign(new Error('EIO'), { code: 'EIO' });
      this.log.push('flushed');
    }
  }

  test.each([...wide(reads), ...wide(writes)])('%s takes both bits', async (_, form) => {
    const device = await openDevice(memory());
    for (const options of [DPO, FUA, DPO | FUA]) {
      const command = await run(device, form(0, 1, options), { in: 512, out: pattern(1) });
      expect(command.outcome).toBe('GOOD');
    }
  });

  test('FUA without support is a write and then a flush; GOOD only after both', async () => {
    const store = new CachedStore();
    const device = await openDevice(store);
    const command = await run(device, CDB.write10(0, 1, FUA), { out: pattern(1) });
    expect(command.outcome).toBe('GOOD');
    expect(store.log).toEqual(['write', 'flush', 'flushed']);
    store.failFlush = true;
    const failed = await run(device, CDB.write10(0, 1, FUA), { out: pattern(1) });
    expect(failed.outcome).toBe('3/c/0');
  });

  test('FUA with support is one write', async () => {
    const store = new CachedStore(true);
    await run(await openDevice(store), CDB.write16(0, 1, FUA), { out: pattern(1) });
    expect(store.log).toEqual(['write+fua']);
  });

  test('a plain write, and DPO, flush nothing', async () => {
    const store = new CachedStore(true);
    const device = await openDevice(store);
    await run(device, CDB.write10(0, 1), { out: pattern(1) });
    await run(device, CDB.write10(0, 1, DPO), { out: pattern(1) });
    expect(store.log).toEqual(['write', 'write']);
  });

  test('FUA of a store without cache needs nothing', async () => {
    const store = Object.assign(new CachedStore(), { writeCache: false });
    const device = await openDevice(store);
    await run(device, CDB.write10(0, 1, FUA), { out: pattern(1) });
    await run(device, CDB.read10(0, 1, FUA), { in: 512 });
    expect(store.log).toEqual(['write', 'read']);
  });

  test('a FUA read writes the cache out first', async () => {
    const store = new CachedStore();
    const device = await openDevice(store);
    expect((await run(device, CDB.read10(0, 1, FUA), { in: 512 })).outcome).toBe('GOOD');
    expect(store.log).toEqual(['flush', 'flushed', 'read']);
  });

  test('the tail of a block that FUA writes is durable too', async () => {
    const store = new CachedStore();
    const device = await openDevice(store);
    await run(device, CDB.write10(0, 1, FUA), { out: new Uint8Array(100) });
    expect(store.log).toEqual(['read', 'write', 'flush', 'flushed']);
  });

  test('SYNCHRONIZE CACHE is GOOD only after the flush succeeded, IMMED or not', async () => {
    for (const opcode of [0x35, 0x91]) {
      for (const immediate of [0, 2]) {
        const store = new CachedStore();
        const device = await openDevice(store);
        const sync = [opcode, immediate, ...new Array(opcode === 0x35 ? 8 : 14).fill(0)];
        const command = new FakeCommand(sync);
        const pending = device.handle(command);
        expect(command.completions).toBe(0);
        await pending;
        expect(command.outcome).toBe('GOOD');
        expect(store.log).toEqual(['flush', 'flushed']);
        store.failFlush = true;
        expect((await run(device, sync)).outcome).toBe('3/c/0');
      }
    }
  });

  test('SYNCHRONIZE CACHE checks its range, and is GOOD without a flush', async () => {
    const device = await openDevice(memory());
    expect((await run(device, CDB.synchronizeCache10())).outcome).toBe('GOOD');
    expect((await run(device, cdb(0x35, 0, [BLOCKS, 4], 0, [1, 2], 0))).outcome).toBe('5/21/0');
    const far = cdb(0x91, 0, [2n ** 63n, 8], [0, 4], 0, 0);
    expect((await run(device, far)).outcome).toBe('5/21/0');
  });

  test('SYNCHRONIZE CACHE of a read-only disk asks nothing of the store', async () => {
    const store = Object.assign(new CachedStore(), { readOnly: true });
    store.failFlush = true;
    expect((await run(await openDevice(store), CDB.synchronizeCache10())).outcome).toBe('GOOD');
  });
});

test('a synchronous store is answered within the call', async () => {
  const device = await openDevice(memory());
  for (const bytes of [CDB.read10(0, 1), CDB.write16(0, 1), CDB.synchronizeCache10()]) {
    const command = new FakeCommand(bytes, { in: 512, out: pattern(1) });
    expect(device.handle(command)).toBeUndefined();
    expect(command.outcome).toBe('GOOD');
  }
});

test('PRE-FETCH checks its range and succeeds', async () => {
  const device = await openDevice(memory());
  const prefetch10 = (lba: number, n: number) => cdb(0x34, 0, [lba, 4], 0, [n, 2], 0);
  const prefetch16 = (lba: number, n: number) => cdb(0x90, 0, [lba, 8], [n, 4], 0, 0);
  for (const form of [prefetch10, prefetch16]) {
    expect((await run(device, form(0, 8))).outcome).toBe('GOOD');
    expect((await run(device, form(BLOCKS - 1, 2))).outcome).toBe('5/21/0');
  }
});

describe('a failing store', () => {
  test.each([
    ['synchronously', (store: BlockStore) => store],
    ['by a promise', asynchronous],
  ])('%s', async (_, wrap) => {
    const device = await openDevice(wrap(faults(memory(), { error: 'EIO' })));
    expect((await run(device, CDB.read10(0, 1), { in: 512 })).outcome).toBe('3/11/0');
    expect((await run(device, CDB.write10(0, 1), { out: pattern(1) })).outcome).toBe('3/c/0');
    const full = await openDevice(wrap(faults(memory(), { error: 'ENOSPC' })));
    expect((await run(full, CDB.write10(0, 1), { out: pattern(1) })).outcome).toBe('7/27/7');
  });

  test('a request sees the signal of its command', async () => {
    let aborted: boolean | undefined;
    const device = await openDevice({
      size: 512,
      read: (_position, _data, { signal }) =>
        new Promise((_resolve, reject) => {
          signal.addEventListener('abort', () => {
            aborted = true;
            reject(signal.reason);
          });
        }),
      write: () => {},
    });
    const command = new FakeCommand(CDB.read10(0, 1), { in: 512 });
    const pending = device.handle(command);
    command.controller.abort();
    await pending;
    expect(aborted).toBe(true);
    expect(command.outcome).toBe('b/0/0');
  });
});
