// SPDX-License-Identifier: Apache-2.0
/**
 * Crashes: whatever request the writer dies at, nothing flushed is lost, and the disk holds a prefix of what was written.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createDisk, S3Disk } from '../src/index.js';
import type { ObjectStore } from '../src/object-store.js';
import { bucketRequest } from './support/bucket.js';
import { CutStore } from './support/cut-store.js';
import { drive, readImage, requestsTo } from './support/drive.js';
import { type Fault, FaultProxy } from './support/fault-proxy.js';
import { MemoryServer } from './support/memory-server.js';
import { type HistoryOptions, readVersions, recoveredPrefix } from './support/model.js';
import { randomNumbers } from './support/random.js';
import { openBucket } from './support/servers.js';

const blocks = 256;
const size = blocks * 4096;
const bucket = 'crash';
/** Small, so that a short history seals, destages and collects many times. */
const geometry = {
  // No write is larger: only within one segment is it all or nothing.
  segmentSize: 128 * 1024,
  dirtyLimit: 512 * 1024,
  logLimit: 256 * 1024,
  cacheSize: 256 * 1024,
  // They are: nothing goes on acknowledging, so that nobody need wait for a lease.
  assumeDead: true,
};

let server: MemoryServer;

beforeAll(async () => {
  server = await new MemoryServer().start();
  await bucketRequest(server, bucket, 'PUT');
});
afterAll(() => server.stop());

/** A life: opened, written to, cut at some request. @returns what must hold now */
async function liveAndDie(
  objects: ObjectStore,
  prefix: string,
  cutAfter: number,
  plan: HistoryOptions,
  random: () => number,
): Promise<{ history: HistoryOptions; flushed: number; issued: number }> {
  const start = plan.after ?? 0;
  const crash = { history: plan, flushed: start, issued: start };
  let died = () => {};
  const death = new Promise<void>((resolve) => {
    died = resolve;
  });
  const cut = new CutStore(objects, cutAfter, random, died);
  const life = async () => {
    const disk = await S3Disk.open(cut, prefix, geometry);
    await drive(disk, {
      history: plan,
      onIssued: (seq) => {
        crash.issued = seq;
      },
      onFlushed: (seq) => {
        if (!cut.dead) crash.flushed = Math.max(crash.flushed, seq);
      },
    });
  };
  let failure: unknown;
  const lived = life().catch((error: unknown) => {
    failure = error;
  });
  await Promise.race([death, lived]);
  if (!cut.dead) throw failure ?? new Error('it ended alive');
  // Requests of the dead may come late, or not.
  if (random() < 0.5) await cut.settled();
  return crash;
}

describe('a writer that dies', () => {
  it.each([1, 2, 3, 4])('at any of 50 requests leaves a prefix (seed %i)', async (seed) => {
    const random = randomNumbers(seed);
    const objects = await openBucket(server, bucket);
    const prefix = `cut/${seed}`;
    await createDisk(requestsTo(objects), prefix, { size, chunkSize: 64 * 1024 });
    let before: Uint32Array = new Uint32Array(blocks);
    let after = 0;
    for (let life = 0; life < 50; life++) {
      const cutAfter = Math.floor(random() * 80);
      const plan = { seed: seed * 1000 + life, blocks, after };
      const crash = await liveAndDie(objects, prefix, cutAfter, plan, random);
      // Each life begins with what the last one left, so damage that shows late is seen too.
      const disk = await S3Disk.open(objects, prefix, geometry);
      const versions = readVersions(await readImage(disk));
      expect(recoveredPrefix(versions, { ...crash, before })).toBeGreaterThanOrEqual(after);
      await disk.close();
      before = versions;
      after = crash.issued;
    }
    await objects.close();
  });
});

describe('a bad network', () => {
  const faults: readonly Fault[] = [
    { kind: 'delay', ms: 20 },
    { kind: 'cut', when: 'before' },
    { kind: 'cut', when: 'after' },
    { kind: 'status', status: 500, code: 'InternalError', when: 'before' },
    { kind: 'status', status: 503, code: 'SlowDown', when: 'before' },
    { kind: 'status', status: 503, code: 'SlowDown', when: 'after' },
    { kind: 'status', status: 502, code: '', when: 'after' },
    { kind: 'truncate', bytes: 100 },
    { kind: 'duplicate' },
    { kind: 'late', ms: 30 },
    { kind: 'hang', when: 'before' },
    { kind: 'hang', when: 'after' },
  ];

  it.each([1, 2])(
    'spoils nothing, and a crash in it loses nothing flushed (seed %i)',
    async (seed) => {
      const random = randomNumbers(seed);
      const proxy = await new FaultProxy(server.endpoint).start();
      const far = await openBucket(server, bucket, {
        endpoint: proxy.endpoint,
        requestTimeoutMs: 100,
      });
      const near = await openBucket(server, bucket);
      const prefix = `network/${seed}`;
      await createDisk(requestsTo(near), prefix, { size, chunkSize: 64 * 1024 });
      proxy.plan = () =>
        random() < 0.15 ? faults[Math.floor(random() * faults.length)] : undefined;
      let before: Uint32Array = new Uint32Array(blocks);
      let after = 0;
      for (let life = 0; life < 6; life++) {
        const plan = { seed: seed * 1000 + life, blocks, after };
        const crash = await liveAndDie(far, prefix, 60 + Math.floor(random() * 150), plan, random);
        const disk = await S3Disk.open(near, prefix, geometry);
        const versions = readVersions(await readImage(disk));
        expect(recoveredPrefix(versions, { ...crash, before })).toBeGreaterThanOrEqual(after);
        await disk.close();
        before = versions;
        after = crash.issued;
      }
      for (const { kind } of faults) expect(proxy.faults.get(kind) ?? 0).toBeGreaterThan(0);
      await Promise.all([far.close(), near.close()]);
      await proxy.stop();
    },
  );
});
