// SPDX-License-Identifier: Apache-2.0
/**
 * The express lane of a device: terms on which the addon carries plain READ and WRITE commands out by
 * itself, between files and the command's memory, without waking JavaScript. A `FileMap` says where the bytes lie. Plain means the 10 and 16
 * byte forms with no option set, whose data has just the length that the CDB says.
 *
 * The addon refuses nothing: a command outside the terms, and one whose transfer fails, falls short or
 * would have to wait, goes to the handler untouched. So the lane may be closed at any time; what must
 * never happen is that it stays open when a command's outcome would be another. Closed at first.
 */
import type { FileMap } from '../io/file-map.js';
import type { NativeRing } from '../native.js';

/** What may be done on the lane. */
export interface LaneTerms {
  /** Bytes. */
  readonly blockSize: number;
  /** Blocks from LBA 0 on that may be read; 0: none. */
  readonly readBlocks: number;
  /** The same for writing. */
  readonly writeBlocks: number;
  /** Longest transfer of one command in bytes. */
  readonly mostBytes: number;
}

// Words of the ring's table `express`, as addon/binding/ring.h has them.
const BLOCK_BYTES = 0;
const READ_BLOCKS = 1;
const WRITE_BLOCKS = 2;
const MOST_BYTES = 3;
const COUNTERS = 4;
const END = 8;

export class ExpressLane {
  readonly #ring: NativeRing;
  readonly #table: Float64Array;
  /** Commands read, commands written, blocks written, blocks read: counted by the addon, here for others too. */
  readonly counters: Float64Array;

  constructor(ring: NativeRing) {
    this.#ring = ring;
    this.#table = ring.express;
    this.counters = this.#table.subarray(COUNTERS, END);
  }

  get isOpen(): boolean {
    return this.#table[READ_BLOCKS] !== 0 || this.#table[WRITE_BLOCKS] !== 0;
  }

  /** Where the bytes lie. Before the first `open`. */
  use(map: FileMap): void {
    map.bind(this.#ring);
  }

  open(terms: LaneTerms): void {
    const table = this.#table;
    table[BLOCK_BYTES] = terms.blockSize;
    table[MOST_BYTES] = terms.mostBytes;
    table[READ_BLOCKS] = terms.readBlocks;
    table[WRITE_BLOCKS] = terms.writeBlocks;
  }

  close(): void {
    this.#table[READ_BLOCKS] = 0;
    this.#table[WRITE_BLOCKS] = 0;
  }
}
