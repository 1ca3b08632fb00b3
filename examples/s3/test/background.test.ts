// SPDX-License-Identifier: Apache-2.0
/** Who goes first: requests that somebody waits for, and those that nobody does. */
import { describe, expect, it } from 'vitest';
import { Background, WIDTH } from '../src/engine/background.js';
import { type Clock, systemClock } from '../src/engine/requests.js';
import { create, KiB, MiB, open, write } from './support/disk.js';
import { type Fate, MemoryBucket } from './support/memory-objects.js';

/** Time that passes only while somebody sleeps. */
class ManualClock implements Clock {
  time = 0;
  now = () => this.time;
  wall = () => this.time;
  random = () => 0.5;
  async sleep(ms: number): Promise<void> {
    this.time += ms;
    await new Promise(setImmediate);
  }
}

function begin() {
  const clock = new ManualClock();
  const background = new Background(clock, new AbortController().signal);
  return { clock, background };
}

/** Eight requests of 10 ms. @returns the most that were under way at a time, and when all were done */
async function eight({ clock, background }: ReturnType<typeof begin>) {
  let running = 0;
  let most = 0;
  const request = async () => {
    most = Math.max(most, ++running);
    await clock.sleep(10);
    running--;
  };
  await Promise.all(Array.from({ length: 8 }, () => background.run(request)));
  return { most, took: clock.now() };
}

async function whileSomebodyWaits(parts: ReturnType<typeof begin>) {
  let answered = () => {};
  const waiting = parts.background.ahead(new Promise<void>((resolve) => (answered = resolve)));
  const result = await eight(parts);
  answered();
  await waiting;
  return result;
}

describe('work in the background', () => {
  it('goes side by side, without a rest, while nobody waits', async () => {
    const parts = begin();
    const { most, took } = await eight(parts);
    expect(most).toBe(WIDTH);
    expect(took).toBeLessThanOrEqual(8 * 10 + 8 * 5);
  });

  it('goes one by one and rests nine times as long while somebody waits', async () => {
    const parts = begin();
    const { most, took } = await whileSomebodyWaits(parts);
    expect(most).toBe(1);
    expect(took).toBeGreaterThanOrEqual(7 * 100);
  });

  it('goes slowly for a moment after, and at full speed again then', async () => {
    const parts = begin();
    await parts.background.ahead(Promise.resolve());
    expect(parts.background.yields).toBe(true);
    parts.clock.time += 100;
    expect(parts.background.yields).toBe(false);
  });

  it('takes a larger share as more is owed, and all of it in the end', async () => {
    const took: number[] = [];
    for (const owed of [0, 0.5, 0.8]) {
      const parts = begin();
      parts.background.owed = () => owed;
      took.push((await whileSomebodyWaits(parts)).took);
    }
    expect(took[1]).toBeLessThan(took[0] as number);
    expect(took[2]).toBeLessThan(took[1] as number);
    const parts = begin();
    parts.background.owed = () => 1;
    expect((await whileSomebodyWaits(parts)).most).toBe(WIDTH);
  });
});

describe('a checkpoint', () => {
  const logLimit = 2 * MiB;
  const sizes = { chunkSize: 64 * KiB, frameSize: 16 * KiB };
  const options = { logLimit, segmentSize: 256 * KiB, dirtyLimit: MiB, cacheSize: 512 * KiB };

  /** A disk whose log is a little too long, opened anew: its checkpoint has to load, merge and copy. */
  async function prepare(): Promise<MemoryBucket> {
    const bucket = new MemoryBucket();
    await create(bucket.connect(), { size: 64 * MiB, ...sizes });
    const disk = await open(bucket.connect(), { ...options, logLimit: 64 * MiB });
    for (let i = 0; i < 20; i++) {
      await write(disk, i * 64 * KiB, Buffer.alloc(64 * KiB, i + 1));
      for (let j = 0; j < 16; j++)
        await write(disk, 16 * MiB + (i * 16 + j) * 64 * KiB, Buffer.alloc(4 * KiB, i + 1));
    }
    await disk.close();
    return bucket;
  }

  it('has at most one request on its way ahead of a flush', async () => {
    const bucket = await prepare();
    const disk = await open(bucket.connect(), { ...options, clock: systemClock });
    let background = 0;
    let flushing = false;
    const during: number[] = [];
    let started = 0;
    const isLog = (key: string) => /\/s\/\d+$/.test(key);
    bucket.fate = async (operation, key): Promise<Fate> => {
      const isOurs = operation === 'put' && isLog(key);
      if (!isOurs) {
        background++;
        if (flushing) started++;
      }
      await new Promise((resolve) => setTimeout(resolve, 2));
      if (!isOurs) background--;
      return 'good' as const;
    };
    for (let i = 0; i < 60; i++) {
      await write(disk, 48 * MiB + i * 4 * KiB, Buffer.alloc(4 * KiB, 7));
      started = 0;
      flushing = true;
      const ahead = background;
      await disk.flush();
      flushing = false;
      // The first flush finds what began while nobody waited.
      if (i > 0) {
        during.push(ahead + started);
      }
    }
    const sum = during.reduce((total, count) => total + count, 0);
    expect(sum / during.length).toBeLessThanOrEqual(1);
    // It goes on, and ends when nobody waits any more.
    await expect.poll(() => disk.statistics().checkpoints).toBeGreaterThan(0);
    await disk.close();
  });

  it('ends however often somebody flushes: the log stays within its bound', async () => {
    const bucket = await prepare();
    const disk = await open(bucket.connect(), options);
    let longest = 0;
    for (let i = 0; i < 400; i++) {
      await write(disk, (i % 200) * 64 * KiB, Buffer.alloc(32 * KiB, 1 + (i % 200)));
      await disk.flush();
      longest = Math.max(longest, disk.statistics().logBytes);
    }
    expect(longest).toBeLessThanOrEqual(2 * logLimit + options.dirtyLimit);
    expect(disk.statistics().checkpoints).toBeGreaterThan(0);
    await disk.close();
  });
});
