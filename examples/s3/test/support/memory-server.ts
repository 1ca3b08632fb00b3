// SPDX-License-Identifier: Apache-2.0
/**
 * An S3 server in memory for unit tests: the part of the protocol that the example uses, with conditional writes that are truly
 * atomic.
 *
 * Contract: a PUT is checked and stored in one step when the last byte of its body has come, so exactly one of any number of racing
 * `If-None-Match: *` wins. Signatures are not verified (radosgw does that, with the same tests); the access key, the clock and
 * the session token are looked at, so that their failures can be had. What it doesn't know it answers with 501, never with success.
 * `objects` is open to tests, to look into and to damage.
 */
import { createHash } from 'node:crypto';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';

export interface StoredObject {
  body: Buffer;
  etag: string;
  /** `x-amz-meta-*` and content type, by lower-case header name. */
  headers: Record<string, string>;
  modified: Date;
}

export interface MemoryServerOptions {
  readonly accessKeyId?: string;
  /** Port on 127.0.0.1. Default: a free one. */
  readonly port?: number;
}

const xmlDeclaration = '<?xml version="1.0" encoding="UTF-8"?>';
/** S3's own limits (Amazon S3 API reference: ListObjectsV2, DeleteObjects). */
const maxKeys = 1000;
const maxSkewMs = 15 * 60_000;

/** What is answered instead of success: the status and S3's error code. */
class Refusal extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    readonly headers: Record<string, string> = {},
  ) {
    super(code);
  }
}

export class MemoryServer {
  readonly accessKeyId: string;
  readonly secretAccessKey = 'memory-server-secret';
  readonly region = 'default';
  /** Buckets, and in them objects by key. */
  readonly buckets = new Map<string, Map<string, StoredObject>>();
  /** Whether conditional PUTs are honoured; `false` is what many S3-like servers do. */
  conditional = true;
  /** Session tokens that have expired. */
  readonly expiredTokens = new Set<string>();
  /** Whether every request is refused as the store's owner may: 403 AccessDenied. */
  denied = false;
  /** Milliseconds that this server's clock is ahead of the real one. */
  clockOffset = 0;
  /** Requests answered, by operation: `PUT`, `GET`, `HEAD`, `DELETE`, `LIST`, `POST`. */
  readonly requests = new Map<string, number>();
  readonly #server: Server;
  readonly #port: number;

  constructor({ accessKeyId = 'memory', port = 0 }: MemoryServerOptions = {}) {
    this.accessKeyId = accessKeyId;
    this.#port = port;
    this.#server = createServer((request, response) => this.handle(request, response));
    // Idle connections must outlive what a test calls idle.
    this.#server.keepAliveTimeout = 60_000;
  }

  get endpoint(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  start(): Promise<this> {
    return new Promise((resolve, reject) => {
      this.#server.once('error', reject);
      this.#server.listen(this.#port, '127.0.0.1', () => resolve(this));
    });
  }

  stop(): Promise<void> {
    this.#server.closeAllConnections();
    return new Promise((resolve) => this.#server.close(() => resolve()));
  }

  /** The objects of a bucket. @throws Error when there is no such bucket */
  objects(bucket: string): Map<string, StoredObject> {
    const objects = this.buckets.get(bucket);
    if (objects === undefined) throw new Error(`no bucket ${bucket}`);
    return objects;
  }

  /** Answers a request; also one that another server took. */
  handle(request: IncomingMessage, response: ServerResponse): void {
    this.#serve(request, response).catch((error: unknown) => {
      response.destroy(error instanceof Error ? error : undefined);
    });
  }

