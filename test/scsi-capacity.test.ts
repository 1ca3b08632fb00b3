// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { type BlockExtent, type BlockStore, MemoryStore } from '../lib/store/index.js';
import { asynchronous, BareStore, cdb, openDevice, run } from './scsi-fake-command.js';

const readCapacity10 = (lba = 0) => cdb(0x25, 0, [lba, 4], 0, 0, 0, 0);
const readCapacity16 = (allocation = 32) => cdb(0x9e, 0x10, [0, 8], [allocation, 4], 0, 0);
const getLbaStatus = (lba: number | bigint, allocation = 24, type = 0) =>
  cdb(0x9e, 0x12, [lba, 8], [allocation, 4], type, 0);

/** A disk of any size that has nothing in it. */
function hugeStore(size: number, blockSize = 512): BlockStore {
  return { size, blockSize, read: () => {}, write: () => {} };
}

describe('READ CAPACITY', () => {
  test('(10) gives last block and block length', async () => {
    const device = await openDevice(new MemoryStore({ size: 1 << 20, blockSize: 4096 }));
    const { data } = await run(device, readCapacity10(), { in: 8 });
    expect(Buffer.from(data).toString('hex')).toBe('000000ff00001000');
  });

  test('(10) gives all ones for a disk of 2 TiB and more', async () => {
    for (const [blocks, last] of [
      [2 ** 32 - 1, 0xffff_fffe],
      [2 ** 32, 0xffff_ffff],
      [2 ** 40, 0xffff_ffff],
    ] as const) {
      const device = await openDevice(hugeStore(blocks * 512));
      const { data } = await run(device, readCapacity10(), { in: 8 });
      expect(Buffer.from(data).readUInt32BE(0)).toBe(last);
    }
  });

  test('(10) refuses an address and PMI', async () => {
    const device = await openDevice(new MemoryStore({ size: 1 << 20 }));
    expect((await run(device, readCapacity10(1), { in: 8 })).outcome).toBe('5/24/0');
    const pmi = cdb(0x25, 0, [0, 4], 0, 0, 1, 0);
    expect((await run(device, pmi, { in: 8 })).sense?.field).toEqual({
      in: 'cdb',
      byte: 8,
      bit: 0,
    });
  });

  test('(16) tells size, physical blocks and thin provisioning', async () => {
    const thin = Object.assign(new MemoryStore({ size: 1 << 20 }), { physicalBlockSize: 4096 });
    const { data } = await run(await openDevice(thin), readCapacity16(), { in: 32 });
    expect(Buffer.from(data).toString('hex')).toBe(
      `00000000000007ff000002000003c000${'00'.repeat(16)}`,
    );
    const thick = await run(await openDevice(new BareStore(thin)), readCapacity16(), { in: 32 });
    expect(thick.data[14]).toBe(0);
  });

  test('(16) of a disk beyond 32 bits', async () => {
    const device = await openDevice(hugeStore(2 ** 52, 4096));
    const { data } = await run(device, readCapacity16(), { in: 32 });
    expect(Buffer.from(data).readBigUInt64BE(0)).toBe(2n ** 40n - 1n);
  });

  test.each([0, 1, 8, 12, 31])('(16) with allocation length %i', async (allocation) => {
    const device = await openDevice(new MemoryStore({ size: 1 << 20 }));
    const command = await run(device, readCapacity16(allocation), { in: 32 });
    expect(command.outcome).toBe('GOOD');
    expect(command.written).toBe(allocation);
  });
});

describe('GET LBA STATUS', () => {
  const page = 65536 / 512;

  async function status(store: BlockStore, lba: number, allocation = 1024) {
    const command = await run(await openDevice(store), getLbaStatus(lba, allocation), { in: 1024 });
    expect(command.outcome).toBe('GOOD');
    const data = Buffer.from(command.data);
    expect(data.readUInt32BE(0)).toBe(data.length - 4);
    const runs = [];
    for (let at = 8; at < data.length; at += 16) {
      runs.push([Number(data.readBigUInt64BE(at)), data.readUInt32BE(at + 8), data[at + 12]]);
    }
    return runs;
  }

  const holey = async () => {
    const store = new MemoryStore({ size: 1 << 20 });
    const device = await openDevice(store);
    await run(device, cdb(0x2a, 0, [2 * page, 4], 0, [1, 2], 0), { out: new Uint8Array(512) });
    return store;
  };

  test.each([
    ['synchronous', (store: BlockStore) => store],
    ['asynchronous', asynchronous],
  ])('tells runs of mapped and deallocated blocks, merged (%s)', async (_, wrap) => {
    const store = wrap(await holey());
    expect(await status(store, 0)).toEqual([
      [0, 2 * page, 1],
      [2 * page, page, 0],
      [3 * page, 13 * page, 1],
    ]);
    expect(await status(store, 2 * page + 5)).toEqual([
      [2 * page + 5, page - 5, 0],
      [3 * page, 13 * page, 1],
    ]);
  });

  test('gives as many descriptors as the allocation length has room for', async () => {
    expect(await status(await holey(), 0, 24)).toEqual([[0, 2 * page, 1]]);
  });

  test('without blockStatus all is mapped or unknown', async () => {
    expect(await status(new BareStore(new MemoryStore({ size: 1 << 20 })), 100)).toEqual([
      [100, 1948, 0],
    ]);
  });

  test('a run of more than 2^32 - 1 blocks is cut, and nothing follows it', async () => {
    const extents: BlockExtent[] = [
      { length: 2 ** 33 * 512, status: 'hole' },
      { length: 512, status: 'data' },
    ];
    const store = { ...hugeStore((2 ** 33 + 1) * 512), blockStatus: () => extents };
    expect(await status(store, 0)).toEqual([[0, 0xffff_ffff, 1]]);
  });

  test.each([2048, 2049, 2n ** 53n, 2n ** 63n, 2n ** 64n - 1n])(
    'block %s is out of range',
    async (lba) => {
      const device = await openDevice(new MemoryStore({ size: 1 << 20 }));
      expect((await run(device, getLbaStatus(lba), { in: 24 })).outcome).toBe('5/21/0');
    },
  );

  test('a report type is refused', async () => {
    const device = await openDevice(new MemoryStore({ size: 1 << 20 }));
    const command = await run(device, getLbaStatus(0, 24, 1), { in: 24 });
    expect(command.sense?.field).toEqual({ in: 'cdb', byte: 14, bit: 7 });
  });
});
