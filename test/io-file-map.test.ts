// SPDX-License-Identifier: Apache-2.0
/** Where a disk's bytes lie in files, and that plain commands go by it: what is not known there goes to the store. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { DataIn, DataOut } from '../lib/device/data.js';
import { BackingFile } from '../lib/io/backing-file.js';
import { FileMap } from '../lib/io/file-map.js';
import { type SimulatedDisk, simulate } from '../lib/sim/index.js';
import type { BlockStore } from '../lib/store/index.js';

const BLOCK = 512;
/** Blocks of a unit. */
const UNIT = 4;
const SIZE = 1024 * BLOCK;

let folder: string;
let disk: SimulatedDisk;
let files: BackingFile[];
let store: CountingStore;

/** Answers what no file holds. */
class CountingStore implements BlockStore {
  readonly size = SIZE;
  readonly fileMap: FileMap;
  calls = 0;

  constructor(units: number) {
    this.fileMap = new FileMap({ unit: UNIT * BLOCK, units });
    this.fileMap.allow(SIZE, SIZE);
  }

  read(_: number, data: DataIn): void {
    this.calls++;
    data.fill(0xff);
  }

  write(_: number, data: DataOut): void {
    this.calls++;
    data.toBytes();
  }

  flush(): void {}
}

/** A file in which each block has its own number everywhere. */
async function file(
  name: string,
  first: number,
  io: 'inline' | 'pool' = 'inline',
): Promise<BackingFile> {
  const path = join(folder, name);
  const bytes = Buffer.alloc(64 * BLOCK);
  for (let i = 0; i < 64; i++) bytes.fill(first + i, i * BLOCK, (i + 1) * BLOCK);
  writeFileSync(path, bytes);
  const opened = await BackingFile.open(path, { io });
  files.push(opened);
  return opened;
}

async function start(units = 64): Promise<FileMap> {
  store = new CountingStore(units);
  disk = await simulate(store);
  // A command that ends opens the lane.
  await disk.testUnitReady();
  return store.fileMap;
}

/** First bytes of blocks, and whether the store was asked. */
async function look(lba: number, blocks: number): Promise<[values: number[], asked: boolean]> {
  const before = store.calls;
  const data = await disk.read(lba, blocks);
  const values = Array.from({ length: blocks }, (_, i) => data[i * BLOCK] as number);
  return [values, store.calls > before];
}

const range = (from: number, count: number) => Array.from({ length: count }, (_, i) => from + i);
const unknown = (count: number) => [new Array(count).fill(0xff), true];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'tcmu-map-'));
  files = [];
});

afterEach(async () => {
  await disk?.close();
  for (const each of files) await each.close();
  rmSync(folder, { recursive: true });
});

