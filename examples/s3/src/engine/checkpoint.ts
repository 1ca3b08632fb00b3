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
 * Each chunk is written once, however scattered the log: the chunks are gone through in the order of the disk, as many at a time as
 * their data may take of memory (`log-loader`), and after a thousand there is a manifest of them. The log begins later only
 * with the last of these; who opens the disk before finds the data of those that are done in both.
 *
 * A new version may hold newer data than the manifest's `cut`: that is harmless, because the record is
 * behind everything that was in the log when the chunk was put together, so nobody uses the manifest
 * who has not all of that too.
 *
 * Every request of it, and every piece of data that it copies to the end of the log, takes its turn in the
 * background: while somebody waits for a flush, no more than one piece is ahead of it there.
 */
import { WIDTH } from './background.js';
import { type BlobCodec, BlobKind } from './blob.js';
import { Buffers } from './buffers.js';
import {
  type ChunkRef,
  chunkFrameOffset,
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
import { GAP_FRAMES, type LogData, LogLoader } from './log-loader.js';
import type { LogWriter } from './log-writer.js';
import { chunkName, leafName, manifestName } from './names.js';
import type { Freed, Pace } from './pace.js';
import { inParallel } from './parallel.js';
import type { Requests } from './requests.js';
import { FENCE_EPOCH, framesOf } from './segment.js';

/** Bytes copied to the end of the log at a time while somebody waits for it; two segments otherwise. */
const RELOCATE_BYTES = 256 * 1024;
/** Below this share of a chunk its data is rather copied to the end of the log. */
const SPARSE_SHARE = 8;
/** What comes after a checkpoint's chunks: leaves and manifest, the record, what isn't needed any more. */
const LAST_STEPS = 3;
/** As many chunks as this part of the leaves are done between two manifests at least. */
const ROUND_SHARE = 64;
/** So many times as many are loaded at a time, at most: where each has little in the log. */
const GROUP_MANIFESTS = 4;
/** More of the log is taken than has to be where that makes chunks free so much more each. */
const WORTH = 0.9;
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
  /** Chunks from which on a manifest is written of those that are done. */
  readonly manifestChunks: number;
  /** Whether somebody waits for the next manifest: it is written of what is done then. */
  readonly isAwaited: () => boolean;
  /** Bytes of memory for what is loaded again of the log, at most, but at least for one chunk's. */
  readonly loadLimit: number;
}

export interface CheckpointResult {
  /** Whether the log begins later now; or else there is more to do for that. */
  readonly isDone: boolean;
  readonly superseded: Superseded | undefined;
  readonly chunksWritten: number;
  readonly bytesRelocated: number;
}

type Updates = Map<number, ChunkRef | undefined>;

/** A checkpoint under way: all that has to be done until the log may begin at `cut`. */
interface Sweep {
  readonly cut: number;
  readonly all: boolean;
  /** Chunks whose data goes to the end of the log, and those that become new versions, in the disk's order; both without those done. */
  readonly relocate: number[];
  readonly destage: number[];
  /** Of loading and of what comes after, a step a chunk each, and the rest. */
  readonly steps: number;
  done: number;
}

export class Checkpointer {
  readonly #parts: CheckpointParts;
  #n: number;
  /** For chunks that are put together. */
  readonly #chunks: Buffers;
  #chunksTaken = 0;
  readonly #loader: LogLoader;
  #sweep: Sweep | undefined;

  /** @param n the highest number any manifest has had */
  constructor(parts: CheckpointParts, n: number) {
    this.#parts = parts;
    this.#n = n;
    this.#chunks = new Buffers(parts.image.geometry.chunkSize, WIDTH);
    this.#loader = new LogLoader(parts);
  }

  /** Bytes of memory, without the segments, which are the log's. */
  get bytes(): number {
    return this.#chunksTaken * this.#chunks.size + this.#chunks.freeBytes + this.#loader.bytes;
  }

  /** Whether one has begun, and not failed, and there is more of it to do. */
  get isUnderWay(): boolean {
    return this.#sweep !== undefined;
  }

  /** Lets go of what could be used again. */
  tidy(): void {
    this.#chunks.trim(0);
    this.#loader.tidy();
  }

