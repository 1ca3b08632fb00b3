// SPDX-License-Identifier: Apache-2.0
/**
 * Watches the space behind a thin disk against the soft thresholds of the Logical Block Provisioning mode
 * page (SBC-4), and raises their unit attention once each time one is crossed. Looks after writes and
 * unmaps, at most once a second, and not at all while no threshold is enabled.
 */
import type { StoreSpace } from '../store/block-store.js';
import { isPromise } from '../store/maybe.js';
import { readU32 } from './bytes.js';
import type { LogicalUnit } from './logical-unit.js';
import { sense } from './sense.js';

const INTERVAL_MS = 1000;

/** LBA mapping resources (SBC-4): what a threshold or a log parameter counts. */
export const Resource = { AVAILABLE: 0x01, USED: 0x02 } as const;

export class SpaceWatch {
  readonly #unit: LogicalUnit;
  #lastLook = Number.NEGATIVE_INFINITY;
  #looking = false;
  /** Thresholds beyond which the space is now, by index: told once. */
  readonly #crossed = new Set<number>();

  constructor(unit: LogicalUnit) {
    this.#unit = unit;
  }

  /** THRESHOLD EXPONENT: a count of space is in 2^n blocks, chosen so that 32 bits hold any disk. */
  get exponent(): number {
    return Math.max(1, Math.ceil(Math.log2(Math.max(2, this.#unit.blocks))) - 31);
  }

  /** Bytes as a count of threshold sets. */
  count(bytes: number): number {
    return Math.min(Math.floor(bytes / (this.#unit.blockSize * 2 ** this.exponent)), 0xffff_ffff);
  }

  /** After a change of the disk's contents. */
  changed(): void {
    if (!this.#unit.modePages.thresholdsEnabled || this.#looking) return;
    const now = performance.now();
    if (now - this.#lastLook < INTERVAL_MS) return;
    this.#lastLook = now;
    this.look();
  }

  /** Compares now: after the thresholds were set. A store that can't tell is asked again later. */
  look(): void {
    if (!this.#unit.modePages.thresholdsEnabled) return this.#crossed.clear();
    this.#looking = true;
    const end = () => {
      this.#looking = false;
    };
    try {
      const space = this.#unit.store.space?.();
      if (isPromise(space)) {
        (space as Promise<StoreSpace>).then((told) => this.#compare(told)).then(end, end);
        return;
      }
      if (space !== undefined) this.#compare(space);
      end();
    } catch {
      end();
    }
  }

  #compare(space: StoreSpace): void {
    for (const [index, threshold] of this.#unit.modePages.thresholds().entries()) {
      const enabled = ((threshold[0] as number) & 0x80) !== 0;
      const limit = readU32(threshold, 4);
      const low =
        threshold[1] === Resource.AVAILABLE
          ? this.count(space.available) <= limit
          : this.count(space.used) >= limit;
      if (!enabled || !low) this.#crossed.delete(index);
      else if (!this.#crossed.has(index)) {
        this.#crossed.add(index);
        this.#unit.raiseAttention(sense.softThresholdReached());
      }
    }
  }
}
