// SPDX-License-Identifier: Apache-2.0
/** Counts what is asked of a store, how long it takes and what fails. */
import type { MaybePromise } from '../device/data.js';
import type { BlockStore } from './block-store.js';
import { isPromise } from './maybe.js';
import {
  OPERATIONS,
  type OperationName,
  StoreMiddleware,
  type StoreOperation,
} from './middleware.js';

/** Figures of one kind of operation since the start, or the last `reset`. */
export interface OperationStatistics {
  /** Number of those settled, whether well or not. */
  operations: number;
  /** Bytes asked for. */
  bytes: number;
  /** How many of the operations failed. */
  errors: number;
  /** Number of those begun and not yet settled. */
  inFlight: number;
  /** The most that were in flight at the same time. */
  maxInFlight: number;
  /** Milliseconds from the call to the settling, summed up. */
  totalTime: number;
  /** The longest of them, in milliseconds. */
  maxTime: number;
}

/** Figures by operation. */
export type StoreStatistics = Readonly<Record<OperationName, Readonly<OperationStatistics>>>;

/** A store that counts. */
export class CountingStore extends StoreMiddleware {
  #counters = newCounters();

  /** The figures now; they go on changing in the same object until `reset`. */
  get statistics(): StoreStatistics {
    return this.#counters;
  }

  /** Begins anew; what is in flight is still counted when it settles, in the old figures. */
  reset(): void {
    this.#counters = newCounters();
  }

  protected override intercept<T>(
    operation: StoreOperation,
    run: () => MaybePromise<T>,
  ): MaybePromise<T> {
    const counter = this.#counters[operation.name];
    const start = performance.now();
    counter.inFlight++;
    counter.maxInFlight = Math.max(counter.maxInFlight, counter.inFlight);
    const settle = (errors: number) => {
      const time = performance.now() - start;
      counter.inFlight--;
      counter.operations++;
      counter.bytes += operation.length;
      counter.errors += errors;
      counter.totalTime += time;
      counter.maxTime = Math.max(counter.maxTime, time);
    };
    const failed = (error: unknown): never => {
      settle(1);
      throw error;
    };
    let answer: MaybePromise<T>;
    try {
      answer = run();
    } catch (error) {
      return failed(error);
    }
    if (isPromise(answer)) {
      return (answer as Promise<T>).then((value) => {
        settle(0);
        return value;
      }, failed);
    }
    settle(0);
    return answer;
  }
}

function newCounters(): Record<OperationName, OperationStatistics> {
  return Object.fromEntries(
    OPERATIONS.map((name) => [
      name,
      {
        operations: 0,
        bytes: 0,
        errors: 0,
        inFlight: 0,
        maxInFlight: 0,
        totalTime: 0,
        maxTime: 0,
      },
    ]),
  ) as Record<OperationName, OperationStatistics>;
}

/** `store`, with figures in its `statistics`. */
export function statistics(store: BlockStore): CountingStore {
  return new CountingStore(store);
}
