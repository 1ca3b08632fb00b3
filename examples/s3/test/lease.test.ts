// SPDX-License-Identifier: Apache-2.0
/** For how long a writer answers from its memory, and whom the next one waits for. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Lease, waitFor } from '../src/engine/lease.js';
import { isGone, processMark } from '../src/engine/process-mark.js';
import type { Clock } from '../src/engine/requests.js';
import type { OpenOptions, S3Disk } from '../src/s3-disk.js';
import { causeOf, create, homeIn, KiB, open, quickClock, readAll, write } from './support/disk.js';
import { type Fate, MemoryBucket } from './support/memory-objects.js';

/** Stands still but for `pass`; a long sleep takes no time and is noted. */
class HandClock implements Clock {
  steady = 1e6;
  day = 2e9;
  slept: number[] = [];
  now = (): number => this.steady;
  wall = (): number => this.day;
  random = (): number => 0.5;
  async sleep(ms: number, signal?: AbortSignal): Promise<void> {
    // Neither what never ends nor a look every second is what these tests are about.
    if (!Number.isFinite(ms) || ms <= 1000) return quickClock.sleep(ms, signal);
    this.slept.push(ms);
    this.pass(ms);
    await new Promise((resolve) => setImmediate(resolve));
  }
  pass(ms: number): void {
    this.steady += ms;
    this.day += ms;
  }
}

const LEASE = 10_000;
const block = (value: number): Buffer => Buffer.alloc(4 * KiB, value);

describe('a lease', () => {
  const clock = new HandClock();
  let lease: Lease;
  beforeEach(() => {
    lease = new Lease(clock, LEASE);
  });

  it('holds from what was proved on, counted from before it was asked', () => {
    expect(lease.holds).toBe(false);
    const before = lease.moment();
    clock.pass(4000);
    lease.proved(before);
    expect([lease.holds, lease.ages]).toEqual([true, true]);
    clock.pass(LEASE - 4001);
    expect(lease.holds).toBe(true);
    clock.pass(1);
    expect(lease.holds).toBe(false);
    const later = lease.moment();
    lease.proved(later);
    lease.proved(before);
    expect([lease.holds, lease.ages]).toEqual([true, false]);
  });

  it.each([
    ['the time of day is set back', 0, -3600_000],
    ['the time of day is set forward', 0, 3600_000],
    ['the machine slept, and its steady clock with it', 0, 5000],
  ])('is over when %s', (_, steady, wall) => {
    lease.proved(lease.moment());
    clock.steady += steady;
    clock.day += wall;
    expect(lease.holds).toBe(false);
    lease.proved(lease.moment());
    expect(lease.holds).toBe(true);
  });

  it('is waited for longer than it can last on a clock that is slow', () => {
    expect(waitFor(LEASE)).toBeGreaterThan(LEASE * 1.01 + 100);
    expect(waitFor(0)).toBe(0);
  });

  it('of no length holds always, and asks nothing', () => {
    const none = new Lease(clock, 0);
    expect([none.holds, none.ages]).toEqual([true, false]);
  });
});