  /**
   * Goes on with the checkpoint under way, or begins one: to the next manifest.
   * @param all everything that is durable, instead of the oldest part
   * @returns undefined when there was nothing to do
   * @throws DiskError `fenced`, `damaged`, `closed`; ObjectStoreError. What was done up to the manifest before stays done
   */
  async run(all: boolean): Promise<CheckpointResult | undefined> {
    const { image, log } = this.#parts;
    if (this.#sweep === undefined || (all && !this.#sweep.all)) {
      const cut = this.#chooseCut(all);
      if (cut <= image.map.manifest.cut || image.segments.size === 0) return undefined;
      this.#sweep = this.#begin(cut, all);
    }
    const sweep = this.#sweep;
    try {
      const result = await log.holding(sweep.cut, () => this.#round(sweep));
      if (result.isDone) this.#sweep = undefined;
      return result;
    } catch (error) {
      this.#sweep = undefined;
      throw error;
    }
  }

  async #round(sweep: Sweep): Promise<CheckpointResult> {
    const { image } = this.#parts;
    const { cut, relocate, destage } = sweep;
    // Never the same number twice: names are not used again.
    const n = ++this.#n;
    const updates: Updates = new Map();
    let bytesRelocated = 0;
    const most = Math.max(this.#parts.manifestChunks, image.map.manifest.leaves.size / ROUND_SHARE);
    for (let chunks = 0; chunks < most && relocate.length + destage.length > 0; ) {
      if (chunks > 0 && this.#parts.isAwaited()) break;
      const isMoved = relocate.length > 0;
      const group = this.#group(isMoved ? relocate : destage, cut);
      chunks += group.length;
      const { done } = sweep;
      try {
        const data = await this.#loader.load(group, cut, (share) => {
          this.#advance(sweep, done + share * group.length);
        });
        this.#advance(sweep, done + group.length);
        const left: number[] = [];
        if (isMoved) bytesRelocated += await this.#relocate(group, sweep, data, left);
        else await this.#destage(group, sweep, n, data, updates, left);
        // Loaded again for the next manifest.
        (isMoved ? relocate : destage).unshift(...left);
        sweep.done -= left.length;
      } finally {
        this.#loader.release();
      }
    }
    const isDone = relocate.length + destage.length === 0;
    const superseded =
      isDone || updates.size > 0 ? await this.#adopt(sweep, n, updates) : undefined;
    return { isDone, superseded, chunksWritten: updates.size, bytesRelocated };
  }

  /** Takes so many of `chunks` as may be loaded at a time. */
  #group(chunks: number[], cut: number): number[] {
    const limit = Math.max(this.#parts.loadLimit - this.#loader.overhead, this.#loader.overhead);
    const most = Math.min(chunks.length, GROUP_MANIFESTS * this.#parts.manifestChunks);
    let bytes = 0;
    let count = 0;
    for (; count < most; count++) {
      bytes += this.#loader.bytesOf(chunks[count] as number, cut);
      if (count > 0 && bytes > limit) break;
    }
    return chunks.splice(0, count);
  }

  /** Chunks that were written count from now on, and when all are, the log begins at the cut. */
  async #adopt(sweep: Sweep, n: number, updates: Updates): Promise<Superseded> {
    const { image, log, epoch, writer } = this.#parts;
    const old = image.map.manifest;
    const isDone = sweep.relocate.length + sweep.destage.length === 0;
    const cut = isDone ? sweep.cut : old.cut;
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
    this.#step(sweep);
    await this.#put(manifestName(n, epoch), BlobKind.manifest, n, n, [encodeManifest(manifest)]);
    log.checkpoint(n);
    await log.drain(FOREVER);
    const slots = [...image.segments.keys()].filter((slot) => slot < cut);
    const owned = new Set(this.#parts.claims);
    image.adopt(image.map.successor(manifest, changed), updates.keys(), sweep.cut);
    log.forgetBefore(cut);
    this.#step(sweep);
    return { n, manifest: old, objects, slots: slots.filter((slot) => !owned.has(slot)) };
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

  #begin(cut: number, all: boolean): Sweep {
    const { pace, logLimit } = this.#parts;
    const freed = this.#freed(cut);
    const { destage, relocate, appended } = this.#plan(cut, all, freed);
    const steps = 2 * (destage.length + relocate.length) + LAST_STEPS;
    pace.begin(freed, appended / logLimit);
    return { cut, all, relocate, destage, steps, done: 0 };
  }

  #step(sweep: Sweep): void {
    this.#advance(sweep, sweep.done + 1);
  }

