// SPDX-License-Identifier: Apache-2.0
/**
 * Makes operations of a store fail by rule. Which ones fail follows from the seed and the sequence of
 * operations alone, so a failing run can be repeated.
 */
import type { MaybePromise } from '../device/data.js';
import { FileError } from '../errors.js';
import type { BlockStore } from './block-store.js';
import { chain } from './maybe.js';
import { type OperationName, StoreMiddleware, type StoreOperation } from './middleware.js';

/** Which operations fail, and how. All conditions must hold; without any every operation fails. */
export interface FaultRule {
  /** Operations it is about. Default: all. */
  operations?: readonly OperationName[];
  /** Bytes of the disk, `[start, end)`: only operations that touch them. Default: all. */
  range?: readonly [start: number, end: number];
  /** Share of the matching operations that fails, 0 to 1. Default 1. */
  probability?: number;
  /** Matching operations let pass first. Default 0. */
  skip?: number;
  /** Number of failures after which the rule is spent. Default: never. */
  times?: number;
  /** errno name of the error, or the error itself. Default `EIO`. */
  error?: string | ((operation: StoreOperation) => unknown);
  /** Whether the operation is carried out nevertheless. Default false. */
  afterwards?: boolean;
}

class FaultyStore extends StoreMiddleware {
  readonly #rules: { rule: FaultRule; matched: number; failed: number }[];
  readonly #random: () => number;

  constructor(inner: BlockStore, rules: readonly FaultRule[], seed: number) {
    super(inner);
    this.#rules = rules.map((rule) => ({ rule, matched: 0, failed: 0 }));
    this.#random = randomNumbers(seed);
  }

  protected override intercept<T>(
    operation: StoreOperation,
    run: () => MaybePromise<T>,
  ): MaybePromise<T> {
    const rule = this.#strike(operation);
    if (rule === undefined) return run();
    if (!rule.afterwards) throw fault(rule, operation);
    return chain(run(), () => {
      throw fault(rule, operation);
    });
  }

  #strike(operation: StoreOperation): FaultRule | undefined {
    for (const state of this.#rules) {
      const { rule } = state;
      if (!matches(rule, operation)) continue;
      state.matched++;
      if (state.matched <= (rule.skip ?? 0)) continue;
      if (state.failed >= (rule.times ?? Number.POSITIVE_INFINITY)) continue;
      if (rule.probability !== undefined && this.#random() >= rule.probability) continue;
      state.failed++;
      return rule;
    }
    return undefined;
  }
}

function matches(rule: FaultRule, operation: StoreOperation): boolean {
  if (rule.operations !== undefined && !rule.operations.includes(operation.name)) return false;
  if (rule.range === undefined) return true;
  const [start, end] = rule.range;
  return operation.position < end && start < operation.position + operation.length;
}

function fault(rule: FaultRule, operation: StoreOperation): unknown {
  if (typeof rule.error === 'function') return rule.error(operation);
  const errno = rule.error ?? 'EIO';
  const { name, position, length } = operation;
  return new FileError(
    'ERR_TCMU_IO',
    `${name} of ${length} bytes at ${position}: injected ${errno}`,
    {
      operation: name,
      errno,
    },
  );
}

/** Numbers in [0, 1) that follow from `seed` (the mulberry32 generator). */
export function randomNumbers(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 0x1_0000_0000;
  };
}

/**
 * `store`, failing as the rules say; the first rule that strikes decides.
 * @param options `seed` of the random numbers behind `probability`; default 1.
 */
export function faults(
  store: BlockStore,
  rules: FaultRule | readonly FaultRule[],
  options: { seed?: number } = {},
): BlockStore {
  const list = Array.isArray(rules) ? (rules as readonly FaultRule[]) : [rules as FaultRule];
  return new FaultyStore(store, list, options.seed ?? 1);
}
