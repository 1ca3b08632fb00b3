// SPDX-License-Identifier: Apache-2.0
/**
 * An open qcow2 image: the guest's disk over one host file (and, where the format says so, an external
 * data file and a layer below).
 *
 * Reads and in-place writes need one look at a cached L2 entry and one operation on the host file.
 * Everything that changes the mapping goes through `Writer`; operations on the whole image (snapshots,
 * resize, repair) run by `exclusively`: they wait for what is under way and hold up what comes.
 *
 * The image owns its host file, data file and backing layer from a successful `open` on.
 */
import type { BlockExtent, DataIn, DataOut, FileMap, MaybePromise } from 'tcmu';
import { Bitmaps } from './bitmaps.js';
import { ClusterCounts } from './cluster-counts.js';
import { ClusterLock } from './cluster-lock.js';
import type { ClusterCodec } from './compression/codec.js';
import type { DataCipher } from './encryption/cipher.js';
import { QcowError } from './errors.js';
import { ExpressPlaces } from './express-places.js';
import { entryOffset, Kind } from './format/entries.js';
import { type Geometry, geometryOf } from './format/geometry.js';
import {
  Autoclear,
  Compatible,
  ExtensionType,
  encodeFields,
  extension,
  type Header,
  hasFeature,
  headerBytes,
  Incompatible,
  parseHeader,
  setExtension,
  versionOf,
} from './format/header.js';
import { MAX_SNAPSHOT_TABLE, parseSnapshots, type Snapshot } from './format/snapshot-table.js';
import { GuestData } from './guest-data.js';
import type { HostFile } from './host/host-file.js';
import { InFlight } from './in-flight.js';
import type { Layer } from './layer.js';
import { Mapping } from './mapping.js';
import { MetadataSync } from './metadata-sync.js';
import { Reader } from './reader.js';
import { Refcounts } from './refcounts.js';
import { replaceHeader } from './replace-header.js';
import { Reserve } from './reserve.js';
import { countTree, type Restructured, type Restructuring, restructure } from './restructure.js';
import { Writer } from './writer.js';

export interface ImageOptions {
  /** What the image's unallocated clusters show; needed when the header names a backing file. */
  backing?: Layer | undefined;
  /** Where guest data lies when the header says that it is another file. */
  dataFile?: HostFile | undefined;
  /** Encryption of guest data, already unlocked. */
  cipher?: DataCipher | undefined;
  codec: ClusterCodec;
  /** Bytes of L2 tables kept in memory. Default 32 MiB. */
  l2CacheBytes?: number | undefined;
  /** Bytes of refcount blocks kept in memory. Default 4 MiB. */
  refcountCacheBytes?: number | undefined;
  /** Write whole new clusters compressed. Default false. */
  compress?: boolean | undefined;
  /** Give the space of freed clusters back to the file system. Default true. */
  discard?: boolean | undefined;
  /** When a change is acknowledged; see `OpenOptions`. */
  acknowledge?: 'written' | 'memory' | undefined;
  onWarning?: ((message: string) => void) | undefined;
}

const DEFAULT_L2_CACHE = 32 * 1024 * 1024;
const DEFAULT_REFCOUNT_CACHE = 4 * 1024 * 1024;

/** Reads and checks the header of a qcow2 image. @throws QcowError, FileError */
export async function readHeader(file: HostFile): Promise<Header> {
  const start = new Uint8Array(Math.min(512, file.size()));
  await file.read(start, 0);
  if (versionOf(start) === undefined || start.length < 72) {
    throw new QcowError('ERR_TCMU_QCOW_FORMAT', 'it is no qcow image: the magic is missing', {
      structure: 'header',
      offset: 0,
      path: file.path,
    });
  }
  const cluster = new Uint8Array(Math.min(headerBytes(start), file.size()));
  await file.read(cluster, 0);
  return parseHeader(cluster, file.path);
}

