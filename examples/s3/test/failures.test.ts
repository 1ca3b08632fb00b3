// SPDX-License-Identifier: Apache-2.0
/** A bucket that fails in every way it can: nothing false is acknowledged, and what was is not lost. */
import { describe, expect, it } from 'vitest';
import type { FailureKind } from '../src/object-store.js';
import type { OpenOptions } from '../src/s3-disk.js';
import {
  causeOf,
  create,
  failure,
  homeIn,
  KiB,
  MiB,
  open,
  readAll,
  write,
} from './support/disk.js';
import { type Fate, MemoryBucket } from './support/memory-objects.js';
import { randomNumbers } from './support/random.js';

const block = (value: number): Buffer => Buffer.alloc(4 * KiB, value);

async function served(options: OpenOptions = {}) {
  const bucket = new MemoryBucket();
  await create(bucket.connect());
  const log: string[] = [];
  const disk = await open(bucket.connect(), {
    onLog: (level, message) => log.push(`${level}: ${message}`),
    ...options,
  });
  return { bucket, disk, log };
}

const TRANSIENT: FailureKind[] = ['outage', 'throttled', 'credentials'];

describe('requests that fail now and then', () => {
  it.each(TRANSIENT.flatMap((kind) => [[kind, 'before'] as const, [kind, 'after'] as const]))(
    '%s, %s being carried out: everything works all the same',
    async (kind, when) => {
      const bucket = new MemoryBucket();
      await create(bucket.connect());
      const random = randomNumbers(5);
      bucket.fate = () =>
        random() < 0.3 ? (when === 'before' ? { before: kind } : { after: kind }) : 'good';
      const disk = await open(bucket.connect());
      for (let i = 0; i < 100; i++) {
        await write(disk, ((i * 7) % 256) * 4096, block(i + 1));
        if (i % 9 === 0) await disk.flush();
        if (i % 40 === 20) await disk.checkpoint();
      }
      const now = await readAll(disk);
      await disk.snapshot('s');
      await disk.close();
      const again = await open(bucket.connect());
      expect((await readAll(again)).equals(now)).toBe(true);
      expect(again.statistics().retries).toBeGreaterThan(0);
      await again.close();
    },
  );
});

describe('an outage', () => {
  it('lets writes go on up to the dirty limit; flushes wait and are told, falsely never', async () => {
    const { bucket, disk, log } = await served({ dirtyLimit: 64 * KiB, patienceMs: 1e6 });
    await write(disk, 0, block(1), true);
    const fate: Fate = { before: 'outage' };
    bucket.fate = () => fate;
    for (let i = 0; i < 15; i++) await write(disk, i * 4096, block(i + 2));
    expect((await readAll(disk, 0, 4096)).equals(block(2))).toBe(true);
    expect(await failure(() => write(disk, 0, block(99)))).toMatchObject({
      key: 2,
      asc: 4,
      ascq: 1,
    });
    expect(await causeOf(() => disk.flush())).toBe('ERR_TCMU_S3_UNREACHABLE');
    expect(disk.statistics().outageMs).toBeGreaterThan(0);
    const waiting = disk.flush();
    bucket.fate = () => 'good';
    await waiting;
    expect(log.filter((line) => line.startsWith('warning: put'))).toHaveLength(1);
    expect(log.some((line) => /answers again, after/.test(line))).toBe(true);
    await disk.close();
    const again = await open(bucket.connect());
    for (let i = 0; i < 15; i++) {
      expect((await readAll(again, i * 4096, 4096)).equals(block(i + 2))).toBe(true);
    }
    await again.close();
  });

  it('makes reads of what is not in memory NOT READY, and they work afterwards', async () => {
    const { bucket, disk } = await served();
    await write(disk, 0, block(1), true);
    await disk.close();
    const again = await open(bucket.connect(), { patienceMs: 3000 });
    bucket.fate = () => ({ before: 'outage' });
    expect(await failure(() => readAll(again, 0, 4096))).toMatchObject({ key: 2, asc: 4, ascq: 1 });
    bucket.fate = () => 'good';
    expect((await readAll(again, 0, 4096)).equals(block(1))).toBe(true);
    await again.close();
  });

  it('holds up closing, and a request that hangs ends with the disk', async () => {
    const { bucket, disk } = await served();
    await write(disk, 0, block(1));
    bucket.fate = () => ({ before: 'outage' });
    const closing = disk.close();
    const slow = Promise.race([closing, new Promise((r) => setTimeout(r, 20, 'waits'))]);
    expect(await slow).toBe('waits');
    bucket.fate = () => 'good';
    await closing;
    const again = await open(bucket.connect());
    expect((await readAll(again, 0, 4096)).equals(block(1))).toBe(true);
    bucket.fate = () => 'hang';
    await write(again, 0, block(2));
    const flushed = causeOf(() => again.flush());
    await again.close({ discard: true });
    expect(await flushed).toBe('ERR_TCMU_S3_CLOSED');
  });
});

