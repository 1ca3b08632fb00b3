// SPDX-License-Identifier: Apache-2.0
/**
 * Moves the oldest part of the log into chunks and lets the log begin later.
 *
 * For every chunk that the oldest segments have a part of, either a new version is written (its newest
 * data over the old version), or, where that would be much writing for little, its data is copied to the
 * end of the log. Then leaves, then a manifest, then a record in the log that declares it valid. Only
 * when that record is durable does anything change for readers, or is anything deleted; a crash, or
 * another writer's claim, before it leaves objects that nobody knows.
 *
 * A new version may hold newer data than the manifest's `cut`: that is harmless, because the record is
 * behind everything that was in the log when the chunk was put together, so nobody uses the manifest
 * who has not all of that too.
 *
 * Every request of it, and every piece of data that it copies to the end of the log, takes its turn in the
 * background: while somebody waits for a flush, no more than one piece is ahead of it there.
 */
import { WIDTH } from './background.js';
import {
  type BlobCodec,
  BlobKind,
  type FrameEntry,
  frameOffset,
  storedLength,
  tableEntry,
} from './blob.js';
import { Buffers } from './buffers.js';
import {
  type ChunkRef,
  chunkRef,
  encodeManifest,
  LEAF_CHUNKS,
  Leaf,
  type LeafRef,
  type Manifest,
} from './chunk-map.js';
import type { DiskImage } from './disk-image.js';
import type { Superseded } from './garbage.js';
import { CHUNK_COST, RUN, RUN_COST } from './log-index.js';
import type { LogWriter } from './log-writer.js';
import { chunkName, leafName, manifestName, segmentName } from './names.js';
import type { Freed, Pace } from './pace.js';
import type { Requests } from './requests.js';
import { FENCE_EPOCH, framesOf } from './segment.js';
import type { SegmentFacts } from './segment-facts.js';

/** Frames of a segment that one request loads while somebody waits; otherwise all. */
const LOAD_FRAMES = 16;
/** Bytes copied to the end of the log at a time while somebody waits for it; two segments otherwise. */
const RELOCATE_BYTES = 256 * 1024;
/** Below this share of a chunk its data is rather copied to the end of the log. */
const SPARSE_SHARE = 8;
/** What comes after a checkpoint's chunks: leaves and manifest, the record, what isn't needed any more. */
const LAST_STEPS = 3;
const FOREVER = Number.POSITIVE_INFINITY;

export interface CheckpointParts {
  readonly requests: Requests;
  readonly codec: BlobCodec;
  readonly prefix: string;
  readonly image: DiskImage;
  readonly log: LogWriter;
  /** Is told what is freed, and how far that is. */
  readonly pace: Pace;
  readonly epoch: number;
  readonly writer: string;
  readonly claims: readonly number[];
  /** As our claim says. */
  readonly lease: number;
  /** Bytes of log from which on a checkpoint is wanted. */
  readonly logLimit: number;
  /** Segments of log from which on a checkpoint is wanted. */
  readonly segmentLimit: number;
  /** Bytes of memory of the log's index from which on a checkpoint is wanted. */
  readonly indexLimit: number;
  readonly segmentSize: number;
  /** Bytes of segments loaded again for one checkpoint, at most, but at least one segment. */
  readonly loadLimit: number;
}

export interface CheckpointResult {
  readonly superseded: Superseded;
  readonly chunksWritten: number;
  readonly bytesRelocated: number;
}

type Updates = Map<number, ChunkRef | undefined>;

export class Checkpointer {
  readonly #parts: CheckpointParts;
  #n: number;
  /** For chunks that are put together. */
  readonly #chunks: Buffers;
  #chunksTaken = 0;
  /** Segments that were loaded again. */
  readonly #lent: Buffer[] = [];
  /** Of the checkpoint under way: segments to load, chunks to write, and the rest. */
  #steps = 0;
  #stepsDone = 0;

  /** @param n the highest number any manifest has had */
  constructor(parts: CheckpointParts, n: number) {
    this.#parts = parts;
    this.#n = n;
    this.#chunks = new Buffers(parts.image.geometry.chunkSize, WIDTH);
  }

  /** Bytes of memory, without the segments, which are the log's. */
  get bytes(): number {
    return this.#chunksTaken * this.#chunks.size + this.#chunks.freeBytes;
  }

  /** Lets go of what could be used again. */
  tidy(): void {
    this.#chunks.trim(0);
  }

