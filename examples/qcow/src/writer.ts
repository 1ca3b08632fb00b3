// SPDX-License-Identifier: Apache-2.0
/**
 * Writing where it is not enough to write in place: to clusters that have no place yet, share it with
 * a snapshot, are compressed, or read as zeros.
 *
 * The order within one write: its range of guest clusters is locked against others that change the
 * mapping; space is taken; the data is written, padded to whole units of allocation with what the disk
 * showed there before; and only then the mapping is changed, in memory. Until that moment the old
 * clusters are untouched, so a failure leaves the disk as it was.
 */
import type { DataOut } from 'tcmu';
import { MemoryDataOut } from 'tcmu/store';
import type { ClusterLock } from './cluster-lock.js';
import type { ClusterCodec } from './compression/codec.js';
import { eachReference, Kind, putCompressed, putEntry } from './format/entries.js';
import type { Geometry } from './format/geometry.js';
import type { GuestData } from './guest-data.js';
import type { HostFile } from './host/host-file.js';
import type { Mapping } from './mapping.js';
import { allSettled, type MetadataSync } from './metadata-sync.js';
import type { Reader } from './reader.js';
import type { ClusterRun, Refcounts } from './refcounts.js';
import type { Reserve } from './reserve.js';
import type { Table } from './table-cache.js';

export interface WriterParts {
  readonly file: HostFile;
  readonly data: GuestData;
  readonly geometry: Geometry;
  readonly mapping: Mapping;
  readonly refcounts: Refcounts;
  readonly reader: Reader;
  readonly sync: MetadataSync;
  /** Space for what replaces zeros; without it all space is taken from the refcounts. */
  readonly reserve: Reserve | undefined;
  readonly lock: ClusterLock;
  readonly codec: ClusterCodec;
  /** Store whole clusters compressed. */
  readonly compress: boolean;
  /** The data file must be right without the metadata. */
  readonly rawData: boolean;
  readonly hasBacking: boolean;
  readonly discard: boolean;
  /** Called before the first change of metadata. */
  prepare(): Promise<void> | undefined;
}

/** Zeros are written as data in pieces of this size. */
const PIECE = 1024 * 1024;

export class Writer {
  readonly #parts: WriterParts;
  /** L2 tables being made, by L1 index. */
  readonly #making = new Map<number, Promise<void>>();
  /** Where the next compressed data may go: host offset, in a cluster that is not full. */
  #compressedAt: number | undefined;
  /** Behind it, an external data file has never been written. */
  #dataFreshFrom: number;

  constructor(parts: WriterParts) {
    this.#parts = parts;
    const { file } = parts.data;
    this.#dataFreshFrom =
      file.backing?.facts.kind === 'block' ? Number.POSITIVE_INFINITY : file.size();
  }

  /** The metadata has been replaced: places that were remembered may not be free any more. */
  forget(): void {
    this.#compressedAt = undefined;
  }

  async write(position: number, data: DataOut): Promise<void> {
    await this.#room();
    await this.#locked(position, data.length, () => this.#write(position, data));
  }

  /** Makes a range read as zeros; with `mayUnmap` whole clusters are given up. */
  async writeZeroes(position: number, length: number, mayUnmap: boolean): Promise<void> {
    // One lock for a huge range would hold up everybody; a table's range at a time is enough.
    const step = this.#parts.geometry.sliceCoverage;
    for (let at = position; at < position + length; ) {
      const end = Math.min(position + length, (Math.floor(at / step) + 1) * step);
      await this.#room();
      await this.#locked(at, end - at, () => this.#zero(at, end - at, mayUnmap));
      at = end;
    }
  }

