// SPDX-License-Identifier: Apache-2.0
/**
 * A disk's contents as of a point of its log: chunks below, the log's index above. It reads; whoever
 * appends to the log, follows it or replaces the chunks tells it.
 *
 * Reading answers at once when all is in memory. An object that is gone is damage only if nobody has
 * replaced it meanwhile: then the read is made again with the new map.
 */
import type { BlockExtent, DataIn, MaybePromise } from 'tcmu';
import { failureKind } from '../object-store.js';
import {
  type BlobCodec,
  BlobKind,
  type FrameEntry,
  frameOffset,
  storedLength,
  tableEntry,
} from './blob.js';
import { AnswerBuffers } from './buffers.js';
import {
  type ChunkMap,
  type ChunkRef,
  chunkFrameOffset,
  LEAF_CHUNKS,
  type Manifest,
  type Origin,
} from './chunk-map.js';
import { damaged, Gone } from './errors.js';
import type { FileCache } from './file-cache.js';
import type { FrameCache } from './frame-cache.js';
import { LogIndex, RUN } from './log-index.js';
import type { ReadSegment } from './log-reader.js';
import { chunkName, segmentName } from './names.js';
import type { Requests } from './requests.js';
import { RecordType } from './segment.js';
import type { SegmentFacts } from './segment-facts.js';

export interface Geometry {
  readonly blockSize: number;
  readonly chunkSize: number;
  readonly frameSize: number;
}

/** Frames a segment may have, for the keys of the cache. */
export const MAX_SEGMENT_FRAMES = 4096;
/** Extents one `blockStatus` looks for at most. */
const MAX_EXTENTS = 256;
/** What one question about provisioning may look at: chunks count 16, parts of the disk without any 1. */
const STATUS_LOOKS = 65_536;
/** A stream is taken for sequential after this many bytes, and read ahead at most as far as that, or a quarter of the cache. */
const SEQUENTIAL_BYTES = 128 * 1024;
const MAX_READ_AHEAD = 4 * 1024 * 1024;
const STREAMS = 4;
/** Share of the cache that is free as long as it has room for what nobody asked for. */
const FREE_SHARE = 1 / 8;
/** Frames that come with a lone one while there is room, itself included: a longer answer would begin later. */
const FRAMES_BEHIND = 8;
/** Those that come after it. */
const FRAMES_BEFORE = 16;
/** Requests at a time for what nobody has asked for. */
const MOST_UNASKED = 2;
/** Share of the cache's memory that answers of the bucket of one size may keep for the next ones. */
const ANSWER_SHARE = 1 / 64;

export interface ImageParts {
  readonly requests: Requests;
  readonly codec: BlobCodec;
  readonly geometry: Geometry;
  readonly prefix: string;
  readonly cache: FrameCache;
  readonly fileCache: FileCache | undefined;
  /** Data of a segment while it is in memory. */
  readonly payload: (slot: number) => Buffer | undefined;
  readonly readAhead: boolean;
}

export class DiskImage {
  readonly index: LogIndex;
  readonly segments = new Map<number, SegmentFacts>();
  size: number;
  readonly #parts: ImageParts;
  #map: ChunkMap;
  /** Changes when objects may have gone. */
  #generation = 0;
  readonly #framesPerChunk: number;
  readonly #fetching = new Map<string, Fetching>();
  readonly #answers: AnswerBuffers;
  /** Requests under way for what nobody has asked for. */
  #unasked = 0;
  /** The sequential readers of late, the latest first. */
  readonly #streams: Stream[] = [];

  constructor(parts: ImageParts, map: ChunkMap) {
    this.#parts = parts;
    this.#map = map;
    this.size = map.manifest.size;
    const { blockSize, chunkSize, frameSize } = parts.geometry;
    this.index = new LogIndex(blockSize, chunkSize);
    this.#framesPerChunk = chunkSize / frameSize;
    this.#answers = new AnswerBuffers(parts.cache.limit * ANSWER_SHARE);
  }

  /** Bytes of memory for what is on its way from the bucket. */
  get answerBytes(): number {
    return this.#answers.bytes;
  }

  get map(): ChunkMap {
    return this.#map;
  }

  get geometry(): Geometry {
    return this.#parts.geometry;
  }

