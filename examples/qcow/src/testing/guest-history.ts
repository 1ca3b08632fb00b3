// SPDX-License-Identifier: Apache-2.0
/**
 * What a disk was told and has answered, and from that what each of its sectors may hold after a crash:
 * what was flushed, or something newer that was written there. Each write fills its sectors with a stamp
 * of its own; stamp 0 is zeros, for discards too.
 */
import { SECTOR } from './crash-journal.js';

interface Write {
  readonly first: number;
  readonly last: number;
  readonly stamp: number;
  readonly issued: number;
  settled: number;
}

/** `length` bytes that tell which write they come from. */
export function stamped(length: number, stamp: number): Uint8Array {
  return new Uint8Array(new Uint32Array(length / 4).fill(stamp).buffer);
}

/** The stamp that fills a sector, or undefined when it holds anything else. */
function stampOf(sector: Uint8Array): number | undefined {
  const words = new Uint32Array(sector.slice().buffer);
  return words.every((word) => word === words[0]) ? words[0] : undefined;
}

export class GuestHistory {
  readonly #mark: () => number;
  readonly #writes: Write[] = [{ first: 0, last: Infinity, stamp: 0, issued: -1, settled: -1 }];
  readonly #flushes: { readonly issued: number; settled: number }[] = [];

  /**
   * Of a disk that is all zeros.
   * @param mark a moment of the journal: `() => journal.mark()`
   */
  constructor(mark: () => number) {
    this.#mark = mark;
  }

  /** A write of whole sectors begins; what is answered is to be called when it has settled. */
  write(position: number, length: number, stamp: number): () => void {
    const [first, last] = [position / SECTOR, (position + length) / SECTOR - 1];
    const write = { first, last, stamp, issued: this.#mark(), settled: Infinity };
    this.#writes.push(write);
    return () => {
      write.settled = this.#mark();
    };
  }

  flush(): () => void {
    const flush = { issued: this.#mark(), settled: Infinity };
    this.#flushes.push(flush);
    return () => {
      flush.settled = this.#mark();
    };
  }

  /**
   * What is wrong with a disk found after a crash at `cut`, in words, or undefined.
   * @param crashed `host`: what was flushed must be there; `process`: all that was acknowledged
   */
  violation(
    disk: Uint8Array,
    cut: number,
    crashed: 'host' | 'process' = 'host',
  ): string | undefined {
    const flushed = this.#flushes.filter(({ settled }) => settled <= cut);
    const durable =
      crashed === 'process' ? cut + 1 : Math.max(-1, ...flushed.map(({ issued }) => issued));
    for (let sector = 0; sector < disk.length / SECTOR; sector++) {
      const writes = this.#writes.filter(
        ({ first, last, issued }) => first <= sector && sector <= last && issued <= cut,
      );
      // What began after another had settled replaces that, for good once it is flushed.
      const allowed = writes.filter(
        ({ settled }) => !writes.some((later) => settled < later.issued && later.settled < durable),
      );
      const stamp = stampOf(disk.subarray(sector * SECTOR, (sector + 1) * SECTOR));
      if (stamp !== undefined && allowed.some((write) => write.stamp === stamp)) continue;
      const found = stamp === undefined ? 'a mixture' : `stamp ${stamp}`;
      return `sector ${sector} holds ${found}, not one of ${allowed.map((write) => write.stamp)}`;
    }
    return undefined;
  }
}
