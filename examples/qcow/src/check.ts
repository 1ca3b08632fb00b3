// SPDX-License-Identifier: Apache-2.0
/**
 * Checking an image that nobody has open, and repairing it.
 *
 * Everything the image refers to is counted, and compared with its refcounts: a count that is too high
 * is a leak (lost space), one that is too low an error (a cluster may be given to two owners), as is a flag
 * "refcount is one" that is wrong, and an entry that can't be right. Each L2 table is read once, however
 * often it is referred to.
 *
 * A repair makes all refcounts and flags anew from what was counted, in one switch (`restructure`). What
 * an invalid entry stood for can't be found again: with such entries nothing is repaired.
 */
import { readBitmapDirectory } from './bitmaps.js';
import { ClusterCounts } from './cluster-counts.js';
import { QcowError } from './errors.js';
import {
  COMPRESSED,
  COPIED,
  compressedExtent,
  eachReference,
  entryOffset,
  offsetOf,
} from './format/entries.js';
import { type Geometry, geometryOf } from './format/geometry.js';
import {
  ExtensionType,
  encodeFields,
  extension,
  type Header,
  hasFeature,
  Incompatible,
} from './format/header.js';
import type { Snapshot } from './format/snapshot-table.js';
import type { HostFile } from './host/host-file.js';
import { loadSnapshots, readHeader } from './image.js';
import { MANY, readRefcount } from './refcount-codec.js';
import { restructure } from './restructure.js';

export interface CheckOptions {
  /** `leaks`: give lost space back when there are no errors; `all`: repair errors, too. Default: look only. */
  repair?: 'leaks' | 'all' | undefined;
}

export interface CheckResult {
  /** What is wrong now: after the repair, when there was one. */
  errors: number;
  /** Clusters counted and not used. */
  leaks: number;
  /** What the repair has put right. */
  repaired: { errors: number; leaks: number };
  /** Clusters of guest data: allocated, and those of them that are compressed. */
  allocatedClusters: number;
  compressedClusters: number;
  /** Clusters of the virtual disk. */
  totalClusters: number;
  /** Behind it nothing of the host file is used. */
  imageEnd: number;
  /** Marked as not closed, or as damaged. */
  dirty: boolean;
  corrupt: boolean;
  /** The first findings, for people. */
  messages: string[];
}

const MAX_MESSAGES = 100;

/** @throws QcowError when the header can't be read, or when a repair is asked for and not possible */
export async function checkFile(file: HostFile, options: CheckOptions = {}): Promise<CheckResult> {
  const first = await new Check(file, await readHeader(file)).run();
  const { repair } = options;
  const dirty = first.result.dirty || first.result.corrupt;
  const wanted =
    repair === 'all'
      ? first.result.errors > 0 || first.result.leaks > 0 || dirty
      : repair === 'leaks' && first.result.errors === 0 && first.result.leaks > 0;
  if (!wanted) return first.result;
  await first.repair();
  const { result } = await new Check(file, await readHeader(file)).run();
  result.repaired = {
    errors: first.result.errors - result.errors,
    leaks: first.result.leaks - result.leaks,
  };
  result.messages.unshift(...first.result.messages);
  return result;
}

interface TableUse {
  /** References from all L1 tables. */
  count: number;
  /** Part of what the disk shows. */
  active: boolean;
}

class Check {
  readonly #file: HostFile;
  readonly #header: Header;
  readonly #geometry: Geometry;
  readonly #size: number;
  /** Clusters of the file, the last one perhaps in part. */
  readonly #clusters: number;
  readonly #counts = new ClusterCounts();
  readonly #tables = new Map<number, TableUse>();
  #l1 = new Uint8Array(0);
  #snapshots: Snapshot[] = [];
  #snapshotTableLength = 0;
  #refcountTable = new Uint8Array(0);
  /** Refcount blocks that can be read, by index. */
  readonly #blocks = new Map<number, number>();
  /** Entries that no repair can put right. */
  #hopeless = 0;
  readonly result: CheckResult;

