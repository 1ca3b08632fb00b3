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

interface Tracked {
  readonly entry: BitmapEntry;
  readonly granularity: number;
  readonly table: Uint8Array;
  readonly bits: Uint8Array;
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
  readonly #tracked: Tracked[];
  readonly #directoryOffset: number;

  private constructor(image: QcowImage, tracked: Tracked[], directoryOffset: number) {
    this.#image = image;
    this.#tracked = tracked;
    this.#directoryOffset = directoryOffset;
  }

  /** Loads what must follow the disk, and marks it in use. */
  static async open(image: QcowImage): Promise<Bitmaps | undefined> {
    const found = await readBitmapDirectory(image.file, image.header);
    if (found === undefined) return undefined;
    const { refcounts, geometry, file } = image;
    const { clusterSize } = geometry;
    const note = (offset: number, length: number) => {
      const last = Math.ceil((offset + length) / clusterSize);
      for (let c = Math.floor(offset / clusterSize); c < last; c++) refcounts.metadata.add(c);
    };
    const { directoryOffset, directorySize } = found.extension;
    note(directoryOffset, directorySize);
    const tracked: Tracked[] = [];
    let memory = 0;
    for (const entry of found.entries) {
      const auto = (entry.flags & BitmapFlags.AUTO) !== 0;
      const stale = (entry.flags & BitmapFlags.IN_USE) !== 0;
      const table = await loadTable(image, entry);
      note(entry.tableOffset, entry.tableSize * 8);
      const view = new DataView(table.buffer);
      for (let at = 0; at < table.length; at += 8) {
        const offset = entryOffset(view, at);
        if (offset !== 0) note(offset, clusterSize);
      }
      if (!auto || stale) continue;
      const granularity = 2 ** entry.granularityBits;
      const bytes = Math.ceil(Math.ceil(image.header.size / granularity) / 8);
      memory += bytes;
      const usable =
        entry.type === 1 &&
        entry.granularityBits >= 9 &&
        (entry.extraLength === 0 || (entry.flags & BitmapFlags.EXTRA_COMPATIBLE) !== 0) &&
        entry.tableSize === Math.ceil(bytes / clusterSize) &&
        memory <= MAX_BYTES;
      if (usable) {
        tracked.push({ entry, granularity, table, bits: await loadBits(image, table, bytes) });
      } else {
        image.warn(`${file.path}: bitmap ${entry.name} can't be kept up to date, and is marked so`);
      }
      entry.flags |= BitmapFlags.IN_USE;
      await writeFlags(file, directoryOffset, entry);
    }
    await file.flush();
    return new Bitmaps(image, tracked, directoryOffset);
  }

  /** Bytes `[position, position + length)` of the disk are about to change. */
  mark(position: number, length: number): void {
    for (const { granularity, bits } of this.#tracked) {
      const last = Math.floor((position + length - 1) / granularity);
      for (let bit = Math.floor(position / granularity); bit <= last; bit++) {
        const at = Math.floor(bit / 8);
        if (at < bits.length) bits[at] = (bits[at] as number) | (1 << (bit % 8));
      }
    }
  }

  /** Writes the bitmaps and says that they are right. Runs exclusively, before the image is closed. */
  async store(): Promise<void> {
    const { file, sync, geometry, refcounts } = this.#image;
    const { clusterSize } = geometry;
    for (const { table, bits, entry } of this.#tracked) {
      const view = new DataView(table.buffer);
      for (let i = 0; i < entry.tableSize; i++) {
        const part = new Uint8Array(clusterSize);
        part.set(bits.subarray(i * clusterSize, (i + 1) * clusterSize));
        let offset = entryOffset(view, i * 8);
        if (offset === 0) {
          if (part.every((byte) => byte === 0)) {
            putEntry(view, i * 8, 0, false);
            continue;
          }
          const run = await refcounts.allocate(1);
          refcounts.use(run);
          offset = run.offset;
          refcounts.metadata.add(offset / clusterSize);
        }
        await file.write(part, offset);
        putEntry(view, i * 8, offset, false);
      }
    }
    await sync.settle();
    for (const { table, entry } of this.#tracked) await file.write(table, entry.tableOffset);
    await file.flush();
    for (const { entry } of this.#tracked) {
      entry.flags &= ~BitmapFlags.IN_USE;
      await writeFlags(file, this.#directoryOffset, entry);
    }
    await file.flush();
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

async function writeFlags(file: HostFile, directoryOffset: number, entry: BitmapEntry) {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(entry.flags >>> 0);
  await file.write(bytes, directoryOffset + entry.at + 12);
}
