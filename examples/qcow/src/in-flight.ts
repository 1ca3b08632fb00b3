// SPDX-License-Identifier: Apache-2.0
/**
 * Which operations are under way, by age. A cluster that has been given up may be used for something
 * else only when every operation that began before that has ended: one of them may still read or write
 * it.
 */
export class InFlight {
  #epoch = 0;
  /** Operations under way, by the epoch they began in. */
  readonly #counts = new Map<number, number>();
  #total = 0;
  #waiting: { epoch: number; run: () => void }[] = [];
  #idle: (() => void)[] = [];

  get count(): number {
    return this.#total;
  }

  /** An operation begins. @returns what to give to `leave` */
  enter(): number {
    const epoch = this.#epoch;
    this.#counts.set(epoch, (this.#counts.get(epoch) ?? 0) + 1);
    this.#total++;
    return epoch;
  }

  leave(epoch: number): void {
    this.#total--;
    const left = (this.#counts.get(epoch) as number) - 1;
    if (left > 0) {
      this.#counts.set(epoch, left);
      return;
    }
    this.#counts.delete(epoch);
    this.#settle();
    if (this.#total === 0) {
      const idle = this.#idle;
      this.#idle = [];
      for (const resolve of idle) resolve();
    }
  }

  /** Counts `operation` when it takes time. */
  track<T>(operation: T | Promise<T>): T | Promise<T> {
    if (!(operation instanceof Promise)) return operation;
    const epoch = this.enter();
    return operation.then(
      (value) => {
        this.leave(epoch);
        return value;
      },
      (error: unknown) => {
        this.leave(epoch);
        throw error;
      },
    );
  }

  /** Ends an epoch: what begins from now on is younger. @returns the epoch that has ended */
  advance(): number {
    return this.#epoch++;
  }

  /** Calls `run` when everything that began in `epoch` or before has ended. */
  after(epoch: number, run: () => void): void {
    this.#waiting.push({ epoch, run });
    this.#settle();
  }

  /** Resolves when nothing is under way. */
  async drained(): Promise<void> {
    while (this.#total > 0) await new Promise<void>((resolve) => this.#idle.push(resolve));
  }

  #settle(): void {
    if (this.#waiting.length === 0) return;
    let oldest = Number.POSITIVE_INFINITY;
    for (const epoch of this.#counts.keys()) oldest = Math.min(oldest, epoch);
    const ready = this.#waiting.filter(({ epoch }) => epoch < oldest);
    this.#waiting = this.#waiting.filter(({ epoch }) => epoch >= oldest);
    for (const { run } of ready) run();
  }
}