describe('a file map', () => {
  test('refuses what it can’t keep', async () => {
    for (const [unit, units] of [
      [256, 1],
      [1000, 1],
      [2 ** 53, 1],
      [2 ** 40 + 1, 1],
      [512, 0],
      [512, 3],
      [512, 2 ** 25],
    ] as const) {
      expect(() => new FileMap({ unit, units })).toThrow(/powers of two/);
    }
    const map = await start();
    const a = await file('a', 0);
    expect(() => map.set(0, 4096, a, 100, true)).toThrow(/multiple of 512/);
    map.set(512, 4096, a, 0, true);
  });

  test('knows whole units only', async () => {
    const map = await start();
    map.set(1 * BLOCK, 10 * BLOCK, await file('a', 0), 20 * BLOCK, false);
    // Units 0 and 2 in part, unit 1 as a whole.
    expect(await look(4, 4)).toEqual([range(23, 4), false]);
    expect(await look(5, 2)).toEqual([range(24, 2), false]);
    expect(await look(3, 1)).toEqual(unknown(1));
    expect(await look(8, 1)).toEqual(unknown(1));
    expect(await look(4, 5)).toEqual(unknown(5));
    expect(await look(3, 5)).toEqual(unknown(5));
  });

  test('reads from several places of several files, in order', async () => {
    const map = await start();
    const [a, b] = [await file('a', 0), await file('b', 100)];
    map.set(0, 4 * BLOCK, a, 40 * BLOCK, false);
    map.set(4 * BLOCK, 8 * BLOCK, b, 8 * BLOCK, false);
    map.set(12 * BLOCK, 4 * BLOCK, a, 0, false);
    map.set(16 * BLOCK, 4 * BLOCK, a, 4 * BLOCK, false);
    expect(await look(2, 17)).toEqual([[...range(42, 2), ...range(108, 8), ...range(0, 7)], false]);
  });

  test('writes to several places, and only where it may', async () => {
    const map = await start();
    const [a, b] = [await file('a', 0), await file('b', 100)];
    map.set(0, 8 * BLOCK, a, 40 * BLOCK, true);
    map.set(8 * BLOCK, 4 * BLOCK, b, 0, true);
    map.set(12 * BLOCK, 4 * BLOCK, b, 4 * BLOCK, false);
    await disk.write(7, Buffer.concat([Buffer.alloc(BLOCK, 1), Buffer.alloc(BLOCK, 2)]));
    expect(store.calls).toBe(0);
    expect(readFileSync(a.path)[47 * BLOCK]).toBe(1);
    expect(readFileSync(b.path)[0]).toBe(2);
    await disk.write(11, Buffer.alloc(2 * BLOCK, 3));
    expect(store.calls).toBe(1);
    expect(readFileSync(b.path)[3 * BLOCK]).toBe(103);
    expect(await look(11, 2)).toEqual([range(103, 2), false]);
  });

  test('forgets every unit that has a part of a range', async () => {
    const map = await start();
    map.set(0, 32 * BLOCK, await file('a', 0), 0, true);
    map.forget(7 * BLOCK + 511, 2);
    expect(await look(0, 4)).toEqual([range(0, 4), false]);
    expect(await look(4, 1)).toEqual(unknown(1));
    expect(await look(11, 1)).toEqual(unknown(1));
    expect(await look(12, 4)).toEqual([range(12, 4), false]);
    // More than there are.
    map.forget(0, 2 ** 52);
    expect(await look(0, 1)).toEqual(unknown(1));
    map.set(0, 32 * BLOCK, files[0] as BackingFile, 0, true);
    expect(await look(0, 32)).toEqual([range(0, 32), false]);
    map.clear();
    expect(await look(31, 1)).toEqual(unknown(1));
  });

  test('a unit takes the place of another, and is not forgotten in its stead', async () => {
    const map = await start(8);
    const a = await file('a', 0);
    map.set(0, 4 * BLOCK, a, 0, false);
    map.set(8 * 4 * BLOCK, 4 * BLOCK, a, 4 * BLOCK, false);
    expect(await look(0, 1)).toEqual(unknown(1));
    expect(await look(32, 4)).toEqual([range(4, 4), false]);
    map.forget(0, 4 * BLOCK);
    expect(await look(32, 4)).toEqual([range(4, 4), false]);
  });

  test('takes no more than 64 pieces of a command', async () => {
    const map = await start(512);
    const a = await file('a', 0);
    for (let unit = 0; unit < 65; unit++) {
      map.set(unit * 4 * BLOCK, 4 * BLOCK, a, (unit % 2) * 8 * BLOCK, false);
    }
    expect((await look(0, 64 * 4))[1]).toBe(false);
    expect((await look(0, 64 * 4 + 1))[1]).toBe(true);
  });

  test('takes sixteen files, none that goes through the thread pool', async () => {
    const map = await start();
    const pool = await file('pool', 0, 'pool');
    map.set(0, 4 * BLOCK, pool, 0, true);
    expect(await look(0, 1)).toEqual(unknown(1));
    for (let i = 0; i < 17; i++) {
      map.set(i * 4 * BLOCK, 4 * BLOCK, await file(`f${i}`, 10 * i), 0, false);
    }
    for (let i = 0; i < 16; i++) expect(await look(4 * i, 1)).toEqual([[10 * i], false]);
    expect(await look(64, 1)).toEqual(unknown(1));
  });

  test('ends for good with any of its files', async () => {
    const map = await start();
    const [a, b] = [await file('a', 0), await file('b', 100)];
    map.set(0, 4 * BLOCK, a, 0, true);
    map.set(4 * BLOCK, 4 * BLOCK, b, 0, true);
    expect(await look(0, 1)).toEqual([[0], false]);
    await b.close();
    expect(map).toMatchObject({ readable: 0, writable: 0 });
    expect(await look(0, 1)).toEqual(unknown(1));
    map.allow(SIZE, SIZE);
    map.set(0, 4 * BLOCK, a, 0, true);
    await disk.testUnitReady();
    expect(await look(0, 1)).toEqual(unknown(1));
    expect(map).toMatchObject({ readable: 0, writable: 0 });
  });

  test('goes to the ends that are allowed', async () => {
    const map = await start();
    map.set(0, 32 * BLOCK, await file('a', 0), 0, true);
    map.allow(16 * BLOCK, 8 * BLOCK);
    await disk.testUnitReady();
    expect(await look(0, 16)).toEqual([range(0, 16), false]);
    expect(await look(15, 2)).toEqual(unknown(2));
    const { calls } = store;
    await disk.write(4, Buffer.alloc(4 * BLOCK, 1));
    expect(store.calls).toBe(calls);
    await disk.write(7, Buffer.alloc(2 * BLOCK, 1));
    expect(store.calls).toBe(calls + 1);
  });
});
