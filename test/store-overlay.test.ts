// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import {
  type BlockStore,
  faults,
  MemoryDataIn,
  MemoryDataOut,
  MemoryStore,
  overlay,
} from '../lib/store/index.js';
import { asynchronous, BareStore } from './scsi-fake-command.js';

const BLOCKS = 80_000;
const context = { signal: new AbortController().signal, fua: false, mayUnmap: true };
const memory = (blocks = BLOCKS) => new MemoryStore({ size: blocks * 512 });

function write(store: BlockStore, lba: number, blocks: number, value: number) {
  const data = new MemoryDataOut(new Uint8Array(blocks * 512).fill(value));
  return store.write(lba * 512, data, context);
}

/** The value of each block, as runs [value, blocks]. */
async function runs(store: BlockStore, lba: number, blocks: number) {
  const data = new MemoryDataIn(new Uint8Array(blocks * 512).fill(0xee));
  await store.read(lba * 512, data, context);
  const found: [number, number][] = [];
  for (let i = 0; i < blocks; i++) {
    const value = data.bytes[i * 512] as number;
    const last = found.at(-1);
    if (last?.[0] === value) last[1]++;
    else found.push([value, 1]);
  }
  return found;
}

describe('overlay', () => {
  test.each([
    ['synchronous', (store: BlockStore) => store],
    ['asynchronous', asynchronous],
  ])('shows the base until written; the base never changes (%s)', async (_, wrap) => {
    const base = memory();
    const disk = overlay(wrap(base), wrap(memory()));
    await write(base, 0, BLOCKS, 1);
    await write(disk, 3, 2, 2);
    await write(disk, 32_767, 2, 3);
    expect(await runs(disk, 0, BLOCKS)).toEqual([
      [1, 3],
      [2, 2],
      [1, 32_762],
      [3, 2],
      [1, BLOCKS - 32_769],
    ]);
    expect(await runs(base, 0, BLOCKS)).toEqual([[1, BLOCKS]]);
  });

  test('whole pages of the map, and runs across them', async () => {
    const disk = overlay(memory(), memory());
    await write(disk, 100, 70_000, 5);
    expect(await runs(disk, 0, BLOCKS)).toEqual([
      [0, 100],
      [5, 70_000],
      [0, BLOCKS - 70_100],
    ]);
  });

  test('what top held before is never seen', async () => {
    const top = memory();
    await write(top, 0, BLOCKS, 9);
    expect(await runs(overlay(memory(), top), 0, BLOCKS)).toEqual([[0, BLOCKS]]);
  });

  test.each<[string, () => BlockStore, [number, number][]]>([
    [
      'a full top',
      memory,
      [
        [1, 2],
        [0, 1],
        [1, 1],
      ],
    ],
    ['a bare top', () => new BareStore(memory()), [[1, 4]]],
  ])('zeroes, repeats and unmaps through %s', async (_, make, rest) => {
    const base = memory();
    await write(base, 0, BLOCKS, 1);
    const disk = overlay(base, make());
    await disk.writeZeroes?.(512, 512, context);
    await disk.writeSame?.(1024, 1024, new Uint8Array(512).fill(7), context);
    await disk.unmap?.(3072, 512, context);
    expect(await runs(disk, 0, 8)).toEqual([[1, 1], [0, 1], [7, 2], ...rest]);
    expect(await runs(base, 0, 8)).toEqual([[1, 8]]);
  });

  test('has flush and unmap as top has them', () => {
    expect(overlay(memory(), memory()).flush).toBeUndefined();
    let flushes = 0;
    const top = Object.assign(memory(), { flush: () => void flushes++ });
    const disk = overlay(memory(), top);
    disk.flush?.(context);
    expect(flushes).toBe(1);
    expect(disk.writeCache).toBe(true);
    expect(overlay(memory(), new BareStore(memory())).unmap).toBeUndefined();
  });

  test('blockStatus asks the store that has the blocks', async () => {
    const base = memory();
    const disk = overlay(base, memory());
    await write(base, 0, 128, 1);
    await write(disk, 512, 8, 2);
    expect(await disk.blockStatus?.(0, 128 * 512, context)).toEqual([
      { length: 128 * 512, status: 'data' },
    ]);
    expect(await disk.blockStatus?.(512 * 512, 64 * 512, context)).toEqual([
      { length: 8 * 512, status: 'data' },
    ]);
    const vague = overlay(new BareStore(memory()), memory());
    expect(await vague.blockStatus?.(0, 4096, context)).toEqual([{ length: 4096, status: 'data' }]);
  });

  test('untouched stretches of the map are passed over, up to the first written block', async () => {
    const blocks = 200_000;
    const disk = overlay(new BareStore(memory(blocks)), memory(blocks));
    const untilChange = async () =>
      (await disk.blockStatus?.(0, blocks * 512, context))?.[0]?.length;
    expect(await untilChange()).toBe(blocks * 512);
    for (const lba of [150_000, 98_304, 65_536, 40_000, 1]) {
      await write(disk, lba, 1, 1);
      expect(await untilChange()).toBe(lba * 512);
    }
  });

  test('a failed write leaves the old contents to be seen', async () => {
    const base = memory();
    await write(base, 0, 8, 1);
    const disk = overlay(base, asynchronous(faults(memory(), { afterwards: true, times: 1 })));
    await expect(write(disk, 0, 8, 2)).rejects.toThrow();
    expect(await runs(disk, 0, 8)).toEqual([[1, 8]]);
  });

  test('a failing part of a read fails it only when the other parts have settled', async () => {
    const slow: (() => void)[] = [];
    const base: BlockStore = {
      size: BLOCKS * 512,
      read: () => new Promise<void>((resolve) => slow.push(resolve)),
      write() {},
    };
    const disk = overlay(base, faults(memory(), { operations: ['read'] }));
    await write(disk, 1, 1, 2);
    let settled = false;
    const reading = Promise.resolve(
      disk.read(0, new MemoryDataIn(new Uint8Array(2 * 512)), context),
    ).finally(() => {
      settled = true;
    });
    reading.catch(() => {});
    await new Promise((resolve) => setImmediate(resolve));
    expect(settled).toBe(false);
    for (const resolve of slow) resolve();
    await expect(reading).rejects.toThrow(/injected EIO/);
  });

  test('opens and closes both; refuses a top that does not fit', async () => {
    const log: string[] = [];
    const named = (name: string, blocks = BLOCKS) =>
      Object.assign(memory(blocks), {
        open: async () => void log.push(`open ${name}`),
        close: async () => void log.push(`close ${name}`),
      });
    const disk = overlay(named('base'), named('top'));
    await disk.open?.();
    await disk.close?.();
    expect(log).toEqual(['open base', 'open top', 'close top', 'close base']);
    await expect(overlay(named('base'), named('top', 8)).open?.()).rejects.toThrow(/as large/);
    const coarse = new MemoryStore({ size: BLOCKS * 512, blockSize: 1024 });
    expect(() => overlay(memory(), coarse).open?.()).toThrow(/blocks of 512 bytes, top of 1024/);
  });
});