  /** A segment's changes, in order. Checkpoints are the caller's affair. */
  apply(segment: ReadSegment): void {
    const { header } = segment.facts;
    this.segments.set(header.number, segment.facts);
    let offset = 0;
    for (const { type, block, blocks } of segment.records) {
      if (type === RecordType.data) {
        this.index.put(block, blocks, header.number, offset);
        offset += blocks * this.geometry.blockSize;
      } else if (type === RecordType.zero) {
        this.zero(block, blocks, header.number);
      } else if (type === RecordType.resize) {
        this.size = block * this.geometry.blockSize;
      }
    }
  }

  /** Zeros, noted only where something may be: nothing else grows with the length. */
  zero(block: number, blocks: number, slot: number): void {
    const size = this.geometry.chunkSize / this.geometry.blockSize;
    const end = block + blocks;
    const zeroIn = (chunk: number): void => {
      const from = Math.max(block, chunk * size);
      const to = Math.min(end, (chunk + 1) * size);
      if (from < to) this.index.put(from, to - from, slot, -1);
    };
    const first = Math.floor(block / size);
    const last = Math.floor((end - 1) / size);
    if (last - first < 1024) {
      for (let chunk = first; chunk <= last; chunk++) {
        if (this.#map.hasLeafOf(chunk) || this.index.of(chunk) !== undefined) zeroIn(chunk);
      }
      return;
    }
    for (const chunk of [...this.index.indexes()]) {
      if (chunk >= first && chunk <= last && !this.#map.hasLeafOf(chunk)) zeroIn(chunk);
    }
    for (const leaf of this.#map.manifest.leaves.keys()) {
      const start = Math.max(leaf * LEAF_CHUNKS, first);
      const stop = Math.min((leaf + 1) * LEAF_CHUNKS - 1, last);
      for (let chunk = start; chunk <= stop; chunk++) zeroIn(chunk);
    }
  }

  /**
   * The chunks as of a newer manifest: what they hold is dropped from the log's index.
   * @param changed chunks that differ; all of a changed leaf's when not known
   * @param upTo slot before which they have all of the log, if that is more than the manifest says of all chunks
   */
  adopt(map: ChunkMap, changed?: Iterable<number>, upTo = 0): void {
    const before = this.#map.manifest.leaves;
    const { cut } = map.manifest;
    const perChunk = this.#framesPerChunk;
    const { cache } = this.#parts;
    this.#map = map;
    this.#generation++;
    this.index.dropBefore(cut);
    for (const slot of this.segments.keys()) if (slot < cut) this.segments.delete(slot);
    if (changed === undefined) {
      this.#dropChanged(before);
      return;
    }
    for (const chunk of changed) {
      for (let frame = 0; frame < perChunk; frame++) cache.delete(chunk * perChunk + frame);
      if (upTo > cut) this.index.dropOf(chunk, upTo);
    }
  }

  /** Nothing it still fetches may get into the cache, which `successor` goes on with. */
  retire(successor: DiskImage): void {
    this.#generation++;
    successor.#dropChanged(this.#map.manifest.leaves);
  }

  #dropChanged(before: Manifest['leaves']): void {
    const { leaves } = this.#map.manifest;
    this.#parts.cache.deleteIf((key) => {
      const leaf = Math.floor(key / (this.#framesPerChunk * LEAF_CHUNKS));
      return key >= 0 && leaves.get(leaf)?.crc !== before.get(leaf)?.crc;
    });
  }

  /** @throws Gone when an object is missing; DiskError `damaged`, `unreachable`; ObjectStoreError */
  read(position: number, data: DataIn): MaybePromise<void> {
    if (this.#parts.readAhead) this.#follow(position, data.length);
    const jobs: Promise<unknown>[] = [];
    this.#collect(position, data.length, data, jobs);
    if (jobs.length === 0) return;
    return this.#parts.requests.background.ahead(this.#finish(position, data, jobs));
  }

  async #finish(position: number, data: DataIn, first: Promise<unknown>[]): Promise<void> {
    for (let jobs = first; jobs.length > 0; ) {
      const generation = this.#generation;
      // All of them, also when one fails: the buffer must not be in use any more when we settle.
      const results = await Promise.allSettled(jobs);
      const failed = results.find(({ status }) => status === 'rejected');
      if (failed === undefined) return;
      const { reason } = failed as PromiseRejectedResult;
      if (!(reason instanceof Gone) || generation === this.#generation) throw reason;
      jobs = [];
      this.#collect(position, data.length, data, jobs);
    }
  }

  /** Copies what is in memory, and begins to fetch the rest. Without `data` it only fetches. */
  #collect(
    position: number,
    length: number,
    data: DataIn | undefined,
    jobs: Promise<unknown>[],
  ): void {
    const { chunkSize, blockSize } = this.geometry;
    for (let done = 0; done < length; ) {
      const at = position + done;
      const chunk = Math.floor(at / chunkSize);
      const from = at - chunk * chunkSize;
      const to = Math.min(chunkSize, from + length - done);
      const runs = this.index.of(chunk);
      const shift = done - from;
      let covered = from;
      if (runs !== undefined) {
        for (let i = firstRun(runs, from / blockSize); i < runs.length; i += RUN) {
          const start = (runs[i] as number) * blockSize;
          if (start >= to) break;
          const end = Math.min(to, start + (runs[i + 1] as number) * blockSize);
          const begin = Math.max(start, from);
          if (begin > covered) this.#base(chunk, covered, begin, data, shift, jobs);
          const slot = runs[i + 2] as number;
          const offset = runs[i + 3] as number;
          if (offset < 0) data?.fill(0, begin + shift, end + shift);
          else {
            this.#segment(slot, offset + begin - start, end - begin, data, begin + shift, jobs);
          }
          covered = end;
        }
      }
      if (covered < to) this.#base(chunk, covered, to, data, shift, jobs);
      done += to - from;
    }
  }

  /** Bytes `[from, to)` of a chunk; `shift` more is where they go in `data`. */
  #base(
    chunk: number,
    from: number,
    to: number,
    data: DataIn | undefined,
    shift: number,
    jobs: Promise<unknown>[],
  ): void {
    if (!this.#map.hasLeafOf(chunk)) {
      data?.fill(0, from + shift, to + shift);
      return;
    }
    const ref = this.#map.lookup(chunk);
    const generation = this.#generation;
    if (ref instanceof Promise) {
      jobs.push(ref.then((found) => this.#wait(chunk, found, generation, from, to, data, shift)));
      return;
    }
    this.#frames(chunk, ref, generation, from, to, data, shift, jobs);
  }

  async #wait(
    chunk: number,
    ref: ChunkRef | undefined,
    generation: number,
    from: number,
    to: number,
    data: DataIn | undefined,
    shift: number,
  ): Promise<void> {
    const jobs: Promise<unknown>[] = [];
    this.#frames(chunk, ref, generation, from, to, data, shift, jobs);
    const results = await Promise.allSettled(jobs);
    for (const result of results) if (result.status === 'rejected') throw result.reason;
  }

  /** @param generation of the map that `ref` is from */
  #frames(
    chunk: number,
    ref: ChunkRef | undefined,
    generation: number,
    from: number,
    to: number,
    data: DataIn | undefined,
    shift: number,
    jobs: Promise<unknown>[],
  ): void {
    if (ref === undefined) {
      data?.fill(0, from + shift, to + shift);
      return;
    }
    const { frameSize } = this.geometry;
    const last = Math.floor((to - 1) / frameSize);
    for (let frame = Math.floor(from / frameSize); frame <= last; frame++) {
      const start = Math.max(from, frame * frameSize);
      const end = Math.min(to, (frame + 1) * frameSize);
      if (ref.frames[frame * 2] === 0) {
        data?.fill(0, start + shift, end + shift);
        continue;
      }
      const key = chunk * this.#framesPerChunk + frame;
      if (data === undefined && this.#parts.cache.has(key)) continue;
      const cached = this.#parts.cache.get(key);
      if (cached !== undefined) {
        data?.copyFrom(part(cached, frame * frameSize, start, end), start + shift);
        continue;
      }
      // Frames that are missing after each other come by one request.
      let count = 1;
      while (frame + count <= last && this.#missing(chunk, ref, frame + count)) count++;
      const source = this.#chunkSource(chunk, ref, generation);
      this.#fetchAround(source, frame, count, data, jobs, (one, bytes) => {
        const base = one * frameSize;
        const begin = Math.max(from, base);
        const stop = Math.min(to, base + frameSize);
        if (begin < stop) data?.copyFrom(part(bytes, base, begin, stop), begin + shift);
      });
      frame += count - 1;
    }
  }

