// SPDX-License-Identifier: Apache-2.0
/** Two writers on one disk: the store decides, and the older one is out. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { checkDisk, readingParts } from '../src/engine/admin.js';
import { BlobCodec, BlobKind } from '../src/engine/blob.js';
import { WINDOW } from '../src/engine/log-writer.js';
import { segmentName, slotOf } from '../src/engine/names.js';
import { FENCE_EPOCH } from '../src/engine/segment.js';
import type { S3Disk } from '../src/s3-disk.js';
import {
  causeOf,
  create,
  failure,
  homeIn,
  KiB,
  MiB,
  Model,
  open,
  PREFIX,
  readAll,
  requestsOf,
  write,
} from './support/disk.js';
import { type Fate, MemoryBucket } from './support/memory-objects.js';
import { randomNumbers } from './support/random.js';

const block = (value: number): Buffer => Buffer.alloc(4 * KiB, value);

/** Writes numbers to the first block, each flushed, as fast as it can, until it can't; tells which were. */
function hammer(disk: S3Disk, from = 0): { readonly flushed: number; ended: Promise<void> } {
  const state = { flushed: from, ended: Promise.resolve() };
  state.ended = (async () => {
    for (let value = from + 1; ; value++) {
      const bytes = block(1);
      bytes.writeUInt32LE(value);
      try {
        await write(disk, 0, bytes, true);
      } catch {
        return;
      }
      state.flushed = value;
    }
  })();
  return state;
}

const numberIn = async (disk: S3Disk): Promise<number> =>
  (await readAll(disk, 0, 4096)).readUInt32LE();

const segments = (bucket: MemoryBucket): string[] => bucket.keys(`${homeIn(bucket)}/s/`);

async function expectSound(bucket: MemoryBucket): Promise<void> {
  const parts = await readingParts(requestsOf(bucket.connect()), PREFIX, undefined);
  expect((await checkDisk(parts)).problems).toEqual([]);
}

/** Somebody loses a claim to `first`, puts up a fence, and dies. @returns the fence's key */
async function deadTakersFence(
  bucket: MemoryBucket,
  first: S3Disk,
  win = (): Promise<void> => write(first, 0, block(50), true),
): Promise<string> {
  const taker = bucket.connect(77);
  let step: 'claim' | 'losing' | 'fence' | 'done' = 'claim';
  let fence = '';
  bucket.fate = async (operation, key): Promise<Fate> => {
    if (operation !== 'put' || !key.includes('/s/')) return 'good';
    if (step === 'claim') {
      step = 'losing';
      await win();
      step = 'fence';
    } else if (step === 'fence') {
      step = 'done';
      fence = key;
    }
    return 'good';
  };
  taker.onRequest = () => {
    if (bucket.objects.has(fence)) taker.kill(0);
  };
  open(taker).catch(() => {});
  await expect.poll(() => taker.dead).toBe(true);
  bucket.fate = () => 'good';
  return fence;
}

async function bucketWithDisk(): Promise<MemoryBucket> {
  const bucket = new MemoryBucket();
  await create(bucket.connect());
  return bucket;
}

