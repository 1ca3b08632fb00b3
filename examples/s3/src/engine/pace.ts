// SPDX-License-Identifier: Apache-2.0
/**
 * How long the log is, in everything that bounds it, and who may make it longer.
 *
 * A checkpoint frees its part of the log all at once, when its record is there. Changes don't wait for that: they are admitted in
 * step with it. When so much of it is done, so much may be used of the room there was when it began, or of what it will free,
 * whichever is more. So a log that is full takes changes at the speed at which its oldest part goes into chunks, each
 * waits for a few requests at most, and none is longer at a checkpoint's end than at its beginning.
 *
 * Contract: below `FREE` of what the log may be too long nobody waits, and nobody does while nothing makes the log shorter. First come, first served.
 * What the index takes of memory is never more than twice its limit: there, changes wait for all of the checkpoint.
 */
import type { Clock } from './requests.js';

/** For each thing that bounds a log its size, as a multiple of the size from which on a checkpoint is wanted. */
export interface LogLength {
  readonly bytes: number;
  readonly segments: number;
  readonly index: number;
}

/** What a checkpoint takes away of it. */
export type Freed = Pick<LogLength, 'bytes' | 'segments'>;

const LIMIT = 2;
/** Up to which length nobody waits. */
const FREE = 1.75;
/** Of a log that is full it may be longer by so much until what a checkpoint frees is free. */
const ADVANCE = 1 / 8;

/** The checkpoint under way. */
interface Part {
  readonly start: Freed;
  readonly freed: Freed;
  /** What it appends itself. */
  readonly appended: number;
  progress: number;
  isFree: boolean;
}

export class Pace {
  readonly #clock: Clock;
  readonly #length: () => LogLength;
  readonly #isShrinking: () => boolean;
  #part: Part | undefined;
  #queued = 0;
  /** Settles when the last in the queue has had its turn. */
  #turn: Promise<void> = Promise.resolve();
  #wake: () => void = () => {};

  /** @param isShrinking whether waiting is of any use */
  constructor(clock: Clock, length: () => LogLength, isShrinking: () => boolean) {
    this.#clock = clock;
    this.#length = length;
    this.#isShrinking = isShrinking;
  }

  /** How much of what the log may be too long it is: 1 or more where it is full. */
  get owed(): number {
    const { bytes, segments, index } = this.#length();
    return Math.max(bytes, segments, index) - 1;
  }

  /** Whether a change may be made at once. */
  get admits(): boolean {
    return this.#queued === 0 && this.#isOpen();
  }

  /**
   * Until a change may be made.
   * @param patience milliseconds
   * @returns whether it may, or else its patience is over
   */
  async wait(patience: number): Promise<boolean> {
    if (this.admits) return true;
    const until = this.#clock.now() + patience;
    this.#queued++;
    const turn = this.#turn.then(() => this.#untilOpen(until));
    // The next one sees what this one has added.
    this.#turn = turn.then(() => new Promise<void>((resolve) => setImmediate(resolve)));
    try {
      return await turn;
    } finally {
      this.#queued--;
    }
  }

  async #untilOpen(until: number): Promise<boolean> {
    while (!this.#isOpen()) {
      const left = until - this.#clock.now();
      if (left <= 0) return false;
      const woken = new AbortController();
      this.#wake = () => woken.abort();
      await this.#clock.sleep(left, woken.signal);
    }
    return true;
  }

  #isOpen(): boolean {
    if (!this.#isShrinking()) return true;
    const { bytes, segments, index } = this.#length();
    const { start, freed, appended } = this.#part ?? Pace.#none;
    return (
      bytes < this.#mayBe(start.bytes, freed.bytes) + appended &&
      segments < this.#mayBe(start.segments, freed.segments) &&
      index < LIMIT
    );
  }

  static readonly #none: Omit<Part, 'progress' | 'isFree'> = {
    start: { bytes: LIMIT, segments: LIMIT },
    freed: { bytes: 0, segments: 0 },
    appended: 0,
  };

  #mayBe(start: number, freed: number): number {
    const { progress = 0, isFree = false } = this.#part ?? {};
    // From where waiting begins: who has filled the log up to there at once must not wait for most of the checkpoint then.
    const base = Math.max(FREE, start);
    const room = Math.max(LIMIT - base, Math.min(freed, ADVANCE));
    return isFree ? Math.max(FREE, start - freed + room * progress) : base + room * progress;
  }

  /** A checkpoint begins. @param appended bytes, as of `LogLength`, that it copies to the end of the log */
  begin(freed: Freed, appended: number): void {
    this.#part = { start: this.#length(), freed, appended, progress: 0, isFree: false };
  }

  /** @param progress of all that it does, 0 to 1 */
  advance(progress: number): void {
    if (this.#part === undefined) return;
    this.#part.progress = progress;
    this.#wake();
  }

  /** What it frees is free. */
  free(): void {
    if (this.#part === undefined) return;
    this.#part.isFree = true;
    this.#wake();
  }

  /** It has ended, or failed. */
  end(): void {
    this.#part = undefined;
    this.#wake();
  }

  /** Something else has changed that may make waiting useless. */
  look(): void {
    this.#wake();
  }
}
