// SPDX-License-Identifier: Apache-2.0
/**
 * Random work, killed at a random request, opened again: what was flushed is there, and the disk is what
 * a prefix of the writes made of it. Every object is as it was written, and no garbage grows.
 */
import { describe, expect, it } from 'vitest';
import type { S3Disk } from '../src/s3-disk.js';
import { create, homeIn, KiB, MiB, Model, open, readAll, write } from './support/disk.js';
import { MemoryBucket, type MemoryClient } from './support/memory-objects.js';
import { randomNumbers } from './support/random.js';

const LIVES = 12;
const STEPS = 120;

/** Work until the client is dead or the steps are done. */
async function work(
  disk: S3Disk,
  client: MemoryClient,
  model: Model,
  random: () => number,
  { blockSize, indexLimit }: Kind,
): Promise<void> {
  const pick = (count: number): number => Math.floor(random() * count);
  const killed = new Promise<void>((resolve) => {
    const { onRequest } = client;
    client.onRequest = () => {
      onRequest?.();
      if (client.dead) resolve();
    };
  });
  for (let step = 0; step < STEPS && !client.dead; step++) {
    const blocks = model.size / blockSize;
    const first = pick(blocks);
    const count = Math.min(1 + pick(random() < 0.2 ? 64 : 4), blocks - first);
    const position = first * blockSize;
    const length = count * blockSize;
    const what = random();
    let action: unknown;
    if (what < 0.7) {
      const bytes = Buffer.alloc(Math.min(length, 32 * KiB));
      for (let i = 0; i < bytes.length; i += 4) bytes.writeUInt32LE(pick(2 ** 32), i);
      model.note({ kind: 'data', position, bytes });
      action = write(disk, position, bytes);
    } else if (what < 0.8) {
      model.note({ kind: 'zero', position, length });
      action = disk.unmap(position, length);
    } else if (what < 0.82 && indexLimit === undefined) {
      const size = MiB / 2 + pick(128) * 4 * KiB;
      model.note({ kind: 'size', size });
      const certain = model.changes;
      action = disk.resize(size).then(() => model.certain(certain));
    } else if (what < 0.86 && !client.dead) {
      action = disk.checkpoint();
    } else if (what < 0.95) {
      const certain = model.changes;
      // Nobody waits for it: flushes and writes run side by side.
      disk.flush().then(
        () => model.certain(certain),
        () => {},
      );
    } else {
      const found = readAll(disk, position, length);
      action = found.then((bytes) => {
        expect(bytes.equals(model.now().subarray(position, position + length))).toBe(true);
      });
    }
    await Promise.race([action, killed]);
    if (random() < 0.3) await new Promise((resolve) => setImmediate(resolve));
  }
}

interface Kind {
  blockSize: number;
  compression?: 'deflate';
  key?: () => Buffer;
  indexLimit?: number;
  manifestChunks?: number;
}

const KINDS: [string, Kind][] = [
  ['blocks of 4096 bytes', { blockSize: 4096 }],
  ['blocks of 512 bytes', { blockSize: 512 }],
  ['compressed', { blockSize: 4096, compression: 'deflate' }],
  // Whose discards here are a piece each, as they are with any limit of use.
  ['with little memory for its index', { blockSize: 512, indexLimit: 4 * KiB }],
  // What a large disk does: the log begins later with the last one only.
  ['with many manifests a checkpoint', { blockSize: 512, manifestChunks: 1 }],
  ['encrypted', { blockSize: 512, key: () => Buffer.alloc(32, 7) }],
];

describe.each(KINDS)('a disk, %s', (_, options) => {
  const seeds = Array.from({ length: 8 }, (_, i) => i + 1);

  it.each(seeds)('is a prefix of its writes after every crash (seed %i)', async (seed) => {
    const random = randomNumbers(seed * 7919);
    const bucket = new MemoryBucket();
    await create(bucket.connect(), options);
    const model = new Model(MiB);
    for (let life = 0; life < LIVES; life++) {
      const client = bucket.connect(seed * 1000 + life);
      const { key, indexLimit, manifestChunks } = options;
      const disk = await open(client, { key, indexLimit, manifestChunks });
      const found = await readAll(disk);
      const survived = model.recover(found);
      if (survived === undefined) expect.fail(`life ${life}: no state that it may be in`);
      let left = 1 + Math.floor(random() * 150);
      client.onRequest = () => {
        if (--left === 0) client.kill(random());
      };
      await work(disk, client, model, random, options);
      client.kill(random());
      // What was under way gets through, or doesn't.
      for (let i = 0; i < 8; i++) await new Promise((resolve) => setImmediate(resolve));
    }
    const disk = await open(bucket.connect(), { key: options.key });
    expect(model.recover(await readAll(disk))).toBeDefined();
    await disk.checkpoint();
    const { deleted } = await disk.collect();
    expect(deleted).toBeGreaterThanOrEqual(0);
    expect(model.recover(await readAll(disk))).toBe(0);
    await disk.close();
    const again = await open(bucket.connect(), { key: options.key, mode: 'follow' });
    expect(model.recover(await readAll(again))).toBe(0);
    await again.close();
  });
});

describe('a crash between a manifest and the record that declares it valid', () => {
  it('leaves it unused: it may hold a later write and lack an earlier one', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const client = bucket.connect();
    const disk = await open(client);
    const model = new Model(MiB);
    const put = async (chunk: number, value: number): Promise<void> => {
      const bytes = Buffer.alloc(4 * KiB, value);
      model.note({ kind: 'data', position: chunk * 16 * KiB, bytes });
      await write(disk, chunk * 16 * KiB, bytes);
    };
    for (let chunk = 0; chunk < 8; chunk++) await put(chunk, chunk + 1);
    await disk.flush();
    model.certain(model.changes);
    // The first four are put together by now, the last is not; and the log ends here.
    let begun = false;
    bucket.fate = (operation, key) => {
      if (operation !== 'put') return 'good';
      if (key.includes('/c/') && !begun) {
        begun = true;
        void put(0, 100);
        void put(7, 200);
      }
      return begun && key.includes('/s/') ? 'hang' : 'good';
    };
    disk.checkpoint().catch(() => {});
    await expect.poll(() => bucket.keys(`${homeIn(bucket)}/m/`).length).toBe(1);
    client.kill(0);
    bucket.fate = () => 'good';
    const again = await open(bucket.connect());
    expect(model.recover(await readAll(again))).toBe(8);
    await again.close();
  });
});