  /** Makes whole clusters unallocated, whatever lies below shows then. For one table's range at a time. */
  async giveUp(start: number, stop: number): Promise<void> {
    const { mapping, geometry } = this.#parts;
    const { clusterSize } = geometry;
    for (let at = start; at < stop; at += clusterSize) {
      await this.#withSlice(at, (slice) => {
        mapping.resolve(slice, at, clusterSize);
        if (mapping.kind === Kind.INVALID) throw mapping.invalid(at);
        if (mapping.kind !== Kind.UNALLOCATED) this.#zeroEntry(slice, at, at + clusterSize, true);
      });
    }
  }

  async #locked(position: number, length: number, run: () => Promise<void>): Promise<void> {
    const { lock, geometry } = this.#parts;
    const { clusterSize } = geometry;
    const range = await lock.acquire(
      Math.floor(position / clusterSize),
      Math.floor((position + length - 1) / clusterSize),
    );
    try {
      await run();
    } finally {
      lock.release(range);
    }
  }

  /** Brings metadata to the file when much of it waits, so that memory and space stay bounded. */
  async #room(): Promise<void> {
    const { mapping, refcounts, sync } = this.#parts;
    await this.#parts.prepare();
    if (mapping.cache.crowded || refcounts.cache.crowded || sync.pendingFrees > 4096) {
      await sync.sync();
    }
  }

  async #write(position: number, data: DataOut): Promise<void> {
    const pending: Promise<unknown>[] = [];
    try {
      for (let at = 0; at < data.length; ) {
        const here = position + at;
        const piece = await this.#withSlice(here, (slice) =>
          this.#describe(slice, here, data.length - at),
        );
        const { host, length } = piece;
        if (piece.way === 'in place') {
          this.#checkPlace(host, length);
          const written = this.#parts.data.write(data.slice(at, at + length), host, here);
          if (written instanceof Promise) pending.push(written);
          at += length;
        } else if (piece.way === 'own place') {
          at += await this.#writeInto(here, data.slice(at, at + length), host);
        } else {
          at += await this.#writeNew(here, data.slice(at), piece.clusters);
        }
      }
    } finally {
      await allSettled(pending);
    }
  }

  /**
   * What `use` answers, called with the slice that maps `position`, in memory, of an L2 table that belongs
   * to the active disk alone; made when there is none. `use` must change the slice before it awaits.
   */
  async #withSlice<R>(position: number, use: (slice: Table) => R): Promise<R> {
    const { mapping, geometry } = this.#parts;
    const index = Math.floor(position / geometry.l2Coverage);
    for (;;) {
      if (mapping.tableIsOwn(index)) {
        const slice = mapping.lookup(position);
        if (!(slice instanceof Promise)) return use(slice as Table);
        // Once loaded it may be pushed out again before we come to run: asked for once more.
        await slice;
      } else {
        await this.#ownTable(index);
      }
    }
  }

  #ownTable(index: number): Promise<void> {
    let making = this.#making.get(index);
    if (making === undefined) {
      making = this.#makeTable(index).finally(() => {
        this.#making.delete(index);
      });
      this.#making.set(index, making);
    }
    return making;
  }

  /** A new L2 table, empty or a copy of a shared one, complete in the file before the L1 table names it. */
  async #makeTable(index: number): Promise<void> {
    const { file, geometry, mapping, refcounts, sync, reserve } = this.#parts;
    const { clusterSize } = geometry;
    const old = mapping.tableOffset(index);
    const ready = old === 0 ? reserve?.take(1) : undefined;
    const { offset } = ready ?? (await refcounts.allocate(1));
    refcounts.metadata.add(offset / clusterSize);
    mapping.cache.forget(offset, clusterSize);
    if (ready === undefined) {
      refcounts.use({ offset, count: 1 });
      const content = new Uint8Array(clusterSize);
      if (old !== 0) await file.read(content, old);
      await file.write(content, offset);
      mapping.dependOnFlush();
    }
    mapping.setTable(index, offset, true);
    if (old !== 0) sync.free(old / clusterSize);
  }

  /** Whether guest data may be written to a place that an entry names: only damaged images name others. */
  isDataPlace(host: number, length: number): boolean {
    const { geometry, refcounts } = this.#parts;
    if (geometry.dataFile) return true;
    const { clusterSize } = geometry;
    for (let at = host - (host % clusterSize); at < host + length; at += clusterSize) {
      if (at === 0 || refcounts.metadata.has(at / clusterSize)) return false;
    }
    return !refcounts.isFresh(host + length - 1);
  }

  #checkPlace(host: number, length: number): void {
    if (this.isDataPlace(host, length)) return;
    const problem = 'an entry maps a guest cluster to metadata, or behind the end of the file';
    throw this.#parts.mapping.corrupt('L2 table', host, problem);
  }

  /** How the piece at `position` is to be written. */
  #describe(slice: Table, position: number, length: number) {
    const { mapping, geometry } = this.#parts;
    mapping.resolve(slice, position, length);
    const { kind, copied, host } = mapping;
    const found = mapping.length;
    if (kind === Kind.INVALID) throw mapping.invalid(position);
    if (kind === Kind.DATA && copied) return { way: 'in place', host, length: found } as const;
    // A place that is not in use: its data reads as zeros, or comes from below.
    if (host >= 0 && copied) return { way: 'own place', host, length: found } as const;
    const first = Math.floor(position / geometry.clusterSize);
    const clusters = this.#countNew(slice, first, position + length);
    return { way: 'new place', host, length: found, clusters } as const;
  }

  /** Data for clusters that have no place of their own. @returns bytes of `data` that were taken */
  async #writeNew(position: number, data: DataOut, wanted: number): Promise<number> {
    const { geometry, refcounts } = this.#parts;
    const { clusterSize } = geometry;
    const first = Math.floor(position / clusterSize);
    if (this.#parts.compress && !geometry.dataFile && position % clusterSize === 0) {
      if (data.length >= clusterSize && (await this.#writeCompressed(first, data))) {
        return clusterSize;
      }
    }
    const ready = await this.#takeReady(first, wanted);
    const run =
      ready ??
      (geometry.dataFile
        ? { offset: first * clusterSize, count: wanted }
        : await refcounts.allocate(wanted));
    const fresh = ready !== undefined || this.#takeFresh(run);
    const end = Math.min(position + data.length, (first + run.count) * clusterSize);
    try {
      const [start, stop] = await this.#writePadded({
        position,
        data: data.slice(0, end - position),
        host: run.offset + (position - first * clusterSize),
        head: await this.#unit(first),
        tail: await this.#unit(first + run.count - 1),
        fresh,
      });
      await this.#setEntries(first, run, start, stop, ready === undefined);
    } catch (error) {
      await this.#giveBack(run);
      throw error;
    }
    return end - position;
  }

  /** Space in which zeros may become data in any order with the entries, for clusters that are all zeros now. */
  async #takeReady(first: number, wanted: number): Promise<ClusterRun | undefined> {
    const { reserve, reader, geometry } = this.#parts;
    const { clusterSize } = geometry;
    if (reserve === undefined || geometry.dataFile) return;
    if (await reader.isZero(first * clusterSize, wanted * clusterSize)) return reserve.take(wanted);
  }

  /** Clusters from `first` on, up to the one with the byte before `end`, that need a new place; in one slice. */
  #countNew(slice: Table, first: number, end: number): number {
    const { mapping, geometry } = this.#parts;
    const { clusterSize, sliceEntries } = geometry;
    const last = Math.min(
      Math.floor((end - 1) / clusterSize),
      (Math.floor(first / sliceEntries) + 1) * sliceEntries - 1,
    );
    let cluster = first + 1;
    for (; cluster <= last; cluster++) {
      mapping.resolve(slice, cluster * clusterSize, 1);
      if (mapping.host >= 0 && mapping.copied) break;
      if (mapping.kind === Kind.INVALID) break;
    }
    return cluster - first;
  }

  #takeFresh(run: ClusterRun): boolean {
    const { geometry, refcounts } = this.#parts;
    if (!geometry.dataFile) {
      const fresh = refcounts.isFresh(run.offset);
      refcounts.use(run);
      return fresh;
    }
    const fresh = run.offset >= this.#dataFreshFrom;
    const end = run.offset + run.count * geometry.clusterSize;
    this.#dataFreshFrom = Math.max(this.#dataFreshFrom, end);
    return fresh;
  }

  async #giveBack(run: ClusterRun): Promise<void> {
    const { geometry, sync } = this.#parts;
    if (geometry.dataFile) return;
    const first = run.offset / geometry.clusterSize;
    for (let c = first; c < first + run.count; c++) sync.free(c);
  }

  /** The unit in which a cluster without a place gets one: all of it where old data must come along. */
  async #unit(cluster: number): Promise<number> {
    const { geometry, mapping } = this.#parts;
    const { clusterSize, subclusterSize } = geometry;
    if (!geometry.extended) return clusterSize;
    return this.#withSlice(cluster * clusterSize, (slice) => {
      mapping.resolve(slice, cluster * clusterSize, 1);
      return mapping.host >= 0 || mapping.kind === Kind.COMPRESSED ? clusterSize : subclusterSize;
    });
  }

  /** Data for a cluster with a place that is not in use there: read as zeros, or not yet. */
  async #writeInto(position: number, data: DataOut, host: number): Promise<number> {
    const { geometry } = this.#parts;
    const { clusterSize, subclusterSize } = geometry;
    const cluster = Math.floor(position / clusterSize);
    const length = Math.min(data.length, (cluster + 1) * clusterSize - position);
    this.#checkPlace(host, length);
    const [start, stop] = await this.#writePadded({
      position,
      data: data.slice(0, length),
      host,
      head: subclusterSize,
      tail: subclusterSize,
      fresh: false,
    });
    await this.#setEntries(
      cluster,
      { offset: host - (position % clusterSize), count: 1 },
      start,
      stop,
      true,
    );
    return length;
  }

  /**
   * Writes data to `host`, and around it, up to the borders of the units of allocation, what the disk
   * shows there now. @returns the guest range that is complete at its new place
   */
  async #writePadded(write: {
    position: number;
    data: DataOut;
    host: number;
    head: number;
    tail: number;
    fresh: boolean;
  }): Promise<readonly [start: number, stop: number]> {
    const { position, data, host, head, tail, fresh } = write;
    const guest = this.#parts.data;
    const end = position + data.length;
    const start = Math.floor(position / head) * head;
    const stop = Math.ceil(end / tail) * tail;
    const move = host - position;
    // A place never written reads as zeros by itself, unless zeros are stored encrypted.
    const skips = async (from: number, to: number) =>
      from === to || (fresh && guest.plain && (await this.#parts.reader.isZero(from, to - from)));
    const pending: Promise<unknown>[] = [];
    const push = (written: unknown) => {
      if (written instanceof Promise) pending.push(written);
    };
    let from = position;
    let to = end;
    try {
      if (!(await skips(start, position))) {
        from = Math.min(end, start + head);
        const bytes = await this.#patched(start, Math.min(head, stop - start), position, data);
        push(guest.writeBytes(bytes, start + move, start));
      }
      const tailStart = Math.max(stop - tail, start);
      const tailDone = from !== position && start + head >= stop;
      if (!tailDone && !(await skips(end, stop))) {
        to = Math.max(from, tailStart);
        const bytes = await this.#patched(tailStart, stop - tailStart, position, data);
        push(guest.writeBytes(bytes, tailStart + move, tailStart));
      }
      if (from < to) {
        push(guest.write(data.slice(from - position, to - position), from + move, from));
      }
    } finally {
      await allSettled(pending);
    }
    return [start, stop];
  }

  /** What the disk shows in `[start, start + length)`, with `data` at `position` over it. */
  async #patched(
    start: number,
    length: number,
    position: number,
    data: DataOut,
  ): Promise<Uint8Array> {
    const bytes = await this.#parts.reader.readBytes(start, length);
    const from = Math.max(start, position);
    const to = Math.min(start + length, position + data.length);
    if (from < to) data.slice(from - position, to - position).copyTo(bytes, from - start);
    return bytes;
  }

  /**
   * Maps clusters from `first` on to `run`; `[start, stop)` of the guest's disk is complete there.
   * @param dependent what the entries refer to has to be durable before they are
   */
  #setEntries(
    first: number,
    run: ClusterRun,
    start: number,
    stop: number,
    dependent: boolean,
  ): Promise<void> {
    const { geometry, mapping } = this.#parts;
    return this.#withSlice(first * geometry.clusterSize, (slice) => {
      if (dependent) mapping.dependOnFlush();
      this.#setEntriesIn(slice, first, run, start, stop);
    });
  }

  #setEntriesIn(slice: Table, first: number, run: ClusterRun, start: number, stop: number): void {
    const { geometry, mapping } = this.#parts;
    const { clusterSize, subclusterSize, extended } = geometry;
    for (let i = 0; i < run.count; i++) {
      const cluster = first + i;
      const host = run.offset + i * clusterSize;
      const at = mapping.entryAt(cluster);
      this.#dropReferences(slice.view, at, host);
      putEntry(slice.view, at, host, true);
      if (extended) {
        const from = Math.max(0, start - cluster * clusterSize) / subclusterSize;
        const to = Math.min(clusterSize, stop - cluster * clusterSize) / subclusterSize;
        const mask = bitRange(from, to);
        slice.view.setUint32(at + 8, (slice.view.getUint32(at + 8) & ~mask) >>> 0);
        slice.view.setUint32(at + 12, (slice.view.getUint32(at + 12) | mask) >>> 0);
      }
      mapping.touch(slice, cluster);
    }
  }

  /** Gives up what the entry at byte `at` refers to, unless that is the cluster at `kept`. */
  #dropReferences(view: DataView, at: number, kept: number): void {
    const { geometry, sync, reader } = this.#parts;
    eachReference(view, at, geometry, (cluster, standard) => {
      if (cluster * geometry.clusterSize === kept) return;
      if (!standard) reader.forgetCompressed();
      if (this.#compressedAt !== undefined) {
        if (Math.floor(this.#compressedAt / geometry.clusterSize) === cluster) {
          this.#compressedAt = undefined;
        }
      }
      sync.free(cluster);
    });
  }

  /** Stores a whole cluster compressed, when that makes it smaller. */
  async #writeCompressed(cluster: number, data: DataOut): Promise<boolean> {
    const { geometry, codec, file, mapping, reader } = this.#parts;
    const { clusterSize } = geometry;
    const compressed = await codec.compress(data.slice(0, clusterSize).toBytes());
    if (compressed === undefined || compressed.length >= clusterSize) return false;
    const offset = await this.#placeCompressed(compressed.length);
    // Whole sectors: the last one's rest belongs to nobody.
    const padded = new Uint8Array(Math.ceil(compressed.length / 512) * 512);
    padded.set(compressed);
    await file.write(padded, offset);
    await this.#withSlice(cluster * clusterSize, (slice) => {
      const at = mapping.entryAt(cluster);
      this.#dropReferences(slice.view, at, -1);
      putCompressed(slice.view, at, { offset, length: compressed.length }, geometry);
      if (geometry.extended) slice.view.setBigUint64(at + 8, 0n);
      mapping.touch(slice, cluster);
      mapping.dependOnFlush();
    });
    reader.forgetCompressed();
    return true;
  }

  /** Room for compressed data, in whole sectors, with one reference to its cluster. */
  async #placeCompressed(length: number): Promise<number> {
    const { geometry, refcounts } = this.#parts;
    const { clusterSize, refcountBits } = geometry;
    const at = this.#compressedAt;
    const room = at === undefined ? 0 : clusterSize - (at % clusterSize);
    if (at !== undefined && length <= room && refcountBits > 1) {
      const cluster = Math.floor(at / clusterSize);
      this.#compressedAt = this.#afterCompressed(at, length);
      if ((await refcounts.get(cluster)) < Math.min(2 ** refcountBits - 1, 0xffff)) {
        await refcounts.add(cluster, 1);
        return at;
      }
    }
    const run = await refcounts.allocate(1);
    refcounts.use(run);
    this.#compressedAt = this.#afterCompressed(run.offset, length);
    return run.offset;
  }

  #afterCompressed(at: number, length: number): number | undefined {
    const next = at + Math.ceil(length / 512) * 512;
    return next % this.#parts.geometry.clusterSize === 0 ? undefined : next;
  }

  /** Zeros within one slice of an L2 table; the range is locked. */
  async #zero(position: number, length: number, mayUnmap: boolean): Promise<void> {
    const { geometry } = this.#parts;
    const { subclusterSize } = geometry;
    const end = position + length;
    const start = Math.ceil(position / subclusterSize) * subclusterSize;
    const stop = Math.floor(end / subclusterSize) * subclusterSize;
    if (start >= stop) return this.#writeZeroData(position, length);
    if (position < start) await this.#writeZeroData(position, start - position);
    await this.#zeroUnits(start, stop, mayUnmap);
    if (stop < end) await this.#writeZeroData(stop, end - stop);
  }

  async #writeZeroData(position: number, length: number): Promise<void> {
    if (!this.#parts.rawData && (await this.#parts.reader.isZero(position, length))) return;
    for (let at = 0; at < length; at += PIECE) {
      const piece = new MemoryDataOut(new Uint8Array(Math.min(PIECE, length - at)));
      await this.#write(position + at, piece);
    }
  }

  /** Zeros for whole units of allocation, cluster by cluster, by the mapping where the format can. */
  async #zeroUnits(start: number, stop: number, mayUnmap: boolean): Promise<void> {
    const { geometry, mapping, rawData, hasBacking, data } = this.#parts;
    const { clusterSize, version } = geometry;
    // What is to be right without metadata has to be zeros by itself.
    if (rawData) await data.file.writeZeroes(start, stop - start);
    const index = Math.floor(start / geometry.l2Coverage);
    if (mapping.tableOffset(index) === 0 && !hasBacking) return;
    for (let at = start; at < stop; ) {
      const next = Math.min(stop, (Math.floor(at / clusterSize) + 1) * clusterSize);
      const then = await this.#withSlice(at, (slice) => {
        mapping.resolve(slice, at, next - at);
        if (mapping.kind === Kind.INVALID) throw mapping.invalid(at);
        const asData =
          version === 2
            ? hasBacking || (!mayUnmap && mapping.kind !== Kind.UNALLOCATED)
            : next - at < clusterSize && !this.#canZeroPart();
        if (asData) return 'write';
        return this.#zeroEntry(slice, at, next, mayUnmap) ? 'discard' : 'done';
      });
      if (then === 'write') await this.#writeZeroData(at, next - at);
      else if (then === 'discard' && this.#parts.discard) await data.file.discard(at, next - at);
      at = next;
    }
  }

  /** Whether a part of the cluster that was just resolved can be marked in its subcluster bitmap. */
  #canZeroPart(): boolean {
    const { mapping } = this.#parts;
    return mapping.kind !== Kind.COMPRESSED && (mapping.host < 0 || mapping.copied);
  }

  /**
   * Changes the entry of one cluster, or the bits of some of its subclusters.
   * @returns whether its place in an external data file is not needed any more
   */
  #zeroEntry(slice: Table, start: number, stop: number, mayUnmap: boolean): boolean {
    const { geometry, mapping, rawData } = this.#parts;
    const { clusterSize, subclusterSize, extended, version, dataFile } = geometry;
    const { view } = slice;
    const cluster = Math.floor(start / clusterSize);
    const at = mapping.entryAt(cluster);
    const whole = stop - start === clusterSize;
    const { host, copied } = mapping;
    const place = host < 0 ? -1 : host - (start % clusterSize);
    const keeps = place >= 0 && copied && (!whole || !mayUnmap || rawData);
    if (whole && !keeps) {
      this.#dropReferences(view, at, -1);
      view.setUint32(at, 0);
      view.setUint32(at + 4, version === 3 && !extended ? 1 : 0);
    } else if (!extended) {
      view.setUint32(at + 4, (view.getUint32(at + 4) | 1) >>> 0);
    }
    if (extended) {
      const from = (start % clusterSize) / subclusterSize;
      const mask = bitRange(from, from + (stop - start) / subclusterSize);
      view.setUint32(at + 8, (view.getUint32(at + 8) | mask) >>> 0);
      view.setUint32(at + 12, (view.getUint32(at + 12) & ~mask) >>> 0);
    }
    mapping.touch(slice, cluster);
    if (rawData) mapping.dependOnFlush();
    return dataFile && whole && !keeps && place >= 0;
  }
}

/** Bits `from` to `to - 1` of 32. */
function bitRange(from: number, to: number): number {
  const upTo = (n: number) => (n >= 32 ? 0xffffffff : 2 ** n - 1);
  return (upTo(to) & ~upTo(from)) >>> 0;
}