export class QcowImage implements Layer {
  readonly format = 'qcow2';
  readonly file: HostFile;
  readonly header: Header;
  readonly geometry: Geometry;
  readonly backing: Layer | undefined;
  readonly mapping: Mapping;
  readonly refcounts: Refcounts;
  readonly sync: MetadataSync;
  readonly inFlight = new InFlight();
  readonly reader: Reader;
  readonly warn: (message: string) => void;
  snapshots: Snapshot[];
  /** Bytes of the snapshot table in the file. */
  snapshotTableLength: number;
  bitmaps: Bitmaps | undefined;
  readonly #data: GuestData;
  readonly #writer: Writer;
  readonly #acknowledgeWritten: boolean;
  readonly #reserve: Reserve | undefined;
  /** Guest data may be written straight to the file. */
  readonly #direct: boolean;
  #gate: Promise<void> | undefined;
  #dirtyBit: boolean;
  #dirtying: Promise<void> | undefined;
  readonly #discard: boolean;
  #places: ExpressPlaces | undefined;
  #closed = false;

  private constructor(file: HostFile, header: Header, loaded: LoadedTables, options: ImageOptions) {
    this.file = file;
    this.header = header;
    this.backing = options.backing;
    this.warn = options.onWarning ?? (() => {});
    this.snapshots = loaded.snapshots;
    this.snapshotTableLength = loaded.snapshotTableLength;
    const geometry = geometryOf(header);
    this.geometry = geometry;
    this.#dirtyBit = hasFeature(header.incompatible, Incompatible.DIRTY);
    const dataFile = options.dataFile ?? file;
    this.#data = new GuestData(dataFile, options.cipher);
    this.#direct = options.cipher === undefined;
    this.#acknowledgeWritten = options.acknowledge !== 'memory';
    this.#discard = options.discard ?? true;
    this.mapping = new Mapping(
      file,
      geometry,
      loaded.l1,
      header.l1Offset,
      options.l2CacheBytes ?? DEFAULT_L2_CACHE,
    );
    this.refcounts = new Refcounts(
      file,
      geometry,
      loaded.refcountTable,
      header.refcountTableOffset,
      options.refcountCacheBytes ?? DEFAULT_REFCOUNT_CACHE,
    );
    this.noteMetadata();
    this.sync = new MetadataSync({
      file,
      dataFile,
      mapping: this.mapping,
      refcounts: this.refcounts,
      inFlight: this.inFlight,
      clusterSize: geometry.clusterSize,
      discard: options.discard ?? true,
      writeHeader: () => {
        header.refcountTableOffset = this.refcounts.tableOffset;
        header.refcountTableClusters = this.refcounts.tableClusters;
        return this.writeHeaderFields();
      },
      failed: () => this.#places?.limit(),
      lazy: () => this.#dirtyBit && hasFeature(header.compatible, Compatible.LAZY_REFCOUNTS),
    });
    // Encrypted zeros are no zeros, and a block device does not become longer.
    if (this.#acknowledgeWritten && this.#direct && file.backing?.facts.kind !== 'block') {
      const { refcounts, sync } = this;
      const { clusterSize } = geometry;
      this.#reserve = new Reserve({ file, clusterSize, refcounts, sync });
    }
    const parts = {
      file,
      data: this.#data,
      geometry,
      mapping: this.mapping,
      refcounts: this.refcounts,
      sync: this.sync,
      reserve: this.#reserve,
      backing: options.backing,
      codec: options.codec,
      compress: options.compress ?? false,
      rawData: hasFeature(header.autoclear, Autoclear.DATA_FILE_RAW),
      hasBacking: options.backing !== undefined,
      discard: options.discard ?? true,
      lock: new ClusterLock(),
      prepare: () => this.#markDirty(),
    };
    this.reader = new Reader(parts);
    this.#writer = new Writer({ ...parts, reader: this.reader });
  }

  /**
   * Opens an image whose surroundings (layers, data file, cipher) are there. With a writable host file it
   * is made ready for changes: what the format wants cleared or marked then, is.
   * @throws QcowError; FileError
   */
  static async open(file: HostFile, header: Header, options: ImageOptions): Promise<QcowImage> {
    const loaded = await load(file, header);
    const image = new QcowImage(file, header, loaded, options);
    if (!file.readOnly) await image.#beginWriting();
    return image;
  }

