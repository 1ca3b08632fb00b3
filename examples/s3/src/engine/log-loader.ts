// SPDX-License-Identifier: Apache-2.0
/**
 * What the log has of some chunks, from memory where it is there, else from the bucket: for a checkpoint, which goes through the
 * disk part by part so that each chunk is written once, and so comes to each segment several times.
 *
 * Contract: no more is fetched of a segment than the frames with data of those chunks, and what little is between them; kept is only
 * the data itself. The memory is the log's (`LogWriter.lend`), and what `load` has answered is good until `release`.
 */
import { WIDTH } from './background.js';
import { type BlobCodec, type FrameEntry, frameOffset, tableEntry } from './blob.js';
import { Buffers } from './buffers.js';
import type { DiskImage } from './disk-image.js';
import { RUN } from './log-index.js';
import type { LogWriter } from './log-writer.js';
import { segmentName } from './names.js';
import { inParallel } from './parallel.js';
import type { Requests } from './requests.js';
import type { SegmentFacts } from './segment-facts.js';

/** Frames that one request fetches while somebody waits, or when only a little of them is kept. */
const FEW_FRAMES = 16;
/** So many frames without any use are rather fetched along than left out by another request. */
export const GAP_FRAMES = 4;
/** From which share of a range on all of it is kept, where it arrives. */
const DENSE_SHARE = 3 / 4;

export interface LoaderParts {
  readonly requests: Requests;
  readonly codec: BlobCodec;
  readonly prefix: string;
  readonly image: DiskImage;
  readonly log: LogWriter;
  readonly segmentSize: number;
}

/** Bytes `[start, end)` of a segment's data. */
interface Piece {
  readonly start: number;
  end: number;
}

interface Range {
  readonly slot: number;
  readonly pieces: Piece[];
  /** Frames `[first, behind)` of the data. */
  readonly first: number;
  behind: number;
  /** Bytes of the pieces. */
  useful: number;
}

/** Data of segments, by where it is in them. */
export class LogData {
  readonly #bySlot = new Map<number, { start: number; bytes: Buffer }[]>();

  add(slot: number, start: number, bytes: Buffer): void {
    const parts = this.#bySlot.get(slot);
    if (parts === undefined) this.#bySlot.set(slot, [{ start, bytes }]);
    else parts.push({ start, bytes });
  }

  has(slot: number): boolean {
    return this.#bySlot.has(slot);
  }

  /** Once all is there: what is of one segment may have come in any order. */
  sort(): void {
    for (const parts of this.#bySlot.values()) parts.sort((a, b) => a.start - b.start);
  }

  /** What was loaded: asking for anything else is a mistake, and may not go for "nothing there". */
  get(slot: number, offset: number, length: number): Buffer {
    const parts = this.#bySlot.get(slot) ?? [];
    let low = 0;
    let high = parts.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if ((parts[middle]?.start as number) <= offset) low = middle + 1;
      else high = middle;
    }
    const part = parts[low - 1];
    if (part === undefined || offset + length > part.start + part.bytes.length) {
      throw new Error(`segment ${slot} is not loaded at ${offset}`);
    }
    return part.bytes.subarray(offset - part.start, offset - part.start + length);
  }
}

export class LogLoader {
  readonly #parts: LoaderParts;
  readonly #frameSize: number;
  /** For what arrives and is not kept as a whole. */
  readonly #transit: Buffers;
  #transitTaken = 0;
  readonly #lent: Buffer[] = [];
  /** What is left of the last one that was lent for pieces, and bytes of pieces still to come. */
  #free: Buffer = Buffer.alloc(0);
  #toCome = 0;

  constructor(parts: LoaderParts) {
    this.#parts = parts;
    this.#frameSize = parts.image.geometry.frameSize;
    this.#transit = new Buffers(FEW_FRAMES * this.#frameSize, WIDTH);
  }

