// SPDX-License-Identifier: Apache-2.0
/** Slows a store down, to see what initiators and time-outs make of it. */
import { setTimeout as wait } from 'node:timers/promises';
import type { MaybePromise } from '../device/data.js';
import type { BlockStore } from './block-store.js';
import { type OperationName, StoreMiddleware, type StoreOperation } from './middleware.js';

/** Milliseconds for all operations, by name, or as a function of the operation. */
export type Delay =
  | number
  | Partial<Record<OperationName, number>>
  | ((operation: StoreOperation) => number);

class DelayedStore extends StoreMiddleware {
  readonly #delay: (operation: StoreOperation) => number;

  constructor(inner: BlockStore, delay: Delay) {
    super(inner);
    if (typeof delay === 'function') this.#delay = delay;
    else if (typeof delay === 'number') this.#delay = () => delay;
    else this.#delay = (operation) => delay[operation.name] ?? 0;
  }

  protected override intercept<T>(
    operation: StoreOperation,
    run: () => MaybePromise<T>,
  ): MaybePromise<T> {
    const milliseconds = this.#delay(operation);
    if (milliseconds <= 0) return run();
    return wait(milliseconds, undefined, { signal: operation.context.signal }).then(run);
  }
}

/**
 * Waits before each operation; an abort of the request ends the wait with an `AbortError`, and the
 * operation is not carried out.
 */
export function delay(store: BlockStore, milliseconds: Delay): BlockStore {
  return new DelayedStore(store, milliseconds);
}
