// SPDX-License-Identifier: Apache-2.0
/** What the client makes of networks and servers that fail: the kind, and whether a change may have happened. */
import { createServer as createHttpServer } from 'node:http';
import { createServer, type Server } from 'node:net';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { connect } from '../src/client/index.js';
import { checkDisk, createDisk, deleteDisk, readingParts } from '../src/engine/admin.js';
import { Requests, systemClock } from '../src/engine/requests.js';
import { type ObjectStore, ObjectStoreError } from '../src/object-store.js';
import { S3Disk } from '../src/s3-disk.js';
import { bucketRequest } from './support/bucket.js';
import { readAll, write } from './support/disk.js';
import { type Fault, FaultProxy } from './support/fault-proxy.js';
import { MemoryServer } from './support/memory-server.js';
import { openBucket, reaching } from './support/servers.js';

const bucket = 'faults';
let server: MemoryServer;
let proxy: FaultProxy;
let store: ObjectStore;

beforeEach(async () => {
  server = await new MemoryServer().start();
  await bucketRequest(server, bucket, 'PUT');
  proxy = await new FaultProxy(server.endpoint).start();
  store = await openBucket(server, bucket, { endpoint: proxy.endpoint, requestTimeoutMs: 200 });
});

afterEach(async () => {
  await store.close();
  await proxy.stop();
  await server.stop();
});

function once(fault: Fault): void {
  proxy.plan = () => {
    proxy.plan = () => undefined;
    return fault;
  };
}

async function failure(call: () => Promise<unknown>): Promise<ObjectStoreError> {
  try {
    await call();
  } catch (error) {
    if (error instanceof ObjectStoreError) return error;
    throw error;
  }
  throw new Error('it succeeded');
}

const put = (key: string) => store.put(key, [Buffer.from('body')], { ifNoneMatch: '*' });

describe('a PUT whose answer does not come', () => {
  it.each<[Fault, string, boolean]>([
    [{ kind: 'cut', when: 'before' }, 'outage', false],
    [{ kind: 'cut', when: 'after' }, 'outage', true],
    [{ kind: 'hang', when: 'before' }, 'outage', false],
    [{ kind: 'hang', when: 'after' }, 'outage', true],
    [{ kind: 'status', status: 500, code: 'InternalError', when: 'before' }, 'outage', false],
    [{ kind: 'status', status: 502, code: '', when: 'after' }, 'outage', true],
    [{ kind: 'status', status: 503, code: 'SlowDown', when: 'before' }, 'throttled', false],
    [{ kind: 'status', status: 429, code: '', when: 'before' }, 'throttled', false],
    [{ kind: 'status', status: 400, code: 'RequestTimeout', when: 'before' }, 'outage', false],
    // Beside another one of the same key: nobody knows what will be there.
    [
      { kind: 'status', status: 409, code: 'ConditionalRequestConflict', when: 'before' },
      'outage',
      false,
    ],
  ])('%j is ambiguous, and not repeated', async (fault, kind, carriedOut) => {
    once(fault);
    expect(await failure(() => put('k'))).toMatchObject({ kind, ambiguous: true });
    expect(proxy.total).toBe(1);
    expect(server.objects(bucket).has('k')).toBe(carriedOut);
  });

  it('is told from one that was refused', async () => {
    once({ kind: 'status', status: 403, code: 'AccessDenied', when: 'before' });
    expect(await failure(() => put('k'))).toMatchObject({ kind: 'forbidden', ambiguous: false });
    once({ kind: 'status', status: 501, code: 'NotImplemented', when: 'before' });
    expect(await failure(() => put('k'))).toMatchObject({ kind: 'bad-request', ambiguous: false });
  });

  it('sent twice by the network, is a failed precondition of its own making', async () => {
    once({ kind: 'duplicate' });
    expect(await failure(() => put('k'))).toMatchObject({ kind: 'precondition' });
    expect(server.objects(bucket).has('k')).toBe(true);
  });
});

describe('a GET', () => {
  beforeEach(() => put('k'));

  it.each<Fault>([
    { kind: 'cut', when: 'before' },
    { kind: 'cut', when: 'after' },
    { kind: 'hang', when: 'after' },
    { kind: 'truncate', bytes: 2 },
    { kind: 'status', status: 500, code: 'InternalError', when: 'before' },
  ])('%j is an outage, which nothing is unclear about', async (fault) => {
    once(fault);
    expect(await failure(() => store.get('k'))).toMatchObject({
      kind: 'outage',
      code: 'ERR_TCMU_S3_OUTAGE',
      ambiguous: false,
    });
    expect(String((await store.get('k')).body)).toBe('body');
  });
});