describe('a second writer', () => {
  it('ends the first one’s flushes and writes, and sees only what was flushed', async () => {
    const bucket = await bucketWithDisk();
    const first = await open(bucket.connect(1));
    await write(first, 0, block(1), true);
    await write(first, 4096, block(2));
    const second = await open(bucket.connect(2));
    expect(second.epoch).toBe(2);
    const seen = await readAll(second, 0, 8192);
    expect(seen.equals(Buffer.concat([block(1), block(0)]))).toBe(true);
    await write(second, 0, block(3), true);
    expect(await causeOf(() => first.flush())).toBe('ERR_TCMU_S3_FENCED');
    expect(await causeOf(() => write(first, 0, block(4)))).toBe('ERR_TCMU_S3_FENCED');
    expect(await causeOf(() => first.unmap(0, 4096))).toBe('ERR_TCMU_S3_FENCED');
    expect(await causeOf(() => first.resize(2 * MiB))).toBe('ERR_TCMU_S3_FENCED');
    expect(await failure(() => first.flush())).toMatchObject({ key: 2, asc: 4, ascq: 3 });
    await first.close();
    await second.close();
    const third = await open(bucket.connect(3));
    expect((await readAll(third, 0, 4096)).equals(block(3))).toBe(true);
    await third.close();
  });

  it('ends the first one’s flushes at once, also those that have nothing to send', async () => {
    const bucket = await bucketWithDisk();
    const first = await open(bucket.connect(1));
    await first.flush();
    await write(first, 0, block(1), true);
    await first.flush();
    const second = await open(bucket.connect(2));
    const flushes = await Promise.allSettled([first.flush(), first.flush(), first.flush()]);
    expect(flushes.map(({ status }) => status)).toEqual(Array(3).fill('rejected'));
    expect(await causeOf(() => write(first, 0, block(2)))).toBe('ERR_TCMU_S3_FENCED');
    await first.close();
    await second.close();
  });

  it('ends a flush whose data had arrived before, and whose answer came after', async () => {
    const bucket = await bucketWithDisk();
    const first = await open(bucket.connect(1));
    let answer = (): void => {};
    const held = new Promise<void>((resolve) => {
      answer = resolve;
    });
    let arrived = false;
    let earlier: Promise<unknown> | undefined;
    bucket.after = async (operation, key) => {
      if (operation === 'get') await earlier;
      if (arrived || operation !== 'put' || !key.includes('/s/')) return;
      arrived = true;
      await held;
    };
    const early = write(first, 0, block(1), true);
    await expect.poll(() => arrived).toBe(true);
    const second = await open(bucket.connect(2));
    expect((await readAll(second, 0, 4096)).equals(block(1))).toBe(true);
    // What the look finds comes after the answer: else it ends the earlier one too.
    earlier = early;
    const late = causeOf(() => first.flush());
    answer();
    // It began before the takeover, and what it promised is so.
    await early;
    expect(await late).toBe('ERR_TCMU_S3_FENCED');
    await first.close();
    await second.close();
  });

  it('ends every write at once that has to be durable', async () => {
    const bucket = await bucketWithDisk();
    const first = await open(bucket.connect(1), { writeCache: false });
    await write(first, 0, block(1));
    const second = await open(bucket.connect(2));
    expect(await causeOf(() => write(first, 0, block(2)))).toBe('ERR_TCMU_S3_FENCED');
    expect((await readAll(second, 0, 4096)).equals(block(1))).toBe(true);
    await first.close();
    await second.close();
  });

  it('is asked for once by flushes at the same time', async () => {
    const bucket = await bucketWithDisk();
    const disk = await open(bucket.connect(1));
    const before = disk.statistics().gets;
    await Promise.all(Array.from({ length: 20 }, () => disk.flush()));
    // The first look is under way already when the others come.
    expect(disk.statistics().gets - before).toBe(2);
    await disk.close();
  });

  it('is noticed by a writer that has nothing to write', async () => {
    const bucket = await bucketWithDisk();
    const first = await open(bucket.connect(1), { watchMs: 1000 });
    const second = await open(bucket.connect(2));
    await expect.poll(() => first.failure?.code).toBe('ERR_TCMU_S3_FENCED');
    await second.close();
    await first.close();
  });

  it('does not lose its objects to the first one’s checkpoints and collections', async () => {
    const bucket = await bucketWithDisk();
    const first = await open(bucket.connect(1));
    for (let i = 0; i < 16; i++) await write(first, i * 16 * KiB, block(i + 1));
    await first.checkpoint();
    const second = await open(bucket.connect(2));
    const before = await readAll(second);
    await write(second, 0, block(99));
    await second.checkpoint();
    await write(first, 32 * KiB, block(77));
    expect(await causeOf(() => first.checkpoint())).toBe('ERR_TCMU_S3_FENCED');
    expect(await causeOf(() => first.collect())).toBe('ERR_TCMU_S3_FENCED');
    block(99).copy(before);
    expect((await readAll(second)).equals(before)).toBe(true);
    await second.close({ discard: true });
    const third = await open(bucket.connect(3));
    expect((await readAll(third)).equals(before)).toBe(true);
    await third.close();
    await first.close();
  });

  it('is not deceived by a log that moved on, and was collected, while it made up its mind', async () => {
    const bucket = await bucketWithDisk();
    const first = await open(bucket.connect(1));
    await write(first, 0, block(1), true);
    let late = true;
    bucket.fate = async (operation, key): Promise<Fate> => {
      if (!late || operation !== 'put' || !key.includes('/s/')) return 'good';
      // The claim is on its way: its slot is filled, put into chunks and deleted before it arrives.
      late = false;
      for (let i = 0; i < 40; i++) await write(first, i * 4096, block(i + 2), true);
      await first.checkpoint();
      return 'good';
    };
    const second = await open(bucket.connect(2));
    expect(late).toBe(false);
    const seen = await readAll(second, 0, 40 * 4096);
    for (let i = 0; i < 40; i++) expect(seen[i * 4096]).toBe(i + 2);
    await write(first, 0, block(99));
    expect(await causeOf(() => first.flush())).toBe('ERR_TCMU_S3_FENCED');
    await second.close();
    await first.close();
  });

  it.each(Array.from({ length: 12 }, (_, i) => i + 1))(
    'gets in while the first one writes as fast as it can (seed %i)',
    async (seed) => {
      const bucket = await bucketWithDisk();
      const random = randomNumbers(seed);
      const writers: S3Disk[] = [];
      const flushed: { writer: number; value: number }[] = [];
      let value = 0;
      const hammer = async (disk: S3Disk, writer: number): Promise<void> => {
        for (;;) {
          const mine = ++value;
          const bytes = Buffer.alloc(4096);
          bytes.writeUInt32LE(mine);
          bytes.writeUInt32LE(writer, 4);
          try {
            await write(disk, Math.floor(random() * 256) * 4096, Buffer.alloc(4096, 1));
            await write(disk, 0, bytes);
            await disk.flush();
          } catch {
            return;
          }
          flushed.push({ writer, value: mine });
        }
      };
      const hammering: Promise<void>[] = [];
      for (let i = 0; i < 4; i++) {
        const disk = await open(bucket.connect(seed * 10 + i), { uploads: 16 });
        // Whatever was flushed before it was open is in it.
        const seen = (await readAll(disk, 0, 4096)).readUInt32LE();
        expect(seen).toBeGreaterThanOrEqual(flushed.at(-1)?.value ?? 0);
        const from = flushed.length;
        writers.push(disk);
        hammering.push(hammer(disk, i));
        for (let turn = 0; turn < 60; turn++) await new Promise((r) => setImmediate(r));
        // Nobody but the newest has flushed anything since.
        for (const { writer } of flushed.slice(from)) expect(writer).toBe(i);
      }
      const last = writers.pop() as S3Disk;
      await last.close({ discard: true });
      await Promise.all(hammering);
      for (const disk of writers) expect(disk.failure?.code).toBe('ERR_TCMU_S3_FENCED');
      for (const disk of writers) await disk.close();
    },
  );

  it.each([
    [1, 'a long log', { logLimit: 1e9, segmentLimit: 1e5 }],
    [2, 'a long log', { logLimit: 1e9, segmentLimit: 1e5 }],
    [3, 'checkpoints at every turn', { segmentLimit: 24 }],
    [4, 'checkpoints at every turn', { segmentLimit: 24 }],
    [5, 'checkpoints at every turn', { segmentLimit: 100 }],
  ] as const)(
    'gets in from far away, past one beside the bucket (seed %i, %s)',
    async (seed, _, limits) => {
      const bucket = await bucketWithDisk();
      const first = await open(bucket.connect(seed, 1), { uploads: 16, ...limits });
      const hammering = hammer(first);
      await expect.poll(() => hammering.flushed).toBeGreaterThan(50);
      const second = await open(bucket.connect(seed + 10, 200));
      const { flushed } = hammering;
      await hammering.ended;
      // None was flushed after that, and all before are seen.
      expect(hammering.flushed).toBe(flushed);
      expect(await numberIn(second)).toBeGreaterThanOrEqual(flushed);
      expect(first.failure?.code).toBe('ERR_TCMU_S3_FENCED');
      await first.close();
      const more = hammer(second, 1e6);
      await expect.poll(() => more.flushed).toBeGreaterThan(1e6 + 5);
      await second.close();
      await more.ended;
      const third = await open(bucket.connect());
      expect(third.epoch).toBe(3);
      expect(await numberIn(third)).toBeGreaterThanOrEqual(more.flushed);
      await third.close();
    },
  );

  it.each([1, 2, 3, 4])('races others from far away past one at work (seed %i)', async (seed) => {
    const bucket = await bucketWithDisk();
    const limits = seed % 2 === 0 ? { segmentLimit: 40 } : {};
    const first = await open(bucket.connect(seed, 1), { uploads: 16, ...limits });
    const hammering = hammer(first);
    await expect.poll(() => hammering.flushed).toBeGreaterThan(20);
    const opened = await Promise.all(
      [0, 1, 2].map((i) => open(bucket.connect(seed * 10 + i, 40 + 40 * i))),
    );
    await hammering.ended;
    const newest = opened.reduce((a, b) => (b.epoch > a.epoch ? b : a));
    expect(new Set(opened.map(({ epoch }) => epoch)).size).toBe(3);
    expect(await numberIn(newest)).toBeGreaterThanOrEqual(hammering.flushed);
    for (const disk of opened) {
      const flushed = write(disk, 8192, block(9), true).then(
        () => true,
        () => false,
      );
      expect(await flushed).toBe(disk === newest);
    }
    for (const disk of [first, ...opened]) await disk.close();
    const again = await open(bucket.connect());
    expect(await numberIn(again)).toBeGreaterThanOrEqual(hammering.flushed);
    expect((await readAll(again, 8192, 4096)).equals(block(9))).toBe(true);
    await again.close();
  });

  it.each([1, 2, 3, 4, 5, 6])('races others, and one of them is left (seed %i)', async (seed) => {
    const bucket = await bucketWithDisk();
    const opened = await Promise.all([0, 1, 2, 3].map((i) => open(bucket.connect(seed * 10 + i))));
    const epochs = opened.map(({ epoch }) => epoch);
    expect(new Set(epochs).size).toBe(4);
    const newest = opened[epochs.indexOf(Math.max(...epochs))] as S3Disk;
    for (const [i, disk] of opened.entries()) {
      const flushed = write(disk, 0, block(i + 1), true).then(
        () => true,
        () => false,
      );
      expect(await flushed).toBe(disk === newest);
    }
    for (const disk of opened) await disk.close();
  });
});

