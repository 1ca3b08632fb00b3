// SPDX-License-Identifier: Apache-2.0
/** Memory of segments is used again, but not while a checkpoint makes chunks of what is in it. */
import { expect, it } from 'vitest';
import { create, homeIn, KiB, MiB, open, readAll, write } from './support/disk.js';
import { type Fate, MemoryBucket } from './support/memory-objects.js';
import { randomNumbers } from './support/random.js';

it.each([
  ['in memory', MiB],
  ['loaded again', 64 * KiB],
])(
  'a checkpoint makes chunks of what is %s, however much is written meanwhile',
  async (_what, cacheSize) => {
    const bucket = new MemoryBucket();
    await create(bucket.connect(), { size: 4 * MiB });
    const disk = await open(bucket.connect(), { cacheSize, logLimit: 64 * MiB });
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
  },
);

it('what is loaded again takes the memory of what was written lately', async () => {
  const bucket = new MemoryBucket();
  await create(bucket.connect(), { size: 4 * MiB });
  const disk = await open(bucket.connect(), { cacheSize: MiB, logLimit: MiB });
  const during: number[] = [];
  bucket.fate = async (operation, key): Promise<Fate> => {
    if (operation === 'put' && key.includes('/c/')) {
      const { logBytesInMemory, checkpointBytes } = disk.statistics();
      during.push(logBytesInMemory + checkpointBytes);
    }
    return 'good';
  };
  for (let i = 0; disk.statistics().checkpoints === 0; i++) {
    await write(disk, (i % 128) * 32 * KiB, Buffer.alloc(32 * KiB, 1 + (i % 255)));
    if (i % 4 === 3) await disk.flush();
  }
  // All that may be dirty, half of the cache, four chunks, and a segment that is begun.
  expect(Math.max(...during)).toBeLessThanOrEqual(128 * KiB + MiB / 2 + 4 * 16 * KiB + 32 * KiB);
  expect(Math.min(...during)).toBeGreaterThan(MiB / 2 - 32 * KiB);
  await disk.close();
});

it('a checkpoint of all that was written writes each chunk once, however scattered the log', async () => {
  const bucket = new MemoryBucket();
  const size = 40 * MiB;
  const piece = 256 * KiB;
  await create(bucket.connect(), { size, chunkSize: MiB, frameSize: 64 * KiB });
  const limits = { segmentSize: MiB, dirtyLimit: 4 * MiB, cacheSize: MiB, logLimit: 64 * MiB };
  const disk = await open(bucket.connect(), limits);
  // Every chunk in every part of the log, of which most has to be loaded again.
  for (let within = 0; within < MiB; within += piece) {
    for (let at = within; at < size; at += MiB) {
      await write(disk, at, Buffer.alloc(piece, 1 + at / MiB));
    }
  }
  await disk.checkpoint();
  expect(disk.statistics().chunksWritten).toBe(40);
  for (let at = 0; at < size; at += MiB + piece) {
    expect((await readAll(disk, at, 512)).every((byte) => byte === Math.floor(1 + at / MiB))).toBe(
      true,
    );
  }
  await disk.close();
});

it('an automatic checkpoint of a log that is not in memory writes each chunk once, and takes no more memory for that', async () => {
  const bucket = new MemoryBucket();
  const size = 48 * MiB;
  const piece = 64 * KiB;
  const logLimit = 80 * MiB;
  await create(bucket.connect(), { size, chunkSize: MiB, frameSize: 64 * KiB });
  const limits = { segmentSize: MiB, dirtyLimit: 4 * MiB, cacheSize: MiB, logLimit };
  const disk = await open(bucket.connect(), limits);
  const home = homeIn(bucket);
  const written = new Map<string, number>();
  let most = 0;
  bucket.fate = async (operation, key): Promise<Fate> => {
    const { logBytesInMemory, checkpointBytes, dirtyBytes } = disk.statistics();
    most = Math.max(most, logBytesInMemory + checkpointBytes - dirtyBytes);
    const chunk = key.startsWith(`${home}/c/`) ? key.slice(home.length).split('.')[0] : undefined;
    const isFirst = disk.statistics().checkpoints === 0;
    if (operation === 'put' && chunk && isFirst) written.set(chunk, (written.get(chunk) ?? 0) + 1);
    return 'good';
  };
  const random = randomNumbers(5);
  const expected = new Uint8Array(size / piece);
  // Every chunk is in every part of the log, and goes on to be written meanwhile.
  for (let i = 0; disk.statistics().checkpoints === 0; i++) {
    const at = Math.floor(random() * expected.length);
    expected[at] = 1 + (i % 255);
    await write(disk, at * piece, Buffer.alloc(piece, 1 + (i % 255)));
  }
  // Of segments of a MiB, half of the log at least.
  expect(disk.manifest.cut).toBeGreaterThan(logLimit / 2 / MiB);
  // The others had so little in the log that it was copied to its end.
  expect(written.size).toBeGreaterThan((size / MiB) * 0.9);
  expect(Math.max(...written.values())).toBe(1);
  // 16 MiB of what is loaded, a third more where all of a frame is kept, half of the cache, chunks.
  expect(most).toBeLessThan((16 + 1 + 4 + 4) * MiB);
  for (const [at, value] of expected.entries()) {
    expect((await readAll(disk, at * piece, piece)).every((byte) => byte === value)).toBe(true);
  }
  await disk.close();
  const reader = await open(bucket.connect(), { ...limits, mode: 'follow' });
  const all = await readAll(reader);
  expect(expected.every((value, at) => all[at * piece] === value)).toBe(true);
  await reader.close();
});