describe('a server that is not there', () => {
  it('is an outage in which nothing was sent', async () => {
    const there = reached();
    const { endpoint } = there;
    await server.stop();
    const direct = await openBucket(there, bucket);
    const error = await failure(() => direct.put('k', [Buffer.from('x')]));
    expect(error).toMatchObject({ kind: 'outage', ambiguous: false, errno: 'ECONNREFUSED' });
    expect(error.message).toContain(endpoint);
    await direct.close();
    server = await new MemoryServer().start();
  });

  it('and comes back, is used again', async () => {
    await put('k');
    proxy.outage();
    expect(await failure(() => store.get('k'))).toMatchObject({ kind: 'outage' });
    proxy.restore();
    expect(String((await store.get('k')).body)).toBe('body');
  });
});

describe('a call', () => {
  it('ends at once when its signal is aborted, before and while it runs', async () => {
    expect(await failure(() => store.get('k', { signal: AbortSignal.abort() }))).toMatchObject({
      kind: 'aborted',
      ambiguous: false,
    });
    expect(proxy.total).toBe(0);
    const stop = new AbortController();
    once({ kind: 'hang', when: 'before' });
    const call = failure(() => store.put('k', [Buffer.from('x')], { signal: stop.signal }));
    while (proxy.total === 0) await new Promise((resolve) => setImmediate(resolve));
    stop.abort();
    expect(await call).toMatchObject({ kind: 'aborted', ambiguous: true });
    await put('other');
  });

  it('ends when the store is closed, and after it', async () => {
    proxy.plan = () => ({ kind: 'hang', when: 'before' });
    const calls = [failure(() => store.get('k')), failure(() => put('k'))];
    while (proxy.total < 2) await new Promise((resolve) => setImmediate(resolve));
    await store.close();
    for (const call of calls) expect(await call).toMatchObject({ kind: 'aborted' });
    expect(await failure(() => store.get('k'))).toMatchObject({ kind: 'aborted' });
  });
});

