// SPDX-License-Identifier: Apache-2.0
/**
 * Persistent dirty bitmaps, kept right while the disk is written to.
 *
 * From the opening for writing on, every bitmap that must follow the disk (flag `auto`) is marked in use in
 * the image: whoever opens the image after a crash knows that it is not up to date. Bits are set in
 * memory; `store`, at the regular end, writes them and takes the marks away. A bitmap that can't be kept
 * (unknown extra data, larger than `MAX_BYTES`) stays marked, which the format calls inconsistent.
 * Bitmaps that are not `auto`, and all of them when the image says that they are outdated, are left alone.
 */
import { QcowError } from './errors.js';
import {
  type BitmapEntry,
  BitmapFlags,
  type BitmapsExtension,
  parseBitmapDirectory,
  parseBitmapsExtension,
} from './format/bitmap-directory.js';
import { entryOffset, putEntry } from './format/entries.js';
import { Autoclear, ExtensionType, extension, type Header, hasFeature } from './format/header.js';
import type { HostFile } from './host/host-file.js';
import type { QcowImage } from './image.js';

/** Memory for all bitmaps of an image. */
const MAX_BYTES = 256 * 1024 * 1024;

interface Stored {
  readonly entry: BitmapEntry;
  readonly granularity: number;
  table: Uint8Array;
  /** In memory, and following the disk; absent where the bitmap is left alone. */
  bits: Uint8Array | undefined;
}

/** The directory of an image's bitmaps, or undefined when it has none that count. */
export async function readBitmapDirectory(
  file: HostFile,
  header: Header,
): Promise<{ extension: BitmapsExtension; entries: BitmapEntry[] } | undefined> {
  const data = extension(header, ExtensionType.BITMAPS);
  if (data === undefined || !hasFeature(header.autoclear, Autoclear.BITMAPS)) return undefined;
  const { path } = file;
  const found = parseBitmapsExtension(data, path);
  const clusterSize = 2 ** header.clusterBits;
  const { directoryOffset: offset, directorySize } = found;
  if (offset % clusterSize !== 0 || offset + directorySize > file.size()) {
    throw new QcowError(
      'ERR_TCMU_QCOW_FORMAT',
      'the directory is on no cluster boundary, or behind the end of the file',
      { path, structure: 'bitmap directory', offset },
    );
  }
  const bytes = new Uint8Array(directorySize);
  await file.read(bytes, offset);
  return { extension: found, entries: parseBitmapDirectory(bytes, found, path) };
}

export class Bitmaps {
  readonly #image: QcowImage;
  readonly #stored: Stored[];
  readonly #directory: BitmapsExtension;

  private constructor(image: QcowImage, stored: Stored[], directory: BitmapsExtension) {
    this.#image = image;
    this.#stored = stored;
    this.#directory = directory;
    this.noteMetadata();
  }

  /** Loads what must follow the disk, and marks it in use. */
  static async open(image: QcowImage): Promise<Bitmaps | undefined> {
    const found = await readBitmapDirectory(image.file, image.header);
    if (found === undefined) return undefined;
    const { geometry, file } = image;
    const stored: Stored[] = [];
    let memory = 0;
    for (const entry of found.entries) {
      const granularity = 2 ** entry.granularityBits;
      const one: Stored = {
        entry,
        granularity,
        table: await loadTable(image, entry),
        bits: undefined,
      };
      stored.push(one);
      if ((entry.flags & BitmapFlags.AUTO) === 0) continue;
      if ((entry.flags & BitmapFlags.IN_USE) !== 0) continue;
      const bytes = bytesFor(image.header.size, granularity);
      memory += bytes;
      const usable =
        entry.type === 1 &&
        entry.granularityBits >= 9 &&
        (entry.extraLength === 0 || (entry.flags & BitmapFlags.EXTRA_COMPATIBLE) !== 0) &&
        entry.tableSize === Math.ceil(bytes / geometry.clusterSize) &&
        memory <= MAX_BYTES;
      if (usable) one.bits = await loadBits(image, one.table, bytes);
      else
        image.warn(`${file.path}: bitmap ${entry.name} can't be kept up to date, and is marked so`);
      entry.flags |= BitmapFlags.IN_USE;
      await writeEntry(file, found.extension, entry);
    }
    await file.flush();
    return new Bitmaps(image, stored, found.extension);
  }

