// SPDX-License-Identifier: Apache-2.0
/**
 * An `ObjectStore` over the S3 protocol.
 *
 * Contract: that of `ObjectStore`. A call sends its request a second time only where the server has refused the first one unseen, for what this
 * client can mend by itself: credentials that had been renewed elsewhere, a clock that is wrong, a bucket in another region. A change whose fate is
 * unknown is never repeated here. Of a redirection only the region is taken: no request goes to a host that an answer names.
 */
import { createHash } from 'node:crypto';
import {
  type ByteRange,
  type CallOptions,
  type DeleteOptions,
  type FailureKind,
  type GetOptions,
  type GetResult,
  type ListedObject,
  type ListOptions,
  type ObjectFacts,
  type ObjectStore,
  ObjectStoreError,
  type PutOptions,
} from '../object-store.js';
import {
  deletionRequest,
  type ListPage,
  parseFailedDeletions,
  parseListPage,
  parseRefusal,
  type Refusal,
  unquoted,
} from './answers.js';
import type { CredentialSource, Credentials } from './credentials.js';
import { kindOf, remedies } from './failures.js';
import { type AddressOptions, type BucketAddress, bucketAddress, isRegion } from './location.js';
import { Signer } from './signer.js';
import { type Reply, Transport, TransportError, type TransportOptions } from './transport.js';

export interface S3StoreOptions extends AddressOptions {
  readonly credentials: CredentialSource;
  /** For an exchange without a body; each MiB of a body adds four seconds. */
  readonly requestTimeoutMs: number;
  /** Sign bodies rather than leave them to TLS. Default: when the endpoint is not https. */
  readonly signBodies: boolean | undefined;
  readonly connection: Omit<TransportOptions, 'origin' | 'proxy'>;
  /** The proxy for an origin. */
  readonly proxy: (origin: string) => string | undefined;
}

interface Request {
  /** As the interface names it. */
  readonly operation: 'get' | 'put' | 'delete' | 'head' | 'list';
  readonly method: 'GET' | 'PUT' | 'DELETE' | 'HEAD' | 'POST';
  /** Undefined: the bucket itself. */
  readonly key: string | undefined;
  readonly query?: Readonly<Record<string, string>>;
  readonly headers?: Readonly<Record<string, string>>;
  readonly body?: readonly Uint8Array[];
  readonly signal: AbortSignal | undefined;
  /** The time-out is for an answer of so many bytes. */
  readonly expectedBytes?: number;
  /** Where the answer's body may be put. */
  readonly into?: Buffer | undefined;
  readonly onProgress?: ((reply: Reply, bytes: number) => void) | undefined;
}

/** How the bucket is reached: never changed, but replaced, so that a request is of one piece. */
interface Route {
  readonly address: BucketAddress;
  readonly signer: Signer;
  readonly transport: Transport;
}

/** An answer, and what the request was sent with. */
interface Sent {
  readonly reply: Reply;
  readonly route: Route;
  readonly credentials: Credentials;
}

const sha256OfNothing = createHash('sha256').digest('hex');
/** An uplink below 256 KiB/s with many requests at a time is no place for a disk. */
const bytesPerMs = 256;
/** Keys of one DeleteObjects request. */
const batchSize = 1000;
/** Milliseconds of difference from which the server's clock is taken over; S3 refuses 15 minutes. */
const skewWorthMending = 60_000;

export class S3Store implements ObjectStore {
  readonly #options: S3StoreOptions;
  readonly #signBodies: boolean;
  #route: Route;
  /** By origin. */
  readonly #transports = new Map<string, Transport>();
  /** DeleteObjects works here; undefined until tried. */
  #batches: boolean | undefined;
  #closed = false;

  constructor(options: S3StoreOptions) {
    this.#options = options;
    this.#route = this.#routeBy(options.region, 0);
    this.#signBodies = options.signBodies ?? !this.#route.address.origin.startsWith('https:');
  }

  get description(): string {
    return `s3://${this.#options.bucket} at ${this.#options.endpoint ?? this.#route.address.origin}`;
  }

