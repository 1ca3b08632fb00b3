// SPDX-License-Identifier: Apache-2.0
/** Memory that is used again: a read uses its own no more when it is over, and what came from the bucket stays until it was used. */
import { MemoryDataIn } from 'tcmu/store';
import { expect, it } from 'vitest';
import { create, failure, KiB, open, readAll, write } from './support/disk.js';
import { type Fate, MemoryBucket } from './support/memory-objects.js';

it.each<[what: string, isMapKnown: boolean, at: number]>([
  ['of two chunks, with their map in memory', true, 12 * KiB],
  ['of two parts of a chunk, with a map to be loaded', false, 0],
])('a read %s, waits for all of its requests when one fails', async (_, isMapKnown, at) => {
  const bucket = new MemoryBucket();
  await create(bucket.connect());
  const writer = await open(bucket.connect());
  // Frame 1 is zeros: what is before and behind it comes by two requests.
  await write(writer, 0, Buffer.alloc(4 * KiB, 1));
  await write(writer, 8 * KiB, Buffer.alloc(16 * KiB, 2));
  await write(writer, 64 * KiB, Buffer.alloc(4 * KiB, 3));
  await writer.checkpoint();
  await writer.close();
  const disk = await open(bucket.connect(1, 1), { mode: 'follow', readAhead: false });
  if (isMapKnown) await disk.read(64 * KiB, new MemoryDataIn(Buffer.alloc(4 * KiB)));
  let goOn = () => {};
  const gate = new Promise<void>((resolve) => (goOn = resolve));
  let asked = 0;
  bucket.fate = async (operation, key): Promise<Fate> => {
    if (operation !== 'get' || !key.includes('/c/')) return 'good';
    if (asked++ === 0) return { before: 'bad-request' };
    await gate;
    return 'good';
  };
  const bytes = Buffer.alloc(12 * KiB, 0xee);
  let isSettled = false;
  const reading = failure(() => disk.read(at, new MemoryDataIn(bytes))).then((error) => {
    isSettled = true;
    bytes.fill(0xdd);
    return error;
  });
  await expect.poll(() => asked).toBe(2);
  for (let i = 0; i < 50; i++) await new Promise((resolve) => setImmediate(resolve));
  expect(isSettled).toBe(false);
  goOn();
  await reading;
  for (let i = 0; i < 50; i++) await new Promise((resolve) => setImmediate(resolve));
  expect(bytes.every((byte) => byte === 0xdd)).toBe(true);
  await disk.close();
});

/** So much cache that memory for answers is kept for the next ones. */
const ROOMY = { cacheSize: 4096 * KiB, readAhead: false };

it('a checkpoint keeps what it has read of a chunk while it reads on', async () => {
  const bucket = new MemoryBucket();
  await create(bucket.connect());
  const disk = await open(bucket.connect(), ROOMY);
  const expected = Buffer.alloc(16 * KiB);
  const put = async (frame: number, value: number) => {
    expected.fill(value, frame * 4 * KiB, (frame + 1) * 4 * KiB);
    await write(disk, frame * 4 * KiB, Buffer.alloc(4 * KiB, value));
  };
  for (const frame of [0, 1, 2, 3]) await put(frame, 1 + frame);
  await disk.checkpoint();
  // What is left of the old version comes by two requests of one size.
  for (const frame of [1, 3]) await put(frame, 10 + frame);
  await disk.checkpoint();
  const reader = await open(bucket.connect(), { mode: 'follow' });
  expect((await readAll(reader, 0, 16 * KiB)).equals(expected)).toBe(true);
  await reader.close();
  await disk.close();
});

it('reads at the same time have memory of their own, and use it again after each other', async () => {
  const bucket = new MemoryBucket();
  await create(bucket.connect());
  const writer = await open(bucket.connect());
  for (let chunk = 0; chunk < 64; chunk++) {
    await write(writer, chunk * 16 * KiB, Buffer.alloc(4 * KiB, 1 + chunk));
  }
  await writer.checkpoint();
  await writer.close();
  const disk = await open(bucket.connect(3), { mode: 'follow', ...ROOMY });
  for (let first = 0; first < 64; first += 16) {
    const chunks = Array.from({ length: 16 }, (_, i) => first + i);
    const read = await Promise.all(chunks.map((chunk) => readAll(disk, chunk * 16 * KiB, 4 * KiB)));
    for (const [i, bytes] of read.entries()) {
      expect(bytes.equals(Buffer.alloc(4 * KiB, 1 + first + i))).toBe(true);
    }
  }
  await disk.close();
});

it('a frame of an old version that comes late is not kept', async () => {
  const bucket = new MemoryBucket();
  await create(bucket.connect());
  const writer = await open(bucket.connect());
  await write(writer, 0, Buffer.alloc(4 * KiB, 1));
  await writer.checkpoint();
  await writer.close();
  const disk = await open(bucket.connect(), ROOMY);
  let goOn = () => {};
  const gate = new Promise<void>((resolve) => (goOn = resolve));
  let isHeld = false;
  bucket.after = async (operation, key) => {
    if (isHeld || operation !== 'get' || !key.includes('/c/')) return;
    isHeld = true;
    await gate;
  };
  const early = readAll(disk, 0, 4 * KiB);
  await expect.poll(() => isHeld).toBe(true);
  await write(disk, 0, Buffer.alloc(4 * KiB, 2));
  await disk.checkpoint();
  goOn();
  await early;
  expect((await readAll(disk, 0, 4 * KiB)).equals(Buffer.alloc(4 * KiB, 2))).toBe(true);
  await disk.close();
});

it('a frame in the cache goes with the version it is of', async () => {
  const bucket = new MemoryBucket();
  await create(bucket.connect());
  const writer = await open(bucket.connect());
  await write(writer, 0, Buffer.alloc(4 * KiB, 1));
  await writer.checkpoint();
  await writer.close();
  const disk = await open(bucket.connect(), ROOMY);
  expect((await readAll(disk, 0, 4 * KiB))[0]).toBe(1);
  await write(disk, 0, Buffer.alloc(4 * KiB, 2));
  await disk.checkpoint();
  expect((await readAll(disk, 0, 4 * KiB))[0]).toBe(2);
  await disk.close();
});