describe('a late request of an old writer', () => {
  it('changes nothing, whatever slot it fills', async () => {
    const bucket = await bucketWithDisk();
    const model = new Model(MiB);
    const slow = bucket.connect(1);
    const first = await open(slow, { uploads: 16, dirtyLimit: MiB });
    await write(first, 0, block(1), true);
    model.note({ kind: 'data', position: 0, bytes: block(1) });
    // From now on its segments are held back, all but the later ones.
    const held: string[] = [];
    bucket.fate = (operation, key) => {
      if (operation !== 'put' || !key.includes('/s/') || held.length >= 3) return 'good';
      held.push(key);
      return 'hang';
    };
    for (let i = 0; i < 40; i++) await write(first, (i + 1) * 4096, block(9));
    const waiting = first.flush().catch(() => {});
    await expect.poll(() => held.length).toBe(3);
    for (let turn = 0; turn < 50; turn++) await new Promise((r) => setImmediate(r));
    const later = bucket.keys().filter((key) => key.includes('/s/'));
    expect(later.length).toBeGreaterThan(2);
    const second = await open(bucket.connect(2));
    expect(model.recover(await readAll(second))).toBeDefined();
    await write(second, 8192, block(5), true);
    await second.checkpoint();
    await second.close();
    const third = await open(bucket.connect(3));
    const expected = Buffer.alloc(MiB);
    block(1).copy(expected);
    block(5).copy(expected, 8192);
    expect((await readAll(third)).equals(expected)).toBe(true);
    await third.close();
    await first.close({ discard: true });
    await waiting;
  });

  it('is stopped by the claim even after everything around that was collected', async () => {
    const bucket = await bucketWithDisk();
    const first = await open(bucket.connect(1));
    await write(first, 0, block(1), true);
    const second = await open(bucket.connect(2));
    for (let i = 0; i < 64; i++) {
      await write(second, i * 8192, block(i + 1), true);
      if (i % 8 === 0) await second.checkpoint();
    }
    await second.checkpoint();
    await second.collect();
    await write(first, 0, block(7));
    expect(await causeOf(() => first.flush())).toBe('ERR_TCMU_S3_FENCED');
    await second.close();
    await first.close();
  });
});

