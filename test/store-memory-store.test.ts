// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { ArgumentError } from '../lib/errors.js';
import { MemoryDataIn, MemoryDataOut, MemoryStore } from '../lib/store/index.js';

const KiB = 1024;
const make = () => new MemoryStore({ size: 64 * KiB, pageSize: 4 * KiB });

function read(store: MemoryStore, position: number, length: number): Uint8Array {
  const data = new MemoryDataIn(new Uint8Array(length).fill(0xee));
  store.read(position, data);
  return data.bytes;
}

function write(store: MemoryStore, position: number, length: number, value: number): void {
  store.write(position, new MemoryDataOut(new Uint8Array(length).fill(value)));
}

test('begins as zeros and takes memory only where written', () => {
  const store = make();
  expect(store.allocated).toBe(0);
  expect(read(store, 0, 64 * KiB).every((byte) => byte === 0)).toBe(true);
  write(store, 3584, 1024, 1);
  expect(store.allocated).toBe(8 * KiB);
  const back = read(store, 3072, 2048);
  expect([back[511], back[512], back[1535], back[1536]]).toEqual([0, 1, 1, 0]);
});

test('unmap gives whole pages back and zeroes parts of others', () => {
  const store = make();
  write(store, 0, 64 * KiB, 1);
  store.unmap(2 * KiB, 8 * KiB);
  expect(store.allocated).toBe(60 * KiB);
  const back = read(store, 0, 16 * KiB);
  expect(back.indexOf(0)).toBe(2 * KiB);
  expect(back.lastIndexOf(0)).toBe(10 * KiB - 1);
  store.writeSame(4 * KiB, 8 * KiB, new Uint8Array(512).fill(5));
  expect(read(store, 4 * KiB, 8 * KiB).every((byte) => byte === 5)).toBe(true);
  store.writeSame(4 * KiB, 8 * KiB, new Uint8Array(512));
  store.writeZeroes(0, 4 * KiB);
  expect(store.allocated).toBe(52 * KiB);
});

test('blockStatus tells holes from data, page by page', () => {
  const store = make();
  write(store, 8 * KiB, 512, 1);
  expect(store.blockStatus(6 * KiB, 10 * KiB)).toEqual([
    { length: 2 * KiB, status: 'hole' },
    { length: 4 * KiB, status: 'data' },
    { length: 4 * KiB, status: 'hole' },
  ]);
});

test('resize cuts off for good', () => {
  const store = make();
  write(store, 0, 64 * KiB, 1);
  store.resize(6 * KiB);
  expect(store.size).toBe(6 * KiB);
  expect(store.allocated).toBe(8 * KiB);
  store.resize(128 * KiB);
  const back = read(store, 0, 128 * KiB);
  expect(back.indexOf(0)).toBe(6 * KiB);
  expect(back.lastIndexOf(1)).toBe(6 * KiB - 1);
});

test('a last page that is cut short by the end of the disk is given back too', () => {
  const store = new MemoryStore({ size: 6 * KiB, pageSize: 4 * KiB });
  write(store, 4 * KiB, 2 * KiB, 1);
  store.unmap(4 * KiB, 2 * KiB);
  expect(store.allocated).toBe(0);
});

describe('sizes that do not fit together are refused', () => {
  test.each([
    [{ size: 0 }],
    [{ size: 1000 }],
    [{ size: -512 }],
    [{ size: 2 ** 53 }],
    [{ size: 8192, blockSize: 4096, pageSize: 2048 }],
    [{ size: 8192, pageSize: 3000 }],
  ])('%j', (options) => {
    expect(() => new MemoryStore(options)).toThrow(ArgumentError);
  });

  test('at a resize, which then changes nothing', () => {
    const store = make();
    expect(() => store.resize(100)).toThrow(ArgumentError);
    expect(store.size).toBe(64 * KiB);
  });
});
