// SPDX-License-Identifier: Apache-2.0
/**
 * A bucket in this process, with true conditional writes, and clients of it that can be killed: a killed
 * client's requests under way are carried out or not, as chance (seeded) says, and nobody is told.
 */

import {
  type DeleteOptions,
  type FailureKind,
  type GetOptions,
  type ListOptions,
  type ObjectFacts,
  type ObjectStore,
  ObjectStoreError,
  type PutOptions,
} from '../../src/object-store.js';
import { randomNumbers } from './random.js';

const SPOILT = 0xa5;

interface Stored {
  body: Buffer;
  etag: string;
  modified: number;
}

export type Operation = 'get' | 'put' | 'delete' | 'head' | 'list';

/** What happens to a request: nothing unusual, a failure before or after it is carried out, no answer. */
export type Fate = 'good' | 'hang' | { before: FailureKind } | { after: FailureKind };

export class MemoryBucket {
  readonly objects = new Map<string, Stored>();
  /** Whether conditions are honoured. */
  conditional = true;
  /** Whether those of deletions are. */
  conditionalDeletes = true;
  /** Decides about each request of any client. */
  fate: (operation: Operation, key: string) => Fate | Promise<Fate> = () => 'good';
  /** Between carrying a request out and its answer. */
  after: ((operation: Operation, key: string) => Promise<void>) | undefined;
  requests = 0;
  puts: string[] = [];
  #etags = 0;

  put(key: string, body: Buffer): string {
    const etag = `e${++this.#etags}`;
    this.objects.set(key, { body, etag, modified: Date.now() });
    return etag;
  }

  keys(prefix = ''): string[] {
    return [...this.objects.keys()].filter((key) => key.startsWith(prefix)).sort();
  }

  /** A client. @param seed of how long its requests take; @param turns they take at most */
  connect(seed = 1, turns = 4): MemoryClient {
    return new MemoryClient(this, seed, turns);
  }
}

export class MemoryClient implements ObjectStore {
  readonly description = 'memory';
  readonly #bucket: MemoryBucket;
  readonly #random: () => number;
  readonly #turns: number;
  #dead = false;
  #dying = 0;
  /** Requests of this client so far. */
  requests = 0;
  /** Called before each request; may kill the client. */
  onRequest: (() => void) | undefined;

  constructor(bucket: MemoryBucket, seed: number, turns: number) {
    this.#turns = turns;
    this.#bucket = bucket;
    this.#random = randomNumbers(seed);
  }

  /** From now on nothing is answered. What is under way is carried out with probability `share`. */
  kill(share = 0.5): void {
    this.#dead = true;
    this.#dying = share;
  }

  get dead(): boolean {
    return this.#dead;
  }

