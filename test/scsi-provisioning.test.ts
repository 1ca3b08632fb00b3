// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import type { MaybePromise } from '../lib/device/data.js';
import {
  type BlockStore,
  faults,
  MemoryStore,
  StoreMiddleware,
  type StoreOperation,
} from '../lib/store/index.js';
import {
  asynchronous,
  BareStore,
  CDB,
  cdb,
  FakeCommand,
  openDevice,
  run,
  unmapList,
} from './scsi-fake-command.js';

const BLOCKS = 4096;
const memory = () => new MemoryStore({ size: BLOCKS * 512 });
const ANCHOR_UNMAP = 0x01;
const WS_ANCHOR = 0x10;
const WS_UNMAP = 0x08;
const WS_NDOB = 0x01;

/** Records what reaches the store. */
class Recorder extends StoreMiddleware {
  readonly log: [string, number, number][] = [];
  readonly #granularity: number;

  constructor(store: BlockStore, granularity: number) {
    super(store);
    this.#granularity = granularity;
  }

  override get unmapGranularity(): number {
    return this.#granularity;
  }

  protected override intercept<T>(
    { name, position, length }: StoreOperation,
    run: () => MaybePromise<T>,
  ): MaybePromise<T> {
    this.log.push([name, position / 512, length / 512]);
    return run();
  }
}

async function filled(store: BlockStore): Promise<Awaited<ReturnType<typeof openDevice>>> {
  const device = await openDevice(store);
  const out = new Uint8Array(BLOCKS * 512).fill(0xaa);
  expect((await run(device, CDB.write16(0, BLOCKS), { out })).outcome).toBe('GOOD');
  return device;
}

/** First byte of each block. */
async function blocks(device: Awaited<ReturnType<typeof openDevice>>, lba: number, count: number) {
  const { data } = await run(device, CDB.read16(lba, count), { in: count * 512 });
  return Array.from({ length: count }, (_, i) => {
    const block = data.subarray(i * 512, (i + 1) * 512);
    return block.every((byte) => byte === block[0]) ? block[0] : undefined;
  });
}

const unmap = (device: Awaited<ReturnType<typeof openDevice>>, out: Uint8Array, options = 0) =>
  run(device, CDB.unmap(out.length, options), { out });

