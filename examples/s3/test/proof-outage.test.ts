// SPDX-License-Identifier: Apache-2.0
/** What a disk does while its bucket fails: it serves what it can, waits where that may help, and promises nothing that isn't so. */
import { SenseError } from 'tcmu/scsi';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { createDisk, type OpenOptions, S3Disk } from '../src/index.js';
import type { ObjectStore } from '../src/object-store.js';
import { bucketRequest } from './support/bucket.js';
import { carryOut, readImage, requestsTo } from './support/drive.js';
import { FaultProxy } from './support/fault-proxy.js';
import { MemoryServer } from './support/memory-server.js';
import { DiskModel, readVersions, type Step } from './support/model.js';
import { openBucket } from './support/servers.js';

const bucket = 'outage';
const blocks = 1024;
const token = 'session';
/** A minute of the world is half a second here. */
const patienceMs = 500;
const geometry: OpenOptions = {
  patienceMs,
  segmentSize: 256 * 1024,
  dirtyLimit: 1024 * 1024,
  writeBackMs: Number.POSITIVE_INFINITY,
  watchMs: 0,
};

let server: MemoryServer;
let proxy: FaultProxy;
let objects: ObjectStore;
let disk: S3Disk;
let model: DiskModel;
let seq: number;
let log: string[];

beforeEach(async () => {
  server = await new MemoryServer().start();
  await bucketRequest(server, bucket, 'PUT');
  proxy = await new FaultProxy(server.endpoint).start();
  objects = await openBucket(server, bucket, {
    endpoint: proxy.endpoint,
    sessionToken: token,
    requestTimeoutMs: 100,
  });
  await createDisk(requestsTo(objects), 'disk', { size: blocks * 4096 });
  log = [];
  disk = await S3Disk.open(objects, 'disk', {
    ...geometry,
    onLog: (level, message) => log.push(`${level} ${message}`),
  });
  model = new DiskModel(blocks);
  seq = 0;
});

afterEach(async () => {
  await disk.close({ discard: true });
  await objects.close();
  await proxy.stop();
  await server.stop();
});

/** The same disk with another patience. */
async function reopen(patience: number): Promise<void> {
  await disk.close();
  disk = await S3Disk.open(objects, 'disk', { ...geometry, patienceMs: patience });
}

/** Writes some blocks; the model follows what was acknowledged. */
async function write(first: number, count: number): Promise<void> {
  const step: Step = { seq: ++seq, kind: 'write', first, count };
  await carryOut(disk, step);
  model.apply(step);
}

/** Codes of the sense data (SPC-5, additional sense codes) that a call fails with, and of the error behind it. */
async function failure(call: () => Promise<unknown>): Promise<string> {
  try {
    await call();
  } catch (error) {
    if (!SenseError.is(error)) throw error;
    const { key, asc, ascq } = error;
    const cause = error.cause as { code?: string } | undefined;
    return `${key.toString(16)}/${asc.toString(16)}/${ascq.toString(16)} ${cause?.code}`;
  }
  throw new Error('it succeeded');
}

async function expectImage(of: S3Disk = disk): Promise<void> {
  expect(readVersions(await readImage(of))).toEqual(model.versions);
}

/** A flush succeeds when the next attempt comes: the waits between them have grown beyond this disk's patience. */
async function flushedAtLast(): Promise<void> {
  const flushed = () =>
    disk.flush().then(
      () => true,
      () => false,
    );
  await expect.poll(flushed).toBe(true);
}

/** The disk of another process, which sees only what is in the bucket. */
async function expectDurable(): Promise<void> {
  const other = await S3Disk.open(objects, 'disk', { ...geometry, mode: 'follow' });
  await expectImage(other);
  await other.close();
}

const becomingReady = '2/4/1 ERR_TCMU_S3_UNREACHABLE';
const intervention = /^2\/4\/3 /;

describe('an outage', () => {
  it('that ends in time is waited for', async () => {
    await reopen(60_000);
    await write(0, 16);
    proxy.outage();
    const flush = disk.flush();
    setTimeout(() => proxy.restore(), 2 * patienceMs);
    await flush;
    await expectDurable();
    expect(disk.statistics().retries).toBeGreaterThan(0);
  });

  it('that goes on: what is in memory is served, flushes fail, nothing is lost', async () => {
    await write(0, 16);
    await disk.flush();
    proxy.outage();
    await write(8, 32);
    await expectImage();
    expect(await failure(() => disk.flush())).toBe(becomingReady);
    await write(100, 16);
    expect(await failure(() => disk.flush())).toBe(becomingReady);
    await expectImage();
    expect(disk.statistics().outageMs).toBeGreaterThan(0);
    proxy.restore();
    await flushedAtLast();
    await expectDurable();
    await expect.poll(() => disk.statistics().outageMs).toBe(0);
  });

  it('fills the dirty buffer to its bound; a write beyond waits, then fails; after it all is well', async () => {
    proxy.outage();
    let taken = 0;
    const refused = await failure(async () => {
      for (; taken < 100; taken++) await write((taken * 16) % blocks, 16);
    });
    expect(refused).toBe(becomingReady);
    // 64 KiB each: what was acknowledged is what fits, and a segment on its way.
    expect(taken).toBeGreaterThanOrEqual(12);
    expect(taken).toBeLessThanOrEqual(16 + 4);
    expect(disk.statistics().dirtyBytes).toBeLessThanOrEqual(1.25 * 1024 * 1024);
    await expectImage();
    proxy.restore();
    await flushedAtLast();
    await write(0, 64);
    await disk.flush();
    await expectDurable();
  });

  it('is told once, and its end too', async () => {
    await write(0, 1);
    proxy.outage();
    expect(await failure(() => disk.flush())).toBe(becomingReady);
    await expect.poll(() => log.filter((line) => line.startsWith('warning')).length).toBe(1);
    expect(log.join('\n')).toContain(bucket);
    proxy.restore();
    await expect.poll(() => log.some((line) => line.includes('answers again'))).toBe(true);
  });
});