  /** Bytes of memory, without what the log has lent. */
  get bytes(): number {
    return this.#transitTaken * this.#transit.size + this.#transit.freeBytes;
  }

  /** Bytes of memory on the way that `load` may take beside the data. */
  get overhead(): number {
    return WIDTH * this.#transit.size;
  }

  /** Lets go of what could be used again. */
  tidy(): void {
    this.#transit.trim(0);
  }

  /** Bytes of a chunk's data in segments before `cut` that are not in memory. */
  bytesOf(chunk: number, cut: number): number {
    const { image, log } = this.#parts;
    const runs = image.index.of(chunk) ?? [];
    let bytes = 0;
    for (let i = 0; i < runs.length; i += RUN) {
      const slot = runs[i + 2] as number;
      if (slot >= cut || (runs[i + 3] as number) < 0 || log.payload(slot) !== undefined) continue;
      bytes += (runs[i + 1] as number) * image.geometry.blockSize;
    }
    return bytes;
  }

  /**
   * Data of these chunks in the segments before `cut`, all of them in the bucket.
   * @param onProgress how much of it is there, 0 to 1
   * @throws DiskError `damaged`; ObjectStoreError
   */
  async load(
    chunks: readonly number[],
    cut: number,
    onProgress: (share: number) => void,
  ): Promise<LogData> {
    const data = new LogData();
    const ranges = this.#ranges(chunks, cut, data);
    let done = 0;
    this.#toCome = 0;
    for (const range of ranges) if (!this.#isDense(range)) this.#toCome += range.useful;
    await inParallel(ranges, WIDTH, async (range) => {
      if (this.#isDense(range)) await this.#loadWhole(range, data);
      else await this.#loadPieces(range, data);
      onProgress(++done / ranges.length);
    });
    data.sort();
    return data;
  }

  /** What was loaded: nobody looks at it any more. */
  release(): void {
    this.#free = Buffer.alloc(0);
    for (const buffer of this.#lent.splice(0)) this.#parts.log.takeBack(buffer);
  }

  /** What has to be fetched; what is in memory is put into `data`. */
  #ranges(chunks: readonly number[], cut: number, data: LogData): Range[] {
    const { image, log } = this.#parts;
    const { blockSize } = image.geometry;
    const wanted = new Map<number, Piece[]>();
    for (const chunk of chunks) {
      const runs = image.index.of(chunk) ?? [];
      for (let i = 0; i < runs.length; i += RUN) {
        const slot = runs[i + 2] as number;
        const start = runs[i + 3] as number;
        if (slot >= cut || start < 0) continue;
        const piece = { start, end: start + (runs[i + 1] as number) * blockSize };
        const pieces = wanted.get(slot);
        if (pieces !== undefined) {
          pieces.push(piece);
          continue;
        }
        if (data.has(slot)) continue;
        const payload = log.payload(slot);
        if (payload === undefined) wanted.set(slot, [piece]);
        else data.add(slot, 0, payload);
      }
    }
    const ranges: Range[] = [];
    for (const [slot, pieces] of wanted) {
      pieces.sort((a, b) => a.start - b.start);
      let range: Range | undefined;
      for (const { start, end } of pieces) {
        const first = Math.floor(start / this.#frameSize);
        const behind = Math.ceil(end / this.#frameSize);
        if (range === undefined || first > range.behind + GAP_FRAMES) {
          range = { slot, pieces: [{ start, end }], first, behind, useful: end - start };
          ranges.push(range);
          continue;
        }
        const last = range.pieces.at(-1) as Piece;
        if (last.end === start) last.end = end;
        else range.pieces.push({ start, end });
        range.behind = Math.max(range.behind, behind);
        range.useful += end - start;
      }
    }
    return ranges;
  }

  #isDense({ first, behind, useful }: Range): boolean {
    return useful >= (behind - first) * this.#frameSize * DENSE_SHARE;
  }

  /** Memory for so many bytes, until `release`. */
  #lend(length: number): Buffer {
    const buffer = this.#parts.log.lend(length);
    this.#lent.push(buffer);
    return buffer;
  }

  async #loadWhole(range: Range, data: LogData): Promise<void> {
    const { background } = this.#parts.requests;
    const facts = this.#parts.image.segments.get(range.slot) as SegmentFacts;
    let length = 0;
    let isPlain = facts.header.keyId === 0;
    for (let frame = range.first; frame < range.behind; frame++) {
      const { stored, raw } = entryOf(facts, frame);
      isPlain &&= stored === raw;
      length += raw;
    }
    const whole = this.#lend(length);
    data.add(range.slot, range.first * this.#frameSize, whole);
    for (let first = range.first, at = 0, behind = 0; first < range.behind; first = behind) {
      behind = background.yields ? Math.min(first + FEW_FRAMES, range.behind) : range.behind;
      // What is stored as it is may come to where it belongs; what isn't is put there below, over nothing that is still to be read.
      const into = isPlain ? whole.subarray(at) : undefined;
      await this.#fetch(facts, first, behind, into, (_frame, bytes) => {
        at += bytes.copy(whole, at);
      });
    }
  }