describe('a refusal', () => {
  it.each(['forbidden', 'no-bucket', 'clock-skew'] as const)(
    '%s is told at once, and the data goes out when the bucket takes it again',
    async (kind) => {
      const { bucket, disk, log } = await served({ patienceMs: 1e9 });
      bucket.fate = (operation) => (operation === 'put' ? { before: kind } : 'good');
      await write(disk, 0, block(1));
      expect(await causeOf(() => disk.flush())).toBe('ERR_TCMU_S3_REFUSED');
      expect(await failure(() => write(disk, 0, block(2)))).toMatchObject({
        key: 2,
        asc: 4,
        ascq: 3,
      });
      expect(log.some((line) => /nothing can be made durable/.test(line))).toBe(true);
      bucket.fate = () => 'good';
      await expect.poll(() => log.some((line) => /takes our writes again/.test(line))).toBe(true);
      await disk.flush();
      await disk.close();
      const again = await open(bucket.connect());
      expect((await readAll(again, 0, 4096)).equals(block(1))).toBe(true);
      await again.close();
    },
  );

  it.each(['forbidden', 'no-bucket', 'bad-request'] as const)('%s ends opening', async (kind) => {
    const { bucket, disk } = await served();
    await disk.close();
    bucket.fate = (operation) => (operation === 'get' ? { before: kind } : 'good');
    expect(await causeOf(() => open(bucket.connect()))).toBe(
      `ERR_TCMU_S3_${kind.toUpperCase().replace('-', '_')}`,
    );
  });
});

describe('damage', () => {
  it('is told with the object’s name, wherever it is, and never served', async () => {
    const { bucket, disk } = await served();
    for (let i = 0; i < 64; i++) await write(disk, i * 16 * KiB, block(i + 1));
    await disk.checkpoint();
    await write(disk, 0, block(200), true);
    const good = await readAll(disk);
    await disk.close();
    const intact = new Map([...bucket.objects].map(([key, { body }]) => [key, body]));
    let told = 0;
    for (const [key, body] of intact) {
      for (const [what, wrong] of [
        ['flipped', flip(body, Math.floor(body.length * 0.7))],
        ['cut', body.subarray(0, body.length - 1)],
        ['gone', undefined],
      ] as const) {
        if (wrong === undefined) bucket.objects.delete(key);
        else bucket.put(key, wrong);
        try {
          const follower = await open(bucket.connect(), { mode: 'follow' });
          const bytes = await readAll(follower);
          await follower.close();
          // A segment that is gone at the log's end can't be told from one that never was.
          const lost = what === 'gone' && key.includes('/s/');
          if (!bytes.equals(good) && !lost) expect.fail(`${key} ${what}: served wrong data`);
        } catch (error) {
          told++;
          const { cause = error } = error as { cause?: Error };
          expect((cause as Error).message).toContain(what === 'gone' ? 'disks/d0' : key);
        }
        bucket.put(key, body);
      }
    }
    expect(told).toBeGreaterThan(2 * 64);
  });
});

describe('a lost log segment', () => {
  it.each([1, 5, 12, 20, 30])('%i before the end is told from the end', async (before) => {
    const { bucket, disk } = await served({ logLimit: MiB });
    for (let i = 0; i < 40; i++) await write(disk, i * 4096, block(i + 1), true);
    await disk.close();
    const slots = bucket.keys(`${homeIn(bucket)}/s/`);
    const lost = slots[slots.length - 1 - before] as string;
    bucket.objects.delete(lost);
    for (const mode of ['write', 'follow'] as const) {
      const error = await failure(() => open(bucket.connect(), { mode }));
      expect(error).toMatchObject({ code: 'ERR_TCMU_S3_DAMAGED', path: lost });
    }
    expect(bucket.keys(`${homeIn(bucket)}/s/`)).toHaveLength(slots.length - 1);
  });
});

function flip(body: Buffer, at: number): Buffer {
  const copy = Buffer.from(body);
  copy.writeUInt8((copy[at] as number) ^ 0x10, at);
  return copy;
}