describe('a store that ignores conditions', () => {
  it('is refused for writing, served read-only, and taken when told so by name', async () => {
    const bucket = await bucketWithDisk();
    const first = await open(bucket.connect());
    await write(first, 0, block(1), true);
    await first.close();
    bucket.conditional = false;
    expect(await causeOf(() => open(bucket.connect()))).toBe('ERR_TCMU_S3_NO_FENCING');
    expect(bucket.keys().filter((key) => key.includes('probe'))).toEqual([]);
    const follower = await open(bucket.connect(), { mode: 'follow' });
    expect((await readAll(follower, 0, 4096)).equals(block(1))).toBe(true);
    await follower.close();
    const forced = await open(bucket.connect(), { fencing: 'none' });
    await write(forced, 0, block(2), true);
    // Better than nothing: a rival that has been there for a while is seen.
    const rival = await open(bucket.connect(), { fencing: 'none' });
    await write(forced, 0, block(3));
    expect(await causeOf(() => forced.flush())).toBe('ERR_TCMU_S3_FENCED');
    await rival.close();
    await forced.close();
  });
});

describe('a fence left by somebody who died behind it', () => {
  it('ends the writer that comes to it, and is passed by whoever comes after', async () => {
    const bucket = await bucketWithDisk();
    const first = await open(bucket.connect(1), { logLimit: MiB });
    const follower = await open(bucket.connect(3), { mode: 'follow' });
    const fence = await deadTakersFence(bucket, first);
    const hammering = hammer(first);
    await hammering.ended;
    expect(hammering.flushed).toBeGreaterThan(0);
    expect(first.failure).toMatchObject({ code: 'ERR_TCMU_S3_FENCED', path: fence });
    expect(first.failure?.message).toContain('another writer is taking over');
    await first.close();
    await follower.refresh();
    expect(await numberIn(follower)).toBe(hammering.flushed);

    const second = await open(bucket.connect(2));
    expect(second.epoch).toBe(2);
    expect(await numberIn(second)).toBe(hammering.flushed);
    await second.snapshot('over');
    await write(second, 4096, block(6), true);
    await follower.refresh();
    expect((await readAll(follower, 4096, 4096)).equals(block(6))).toBe(true);
    await follower.close();
    await second.checkpoint();
    await second.collect();
    // It stays, for the first one may have slept.
    expect(segments(bucket)).toContain(fence);
    await second.close();
    await expectSound(bucket);
    const snapshot = await open(bucket.connect(), { snapshot: 'over' });
    expect(await numberIn(snapshot)).toBe(hammering.flushed);
    await snapshot.close();
    const third = await open(bucket.connect());
    expect(third.epoch).toBe(3);
    expect((await readAll(third, 4096, 4096)).equals(block(6))).toBe(true);
    await third.close();
  });

  it('is in nobody’s way who opens the disk before a writer came to it', async () => {
    const bucket = await bucketWithDisk();
    const first = await open(bucket.connect(1));
    await deadTakersFence(bucket, first);
    await write(first, 0, block(2), true);
    await first.close();
    const second = await open(bucket.connect(2));
    for (let i = 0; i < 100; i++) await write(second, i * 4096, block(i + 3), true);
    await second.close();
    await expectSound(bucket);
  });

  it.each([1, 2, 3, 4, 5, 6])('may be where a checkpoint cuts the log (limit %i)', async (more) => {
    const bucket = await bucketWithDisk();
    const first = await open(bucket.connect(1), { logLimit: 1e9, writer: '1'.repeat(16) });
    await deadTakersFence(bucket, first);
    const hammering = hammer(first);
    await hammering.ended;
    await first.close();
    // Half of them stay: the cut is at the last segments of the first writer, the fence, or the claim.
    const all = segments(bucket).length;
    const second = await open(bucket.connect(2), {
      logLimit: 1e9,
      segmentLimit: 2 * more,
      writer: '2'.repeat(16),
    });
    for (let i = 1; i < all; i++) {
      await write(second, 4096 * i, block(i), true);
      if (bucket.keys(`${homeIn(bucket)}/m/`).length > 0) break;
    }
    await expect.poll(() => second.manifest.n).toBeGreaterThan(0);
    // A fence is nobody's writing: what counts is who wrote before it.
    const { cutEpoch, cutWriter } = second.manifest;
    expect([1, 2]).toContain(cutEpoch);
    expect(cutWriter).toBe(`${cutEpoch}`.repeat(16));
    const expected = await readAll(second);
    await second.close();
    const third = await open(bucket.connect(3));
    expect(third.epoch).toBe(3);
    expect((await readAll(third)).equals(expected)).toBe(true);
    await third.close();
  });

  it('takes nothing from the journal of the writer that came to it', async () => {
    const dir = mkdtempSync(join(tmpdir(), 'tcmu-s3-fence-'));
    const journal = join(dir, 'journal');
    try {
      const bucket = await bucketWithDisk();
      const first = await open(bucket.connect(1), { journal, logLimit: 4 * MiB });
      const size = 32 * KiB;
      const fence = await deadTakersFence(bucket, first, async () => {
        await write(first, 0, Buffer.alloc(size, 1));
        await write(first, 0, Buffer.alloc(size, 2));
        await expect.poll(() => segments(bucket).length).toBe(2);
      });
      // A segment each, acknowledged when the journal has it: the last ones never get into the bucket.
      const expected = Buffer.alloc(MiB);
      let failed = 0;
      for (let i = 0; ; i++) {
        const bytes = Buffer.alloc(size, i + 1);
        failed = (i * size) % MiB;
        try {
          await write(first, failed, bytes);
        } catch {
          break;
        }
        bytes.copy(expected, failed);
      }
      expect(first.failure).toMatchObject({ code: 'ERR_TCMU_S3_FENCED', path: fence });
      await first.close();
      const again = await open(bucket.connect(2), { journal });
      const seen = await readAll(again);
      // What failed may be there or not.
      expected.copy(seen, failed, failed, failed + size);
      expect(seen.equals(expected)).toBe(true);
      await again.close();
    } finally {
      rmSync(dir, { recursive: true });
    }
  });

  it('that came too late does not lead a follower past what it has missed', async () => {
    const bucket = await bucketWithDisk();
    const first = await open(bucket.connect(1), { logLimit: 1e9, segmentLimit: 24 });
    for (let i = 0; i < 3; i++) await write(first, i * 4096, block(i + 1), true);
    const follower = await open(bucket.connect(2), { mode: 'follow' });
    expect((await readAll(follower, 0, 4096)).equals(block(1))).toBe(true);
    // It stands here, while the log goes on, and its first half is put into chunks.
    const slot =
      (slotOf(
        segments(bucket)
          .at(-1)
          ?.slice(homeIn(bucket).length + 1) ?? '',
      ) ?? 0) + 1;
    const key = `${homeIn(bucket)}/${segmentName(slot)}`;
    for (let i = 3; i < 26; i++) {
      await write(first, i * 4096, block(i + 1), true);
    }
    await expect.poll(() => bucket.objects.has(key)).toBe(false);
    const behind = `${homeIn(bucket)}/${segmentName(slot + WINDOW)}`;
    expect(bucket.objects.has(behind)).toBe(true);
    const codec = new BlobCodec(first.record.id, 'none');
    const writer = '9'.repeat(16);
    const fence = { kind: BlobKind.segment, number: slot, n: 0, epoch: FENCE_EPOCH, writer };
    const { parts } = await codec.encode(fence, [], slot + WINDOW);
    bucket.put(key, Buffer.concat(parts));
    await follower.refresh();
    expect((await readAll(follower)).equals(await readAll(first))).toBe(true);
    await follower.close();
    await first.close();
  });

  it('that came too late, into a slot collected long ago, deceives nobody', async () => {
    const bucket = await bucketWithDisk();
    const first = await open(bucket.connect(1), { logLimit: 1e9 });
    await write(first, 0, block(1), true);
    let step: 'claim' | 'losing' | 'fence' | 'done' = 'claim';
    bucket.fate = async (operation, key): Promise<Fate> => {
      if (operation !== 'put' || !key.includes('/s/')) return 'good';
      if (step === 'claim') {
        step = 'losing';
        await write(first, 0, block(2), true);
        step = 'fence';
      } else if (step === 'fence') {
        // It is on its way: its slot is filled, put into chunks and deleted before it arrives.
        step = 'done';
        for (let i = 0; i < 60; i++) await write(first, i * 4096, block(i + 3), true);
        await first.checkpoint();
        await write(first, 60 * 4096, block(99), true);
        expect(bucket.objects.has(key)).toBe(false);
      }
      return 'good';
    };
    const second = await open(bucket.connect(2));
    const seen = await readAll(second, 0, 61 * 4096);
    for (let i = 0; i < 60; i++) expect(seen[i * 4096]).toBe(i + 3);
    expect(seen[60 * 4096]).toBe(99);
    await write(first, 0, block(7));
    expect(await causeOf(() => first.flush())).toBe('ERR_TCMU_S3_FENCED');
    await second.close();
    await first.close();
  });
});