  get path(): string {
    return this.file.path;
  }

  /** Bytes of the disk, in whole sectors. */
  get size(): number {
    return Math.floor(this.header.size / 512) * 512;
  }

  get readOnly(): boolean {
    return this.file.readOnly;
  }

  /** See `ImageOptions.acknowledge`. */
  get acknowledgesWritten(): boolean {
    return this.#acknowledgeWritten;
  }

  get data(): GuestData {
    return this.#data;
  }

  /** Notes where the header's tables lie, so that nothing else is written there. */
  noteMetadata(): void {
    const { refcounts, header, geometry, mapping } = this;
    const { clusterSize } = geometry;
    const note = (offset: number, length: number) => {
      const last = Math.ceil((offset + length) / clusterSize);
      for (let c = Math.floor(offset / clusterSize); c < last; c++) refcounts.metadata.add(c);
    };
    note(0, clusterSize);
    note(mapping.l1Offset, mapping.l1.length);
    for (let i = 0; i < mapping.l1Size; i++) {
      const table = mapping.tableOffset(i);
      if (table !== 0) note(table, 1);
    }
    for (const { l1Offset, l1Size } of this.snapshots) note(l1Offset, l1Size * 8);
    if (header.snapshotCount > 0) note(header.snapshotsOffset, this.snapshotTableLength);
    const encryption = extension(header, ExtensionType.ENCRYPTION);
    if (encryption?.length === 16) {
      const view = new DataView(encryption.buffer, encryption.byteOffset, 16);
      note(Number(view.getBigUint64(0)), Number(view.getBigUint64(8)));
    }
  }

  /**
   * Where guest data lies, kept right from now on; undefined where it does not lie in files as it is. For the one device
   * that shows this image.
   */
  fileMap(): FileMap | undefined {
    if (!this.#direct || this.#data.file.backing === undefined) return undefined;
    this.#places ??= new ExpressPlaces(this, (host, length) =>
      this.#writer.isDataPlace(host, length),
    );
    return this.#places.map;
  }

  mapInto(map: FileMap, position: number, length: number): void {
    this.reader.mapInto(map, position, length, () => false);
  }