  async get(key: string, options: GetOptions = {}): Promise<GetResult> {
    const { range, ifMatch, signal, into, onProgress } = options;
    const reply = await this.#send({
      operation: 'get',
      method: 'GET',
      key,
      headers: {
        ...(range === undefined ? {} : { range: `bytes=${range.start}-${range.end - 1}` }),
        ...(ifMatch === undefined ? {} : { 'if-match': `"${ifMatch}"` }),
      },
      signal,
      into,
      ...(range === undefined ? {} : { expectedBytes: range.end - range.start }),
      ...(range === undefined || onProgress === undefined
        ? {}
        : { onProgress: this.#following(key, range, onProgress) }),
    });
    if (range === undefined) return { ...this.#facts(reply, key), body: reply.body };
    if (reply.status !== 206) {
      // RFC 9110, 14.2: a server may ignore Range and answer with everything.
      if (range.start >= reply.body.length) {
        throw this.#error('bad-request', 'get', key, `no byte ${range.start} in the object`);
      }
      const body = reply.body.subarray(range.start, range.end);
      return { ...this.#facts(reply, key), body };
    }
    return { ...this.#rangeFacts(reply, key, range), body: reply.body };
  }

  /** Passes on how far the answer is that will be taken; any other one fails when it is there. */
  #following(
    key: string,
    range: ByteRange,
    onProgress: (body: Buffer, bytes: number) => void,
  ): (reply: Reply, bytes: number) => void {
    let looked: Reply | undefined;
    let isGood = false;
    return (reply, bytes) => {
      if (reply !== looked) {
        looked = reply;
        isGood = reply.status === 206 && this.#isRange(reply, key, range);
      }
      if (isGood) onProgress(reply.body, bytes);
    };
  }

  #isRange(reply: Reply, key: string, range: ByteRange): boolean {
    try {
      this.#rangeFacts(reply, key, range);
      return true;
    } catch {
      return false;
    }
  }

  #rangeFacts(reply: Reply, key: string, range: ByteRange): ObjectFacts {
    const facts = this.#facts(reply, key);
    const { length } = reply.body;
    const first = Number(/^bytes (\d+)-/.exec(reply.headers['content-range'] ?? '')?.[1]);
    if (first !== range.start || length !== Math.min(range.end, facts.size) - range.start) {
      throw this.#error('outage', 'get', key, `${length} bytes came, from ${first} on`);
    }
    return facts;
  }