describe('UNMAP', () => {
  test.each([
    ['synchronous', (store: BlockStore) => store],
    ['asynchronous', asynchronous],
  ])('deallocates each range, nothing else (%s)', async (_, wrap) => {
    const store = memory();
    const device = await filled(wrap(store));
    const before = store.allocated;
    const command = await unmap(device, unmapList([1, 1], [10, 0], [128, 128], [BLOCKS - 1, 1]));
    expect(command.outcome).toBe('GOOD');
    expect(await blocks(device, 0, 3)).toEqual([0xaa, 0, 0xaa]);
    expect(await blocks(device, 127, 130)).toEqual([0xaa, ...new Array(128).fill(0), 0xaa]);
    expect(await blocks(device, BLOCKS - 2, 2)).toEqual([0xaa, 0]);
    expect(store.allocated).toBe(before - 65536);
  });

  test('edges of a granule are zeroed, whole granules unmapped', async () => {
    const recorder = new Recorder(memory(), 4096);
    const device = await filled(recorder);
    recorder.log.length = 0;
    expect((await unmap(device, unmapList([3, 20]))).outcome).toBe('GOOD');
    expect(recorder.log).toEqual([
      ['writeZeroes', 3, 5],
      ['unmap', 8, 8],
      ['writeZeroes', 16, 7],
    ]);
    expect(await blocks(device, 2, 22)).toEqual([0xaa, ...new Array(20).fill(0), 0xaa]);
    recorder.log.length = 0;
    expect((await unmap(device, unmapList([9, 2]))).outcome).toBe('GOOD');
    expect(recorder.log).toEqual([['writeZeroes', 9, 2]]);
  });

  test('the end of the disk counts as the end of a granule', async () => {
    const recorder = new Recorder(new MemoryStore({ size: 1000 * 512 }), 4096 * 16);
    const device = await openDevice(recorder);
    expect((await unmap(device, unmapList([896, 104]))).outcome).toBe('GOOD');
    expect(recorder.log).toEqual([['unmap', 896, 104]]);
  });

  test('an asynchronous failure is not answered GOOD', async () => {
    for (const afterwards of [false, true]) {
      const store = asynchronous(
        faults(memory(), { operations: ['unmap'], skip: 1, error: 'EIO', afterwards }),
      );
      const device = await openDevice(store);
      const command = await unmap(device, unmapList([0, 8], [8, 8], [16, 8]));
      expect(command.outcome).toBe('3/c/0');
    }
  });

  test('is answered only when all ranges are done', async () => {
    const device = await openDevice(asynchronous(memory()));
    const out = unmapList([0, 8], [8, 8]);
    const command = new FakeCommand(CDB.unmap(out.length), { out });
    const pending = device.handle(command);
    expect(command.outcome).toBe('pending');
    await pending;
    expect(command.outcome).toBe('GOOD');
  });

  test('nothing to do is GOOD', async () => {
    const device = await openDevice(memory());
    expect((await run(device, CDB.unmap(0))).outcome).toBe('GOOD');
    expect((await unmap(device, unmapList())).outcome).toBe('GOOD');
    expect((await unmap(device, unmapList([BLOCKS, 0]))).outcome).toBe('GOOD');
  });

  test('a bad range stops it before anything is unmapped', async () => {
    const device = await filled(memory());
    for (const bad of [
      [BLOCKS, 1],
      [BLOCKS - 1, 2],
      [2n ** 64n - 1n, 1],
      [2n ** 63n, 0xffff_ffff],
    ] as const) {
      expect((await unmap(device, unmapList([0, 8], bad))).outcome).toBe('5/21/0');
    }
    expect(await blocks(device, 0, 8)).toEqual(new Array(8).fill(0xaa));
  });

  test('limits of the Block Limits page hold', async () => {
    const device = await openDevice(memory());
    const many = unmapList(...Array.from({ length: 257 }, () => [0, 1] as const));
    expect((await unmap(device, many)).outcome).toBe('5/26/0');
    const huge = await openDevice({ size: 2 ** 40, read() {}, write() {}, unmap() {} });
    expect((await unmap(huge, unmapList([0, 2 ** 20]))).outcome).toBe('GOOD');
    expect((await unmap(huge, unmapList([0, 2 ** 20 + 1]))).outcome).toBe('5/26/0');
    expect((await unmap(huge, unmapList([0, 2 ** 20], [0, 1]))).outcome).toBe('5/26/0');
  });

  test('a list that is cut', async () => {
    const device = await filled(memory());
    const list = unmapList([0, 8], [16, 8]);
    expect((await unmap(device, list.subarray(0, 7))).outcome).toBe('5/1a/0');
    expect((await unmap(device, list.subarray(0, 8))).outcome).toBe('5/1a/0');
    expect((await unmap(device, list.subarray(0, 39))).outcome).toBe('5/1a/0');
    // The buffer is shorter than the PARAMETER LIST LENGTH.
    const short = await run(device, CDB.unmap(list.length), { out: list.subarray(0, 30) });
    expect(short.outcome).toBe('5/1a/0');
    expect(await blocks(device, 0, 1)).toEqual([0xaa]);
  });

  test('an incomplete last descriptor is ignored', async () => {
    const device = await filled(memory());
    const list = unmapList([0, 1], [1, 1]).slice(0, 36);
    list.set([0, 34, 0, 28]);
    expect((await unmap(device, list)).outcome).toBe('GOOD');
    expect(await blocks(device, 0, 2)).toEqual([0, 0xaa]);
  });

  test('anchoring is refused; without unmap there is no such command', async () => {
    const device = await openDevice(memory());
    const anchored = await unmap(device, unmapList([0, 1]), ANCHOR_UNMAP);
    expect(anchored.sense?.field).toEqual({ in: 'cdb', byte: 1, bit: 0 });
    const thick = await openDevice(new BareStore(memory()));
    expect((await unmap(thick, unmapList([0, 1]))).outcome).toBe('5/20/0');
  });
});

