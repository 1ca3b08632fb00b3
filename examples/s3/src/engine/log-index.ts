// SPDX-License-Identifier: Apache-2.0
/**
 * Which bytes of the disk are in the log, and where: the newest version of every block that was written
 * since it was last put into a chunk. Runs of blocks, sorted, by chunk; what is not here is as the
 * chunks say.
 *
 * Memory: about 130 bytes a chunk that was touched and 32 bytes a run; a run is one write, or several that
 * follow each other on the disk and in the segment. A discard is a run a chunk, however little log it is: that is
 * why a checkpoint is wanted for the sake of `bytes`, too.
 */

import type { Placed } from './segment.js';

/** Numbers a run takes: first block in the chunk, blocks, slot, byte in the segment's data (-1: zeros). */
export const RUN = 4;
/** Bytes of memory, about. */
export const CHUNK_COST = 130;
export const RUN_COST = 32;

export class LogIndex {
  readonly #blockSize: number;
  readonly #blocksPerChunk: number;
  readonly #chunks = new Map<number, number[]>();
  /** Bytes that still count, by slot. */
  readonly #live = new Map<number, number>();
  #runs = 0;

  constructor(blockSize: number, chunkSize: number) {
    this.#blockSize = blockSize;
    this.#blocksPerChunk = chunkSize / blockSize;
  }

  get runs(): number {
    return this.#runs;
  }

  get chunks(): number {
    return this.#chunks.size;
  }

  /** Bytes of memory, about. */
  get bytes(): number {
    return this.#chunks.size * CHUNK_COST + this.#runs * RUN_COST;
  }

  /** Bytes of it that go when all up to a slot is forgotten, by slot: a chunk's with the newest of its runs. */
  bytesBySlot(): Map<number, number> {
    const bytes = new Map<number, number>();
    const add = (slot: number, cost: number): void => {
      bytes.set(slot, (bytes.get(slot) ?? 0) + cost);
    };
    for (const runs of this.#chunks.values()) {
      let newest = 0;
      for (let at = 2; at < runs.length; at += RUN) {
        const slot = runs[at] as number;
        add(slot, RUN_COST);
        newest = Math.max(newest, slot);
      }
      add(newest, CHUNK_COST);
    }
    return bytes;
  }

  /** Chunks by the oldest slot they have anything in. */
  chunksByOldestSlot(): Map<number, number> {
    const chunks = new Map<number, number>();
    for (const runs of this.#chunks.values()) {
      let oldest = Number.POSITIVE_INFINITY;
      for (let at = 2; at < runs.length; at += RUN) oldest = Math.min(oldest, runs[at] as number);
      chunks.set(oldest, (chunks.get(oldest) ?? 0) + 1);
    }
    return chunks;
  }

  /** Whether segments before `slot` have anything of a chunk that counts. */
  isIn(chunk: number, slot: number): boolean {
    const runs = this.#chunks.get(chunk) ?? [];
    for (let at = 2; at < runs.length; at += RUN) if ((runs[at] as number) < slot) return true;
    return false;
  }

  /** Whether all of a chunk, as large as it may be, is zeros that were written or discarded. */
  isZero(chunk: number): boolean {
    const runs = this.#chunks.get(chunk) ?? [];
    let covered = 0;
    for (let at = 0; at < runs.length; at += RUN) {
      if (runs[at] !== covered || (runs[at + 3] as number) >= 0) return false;
      covered += runs[at + 1] as number;
    }
    return covered === this.#blocksPerChunk;
  }

  /** Runs of a chunk, `RUN` numbers each; not to be changed or kept. */
  of(chunk: number): readonly number[] | undefined {
    return this.#chunks.get(chunk);
  }

  indexes(): IterableIterator<number> {
    return this.#chunks.keys();
  }

  /** Bytes of segment `slot` that nothing newer replaced. */
  live(slot: number): number {
    return this.#live.get(slot) ?? 0;
  }

  /** @param start block on the disk; @param offset of its data in the segment, or -1 for zeros */
  put(start: number, blocks: number, slot: number, offset: number): void {
    const size = this.#blocksPerChunk;
    for (let done = 0; done < blocks; ) {
      const at = start + done;
      const chunk = Math.floor(at / size);
      const first = at - chunk * size;
      const count = Math.min(size - first, blocks - done);
      this.#put(chunk, first, count, slot, offset < 0 ? -1 : offset + done * this.#blockSize);
      done += count;
    }
  }

