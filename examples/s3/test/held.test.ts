// SPDX-License-Identifier: Apache-2.0
/** Memory of segments is used again, but not while a checkpoint makes chunks of what is in it. */
import { expect, it } from 'vitest';
import { create, KiB, MiB, open, readAll, write } from './support/disk.js';
import { type Fate, MemoryBucket } from './support/memory-objects.js';

it('a checkpoint makes chunks of what was written, however much is written meanwhile', async () => {
  const bucket = new MemoryBucket();
  await create(bucket.connect(), { size: 4 * MiB });
  const disk = await open(bucket.connect(), { cacheSize: MiB, logLimit: 64 * MiB });
  const expected = Buffer.alloc(4 * MiB);
  const put = async (position: number, value: number) => {
    expected.fill(value, position, position + 16 * KiB);
    await write(disk, position, Buffer.alloc(16 * KiB, value));
  };
  for (let i = 0; i < 16; i++) await put(i * 16 * KiB, 1 + i);
  await disk.flush();
  let isReached = () => {};
  const reached = new Promise<void>((resolve) => (isReached = resolve));
  let goOn = () => {};
  const gate = new Promise<void>((resolve) => (goOn = resolve));
  bucket.fate = async (operation, key): Promise<Fate> => {
    if (operation === 'put' && key.includes('/c/')) {
      isReached();
      await gate;
    }
    return 'good';
  };
  const checkpoint = disk.checkpoint();
  await reached;
  // More than stays in memory of what is in the bucket, and than may be dirty: every buffer's turn comes.
  for (let i = 16; i < 128; i++) await put(i * 16 * KiB, 100 + i);
  await disk.flush();
  goOn();
  await checkpoint;
  const reader = await open(bucket.connect(), { mode: 'follow' });
  expect((await readAll(reader)).equals(expected)).toBe(true);
  await reader.close();
  await disk.close();
});
