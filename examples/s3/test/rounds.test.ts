// SPDX-License-Identifier: Apache-2.0
/** A checkpoint of so many chunks that it takes several manifests, and what comes between two of them. */
import { describe, expect, it } from 'vitest';
import type { S3Disk } from '../src/s3-disk.js';
import { create, homeIn, KiB, MiB, Model, open, readAll, write } from './support/disk.js';
import { type Fate, MemoryBucket, type MemoryClient } from './support/memory-objects.js';
import { randomNumbers } from './support/random.js';

const CHUNK = 4 * KiB;
const SIZE = 2 * MiB;
const CHUNKS = SIZE / CHUNK;
/** Nothing of the log stays in memory. */
const LIMITS = { cacheSize: 0, logLimit: 16 * MiB, manifestChunks: 32 };

async function put(disk: S3Disk, model: Model, position: number, bytes: Buffer): Promise<void> {
  model.note({ kind: 'data', position, bytes });
  await write(disk, position, bytes);
}

async function discard(disk: S3Disk, model: Model, position: number, length: number) {
  model.note({ kind: 'zero', position, length });
  await disk.unmap(position, length);
}

/** Every chunk is in the log, here and there in it, some in several parts of it. */
async function fill(disk: S3Disk, model: Model, random: () => number): Promise<void> {
  for (let i = 0; i < CHUNKS; i++) {
    const chunk = (i * 197) % CHUNKS;
    await put(disk, model, chunk * CHUNK, Buffer.alloc(CHUNK, 1 + (i % 255)));
    const blocks = 1 + Math.floor(random() * 12);
    const block = Math.floor(random() * (SIZE / 512 - blocks));
    if (i % 9 === 0) await discard(disk, model, block * 512, blocks * 512);
    else if (i % 3 === 0) {
      await put(disk, model, block * 512, Buffer.alloc(blocks * 512, 1 + ((i * 7) % 255)));
    }
  }
  await disk.flush();
  model.certain(model.changes);
}

async function filled(seed: number): Promise<{ bucket: MemoryBucket; model: Model }> {
  const bucket = new MemoryBucket();
  await create(bucket.connect(), { size: SIZE, blockSize: 512, chunkSize: CHUNK });
  const model = new Model(SIZE);
  const disk = await open(bucket.connect(), LIMITS);
  await fill(disk, model, randomNumbers(seed));
  await disk.close();
  return { bucket, model };
}

/** All that is done between two manifests changes something that is in chunks already, and something that isn't. */
async function change(disk: S3Disk, model: Model, random: () => number): Promise<void> {
  for (let i = 0; i < 40; i++) {
    const blocks = 1 + Math.floor(random() * 12);
    const position = Math.floor(random() * (model.size / 512 - blocks)) * 512;
    if (i % 5 === 0) await discard(disk, model, position, blocks * 512);
    else await put(disk, model, position, Buffer.alloc(blocks * 512, Math.ceil(random() * 255)));
  }
}

/** Calls `act` each time that a manifest is put which leaves the log as long as it is. */
function between(bucket: MemoryBucket, act: (round: number) => Promise<void>): () => number {
  const manifests = `${homeIn(bucket)}/m/`;
  let rounds = 0;
  bucket.fate = async (operation, key): Promise<Fate> => {
    if (operation === 'put' && key.startsWith(manifests)) await act(++rounds);
    return 'good';
  };
  return () => rounds;
}

