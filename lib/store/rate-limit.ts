// SPDX-License-Identifier: Apache-2.0
/**
 * Holds a store to a rate. Operations are started in the order in which they came, each at the time
 * at which those before it have used up their share; nothing is refused.
 */
import { setTimeout as wait } from 'node:timers/promises';
import type { MaybePromise } from '../device/data.js';
import { ArgumentError } from '../errors.js';
import type { BlockStore } from './block-store.js';
import { type OperationName, StoreMiddleware, type StoreOperation } from './middleware.js';

/** Limits of `rateLimit`; both may be given. */
export interface RateLimitOptions {
  /** Bytes of read, write, unmap and the like a second. Default: not limited. */
  bytesPerSecond?: number;
  /** Operations started a second. Default: not limited. */
  operationsPerSecond?: number;
  /** Seconds' worth of the rate that may be used at once after a pause. Default 0.1. */
  burst?: number;
  /** Operations that count. Default: all but `flush` and `blockStatus`. */
  operations?: readonly OperationName[];
}

const MOVES_DATA: readonly OperationName[] = [
  'read',
  'write',
  'unmap',
  'writeZeroes',
  'writeSame',
  'compareAndWrite',
];

class RateLimitedStore extends StoreMiddleware {
  readonly #operations: readonly OperationName[];
  readonly #perByte: number;
  readonly #perOperation: number;
  readonly #burst: number;
  /** When everything started so far has used up its share; milliseconds of `performance.now`. */
  #paidUntil = Number.NEGATIVE_INFINITY;

  constructor(inner: BlockStore, options: RateLimitOptions) {
    super(inner);
    const { bytesPerSecond, operationsPerSecond, burst = 0.1 } = options;
    for (const rate of [bytesPerSecond, operationsPerSecond]) {
      if (rate !== undefined && !(rate > 0)) {
        throw new ArgumentError(`rateLimit: ${rate} a second is no rate; give a number above 0`);
      }
    }
    this.#operations = options.operations ?? MOVES_DATA;
    this.#perByte = bytesPerSecond === undefined ? 0 : 1000 / bytesPerSecond;
    this.#perOperation = operationsPerSecond === undefined ? 0 : 1000 / operationsPerSecond;
    this.#burst = burst * 1000;
  }

  protected override intercept<T>(
    operation: StoreOperation,
    run: () => MaybePromise<T>,
  ): MaybePromise<T> {
    if (!this.#operations.includes(operation.name)) return run();
    const now = performance.now();
    const start = Math.max(this.#paidUntil, now - this.#burst);
    this.#paidUntil = start + Math.max(operation.length * this.#perByte, this.#perOperation);
    if (start <= now) return run();
    return until(start, operation.context.signal).then(run);
  }
}

/** Waits for a time of `performance.now`: a timer counts whole milliseconds, and may end one or two early. */
async function until(time: number, signal: AbortSignal): Promise<void> {
  for (;;) {
    const left = time - performance.now();
    if (left <= 0) return;
    await wait(Math.ceil(left), undefined, { signal });
  }
}

/** `store`, no faster than the given rates. An abort of a waiting request ends its wait. */
export function rateLimit(store: BlockStore, options: RateLimitOptions): BlockStore {
  return new RateLimitedStore(store, options);
}
