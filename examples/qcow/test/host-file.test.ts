// SPDX-License-Identifier: Apache-2.0
import { join } from 'node:path';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import { describe, expect, test } from 'vitest';
import { DiskFile } from '../src/host/disk-file.js';
import { MemoryFile } from '../src/host/memory-file.js';
import { scratch } from './util.js';

const dir = scratch();

describe.each([
  ['memory', async () => new MemoryFile()],
  ['disk', async () => DiskFile.open(join(dir, 'image'), { create: true })],
])('host file in %s', (_name, open) => {
  test('keeps, zeroes, cuts and grows', async () => {
    const file = await open();
    await file.write(new Uint8Array(8192).fill(1), 4096);
    await file.writeData(new MemoryDataOut(new Uint8Array(512).fill(2)), 12288);
    expect(file.size()).toBe(12800);
    await file.writeZeroes(4096, 512);
    await file.flush();
    const data = new MemoryDataIn(new Uint8Array(16384).fill(9));
    await file.readData(data, 0);
    const expected = new Uint8Array(16384).fill(1, 4608, 12288).fill(2, 12288, 12800);
    expect(data.bytes).toEqual(expected);
    const again = new Uint8Array(16384).fill(9);
    await file.read(again, 0);
    expect(again).toEqual(expected);
    await file.discard(8192, 4096);
    await file.truncate(8192);
    await file.truncate(16384);
    await file.read(again, 0);
    expect(again).toEqual(expected.fill(0, 8192));
    expect(await file.nextData(1 << 20)).toBeUndefined();
    await file.close();
  });
});