  /**
   * @param all everything that is durable, whatever memory that takes, instead of the oldest part
   * @returns undefined when there was nothing to do
   * @throws DiskError `fenced`, `damaged`, `closed`; ObjectStoreError
   */
  async run(all: boolean): Promise<CheckpointResult | undefined> {
    const { image, log } = this.#parts;
    const cut = this.#chooseCut(all);
    if (cut <= image.map.manifest.cut || image.segments.size === 0) return undefined;
    try {
      return await log.holding(cut, () => this.#run(cut, all));
    } finally {
      this.#takeBack();
    }
  }

  /** Whatever was loaded: nobody looks at it any more. */
  #takeBack(): void {
    for (const payload of this.#lent.splice(0)) this.#parts.log.takeBack(payload);
  }

  async #run(cut: number, all: boolean): Promise<CheckpointResult> {
    const { image, log, epoch, writer } = this.#parts;
    // Never the same number twice: names are not used again.
    const n = ++this.#n;
    const freed = this.#freed(cut);
    const { destage, relocate, appended } = this.#plan(cut, all, freed);
    this.#begin(cut, freed, appended, destage.length + relocate.length);
    const loaded = await this.#load(cut);
    const bytesRelocated = await this.#relocate(relocate, cut, loaded);
    const updates = await this.#destage(destage, n, loaded);
    loaded.clear();
    this.#takeBack();
    const old = image.map.manifest;
    const objects: { name: string; born: number }[] = [];
    const { leaves, changed } = await this.#leaves(updates, n, objects);
    const manifest: Manifest = {
      n,
      epoch,
      writer,
      cut,
      ...this.#before(cut, old),
      lease: this.#parts.lease,
      size: image.size,
      claims: this.#parts.claims,
      origins: old.origins,
      leaves,
    };
    this.#step();
    await this.#put(manifestName(n, epoch), BlobKind.manifest, n, n, [encodeManifest(manifest)]);
    log.checkpoint(n);
    await log.drain(FOREVER);
    const slots = [...image.segments.keys()].filter((slot) => slot < cut);
    const owned = new Set(this.#parts.claims);
    image.adopt(image.map.successor(manifest, changed), updates.keys());
    log.forgetBefore(cut);
    this.#step();
    return {
      superseded: {
        n,
        manifest: old,
        objects,
        slots: slots.filter((slot) => !owned.has(slot)),
      },
      chunksWritten: updates.size,
      bytesRelocated,
    };
  }

  /** What is gone from the log when it begins at `cut`. */
  #freed(cut: number): Freed {
    const { image, logLimit, segmentLimit } = this.#parts;
    let bytes = 0;
    let segments = 0;
    for (const [slot, { header }] of image.segments) {
      if (slot >= cut) break;
      bytes += header.length;
      segments++;
    }
    return { bytes: bytes / logLimit, segments: segments / segmentLimit };
  }

