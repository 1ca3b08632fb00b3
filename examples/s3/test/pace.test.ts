// SPDX-License-Identifier: Apache-2.0
/** A log that is full takes changes in step with the checkpoint that makes it shorter. */
import { MemoryDataOut } from 'tcmu/store';
import { describe, expect, it } from 'vitest';
import { type Freed, type LogLength, Pace } from '../src/engine/pace.js';
import {
  causeOf,
  create,
  KiB,
  MiB,
  open,
  quickClock,
  readAll,
  request,
  write,
} from './support/disk.js';
import { type Fate, MemoryBucket } from './support/memory-objects.js';
import { randomNumbers } from './support/random.js';

function paced(length: Partial<LogLength>) {
  const log = { bytes: 0, segments: 0, index: 0, ...length };
  const state = { isShrinking: true };
  const pace = new Pace(
    quickClock,
    () => ({ ...log }),
    () => state.isShrinking,
  );
  return { pace, log, state };
}

const freed = (length: Partial<Freed>) => ({ bytes: 0, segments: 0, ...length });
const settled = () => new Promise(setImmediate);

describe('the pace of a log', () => {
  it('holds nobody up while there is room, or nothing makes more', async () => {
    const { pace, log, state } = paced({ bytes: 1.5 });
    pace.begin(freed({ bytes: 0.1 }), 0);
    expect(pace.admits).toBe(true);
    log.bytes = 3;
    expect(pace.admits).toBe(false);
    state.isShrinking = false;
    expect(pace.admits).toBe(true);
    expect(await pace.wait(0)).toBe(true);
  });

  it('hands out the room there is as the checkpoint goes on', () => {
    const { pace, log } = paced({ bytes: 1.8 });
    pace.begin(freed({ bytes: 0.1 }), 0);
    expect(pace.admits).toBe(false);
    pace.advance(0.5);
    log.bytes = 1.89;
    expect(pace.admits).toBe(true);
    log.bytes = 1.91;
    expect(pace.admits).toBe(false);
    pace.advance(1);
    log.bytes = 1.99;
    expect(pace.admits).toBe(true);
    log.bytes = 2.01;
    expect(pace.admits).toBe(false);
  });

  it('begins to where waiting begins, however short the log was', () => {
    const { pace, log } = paced({ bytes: 1.05 });
    pace.begin(freed({ bytes: 0.95 }), 0);
    for (const progress of [0, 0.1, 0.5, 1]) {
      pace.advance(progress);
      log.bytes = 1.75 + 0.25 * progress - 0.01;
      expect(pace.admits).toBe(true);
      log.bytes += 0.02;
      expect(pace.admits).toBe(false);
    }
  });

  it('of a full one, what will be free, and not twice', () => {
    const { pace, log } = paced({ bytes: 2 });
    pace.begin(freed({ bytes: 0.1 }), 0.05);
    pace.advance(0.5);
    // What it appends itself is not a change's.
    log.bytes = 2.09;
    expect(pace.admits).toBe(true);
    log.bytes = 2.11;
    expect(pace.admits).toBe(false);
    log.bytes = 2.11 - 0.1;
    pace.free();
    expect(pace.admits).toBe(false);
    pace.advance(1);
    expect(pace.admits).toBe(true);
    pace.end();
    expect(pace.admits).toBe(false);
    log.bytes = 1.99;
    expect(pace.admits).toBe(true);
  });

  it('counts segments too, and its index never in advance', () => {
    const segments = paced({ segments: 2 });
    segments.pace.begin(freed({ segments: 0.1 }), 0);
    segments.pace.advance(0.5);
    expect(segments.pace.admits).toBe(true);
    const index = paced({ index: 2 });
    index.pace.begin(freed({ bytes: 0.1 }), 0);
    index.pace.advance(0.5);
    expect(index.pace.admits).toBe(false);
    index.log.index = 1.9;
    index.pace.free();
    expect(index.pace.admits).toBe(true);
  });

  it('lets them in first come, first served, and tells those who can’t wait', async () => {
    const { pace, log } = paced({ bytes: 2 });
    pace.begin(freed({ bytes: 0.1 }), 0);
    const order: string[] = [];
    const enter = async (name: string, patience: number) => {
      const isAdmitted = await pace.wait(patience);
      order.push(`${name} ${isAdmitted}`);
      if (isAdmitted) log.bytes += 0.04;
    };
    const all = [enter('a', 1e9), enter('b', 1e3), enter('c', 1e9)];
    // Nobody overtakes those who wait.
    pace.advance(0.25);
    expect(pace.admits).toBe(false);
    await all[0];
    await all[1];
    expect(order).toEqual(['a true', 'b false']);
    pace.advance(1);
    await all[2];
    expect(order).toEqual(['a true', 'b false', 'c true']);
    await settled();
    expect(pace.admits).toBe(true);
  });
});

