// SPDX-License-Identifier: Apache-2.0
/** The client against radosgw and against the server in memory: one contract, the same answers from both. */
import { randomBytes } from 'node:crypto';
import { crc32 } from 'node:zlib';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { type ObjectStore, ObjectStoreError } from '../src/object-store.js';
import { bucketRequest } from './support/bucket.js';
import {
  available,
  newBucket,
  openBucket,
  serverKinds,
  startServer,
  type TestServer,
} from './support/servers.js';

/** What a call was refused with. */
async function failure(
  call: Promise<unknown> | (() => Promise<unknown>),
): Promise<ObjectStoreError> {
  const error = await (typeof call === 'function' ? call() : call).then(
    () => new Error('it succeeded'),
    (reason: unknown) => reason,
  );
  if (error instanceof ObjectStoreError) return error;
  throw error;
}

async function keysOf(store: ObjectStore, prefix: string, options = {}): Promise<string[]> {
  const keys: string[] = [];
  for await (const { key } of store.list(prefix, options)) keys.push(key);
  return keys;
}

describe.each(serverKinds)('S3Store on %s', (kind) => {
  describe.skipIf(!available(kind))('is an object store', () => {
    let server: TestServer;
    let bucket: string;
    let store: ObjectStore;

    beforeAll(async () => {
      server = await startServer(kind);
    });
    afterAll(() => server.stop());
    beforeEach(async () => {
      bucket = await newBucket(server);
      store = await openBucket(server, bucket);
    });
    afterEach(() => store.close());

    it('keeps what it is given: no bytes, one part, many parts, some of each size', async () => {
      const large = randomBytes(3 * 1024 * 1024 + 17);
      const many = Array.from({ length: 300 }, () => randomBytes(4096));
      const mixed = [randomBytes(100), large, randomBytes(70_000), randomBytes(1), randomBytes(0)];
      for (const [name, parts] of Object.entries({ none: [], large: [large], many, mixed })) {
        const whole = Buffer.concat(parts);
        const etag = await store.put(`d/${name}`, parts, { crc32: crc32(whole) });
        const got = await store.get(`d/${name}`);
        expect(got.body.equals(whole)).toBe(true);
        expect(got).toMatchObject({ size: whole.length, etag });
        expect(etag).toMatch(/^[0-9a-f]{32}$/);
        expect(Math.abs(got.modified - Date.now())).toBeLessThan(60_000);
        expect(await store.head(`d/${name}`)).toEqual({
          size: whole.length,
          etag,
          modified: got.modified,
        });
      }
    });

    it('reads ranges, cut at the end of the object', async () => {
      const whole = randomBytes(10_000);
      await store.put('r', [whole]);
      for (const [start, end] of [
        [0, 1],
        [0, 10_000],
        [4096, 8192],
        [9999, 10_000],
        [9000, 20_000],
      ] as const) {
        const got = await store.get('r', { range: { start, end } });
        expect(got.body.equals(whole.subarray(start, end))).toBe(true);
        expect(got.size).toBe(10_000);
      }
      const behind = await failure(store.get('r', { range: { start: 10_000, end: 10_001 } }));
      expect(behind).toMatchObject({ kind: 'bad-request', ambiguous: false, status: 416 });
    });

    it('puts a body where it is told to, if there is room', async () => {
      const bytes = randomBytes(70_000);
      await store.put('d/whole', [bytes]);
      const into = Buffer.alloc(80_000, 0xee);
      const { body } = await store.get('d/whole', { range: { start: 1, end: 65_537 }, into });
      expect(body.equals(bytes.subarray(1, 65_537))).toBe(true);
      expect([body.buffer, body.byteOffset]).toEqual([into.buffer, into.byteOffset]);
      expect(into.subarray(65_536).every((byte) => byte === 0xee)).toBe(true);
      into.fill(0xee);
      const whole = await store.get('d/whole', { into: into.subarray(0, 1000) });
      expect(whole.body.equals(bytes)).toBe(true);
      expect(into.every((byte) => byte === 0xee)).toBe(true);
    });

    it('stores under If-None-Match only where nothing is', async () => {
      await store.put('once', [Buffer.from('first')], { ifNoneMatch: '*' });
      const second = await failure(
        store.put('once', [Buffer.from('second')], { ifNoneMatch: '*' }),
      );
      expect(second).toMatchObject({
        kind: 'precondition',
        code: 'ERR_TCMU_S3_PRECONDITION',
        ambiguous: false,
        status: 412,
      });
      expect(String((await store.get('once')).body)).toBe('first');
      await store.delete(['once']);
      await store.put('once', [Buffer.from('third')], { ifNoneMatch: '*' });
    });

    it('lets one of many racing writers win', async () => {
      for (let round = 0; round < 5; round++) {
        const outcomes = await Promise.all(
          Array.from({ length: 16 }, (_, writer) =>
            store
              .put(`race/${round}`, [Buffer.from(`${writer}`.padEnd(5000))], { ifNoneMatch: '*' })
              .then(
                () => writer,
                (error: ObjectStoreError) => error.kind,
              ),
          ),
        );
        const winners = outcomes.filter((outcome) => typeof outcome === 'number');
        expect(winners).toHaveLength(1);
        expect(outcomes.filter((outcome) => outcome === 'precondition')).toHaveLength(15);
        const { body } = await store.get(`race/${round}`);
        expect(Number(String(body))).toBe(winners[0]);
      }
    });

    it('reads and writes under If-Match only what has that tag', async () => {
      const etag = await store.put('m', [Buffer.from('one')]);
      expect(String((await store.get('m', { ifMatch: etag })).body)).toBe('one');
      const next = await store.put('m', [Buffer.from('two')], { ifMatch: etag });
      expect(await failure(store.get('m', { ifMatch: etag }))).toMatchObject({
        kind: 'precondition',
      });
      const late = await failure(store.put('m', [Buffer.from('three')], { ifMatch: etag }));
      expect(late.kind).toBe('precondition');
      expect(await store.head('m')).toMatchObject({ etag: next, size: 3 });
    });

    it('lists in the order of the keys, in pages, from a key on, up to a limit', async () => {
      const keys = Array.from({ length: 1005 }, (_, n) => `p/${String(n).padStart(5, '0')}`);
      const others = ['a', 'p', 'p-', 'p0', 'q/1'];
      const queue = [...keys, ...others];
      const work = async () => {
        for (let key = queue.pop(); key !== undefined; key = queue.pop()) {
          await store.put(key, [Buffer.from('x')]);
        }
      };
      await Promise.all(Array.from({ length: 16 }, work));
      expect(await keysOf(store, 'p/')).toEqual(keys);
      expect(await keysOf(store, 'p/', { startAfter: 'p/00990' })).toEqual(keys.slice(991));
      expect(await keysOf(store, 'p/', { limit: 1002 })).toEqual(keys.slice(0, 1002));
      expect(await keysOf(store, 'p/', { startAfter: 'p/00007', limit: 2 })).toEqual(
        keys.slice(8, 10),
      );
      expect(await keysOf(store, 'p')).toEqual(['p', 'p-', ...keys, 'p0']);
      expect(await keysOf(store, 'nothing/')).toEqual([]);
      for await (const object of store.list('a')) {
        const { size, etag, modified } = await store.head('a');
        expect(object).toMatchObject({ key: 'a', size, etag });
        // An HTTP date has whole seconds.
        expect(Math.floor(object.modified / 1000)).toBe(modified / 1000);
      }
      await store.delete(keys);
      expect(await keysOf(store, '')).toEqual([...others].sort());
    });

    it('deletes what is there and what is not', async () => {
      await store.put('x', [Buffer.from('x')]);
      await store.delete(['x']);
      await store.delete(['x']);
      await store.delete([]);
      await store.put('y', [Buffer.from('y')]);
      await store.delete(['x', 'y', 'z']);
      expect(await keysOf(store, '')).toEqual([]);
    });

    it('tells a missing object from a missing bucket', async () => {
      for (const call of [() => store.get('gone'), () => store.head('gone')]) {
        expect(await failure(call)).toMatchObject({ kind: 'not-found', status: 404 });
      }
      await bucketRequest(server, bucket, 'DELETE');
      for (const call of [
        () => store.get('gone'),
        () => store.head('gone'),
        () => store.put('gone', [Buffer.from('x')], { ifNoneMatch: '*' }),
        () => keysOf(store, ''),
      ]) {
        const error = await failure(call);
        expect(error).toMatchObject({ kind: 'no-bucket', code: 'ERR_TCMU_S3_NO_BUCKET' });
        expect(error.message).toContain(bucket);
      }
    });

    it('tells wrong keys', async () => {
      const stranger = await openBucket({ ...server, accessKeyId: 'STRANGER' }, bucket);
      const calls = [
        () => stranger.get('x'),
        () => stranger.head('x'),
        () => stranger.put('x', [Buffer.alloc(1)]),
      ];
      for (const call of calls) {
        expect(await failure(call)).toMatchObject({ kind: 'forbidden', status: 403 });
      }
      await stranger.close();
    });
  });
});
