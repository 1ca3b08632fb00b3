// SPDX-License-Identifier: Apache-2.0
/**
 * Keeps operations that change the mapping of the same guest clusters apart, in order of arrival.
 * Operations that only use the mapping don't take it.
 */
import type { MaybePromise } from 'tcmu';

export interface ClusterRange {
  readonly first: number;
  readonly last: number;
  granted: boolean;
  grant: () => void;
}

export class ClusterLock {
  readonly #ranges: ClusterRange[] = [];

  /** The clusters `first` to `last`, when nobody before has any of them. Take one range at a time. */
  acquire(first: number, last: number): MaybePromise<ClusterRange> {
    const range: ClusterRange = { first, last, granted: false, grant: () => {} };
    this.#ranges.push(range);
    if (this.#free(range)) {
      range.granted = true;
      return range;
    }
    return new Promise((resolve) => {
      range.grant = () => resolve(range);
    });
  }

  release(range: ClusterRange): void {
    this.#ranges.splice(this.#ranges.indexOf(range), 1);
    for (const waiting of this.#ranges) {
      if (waiting.granted || !this.#free(waiting)) continue;
      waiting.granted = true;
      waiting.grant();
    }
  }

  #free(range: ClusterRange): boolean {
    for (const other of this.#ranges) {
      if (other === range) return true;
      if (other.first <= range.last && range.first <= other.last) return false;
    }
    return true;
  }
}