  read(position: number, data: DataIn): MaybePromise<unknown> {
    if (this.#gate !== undefined) return this.#gate.then(() => this.read(position, data));
    const read = this.inFlight.track(this.reader.read(position, data));
    this.#places?.learn(position, data.length);
    return read;
  }

  write(position: number, data: DataOut): MaybePromise<unknown> {
    if (this.#gate !== undefined) return this.#gate.then(() => this.write(position, data));
    if (this.sync.failure !== undefined) throw this.sync.failure;
    this.bitmaps?.mark(position, data.length);
    const { mapping } = this;
    if (this.#direct) {
      const slice = mapping.lookup(position);
      if (!(slice instanceof Promise)) {
        mapping.resolve(slice, position, data.length);
        const { host } = mapping;
        const inPlace =
          mapping.kind === Kind.DATA && mapping.copied && mapping.length === data.length;
        if (inPlace && this.#writer.isDataPlace(host, data.length)) {
          const written = this.inFlight.track(this.#data.write(data, host, position));
          this.#places?.learn(position, data.length);
          return this.#acknowledged(written);
        }
      }
    }
    const written = this.#guarded(this.#writer.write(position, data));
    this.#places?.learn(position, data.length);
    return this.#acknowledged(this.inFlight.track(written));
  }

  writeZeroes(position: number, length: number, mayUnmap: boolean): MaybePromise<unknown> {
    if (this.#gate !== undefined) {
      return this.#gate.then(() => this.writeZeroes(position, length, mayUnmap));
    }
    if (this.sync.failure !== undefined) throw this.sync.failure;
    this.bitmaps?.mark(position, length);
    // The last cluster may be longer than the disk: it is given up as a whole.
    const { clusterSize } = this.geometry;
    const end = position + length;
    const whole = end === this.size ? Math.ceil(end / clusterSize) * clusterSize : end;
    const written = this.#guarded(this.#writer.writeZeroes(position, whole - position, mayUnmap));
    return this.#acknowledged(this.inFlight.track(written));
  }

  /** What has been acknowledged outlives this process, also when it is killed: the initiator does. */
  #acknowledged(change: MaybePromise<unknown>): MaybePromise<unknown> {
    if (!this.#acknowledgeWritten) return change;
    return change instanceof Promise ? change.then(() => this.sync.written()) : this.sync.written();
  }

  /** Extents of what the disk shows, layers below included. */
  status(position: number, length: number): MaybePromise<readonly BlockExtent[]> {
    if (this.#gate !== undefined) return this.#gate.then(() => this.status(position, length));
    return this.inFlight.track(this.reader.status(position, length));
  }

  /** Makes every change that settled before this call durable. */
  flush(): MaybePromise<unknown> {
    if (this.#gate !== undefined) return this.#gate.then(() => this.flush());
    return this.sync.sync();
  }

  /**
   * Runs an operation on the whole image: nothing else is under way meanwhile, nothing is dirty, and
   * what comes waits.
   */
  async exclusively<T>(run: () => Promise<T>): Promise<T> {
    while (this.#gate !== undefined) await this.#gate;
    let open: () => void = () => {};
    this.#gate = new Promise((resolve) => {
      open = () => {
        this.#gate = undefined;
        this.#places?.limit();
        resolve();
      };
    });
    this.#places?.map.clear();
    try {
      await this.inFlight.drained();
      if (!this.readOnly) {
        await this.#reserve?.drain();
        await this.sync.settle();
      }
      return await run();
    } finally {
      this.#reserve?.resume();
      open();
    }
  }

  /** Replaces the metadata by one switch, and goes on with the new; runs exclusively. */
  async replaceMetadata(
    change: Pick<Restructuring, 'l1' | 'oldL1' | 'snapshots' | 'deltas'>,
  ): Promise<void> {
    const { file, geometry, header, refcounts, snapshotTableLength } = this;
    let done: Restructured;
    try {
      done = await restructure({
        ...change,
        file,
        geometry,
        header,
        snapshotTableLength,
        stored: refcounts,
      });
    } catch (error) {
      // What it has written already lies behind the clusters in use.
      refcounts.noteGrowth();
      throw error;
    }
    await this.#takeOver(done, [...change.snapshots]);
  }

  async #takeOver(done: Restructured, snapshots: Snapshot[]): Promise<void> {
    const { header, geometry } = this;
    const { clusterSize } = geometry;
    const l1 = new Uint8Array(Math.ceil(done.l1.length / 512) * 512);
    l1.set(done.l1);
    this.snapshots = snapshots;
    this.snapshotTableLength = done.snapshotTableLength;
    this.mapping.replace(l1, header.l1Offset);
    this.refcounts.replace(done.refcountTable, header.refcountTableOffset);
    this.noteMetadata();
    this.bitmaps?.noteMetadata();
    this.reader.forgetCompressed();
    this.#writer.forget();
    if (!this.#discard) return;
    for (let i = 0; i < done.freed.length; ) {
      const first = done.freed[i] as number;
      let count = 1;
      while (done.freed[i + count] === first + count) count++;
      await this.file.discard(first * clusterSize, count * clusterSize);
      i += count;
    }
  }

  /** Zeroes while running exclusively. */
  zeroExclusively(position: number, length: number, mayUnmap: boolean): Promise<void> {
    return this.#writer.writeZeroes(position, length, mayUnmap);
  }

  /** Makes whole clusters behind the disk's end unallocated, while running exclusively. */
  giveUpExclusively(start: number, stop: number): Promise<void> {
    return this.#writer.giveUp(start, stop);
  }

  /** Damage found while writing ends writing, and is noted in the image. */
  async #guarded(operation: Promise<void>): Promise<void> {
    try {
      await operation;
    } catch (error) {
      if (error instanceof QcowError && error.code === 'ERR_TCMU_QCOW_CORRUPT') {
        await this.#markCorrupt(error);
      }
      throw error;
    }
  }

  async #markCorrupt(error: QcowError): Promise<void> {
    if (this.sync.failure !== undefined) return;
    this.sync.fail(error);
    this.warn(`${error.message}; it is not written to any more`);
    if (this.geometry.version < 3) return;
    this.header.incompatible |= Incompatible.CORRUPT;
    await this.writeHeaderFields();
    await this.file.flush();
  }

  /** With lazy refcounts: the dirty bit, before the first change that leaves refcounts behind. */
  #markDirty(): Promise<void> | undefined {
    const { header } = this;
    if (this.#dirtyBit || !hasFeature(header.compatible, Compatible.LAZY_REFCOUNTS)) return;
    this.#dirtying ??= (async () => {
      header.incompatible |= Incompatible.DIRTY;
      await this.writeHeaderFields();
      await this.file.flush();
      this.#dirtyBit = true;
      this.#dirtying = undefined;
    })();
    return this.#dirtying;
  }