  /** Tells the refcounts where nothing else may be written. */
  noteMetadata(): void {
    const { refcounts, geometry } = this.#image;
    const { clusterSize } = geometry;
    const note = (offset: number, length: number) => {
      const last = Math.ceil((offset + length) / clusterSize);
      for (let c = Math.floor(offset / clusterSize); c < last; c++) refcounts.metadata.add(c);
    };
    note(this.#directory.directoryOffset, this.#directory.directorySize);
    for (const { entry, table } of this.#stored) {
      note(entry.tableOffset, table.length);
      for (const offset of clustersOf(table)) note(offset, 1);
    }
  }

  /** Bytes `[position, position + length)` of the disk are about to change. */
  mark(position: number, length: number): void {
    for (const { granularity, bits } of this.#stored) {
      if (bits === undefined) continue;
      const last = Math.floor((position + length - 1) / granularity);
      for (let bit = Math.floor(position / granularity); bit <= last; bit++) {
        const at = Math.floor(bit / 8);
        if (at < bits.length) bits[at] = (bits[at] as number) | (1 << (bit % 8));
      }
    }
  }

  /**
   * Makes all bitmaps fit a disk of `size` bytes; what is added is clean. Runs exclusively. Until the
   * header is written again, with the new size, the image says that its bitmaps don't count.
   */
  async resize(size: number): Promise<void> {
    const { header, geometry, file, refcounts, sync } = this.#image;
    const { clusterSize } = geometry;
    const all = this.#stored.reduce((sum, { granularity }) => sum + bytesFor(size, granularity), 0);
    if (all > MAX_BYTES) {
      throw new QcowError('ERR_TCMU_QCOW_STATE', 'its bitmaps are too large to be resized', {
        path: file.path,
        operation: 'resize',
      });
    }
    header.autoclear &= ~Autoclear.BITMAPS;
    await this.#image.writeHeaderFields();
    await file.flush();
    for (const one of this.#stored) {
      const { entry, granularity } = one;
      const old =
        one.bits ?? (await loadBits(this.#image, one.table, (one.table.length * clusterSize) / 8));
      const bits = new Uint8Array(bytesFor(size, granularity));
      bits.set(old.subarray(0, bits.length));
      const tail = Math.ceil(size / granularity) % 8;
      const last = bits.length - 1;
      if (tail !== 0) bits[last] = (bits[last] as number) & (2 ** tail - 1);
      const entries = Math.ceil(bits.length / clusterSize);
      if (entries !== entry.tableSize) {
        for (const offset of clustersOf(one.table.subarray(entries * 8))) {
          sync.free(offset / clusterSize);
        }
        const tableEnd = Math.ceil((entry.tableOffset + one.table.length) / clusterSize);
        for (let c = entry.tableOffset / clusterSize; c < tableEnd; c++) sync.free(c);
        const table = new Uint8Array(entries * 8);
        table.set(one.table.subarray(0, table.length));
        const clusters = Math.ceil(table.length / clusterSize);
        const offset = await refcounts.allocateTable(clusters);
        refcounts.use({ offset, count: clusters });
        one.table = table;
        entry.tableOffset = offset;
        entry.tableSize = entries;
      }
      await this.#writeBits(one, bits);
      if (one.bits !== undefined) one.bits = bits;
    }
    await sync.settle();
    for (const { table, entry } of this.#stored) {
      await file.write(table, entry.tableOffset);
      await writeEntry(file, this.#directory, entry);
    }
    await file.flush();
    header.autoclear |= Autoclear.BITMAPS;
  }

  /** Writes the bitmaps and says that they are right. Runs exclusively, before the image is closed. */
  async store(): Promise<void> {
    const { file, sync } = this.#image;
    const tracked = this.#stored.filter(({ bits }) => bits !== undefined);
    for (const one of tracked) await this.#writeBits(one, one.bits as Uint8Array);
    await sync.settle();
    for (const { table, entry } of tracked) await file.write(table, entry.tableOffset);
    await file.flush();
    for (const { entry } of tracked) {
      entry.flags &= ~BitmapFlags.IN_USE;
      await writeEntry(file, this.#directory, entry);
    }
    await file.flush();
  }

  /** Writes the data of a bitmap; clusters that it needs more are in its table, which is not written yet. */
  async #writeBits({ table }: Stored, bits: Uint8Array): Promise<void> {
    const { file, geometry, refcounts } = this.#image;
    const { clusterSize } = geometry;
    const view = new DataView(table.buffer, table.byteOffset, table.byteLength);
    for (let i = 0; i * 8 < table.length; i++) {
      const part = new Uint8Array(clusterSize);
      part.set(bits.subarray(i * clusterSize, (i + 1) * clusterSize));
      let offset = entryOffset(view, i * 8);
      if (offset === 0) {
        putEntry(view, i * 8, 0, false);
        if (part.every((byte) => byte === 0)) continue;
        const run = await refcounts.allocate(1);
        refcounts.use(run);
        offset = run.offset;
        refcounts.metadata.add(offset / clusterSize);
        putEntry(view, i * 8, offset, false);
      }
      await file.write(part, offset);
    }
  }
}

/** Bytes of a bitmap for a disk of `size` bytes. */
function bytesFor(size: number, granularity: number): number {
  return Math.ceil(Math.ceil(size / granularity) / 8);
}

/** Where the clusters of a bitmap's data lie. */
function* clustersOf(table: Uint8Array): Iterable<number> {
  const view = new DataView(table.buffer, table.byteOffset, table.byteLength);
  for (let at = 0; at < table.length; at += 8) {
    const offset = entryOffset(view, at);
    if (offset !== 0) yield offset;
  }
}

async function loadTable(image: QcowImage, entry: BitmapEntry): Promise<Uint8Array> {
  const { file, geometry } = image;
  const { tableOffset: offset, tableSize } = entry;
  const fail = (problem: string) =>
    new QcowError('ERR_TCMU_QCOW_FORMAT', problem, {
      path: file.path,
      structure: `table of bitmap ${entry.name}`,
      offset,
    });
  if (offset % geometry.clusterSize !== 0 || offset + tableSize * 8 > file.size()) {
    throw fail('it is on no cluster boundary, or reaches behind the end of the file');
  }
  const table = new Uint8Array(tableSize * 8);
  await file.read(table, offset);
  const view = new DataView(table.buffer);
  for (let i = 0; i < tableSize; i++) {
    const target = entryOffset(view, i * 8);
    if (target % geometry.clusterSize !== 0 || target >= file.size()) {
      throw fail(`entry ${i} points to 0x${target.toString(16)}, which is no cluster of the file`);
    }
  }
  return table;
}

async function loadBits(image: QcowImage, table: Uint8Array, bytes: number): Promise<Uint8Array> {
  const { clusterSize } = image.geometry;
  const bits = new Uint8Array(bytes);
  const view = new DataView(table.buffer);
  for (let i = 0; i * clusterSize < bytes; i++) {
    const part = bits.subarray(i * clusterSize, (i + 1) * clusterSize);
    const offset = entryOffset(view, i * 8);
    if (offset !== 0) await image.file.read(part, offset);
    else part.fill((view.getUint32(i * 8 + 4) & 1) !== 0 ? 0xff : 0);
  }
  return bits;
}

/** Writes the fixed fields of a directory entry that change: where its table is, and its flags. */
async function writeEntry(file: HostFile, directory: BitmapsExtension, entry: BitmapEntry) {
  const bytes = Buffer.alloc(16);
  bytes.writeBigUInt64BE(BigInt(entry.tableOffset), 0);
  bytes.writeUInt32BE(entry.tableSize, 8);
  bytes.writeUInt32BE(entry.flags >>> 0, 12);
  await file.write(bytes, directory.directoryOffset + entry.at);
}