  #missing(chunk: number, ref: ChunkRef, frame: number): boolean {
    if (ref.frames[frame * 2] === 0) return false;
    return !this.#parts.cache.has(chunk * this.#framesPerChunk + frame);
  }

  /**
   * Fetches what was asked for. A frame alone brings the missing ones around it along while the cache has room: those behind it
   * in the same answer, which its reader does not wait for, those before it by a request of their own after that, if nobody else waits. It costs the bucket
   * a second request, only until the cache is filled, and saves one for each of them that is wanted.
   */
  #fetchAround(
    source: FrameSource,
    first: number,
    count: number,
    data: DataIn | undefined,
    jobs: Promise<unknown>[],
    take: (frame: number, bytes: Buffer) => void,
  ): void {
    const isLone = count === 1 && data !== undefined && this.#comes(source, first);
    if (!isLone || !this.#hasRoom) return this.#fetch(source, first, count, count, jobs, take);
    let along = 1;
    while (along < FRAMES_BEHIND && this.#comes(source, first + along)) along++;
    const wanted: Promise<unknown>[] = [];
    this.#fetch(source, first, count, along, wanted, take);
    jobs.push(...wanted);
    const generation = this.#generation;
    Promise.all(wanted).then(
      () => {
        if (generation === this.#generation) this.#fetchBefore(source, first);
      },
      () => {},
    );
  }

  #fetchBefore(source: FrameSource, frame: number): void {
    // Others than its reader, who may be about to be told.
    const isBusy = this.#parts.requests.background.waiting > 1;
    if (isBusy || !this.#hasRoom || this.#unasked >= MOST_UNASKED) return;
    let first = frame;
    while (frame - first < FRAMES_BEFORE && this.#comes(source, first - 1)) first--;
    if (first === frame) return;
    const jobs: Promise<unknown>[] = [];
    this.#fetch(source, first, frame - first, frame - first, jobs, () => {});
    this.#unasked++;
    // Who wants them meets the same failure, and tells.
    void Promise.allSettled(jobs).then(() => this.#unasked--);
  }

  /** Whether there is room in the cache for what nobody asked for. */
  get #hasRoom(): boolean {
    const { cache } = this.#parts;
    return cache.room > cache.limit * FREE_SHARE;
  }

  /** Whether there is such a frame, and it is neither here nor on its way. */
  #comes(source: FrameSource, frame: number): boolean {
    return frame >= 0 && source.wants(frame) && !this.#fetching.has(`${source.key}#${frame}`);
  }

  /** Copies of a chunk's frames, none of them zeros, by one request. Who asks replaces them: the cache does without. */
  async chunkFrames(
    chunk: number,
    ref: ChunkRef,
    wanted: readonly number[],
  ): Promise<Map<number, Buffer>> {
    const frames = new Map<number, Buffer>();
    const source = this.#chunkSource(chunk, ref, this.#generation);
    const arrived = (frame: number, bytes: Buffer): void => {
      frames.set(frame, Buffer.from(bytes));
    };
    const missing = await this.#fromFile(source, wanted, arrived);
    if (missing.length > 0) await this.#fromBucket(source, missing, arrived);
    return frames;
  }

  #chunkSource(chunk: number, ref: ChunkRef, generation: number): FrameSource {
    const { codec, cache, prefix } = this.#parts;
    const { frameSize } = this.geometry;
    const origin = this.#map.manifest.origins[ref.origin] as Origin;
    const name = chunkName(chunk, ref.n, ref.epoch);
    const identity = {
      kind: BlobKind.chunk,
      number: chunk,
      n: ref.n,
      epoch: ref.epoch,
      writer: ref.writer,
      keyId: ref.keyId,
    };
    const entryOf = (frame: number): FrameEntry => ({
      stored: ref.frames[frame * 2] as number,
      crc: ref.frames[frame * 2 + 1] as number,
      raw: frameSize,
    });
    return {
      key: `${ref.origin === 0 ? prefix : origin.prefix}/${name}`,
      offset: (frame) => chunkFrameOffset(ref, frame),
      length: (frame) => (ref.frames[frame * 2] as number) & 0x3fffffff,
      crc: (frame) => ref.frames[frame * 2 + 1] as number,
      wants: (frame) => frame < this.#framesPerChunk && this.#missing(chunk, ref, frame),
      decode: (key, frame, stored) =>
        codec.decodeFrame(key, identity, origin.id, frame, entryOf(frame), stored),
      keep: (frame, bytes) => {
        // Not what an older map led to, also one that was asked long ago.
        if (generation !== this.#generation) return;
        cache.put(chunk * this.#framesPerChunk + frame, bytes);
      },
    };
  }

  /** `length` bytes at `offset` of a segment's data, to `at` of `data`. */
  #segment(
    slot: number,
    offset: number,
    length: number,
    data: DataIn | undefined,
    at: number,
    jobs: Promise<unknown>[],
  ): void {
    const payload = this.#parts.payload(slot);
    if (payload !== undefined) {
      data?.copyFrom(payload.subarray(offset, offset + length), at);
      return;
    }
    const { cache } = this.#parts;
    const { frameSize } = this.geometry;
    const to = offset + length;
    const last = Math.floor((to - 1) / frameSize);
    const copy = (frame: number, bytes: Buffer): void => {
      const start = Math.max(offset, frame * frameSize);
      const end = Math.min(to, (frame + 1) * frameSize);
      if (start < end) {
        data?.copyFrom(part(bytes, frame * frameSize, start, end), at + start - offset);
      }
    };
    for (let frame = Math.floor(offset / frameSize); frame <= last; frame++) {
      const cached = cache.get(segmentFrameKey(slot, frame));
      if (cached !== undefined) {
        copy(frame, cached);
        continue;
      }
      let count = 1;
      while (frame + count <= last && !cache.has(segmentFrameKey(slot, frame + count))) count++;
      const source = this.#segmentSource(slot);
      this.#fetchAround(source, frame, count, data, jobs, copy);
      frame += count - 1;
    }
  }

  #segmentSource(slot: number): FrameSource {
    const { cache, codec, prefix } = this.#parts;
    const { header, table } = this.segments.get(slot) as SegmentFacts;
    return {
      key: `${prefix}/${segmentName(slot)}`,
      // Frame 0 of the object is the list of changes.
      offset: (one) => frameOffset(table, one + 1),
      length: (one) => storedLength(table, one + 1),
      crc: (one) => tableEntry(table, one + 1).crc,
      wants: (one) => one + 1 < header.frames && !cache.has(segmentFrameKey(slot, one)),
      decode: (key, one, stored) =>
        codec.decodeFrame(key, header, codec.diskId, one + 1, tableEntry(table, one + 1), stored),
      keep: (one, bytes) => cache.put(segmentFrameKey(slot, one), bytes),
    };
  }

  /**
   * Shares what is on its way already; the rest comes by one request a gap, `along` frames in all. `take` sees each of the first
   * `count` frames before it is gone, and the job is done with the last of them.
   */
  #fetch(
    source: FrameSource,
    first: number,
    count: number,
    along: number,
    jobs: Promise<unknown>[],
    take: (frame: number, bytes: Buffer) => void,
  ): void {
    const until = first + along;
    for (let frame = first; frame < until; ) {
      const under = this.#fetching.get(`${source.key}#${frame}`);
      if (under !== undefined) {
        jobs.push(under.join(frame, frame + 1, take));
        frame++;
        continue;
      }
      const start = frame;
      const fetching = new Fetching();
      do this.#fetching.set(`${source.key}#${frame++}`, fetching);
      while (frame < until && !this.#fetching.has(`${source.key}#${frame}`));
      jobs.push(fetching.join(start, Math.min(frame, first + count), take));
      void this.#request(source, start, frame - start, fetching);
    }
  }

  /** Never rejects: those who wait are told. */
  async #request(
    source: FrameSource,
    first: number,
    count: number,
    fetching: Fetching,
  ): Promise<void> {
    const arrived = (frame: number, bytes: Buffer): void => {
      // Whoever comes from here on finds it in the cache, or asks anew.
      this.#fetching.delete(`${source.key}#${frame}`);
      fetching.deliver(frame, bytes);
      source.keep(frame, bytes);
    };
    let failure: unknown;
    try {
      const frames = Array.from({ length: count }, (_, i) => first + i);
      const missing = await this.#fromFile(source, frames, arrived);
      if (missing.length > 0) await this.#fromBucket(source, missing, arrived);
    } catch (error) {
      failure = error;
    }
    for (let frame = first; frame < first + count; frame++) {
      const key = `${source.key}#${frame}`;
      if (this.#fetching.get(key) === fetching) this.#fetching.delete(key);
    }
    fetching.fail(failure);
  }

  /** @returns the frames that the local file has not */
  async #fromFile(
    source: FrameSource,
    frames: readonly number[],
    arrived: (frame: number, bytes: Buffer) => void,
  ): Promise<number[]> {
    const { fileCache } = this.#parts;
    const missing: number[] = [];
    for (const frame of frames) {
      const [length, crc] = [source.length(frame), source.crc(frame)];
      const stored = await fileCache?.get(source.key, frame, length, crc);
      if (stored === undefined) missing.push(frame);
      else arrived(frame, source.decode(source.key, frame, stored));
    }
    return missing;
  }

  async #fromBucket(
    source: FrameSource,
    missing: readonly number[],
    arrived: (frame: number, bytes: Buffer) => void,
  ): Promise<void> {
    const { fileCache, requests } = this.#parts;
    const last = missing.at(-1) as number;
    const start = source.offset(missing[0] as number);
    const end = source.offset(last) + source.length(last);
    const into = this.#answers.take(end - start);
    let next = 0;
    let damage: unknown;
    // Those of which everything is there, of the first `bytes` bytes.
    const onProgress = (body: Buffer, bytes: number): void => {
      for (; next < missing.length && damage === undefined; next++) {
        const frame = missing[next] as number;
        const at = source.offset(frame) - start;
        const to = at + source.length(frame);
        if (to > bytes) return;
        const stored = body.subarray(at, to);
        try {
          const decoded = source.decode(source.key, frame, stored);
          fileCache?.put(source.key, frame, stored, source.crc(frame));
          arrived(frame, decoded);
        } catch (error) {
          damage = error;
        }
      }
    };
    try {
      const range = { start, end };
      const { body } = await requests.get(source.key, { range, into, onProgress });
      onProgress(body, body.length);
    } catch (error) {
      if (failureKind(error) === 'not-found') throw new Gone(source.key);
      throw damage ?? error;
    } finally {
      this.#answers.give(into);
    }
    if (damage === undefined && next < missing.length) {
      damage = damaged(source.key, `frame ${missing[next]} is cut short`);
    }
    if (damage !== undefined) throw damage;
  }

  /** Notices sequential readers, and fetches what they will want next. */
  #follow(position: number, length: number): void {
    const end = position + length;
    const at = this.#streams.findIndex((stream) => stream.next === position);
    if (at < 0) {
      this.#streams.unshift({ next: end, run: length, ahead: end });
      if (this.#streams.length > STREAMS) this.#streams.pop();
      return;
    }
    const [stream] = this.#streams.splice(at, 1) as [Stream];
    this.#streams.unshift(stream);
    stream.next = end;
    stream.run += length;
    stream.ahead = Math.max(stream.ahead, end);
    if (stream.run < SEQUENTIAL_BYTES) return;
    // As far ahead as was read already, a chunk at a time, so that requests are large.
    const most = Math.min(MAX_READ_AHEAD, this.#parts.cache.limit / 4);
    const wanted = Math.min(end + Math.min(stream.run, most), this.size);
    const { chunkSize } = this.geometry;
    while (stream.ahead < wanted) {
      const stop = Math.min((Math.floor(stream.ahead / chunkSize) + 1) * chunkSize, this.size);
      const jobs: Promise<unknown>[] = [];
      this.#collect(stream.ahead, stop - stream.ahead, undefined, jobs);
      // A reader will meet the same failure, and tell.
      for (const job of jobs) job.catch(() => {});
      stream.ahead = stop;
    }
  }

  /** Extents from `position`. */
  async status(position: number, length: number): Promise<BlockExtent[]> {
    const { chunkSize, blockSize, frameSize } = this.geometry;
    const extents: { length: number; status: BlockExtent['status'] }[] = [];
    const add = (bytes: number, status: BlockExtent['status']): void => {
      const last = extents.at(-1);
      if (last?.status === status) last.length += bytes;
      else extents.push({ length: bytes, status });
    };
    let looks = STATUS_LOOKS;
    let logged: ReadonlySet<number> | undefined;
    for (let done = 0; done < length && extents.length < MAX_EXTENTS && looks > 0; ) {
      const at = position + done;
      const chunk = Math.floor(at / chunkSize);
      if (!this.#map.hasLeafOf(chunk)) {
        logged ??= new Set([...this.index.indexes()].map(leafOf));
        if (!logged.has(leafOf(chunk))) {
          // Nothing in all of the leaf's part: a disk of many TiB is mostly that.
          const end = (leafOf(chunk) + 1) * LEAF_CHUNKS * chunkSize;
          const hole = Math.min(length - done, end - at);
          add(hole, 'hole');
          done += hole;
          looks--;
          continue;
        }
      }
      looks -= 16;
      const from = at - chunk * chunkSize;
      const to = Math.min(chunkSize, from + length - done);
      const runs = [...(this.index.of(chunk) ?? [])];
      const ref = await this.#map.lookup(chunk);
      const gap = (start: number, end: number): void => {
        for (let byte = start; byte < end; ) {
          const frame = Math.floor(byte / frameSize);
          const stop = Math.min(end, (frame + 1) * frameSize);
          const hole = ref === undefined || ref.frames[frame * 2] === 0;
          add(stop - byte, hole ? 'hole' : 'data');
          byte = stop;
        }
      };
      let covered = from;
      for (let i = firstRun(runs, from / blockSize); i < runs.length; i += RUN) {
        const start = (runs[i] as number) * blockSize;
        if (start >= to) break;
        const end = Math.min(to, start + (runs[i + 1] as number) * blockSize);
        gap(covered, Math.max(start, from));
        add(end - Math.max(start, from), (runs[i + 3] as number) < 0 ? 'hole' : 'data');
        covered = end;
      }
      gap(covered, to);
      done += to - from;
    }
    return extents;
  }
}