describe('a replaced writer', () => {
  let bucket: MemoryBucket;
  let clock: HandClock;
  beforeEach(async () => {
    bucket = new MemoryBucket();
    await create(bucket.connect());
    clock = new HandClock();
  });
  const writer = (seed: number, options: OpenOptions = {}): Promise<S3Disk> =>
    open(bucket.connect(seed), { clock, leaseMs: LEASE, ...options });
  const settled = async (disk: S3Disk): Promise<unknown> =>
    causeOf(() => write(disk, 4096, block(9)));

  it('answers for nothing that goes into its cache once the other one is open', async () => {
    const first = await writer(1);
    await write(first, 0, block(1));
    const gets = bucket.requests;
    await write(first, 0, block(2));
    expect(bucket.requests).toBe(gets);
    const second = await writer(2);
    expect(clock.slept).toEqual([waitFor(LEASE)]);
    expect(await settled(first)).toBe('ERR_TCMU_S3_FENCED');
    expect(await causeOf(() => first.unmap(0, 4096))).toBe('ERR_TCMU_S3_FENCED');
    expect(await causeOf(() => first.writeZeroes(0, 4096))).toBe('ERR_TCMU_S3_FENCED');
    expect(await causeOf(() => first.writeSame(0, 4096, block(1)))).toBe('ERR_TCMU_S3_FENCED');
    expect(await causeOf(() => first.compareAndWrite(0, block(0), block(1)))).toBe(
      'ERR_TCMU_S3_FENCED',
    );
    await first.close();
    await second.close();
  });

  it('asks again after its lease, and goes on when nobody is there', async () => {
    const first = await writer(1);
    clock.pass(LEASE + 1);
    const before = bucket.requests;
    await write(first, 0, block(1));
    expect(bucket.requests).toBe(before + 1);
    await write(first, 0, block(2));
    expect(bucket.requests).toBe(before + 1);
    await first.close();
  });

  it('needs no asking while it uploads', async () => {
    const first = await writer(1);
    for (let i = 0; i < 5; i++) {
      clock.pass(LEASE - 1000);
      await write(first, 0, block(i), true);
    }
    clock.pass(LEASE - 1000);
    const before = bucket.requests;
    await write(first, 0, block(7));
    expect(bucket.requests).toBe(before);
    await first.close();
  });

  it('looks at the last moment: its lease may end while a change waits for room', async () => {
    const first = await writer(1, { dirtyLimit: 32 * KiB });
    await write(first, 0, Buffer.alloc(32 * KiB, 1));
    let go = (): void => {};
    bucket.fate = (operation, key): Fate | Promise<Fate> => {
      if (operation !== 'put' || !key.includes('/s/')) return 'good';
      return new Promise((resolve) => {
        go = () => resolve('good');
      });
    };
    const late = write(first, 32 * KiB, Buffer.alloc(32 * KiB, 2));
    for (let turn = 0; turn < 20; turn++) await new Promise((r) => setImmediate(r));
    clock.pass(LEASE + 1);
    const gets = first.statistics().gets;
    go();
    await late;
    expect(first.statistics().gets).toBeGreaterThan(gets);
    bucket.fate = () => 'good';
    await first.close();
  });

  it('answers for nothing while the bucket does not, when its lease is over', async () => {
    const first = await writer(1, { patienceMs: 25_000 });
    let down = true;
    bucket.fate = () => (down ? { before: 'outage' } : 'good');
    await write(first, 0, block(1));
    clock.pass(LEASE + 1);
    expect(await settled(first)).toBe('ERR_TCMU_S3_UNREACHABLE');
    down = false;
    await write(first, 0, block(3));
    await first.flush();
    await first.close();
    const second = await writer(2);
    expect((await readAll(second, 0, 4096)).equals(block(3))).toBe(true);
    await second.close();
  });

  it('takes no slot for free that it had filled untold, and that was collected since', async () => {
    const first = await writer(1);
    await write(first, 0, block(1));
    // It arrives, nobody is told, and it is not sent again before the other one is through with it.
    let told = false;
    let again: (() => void) | undefined;
    bucket.fate = (operation, key): Fate | Promise<Fate> => {
      if (operation !== 'put' || !key.includes('/s/')) return 'good';
      if (!told) {
        told = true;
        return { after: 'outage' };
      }
      return new Promise((resolve) => {
        again = () => resolve('good');
      });
    };
    const flushed = first.flush().catch(() => {});
    await expect.poll(() => again).toBeDefined();
    bucket.fate = () => 'good';
    const second = await writer(2);
    await write(second, 4096, block(2));
    await second.checkpoint();
    expect(await settled(first)).toBe('ERR_TCMU_S3_FENCED');
    again?.();
    await flushed;
    expect(await causeOf(() => first.flush())).toBe('ERR_TCMU_S3_FENCED');
    await first.close();
    expect((await readAll(second, 0, 4096)).equals(block(1))).toBe(true);
    await second.close();
  });

  it('makes no snapshot of what is not its own any more, while it uploads', async () => {
    const first = await writer(1);
    await write(first, 0, block(1), true);
    let second: S3Disk | undefined;
    // Taken over when the snapshot's pin is on its way; then an upload hangs.
    bucket.fate = async (operation, key): Promise<Fate> => {
      if (operation !== 'put' || !key.includes('/p/')) return 'good';
      bucket.fate = () => 'good';
      second = await writer(2, { assumeDead: true });
      bucket.fate = (what, at) => (what === 'put' && at.includes('/s/') ? 'hang' : 'good');
      await write(first, 0, block(2));
      first.flush().catch(() => {});
      return 'good';
    };
    const made = causeOf(() => first.snapshot('late'));
    expect(await made).toBe('ERR_TCMU_S3_FENCED');
    expect(bucket.keys(`${homeIn(bucket)}/p/`)).toEqual([]);
    bucket.fate = () => 'good';
    await first.close({ discard: true });
    await second?.close();
  });
});

