// SPDX-License-Identifier: Apache-2.0
/**
 * A bucket in another region than the one named: Amazon's answers, of its hosts, through a proxy that leads all of them to this
 * machine. Nothing may ever go to a host that is not Amazon's, whatever an answer says.
 */
import { readFileSync } from 'node:fs';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import { createServer as createTlsServer } from 'node:https';
import { type AddressInfo, connect as connectTo, type Socket } from 'node:net';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { type ConnectOptions, connect } from '../src/client/index.js';
import { type ObjectStore, ObjectStoreError } from '../src/object-store.js';
import { bucketRequest } from './support/bucket.js';
import { MemoryServer } from './support/memory-server.js';

const bucket = 'data';
const home = 'eu-central-1';
const wrong = 'us-east-1';
const hostIn = (region: string): string => `${bucket}.s3.${region}.amazonaws.com`;
const fixture = (name: string): URL => new URL(`fixtures/${name}`, import.meta.url);
const keys = { accessKeyId: 'GOODKEY', secretAccessKey: 'x' };

interface Asked {
  readonly host: string;
  /** Signed for. */
  readonly region: string;
  readonly request: IncomingMessage;
}
interface Answer {
  readonly status: number;
  readonly headers?: Record<string, string>;
  readonly body?: string;
}

let server: MemoryServer;
let started: Server[];
let stores: ObjectStore[];
/** `host region` of each request that came, and the hosts that connections were made to. */
let seen: string[];
let tunnels: Set<string>;
/** What is answered; undefined: as the bucket's own server does. */
let answer: (asked: Asked) => Answer | undefined | Promise<Answer | undefined>;

const xml = (code: string, more = ''): string =>
  `<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>${code}</Code><Message>m</Message>${more}<Bucket>${bucket}</Bucket></Error>`;
const named = { 'x-amz-bucket-region': home };

async function listen(one: Server): Promise<number> {
  started.push(one);
  await new Promise<void>((resolve) => one.listen(0, '127.0.0.1', resolve));
  return (one.address() as AddressInfo).port;
}

async function onRequest(request: IncomingMessage, response: ServerResponse): Promise<void> {
  const host = String(request.headers.host);
  const region = /Credential=[^/]+\/\d+\/([^/]+)\//.exec(
    String(request.headers.authorization),
  )?.[1];
  seen.push(`${host} ${region}`);
  const other = await answer({ host, region: String(region), request });
  if (other === undefined) {
    if (host.startsWith(`${bucket}.`)) request.url = `/${bucket}${request.url}`;
    server.handle(request, response);
    return;
  }
  request.resume();
  response.writeHead(other.status, other.headers);
  response.end(request.method === 'HEAD' ? undefined : other.body);
}

beforeEach(async () => {
  started = [];
  stores = [];
  seen = [];
  tunnels = new Set();
  server = await new MemoryServer({ accessKeyId: keys.accessKeyId }).start();
  await bucketRequest(server, bucket, 'PUT');
});

afterEach(async () => {
  for (const store of stores) await store.close();
  await server.stop();
  for (const one of started) {
    one.closeAllConnections();
    await new Promise((resolve) => one.close(resolve));
  }
});

async function storeWith(options: ConnectOptions): Promise<ObjectStore> {
  const { store } = await connect(`s3://${bucket}/disk`, { ...keys, env: {}, ...options });
  stores.push(store);
  return store;
}

/** The bucket, believed to be in the wrong region of Amazon's. */
async function amazon(): Promise<ObjectStore> {
  const tls = createTlsServer(
    {
      key: readFileSync(fixture('server-key.pem')),
      cert: readFileSync(fixture('server-cert.pem')),
    },
    (request, response) => void onRequest(request, response),
  ) as unknown as Server;
  const port = await listen(tls);
  const proxy = createServer();
  proxy.on('connect', (request, client: Socket) => {
    tunnels.add(String(request.url));
    const upstream = connectTo(port, '127.0.0.1', () => {
      client.write('HTTP/1.1 200 OK\r\n\r\n');
      client.pipe(upstream).pipe(client);
    });
    for (const socket of [client, upstream]) socket.on('error', () => upstream.destroy());
    client.on('close', () => upstream.destroy());
  });
  const caFile = fixture('server-cert.pem').pathname;
  return storeWith({ region: wrong, proxy: `http://127.0.0.1:${await listen(proxy)}`, caFile });
}