  constructor(file: HostFile, header: Header) {
    this.#file = file;
    this.#header = header;
    this.#geometry = geometryOf(header);
    this.#size = file.size();
    this.#clusters = Math.ceil(this.#size / this.#geometry.clusterSize);
    this.result = {
      errors: 0,
      leaks: 0,
      repaired: { errors: 0, leaks: 0 },
      allocatedClusters: 0,
      compressedClusters: 0,
      totalClusters: Math.ceil(header.size / this.#geometry.clusterSize),
      imageEnd: 0,
      dirty: hasFeature(header.incompatible, Incompatible.DIRTY),
      corrupt: hasFeature(header.incompatible, Incompatible.CORRUPT),
      messages: [],
    };
  }

  async run(): Promise<this> {
    const { clusterSize } = this.#geometry;
    this.#refer(0, clusterSize, 'header');
    await this.#countMappings();
    await this.#countExtensions();
    await this.#countRefcounts();
    await this.#compare();
    await this.#checkFlags();
    return this;
  }

  #error(structure: string, offset: number, problem: string, hopeless = false): void {
    this.result.errors++;
    if (hopeless) this.#hopeless++;
    this.#tell(`ERROR ${structure} at 0x${offset.toString(16)}: ${problem}`);
  }

  #tell(message: string): void {
    if (this.result.messages.length < MAX_MESSAGES) this.result.messages.push(message);
  }

  /** Counts a reference to a range of the file. @returns whether the range is there */
  #refer(offset: number, length: number, structure: string, times = 1): boolean {
    const { clusterSize } = this.#geometry;
    // The last cluster of the file need not be there as a whole.
    if (offset + length - this.#size >= clusterSize) {
      this.#error(structure, offset, `${length} bytes reach behind the end of the file`, true);
      return false;
    }
    this.#counts.addRange(offset, length, clusterSize, times);
    return true;
  }

  async #countMappings(): Promise<void> {
    const header = this.#header;
    const l1Bytes = header.l1Size * 8;
    this.#l1 = await this.#table(header.l1Offset, l1Bytes, 'L1 table');
    this.#noteTables(this.#l1, header.l1Offset, true);
    const { snapshots, length } = await loadSnapshots(this.#file, header);
    this.#snapshots = snapshots;
    this.#snapshotTableLength = length;
    if (length > 0) this.#refer(header.snapshotsOffset, length, 'snapshot table');
    const total = snapshots.reduce((sum, { l1Size }) => sum + l1Size * 8, 0);
    if (total > this.#size) {
      throw new QcowError(
        'ERR_TCMU_QCOW_FORMAT',
        'the L1 tables of its snapshots lie in each other',
        {
          path: this.#file.path,
          structure: 'snapshot table',
          offset: header.snapshotsOffset,
        },
      );
    }
    for (const { id, l1Offset, l1Size } of snapshots) {
      const l1 = await this.#table(l1Offset, l1Size * 8, `L1 table of snapshot ${id}`);
      this.#noteTables(l1, l1Offset, false);
    }
    for (const [offset, use] of this.#tables) await this.#countTable(offset, use);
  }

  /** A table's bytes; empty when it does not lie in the file. */
  async #table(
    offset: number,
    length: number,
    structure: string,
  ): Promise<Uint8Array<ArrayBuffer>> {
    if (length === 0 || !this.#refer(offset, length, structure)) return new Uint8Array(0);
    const bytes = new Uint8Array(length);
    await this.#file.read(bytes, offset);
    return bytes;
  }

  #noteTables(l1: Uint8Array, l1Offset: number, active: boolean): void {
    const { clusterSize } = this.#geometry;
    const view = new DataView(l1.buffer, l1.byteOffset, l1.byteLength);
    for (let at = 0; at < l1.length; at += 8) {
      const offset = entryOffset(view, at);
      if (offset === 0) continue;
      if (offset % clusterSize !== 0 || offset >= this.#size) {
        const problem = `entry ${at / 8} points to 0x${offset.toString(16)}, where no table can be`;
        this.#error('L1 table', l1Offset + at, problem, true);
        continue;
      }
      const use = this.#tables.get(offset);
      if (use === undefined) this.#tables.set(offset, { count: 1, active });
      else {
        if (active && use.active) {
          this.#error('L1 table', l1Offset + at, 'two entries point to one L2 table');
        }
        use.count++;
        use.active ||= active;
      }
    }
  }

  async #countTable(offset: number, { count, active }: TableUse): Promise<void> {
    const { clusterSize, l2EntrySize, version, extended, dataFile } = this.#geometry;
    this.#refer(offset, clusterSize, 'L2 table', count);
    const table = new Uint8Array(clusterSize);
    await this.#file.read(table, offset);
    const view = new DataView(table.buffer);
    for (let at = 0; at < clusterSize; at += l2EntrySize) {
      const high = view.getUint32(at);
      const low = view.getUint32(at + 4);
      if (high === 0 && low === 0) continue;
      const wrong = (problem: string) => this.#error('L2 table entry', offset + at, problem, true);
      if ((high & COMPRESSED) !== 0) {
        const extent = compressedExtent(high, low, this.#geometry);
        if (dataFile) wrong('compressed data in an image with a data file');
        else if (extent.offset + extent.length - 512 >= this.#size) {
          wrong('its compressed data lies behind the end of the file');
        } else {
          if ((high & COPIED) !== 0)
            this.#error(
              'L2 table entry',
              offset + at,
              'compressed, and yet marked as the only one',
              true,
            );
          eachReference(view, at, this.#geometry, (cluster) => this.#counts.add(cluster, count));
          if (active) {
            this.result.allocatedClusters++;
            this.result.compressedClusters++;
          }
        }
        continue;
      }
      const host = offsetOf(high, low);
      if ((low & 1) !== 0 && (version === 2 || extended)) {
        wrong('the flag for zeros can not be set here');
        continue;
      }
      if (extended && (view.getUint32(at + 8) & view.getUint32(at + 12)) !== 0) {
        wrong('a subcluster is allocated and reads as zeros');
        continue;
      }
      if (host === 0 && !(dataFile && (high & COPIED) !== 0)) {
        if (extended && view.getUint32(at + 12) !== 0) wrong('subclusters without a cluster');
        continue;
      }
      if (active && (low & 1) === 0) this.result.allocatedClusters++;
      if (dataFile) continue;
      if (host % clusterSize !== 0) wrong('it points to no cluster boundary');
      else this.#refer(host, clusterSize, 'guest cluster', count);
    }
  }

  async #countExtensions(): Promise<void> {
    const { clusterSize } = this.#geometry;
    const encryption = extension(this.#header, ExtensionType.ENCRYPTION);
    if (encryption !== undefined && encryption.length === 16) {
      const view = new DataView(encryption.buffer, encryption.byteOffset, 16);
      const offset = view.getBigUint64(0);
      const length = view.getBigUint64(8);
      if (offset + length > BigInt(this.#size)) {
        this.#error('encryption header', Number(offset), 'it reaches behind the end', true);
      } else this.#refer(Number(offset), Number(length), 'encryption header');
    }
    const bitmaps = await readBitmapDirectory(this.#file, this.#header);
    if (bitmaps === undefined) return;
    const { directoryOffset, directorySize } = bitmaps.extension;
    this.#refer(directoryOffset, directorySize, 'bitmap directory');
    for (const { name, tableOffset, tableSize } of bitmaps.entries) {
      const structure = `table of bitmap ${name}`;
      const table = await this.#table(tableOffset, tableSize * 8, structure);
      const view = new DataView(table.buffer);
      for (let at = 0; at < table.length; at += 8) {
        const offset = entryOffset(view, at);
        if (offset === 0) continue;
        if (offset % clusterSize !== 0) {
          this.#error(structure, tableOffset + at, 'it points to no cluster boundary', true);
        } else this.#refer(offset, clusterSize, `bitmap ${name}`);
      }
    }
  }

  async #countRefcounts(): Promise<void> {
    const { clusterSize } = this.#geometry;
    const { refcountTableOffset: offset, refcountTableClusters: clusters } = this.#header;
    const bytes = clusters * clusterSize;
    if (offset + bytes - this.#size >= clusterSize) {
      this.#error('refcount table', offset, 'it reaches behind the end of the file');
      return;
    }
    this.#refcountTable = await this.#table(offset, bytes, 'refcount table');
    const view = new DataView(this.#refcountTable.buffer);
    const seen = new Set<number>();
    for (let at = 0; at < bytes; at += 8) {
      const block = entryOffset(view, at);
      if (block === 0) continue;
      if (block % clusterSize !== 0 || block >= this.#size || seen.has(block)) {
        const problem = `entry ${at / 8} points to 0x${block.toString(16)}, where no block of its own can be`;
        this.#error('refcount table', offset + at, problem);
        continue;
      }
      seen.add(block);
      this.#blocks.set(at / 8, block);
      this.#refer(block, clusterSize, 'refcount block');
    }
  }

  async #compare(): Promise<void> {
    const { clusterSize, refcountsPerBlock, refcountBits } = this.#geometry;
    const highest = this.#counts.highest;
    this.result.imageEnd = Math.min((highest + 1) * clusterSize, this.#size);
    const missing = new Set<number>();
    this.#counts.each((cluster) => {
      const index = Math.floor(cluster / refcountsPerBlock);
      if (!this.#blocks.has(index)) missing.add(cluster);
    });
    for (const cluster of missing) this.#differ(cluster, 0, this.#counts.get(cluster));
    const block = new Uint8Array(clusterSize);
    const view = new DataView(block.buffer);
    for (const [index, offset] of this.#blocks) {
      await this.#file.read(block, offset);
      for (let i = 0; i < refcountsPerBlock; i++) {
        const cluster = index * refcountsPerBlock + i;
        const stored = readRefcount(view, i, refcountBits);
        const counted = this.#counts.get(cluster);
        if (stored !== counted) this.#differ(cluster, stored, counted);
      }
    }
  }

  #differ(cluster: number, stored: number, counted: number): void {
    if (stored < counted) {
      const offset = cluster * this.#geometry.clusterSize;
      this.#error('cluster', offset, `refcount ${stored}, referred to ${counted} times`);
    } else if (cluster < this.#clusters || counted > 0) {
      this.result.leaks++;
      const many = stored >= MANY ? 'very many' : stored;
      this.#tell(`Leaked cluster ${cluster}: refcount ${many}, referred to ${counted} times`);
    }
  }

  /** The refcount as stored. */
  async #stored(cluster: number): Promise<number> {
    const { refcountsPerBlock, refcountBits } = this.#geometry;
    const index = Math.floor(cluster / refcountsPerBlock);
    const block = this.#blocks.get(index);
    if (block === undefined) return 0;
    if (this.#flagBlock?.offset !== block) {
      const bytes = new Uint8Array(this.#geometry.clusterSize);
      await this.#file.read(bytes, block);
      this.#flagBlock = { offset: block, view: new DataView(bytes.buffer) };
    }
    return readRefcount(this.#flagBlock.view, cluster - index * refcountsPerBlock, refcountBits);
  }

  #flagBlock: { offset: number; view: DataView } | undefined;

  async #checkFlags(): Promise<void> {
    const { clusterSize, l2EntrySize, dataFile } = this.#geometry;
    const l1View = new DataView(this.#l1.buffer);
    const table = new Uint8Array(clusterSize);
    const view = new DataView(table.buffer);
    const check = async (high: number, host: number, structure: string, at: number) => {
      if (host % clusterSize !== 0 || host >= this.#size) return;
      const count = await this.#stored(host / clusterSize);
      if ((count === 1) === ((high & COPIED) !== 0)) return;
      this.#error(structure, at, `the flag for the only reference is wrong: refcount ${count}`);
    };
    for (let i = 0; i < this.#l1.length; i += 8) {
      const offset = entryOffset(l1View, i);
      if (offset === 0 || offset % clusterSize !== 0 || offset >= this.#size) continue;
      await check(l1View.getUint32(i), offset, 'L1 table entry', this.#header.l1Offset + i);
      if (dataFile) continue;
      await this.#file.read(table, offset);
      for (let at = 0; at < clusterSize; at += l2EntrySize) {
        const high = view.getUint32(at);
        const host = entryOffset(view, at);
        if (host === 0 || (high & COMPRESSED) !== 0) continue;
        await check(high, host, 'L2 table entry', offset + at);
      }
    }
  }

  /** Makes refcounts and flags anew. @throws QcowError `ERR_TCMU_QCOW_CORRUPT` when data would be lost */
  async repair(): Promise<void> {
    const file = this.#file;
    if (this.#hopeless > 0) {
      throw new QcowError(
        'ERR_TCMU_QCOW_CORRUPT',
        `${this.#hopeless} entries can't be right, and what they stood for can't be found: ${this.result.messages[0]}; copy what can be read into a new image`,
        { path: file.path, operation: 'repair', structure: 'mapping' },
      );
    }
    const header = this.#header;
    // The refcounts' own clusters are chosen anew, and so are the places of L1 and snapshot table.
    const counts = new ClusterCounts();
    this.#counts.each((cluster, count) => counts.add(cluster, count));
    const { clusterSize } = this.#geometry;
    const drop = (offset: number, length: number) =>
      counts.addRange(offset, length, clusterSize, -1);
    if (this.#refcountTable.length > 0) {
      drop(header.refcountTableOffset, this.#refcountTable.length);
    }
    for (const block of this.#blocks.values()) drop(block, clusterSize);
    drop(header.l1Offset, this.#l1.length);
    drop(header.snapshotsOffset, this.#snapshotTableLength);
    header.incompatible &= ~(Incompatible.DIRTY | Incompatible.CORRUPT);
    await restructure({
      file,
      geometry: this.#geometry,
      header,
      l1: this.#l1,
      oldL1: 'given up',
      snapshots: this.#snapshots,
      snapshotTableLength: this.#snapshotTableLength,
      deltas: counts,
      stored: undefined,
    });
    await file.write(encodeFields(header), 0);
    await file.flush();
  }
}
