// SPDX-License-Identifier: Apache-2.0
/**
 * Where each piece of the guest's disk lies: the active L1 table, in memory as a whole, and the L2
 * tables, cached in slices.
 *
 * `resolve` leaves its answer in fields instead of an object: it is called for every request, and what it
 * found is used before anything else can ask.
 */
import type { MaybePromise } from 'tcmu';
import { QcowError } from './errors.js';
import { COMPRESSED, COPIED, entryOffset, Kind, offsetOf, putEntry } from './format/entries.js';
import type { Geometry } from './format/geometry.js';
import type { HostFile } from './host/host-file.js';
import { type Table, TableCache } from './table-cache.js';

const SECTOR = 512;

export class Mapping {
  readonly cache: TableCache;
  readonly #file: HostFile;
  readonly #geometry: Geometry;
  #l1: Uint8Array;
  #view: DataView;
  #l1Offset: number;
  #dirtySectors = new Set<number>();
  #needsFlush = false;
  #slicesPerTable: number;
  #memo: Table | undefined;
  #memoIndex = -1;

  // What `resolve` found.
  kind: Kind = Kind.UNALLOCATED;
  /** Bytes from the position on that are of one kind, and next to each other in the host file. */
  length = 0;
  /** Host offset of the position; -1 when the cluster has none. */
  host = -1;
  /** The refcount is one: it may be written in place. */
  copied = false;
  /** The entry itself, of the first cluster. */
  high = 0;
  low = 0;

  constructor(
    file: HostFile,
    geometry: Geometry,
    l1: Uint8Array,
    l1Offset: number,
    cacheBytes: number,
  ) {
    this.#file = file;
    this.#geometry = geometry;
    this.cache = new TableCache(file, geometry.sliceSize, cacheBytes);
    this.#l1 = l1;
    this.#view = new DataView(l1.buffer, l1.byteOffset, l1.byteLength);
    this.#l1Offset = l1Offset;
    this.#slicesPerTable = geometry.clusterSize / geometry.sliceSize;
  }

  /** The active L1 table; not to be changed. */
  get l1(): Uint8Array {
    return this.#l1;
  }

  get l1Offset(): number {
    return this.#l1Offset;
  }

  get l1Size(): number {
    return this.#l1.length / 8;
  }