  async #loadPieces(range: Range, data: LogData): Promise<void> {
    const facts = this.#parts.image.segments.get(range.slot) as SegmentFacts;
    const places = range.pieces.map(({ start, end }) => ({
      start,
      end,
      bytes: this.#carve(end - start),
    }));
    for (const { start, bytes } of places) data.add(range.slot, start, bytes);
    const into = this.#transit.take();
    this.#transitTaken++;
    try {
      let next = 0;
      for (let first = range.first, behind = 0; first < range.behind; first = behind) {
        behind = Math.min(first + FEW_FRAMES, range.behind);
        await this.#fetch(facts, first, behind, into, (frame, bytes) => {
          const base = frame * this.#frameSize;
          const end = base + bytes.length;
          for (let place = places[next]; place !== undefined; place = places[++next]) {
            const from = Math.max(place.start, base);
            const to = Math.min(place.end, end);
            if (from < to) bytes.copy(place.bytes, from - place.start, from - base, to - base);
            // The rest of it is in the next frame.
            if (place.end > end) break;
          }
        });
      }
    } finally {
      this.#transitTaken--;
      this.#transit.give(into);
    }
  }

  /** Memory for a piece, of what is lent for many. */
  #carve(length: number): Buffer {
    if (length > this.#free.length) {
      this.#free = this.#lend(Math.max(length, Math.min(this.#parts.segmentSize, this.#toCome)));
    }
    const bytes = this.#free.subarray(0, length);
    this.#free = this.#free.subarray(length);
    this.#toCome -= length;
    return bytes;
  }

  /** Frames of a segment's data by one request. */
  async #fetch(
    { header, table }: SegmentFacts,
    first: number,
    behind: number,
    into: Buffer | undefined,
    take: (frame: number, bytes: Buffer) => void,
  ): Promise<void> {
    const { requests, codec, prefix } = this.#parts;
    const key = `${prefix}/${segmentName(header.number)}`;
    // Frame 0 of the object is the list of changes.
    const start = frameOffset(table, first + 1);
    const range = { start, end: frameOffset(table, behind + 1) };
    const { body } = await requests.background.run(() =>
      requests.get(key, { range, into }, Number.POSITIVE_INFINITY),
    );
    for (let frame = first; frame < behind; frame++) {
      const from = frameOffset(table, frame + 1) - start;
      const stored = body.subarray(from, frameOffset(table, frame + 2) - start);
      const entry = tableEntry(table, frame + 1);
      take(frame, codec.decodeFrame(key, header, codec.diskId, frame + 1, entry, stored));
    }
  }
}

/** Of frame `frame` of the data. */
const entryOf = ({ table }: SegmentFacts, frame: number): FrameEntry =>
  tableEntry(table, frame + 1);