  async put(key: string, body: readonly Uint8Array[], options: PutOptions = {}): Promise<string> {
    const { ifNoneMatch, ifMatch, crc32, signal } = options;
    const reply = await this.#send({
      operation: 'put',
      method: 'PUT',
      key,
      headers: {
        ...(ifNoneMatch === undefined ? {} : { 'if-none-match': ifNoneMatch }),
        // Without quotes: Ceph compares it with the bare tag, and Amazon takes both.
        ...(ifMatch === undefined ? {} : { 'if-match': ifMatch }),
        ...(crc32 === undefined ? {} : { 'x-amz-checksum-crc32': bigEndian(crc32) }),
      },
      body: body.length === 0 ? [new Uint8Array()] : body,
      signal,
    });
    return unquoted(reply.headers['etag'] ?? '');
  }

  async delete(keys: readonly string[], options: DeleteOptions = {}): Promise<void> {
    const { signal, ifMatch } = options;
    if (ifMatch !== undefined) return this.#deleteOne(keys[0] as string, signal, ifMatch);
    for (let at = 0; at < keys.length; at += batchSize) {
      const batch = keys.slice(at, at + batchSize);
      if (batch.length === 1 || this.#batches === false) await this.#deleteEach(batch, signal);
      else await this.#deleteBatch(batch, signal);
    }
  }

  async head(key: string, { signal }: CallOptions = {}): Promise<ObjectFacts> {
    // A HEAD is answered without a body, so without the code that tells a lost bucket from a lost object, or an expired
    // token from a wrong key. One byte costs the same.
    const range = { start: 0, end: 1 };
    try {
      const { body: _body, ...facts } = await this.get(key, { range, signal });
      return facts;
    } catch (error) {
      // An empty object has no first byte.
      if (!(error instanceof ObjectStoreError) || error.status !== 416) throw error;
    }
    const reply = await this.#send({ operation: 'head', method: 'HEAD', key, signal });
    return this.#facts(reply, key);
  }

  async *list(prefix: string, options: ListOptions = {}): AsyncIterable<ListedObject> {
    const { startAfter, limit = Number.POSITIVE_INFINITY, signal } = options;
    let left = limit;
    let token: string | undefined;
    let last = startAfter ?? '';
    do {
      if (left <= 0) return;
      const page = await this.#listPage(prefix, startAfter, Math.min(left, 1000), token, signal);
      for (const { key } of page.objects) {
        // The newest manifest and the end of the log are found by it. Keys are ASCII: their order is that of their bytes.
        if (key <= last || !key.startsWith(prefix)) {
          throw this.#error(
            'bad-request',
            'list',
            prefix,
            `${key} came after ${last}, out of order`,
          );
        }
        last = key;
      }
      left -= page.objects.length;
      yield* page.objects;
      if (page.next !== undefined && page.next === token) {
        throw this.#error('outage', 'list', prefix, 'the listing goes on where it was');
      }
      token = page.next;
    } while (token !== undefined);
  }

  async close(): Promise<void> {
    this.#closed = true;
    await Promise.all([...this.#transports.values()].map((transport) => transport.close()));
  }

  async #listPage(
    prefix: string,
    startAfter: string | undefined,
    limit: number,
    token: string | undefined,
    signal: AbortSignal | undefined,
  ): Promise<ListPage> {
    const reply = await this.#send({
      operation: 'list',
      method: 'GET',
      key: undefined,
      query: {
        'list-type': '2',
        prefix,
        'max-keys': String(limit),
        ...(startAfter === undefined ? {} : { 'start-after': startAfter }),
        ...(token === undefined ? {} : { 'continuation-token': token }),
      },
      signal,
      expectedBytes: limit * 512,
    });
    try {
      return parseListPage(reply.body.toString());
    } catch (cause) {
      throw this.#error('outage', 'list', prefix, (cause as Error).message, { cause });
    }
  }

  async #deleteEach(keys: readonly string[], signal: AbortSignal | undefined): Promise<void> {
    const queue = [...keys];
    const work = async () => {
      for (let key = queue.shift(); key !== undefined; key = queue.shift()) {
        await this.#deleteOne(key, signal);
      }
    };
    await Promise.all(Array.from({ length: Math.min(8, keys.length) }, work));
  }

  async #deleteOne(key: string, signal: AbortSignal | undefined, ifMatch?: string): Promise<void> {
    const request = { operation: 'delete', method: 'DELETE', key, signal } as const;
    try {
      if (ifMatch === undefined) await this.#send(request);
      else await this.#send({ ...request, headers: { 'if-match': `"${ifMatch}"` } });
    } catch (error) {
      if (!(error instanceof ObjectStoreError)) throw error;
      // Some stores know no conditions on deletions, and say so rather than ignore them.
      if (error.kind === 'bad-request' && ifMatch !== undefined) {
        return this.#deleteOne(key, signal);
      }
      if (error.kind !== 'not-found') throw error;
    }
  }

  async #deleteBatch(keys: readonly string[], signal: AbortSignal | undefined): Promise<void> {
    const body = Buffer.from(deletionRequest(keys));
    let reply: Reply;
    try {
      reply = await this.#send({
        operation: 'delete',
        method: 'POST',
        key: undefined,
        query: { delete: '' },
        headers: { 'content-md5': createHash('md5').update(body).digest('base64') },
        body: [body],
        signal,
      });
    } catch (error) {
      if (!(error instanceof ObjectStoreError) || error.kind !== 'bad-request' || this.#batches) {
        throw error;
      }
      // Some stores (Google's among them) have no DeleteObjects.
      await this.#deleteEach(keys, signal);
      this.#batches = false;
      return;
    }
    let failed: ReturnType<typeof parseFailedDeletions>;
    try {
      failed = parseFailedDeletions(reply.body.toString());
    } catch (cause) {
      throw this.#error('outage', 'delete', undefined, (cause as Error).message, { cause });
    }
    this.#batches = true;
    const [first] = failed.filter(({ code }) => code !== 'NoSuchKey');
    if (first !== undefined) {
      // Per key there is no status: what has no code of its own is the server's trouble.
      const kind = first.code === 'AccessDenied' ? 'forbidden' : kindOf(500, first.code);
      throw this.#error(kind, 'delete', first.key, `${first.code} ${first.message}`);
    }
  }

  #facts({ status, headers, body }: Reply, key: string): ObjectFacts {
    const coding = headers['content-encoding'] ?? 'identity';
    // Of what was put here nothing is coded.
    if (coding !== 'identity' && coding !== '') {
      const what = `the answer is coded (${coding}): what stands between us and the server must not change it`;
      throw this.#error('bad-request', 'get', key, what);
    }
    // In chunks an answer has no length but its own.
    const size =
      status === 206
        ? Number(/^bytes \d+-\d+\/(\d+)$/.exec(headers['content-range'] ?? '')?.[1])
        : Number(headers['content-length'] ?? (body.length > 0 ? body.length : undefined));
    const modified = Date.parse(headers['last-modified'] ?? '');
    if (!Number.isSafeInteger(size) || Number.isNaN(modified)) {
      throw this.#error('outage', 'get', key, 'the answer lacks size or time of the object');
    }
    return { size, modified, etag: unquoted(headers['etag'] ?? '') };
  }

  /** Sends a request, and once more after each refusal that could be mended. */
  async #send(request: Request): Promise<Reply> {
    const mended = new Set<Cure>();
    for (;;) {
      const sent = await this.#exchange(request);
      const { reply } = sent;
      if (reply.status >= 200 && reply.status < 300) return reply;
      const refusal = parseRefusal(reply.body.toString());
      const cure = cureFor(reply.status, refusal.code);
      const isMended =
        cure !== undefined && !mended.has(cure) && (await this.#mend(cure, refusal, sent));
      if (!isMended) throw this.#refused(request, reply, refusal);
      mended.add(cure);
    }
  }

  async #exchange(request: Request): Promise<Sent> {
    const { method, key, query = {}, headers = {}, body = [], operation, signal } = request;
    const route = this.#route;
    const { host, path: base } = route.address;
    const path = key === undefined ? base || '/' : `${base}/${encodePath(key)}`;
    const bytes = body.reduce((sum, part) => sum + part.length, request.expectedBytes ?? 0);
    const timeoutMs = this.#options.requestTimeoutMs + bytes / bytesPerMs;
    const signable = {
      method,
      path,
      query,
      headers: { ...headers, host, 'x-amz-content-sha256': this.#payloadHash(body) },
    };
    // Signing can wait for credentials, which come over networks too.
    const signed = await within(route.signer.sign(signable), timeoutMs, signal).catch(
      (error: unknown) => {
        if (error instanceof ObjectStoreError) throw error;
        const kind = signal?.aborted ? 'aborted' : 'credentials';
        const text = (error as Error).message;
        throw this.#error(kind, operation, key, text, { cause: error, ambiguous: false });
      },
    );
    try {
      const reply = await route.transport.exchange({
        method,
        path: path + queryString(query),
        // Without it any coding would do (RFC 9110, 12.5.3); not signed, since proxies change it.
        headers: { ...signed.headers, 'accept-encoding': 'identity' },
        body,
        timeoutMs,
        signal,
        into: request.into,
        onProgress: request.onProgress,
      });
      return { reply, route, credentials: signed.credentials };
    } catch (error) {
      if (!(error instanceof TransportError)) throw error;
      const kind = error.reason === 'aborted' || this.#closed ? 'aborted' : 'outage';
      throw this.#error(kind, operation, key, error.message, {
        cause: error.cause ?? error,
        ambiguous: error.sent && changes(request),
      });
    }
  }

  /**
   * Puts right what a request was refused for. Others may have been refused for the same, and have done it already.
   * @returns whether the request is worth sending again
   */
  async #mend(cure: Cure, refusal: Refusal, { reply, route, credentials }: Sent): Promise<boolean> {
    const { headers } = reply;
    const { region, clockOffset } = route.signer;
    const now = this.#route.signer;
    switch (cure) {
      case 'credentials':
        return this.#options.credentials.refresh(credentials);
      case 'clock': {
        const offset = Date.parse(headers['date'] ?? '') - Date.now();
        if (!(Math.abs(offset - clockOffset) > skewWorthMending)) return false;
        this.#route = this.#routeBy(now.region, offset);
        return true;
      }
      case 'region': {
        const named = headers['x-amz-bucket-region'] ?? refusal.region ?? '';
        if (named === region || !isRegion(named, this.#options.endpoint)) return false;
        if (named !== now.region) this.#route = this.#routeBy(named, now.clockOffset);
        return true;
      }
    }
  }

  #routeBy(region: string, clockOffset: number): Route {
    const { credentials, connection, proxy } = this.#options;
    const address = bucketAddress({ ...this.#options, region });
    const { origin } = address;
    let transport = this.#transports.get(origin);
    if (transport === undefined) {
      transport = new Transport({ ...connection, origin, proxy: proxy(origin) });
      this.#transports.set(origin, transport);
    }
    return { address, signer: new Signer(region, credentials, clockOffset), transport };
  }

  #payloadHash(body: readonly Uint8Array[]): string {
    if (body.length === 0) return sha256OfNothing;
    if (!this.#signBodies) return 'UNSIGNED-PAYLOAD';
    const hash = createHash('sha256');
    for (const part of body) hash.update(part);
    return hash.digest('hex');
  }

  #refused(request: Request, { status, headers }: Reply, { code, message, endpoint }: Refusal) {
    const kind = kindOf(status, code);
    const id = headers['x-amz-request-id'];
    const elsewhere = status < 400 ? endpoint || headers['location'] : undefined;
    const named = elsewhere === undefined ? '' : `it names ${elsewhere}`;
    const said = [status, code, message, named].filter(Boolean).join(' ');
    return this.#error(
      kind,
      request.operation,
      request.key,
      id === undefined ? said : `${said} (request ${id})`,
      {
        status,
        // Servers, and what stands before them, answer so for requests that were carried out, too.
        ambiguous: (kind === 'outage' || kind === 'throttled') && changes(request),
      },
    );
  }

  #error(
    kind: FailureKind,
    operation: Request['operation'],
    key: string | undefined,
    what: string,
    details: { status?: number; ambiguous?: boolean; cause?: unknown } = {},
  ): ObjectStoreError {
    const path = key === undefined ? this.description : `${key} of ${this.description}`;
    return new ObjectStoreError(kind, `${operation} ${path}: ${what.trim()}: ${remedies[kind]}`, {
      operation,
      path: key ?? this.#options.bucket,
      ...details,
    });
  }
}