describe('a disk whose log is full', () => {
  const options = { logLimit: MiB, segmentSize: 64 * KiB, dirtyLimit: 128 * KiB };
  const sizes = { chunkSize: 64 * KiB, frameSize: 16 * KiB };

  it('takes writes while a checkpoint is under way, a part of what that will free for a part of it', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect(), { size: 4 * MiB, ...sizes });
    const disk = await open(bucket.connect(), options);
    const expected = Buffer.alloc(4 * MiB);
    let written = 0;
    let isOver = false;
    const random = randomNumbers(7);
    const writing = (async () => {
      while (!isOver) {
        const position = Math.floor(random() * 1024) * 4 * KiB;
        expected.fill(1 + (written % 255), position, position + 4 * KiB);
        await write(disk, position, Buffer.alloc(4 * KiB, 1 + (written % 255)));
        written += 4 * KiB;
      }
    })();
    // Of the second checkpoint chunks are let through one by one, and its manifest not at all.
    const gates: (() => void)[] = [];
    bucket.fate = async (operation, key): Promise<Fate> => {
      const { checkpoints } = disk.statistics();
      if (operation === 'put' && /\/[cm]\//.test(key) && checkpoints === 1) {
        await new Promise<void>((resolve) => gates.push(resolve));
      }
      return 'good';
    };
    const rest = async () => {
      for (let before = -1; before !== written; ) {
        before = written;
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      return written;
    };
    await expect.poll(() => gates.length).toBeGreaterThan(0);
    await rest();
    const steps: number[] = [];
    for (let chunk = 0; chunk < 60; chunk++) {
      gates.shift()?.();
      const before = written;
      steps.push((await rest()) - before);
    }
    // There was no end of a checkpoint, and yet room, a little at each step.
    expect(disk.statistics().checkpoints).toBe(1);
    const room = steps.reduce((sum, step) => sum + step, 0);
    expect(room).toBeGreaterThan(64 * KiB);
    expect(Math.max(...steps)).toBeLessThan(room / 4);
    isOver = true;
    bucket.fate = () => 'good';
    for (const gate of gates) gate();
    await writing;
    expect(disk.statistics().logBytes).toBeLessThan(2.5 * options.logLimit);
    expect((await readAll(disk)).equals(expected)).toBe(true);
    await disk.close();
    const reader = await open(bucket.connect(), { mode: 'follow' });
    expect((await readAll(reader)).equals(expected)).toBe(true);
    await reader.close();
  });

  /** Its checkpoint is held back by the bucket, and changes of all kinds wait for it, with patience without end. */
  async function withWaiting() {
    const bucket = new MemoryBucket();
    await create(bucket.connect(), { size: 4 * MiB, ...sizes });
    const disk = await open(bucket.connect(), options);
    let letGo = (_: Fate): void => {};
    const held = new Promise<Fate>((resolve) => {
      letGo = resolve;
    });
    let isHeld = false;
    bucket.fate = async (operation, key): Promise<Fate> => {
      if (operation !== 'put' || !/\/[cm]\//.test(key)) return 'good';
      isHeld = true;
      return held;
    };
    const data = Buffer.alloc(32 * KiB, 1);
    let waiting: unknown;
    for (let at = 0; waiting === undefined; at += data.length) {
      waiting = disk.write(at % disk.size, new MemoryDataOut(data), request());
      if (waiting === undefined) await disk.flush();
      // When its first chunk is on its way a checkpoint has loaded all it needs: it wakes nobody before that has arrived.
      const isFull = disk.statistics().logBytes > options.logLimit;
      if (isFull) await expect.poll(() => isHeld).toBe(true);
    }
    // There is nothing else to wait for: all that was written is in the bucket.
    expect(disk.statistics().dirtyBytes).toBe(0);
    expect(disk.statistics().logBytes).toBeGreaterThan(1.7 * options.logLimit);
    const ends: unknown[] = [];
    const changes = [
      () => waiting,
      // More than there is room for while anything makes the log shorter.
      ...Array.from({ length: 10 }, () => () => write(disk, 0, data, true)),
      () => disk.unmap(0, data.length),
      () => disk.writeSame(0, data.length, data),
      () => disk.compareAndWrite(0, data, data),
    ];
    for (const change of changes) {
      Promise.resolve(change()).then(
        () => ends.push('done'),
        async (error) => ends.push(await causeOf(() => Promise.reject(error))),
      );
    }
    await settled();
    expect(ends).toEqual([]);
    return { bucket, disk, letGo, ends, count: changes.length };
  }

  it('tells those who wait at once that it is closed', async () => {
    const { disk, letGo, ends, count } = await withWaiting();
    const closing = disk.close();
    await expect.poll(() => ends).toEqual(Array(count).fill('ERR_TCMU_S3_CLOSED'));
    // It was the end of nothing that told them.
    expect(disk.statistics().checkpoints).toBe(0);
    letGo('good');
    await closing;
  });

  it('tells those who wait at once that another writer has it', async () => {
    const { bucket, disk, letGo, ends, count } = await withWaiting();
    const second = await open(bucket.connect(2));
    expect(await causeOf(() => disk.flush())).toBe('ERR_TCMU_S3_FENCED');
    await expect.poll(() => ends).toEqual(Array(count).fill('ERR_TCMU_S3_FENCED'));
    expect(disk.statistics().checkpoints).toBe(0);
    letGo('good');
    await disk.close();
    await second.close();
  });

  it('lets those who wait go when the checkpoint has failed', async () => {
    const { bucket, disk, letGo, ends, count } = await withWaiting();
    letGo({ before: 'bad-request' });
    await expect.poll(() => ends).toEqual(Array(count).fill('done'));
    expect(disk.statistics().checkpoints).toBe(0);
    bucket.fate = () => 'good';
    await disk.close();
  });

  it('gets shorter when all that is in it is a block here and there', async () => {
    // A checkpoint takes 16 MiB at a time: less than what may be copied to the end of such a log.
    const logLimit = 72 * MiB;
    const bucket = new MemoryBucket();
    await create(bucket.connect(), { size: 16 * 1024 * MiB, ...sizes });
    const disk = await open(bucket.connect(), {
      logLimit,
      segmentSize: 2 * MiB,
      dirtyLimit: 4 * MiB,
      mapSize: 4 * MiB,
    });
    const random = randomNumbers(3);
    for (let i = 0; i < 80 * 128; i++) {
      const position = Math.floor(random() * 2 ** 21) * 8 * KiB;
      await write(disk, position, Buffer.alloc(8 * KiB, 1 + (i % 255)));
    }
    await disk.flush();
    await expect.poll(() => disk.statistics().logBytes).toBeLessThan(logLimit);
    expect(disk.statistics().bytesRelocated).toBeGreaterThan(0);
    await disk.close();
  });
});
