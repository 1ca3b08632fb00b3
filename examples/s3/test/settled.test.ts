// SPDX-License-Identifier: Apache-2.0
/** A read that fails uses its buffer no more: the memory is another command's by then. */
import { MemoryDataIn } from 'tcmu/store';
import { expect, it } from 'vitest';
import { create, failure, KiB, open, write } from './support/disk.js';
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