  async #run<T>(operation: Operation, key: string, signal: AbortSignal | undefined, run: () => T) {
    this.requests++;
    this.#bucket.requests++;
    this.onRequest?.();
    if (this.#dead) return new Promise<T>(() => {});
    const turns = Math.floor(this.#random() * this.#turns);
    for (let i = 0; i < turns; i++) await new Promise((resolve) => setImmediate(resolve));
    if (this.#dead) {
      if (this.#random() < this.#dying) {
        try {
          run();
        } catch {
          // Nobody hears of it.
        }
      }
      return new Promise<T>(() => {});
    }
    if (signal?.aborted) throw new ObjectStoreError('aborted', `${operation} ${key}: aborted`);
    const decided = this.#bucket.fate(operation, key);
    const fate = decided instanceof Promise ? await decided : decided;
    if (fate === 'hang') return new Promise<T>((_, reject) => hang(signal, reject, operation, key));
    if (fate !== 'good' && 'before' in fate) {
      throw new ObjectStoreError(fate.before, `${operation} ${key}: injected ${fate.before}`);
    }
    const answer = run();
    await this.#bucket.after?.(operation, key);
    await new Promise((resolve) => setImmediate(resolve));
    if (this.#dead) return new Promise<T>(() => {});
    if (fate !== 'good') {
      throw new ObjectStoreError(fate.after, `${operation} ${key}: injected ${fate.after}`);
    }
    return answer;
  }

  #find(operation: string, key: string): Stored {
    const found = this.#bucket.objects.get(key);
    if (found === undefined) {
      throw new ObjectStoreError('not-found', `${operation} ${key}: no such object`);
    }
    return found;
  }

  async get(key: string, options: GetOptions = {}) {
    const { into, range, ifMatch, onProgress } = options;
    // It belongs to the store until the call has settled: whoever else uses it meanwhile finds out.
    into?.fill(SPOILT);
    const { rest, half, ...result } = await this.#run('get', key, options.signal, () => {
      const { body: whole, etag, modified } = this.#find('get', key);
      const { start, end } = range ?? { start: 0, end: whole.length };
      if (ifMatch !== undefined && ifMatch !== etag) {
        throw new ObjectStoreError('precondition', `get ${key}: changed`);
      }
      const bytes = whole.subarray(start, end);
      const isRoomy = into !== undefined && into.length >= bytes.length;
      const body = isRoomy ? into.subarray(0, bytes.length) : Buffer.alloc(bytes.length);
      // The second half comes with the answer's end.
      const half = Math.ceil(bytes.length / 2);
      bytes.copy(body, 0, 0, half);
      if (isRoomy && range !== undefined) onProgress?.(body, half);
      return { body, etag, modified, size: whole.length, rest: bytes.subarray(half), half };
    });
    rest.copy(result.body, half);
    return result;
  }

  put(key: string, parts: readonly Uint8Array[], options: PutOptions = {}): Promise<string> {
    // The body is read when it is sent, as a socket would.
    return this.#run('put', key, options.signal, () => {
      const there = this.#bucket.objects.get(key);
      const refused =
        this.#bucket.conditional &&
        ((options.ifNoneMatch === '*' && there !== undefined) ||
          (options.ifMatch !== undefined && options.ifMatch !== there?.etag));
      if (refused) throw new ObjectStoreError('precondition', `put ${key}: condition not met`);
      this.#bucket.puts.push(key);
      return this.#bucket.put(key, Buffer.concat(parts));
    });
  }

  delete(keys: readonly string[], options: DeleteOptions = {}) {
    const { signal, ifMatch } = options;
    return this.#run('delete', keys[0] ?? '', signal, () => {
      const there = this.#bucket.objects.get(keys[0] ?? '');
      const isHonoured = this.#bucket.conditional && this.#bucket.conditionalDeletes;
      if (ifMatch !== undefined && isHonoured && there?.etag !== ifMatch) {
        throw new ObjectStoreError('precondition', `delete ${keys[0]}: condition not met`);
      }
      for (const key of keys) this.#bucket.objects.delete(key);
    });
  }

  head(key: string, options: { signal?: AbortSignal | undefined } = {}): Promise<ObjectFacts> {
    return this.#run('head', key, options.signal, () => {
      const { body, etag, modified } = this.#find('head', key);
      return { size: body.length, etag, modified };
    });
  }

  async *list(prefix: string, options: ListOptions = {}) {
    const { startAfter = '', limit = Number.POSITIVE_INFINITY } = options;
    const found = await this.#run('list', prefix, options.signal, () =>
      this.#bucket.keys(prefix).filter((key) => key > startAfter),
    );
    for (const key of found.slice(0, limit)) {
      const stored = this.#bucket.objects.get(key);
      if (stored === undefined) continue;
      yield { key, size: stored.body.length, etag: stored.etag, modified: stored.modified };
    }
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}

function hang(
  signal: AbortSignal | undefined,
  reject: (error: Error) => void,
  operation: string,
  key: string,
): void {
  signal?.addEventListener('abort', () =>
    reject(new ObjectStoreError('aborted', `${operation} ${key}: aborted`)),
  );
}