describe('an answer that is no S3', () => {
  let raw: Server | undefined;

  async function answering(text: string): Promise<ObjectStore> {
    const listening = createServer((socket) => {
      socket.on('error', () => {}).once('data', () => socket.end(text));
    });
    raw = listening;
    await new Promise<void>((resolve) => listening.listen(0, '127.0.0.1', resolve));
    const { port } = listening.address() as { port: number };
    const options = reaching({ ...reached(), endpoint: `http://127.0.0.1:${port}` });
    return (await connect(`s3://${bucket}/x`, options)).store;
  }

  afterEach(() => raw?.close());

  it.each<[string, string]>([
    ['HTTP/1.1 200 OK\r\ncontent-length: 999999999999\r\n\r\nx', 'outage'],
    ['HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello', 'outage'],
    [
      'HTTP/1.1 206 Partial\r\ncontent-length: 1\r\nlast-modified: Mon, 23 Nov 2026 00:00:00 GMT\r\ncontent-range: bytes 0-0/*\r\n\r\nh',
      'outage',
    ],
    [
      'HTTP/1.1 206 Partial\r\ncontent-length: 1\r\nlast-modified: Mon, 23 Nov 2026 00:00:00 GMT\r\ncontent-range: bytes 0-3/9\r\n\r\nh',
      'outage',
    ],
    // Other bytes than were asked for.
    [
      'HTTP/1.1 206 Partial\r\ncontent-length: 4\r\nlast-modified: Mon, 23 Nov 2026 00:00:00 GMT\r\ncontent-range: bytes 4-7/9\r\n\r\nhell',
      'outage',
    ],
    [
      'HTTP/1.1 200 OK\r\ncontent-length: 4\r\ncontent-encoding: gzip\r\nlast-modified: Mon, 23 Nov 2026 00:00:00 GMT\r\n\r\nhell',
      'bad-request',
    ],
    // Ends before its last chunk.
    [
      'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nlast-modified: Mon, 23 Nov 2026 00:00:00 GMT\r\n\r\n4\r\nhell\r\n',
      'outage',
    ],
    ['SSH-2.0-OpenSSH_9.2\r\n', 'outage'],
    ['HTTP/1.1 302 Found\r\nlocation: /login\r\ncontent-length: 0\r\n\r\n', 'bad-request'],
    ['HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n??', 'not-found'],
    // It looks like the range that was asked for.
    [
      'HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\nlast-modified: Mon, 23 Nov 2026 00:00:00 GMT\r\ncontent-range: bytes 0-3/9\r\n\r\nhell',
      'not-found',
    ],
  ])('%j', async (text, kind) => {
    const strange = await answering(text);
    const options = { range: { start: 0, end: 4 }, into: Buffer.alloc(4096) };
    const passedOn: string[] = [];
    const onProgress = (body: Buffer, bytes: number) => {
      passedOn.push(String(body.subarray(0, bytes)));
    };
    const error = await failure(() => strange.get('k', { ...options, onProgress }));
    expect(error.kind).toBe(kind);
    // Nothing of it may be used.
    expect(passedOn).toEqual([]);
    await strange.close();
  });

  it.each([true, false])('tells how far it is, also when it breaks off then: %j', async (isCut) => {
    const head =
      'HTTP/1.1 206 Partial\r\ncontent-length: 9\r\nlast-modified: Mon, 23 Nov 2026 00:00:00 GMT\r\ncontent-range: bytes 3-11/20\r\n\r\n';
    let goOn = () => {};
    const listening = createServer((socket) => {
      socket.on('error', () => {}).once('data', () => socket.write(`${head}hell`));
      goOn = () => socket.end(isCut ? '-' : '-here');
    });
    raw = listening;
    await new Promise<void>((resolve) => listening.listen(0, '127.0.0.1', resolve));
    const { port } = listening.address() as { port: number };
    const options = reaching({ ...reached(), endpoint: `http://127.0.0.1:${port}` });
    const { store: slow } = await connect(`s3://${bucket}/x`, options);
    const seen: string[] = [];
    const into = Buffer.alloc(4096);
    const got = slow.get('k', {
      range: { start: 3, end: 12 },
      into,
      onProgress: (body, bytes) => {
        expect(body.buffer).toBe(into.buffer);
        seen.push(String(body.subarray(0, bytes)));
        goOn();
      },
    });
    if (isCut) await expect(got).rejects.toMatchObject({ kind: 'outage' });
    else expect(String((await got).body)).toBe('hell-here');
    expect(seen).toEqual(['hell', isCut ? 'hell-' : 'hell-here']);
    await slow.close();
  });

  it.each<[what: string, text: string]>([
    [
      'without a length',
      'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nlast-modified: Mon, 23 Nov 2026 00:00:00 GMT\r\n\r\n9\r\nhell-here\r\n0\r\n\r\n',
    ],
    [
      'of a part, without a length',
      'HTTP/1.1 206 Partial\r\ntransfer-encoding: chunked\r\ncontent-range: bytes 0-3/9\r\nlast-modified: Mon, 23 Nov 2026 00:00:00 GMT\r\n\r\n4\r\nhell\r\n0\r\n\r\n',
    ],
    [
      'of all, with a weak ETag, and a coding that is none',
      'HTTP/1.1 200 OK\r\ncontent-length: 9\r\netag: W/"abc-12"\r\ncontent-encoding: identity\r\nlast-modified: Mon, 23 Nov 2026 00:00:00 GMT\r\n\r\nhell-here',
    ],
  ])('%s does all the same', async (_, text) => {
    const strange = await answering(text);
    const { body, size } = await strange.get('k', {
      range: { start: 0, end: 4 },
      into: Buffer.alloc(4096),
    });
    expect([String(body), size]).toEqual(['hell', 9]);
    await strange.close();
  });

  it.each<[what: string, keys: readonly string[], kind: string]>([
    ['out of order', ['p/b', 'p/a'], 'bad-request'],
    ['twice the same', ['p/a', 'p/a'], 'bad-request'],
    ['of other keys', ['q/a'], 'bad-request'],
    ['of keys before the first', ['p/0'], 'bad-request'],
    ['without an end', ['p/a', '…'], 'bad-request'],
    ['that goes on where it was', ['…'], 'outage'],
  ])('is no listing: %s', async (_, keys, kind) => {
    const isTruncated = keys.includes('…');
    const entries = keys
      .filter((key) => key !== '…')
      .map(
        (key) =>
          `<Contents><Key>${key}</Key><Size>1</Size><LastModified>2026-11-23T00:00:00Z</LastModified></Contents>`,
      );
    const xml = `<ListBucketResult><IsTruncated>${isTruncated}</IsTruncated><NextContinuationToken>t</NextContinuationToken>${entries.join('')}</ListBucketResult>`;
    const http = createHttpServer((_request, response) => response.end(xml));
    await new Promise<void>((resolve) => http.listen(0, '127.0.0.1', resolve));
    const { port } = http.address() as { port: number };
    const strange = await openBucket(
      { ...reached(), endpoint: `http://127.0.0.1:${port}` },
      bucket,
    );
    const error = await failure(async () => {
      for await (const { key } of strange.list('p/', { startAfter: 'p/00' }))
        expect(keys).toContain(key);
    });
    expect(error.kind).toBe(kind);
    await strange.close();
    http.closeAllConnections();
    await new Promise((resolve) => http.close(resolve));
  });

  it('is no listing, either', async () => {
    const strange = await answering('HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n<html></html>');
    const error = await failure(async () => {
      for await (const object of strange.list('p')) throw new Error(object.key);
    });
    expect(error.kind).toBe('outage');
    await strange.close();
  });
});