  /** Refcounts are right again: the dirty bit goes. */
  async clearDirty(): Promise<void> {
    if (!hasFeature(this.header.incompatible, Incompatible.DIRTY)) return;
    this.header.incompatible &= ~Incompatible.DIRTY;
    await this.writeHeaderFields();
    await this.file.flush();
    this.#dirtyBit = false;
  }

  /** The header's fixed fields: one write, smaller than a sector. */
  async writeHeaderFields(): Promise<void> {
    await this.file.write(encodeFields(this.header), 0);
  }

  /**
   * Makes the image name another backing file, or none. Runs exclusively.
   * @throws QcowError `ERR_TCMU_QCOW_STATE` when the name does not fit; FileError
   */
  async setBacking(name: string | undefined, format: string | undefined): Promise<void> {
    const { header, file } = this;
    const next = { ...header, backingFile: name, extensions: [...header.extensions] };
    const formatBytes = format === undefined ? undefined : Buffer.from(format);
    setExtension(next, ExtensionType.BACKING_FORMAT, formatBytes);
    await replaceHeader(file, header, next);
    Object.assign(header, next);
  }

  /** The bitmaps don't fit the disk any more: the image says, from its next header on, that they don't count. */
  giveUpBitmaps(): void {
    this.header.autoclear &= ~Autoclear.BITMAPS;
    this.bitmaps = undefined;
  }

  /** Gives up everything the disk holds: it shows what its backing file shows. Runs exclusively. */
  async empty(): Promise<void> {
    const { file, geometry, header, mapping } = this;
    const deltas = new ClusterCounts();
    await countTree(file, geometry, mapping.l1.slice(0, header.l1Size * 8), -1, deltas);
    const l1 = new Uint8Array(header.l1Size * 8);
    await this.replaceMetadata({ l1, oldL1: 'given up', snapshots: this.snapshots, deltas });
  }

  async #beginWriting(): Promise<void> {
    const { header, file } = this;
    if (hasFeature(header.incompatible, Incompatible.CORRUPT)) {
      throw new QcowError(
        'ERR_TCMU_QCOW_CORRUPT',
        'it is marked as damaged: repair it, or open it read-only',
        { path: file.path, structure: 'header field incompatible_features', offset: 72 },
      );
    }
    const known = Autoclear.BITMAPS | Autoclear.DATA_FILE_RAW;
    if ((header.autoclear & ~known) !== 0n) {
      header.autoclear &= known;
      await this.writeHeaderFields();
      await file.flush();
    }
    if (extension(header, ExtensionType.BITMAPS) !== undefined) {
      this.bitmaps = await Bitmaps.open(this);
    }
  }

  /**
   * Finishes what is under way, makes all durable, and closes the files below. Idempotent.
   * @throws QcowError the failure after which nothing was written any more, FileError: what was acknowledged
   *   last may be lost; the files are closed all the same
   */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    try {
      if (!this.readOnly && this.sync.failure === undefined) {
        await this.exclusively(async () => {
          await this.bitmaps?.store();
          await this.sync.settle();
          await this.clearDirty();
          await this.#reserve?.cut();
        });
      } else {
        await this.inFlight.drained();
        if (this.sync.failure !== undefined) throw this.sync.failure;
      }
    } finally {
      if (this.#data.file !== this.file) await this.#data.file.close();
      await this.file.close();
      await this.backing?.close();
    }
  }
}

