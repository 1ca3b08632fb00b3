// SPDX-License-Identifier: Apache-2.0
/**
 * Keeps an operation that must be atomic (COMPARE AND WRITE, ORWRITE, part of a block) apart from
 * writes to the same bytes. Shared holders, the writes, may overlap each other; an exclusive holder
 * overlaps nobody. Grants are in order of arrival, so neither side starves. Nobody may hold a range
 * while waiting for another.
 */
import type { MaybePromise } from '../device/data.js';

/** A held or awaited range; the ticket to `release`. */
export interface HeldRange {
  readonly start: number;
  readonly end: number;
  readonly exclusive: boolean;
  granted: boolean;
  grant: (() => void) | undefined;
}

export class RangeLock {
  readonly #ranges: HeldRange[] = [];
  readonly #onContended: () => void;
  #exclusive = 0;

  /** @param onContended called when `contended` becomes true */
  constructor(onContended: () => void = () => {}) {
    this.#onContended = onContended;
  }

  /**
   * Whether an exclusive range is held or awaited. While not, a write may go ahead and `note`
   * itself.
   */
  get contended(): boolean {
    return this.#exclusive > 0;
  }

  /** Registers a write that is already under way; only right while the lock is not `contended`. */
  note(start: number, end: number): HeldRange {
    const range = { start, end, exclusive: false, granted: true, grant: undefined };
    this.#ranges.push(range);
    return range;
  }

  /** The range once nobody in its way holds, or waited earlier for, a part of it. */
  acquire(start: number, end: number, exclusive: boolean): MaybePromise<HeldRange> {
    const range: HeldRange = { start, end, exclusive, granted: false, grant: undefined };
    if (exclusive && this.#exclusive++ === 0) this.#onContended();
    this.#ranges.push(range);
    if (this.#free(range)) {
      range.granted = true;
      return range;
    }
    return new Promise((resolve) => {
      range.grant = () => resolve(range);
    });
  }

  release(range: HeldRange): void {
    this.#ranges.splice(this.#ranges.indexOf(range), 1);
    if (this.#exclusive === 0) return;
    if (range.exclusive) this.#exclusive--;
    for (const waiting of this.#ranges) {
      if (waiting.granted || !this.#free(waiting)) continue;
      waiting.granted = true;
      waiting.grant?.();
    }
  }

  /** Whether no range before `range` stands in its way. */
  #free(range: HeldRange): boolean {
    for (const other of this.#ranges) {
      if (other === range) return true;
      if (
        (other.exclusive || range.exclusive) &&
        other.start < range.end &&
        range.start < other.end
      ) {
        return false;
      }
    }
    return true;
  }
}