describe('a server that', () => {
  it('is slow, and asks for less, gets there', async () => {
    let n = 0;
    proxy.plan = ({ method }) => {
      if (method === 'PUT' && n++ % 2 === 0) {
        return { kind: 'status', status: 503, code: 'SlowDown', when: 'before' };
      }
      return { kind: 'delay', ms: 20 };
    };
    for (let round = 0; round < 4; round++) {
      await write(round * 64, 64);
      await disk.flush();
    }
    expect(disk.statistics().throttled).toBeGreaterThanOrEqual(4);
    await expectDurable();
  });

  it('calls the credentials expired is asked again until they are renewed', async () => {
    await reopen(60_000);
    await write(0, 16);
    server.expiredTokens.add(token);
    const flush = disk.flush();
    setTimeout(() => server.expiredTokens.clear(), patienceMs);
    await flush;
    await expectDurable();
  });

  it('forbids everything is an error at once, and works again when it is allowed', async () => {
    await write(0, 16);
    server.denied = true;
    expect(await failure(() => disk.flush())).toMatch(intervention);
    await expectImage();
    server.denied = false;
    await flushedAtLast();
    await expectDurable();
  });

  it('has lost the bucket is an error at once that names it', async () => {
    await write(0, 16);
    await disk.flush();
    const lost = server.objects(bucket);
    server.buckets.delete(bucket);
    await write(16, 16);
    expect(await failure(() => disk.flush())).toMatch(intervention);
    await expect.poll(() => log.join('\n')).toContain(bucket);
    server.buckets.set(bucket, lost);
    await flushedAtLast();
    await expectDurable();
  });

  it('has another clock is followed', async () => {
    server.clockOffset = 2 * 60 * 60_000;
    await write(0, 16);
    await disk.flush();
    server.clockOffset = -2 * 60 * 60_000;
    await write(16, 16);
    await disk.flush();
    await expectDurable();
  });
});

describe('a writer that was replaced while it was idle', () => {
  it('fails its next flush of data, and all after', async () => {
    await write(0, 16);
    await disk.flush();
    const newer = await S3Disk.open(objects, 'disk', geometry);
    await carryOut(disk, { seq: 1000, kind: 'write', first: 0, count: 4 }).catch(() => {});
    for (let attempt = 0; attempt < 3; attempt++) {
      expect(await failure(() => disk.flush())).toBe('2/4/3 ERR_TCMU_S3_FENCED');
      const step: Step = { seq: 1001 + attempt, kind: 'write', first: 0, count: 4 };
      expect(await failure(() => carryOut(disk, step))).toBe('2/4/3 ERR_TCMU_S3_FENCED');
    }
    await expectImage(newer);
    await newer.close();
    await expectDurable();
  });
});

describe('a writer at work', () => {
  it('is replaced though every request takes a while', async () => {
    await reopen(25_000);
    let flushed = 0;
    let failed: unknown;
    const working = (async () => {
      while (failed === undefined) {
        await write(seq % blocks, 1);
        const at = seq;
        disk.flush().then(
          () => {
            flushed = Math.max(flushed, at);
          },
          (error: unknown) => {
            failed ??= error;
          },
        );
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
    })().catch((error: unknown) => {
      failed ??= error;
    });
    proxy.plan = () => ({ kind: 'delay', ms: 20 });
    await expect.poll(() => flushed).toBeGreaterThan(20);
    const newer = await S3Disk.open(objects, 'disk', { ...geometry, patienceMs: 25_000 });
    const before = flushed;
    await working;
    expect(flushed).toBe(before);
    expect((failed as Error).cause).toMatchObject({ code: 'ERR_TCMU_S3_FENCED' });
    proxy.plan = () => undefined;
    const versions = readVersions(await readImage(newer));
    for (let i = 0; i < flushed; i++) expect(versions[i % blocks]).toBeGreaterThanOrEqual(i + 1);
    await newer.close();
  });
});

describe('bytes spoilt on their way', () => {
  it('are never served', async () => {
    await write(0, 256);
    await disk.flush();
    await disk.checkpoint();
    const cold = await S3Disk.open(objects, 'disk', { ...geometry, mode: 'follow' });
    proxy.plan = ({ method, path }) =>
      method === 'GET' && path.includes('/c/') ? { kind: 'corrupt', offset: 4321 } : undefined;
    // MEDIUM ERROR, UNRECOVERED READ ERROR
    expect(await failure(() => readImage(cold))).toBe('3/11/0 ERR_TCMU_S3_DAMAGED');
    proxy.plan = () => undefined;
    await expectImage(cold);
    await cold.close();
  });
});