const leafOf = (chunk: number): number => Math.floor(chunk / LEAF_CHUNKS);

/** A sequential reader. */
interface Stream {
  /** Byte it will read next. */
  next: number;
  /** Bytes read in a row. */
  run: number;
  /** Byte up to which was fetched ahead. */
  ahead: number;
}

interface FrameSource {
  readonly key: string;
  offset(frame: number): number;
  length(frame: number): number;
  crc(frame: number): number;
  /** Whether there is such a frame, and the cache lacks it. */
  wants(frame: number): boolean;
  /** Good for as long as `stored` is. */
  decode(key: string, frame: number, stored: Buffer): Buffer;
  keep(frame: number, bytes: Buffer): void;
}

/** Somebody who waits for the frames `[from, until)`. */
interface Taker {
  readonly from: number;
  readonly until: number;
  readonly take: (frame: number, bytes: Buffer) => void;
  readonly resolve: () => void;
  readonly reject: (error: unknown) => void;
  /** Frames that have not come yet. */
  left: number;
}

/** A request under way, and who wants which of its frames. */
class Fetching {
  readonly #takers = new Set<Taker>();

  /**
   * Settles with the last of the frames, or when the request has failed: `take` is not called after that. What goes wrong with one
   * who takes is that one's business.
   */
  join(from: number, until: number, take: (frame: number, bytes: Buffer) => void): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#takers.add({ from, until, take, resolve, reject, left: until - from });
    });
  }

  deliver(frame: number, bytes: Buffer): void {
    for (const taker of this.#takers) {
      if (frame < taker.from || frame >= taker.until) continue;
      try {
        taker.take(frame, bytes);
      } catch (error) {
        this.#takers.delete(taker);
        taker.reject(error);
        continue;
      }
      if (--taker.left > 0) continue;
      this.#takers.delete(taker);
      taker.resolve();
    }
  }

  /** To those who still wait. */
  fail(reason: unknown): void {
    for (const { reject } of this.#takers) reject(reason);
    this.#takers.clear();
  }
}

/** Key of a segment's frame in the cache. */
function segmentFrameKey(slot: number, frame: number): number {
  return -(slot * MAX_SEGMENT_FRAMES + frame + 1);
}

/** Bytes `[start, end)` of something whose byte 0 is at `base`. */
function part(bytes: Buffer, base: number, start: number, end: number): Buffer {
  return start === base && end - base === bytes.length
    ? bytes
    : bytes.subarray(start - base, end - base);
}

/** Index of the first run that ends behind `block`. */
function firstRun(runs: readonly number[], block: number): number {
  let low = 0;
  let high = runs.length / RUN;
  while (low < high) {
    const middle = (low + high) >>> 1;
    const at = middle * RUN;
    if ((runs[at] as number) + (runs[at + 1] as number) <= block) low = middle + 1;
    else high = middle;
  }
  return low * RUN;
}
