// SPDX-License-Identifier: Apache-2.0
/**
 * The refcounts of an image's clusters, and the allocation of free ones.
 *
 * Changes are made in memory and reach the file by a metadata sync, always before anything that refers
 * to the clusters. New refcount blocks are known to the table in memory at once; the sync writes
 * blocks, then, after a flush, the table's entries (or, when the table has been moved to grow, the whole
 * new table, and then the header).
 *
 * A cluster becomes free only through `release`, which the sync calls when nothing in the file refers to
 * the cluster any more and no operation that might still use it is under way.
 */
import type { MaybePromise } from 'tcmu';
import { QcowError } from './errors.js';
import { entryOffset, putEntry } from './format/entries.js';
import type { Geometry } from './format/geometry.js';
import type { HostFile } from './host/host-file.js';
import { maxRefcount, readRefcount, writeRefcount } from './refcount-codec.js';
import { type DirtyRange, type Table, TableCache } from './table-cache.js';

/** Clusters next to each other in the host file. */
export interface ClusterRun {
  /** Byte offset of the first. */
  readonly offset: number;
  readonly count: number;
}

/** What a sync has to write for the refcounts. */
export interface RefcountChanges {
  readonly blocks: readonly DirtyRange[];
  /** Sectors of the table with new entries; whole when it has moved. */
  readonly table: readonly { position: number; bytes: Uint8Array }[];
  /** The table lies elsewhere than the header says. */
  readonly moved: boolean;
}

const SECTOR = 512;

/** Clusters by number, and who wants to know when there are more. */
class MetadataClusters extends Set<number> {
  onAdd: () => void = () => {};

  override add(cluster: number): this {
    this.onAdd();
    return super.add(cluster);
  }
}

export class Refcounts {
  readonly #file: HostFile;
  readonly #geometry: Geometry;
  readonly cache: TableCache;
  #table: Uint8Array;
  #view: DataView;
  #tableOffset: number;
  #dirtySectors = new Set<number>();
  #moved = false;
  /** Clusters that hold the table before it moved; freed by the sync that switches. */
  #oldTables: ClusterRun[] = [];
  /** No cluster below it is free. */
  #cursor = 0;
  /** Behind it the host file has never been written: it reads as zeros. */
  #freshFrom: number;
  /** Where metadata lies, by cluster; nothing else may be written there. */
  readonly metadata = new MetadataClusters();

  constructor(
    file: HostFile,
    geometry: Geometry,
    table: Uint8Array,
    tableOffset: number,
    cacheBytes: number,
  ) {
    this.#file = file;
    this.#geometry = geometry;
    this.cache = new TableCache(file, geometry.sliceSize, cacheBytes);
    this.#table = table;
    this.#view = new DataView(table.buffer, table.byteOffset, table.byteLength);
    this.#tableOffset = tableOffset;
    const { clusterSize } = geometry;
    this.#freshFrom =
      file.backing?.facts.kind === 'block'
        ? Number.POSITIVE_INFINITY
        : Math.ceil(file.size() / clusterSize) * clusterSize;
    this.#noteMetadata();
  }