interface LoadedTables {
  l1: Uint8Array;
  refcountTable: Uint8Array;
  snapshots: Snapshot[];
  snapshotTableLength: number;
}

/** Loads the tables that stay in memory, and checks that every table the image needs lies inside the file. */
async function load(file: HostFile, header: Header): Promise<LoadedTables> {
  const { path } = file;
  const clusterSize = 2 ** header.clusterBits;
  const size = file.size();
  const inside = (structure: string, offset: number, length: number) => {
    if (offset + length > Math.ceil(size / clusterSize) * clusterSize) {
      throw new QcowError(
        'ERR_TCMU_QCOW_FORMAT',
        `its ${length} bytes reach behind the end of the file (${size} bytes)`,
        { path, structure, offset },
      );
    }
  };
  const tableAt = async (structure: string, offset: number, length: number, stored: number) => {
    inside(structure, offset, stored);
    const table = new Uint8Array(length);
    await file.read(table.subarray(0, stored), offset);
    const view = new DataView(table.buffer);
    for (let at = 0; at < stored; at += 8) {
      const target = entryOffset(view, at);
      if (target === 0) continue;
      const fault =
        target % clusterSize !== 0
          ? 'on no cluster boundary'
          : target >= size
            ? 'behind the end of the file'
            : undefined;
      if (fault === undefined) continue;
      throw new QcowError(
        'ERR_TCMU_QCOW_FORMAT',
        `entry ${at / 8} points to 0x${target.toString(16)}, ${fault}`,
        { path, structure, offset: offset + at },
      );
    }
    return table;
  };
  const l1Bytes = header.l1Size * 8;
  // Whole sectors in memory, since changes are written by sectors; the table's clusters have room.
  const l1 = await tableAt('L1 table', header.l1Offset, Math.ceil(l1Bytes / 512) * 512, l1Bytes);
  const refcountBytes = header.refcountTableClusters * clusterSize;
  const refcountTable = await tableAt(
    'refcount table',
    header.refcountTableOffset,
    refcountBytes,
    refcountBytes,
  );
  const { snapshots, length: snapshotTableLength } = await loadSnapshots(file, header);
  for (const { l1Offset, l1Size, id } of snapshots) {
    inside(`L1 table of snapshot ${id}`, l1Offset, l1Size * 8);
  }
  return { l1, refcountTable, snapshots, snapshotTableLength };
}

/** @throws QcowError `ERR_TCMU_QCOW_FORMAT` */
export async function loadSnapshots(
  file: HostFile,
  header: Header,
): Promise<{ snapshots: Snapshot[]; length: number }> {
  const { snapshotCount: count, snapshotsOffset: offset } = header;
  if (count === 0) return { snapshots: [], length: 0 };
  const where = { path: file.path, offset, clusterSize: 2 ** header.clusterBits };
  const room = Math.min(MAX_SNAPSHOT_TABLE, file.size() - offset);
  // Most tables are short; a longer one is read again as a whole.
  for (let length = 64 * 1024; ; length *= 16) {
    const bytes = new Uint8Array(Math.max(0, Math.min(length, room)));
    await file.read(bytes, offset);
    const found = parseSnapshots(bytes, count, where);
    if (found !== undefined) return found;
    if (length >= room) {
      throw new QcowError('ERR_TCMU_QCOW_FORMAT', 'the table does not end', {
        path: file.path,
        structure: 'snapshot table',
        offset,
      });
    }
  }
}
