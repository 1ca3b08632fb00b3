// SPDX-License-Identifier: Apache-2.0
/**
 * Requests that are tried again: full-jitter backoff (each wait is drawn from 0 to a bound that doubles),
 * as long as somebody is patient. What can't get better by waiting is thrown at once. One log line says
 * that the bucket doesn't answer, one that it does again.
 */
import { setMaxListeners } from 'node:events';
import {
  failureKind,
  type GetOptions,
  type GetResult,
  type ListedObject,
  type ListOptions,
  type ObjectFacts,
  type ObjectStore,
  type PutOptions,
} from '../object-store.js';
import { Background } from './background.js';
import { DiskError } from './errors.js';

/** Time and chance, given from outside so that tests repeat. */
export interface Clock {
  /** Milliseconds, steady. */
  now(): number;
  /** Milliseconds of the time of day, which may step. */
  wall(): number;
  /** Settles after `ms`, or at once when `signal` is aborted. */
  sleep(ms: number, signal?: AbortSignal): Promise<void>;
  /** 0 to 1. */
  random(): number;
}

export const systemClock: Clock = {
  now: () => performance.now(),
  wall: () => Date.now(),
  random: () => Math.random(),
  sleep: (ms, signal) =>
    new Promise((resolve) => {
      if (signal?.aborted) return resolve();
      // setTimeout takes no more than 31 bits of milliseconds, and anything above for none.
      const timer = setTimeout(done, Math.min(ms, 2 ** 31 - 1));
      function done(): void {
        clearTimeout(timer);
        signal?.removeEventListener('abort', done);
        resolve();
      }
      signal?.addEventListener('abort', done);
    }),
};

export type LogLevel = 'info' | 'warning' | 'error';
export type Log = (level: LogLevel, message: string) => void;

/** Requests sent, failed attempts included. */
export interface RequestCounters {
  gets: number;
  puts: number;
  deletes: number;
  lists: number;
  heads: number;
  bytesRead: number;
  bytesWritten: number;
  /** Attempts that failed and were, or will be, made again. */
  retries: number;
  throttled: number;
}

const FIRST_WAIT_MS = 50;
const LONGEST_WAIT_MS = 10_000;
const TELL_AFTER_MS = 1000;
/** How often an object is looked at whose ETag is another by the time that something is done to it. */
const MATCH_ATTEMPTS = 4;
/** Keys one DELETE request may name (S3 DeleteObjects). */
const DELETE_BATCH = 1000;

/** Whether waiting may help. */
export function isTransient(error: unknown): boolean {
  const kind = failureKind(error);
  return kind === 'outage' || kind === 'throttled' || kind === 'credentials';
}

/** Whether the bucket refuses us until somebody does something about it. */
export function isRefusal(error: unknown): boolean {
  const kind = failureKind(error);
  return kind === 'forbidden' || kind === 'no-bucket' || kind === 'clock-skew';
}

export class Requests {
  readonly objects: ObjectStore;
  readonly clock: Clock;
  readonly log: Log;
  readonly counters: RequestCounters = {
    gets: 0,
    puts: 0,
    deletes: 0,
    lists: 0,
    heads: 0,
    bytesRead: 0,
    bytesWritten: 0,
    retries: 0,
    throttled: 0,
  };
  /** What makes way for those who wait. */
  readonly background: Background;
  /** Milliseconds after which a caller is told `unreachable`. */
  readonly patience: number;
  readonly #closing = new AbortController();
  #failingSince: number | undefined;
  #told = false;