  /** Data of segment `slot` is elsewhere in it now. What is given is together by chunks, and of a chunk in the order it was in. */
  moved(slot: number, placed: readonly Placed[]): void {
    const start = placed.reduce((least, { from }) => Math.min(least, from), Number.MAX_VALUE);
    for (let first = 0, behind = 0; first < placed.length; first = behind) {
      const { chunk } = placed[first] as Placed;
      while (placed[behind]?.chunk === chunk) behind++;
      const runs = this.#chunks.get(chunk) ?? [];
      for (let at = 0; at < runs.length; at += RUN) {
        if (runs[at + 2] !== slot) continue;
        const [block, length, , offset] = runs.slice(at, at + RUN) as Run;
        if (offset < 0) continue;
        const kept = (start - offset) / this.#blockSize;
        if (kept > 0) {
          // What is before all that moves stays; a run may begin there, and go on behind.
          if (kept >= length) continue;
          runs.splice(at, RUN, block, kept, slot, offset, block + kept, length - kept, slot, start);
          this.#runs++;
          continue;
        }
        // A run goes over several pieces only if they were next to each other, and so they still are.
        const piece = pieceAt(placed, first, behind, offset);
        if (piece !== undefined) runs[at + 3] = piece.to + offset - piece.from;
      }
    }
  }

  #put(chunk: number, start: number, count: number, slot: number, offset: number): void {
    if (offset >= 0) this.#count(slot, count);
    const runs = this.#chunks.get(chunk);
    if (runs === undefined) {
      this.#chunks.set(chunk, [start, count, slot, offset]);
      this.#runs++;
      return;
    }
    const end = start + count;
    let low = 0;
    let high = runs.length / RUN;
    while (low < high) {
      const middle = (low + high) >>> 1;
      const at = middle * RUN;
      if ((runs[at] as number) + (runs[at + 1] as number) <= start) low = middle + 1;
      else high = middle;
    }
    const from = low * RUN;
    let to = from;
    const pieces: number[] = [];
    const tail: number[] = [];
    for (; to < runs.length && (runs[to] as number) < end; to += RUN) {
      const [first, length, oldSlot, oldOffset] = runs.slice(to, to + RUN) as Run;
      const last = first + length;
      if (oldOffset >= 0) this.#count(oldSlot, Math.max(first, start) - Math.min(last, end));
      if (first < start) pieces.push(first, start - first, oldSlot, oldOffset);
      if (last > end) {
        const behind = oldOffset < 0 ? -1 : oldOffset + (end - first) * this.#blockSize;
        tail.push(end, last - end, oldSlot, behind);
      }
    }
    if (to === from && from > 0 && this.#continues(runs, from - RUN, start, slot, offset)) {
      (runs[from - RUN + 1] as number) += count;
      return;
    }
    pieces.push(start, count, slot, offset, ...tail);
    this.#runs += (pieces.length - (to - from)) / RUN;
    runs.splice(from, to - from, ...pieces);
  }

  /** Whether the run at `at` goes on with a block `start` whose data is at `offset`. */
  #continues(runs: number[], at: number, start: number, slot: number, offset: number): boolean {
    const [first, length, oldSlot, oldOffset] = runs.slice(at, at + RUN) as Run;
    if (first + length !== start || oldSlot !== slot) return false;
    return oldOffset < 0 ? offset < 0 : oldOffset + length * this.#blockSize === offset;
  }

  #count(slot: number, blocks: number): void {
    const live = (this.#live.get(slot) ?? 0) + blocks * this.#blockSize;
    if (live === 0) this.#live.delete(slot);
    else this.#live.set(slot, live);
  }

  /** Forgets all runs in segments before `slot`: the chunks have them. */
  dropBefore(slot: number): void {
    for (const chunk of this.#chunks.keys()) this.#drop(chunk, slot);
    for (const old of this.#live.keys()) if (old < slot) this.#live.delete(old);
  }

  /** Forgets a chunk's runs in segments before `slot`: the chunk has them. */
  dropOf(chunk: number, slot: number): void {
    const runs = this.#chunks.get(chunk) ?? [];
    for (let at = 0; at < runs.length; at += RUN) {
      const [, length, of, offset] = runs.slice(at, at + RUN) as Run;
      if (of < slot && offset >= 0) this.#count(of, -length);
    }
    this.#drop(chunk, slot);
  }

  #drop(chunk: number, slot: number): void {
    const runs = this.#chunks.get(chunk);
    if (runs === undefined) return;
    let kept = 0;
    for (let at = 0; at < runs.length; at += RUN) {
      if ((runs[at + 2] as number) < slot) continue;
      if (kept !== at) runs.copyWithin(kept, at, at + RUN);
      kept += RUN;
    }
    if (kept === runs.length) return;
    this.#runs -= (runs.length - kept) / RUN;
    if (kept === 0) this.#chunks.delete(chunk);
    else this.#chunks.set(chunk, runs.slice(0, kept));
  }
}

/** Of `[first, behind)`, the one that `offset` was in. */
function pieceAt(
  placed: readonly Placed[],
  first: number,
  behind: number,
  offset: number,
): Placed | undefined {
  let low = first;
  let high = behind;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if ((placed[middle] as Placed).from <= offset) low = middle + 1;
    else high = middle;
  }
  const piece = low > first ? (placed[low - 1] as Placed) : undefined;
  return piece !== undefined && offset < piece.from + piece.bytes ? piece : undefined;
}

type Run = [first: number, length: number, slot: number, offset: number];
