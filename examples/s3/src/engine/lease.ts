// SPDX-License-Identifier: Apache-2.0
/**
 * How long a writer may acknowledge what it only has in memory.
 *
 * Only the bucket knows whether somebody else has opened the disk, and a cache that asks for each write is none.
 * So a writer has a lease: it acknowledges from its memory for `length` after a moment at which the disk was
 * certainly its own, the beginning of a request that has shown so; then it asks first. Its claim says how
 * long the lease is, and whoever opens the disk after it answers nobody before that time has passed since
 * its own claim. The two never overlap, whatever the network does and however long a process sleeps.
 *
 * Both count on clocks that go on alike, not on what they show. A machine that slept has a steady clock that stood still
 * and a wall clock that did not: when the two disagree, the lease is over. One that stepped ends it too, which
 * costs a request.
 */
import type { Clock } from './requests.js';

/** The two clocks may have come apart by so much before it means anything. Milliseconds. */
const DISAGREEMENT = 100;
/** What two machines' clocks may differ by in how fast they go (crystals: a thousandth of that). */
const DRIFT = 0.05;

/** Both clocks at one time. */
export interface Moment {
  readonly now: number;
  readonly wall: number;
}

/** Milliseconds that whoever has claimed the disk waits for a writer with this lease. */
export function waitFor(length: number): number {
  return length === 0 ? 0 : length * (1 + DRIFT) + 2 * DISAGREEMENT;
}

export class Lease {
  /** Milliseconds; 0: none, and nobody waits for it. */
  readonly length: number;
  readonly #clock: Clock;
  #since: Moment = { now: Number.NEGATIVE_INFINITY, wall: 0 };

  constructor(clock: Clock, length: number) {
    this.#clock = clock;
    this.length = length;
  }

  /** To be taken before a request begins. */
  moment(): Moment {
    return { now: this.#clock.now(), wall: this.#clock.wall() };
  }

  /** The disk was ours then, or later. */
  proved(moment: Moment): void {
    if (moment.now >= this.#since.now) this.#since = moment;
  }

  /** Whether what is in memory may be acknowledged now. */
  get holds(): boolean {
    return this.length === 0 || this.#within(this.length);
  }

  /** Whether it is time to ask, so that nobody has to wait for it. */
  get ages(): boolean {
    return this.length > 0 && !this.#within(this.length / 3);
  }

  #within(length: number): boolean {
    const age = this.#clock.now() - this.#since.now;
    if (age >= length) return false;
    return Math.abs(this.#clock.wall() - this.#since.wall - age) <= DISAGREEMENT;
  }
}