describe('whoever opens the disk', () => {
  let bucket: MemoryBucket;
  let clock: HandClock;
  let dir: string;
  beforeEach(async () => {
    bucket = new MemoryBucket();
    await create(bucket.connect());
    clock = new HandClock();
    dir = mkdtempSync(join(tmpdir(), 'tcmu-s3-lease-'));
  });
  afterEach(() => rmSync(dir, { recursive: true }));
  const writer = (seed: number, options: OpenOptions = {}): Promise<S3Disk> =>
    open(bucket.connect(seed), { clock, leaseMs: LEASE, ...options });
  const ended = { discard: true };

  it('waits for nobody on a new disk, or after one that was closed, checkpointed or not', async () => {
    for (const [i, all] of [false, true, false].entries()) {
      const disk = await writer(i);
      await write(disk, 0, block(i + 1));
      if (all) await disk.checkpoint();
      await disk.close();
    }
    expect(clock.slept).toEqual([]);
  });

  it('waits for one that was not, also when its claim has left the log', async () => {
    const first = await writer(1, { leaseMs: 3000 });
    await write(first, 0, block(1), true);
    await first.checkpoint();
    await first.checkpoint();
    await first.close(ended);
    const second = await writer(2);
    expect(clock.slept).toEqual([waitFor(3000)]);
    await second.close();
  });

  it('waits for the longest lease of those that may live, and no longer than they do', async () => {
    await (await writer(1, { leaseMs: 9000 })).close(ended);
    await (await writer(2, { leaseMs: 1000 })).close(ended);
    clock.slept = [];
    await (await writer(3, { leaseMs: 1000 })).close();
    expect(clock.slept).toEqual([waitFor(9000)]);
    await (await writer(4, { leaseMs: 1000 })).close(ended);
    clock.slept = [];
    await (await writer(5)).close();
    expect(clock.slept).toEqual([waitFor(1000)]);
  });

  it('does not wait when told that the one before is dead, or when that had no cache', async () => {
    await (await writer(1)).close(ended);
    await (await writer(2, { assumeDead: true })).close(ended);
    await (await writer(3, { assumeDead: true, writeCache: false })).close(ended);
    await (await writer(4, { leaseMs: 0 })).close(ended);
    await (await writer(5)).close();
    expect(clock.slept).toEqual([]);
  });

  it('waits for a process that may live, and not for one of this host that is gone', async () => {
    const restartFile = join(dir, 'restart');
    await (await writer(1, { restartFile })).close(ended);
    await (await writer(2, { restartFile })).close(ended);
    expect(clock.slept).toEqual([waitFor(LEASE)]);
    // As if it had been another process, which has ended.
    const child = spawn('true');
    const mark = processMark().split(' ');
    mark[2] = String(child.pid);
    await once(child, 'exit');
    for (const path of [restartFile, `${restartFile}.2`]) {
      const bytes = readFileSync(path, 'latin1');
      writeFileSync(path, bytes.replace(processMark(), mark.join(' ')), 'latin1');
    }
    clock.slept = [];
    await (await writer(3, { restartFile })).close();
    expect(clock.slept).toEqual([]);
  });

  it('is told when somebody else has come meanwhile', async () => {
    await (await writer(1)).close(ended);
    let next: Promise<S3Disk> | undefined;
    clock.sleep = async (ms) => {
      clock.pass(ms);
      next ??= open(bucket.connect(3), { leaseMs: LEASE, assumeDead: true });
      await next;
    };
    expect(await causeOf(() => writer(2))).toBe('ERR_TCMU_S3_FENCED');
    await (await next)?.close();
  });
});

describe('a process', () => {
  it('is not gone while it lives, nor known to be elsewhere; a PID used again is another one', () => {
    const [boot, namespace, pid, start] = processMark().split(' ');
    expect(isGone(processMark())).toBe(false);
    expect(isGone([boot, namespace, pid, `${start}1`].join(' '))).toBe(true);
    expect(isGone(['other', namespace, pid, `${start}1`].join(' '))).toBe(false);
    expect(isGone([boot, 'pid:[1]', pid, `${start}1`].join(' '))).toBe(false);
    expect(isGone('')).toBe(false);
    expect(isGone(undefined)).toBe(false);
  });
});
