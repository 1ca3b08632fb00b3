// SPDX-License-Identifier: Apache-2.0
/**
 * Work that nobody waits for (moving the log into chunks, deleting) makes way for those who do.
 *
 * Contract: while somebody waits for the bucket (a flush, a read that is not in memory, a write without room), and
 * for a moment after, the background's requests go one at a time, and after each it rests, so that it takes no
 * more than its share of the time. The share grows with what is owed and is all of it when as much is owed as
 * may be: then, and while nobody waits, `WIDTH` requests go side by side without a rest. So nothing that is owed can grow
 * without end, however busy the disk is.
 */
import type { Clock } from './requests.js';

/** Requests of the background at a time. */
export const WIDTH = 4;
/** Somebody who waits again and again, with so many milliseconds between, keeps the background slow. */
const LINGER_MS = 30;
/** Share of the time for as long as little is owed. */
const LEAST_SHARE = 0.1;
/** A request that hung says nothing about the next one. */
const LONGEST_REST_MS = 2000;
const LOOK_MS = 5;

export class Background {
  readonly #clock: Clock;
  readonly #signal: AbortSignal;
  #waiting = 0;
  #left = Number.NEGATIVE_INFINITY;
  #running = 0;
  #restUntil = Number.NEGATIVE_INFINITY;
  /** 0: nothing, to 1: as much as may be. */
  owed = (): number => 0;

  /** @param signal ends rests */
  constructor(clock: Clock, signal: AbortSignal) {
    this.#clock = clock;
    this.#signal = signal;
  }

  /** How many wait at the moment. */
  get waiting(): number {
    return this.#waiting;
  }

  /** Whether it makes way at the moment. */
  get yields(): boolean {
    const isBusy = this.#waiting > 0 || this.#clock.now() - this.#left < LINGER_MS;
    return isBusy && this.owed() < 1;
  }

  /** Somebody waits until `promise` has settled. */
  async ahead<T>(promise: Promise<T>): Promise<T> {
    this.#waiting++;
    try {
      return await promise;
    } finally {
      this.#waiting--;
      this.#left = this.#clock.now();
    }
  }

  /** One request's worth of work, when it is its turn. */
  async run<T>(work: () => Promise<T>): Promise<T> {
    while (!this.#mayStart()) await this.#clock.sleep(LOOK_MS, this.#signal);
    this.#running++;
    const began = this.#clock.now();
    try {
      return await work();
    } finally {
      this.#running--;
      const now = this.#clock.now();
      const rest = (now - began) * (1 / this.#share - 1);
      this.#restUntil = now + Math.min(rest, LONGEST_REST_MS);
    }
  }

  #mayStart(): boolean {
    if (this.#signal.aborted) return true;
    if (!this.yields) return this.#running < WIDTH;
    return this.#running === 0 && this.#clock.now() >= this.#restUntil;
  }

  /** Most of the debt is left for when nobody waits. */
  get #share(): number {
    const owed = Math.max(0, this.owed());
    return Math.min(1, Math.max(LEAST_SHARE, owed * owed));
  }
}