/** The bucket behind an endpoint of one's own. */
async function endpointed(): Promise<ObjectStore> {
  const port = await listen(createServer((request, response) => void onRequest(request, response)));
  return storeWith({ region: wrong, endpoint: `http://127.0.0.1:${port}` });
}

async function failure(call: () => Promise<unknown>): Promise<ObjectStoreError> {
  const error = await call().then(
    () => new Error('it succeeded'),
    (thrown: unknown) => thrown,
  );
  if (error instanceof ObjectStoreError) return error;
  throw error;
}

const put = (store: ObjectStore, key = 'disk/x') => store.put(key, [Buffer.from('1')]);
const both = [`${hostIn(wrong)} ${wrong}`, `${hostIn(home)} ${home}`];

describe('a bucket of Amazon’s in another region', () => {
  it.each<[string, Answer]>([
    [
      '301, with the region beside it',
      {
        status: 301,
        headers: named,
        body: xml('PermanentRedirect', `<Endpoint>${bucket}.s3-${home}.amazonaws.com</Endpoint>`),
      },
    ],
    ['301, with nothing but the region', { status: 301, headers: named }],
    [
      '301, with the region in it',
      { status: 301, body: xml('PermanentRedirect', `<Region>${home}</Region>`) },
    ],
    [
      '307 to its endpoint',
      {
        status: 307,
        headers: { ...named, location: `https://${hostIn(home)}/disk/x`, connection: 'close' },
        body: xml('TemporaryRedirect', `<Endpoint>${hostIn(home)}</Endpoint>`),
      },
    ],
    [
      '400 of the signature',
      { status: 400, body: xml('AuthorizationHeaderMalformed', `<Region>${home}</Region>`) },
    ],
    [
      '400 of the place',
      { status: 400, headers: named, body: xml('IllegalLocationConstraintException') },
    ],
    // Whatever host it names, its region is Amazon's.
    [
      '307 to somebody else',
      {
        status: 307,
        headers: { ...named, location: 'https://elsewhere.invalid/disk/x' },
        body: xml('TemporaryRedirect', '<Endpoint>elsewhere.invalid</Endpoint>'),
      },
    ],
  ])('is found by %s, and from then on asked at once', async (_, refusal) => {
    const store = await amazon();
    answer = ({ host }) => (host === hostIn(home) ? undefined : refusal);
    await put(store);
    expect(seen.splice(0)).toEqual(both);
    expect(String((await store.get('disk/x')).body)).toBe('1');
    await store.put('disk/none', []);
    expect((await store.head('disk/none')).size).toBe(0);
    expect(new Set(seen)).toEqual(new Set(both.slice(1)));
    expect(tunnels).toEqual(new Set([`${hostIn(wrong)}:443`, `${hostIn(home)}:443`]));
  });

  it('is found by the answer to a HEAD, which has no body', async () => {
    const store = await amazon();
    server.objects(bucket).set('disk/none', {
      body: Buffer.alloc(0),
      etag: 'e',
      headers: {},
      modified: new Date(),
    });
    answer = ({ host, request }) =>
      host === hostIn(wrong) && request.method === 'HEAD'
        ? { status: 400, headers: named }
        : undefined;
    expect((await store.head('disk/none')).size).toBe(0);
    expect(seen).toEqual([both[0], ...both]);
  });

  it('is found by all that are under way at the same time', async () => {
    const store = await amazon();
    const late: (() => void)[] = [];
    // The first one is refused and has moved before the others hear of it.
    answer = async ({ host }) => {
      if (host === hostIn(home)) return undefined;
      if (late.length < 4) await new Promise<void>((resolve) => late.push(resolve));
      return { status: 301, headers: named };
    };
    const puts = Array.from({ length: 5 }, (_, i) => put(store, `disk/${i}`));
    await Promise.any(puts);
    for (const go of late) go();
    await Promise.all(puts);
    expect(server.objects(bucket).size).toBe(5);
    expect(seen).toHaveLength(10);
  });

  it.each<[string, Answer, string]>([
    [
      'whose server sends them to a host that is nobody’s',
      { status: 301, body: xml('PermanentRedirect', '<Endpoint>elsewhere.invalid</Endpoint>') },
      'bad-request',
    ],
    [
      'whose server sends them on by a header alone',
      { status: 307, headers: { location: 'https://elsewhere.invalid/disk/x' } },
      'bad-request',
    ],
    [
      'that is new, until its name has got round',
      {
        status: 307,
        headers: { ...named, 'x-amz-bucket-region': wrong },
        body: xml('TemporaryRedirect', '<Endpoint>elsewhere.invalid</Endpoint>'),
      },
      'outage',
    ],
  ])('%s: nothing is sent there, and the error names it', async (_, refusal, kind) => {
    const store = await amazon();
    answer = () => refusal;
    expect(await failure(() => put(store))).toMatchObject({
      kind,
      status: refusal.status,
      message: expect.stringMatching(/it names (https:\/\/)?elsewhere\.invalid/),
    });
    expect(seen).toEqual(both.slice(0, 1));
    expect(tunnels).toEqual(new Set([`${hostIn(wrong)}:443`]));
  });

  it.each(['elsewhere.invalid/', 'x.elsewhere.invalid#', `${home}@elsewhere.invalid`, '', 'EU'])(
    'in a region called %j, which is none: nothing is sent there',
    async (region) => {
      const store = await amazon();
      answer = () => ({ status: 301, headers: { 'x-amz-bucket-region': region } });
      expect(await failure(() => put(store))).toMatchObject({ kind: 'bad-request', status: 301 });
      answer = () => undefined;
      await put(store);
      expect(new Set(seen)).toEqual(new Set(both.slice(0, 1)));
      expect(tunnels.size).toBe(1);
    },
  );

  it('that each of two regions takes for the other’s is asked for twice, and no oftener', async () => {
    const store = await amazon();
    answer = ({ region }) => ({
      status: 301,
      headers: { 'x-amz-bucket-region': region === wrong ? home : wrong },
    });
    for (let i = 0; i < 3; i++) {
      expect(await failure(() => put(store))).toMatchObject({ kind: 'bad-request', status: 301 });
      expect(seen.splice(0)).toHaveLength(2);
    }
    // It is none the worse for it.
    answer = () => undefined;
    await put(store);
  });
});