/** What a refusal could be about that this client can put right. */
type Cure = 'clock' | 'credentials' | 'region';

function cureFor(status: number, code: string): Cure | undefined {
  if (code === 'RequestTimeTooSkewed') return 'clock';
  // Keys that are gone may have been replaced where they come from.
  if (kindOf(status, code) === 'credentials' || code === 'InvalidAccessKeyId') return 'credentials';
  return [301, 307, 400].includes(status) ? 'region' : undefined;
}

function changes({ method }: Request): boolean {
  return method !== 'GET' && method !== 'HEAD';
}

/** Rejects when a promise takes too long, or the signal is aborted first. */
function within<T>(
  promise: Promise<T>,
  timeoutMs: number,
  signal: AbortSignal | undefined,
): Promise<T> {
  return new Promise((resolve, reject) => {
    const stop = () => settle(() => reject(new Error('it was aborted')));
    const late = () => settle(() => reject(new Error(`none within ${timeoutMs / 1000} s`)));
    const timer = setTimeout(late, timeoutMs);
    const settle = (end: () => void) => {
      clearTimeout(timer);
      signal?.removeEventListener('abort', stop);
      end();
    };
    signal?.addEventListener('abort', stop);
    if (signal?.aborted) stop();
    promise.then(
      (value) => settle(() => resolve(value)),
      (error: unknown) => settle(() => reject(error)),
    );
  });
}

/** RFC 3986: all but the unreserved characters, as SigV4 wants it. */
function encode(text: string): string {
  return encodeURIComponent(text).replace(
    /[!'()*]/g,
    (character) => `%${character.charCodeAt(0).toString(16).toUpperCase()}`,
  );
}

function encodePath(key: string): string {
  return /^[A-Za-z0-9._/-]*$/.test(key) ? key : key.split('/').map(encode).join('/');
}

function queryString(query: Readonly<Record<string, string>>): string {
  const pairs = Object.entries(query).map(([name, value]) => `${encode(name)}=${encode(value)}`);
  return pairs.length === 0 ? '' : `?${pairs.join('&')}`;
}

function bigEndian(crc: number): string {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(crc >>> 0);
  return bytes.toString('base64');
}
