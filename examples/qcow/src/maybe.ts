// SPDX-License-Identifier: Apache-2.0
/**
 * Plumbing for methods that may answer at once or by a promise: what can go on at once does, without
 * a microtask, and only a real promise makes the caller wait.
 */
import type { MaybePromise } from 'tcmu';

/** `next(value)`, at once when `value` is there. */
export function chain<T, R>(
  value: MaybePromise<T>,
  next: (value: T) => MaybePromise<R>,
): MaybePromise<R> {
  return value instanceof Promise ? value.then(next) : next(value);
}

/** What `run` answers, or, when it throws or rejects, what `rescue` makes of the error. */
export function orElse<T>(
  run: () => MaybePromise<T>,
  rescue: (error: unknown) => MaybePromise<T>,
): MaybePromise<T> {
  try {
    const value = run();
    return value instanceof Promise ? value.catch(rescue) : value;
  } catch (error) {
    return rescue(error);
  }
}

/** `step(0)` to `step(count - 1)`, each after the one before has settled. */
export function eachInTurn(
  count: number,
  step: (index: number) => MaybePromise<unknown>,
): MaybePromise<void> {
  for (let i = 0; i < count; i++) {
    const answer = step(i);
    if (answer instanceof Promise) return continueAfter(answer, i + 1, count, step);
  }
}

async function continueAfter(
  pending: Promise<unknown>,
  start: number,
  count: number,
  step: (index: number) => MaybePromise<unknown>,
): Promise<void> {
  await pending;
  for (let i = start; i < count; i++) await step(i);
}