describe('a bucket behind an endpoint', () => {
  it.each<[string, Answer]>([
    ['beside', { status: 400, headers: { 'x-amz-bucket-region': 'Region_One.a' } }],
    [
      'in',
      { status: 400, body: xml('AuthorizationHeaderMalformed', '<Region>Region_One.a</Region>') },
    ],
  ])('is asked there again, signed for the region %s the answer', async (_, refusal) => {
    const store = await endpointed();
    answer = ({ region }) => (region === 'Region_One.a' ? undefined : refusal);
    await put(store);
    await put(store, 'disk/y');
    expect(seen.map((one) => one.split(' ')[1])).toEqual([wrong, 'Region_One.a', 'Region_One.a']);
  });

  it('is asked nowhere else', async () => {
    const store = await endpointed();
    answer = () => ({
      status: 301,
      headers: { ...named, location: `https://${hostIn(home)}/disk/x` },
      body: xml('PermanentRedirect', `<Endpoint>${hostIn(home)}</Endpoint>`),
    });
    const error = await failure(() => put(store));
    expect(error).toMatchObject({ kind: 'bad-request', status: 301 });
    expect(error.message).toContain(`it names ${hostIn(home)}`);
    expect(seen.every((one) => one.startsWith('127.0.0.1:'))).toBe(true);
  });

  it.each(['a/b', 'a b', 'a\u00e9', 'a'.repeat(64)])(
    'is not signed for region %j',
    async (region) => {
      const store = await endpointed();
      answer = () => ({ status: 400, body: xml('Any', `<Region>${region}</Region>`) });
      expect(await failure(() => put(store))).toMatchObject({ kind: 'bad-request' });
      expect(seen).toHaveLength(1);
    },
  );

  it('whose clock is another is asked again by all that were refused for it', async () => {
    const store = await endpointed();
    server.clockOffset = 3 * 60 * 60_000;
    let late: (() => void)[] | undefined = [];
    answer = async () => {
      if (late !== undefined && late.length < 4) {
        await new Promise<void>((resolve) => late?.push(resolve));
      }
      return undefined;
    };
    // As above: refused before, but told after another one has set the clock.
    const puts = Array.from({ length: 5 }, (_, i) => put(store, `disk/${i}`));
    await Promise.any(puts);
    const held = late;
    late = undefined;
    for (const go of held) go();
    await Promise.all(puts);
    expect(server.objects(bucket).size).toBe(5);
    expect(seen).toHaveLength(10);
  });
});