describe('a checkpoint of several manifests', () => {
  it('loses nothing at whatever request its writer dies', async () => {
    const { bucket: origin, model } = await filled(1);
    const copyOf = (bucket: MemoryBucket): MemoryBucket => {
      const copy = new MemoryBucket();
      for (const [key, { body }] of bucket.objects) copy.put(key, body);
      return copy;
    };
    const expected = model.now();
    const random = randomNumbers(2);
    let midway = 0;
    for (let i = 0; i < 14; i++) {
      const bucket = copyOf(origin);
      const client: MemoryClient = bucket.connect(i);
      const disk = await open(client, LIMITS);
      const { cut } = disk.manifest;
      let left = 100 + Math.floor(random() * 1500);
      const died = new Promise<void>((resolve) => {
        client.onRequest = () => {
          if (--left > 0) return;
          client.kill(random());
          resolve();
        };
      });
      await Promise.race([disk.checkpoint(), died]);
      const again = await open(bucket.connect(), LIMITS);
      if (again.manifest.n > 0 && again.manifest.cut === cut) midway++;
      expect((await readAll(again)).equals(expected)).toBe(true);
      await again.checkpoint();
      await again.collect();
      expect((await readAll(again)).equals(expected)).toBe(true);
      await again.close();
    }
    expect(midway).toBeGreaterThan(2);
  });

  it('takes what is changed between them, for its readers, snapshots and successors', async () => {
    const { bucket, model } = await filled(3);
    model.recover(model.now());
    const random = randomNumbers(4);
    const disk = await open(bucket.connect(), LIMITS);
    const follower = await open(bucket.connect(), { ...LIMITS, mode: 'follow' });
    const { cut } = disk.manifest;
    const kept: Buffer[] = [];
    const snapshots: Promise<number>[] = [];
    const rounds = between(bucket, async (round) => {
      await change(disk, model, random);
      expect((await readAll(disk)).equals(model.now())).toBe(true);
      await follower.refresh();
      expect(model.holds(await readAll(follower))).toBe(true);
      if (round > 2) return;
      // When its turn comes, between this manifest and the next.
      snapshots.push(disk.snapshot(`s${round - 1}`).then(({ from }) => from));
      // Shorter, and as long as before: what was cut off stays away.
      for (const size of [SIZE / 2 + CHUNK / 2, SIZE]) {
        model.note({ kind: 'size', size });
        await disk.resize(size);
      }
    });
    await disk.checkpoint();
    const cuts = await Promise.all(snapshots);
    expect(cuts).toEqual([cut, cut]);
    for (const i of snapshots.keys()) {
      const pinned = await open(bucket.connect(), { ...LIMITS, snapshot: `s${i}` });
      const bytes = await readAll(pinned);
      expect(model.holds(bytes)).toBe(true);
      kept.push(bytes);
      await pinned.close();
    }
    expect(rounds()).toBeGreaterThan(3);
    expect(disk.manifest.cut).toBeGreaterThan(cut);
    bucket.fate = () => 'good';
    await change(disk, model, random);
    await disk.flush();
    const successor = await open(bucket.connect(), LIMITS);
    expect((await readAll(successor)).equals(model.now())).toBe(true);
    await successor.checkpoint();
    await successor.collect();
    expect((await readAll(successor)).equals(model.now())).toBe(true);
    for (const [i, bytes] of kept.entries()) {
      const pinned = await open(bucket.connect(), { ...LIMITS, snapshot: `s${i}` });
      expect((await readAll(pinned)).equals(bytes)).toBe(true);
      await pinned.close();
    }
    await Promise.all([follower.close(), disk.close(), successor.close()]);
  });
});

describe('a checkpoint whose manifest is awaited', () => {
  /** A disk whose checkpoint is one manifest, and has put 20 chunks when `act` is called; counts them. */
  async function begun(seed: number, act: (disk: S3Disk, bucket: MemoryBucket) => Promise<void>) {
    const { bucket, model } = await filled(seed);
    const disk = await open(bucket.connect(), { ...LIMITS, manifestChunks: CHUNKS });
    const chunks = `${homeIn(bucket)}/c/`;
    let count = 0;
    let acted: Promise<void> | undefined;
    bucket.fate = async (operation, key): Promise<Fate> => {
      if (operation !== 'put' || !key.startsWith(chunks) || ++count < 20) return 'good';
      acted ??= act(disk, bucket);
      await acted;
      return 'good';
    };
    const checkpoint = disk.checkpoint();
    checkpoint.catch(() => {});
    return { bucket, model, disk, checkpoint, count: () => count };
  }

  it('makes way for a snapshot, and goes on behind it', async () => {
    let snapshot: Promise<number> | undefined;
    const { model, disk, checkpoint, count, bucket } = await begun(5, async (writer) => {
      snapshot = writer.snapshot('s').then(() => count());
    });
    await checkpoint;
    expect(await snapshot).toBeLessThan(40);
    // Each chunk once, however often it was stopped.
    expect(count()).toBeGreaterThan(CHUNKS * 0.9);
    expect(count()).toBeLessThanOrEqual(CHUNKS);
    expect((await readAll(disk)).equals(model.now())).toBe(true);
    await disk.close();
    for (const options of [LIMITS, { ...LIMITS, snapshot: 's' }]) {
      const again = await open(bucket.connect(), options);
      expect((await readAll(again)).equals(model.now())).toBe(true);
      await again.close();
    }
  });

  it('makes way for the end, and what it has done stays done', async () => {
    let closed: Promise<void> | undefined;
    const { model, checkpoint, count, bucket } = await begun(6, async (writer) => {
      closed = writer.close();
    });
    await expect(checkpoint).rejects.toMatchObject({ failure: 'closed' });
    await closed;
    expect(count()).toBeLessThan(40);
    const again = await open(bucket.connect(), LIMITS);
    expect(again.manifest.n).toBeGreaterThan(0);
    expect((await readAll(again)).equals(model.now())).toBe(true);
    await again.checkpoint();
    expect((await readAll(again)).equals(model.now())).toBe(true);
    await again.close();
  });

  it('puts nothing more once its writer knows that it was replaced', async () => {
    let known = 0;
    const { model, disk, checkpoint, count, bucket } = await begun(7, async (writer, there) => {
      const successor = await open(there.connect(), LIMITS);
      await successor.close();
      await expect(
        write(writer, 0, Buffer.alloc(512, 1)).then(() => writer.flush()),
      ).rejects.toThrow();
      known = count();
    });
    await expect(checkpoint).rejects.toMatchObject({ failure: 'fenced' });
    // Those on their way.
    expect(count()).toBeLessThanOrEqual(known + 3);
    expect(known).toBeLessThan(30);
    await disk.close();
    const again = await open(bucket.connect(), LIMITS);
    expect((await readAll(again)).equals(model.now())).toBe(true);
    await again.close();
  });
});