  /** @param chunks that something is done to */
  #begin(cut: number, freed: Freed, appended: number, chunks: number): void {
    const { pace, logLimit } = this.#parts;
    this.#steps = chunks + this.#toLoad(cut).length + LAST_STEPS;
    this.#stepsDone = 0;
    pace.begin(freed, appended / logLimit);
  }

  #step(): void {
    this.#parts.pace.advance(++this.#stepsDone / this.#steps);
  }

  #before(cut: number, old: Manifest): Pick<Manifest, 'cutEpoch' | 'cutWriter'> {
    let { cutEpoch, cutWriter } = old;
    for (const [slot, { header }] of this.#parts.image.segments) {
      if (slot >= cut) break;
      if (header.epoch === FENCE_EPOCH) continue;
      ({ epoch: cutEpoch, writer: cutWriter } = header);
    }
    return { cutEpoch, cutWriter };
  }

  /**
   * So that half of what the log may hold is left, in bytes, in segments and in its index, or with `all` nothing. Of the index
   * no more than half its limit at a time: what a checkpoint takes of memory grows with that.
   */
  #chooseCut(all: boolean): number {
    const { image, log, logLimit, segmentLimit, indexLimit, loadLimit } = this.#parts;
    // In one go: a chunk would be written again by each part of the log.
    if (all) return log.durable;
    const most = indexLimit / 2;
    let index = image.index.bytes;
    const indexOf = index > most ? image.index.bytesBySlot() : undefined;
    let taken = 0;
    let bytes = 0;
    for (const { header } of image.segments.values()) bytes += header.length;
    let segments = image.segments.size;
    let load = 0;
    let cut = image.map.manifest.cut;
    for (const [slot, { header }] of image.segments) {
      if (slot >= log.durable) break;
      if (bytes <= logLimit / 2 && segments <= segmentLimit / 2 && index <= most) break;
      const share = indexOf?.get(slot) ?? 0;
      taken += share;
      // What was replaced meanwhile is not looked at.
      if (log.payload(slot) === undefined && image.index.live(slot) > 0) load += header.length;
      if ((load > loadLimit || taken > most) && cut > image.map.manifest.cut) break;
      bytes -= header.length;
      index -= share;
      segments--;
      // Behind a claim, slots are left out.
      cut = header.next;
    }
    return cut;
  }

  /** Data of the segments before `cut` that still counts, in memory. */
  async #load(cut: number): Promise<Map<number, Buffer>> {
    const { image, log } = this.#parts;
    const loaded = new Map<number, Buffer>();
    for (const slot of image.segments.keys()) {
      const payload = slot < cut ? log.payload(slot) : undefined;
      if (payload !== undefined) loaded.set(slot, payload);
    }
    await inParallel(this.#toLoad(cut), WIDTH, async (slot) => {
      const payload = await this.#loadSegment(image.segments.get(slot) as SegmentFacts);
      loaded.set(slot, payload);
      this.#step();
    });
    return loaded;
  }

  /** Segments before `cut` with data that counts, and not in memory. */
  #toLoad(cut: number): number[] {
    const { image, log } = this.#parts;
    return [...image.segments.keys()].filter(
      (slot) => slot < cut && image.index.live(slot) > 0 && log.payload(slot) === undefined,
    );
  }

  /** A segment's data, a piece at a time. */
  async #loadSegment({ header, table }: SegmentFacts): Promise<Buffer> {
    const { requests, prefix, codec, log } = this.#parts;
    const key = `${prefix}/${segmentName(header.number)}`;
    const entries = Array.from({ length: header.frames }, (_, frame) => tableEntry(table, frame));
    const lengths = entries.slice(1).map(({ raw }) => raw);
    const payload = log.lend(lengths.reduce((sum, raw) => sum + raw, 0));
    this.#lent.push(payload);
    const isPlain =
      header.keyId === 0 && entries.slice(1).every(({ stored, raw }) => stored === raw);
    let at = 0;
    // Frame 0 is the list of changes.
    for (let first = 1, behind = 1; first < header.frames; first = behind) {
      const frames = requests.background.yields ? LOAD_FRAMES : header.frames;
      behind = Math.min(first + frames, header.frames);
      const start = frameOffset(table, first);
      const range = { start, end: frameOffset(table, behind) };
      // What is stored as it is may come to where it belongs; what isn't is put there below, over nothing that is still to be read.
      const into = isPlain ? payload.subarray(at) : undefined;
      const { body } = await requests.background.run(() =>
        requests.get(key, { range, into }, FOREVER),
      );
      for (let frame = first, from = 0; frame < behind; frame++) {
        const stored = body.subarray(from, from + storedLength(table, frame));
        from += stored.length;
        const entry = entries[frame] as FrameEntry;
        at += codec.decodeFrame(key, header, codec.diskId, frame, entry, stored).copy(payload, at);
      }
    }
    return payload;
  }

  /** @returns what becomes new versions, what goes to the end of the log, and the bytes of that */
  #plan(
    cut: number,
    all: boolean,
    freed: Freed,
  ): { destage: number[]; relocate: number[]; appended: number } {
    const { image, logLimit, indexLimit } = this.#parts;
    const { blockSize, chunkSize } = image.geometry;
    const sizes: [chunk: number, bytes: number, old: number, runs: number][] = [];
    for (const chunk of image.index.indexes()) {
      const runs = image.index.of(chunk) as readonly number[];
      let isOld = false;
      let bytes = 0;
      let old = 0;
      for (let i = 0; i < runs.length; i += RUN) {
        const length = (runs[i + 1] as number) * blockSize;
        bytes += length;
        if ((runs[i + 2] as number) >= cut) continue;
        isOld = true;
        if ((runs[i + 3] as number) >= 0) old += length;
      }
      if (isOld) sizes.push([chunk, bytes, old, runs.length / RUN]);
    }
    sizes.sort((a, b) => a[1] - b[1]);
    const relocate: number[] = [];
    // The log becomes shorter whatever is in it: no more than half of what is freed is appended.
    const budget = all ? 0 : Math.min(logLimit / 4, (freed.bytes * logLimit) / 2);
    let indexBudget = indexLimit / 4;
    let appended = 0;
    for (const [chunk, bytes, old, runs] of sizes) {
      indexBudget -= CHUNK_COST + runs * RUN_COST;
      if (all || appended + old > budget || indexBudget < 0) break;
      if (bytes > chunkSize / SPARSE_SHARE) break;
      relocate.push(chunk);
      appended += old;
    }
    const destage = sizes.slice(relocate.length).map(([chunk]) => chunk);
    return { destage: destage.sort((a, b) => a - b), relocate, appended };
  }

  async #relocate(
    chunks: readonly number[],
    cut: number,
    loaded: ReadonlyMap<number, Buffer>,
  ): Promise<number> {
    const { image, log, segmentSize } = this.#parts;
    const { background } = this.#parts.requests;
    const { blockSize, chunkSize } = image.geometry;
    let moved = 0;
    let settled = 0;
    for (const chunk of chunks) {
      if (moved - settled >= (background.yields ? RELOCATE_BYTES : 2 * segmentSize)) {
        await background.run(() => log.drain(FOREVER));
        settled = moved;
      }
      if (!log.room(chunkSize)) await log.makeRoomWithin(chunkSize, FOREVER);
      const first = (chunk * chunkSize) / blockSize;
      const runs = [...(image.index.of(chunk) ?? [])];
      for (let i = 0; i < runs.length; i += RUN) {
        const [start, blocks, slot, offset] = runs.slice(i, i + RUN) as [
          number,
          number,
          number,
          number,
        ];
        if (slot >= cut) continue;
        if (offset < 0) {
          image.index.put(first + start, blocks, log.zero(first + start, blocks), -1);
          continue;
        }
        const data = (loaded.get(slot) as Buffer).subarray(offset, offset + blocks * blockSize);
        for (let at = 0; at < data.length; at += segmentSize) {
          const piece = data.subarray(at, at + segmentSize);
          const block = first + start + at / blockSize;
          const where = log.append(block, piece);
          image.index.put(block, piece.length / blockSize, where.slot, where.offset);
        }
        moved += data.length;
      }
      this.#step();
    }
    return moved;
  }

  async #destage(
    chunks: readonly number[],
    n: number,
    loaded: ReadonlyMap<number, Buffer>,
  ): Promise<Updates> {
    const updates: Updates = new Map();
    const { index } = this.#parts.image;
    const version = async (chunk: number, bytes: Buffer): Promise<ChunkRef | undefined> => {
      const frames = await this.#merge(chunk, loaded, bytes);
      if (frames.every(({ length }) => length === 0)) return undefined;
      const name = chunkName(chunk, n, this.#parts.epoch);
      return chunkRef(await this.#put(name, BlobKind.chunk, chunk, n, frames));
    };
    await inParallel(chunks, WIDTH, async (chunk) => {
      if (index.isZero(chunk)) updates.set(chunk, undefined);
      else {
        const bytes = this.#chunks.take();
        this.#chunksTaken++;
        try {
          updates.set(chunk, await version(chunk, bytes));
          // Not after a failure: it may be on its way yet.
          this.#chunks.give(bytes);
        } finally {
          this.#chunksTaken--;
        }
      }
      this.#step();
    });
    return updates;
  }

  /** A chunk's frames as they are now; empty ones are zeros. */
  async #merge(
    chunk: number,
    loaded: ReadonlyMap<number, Buffer>,
    bytes: Buffer,
  ): Promise<Buffer[]> {
    const { image, log } = this.#parts;
    const { blockSize, chunkSize, frameSize } = image.geometry;
    bytes.fill(0);
    const gaps: [start: number, end: number][] = [];
    const runs = image.index.of(chunk) ?? [];
    let covered = 0;
    // At once: what is in the open segment's memory may be elsewhere later.
    for (let i = 0; i < runs.length; i += RUN) {
      const start = (runs[i] as number) * blockSize;
      const end = start + (runs[i + 1] as number) * blockSize;
      const slot = runs[i + 2] as number;
      const offset = runs[i + 3] as number;
      if (offset >= 0) {
        // What is newer and not in memory stays in the log, over whatever the chunk has.
        const payload = loaded.get(slot) ?? log.payload(slot);
        if (payload === undefined) continue;
        payload.copy(bytes, start, offset, offset + end - start);
      }
      if (start > covered) gaps.push([covered, start]);
      covered = end;
    }
    if (covered < chunkSize) gaps.push([covered, chunkSize]);
    if (gaps.length > 0) await this.#fillGaps(chunk, bytes, gaps);
    return framesOf(bytes, frameSize).map((frame) =>
      isZero(frame) ? frame.subarray(0, 0) : frame,
    );
  }

  /** From the chunk's version that counts. */
  async #fillGaps(chunk: number, bytes: Buffer, gaps: readonly [number, number][]): Promise<void> {
    const { image, requests } = this.#parts;
    const { frameSize } = image.geometry;
    const ref = await image.map.lookup(chunk);
    if (ref === undefined) return;
    const wanted = new Set<number>();
    for (const [start, end] of gaps) {
      for (let frame = Math.floor(start / frameSize); frame * frameSize < end; frame++) {
        if (ref.frames[frame * 2] !== 0) wanted.add(frame);
      }
    }
    const list = [...wanted];
    const old = new Map<number, Buffer>();
    for (let i = 0; i < list.length; ) {
      let count = 1;
      while (list[i + count] === (list[i] as number) + count) count++;
      const first = list[i] as number;
      const frames = await requests.background.run(() =>
        image.chunkFrames(chunk, ref, first, count),
      );
      for (const [j, frame] of frames.entries()) old.set(first + j, frame);
      i += count;
    }
    for (const [start, end] of gaps) {
      for (const [frame, data] of old) {
        const base = frame * frameSize;
        const from = Math.max(start, base);
        const to = Math.min(end, base + frameSize);
        if (from < to) data.copy(bytes, from, from - base, to - base);
      }
    }
  }

  async #leaves(
    updates: Updates,
    n: number,
    superseded: { name: string; born: number }[],
  ): Promise<{ leaves: Map<number, LeafRef>; changed: Map<number, Leaf> }> {
    const { image, epoch } = this.#parts;
    const { map, geometry } = image;
    const framesPerChunk = geometry.chunkSize / geometry.frameSize;
    const leaves = new Map(map.manifest.leaves);
    const changed = new Map<number, Leaf>();
    const byLeaf = new Map<number, Updates>();
    for (const [chunk, ref] of updates) {
      const index = Math.floor(chunk / LEAF_CHUNKS);
      const group = byLeaf.get(index) ?? new Map();
      byLeaf.set(index, group.set(chunk - index * LEAF_CHUNKS, ref));
    }
    await inParallel([...byLeaf], WIDTH, async ([index, group]) => {
      const ref = leaves.get(index);
      const refs = new Map<number, ChunkRef>();
      if (ref !== undefined) {
        for (const [within, chunk] of (await map.leaf(index, ref)).entries(ref.origin)) {
          refs.set(within, chunk);
        }
        if (ref.origin === 0) {
          superseded.push({ name: leafName(index, ref.n, ref.epoch), born: ref.n });
        }
      }
      for (const [within, chunk] of group) {
        const old = refs.get(within);
        if (old !== undefined && old.origin === 0) {
          const name = chunkName(map.chunkOf(index, within), old.n, old.epoch);
          superseded.push({ name, born: old.n });
        }
        if (chunk === undefined) refs.delete(within);
        else refs.set(within, chunk);
      }
      if (refs.size === 0) {
        leaves.delete(index);
        return;
      }
      const bytes = Leaf.encode(refs, framesPerChunk);
      const blob = await this.#put(leafName(index, n, epoch), BlobKind.leaf, index, n, [bytes]);
      const { writer, keyId, length, crc } = blob.header;
      leaves.set(index, { origin: 0, n, epoch, writer, keyId, length, crc });
      changed.set(index, new Leaf(bytes, framesPerChunk));
    });
    return { leaves, changed };
  }

  async #put(name: string, kind: BlobKind, number: number, n: number, frames: readonly Buffer[]) {
    const { codec, requests, prefix, epoch, writer } = this.#parts;
    const blob = await codec.encode({ kind, number, n, epoch, writer }, frames);
    await requests.background.run(() => requests.create(`${prefix}/${name}`, blob.parts, FOREVER));
    return blob;
  }
}

function isZero(bytes: Buffer): boolean {
  return bytes[0] === 0 && bytes.compare(bytes, 1, bytes.length, 0, bytes.length - 1) === 0;
}

/** `run` for each of `items`, `width` at a time; the first failure ends it, after those under way. */
export async function inParallel<T>(
  items: readonly T[],
  width: number,
  run: (item: T) => Promise<void>,
): Promise<void> {
  let next = 0;
  let failed = false;
  const worker = async (): Promise<void> => {
    while (next < items.length && !failed) {
      try {
        await run(items[next++] as T);
      } catch (error) {
        failed = true;
        throw error;
      }
    }
  };
  const results = await Promise.allSettled(Array.from({ length: width }, worker));
  for (const result of results) if (result.status === 'rejected') throw result.reason;
}