  constructor(objects: ObjectStore, clock: Clock, log: Log, patience: number) {
    this.objects = objects;
    this.clock = clock;
    this.log = log;
    this.patience = patience;
    // Every request and every wait under way listens.
    setMaxListeners(0, this.#closing.signal);
    this.background = new Background(clock, this.#closing.signal);
  }

  /** Milliseconds since the bucket last answered usefully; 0 while it does. */
  get outage(): number {
    return this.#failingSince === undefined ? 0 : this.clock.now() - this.#failingSince;
  }

  get signal(): AbortSignal {
    return this.#closing.signal;
  }

  /** Ends what is being waited for. */
  close(): void {
    this.#closing.abort();
  }

  get(key: string, options: GetOptions = {}, patience?: number): Promise<GetResult> {
    return this.retry(
      `get ${key}`,
      async () => {
        this.counters.gets++;
        const result = await this.objects.get(key, { signal: this.signal, ...options });
        this.counters.bytesRead += result.body.length;
        return result;
      },
      patience,
    );
  }

  /** One attempt: whoever puts must look into an ambiguous answer first. */
  put(key: string, body: readonly Uint8Array[], options: PutOptions): Promise<string> {
    this.counters.puts++;
    for (const part of body) this.counters.bytesWritten += part.length;
    return this.objects.put(key, body, { signal: this.signal, ...options });
  }

  /**
   * Creates an object whose name nobody else uses: an earlier attempt of ours may have got through, and
   * then it is there already.
   */
  async create(key: string, body: readonly Uint8Array[], patience?: number): Promise<void> {
    await this.retry(
      `put ${key}`,
      async () => {
        try {
          await this.put(key, body, { ifNoneMatch: '*' });
        } catch (error) {
          if (failureKind(error) !== 'precondition') throw error;
        }
      },
      patience,
    );
  }

  /**
   * @param isVacant whether what is there may be replaced
   * @returns whether the object is the one given; the name may be taken by another.
   */
  claim(
    key: string,
    body: readonly Uint8Array[],
    isVacant: (body: Buffer) => boolean = () => false,
  ): Promise<boolean> {
    const look = (): Promise<GetResult> => {
      this.counters.gets++;
      return this.objects.get(key, { signal: this.signal });
    };
    return this.retry(`put ${key}`, async () => {
      if (await this.#isPut(key, body, { ifNoneMatch: '*' })) return true;
      let there = await look();
      if (isVacant(there.body)) {
        if (await this.#isPut(key, body, { ifMatch: there.etag })) return true;
        there = await look();
      }
      // An earlier attempt, or a copy of this one, may have got through.
      return there.body.equals(Buffer.concat(body));
    });
  }

  /** @returns false when the condition does not hold */
  async #isPut(key: string, body: readonly Uint8Array[], condition: PutOptions): Promise<boolean> {
    try {
      await this.put(key, body, condition);
      return true;
    } catch (error) {
      if (failureKind(error) !== 'precondition') throw error;
      return false;
    }
  }

  head(key: string, patience?: number): Promise<ObjectFacts> {
    return this.retry(
      `head ${key}`,
      () => {
        this.counters.heads++;
        return this.objects.head(key, { signal: this.signal });
      },
      patience,
    );
  }

  async delete(keys: readonly string[], patience?: number): Promise<void> {
    for (let at = 0; at < keys.length; at += DELETE_BATCH) {
      const batch = keys.slice(at, at + DELETE_BATCH);
      await this.retry(
        `delete ${batch.length} objects`,
        () => {
          this.counters.deletes++;
          return this.objects.delete(batch, { signal: this.signal });
        },
        patience,
      );
    }
  }

  /**
   * Replaces an object if it is the one meant: each attempt looks first, since an earlier one may have got through.
   * @param body unlike anything that was ever there
   */
  replaceIf(key: string, isMeant: (body: Buffer) => boolean, body: Uint8Array): Promise<void> {
    return this.#ifMeant(`put ${key}`, key, isMeant, async (ifMatch) => {
      await this.put(key, [body], { ifMatch });
    });
  }

  /**
   * Deletes an object if it is the one meant; looks first as `replaceIf` does. Where the store
   * ignores conditions, one that takes the name between look and deletion is deleted instead.
   */
  deleteIf(key: string, isMeant: (body: Buffer) => boolean): Promise<void> {
    return this.#ifMeant(`delete ${key}`, key, isMeant, async (etag, attempt) => {
      // A store whose ETags don't match themselves (weak ones) is asked again without.
      const ifMatch = attempt === 0 && etag !== '' ? etag : undefined;
      this.counters.deletes++;
      await this.objects.delete([key], { signal: this.signal, ifMatch });
    });
  }

  #ifMeant(
    what: string,
    key: string,
    isMeant: (body: Buffer) => boolean,
    act: (etag: string, attempt: number) => Promise<void>,
  ): Promise<void> {
    return this.retry(what, async () => {
      for (let attempt = 0; ; attempt++) {
        try {
          this.counters.gets++;
          const { body, etag } = await this.objects.get(key, { signal: this.signal });
          if (isMeant(body)) await act(etag, attempt);
          return;
        } catch (error) {
          const kind = failureKind(error);
          if (kind === 'not-found') return;
          if (kind !== 'precondition' || attempt + 1 === MATCH_ATTEMPTS) throw error;
        }
      }
    });
  }

  /** All of it; begun anew when it fails halfway. */
  list(prefix: string, options: ListOptions = {}, patience?: number): Promise<ListedObject[]> {
    return this.retry(
      `list ${prefix}`,
      async () => {
        this.counters.lists++;
        const found: ListedObject[] = [];
        const listing = this.objects.list(prefix, { signal: this.signal, ...options });
        for await (const object of listing) found.push(object);
        return found;
      },
      patience,
    );
  }

  /**
   * @param patience milliseconds; default: the one of the constructor
   * @throws DiskError `unreachable`, `closed`; whatever waiting can't mend
   */
  async retry<T>(what: string, run: () => Promise<T>, patience = this.patience): Promise<T> {
    const began = this.clock.now();
    for (let attempt = 0; ; attempt++) {
      try {
        const result = await run();
        this.succeeded();
        return result;
      } catch (error) {
        if (this.signal.aborted) throw this.#closed(what, error);
        if (!isTransient(error)) throw error;
        this.failed(error);
        const wait = this.backoff(attempt);
        if (this.clock.now() - began + wait > patience) throw unreachable(what, error);
        await this.clock.sleep(wait, this.signal);
        if (this.signal.aborted) throw this.#closed(what, error);
      }
    }
  }

  #closed(what: string, cause: unknown): DiskError {
    return new DiskError('closed', `${what}: the disk was closed meanwhile`, { cause });
  }

  /** Milliseconds to wait after attempt number `attempt` (from 0) has failed. */
  backoff(attempt: number): number {
    return (
      this.clock.random() * Math.min(LONGEST_WAIT_MS, FIRST_WAIT_MS * 2 ** Math.min(attempt, 20))
    );
  }

  failed(error: unknown): void {
    this.counters.retries++;
    if (failureKind(error) === 'throttled') this.counters.throttled++;
    this.#failingSince ??= this.clock.now();
    // A failure among many successes is the retry's business alone.
    if (this.#told || this.outage < TELL_AFTER_MS) return;
    this.#told = true;
    this.log('warning', `${(error as Error).message}; trying again until it works`);
  }

  succeeded(): void {
    if (this.#told) {
      const seconds = (this.outage / 1000).toFixed(1);
      this.log('info', `${this.objects.description} answers again, after ${seconds} s`);
    }
    this.#told = false;
    this.#failingSince = undefined;
  }
}

export function unreachable(what: string, cause: unknown): DiskError {
  return new DiskError(
    'unreachable',
    `${what}: the bucket has not answered for too long (${(cause as Error | undefined)?.message ?? 'no answer yet'}); nothing is lost, what is not durable yet is kept and sent when it answers`,
    { cause },
  );
}
