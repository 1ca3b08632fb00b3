// SPDX-License-Identifier: Apache-2.0
/**
 * A log segment: a list of changes in the order in which they were made, and the data of the writes among
 * them, one after the other. Frame 0 of its object is the list, the others are the data.
 *
 * Records, 16 bytes: u8 type, u32 blocks at 4, f64 at 8: the block on the disk; for `resize` the blocks
 * that the disk has from now on; for `checkpoint` the number of the manifest, of the segment's own epoch,
 * that counts from now on; `release`: the writer acknowledges nothing any more. A claim is a segment without
 * records: the first of its epoch. Its header's `n` is the writer's lease in milliseconds.
 *
 * A fence is a claim that claims nothing: its epoch is that of no writer. Whoever opens the disk puts it far
 * ahead of a writer at work, which ends there; readers go on behind it, where only a claim, or another fence,
 * can follow.
 *
 * What was written here and there is put into the order of the chunks before it is sent: whoever wants what the log has of a part of the
 * disk then finds it close together in each segment. All of a segment counts, or nothing of it; and of a chunk the order
 * stays, so that what is newer stays so.
 */
import type { DataOut } from 'tcmu';
import { damaged } from './errors.js';

export const RecordType = { data: 1, zero: 2, resize: 3, checkpoint: 4, release: 5 } as const;
export type RecordType = (typeof RecordType)[keyof typeof RecordType];

export interface LogRecord {
  readonly type: RecordType;
  readonly block: number;
  readonly blocks: number;
}

const RECORD_BYTES = 16;
/** Most blocks one record counts. */
export const MAX_RECORD_BLOCKS = 0xffffffff;

/** Epoch of a fence; writers count from 1. */
export const FENCE_EPOCH = 0;

/** Data of one chunk that has another place in its segment now, and the bytes where it was and where it is. */
export interface Placed {
  readonly chunk: number;
  readonly bytes: number;
  readonly from: number;
  readonly to: number;
}

/** The segment that is being filled. Data is copied in once, from where the initiator has it. */
export class OpenSegment {
  readonly slot: number;
  readonly #blockSize: number;
  #buffer: Buffer;
  /** Type, blocks, block; three numbers a record. */
  readonly #records: number[] = [];
  #used = 0;

  constructor(slot: number, blockSize: number, buffer: Buffer) {
    this.slot = slot;
    this.#blockSize = blockSize;
    this.#buffer = buffer;
  }

  /** Bytes of data in it. */
  get used(): number {
    return this.#used;
  }

  get empty(): boolean {
    return this.#records.length === 0;
  }

  /** Bytes it takes: data and list. */
  get cost(): number {
    return this.#used + (this.#records.length / 3) * RECORD_BYTES;
  }

  fits(length: number): boolean {
    return this.#used + length <= this.#buffer.length;
  }

  /** @returns where in the segment's data it is */
  append(block: number, data: DataOut | Uint8Array): number {
    const offset = this.#used;
    if (data instanceof Uint8Array) this.#buffer.set(data, offset);
    else data.copyTo(this.#buffer, offset);
    this.#used += data.length;
    this.#record(RecordType.data, block, data.length / this.#blockSize);
    return offset;
  }

  /** Zeros, a new size, a checkpoint, the end. */
  note(type: Exclude<RecordType, 1>, block: number, blocks = 0): void {
    this.#record(type, block, blocks);
  }

  #record(type: RecordType, block: number, blocks: number): void {
    const records = this.#records;
    const last = records.length - 3;
    const follows =
      type <= RecordType.zero &&
      records[last] === type &&
      (records[last + 2] as number) + (records[last + 1] as number) === block &&
      (records[last + 1] as number) + blocks <= MAX_RECORD_BLOCKS;
    if (follows) (records[last + 1] as number) += blocks;
    else records.push(type, blocks, block);
  }

  /**
   * Puts what is behind the last record of another kind than data into the order of the chunks, if it isn't.
   * @param take memory for all of the data, which it is in then
   * @returns what may be elsewhere than before: a chunk's after each other, in the order it was in
   */
  arrange(blocksPerChunk: number, take: () => Buffer): Placed[] {
    const records = this.#records;
    let first = records.length;
    while (first > 0 && records[first - 3] === RecordType.data) first -= 3;
    const pieces: { chunk: number; block: number; bytes: number; from: number }[] = [];
    let blocksBehind = 0;
    for (let i = first; i < records.length; i += 3) blocksBehind += records[i + 1] as number;
    const start = this.#used - blocksBehind * this.#blockSize;
    for (let i = first, at = start; i < records.length; i += 3) {
      const end = (records[i + 2] as number) + (records[i + 1] as number);
      for (let block = records[i + 2] as number; block < end; ) {
        const chunk = Math.floor(block / blocksPerChunk);
        const blocks = Math.min(end, (chunk + 1) * blocksPerChunk) - block;
        const bytes = blocks * this.#blockSize;
        pieces.push({ chunk, block, bytes, from: at });
        at += bytes;
        block += blocks;
      }
    }
    if (pieces.every(({ chunk }, i) => i === 0 || chunk >= (pieces[i - 1]?.chunk as number))) {
      return [];
    }
    pieces.sort((a, b) => a.chunk - b.chunk);
    const before = this.#buffer;
    this.#buffer = take();
    before.copy(this.#buffer, 0, 0, start);
    this.#used = start;
    records.length = first;
    return pieces.map(({ chunk, block, bytes, from }) => {
      const to = this.append(block, before.subarray(from, from + bytes));
      return { chunk, bytes, from, to };
    });
  }

  /** The data as it is now; the same memory. */
  payload(): Buffer {
    return this.#buffer.subarray(0, this.#used);
  }

  encodeRecords(): Buffer {
    const records = this.#records;
    const bytes = Buffer.alloc((records.length / 3) * RECORD_BYTES);
    for (let i = 0, at = 0; i < records.length; i += 3, at += RECORD_BYTES) {
      bytes[at] = records[i] as number;
      bytes.writeUInt32LE(records[i + 1] as number, at + 4);
      bytes.writeDoubleLE(records[i + 2] as number, at + 8);
    }
    return bytes;
  }
}

/** @throws DiskError `damaged` */
export function decodeRecords(key: string, bytes: Buffer): LogRecord[] {
  if (bytes.length % RECORD_BYTES !== 0) throw damaged(key, 'its list of changes makes no sense');
  const records: LogRecord[] = [];
  for (let at = 0; at < bytes.length; at += RECORD_BYTES) {
    const type = bytes[at] as RecordType;
    const block = bytes.readDoubleLE(at + 8);
    if (type < 1 || type > 5 || !Number.isSafeInteger(block) || block < 0) {
      throw damaged(key, 'its list of changes makes no sense');
    }
    records.push({ type, blocks: bytes.readUInt32LE(at + 4), block });
  }
  return records;
}

/** Data of a segment in frames of `frameSize`, without copying. */
export function framesOf(data: Buffer, frameSize: number): Buffer[] {
  const frames: Buffer[] = [];
  for (let at = 0; at < data.length; at += frameSize)
    frames.push(data.subarray(at, at + frameSize));
  return frames;
}