describe('a disk whose every object is refused first, as beside another of its name', () => {
  it('has all of its objects', async () => {
    const tried = new Set<string>();
    proxy.plan = ({ method, path }) => {
      if (method !== 'PUT' || tried.has(path)) return undefined;
      tried.add(path);
      return { kind: 'status', status: 409, code: 'ConditionalRequestConflict', when: 'before' };
    };
    const clock = { ...systemClock, sleep: () => new Promise<void>(setImmediate) };
    const requests = new Requests(store, clock, () => {}, 25_000);
    await createDisk(requests, 'd0', { size: 4 * 1024 * 1024, key: () => Buffer.alloc(32, 1) });
    const options = { key: () => Buffer.alloc(32, 1), clock, watchMs: 0, writeBackMs: 1e9 };
    const disk = await S3Disk.open(store, 'd0', options);
    const bytes = Buffer.alloc(2 * 1024 * 1024, 5);
    await write(disk, 4096, bytes);
    await disk.checkpoint();
    await disk.snapshot('one');
    await disk.close();
    expect(tried.size).toBeGreaterThan(8);
    const again = await S3Disk.open(store, 'd0', options);
    expect((await readAll(again, 4096, bytes.length)).equals(bytes)).toBe(true);
    await again.close();
    const { problems } = await checkDisk(await readingParts(requests, 'd0', options.key));
    expect(problems).toEqual([]);
    await deleteDisk(requests, 'd0', false);
    expect([...server.objects(bucket).keys()]).toEqual([]);
  });
});

describe('a deletion on condition', () => {
  it('leaves what has another tag, and deletes where the server knows no such condition', async () => {
    const etag = await put('k');
    expect(await failure(() => store.delete(['k'], { ifMatch: 'other' }))).toMatchObject({
      kind: 'precondition',
    });
    expect(server.objects(bucket).has('k')).toBe(true);
    proxy.plan = ({ headers }) =>
      headers['if-match'] === undefined
        ? undefined
        : { kind: 'status', status: 501, code: 'NotImplemented', when: 'before' };
    await store.delete(['k'], { ifMatch: etag });
    expect(server.objects(bucket).has('k')).toBe(false);
    await store.delete(['k'], { ifMatch: etag });
  });
});

describe('a store without DeleteObjects', () => {
  it('has its objects deleted one by one', async () => {
    for (const key of ['a', 'b', 'c']) await put(key);
    proxy.plan = ({ method }) =>
      method === 'POST'
        ? { kind: 'status', status: 501, code: 'NotImplemented', when: 'before' }
        : undefined;
    await store.delete(['a', 'b', 'nothing']);
    await store.delete(['b', 'c']);
    expect([...server.objects(bucket).keys()]).toEqual([]);
    expect(proxy.requests.get('DELETE-MANY')).toBe(1);
  });
});

function reached() {
  const { accessKeyId, secretAccessKey, region, endpoint } = server;
  return { accessKeyId, secretAccessKey, region, endpoint };
}