  /** Of several manifests only the last one was counted. */
  #advance(sweep: Sweep, done: number): void {
    sweep.done = Math.min(done, sweep.steps - 1);
    this.#parts.pace.advance(sweep.done / sweep.steps);
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
   * So that half of what the log may hold is left, in bytes, in segments and in its index, or less, where each chunk that is written
   * frees more then; with `all` nothing. Of the index no more than half its limit at a time: what a checkpoint takes of memory
   * grows with that.
   */
  #chooseCut(all: boolean): number {
    const { image, log, logLimit, segmentLimit, indexLimit } = this.#parts;
    if (all) return log.durable;
    const most = indexLimit / 2;
    let index = image.index.bytes;
    const indexOf = index > most ? image.index.bytesBySlot() : undefined;
    const chunksOf = image.index.chunksByOldestSlot();
    let taken = 0;
    let bytes = 0;
    for (const { header } of image.segments.values()) bytes += header.length;
    const whole = { bytes, segments: image.segments.size };
    let { segments } = whole;
    let chunks = 0;
    let cut = image.map.manifest.cut;
    let best: { readonly cut: number; readonly price: number } | undefined;
    for (const [slot, { header }] of image.segments) {
      if (slot >= log.durable) break;
      const share = indexOf?.get(slot) ?? 0;
      taken += share;
      if (taken > most && cut > image.map.manifest.cut) break;
      const isEnough = bytes <= logLimit / 2 && segments <= segmentLimit / 2 && index <= most;
      if (isEnough && cut === image.map.manifest.cut) break;
      if (isEnough) {
        const freed = Math.max(
          (whole.bytes - bytes) / logLimit,
          (whole.segments - segments) / segmentLimit,
        );
        if (best === undefined || chunks / freed < best.price * WORTH) {
          best = { cut, price: chunks / freed };
        }
      }
      bytes -= header.length;
      index -= share;
      segments--;
      chunks += chunksOf.get(slot) ?? 0;
      // Behind a claim, slots are left out.
      cut = header.next;
    }
    return best?.cut ?? cut;
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
    // In the disk's order: each part of it has what it has of a segment close together, and few leaves.
    for (const chunks of [destage, relocate]) chunks.sort((a, b) => a - b);
    return { destage, relocate, appended };
  }

  /** @param left gets those that are not done, because the manifest is awaited */
  async #relocate(
    chunks: readonly number[],
    sweep: Sweep,
    loaded: LogData,
    left: number[],
  ): Promise<number> {
    const { cut } = sweep;
    const { image, log, segmentSize } = this.#parts;
    const { background } = this.#parts.requests;
    const { blockSize, chunkSize } = image.geometry;
    let moved = 0;
    let settled = 0;
    for (const [i, chunk] of chunks.entries()) {
      if (moved > 0 && this.#parts.isAwaited()) {
        left.push(...chunks.slice(i));
        break;
      }
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
        const data = loaded.get(slot, offset, blocks * blockSize);
        for (let at = 0; at < data.length; at += segmentSize) {
          const piece = data.subarray(at, at + segmentSize);
          const block = first + start + at / blockSize;
          const where = log.append(block, piece);
          image.index.put(block, piece.length / blockSize, where.slot, where.offset);
        }
        moved += data.length;
      }
      this.#step(sweep);
    }
    return moved;
  }

  /** @param left gets those that are not done, because the manifest is awaited */
  async #destage(
    chunks: readonly number[],
    sweep: Sweep,
    n: number,
    loaded: LogData,
    updates: Updates,
    left: number[],
  ): Promise<void> {
    const { isAwaited, log } = this.#parts;
    const { index } = this.#parts.image;
    const version = async (chunk: number, bytes: Buffer): Promise<ChunkRef | undefined> => {
      const frames = await this.#merge(chunk, sweep.cut, loaded, bytes);
      if (frames.every(({ length }) => length === 0)) return undefined;
      const name = chunkName(chunk, n, this.#parts.epoch);
      return chunkRef(await this.#put(name, BlobKind.chunk, chunk, n, frames));
    };
    await inParallel(chunks, WIDTH, async (chunk) => {
      // Nobody will ever know what a writer that was replaced puts there.
      if (log.failure !== undefined) throw log.failure;
      if (updates.size > 0 && isAwaited()) {
        left.push(chunk);
        return;
      }
      if (index.isZero(chunk)) updates.set(chunk, undefined);
      else if (index.isIn(chunk, sweep.cut)) {
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
      this.#step(sweep);
    });
  }

  /** A chunk's frames as they are now; empty ones are zeros. */
  async #merge(chunk: number, cut: number, loaded: LogData, bytes: Buffer): Promise<Buffer[]> {
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
        const length = end - start;
        const data =
          slot < cut
            ? loaded.get(slot, offset, length)
            : log.payload(slot)?.subarray(offset, offset + length);
        // What is newer and not in memory stays in the log, over whatever the chunk has.
        if (data === undefined) continue;
        data.copy(bytes, start);
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
    for (let i = 0, behind = 1; i < list.length; i = behind++) {
      for (; behind < list.length; behind++) {
        const last = list[behind - 1] as number;
        const gap = chunkFrameOffset(ref, list[behind] as number) - chunkFrameOffset(ref, last + 1);
        if (gap > GAP_FRAMES * frameSize) break;
      }
      const frames = await requests.background.run(() =>
        image.chunkFrames(chunk, ref, list.slice(i, behind)),
      );
      for (const [frame, data] of frames) old.set(frame, data);
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
