// SPDX-License-Identifier: Apache-2.0
/**
 * Plumbing for methods that may answer at once or by a promise: what can go on at once does,
 * without a microtask, and only a real promise makes the caller wait.
 */
import type { MaybePromise } from '../device/data.js';

/** Whether `value` is a promise (any thenable). */
export function isPromise(value: unknown): value is PromiseLike<unknown> {
  return (
    typeof value === 'object' &&
    value !== null &&
    typeof (value as { then?: unknown }).then === 'function'
  );
}

/** `next(value)`, at once when `value` is there. */
export function chain<T, R>(
  value: MaybePromise<T>,
  next: (value: T) => MaybePromise<R>,
): MaybePromise<R> {
  return isPromise(value) ? (value as Promise<T>).then(next) : next(value);
}

/** `value`, and afterwards `cleanup()`, whether it succeeded or failed. */
export function settled<T>(run: () => MaybePromise<T>, cleanup: () => void): MaybePromise<T> {
  let value: MaybePromise<T>;
  try {
    value = run();
  } catch (error) {
    cleanup();
    throw error;
  }
  if (isPromise(value)) return Promise.resolve(value).finally(cleanup);
  cleanup();
  return value;
}

/**
 * Calls `step(offset, length)` for consecutive pieces of at most `piece` bytes of `[0, total)`, one
 * after the other. A step that answers `false` ends the walk.
 */
export function eachPiece(
  total: number,
  piece: number,
  step: (offset: number, length: number) => MaybePromise<unknown>,
): MaybePromise<void> {
  for (let offset = 0; offset < total; offset += piece) {
    const answer = step(offset, Math.min(piece, total - offset));
    if (isPromise(answer)) return continueAfter(answer, offset + piece, total, piece, step);
    if (answer === false) return;
  }
}

async function continueAfter(
  pending: PromiseLike<unknown>,
  start: number,
  total: number,
  piece: number,
  step: (offset: number, length: number) => MaybePromise<unknown>,
): Promise<void> {
  if ((await pending) === false) return;
  for (let offset = start; offset < total; offset += piece) {
    if ((await step(offset, Math.min(piece, total - offset))) === false) return;
  }
}