  async #serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const url = new URL(request.url ?? '/', 'http://server');
    const body = await readBody(request);
    if (body === undefined) return;
    const method = request.method ?? '';
    const list = method === 'GET' && url.searchParams.has('list-type');
    const operation = list ? 'LIST' : method;
    this.requests.set(operation, (this.requests.get(operation) ?? 0) + 1);
    try {
      this.#authorize(request);
      this.#dispatch(request, url, body, response);
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      const text = `${xmlDeclaration}<Error><Code>${error.code}</Code><RequestId>memory</RequestId></Error>`;
      answer(response, error.status, method === 'HEAD' ? '' : text, {
        'content-type': 'application/xml',
        date: new Date(Date.now() + this.clockOffset).toUTCString(),
        ...error.headers,
      });
    }
  }

  #authorize({ headers }: IncomingMessage): void {
    const credential = /Credential=([^/]+)\//.exec(headers.authorization ?? '')?.[1];
    if (credential === undefined) throw new Refusal(403, 'AccessDenied');
    if (credential !== this.accessKeyId) throw new Refusal(403, 'InvalidAccessKeyId');
    const token = headers['x-amz-security-token'];
    if (typeof token === 'string' && this.expiredTokens.has(token)) {
      throw new Refusal(400, 'ExpiredToken');
    }
    const sent = parseAmzDate(String(headers['x-amz-date'] ?? ''));
    if (Math.abs(Date.now() + this.clockOffset - sent) > maxSkewMs) {
      throw new Refusal(403, 'RequestTimeTooSkewed');
    }
    if (this.denied) throw new Refusal(403, 'AccessDenied');
  }

  #dispatch(request: IncomingMessage, url: URL, body: Buffer, response: ServerResponse): void {
    const [, bucketName = '', key = ''] = /^\/([^/]*)\/?(.*)$/.exec(url.pathname) ?? [];
    const bucket = decodeURIComponent(bucketName);
    if (key === '') this.#onBucket(request, bucket, url.searchParams, body, response);
    else if ([...url.searchParams.keys()].length > 0) throw new Refusal(501, 'NotImplemented');
    else this.#onObject(request, bucket, decodeURIComponent(key), body, response);
  }

  #bucket(name: string): Map<string, StoredObject> {
    const found = this.buckets.get(name);
    if (found === undefined) throw new Refusal(404, 'NoSuchBucket');
    return found;
  }

  #onBucket(
    { method }: IncomingMessage,
    name: string,
    query: URLSearchParams,
    body: Buffer,
    response: ServerResponse,
  ): void {
    const date = { date: new Date(Date.now() + this.clockOffset).toUTCString() };
    if (method === 'PUT' && query.size === 0) {
      if (!this.buckets.has(name)) this.buckets.set(name, new Map());
      answer(response, 200, '', date);
    } else if (method === 'DELETE' && query.size === 0) {
      if (this.#bucket(name).size > 0) throw new Refusal(409, 'BucketNotEmpty');
      this.buckets.delete(name);
      answer(response, 204, '', date);
    } else if (method === 'HEAD' && query.size === 0) {
      this.#bucket(name);
      answer(response, 200, '', date);
    } else if (method === 'GET' && query.get('list-type') === '2') {
      answer(response, 200, listing(name, this.#bucket(name), query), date);
    } else if (method === 'POST' && query.has('delete')) {
      answer(response, 200, deleteMany(this.#bucket(name), body.toString()), date);
    } else throw new Refusal(501, 'NotImplemented');
  }

  #onObject(
    { method, headers }: IncomingMessage,
    bucket: string,
    key: string,
    body: Buffer,
    response: ServerResponse,
  ): void {
    const objects = this.#bucket(bucket);
    const found = objects.get(key);
    const date = new Date(Date.now() + this.clockOffset);
    if (method === 'PUT') {
      if (headers['x-amz-copy-source'] !== undefined) throw new Refusal(501, 'NotImplemented');
      checkDigests(headers, body);
      if (this.conditional) checkCondition(headers, found);
      const etag = createHash('md5').update(body).digest('hex');
      const kept = Object.entries(headers).filter(
        ([name]) => name.startsWith('x-amz-meta-') || name === 'content-type',
      );
      objects.set(key, {
        body,
        etag,
        headers: Object.fromEntries(kept.map(([name, value]) => [name, String(value)])),
        modified: date,
      });
      answer(response, 200, '', { etag: `"${etag}"`, date: date.toUTCString() });
      return;
    }
    if (method === 'DELETE') {
      if (this.conditional && found !== undefined) checkCondition(headers, found);
      objects.delete(key);
      answer(response, 204, '', { date: date.toUTCString() });
      return;
    }
    if (method !== 'GET' && method !== 'HEAD') throw new Refusal(501, 'NotImplemented');
    if (found === undefined) throw new Refusal(404, 'NoSuchKey');
    checkCondition(headers, found);
    const common = {
      ...found.headers,
      etag: `"${found.etag}"`,
      'last-modified': found.modified.toUTCString(),
      'accept-ranges': 'bytes',
      date: date.toUTCString(),
    };
    const size = found.body.length;
    const range = parseRange(headers.range, size);
    if (range === undefined) {
      answer(response, 200, found.body, common, method === 'HEAD');
    } else {
      const [first, last] = range;
      answer(
        response,
        206,
        found.body.subarray(first, last + 1),
        { ...common, 'content-range': `bytes ${first}-${last}/${size}` },
        method === 'HEAD',
      );
    }
  }
}

/** All of a request's body; undefined when the client went away. */
async function readBody(request: IncomingMessage): Promise<Buffer | undefined> {
  const chunks: Buffer[] = [];
  try {
    for await (const chunk of request) chunks.push(chunk as Buffer);
  } catch {
    return undefined;
  }
  const body = Buffer.concat(chunks);
  const length = request.headers['content-length'];
  return length !== undefined && Number(length) !== body.length ? undefined : body;
}

function answer(
  response: ServerResponse,
  status: number,
  body: string | Buffer,
  headers: Record<string, string>,
  headOnly = false,
): void {
  const data = typeof body === 'string' ? Buffer.from(body) : body;
  response.writeHead(status, {
    'x-amz-request-id': 'memory',
    ...(status === 204 ? {} : { 'content-length': String(data.length) }),
    ...headers,
  });
  response.end(headOnly ? undefined : data);
}

/** ISO 8601 basic, as SigV4 has it: 20260131T120000Z. */
function parseAmzDate(text: string): number {
  const parts = /^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z$/.exec(text);
  if (parts === null) throw new Refusal(403, 'AccessDenied');
  const [, year, month, day, hour, minute, second] = parts;
  return Date.parse(`${year}-${month}-${day}T${hour}:${minute}:${second}Z`);
}

type Headers = IncomingMessage['headers'];

function checkDigests(headers: Headers, body: Buffer): void {
  const sha256 = headers['x-amz-content-sha256'];
  if (sha256 === undefined) throw new Refusal(400, 'MissingContentSHA256');
  if (String(sha256).startsWith('STREAMING-')) throw new Refusal(501, 'NotImplemented');
  if (sha256 !== 'UNSIGNED-PAYLOAD') {
    if (sha256 !== createHash('sha256').update(body).digest('hex')) {
      throw new Refusal(400, 'XAmzContentSHA256Mismatch');
    }
  }
  const md5 = headers['content-md5'];
  if (md5 !== undefined && md5 !== createHash('md5').update(body).digest('base64')) {
    throw new Refusal(400, 'BadDigest');
  }
}

function checkCondition(headers: Headers, found: StoredObject | undefined): void {
  const noneMatch = headers['if-none-match'];
  if (noneMatch !== undefined && noneMatch !== '*') throw new Refusal(501, 'NotImplemented');
  if (noneMatch === '*' && found !== undefined) throw new Refusal(412, 'PreconditionFailed');
  const match = headers['if-match'];
  if (match === undefined) return;
  if (found === undefined) throw new Refusal(404, 'NoSuchKey');
  if (match.replaceAll('"', '') !== found.etag) throw new Refusal(412, 'PreconditionFailed');
}

/** RFC 9110, 14.2: one byte range; anything it can't read as one is ignored. */
function parseRange(header: string | undefined, size: number): [number, number] | undefined {
  const [, first = '', last = ''] = /^bytes=(\d*)-(\d*)$/.exec(header ?? '') ?? [];
  if (first === '' && last === '') return undefined;
  const unsatisfiable = new Refusal(416, 'InvalidRange', { 'content-range': `bytes */${size}` });
  if (first === '') {
    if (Number(last) === 0 || size === 0) throw unsatisfiable;
    return [Math.max(0, size - Number(last)), size - 1];
  }
  if (Number(first) >= size) throw unsatisfiable;
  const end = last === '' ? size - 1 : Math.min(Number(last), size - 1);
  return Number(first) > end ? undefined : [Number(first), end];
}

function listing(
  bucket: string,
  objects: ReadonlyMap<string, StoredObject>,
  query: URLSearchParams,
): string {
  if (query.has('delimiter')) throw new Refusal(501, 'NotImplemented');
  const prefix = query.get('prefix') ?? '';
  const after = query.get('continuation-token') ?? query.get('start-after') ?? '';
  const limit = Math.min(Number(query.get('max-keys') ?? maxKeys), maxKeys);
  // S3 lists in the order of the keys' UTF-8 bytes.
  const keys = [...objects.keys()]
    .filter(
      (key) => key.startsWith(prefix) && Buffer.compare(Buffer.from(key), Buffer.from(after)) > 0,
    )
    .sort((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)));
  const page = keys.slice(0, limit);
  const truncated = page.length < keys.length;
  const entries = page.map((key) => {
    const { body, etag, modified } = objects.get(key) as StoredObject;
    return `<Contents><Key>${escapeXml(key)}</Key><LastModified>${modified.toISOString()}</LastModified><ETag>&quot;${etag}&quot;</ETag><Size>${body.length}</Size><StorageClass>STANDARD</StorageClass></Contents>`;
  });
  const next = truncated
    ? `<NextContinuationToken>${escapeXml(page.at(-1) ?? '')}</NextContinuationToken>`
    : '';
  return `${xmlDeclaration}<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>${bucket}</Name><Prefix>${escapeXml(prefix)}</Prefix><KeyCount>${page.length}</KeyCount><MaxKeys>${limit}</MaxKeys><IsTruncated>${truncated}</IsTruncated>${entries.join('')}${next}</ListBucketResult>`;
}

function deleteMany(objects: Map<string, StoredObject>, text: string): string {
  const keys = [...text.matchAll(/<Key>([^<]*)<\/Key>/g)].map(([, key = '']) => unescapeXml(key));
  if (keys.length === 0 || keys.length > maxKeys) throw new Refusal(400, 'MalformedXML');
  for (const key of keys) objects.delete(key);
  const deleted = text.includes('<Quiet>true</Quiet>')
    ? ''
    : keys.map((key) => `<Deleted><Key>${escapeXml(key)}</Key></Deleted>`).join('');
  return `${xmlDeclaration}<DeleteResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">${deleted}</DeleteResult>`;
}

const entities: Readonly<Record<string, string>> = {
  '&': 'amp',
  '<': 'lt',
  '>': 'gt',
  '"': 'quot',
};

function escapeXml(text: string): string {
  return text.replace(/[&<>"]/g, (character) => `&${entities[character]};`);
}

function unescapeXml(text: string): string {
  return text
    .replaceAll('&lt;', '<')
    .replaceAll('&gt;', '>')
    .replaceAll('&quot;', '"')
    .replaceAll('&apos;', "'")
    .replaceAll('&amp;', '&');
}