  /** Host offset of an L2 table, 0 when there is none. */
  tableOffset(index: number): number {
    return entryOffset(this.#view, index * 8);
  }

  /** Whether an L2 table is there and belongs to nobody else. */
  tableIsOwn(index: number): boolean {
    return (this.#view.getUint32(index * 8) & COPIED) !== 0 && this.tableOffset(index) !== 0;
  }

  setTable(index: number, offset: number, copied: boolean): void {
    putEntry(this.#view, index * 8, offset, copied);
    this.#dirtySectors.add(Math.floor((index * 8) / SECTOR));
    this.#memo = undefined;
    this.#memoIndex = -1;
  }

  /** An entry has been changed: tells who keeps places of guest data, with the cluster's position and size. */
  onChange: (position: number, length: number) => void = () => {};

  /** The entry of a guest cluster has been changed, in the slice that has it. */
  touch(slice: Table, cluster: number): void {
    const { clusterSize, l2EntrySize } = this.#geometry;
    const at = this.entryAt(cluster);
    this.cache.touch(slice, at, at + l2EntrySize);
    this.onChange(cluster * clusterSize, clusterSize);
  }

  /** The slice of the L2 table that maps `position`, or undefined where there is no L2 table. */
  lookup(position: number): MaybePromise<Table | undefined> {
    const index = Math.floor(position / this.#geometry.sliceCoverage);
    if (index === this.#memoIndex) {
      const memo = this.#memo as Table;
      if (memo.cached) {
        memo.used = true;
        return memo;
      }
    }
    const offset = this.sliceOffset(index);
    if (offset === 0) return undefined;
    const slice = this.cache.get(offset);
    if (!(slice instanceof Promise)) {
      this.#memo = slice;
      this.#memoIndex = index;
    }
    return slice;
  }

  /** As `lookup`, of what is in memory; false where that does not say it, or something is wrong. */
  peek(position: number): Table | undefined | false {
    const index = Math.floor(position / this.#geometry.sliceCoverage);
    if (index === this.#memoIndex && this.#memo?.cached) return this.#memo;
    const table = Math.floor(index / this.#slicesPerTable);
    const offset = table < this.l1Size ? this.tableOffset(table) : 0;
    if (offset === 0) return undefined;
    return (
      this.cache.peek(offset + (index % this.#slicesPerTable) * this.#geometry.sliceSize) ?? false
    );
  }

  /** Host offset of slice `index`, counted through all tables; 0 when its table is not there. */
  sliceOffset(index: number): number {
    const table = Math.floor(index / this.#slicesPerTable);
    const offset = table < this.l1Size ? this.tableOffset(table) : 0;
    if (offset === 0) return 0;
    if (offset % this.#geometry.clusterSize !== 0) {
      throw this.corrupt(
        'L1 table',
        this.#l1Offset + table * 8,
        `entry ${table} points to 0x${offset.toString(16)}, which is on no cluster boundary`,
      );
    }
    return offset + (index - table * this.#slicesPerTable) * this.#geometry.sliceSize;
  }

  /** Byte position, within its slice, of the entry that maps a guest cluster. */
  entryAt(cluster: number): number {
    const { sliceEntries, l2EntrySize } = this.#geometry;
    return (cluster & (sliceEntries - 1)) * l2EntrySize;
  }

  /** Describes the piece that begins at `position` and has up to `length` bytes, by the slice that maps it. */
  resolve(slice: Table | undefined, position: number, length: number): void {
    const { clusterSize, sliceCoverage } = this.#geometry;
    if (slice === undefined) {
      const end = (Math.floor(position / sliceCoverage) + 1) * sliceCoverage;
      this.kind = Kind.UNALLOCATED;
      this.host = -1;
      this.copied = false;
      this.high = 0;
      this.low = 0;
      this.length = Math.min(length, end - position);
      return;
    }
    const cluster = Math.floor(position / clusterSize);
    const within = position - cluster * clusterSize;
    const at = this.entryAt(cluster);
    if (this.#geometry.extended) this.#resolveExtended(slice, at, within, length, cluster);
    else this.#resolveStandard(slice, at, within, length, cluster);
  }

  #resolveStandard(
    slice: Table,
    at: number,
    within: number,
    length: number,
    cluster: number,
  ): void {
    const { clusterSize, sliceSize } = this.#geometry;
    const { view } = slice;
    this.#decode(view.getUint32(at), view.getUint32(at + 4), cluster);
    const { kind, copied, host } = this;
    let found = clusterSize - within;
    if (found < length && kind <= Kind.DATA) {
      for (let next = at + 8; found < length && next < sliceSize; next += 8) {
        cluster++;
        const high = view.getUint32(next);
        const low = view.getUint32(next + 4);
        if (this.#kindOf(high, low, cluster) !== kind) break;
        if (kind === Kind.DATA) {
          if (offsetOf(high, low) !== host + found + within) break;
          if (((high & COPIED) !== 0) !== copied) break;
        }
        found += clusterSize;
      }
    }
    this.length = Math.min(found, length);
    if (host >= 0) this.host = host + within;
  }

  #resolveExtended(
    slice: Table,
    at: number,
    within: number,
    length: number,
    cluster: number,
  ): void {
    const { clusterSize, subclusterSize, sliceSize } = this.#geometry;
    const { view } = slice;
    this.#decode(view.getUint32(at), view.getUint32(at + 4), cluster);
    if (this.kind === Kind.COMPRESSED || this.kind === Kind.INVALID) {
      this.length = Math.min(clusterSize - within, length);
      return;
    }
    const { host, copied, high, low } = this;
    let sub = Math.floor(within / subclusterSize);
    let found = (sub + 1) * subclusterSize - within;
    const kind = this.#subclusterKind(view, at, sub, host);
    if (kind !== Kind.INVALID) {
      let entry = at;
      while (found < length) {
        if (++sub === 32) {
          sub = 0;
          entry += 16;
          cluster++;
          if (entry >= sliceSize) break;
          const next = this.#decode(view.getUint32(entry), view.getUint32(entry + 4), cluster);
          if (next === Kind.COMPRESSED || next === Kind.INVALID) break;
          if (
            kind === Kind.DATA &&
            (this.host !== host + found + within || this.copied !== copied)
          ) {
            break;
          }
        }
        if (this.#subclusterKind(view, entry, sub, this.host) !== kind) break;
        found += subclusterSize;
      }
    }
    this.kind = kind;
    this.copied = copied;
    this.high = high;
    this.low = low;
    this.host = host >= 0 ? host + within : -1;
    this.length = Math.min(found, length);
  }

  #subclusterKind(view: DataView, at: number, sub: number, host: number): Kind {
    const zero = (view.getUint32(at + 8) >>> sub) & 1;
    const allocated = (view.getUint32(at + 12) >>> sub) & 1;
    if (allocated) return zero || host < 0 ? Kind.INVALID : Kind.DATA;
    return zero ? Kind.ZERO : Kind.UNALLOCATED;
  }

  /** Sets kind, host offset of the cluster, `copied`, and the raw entry. */
  #decode(high: number, low: number, cluster: number): Kind {
    this.high = high;
    this.low = low;
    this.kind = this.#kindOf(high, low, cluster);
    this.copied = (high & COPIED) !== 0;
    const offset = offsetOf(high, low);
    const there = offset !== 0 || (this.#geometry.dataFile && this.copied);
    this.host = this.kind !== Kind.COMPRESSED && there ? offset : -1;
    return this.kind;
  }

  #kindOf(high: number, low: number, cluster: number): Kind {
    const { dataFile, clusterSize, version, extended } = this.#geometry;
    if ((high & COMPRESSED) !== 0) {
      return dataFile || (high & COPIED) !== 0 ? Kind.INVALID : Kind.COMPRESSED;
    }
    const offset = offsetOf(high, low);
    if (offset % clusterSize !== 0) return Kind.INVALID;
    const there = offset !== 0 || (dataFile && (high & COPIED) !== 0);
    if (there && dataFile && offset !== cluster * clusterSize) return Kind.INVALID;
    if ((low & 1) !== 0) return version === 2 || extended ? Kind.INVALID : Kind.ZERO;
    return there ? Kind.DATA : Kind.UNALLOCATED;
  }

  /** The error for what `resolve` called INVALID. */
  invalid(position: number): QcowError {
    const { clusterSize } = this.#geometry;
    const slice = this.sliceOffset(Math.floor(position / this.#geometry.sliceCoverage));
    const at = slice + this.entryAt(Math.floor(position / clusterSize));
    const entry = ((BigInt(this.high) << 32n) | BigInt(this.low)).toString(16);
    return this.corrupt('L2 table entry', at, `0x${entry} can't be right`);
  }

  corrupt(structure: string, offset: number, problem: string): QcowError {
    return new QcowError('ERR_TCMU_QCOW_CORRUPT', `${problem}; check and repair the image`, {
      path: this.#file.path,
      structure,
      offset,
    });
  }

  get dirty(): boolean {
    return this.#dirtySectors.size > 0 || this.cache.dirtyCount > 0;
  }

  /**
   * A changed entry refers to what is not durable yet: refcounts, or data in place of other data. Changes
   * without such a word may reach the device in any order with all else.
   */
  dependOnFlush(): void {
    this.#needsFlush = true;
  }

  /** Whether a flush has to come before what is dirty now may be written. */
  get needsFlush(): boolean {
    return this.#needsFlush;
  }

  /** What is dirty is being taken: asks `needsFlush` for the last time. */
  takeNeedsFlush(): boolean {
    const needed = this.#needsFlush;
    this.#needsFlush = false;
    return needed;
  }

  /** Copies of the changed sectors of the L1 table, which count as clean from now on. */
  takeDirtyL1(): { position: number; bytes: Uint8Array }[] {
    const sectors = [...this.#dirtySectors].map((sector) => ({
      position: this.#l1Offset + sector * SECTOR,
      bytes: this.#l1.slice(sector * SECTOR, (sector + 1) * SECTOR),
    }));
    this.#dirtySectors.clear();
    return sectors;
  }

  restoreL1(sectors: readonly { position: number }[]): void {
    for (const { position } of sectors) {
      this.#dirtySectors.add((position - this.#l1Offset) / SECTOR);
    }
  }

  /** Takes over an L1 table that has been written elsewhere. */
  replace(l1: Uint8Array, l1Offset: number): void {
    this.cache.clear();
    this.#l1 = l1;
    this.#view = new DataView(l1.buffer, l1.byteOffset, l1.byteLength);
    this.#l1Offset = l1Offset;
    this.#dirtySectors.clear();
    this.#memo = undefined;
    this.#memoIndex = -1;
  }
}