describe.each([
  ['(10)', CDB.writeSame10],
  ['(16)', CDB.writeSame16],
])('WRITE SAME %s', (_name, writeSame) => {
  const one = (value: number) => new Uint8Array(512).fill(value);

  test.each<[string, () => BlockStore]>([
    ['all methods', memory],
    ['all methods, asynchronous', () => asynchronous(memory())],
    ['only read and write', () => new BareStore(memory())],
    ['only read and write, asynchronous', () => asynchronous(new BareStore(memory()))],
    ['only writeSame', () => new BareStore(memory(), 'writeSame')],
    ['only writeZeroes', () => new BareStore(memory(), 'writeZeroes')],
  ])('fills a range with a block or with zeros: %s', async (_, make) => {
    const device = await filled(make());
    for (const value of [0x55, 0]) {
      const command = await run(device, writeSame(3, 1500), { out: one(value) });
      expect(command.outcome).toBe('GOOD');
      expect(await blocks(device, 2, 1502)).toEqual([0xaa, ...new Array(1500).fill(value), 0xaa]);
    }
  });

  test('zeros with UNMAP deallocate, other data is written', async () => {
    const store = memory();
    const device = await filled(store);
    const before = store.allocated;
    expect((await run(device, writeSame(128, 256, WS_UNMAP), { out: one(7) })).outcome).toBe(
      'GOOD',
    );
    expect(store.allocated).toBe(before);
    expect(await blocks(device, 128, 1)).toEqual([7]);
    expect((await run(device, writeSame(128, 256, WS_UNMAP), { out: one(0) })).outcome).toBe(
      'GOOD',
    );
    expect(store.allocated).toBe(before - 2 * 65536);
    expect(await blocks(device, 127, 258)).toEqual([0xaa, ...new Array(256).fill(0), 0xaa]);
  });

  test('UNMAP where granularity was left out or is not a power of two', async () => {
    const withoutGranularity: BlockStore = {
      size: BLOCKS * 512,
      read() {},
      write() {},
      unmap() {},
      writeZeroes() {},
    };
    const plain = await openDevice(withoutGranularity);
    expect((await run(plain, writeSame(1, 1, WS_UNMAP), { out: one(0) })).outcome).toBe('GOOD');
    const recorder = new Recorder(memory(), 3 * 512);
    const device = await openDevice(recorder);
    expect((await run(device, writeSame(1, 7, WS_UNMAP), { out: one(0) })).outcome).toBe('GOOD');
    expect(recorder.log).toEqual([
      ['writeZeroes', 1, 2],
      ['unmap', 3, 3],
      ['writeZeroes', 6, 2],
    ]);
    const zero = openDevice({ ...withoutGranularity, unmapGranularity: 0 });
    await expect(zero).rejects.toThrow(/unmapGranularity is 0/);
  });

  test('an asynchronous failure is not answered GOOD', async () => {
    for (const options of [0, WS_UNMAP]) {
      for (const value of [0, 7]) {
        const broken = asynchronous(faults(memory(), { error: 'ENOSPC' }));
        const command = await run(await openDevice(broken), writeSame(0, 8, options), {
          out: one(value),
        });
        expect(command.outcome).toBe('7/27/7');
      }
    }
  });

  test('without data, UNMAP still means zeros', async () => {
    const device = await filled(memory());
    expect((await run(device, writeSame(0, 8, WS_UNMAP))).outcome).toBe('GOOD');
    expect(await blocks(device, 0, 9)).toEqual([...new Array(8).fill(0), 0xaa]);
  });

  test('a buffer that is not one block is refused', async () => {
    const device = await filled(memory());
    for (const length of [0, 100, 511, 513, 1024]) {
      const command = await run(device, writeSame(0, 8), { out: new Uint8Array(length) });
      expect(command.outcome).toBe('5/e/3');
    }
    expect(await blocks(device, 0, 1)).toEqual([0xaa]);
  });

  test('length 0 (WSNZ), a length above the limit, and a range past the end', async () => {
    const device = await openDevice(memory());
    expect((await run(device, writeSame(0, 0), { out: one(0) })).outcome).toBe('5/24/0');
    expect((await run(device, writeSame(BLOCKS - 1, 2), { out: one(0) })).outcome).toBe('5/21/0');
  });

  test('anchoring and protection are refused; UNMAP where nothing can be unmapped', async () => {
    const device = await openDevice(memory());
    for (const [options, bit] of [
      [WS_ANCHOR, 4],
      [WS_ANCHOR | WS_UNMAP, 4],
      [0x20, 7],
      [0xe0, 7],
    ] as const) {
      const command = await run(device, writeSame(0, 1, options), { out: one(0) });
      expect(command.sense?.field).toEqual({ in: 'cdb', byte: 1, bit });
    }
    const thick = await openDevice(new BareStore(memory()));
    const command = await run(thick, writeSame(0, 1, WS_UNMAP), { out: one(0) });
    expect(command.sense?.field).toEqual({ in: 'cdb', byte: 1, bit: 3 });
  });
});

describe('WRITE SAME (16)', () => {
  test('NDOB writes zeros without data, whatever the buffer holds', async () => {
    for (const options of [WS_NDOB, WS_NDOB | WS_UNMAP]) {
      const device = await filled(memory());
      expect((await run(device, CDB.writeSame16(1, 2, options))).outcome).toBe('GOOD');
      expect(await blocks(device, 0, 4)).toEqual([0xaa, 0, 0, 0xaa]);
      const out = new Uint8Array(512).fill(7);
      await run(device, CDB.writeSame16(3, 1, options), { out });
      expect(await blocks(device, 3, 1)).toEqual([0]);
    }
  });

  test('bit 0 is no NDOB in WRITE SAME (10)', async () => {
    const device = await filled(memory());
    const out = new Uint8Array(512).fill(7);
    await run(device, CDB.writeSame10(0, 1, WS_NDOB), { out });
    expect(await blocks(device, 0, 1)).toEqual([7]);
  });

  test('the limit of the Block Limits page holds, in bytes', async () => {
    const sparse = { size: 2 ** 40, read() {}, write() {}, writeZeroes() {} };
    const device = await openDevice(sparse);
    expect((await run(device, CDB.writeSame16(0, 2 ** 21, WS_NDOB))).outcome).toBe('GOOD');
    const over = await run(device, CDB.writeSame16(0, 2 ** 21 + 1, WS_NDOB));
    expect(over.outcome).toBe('5/24/0');
    expect(over.sense?.field?.byte).toBe(10);
    const beyond = cdb(0x93, 0, [2n ** 64n - 1n, 8], [0xffff_ffff, 4], 0, 0);
    expect((await run(device, beyond)).outcome).toBe('5/21/0');
  });
});
