/**
 * The express lane of a device: terms on which the addon carries plain READ and WRITE commands out by
 * itself, between a file and the command's memory, without waking JavaScript. Plain means the 10 and 16
 * byte forms with no option set, whose data has just the length that the CDB says.
 *
 * The addon refuses nothing: a command outside the terms, and one whose transfer fails, falls short or
 * would have to wait, goes to the handler untouched. So the lane may be closed at any time; what must
 * never happen is that it stays open when a command's outcome would be another. Closed at first.
 */
import type { NativeRing } from '../native.js';

/** What may be done on the lane. */
export interface LaneTerms {
  readonly fd: number;
  /** Bytes. */
  readonly blockSize: number;
  /** Blocks from LBA 0 on that may be read; 0: none. */
  readonly readBlocks: number;
  /** The same for writing. */
  readonly writeBlocks: number;
  /** Longest transfer of one command in bytes. */
  readonly mostBytes: number;
  /** How the transfer is tried: IO_* of native.ts, 0 for not at all. */
  readonly readMode: number;
  readonly writeMode: number;
}

// Words of the ring's table `express`, as addon/binding/ring.h has them.
const FD = 0;
const BLOCK_BYTES = 1;
const READ_BLOCKS = 2;
const WRITE_BLOCKS = 3;
const MOST_BYTES = 4;
const READ_MODE = 5;
const WRITE_MODE = 6;
const COUNTERS = 7;
const END = 11;

export class ExpressLane {
  readonly #table: Float64Array;
  /** Commands read, commands written, blocks written, blocks read: counted by the addon, here for others too. */
  readonly counters: Float64Array;

  constructor(ring: NativeRing) {
    this.#table = ring.express;
    this.counters = this.#table.subarray(COUNTERS, END);
  }

  get isOpen(): boolean {
    return this.#table[READ_BLOCKS] !== 0 || this.#table[WRITE_BLOCKS] !== 0;
  }

  open(terms: LaneTerms): void {
    const table = this.#table;
    table[FD] = terms.fd;
    table[BLOCK_BYTES] = terms.blockSize;
    table[MOST_BYTES] = terms.mostBytes;
    table[READ_MODE] = terms.readMode;
    table[WRITE_MODE] = terms.writeMode;
    table[READ_BLOCKS] = terms.readMode === 0 ? 0 : terms.readBlocks;
    table[WRITE_BLOCKS] = terms.writeMode === 0 ? 0 : terms.writeBlocks;
  }

  close(): void {
    this.#table[READ_BLOCKS] = 0;
    this.#table[WRITE_BLOCKS] = 0;
  }
}