  #noteMetadata(): void {
    this.#note(this.#tableOffset, this.#table.length);
    for (let i = 0; i < this.#table.length / 8; i++) {
      const block = this.blockOffset(i);
      if (block !== 0) this.#note(block, 1);
    }
  }

  #note(offset: number, length: number): void {
    const { clusterSize } = this.#geometry;
    const end = Math.ceil((offset + length) / clusterSize);
    for (let c = Math.floor(offset / clusterSize); c < end; c++) this.metadata.add(c);
  }

  get tableOffset(): number {
    return this.#tableOffset;
  }

  get tableClusters(): number {
    return this.#table.length / this.#geometry.clusterSize;
  }

  /** Entries of the refcount table. */
  get blockCount(): number {
    return this.#table.length / 8;
  }

  /** Where refcount block `index` lies; 0 when there is none. */
  blockOffset(index: number): number {
    // Unlike other entries this one has all of bits 9 to 63; no file reaches beyond bit 55.
    return index < this.blockCount ? entryOffset(this.#view, index * 8) : 0;
  }

  /** Whether a cluster at `offset` has never been written since it became part of the file. */
  isFresh(offset: number): boolean {
    return offset >= this.#freshFrom;
  }

  /** Everything below `end` may have been written. */
  #used(end: number): void {
    if (end > this.#freshFrom) this.#freshFrom = end;
  }

  /** The refcount of a cluster, by its number. */
  get(cluster: number): MaybePromise<number> {
    const { refcountsPerBlock, refcountBits } = this.#geometry;
    const index = Math.floor(cluster / refcountsPerBlock);
    const block = this.#checkedBlock(index);
    if (block === 0) return 0;
    const { refcountsPerSlice } = this.#geometry;
    const within = cluster - index * refcountsPerBlock;
    return this.cache.edit(this.#sliceOffset(block, within), (slice) =>
      readRefcount(slice.view, within % refcountsPerSlice, refcountBits),
    );
  }

  /** Adds `delta` to a cluster's refcount. @throws QcowError when that goes below 0 or over the width */
  add(cluster: number, delta: number): MaybePromise<number> {
    const { refcountsPerBlock, refcountsPerSlice } = this.#geometry;
    const index = Math.floor(cluster / refcountsPerBlock);
    const block = this.#checkedBlock(index);
    if (block === 0) throw this.#underflow(cluster);
    const within = cluster - index * refcountsPerBlock;
    return this.cache.edit(this.#sliceOffset(block, within), (slice) =>
      this.#addIn(slice, within % refcountsPerSlice, cluster, delta),
    );
  }

  #addIn(slice: Table, index: number, cluster: number, delta: number): number {
    const { refcountBits, clusterSize } = this.#geometry;
    const value = readRefcount(slice.view, index, refcountBits) + delta;
    if (value < 0) throw this.#underflow(cluster);
    if (value > maxRefcount(refcountBits)) {
      throw new QcowError(
        'ERR_TCMU_QCOW_STATE',
        `a refcount of ${value} does not fit into ${refcountBits} bits; an image with wider refcounts can hold more snapshots`,
        { path: this.#file.path, structure: 'refcount of cluster', offset: cluster * clusterSize },
      );
    }
    const [start, end] = writeRefcount(slice.view, index, refcountBits, value);
    this.cache.touch(slice, start, end);
    if (value === 0 && cluster < this.#cursor) this.#cursor = cluster;
    return value;
  }

  #underflow(cluster: number): QcowError {
    return new QcowError('ERR_TCMU_QCOW_CORRUPT', 'a cluster in use has refcount 0', {
      path: this.#file.path,
      structure: 'refcount of cluster',
      offset: cluster * this.#geometry.clusterSize,
    });
  }

  #checkedBlock(index: number): number {
    const block = this.blockOffset(index);
    if (block % this.#geometry.clusterSize !== 0) {
      throw new QcowError(
        'ERR_TCMU_QCOW_CORRUPT',
        `entry ${index} points to 0x${block.toString(16)}, which is on no cluster boundary`,
        {
          path: this.#file.path,
          structure: 'refcount table',
          offset: this.#tableOffset + index * 8,
        },
      );
    }
    return block;
  }

  #sliceOffset(block: number, within: number): number {
    const { refcountsPerSlice, sliceSize } = this.#geometry;
    return block + Math.floor(within / refcountsPerSlice) * sliceSize;
  }

  /** Up to `count` free clusters in a row, at least one, now with refcount 1. */
  allocate(count: number): MaybePromise<ClusterRun> {
    const { refcountsPerBlock } = this.#geometry;
    for (;;) {
      const cursor = this.#cursor;
      const index = Math.floor(cursor / refcountsPerBlock);
      const block = this.#checkedBlock(index);
      if (block === 0) return this.#allocateInNewBlock(index, count);
      const offset = this.#sliceOffset(block, cursor - index * refcountsPerBlock);
      // Another allocation may have moved the cursor while the slice was being loaded.
      const found = this.cache.edit(offset, (slice) =>
        this.#cursor === cursor ? this.#take(slice, count) : undefined,
      );
      if (found instanceof Promise) {
        return found.then((run) => run ?? this.allocate(count));
      }
      if (found !== undefined) return found;
    }
  }

  async #allocateInNewBlock(index: number, count: number): Promise<ClusterRun> {
    await this.#addBlock(index);
    return this.allocate(count);
  }

  /** Takes free clusters from the slice that the cursor stands in; moves the cursor on. */
  #take(slice: Table, count: number): ClusterRun | undefined {
    const { refcountsPerSlice, refcountBits, clusterSize } = this.#geometry;
    const { view } = slice;
    const from = this.#cursor % refcountsPerSlice;
    const base = this.#cursor - from;
    let first = from;
    while (first < refcountsPerSlice && readRefcount(view, first, refcountBits) !== 0) first++;
    let end = first;
    const limit = Math.min(refcountsPerSlice, first + count);
    while (end < limit && readRefcount(view, end, refcountBits) === 0) {
      const [start, stop] = writeRefcount(view, end, refcountBits, 1);
      this.cache.touch(slice, start, stop);
      end++;
    }
    this.#cursor = base + end;
    if (end === first) return undefined;
    return this.#taken(base + first, end - first, clusterSize);
  }

  #taken(cluster: number, count: number, clusterSize: number): ClusterRun {
    for (let c = cluster; c < cluster + count; c++) {
      if (this.metadata.has(c) || c === 0) {
        throw new QcowError('ERR_TCMU_QCOW_CORRUPT', 'metadata lies in a cluster counted as free', {
          path: this.#file.path,
          structure: 'refcount of cluster',
          offset: c * clusterSize,
        });
      }
    }
    return { offset: cluster * clusterSize, count };
  }

  #adding: Promise<void> | undefined;

  /** Makes refcount block `index`, in the first of the clusters that it counts: all of them are free. */
  async #addBlock(index: number): Promise<void> {
    while (this.#adding !== undefined) await this.#adding;
    if (this.blockOffset(index) !== 0) return;
    this.#adding = this.#makeBlock(index).finally(() => {
      this.#adding = undefined;
    });
    return this.#adding;
  }

  async #makeBlock(index: number): Promise<void> {
    if (index >= this.blockCount) return this.#grow(index + 1);
    const { refcountsPerBlock, clusterSize } = this.#geometry;
    const cluster = index * refcountsPerBlock;
    await this.#placeBlock(cluster);
    await this.#setOne(index, cluster);
    this.#setEntry(index, cluster * clusterSize);
  }

  /** Empty slices of a new block, on disk and in memory. */
  async #placeBlock(cluster: number): Promise<void> {
    const { clusterSize } = this.#geometry;
    this.#taken(cluster, 1, clusterSize);
    const offset = cluster * clusterSize;
    this.cache.forget(offset, clusterSize);
    // Written even where the file ends before: a block must not lie behind the end of the file.
    await this.#file.write(new Uint8Array(clusterSize), offset);
    this.#used(offset + clusterSize);
    this.metadata.add(cluster);
  }

  /** Sets the refcount of one cluster to 1 in block `index`, which the table may not know yet. */
  async #setOne(index: number, cluster: number, block = cluster * this.#geometry.clusterSize) {
    const { refcountsPerBlock, refcountsPerSlice, refcountBits } = this.#geometry;
    const within = cluster - index * refcountsPerBlock;
    await this.cache.edit(this.#sliceOffset(block, within), (slice) => {
      const at = within % refcountsPerSlice;
      const [start, end] = writeRefcount(slice.view, at, refcountBits, 1);
      this.cache.touch(slice, start, end);
    });
  }

  #setEntry(index: number, offset: number): void {
    putEntry(this.#view, index * 8, offset, false);
    this.#dirtySectors.add(Math.floor((index * 8) / SECTOR));
  }

  /**
   * Moves the table to a larger place, behind all that it counts now, with the blocks that count that
   * place: blocks first, then the table.
   */
  async #grow(blocks: number): Promise<void> {
    const { refcountsPerBlock, clusterSize } = this.#geometry;
    const old = this.blockCount;
    const first = old * refcountsPerBlock;
    const entriesPerCluster = clusterSize / 8;
    let tableClusters = 0;
    let newBlocks = 1;
    for (;;) {
      const wanted = Math.max(blocks, old + newBlocks, Math.ceil(old * 1.5));
      tableClusters = Math.ceil(wanted / entriesPerCluster);
      const needed = Math.ceil((newBlocks + tableClusters) / refcountsPerBlock);
      if (needed <= newBlocks) break;
      newBlocks = needed;
    }
    const table = new Uint8Array(tableClusters * clusterSize);
    table.set(this.#table);
    const tableCluster = first + newBlocks;
    for (let b = 0; b < newBlocks; b++) await this.#placeBlock(first + b);
    for (let c = first; c < tableCluster + tableClusters; c++) {
      const b = Math.floor((c - first) / refcountsPerBlock);
      await this.#setOne(old + b, c, (first + b) * clusterSize);
    }
    this.#oldTables.push({ offset: this.#tableOffset, count: this.tableClusters });
    this.#table = table;
    this.#view = new DataView(table.buffer);
    this.#tableOffset = tableCluster * clusterSize;
    for (let b = 0; b < newBlocks; b++) this.#setEntry(old + b, (first + b) * clusterSize);
    this.#note(this.#tableOffset, table.length);
    this.#used(this.#tableOffset + table.length);
    this.#moved = true;
  }

  /** Marks allocated clusters as written from now on; call it after `isFresh` has been asked. */
  use(run: ClusterRun): void {
    this.#used(run.offset + run.count * this.#geometry.clusterSize);
  }

  /** `count` free clusters in a row, for tables; waits until nobody else allocates. */
  async allocateTable(count: number): Promise<number> {
    const { clusterSize } = this.#geometry;
    let run = await this.allocate(count);
    const lowest = run.offset / clusterSize;
    while (run.count < count) {
      const next = await this.allocate(count - run.count);
      if (next.offset === run.offset + run.count * clusterSize) {
        run = { offset: run.offset, count: run.count + next.count };
      } else {
        await this.#giveBack(run);
        // What was given back is too small; go on behind it.
        this.#cursor = Math.max(this.#cursor, next.offset / clusterSize + next.count);
        run = next;
      }
    }
    if (run.offset / clusterSize > lowest) this.#cursor = lowest;
    this.#note(run.offset, count * clusterSize);
    return run.offset;
  }

  async #giveBack(run: ClusterRun): Promise<void> {
    const first = run.offset / this.#geometry.clusterSize;
    for (let c = first; c < first + run.count; c++) await this.add(c, -1);
  }

  get dirty(): boolean {
    return this.cache.dirtyCount > 0 || this.#dirtySectors.size > 0 || this.#moved;
  }

  /** For a sync: copies of what is to be written, and tables that are not used any more after it. */
  takeDirty(): { changes: RefcountChanges; oldTables: ClusterRun[] } {
    const table = this.#moved
      ? [{ position: this.#tableOffset, bytes: this.#table.slice() }]
      : [...this.#dirtySectors].map((sector) => ({
          position: this.#tableOffset + sector * SECTOR,
          bytes: this.#table.slice(sector * SECTOR, (sector + 1) * SECTOR),
        }));
    const changes = { blocks: this.cache.takeDirty(), table, moved: this.#moved };
    const oldTables = this.#oldTables;
    this.#dirtySectors = new Set();
    this.#moved = false;
    this.#oldTables = [];
    return { changes, oldTables };
  }

  written({ changes }: ReturnType<Refcounts['takeDirty']>): void {
    this.cache.written(changes.blocks);
  }

  restore({ changes, oldTables }: ReturnType<Refcounts['takeDirty']>): void {
    this.cache.restore(changes.blocks);
    for (const { position } of changes.table) {
      this.#dirtySectors.add((position - this.#tableOffset) / SECTOR);
    }
    this.#moved ||= changes.moved;
    this.#oldTables.unshift(...oldTables);
  }

  /** Takes over tables that a restructuring has written, and forgets the old ones. */
  replace(table: Uint8Array, tableOffset: number): void {
    this.cache.clear();
    this.metadata.clear();
    this.#table = table;
    this.#view = new DataView(table.buffer, table.byteOffset, table.byteLength);
    this.#tableOffset = tableOffset;
    this.#dirtySectors.clear();
    this.#moved = false;
    this.#oldTables = [];
    this.#cursor = 0;
    this.noteGrowth();
    this.#noteMetadata();
  }

  /** Others have written behind what is allocated: nothing that the file has now reads as zeros by itself. */
  noteGrowth(): void {
    const { clusterSize } = this.#geometry;
    this.#used(Math.ceil(this.#file.size() / clusterSize) * clusterSize);
  }
}
