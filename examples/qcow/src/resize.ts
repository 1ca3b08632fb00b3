// SPDX-License-Identifier: Apache-2.0
/**
 * Making the disk longer or shorter, while it is in use. What is added reads as zeros, whatever lay there
 * before a shortening, or lies in a longer backing file; what is cut is given back first (in version 2 over a
 * backing file, afterwards), and then the header says the new size: one write.
 */
import { ArgumentError } from 'tcmu';
import { QcowError } from './errors.js';
import { Autoclear, hasFeature, l1EntriesFor } from './format/header.js';
import type { QcowImage } from './image.js';

/** @throws ArgumentError for a size that can't be; QcowError `ERR_TCMU_QCOW_STATE`, `_READ_ONLY` */
export async function resizeImage(image: QcowImage, size: number): Promise<void> {
  const { header, path, geometry } = image;
  if (image.readOnly) {
    throw new QcowError('ERR_TCMU_QCOW_READ_ONLY', 'it is open for reading only', {
      path,
      operation: 'resize',
    });
  }
  if (!Number.isSafeInteger(size) || size <= 0 || size % 512 !== 0) {
    throw new ArgumentError(`tcmu: resize ${path}: ${size} bytes; give a multiple of 512`);
  }
  if (image.snapshots.some(({ diskSize }) => diskSize === undefined)) {
    throw new QcowError(
      'ERR_TCMU_QCOW_STATE',
      'it has snapshots that do not say how large the disk was; delete them first',
      { path, operation: 'resize' },
    );
  }
  if (l1EntriesFor(size, geometry.clusterBits, geometry.extended) * 8 > 32 * 1024 * 1024) {
    throw new ArgumentError(`tcmu: resize ${path}: ${size} bytes need larger clusters`);
  }
  await image.exclusively(async () => {
    const raw = hasFeature(header.autoclear, Autoclear.DATA_FILE_RAW);
    const before = header.size;
    if (size > before) {
      if (raw) await image.data.file.truncate(size);
      await growL1(image, size);
      await clearBehind(image, before, size);
    } else if (size < before && !showsBelow(image)) {
      await giveUp(image, size, before);
    }
    await image.sync.settle();
    await image.bitmaps?.resize(size);
    header.size = size;
    await image.writeHeaderFields();
    await image.file.flush();
    if (size >= before) return;
    if (showsBelow(image)) {
      await giveUp(image, size, before);
      await image.sync.settle();
    }
    if (raw) await image.data.file.truncate(size);
  });
}

/** Moves the L1 table to a place for more entries. */
async function growL1(image: QcowImage, size: number): Promise<void> {
  const { header, geometry, mapping, refcounts, file, sync } = image;
  const { clusterSize, clusterBits, extended } = geometry;
  const entries = l1EntriesFor(size, clusterBits, extended);
  if (entries <= header.l1Size) return;
  const l1 = new Uint8Array(Math.ceil(entries / 64) * 512);
  l1.set(mapping.l1.subarray(0, header.l1Size * 8));
  const clusters = Math.ceil((entries * 8) / clusterSize);
  const offset = await refcounts.allocateTable(clusters);
  refcounts.use({ offset, count: clusters });
  await sync.settle();
  const padded = new Uint8Array(clusters * clusterSize);
  padded.set(l1.subarray(0, entries * 8));
  await file.write(padded, offset);
  await file.flush();
  const old = { offset: header.l1Offset, bytes: header.l1Size * 8 };
  header.l1Offset = offset;
  header.l1Size = entries;
  await image.writeHeaderFields();
  await file.flush();
  mapping.replace(l1, offset);
  const end = Math.ceil((old.offset + old.bytes) / clusterSize);
  for (let c = Math.floor(old.offset / clusterSize); c < end; c++) sync.free(c);
}

/** Makes what will be added read as zeros: the rest of the last cluster, and what a layer below shows. */
async function clearBehind(image: QcowImage, before: number, size: number): Promise<void> {
  const { geometry, mapping, backing } = image;
  const { clusterSize, l2Coverage } = geometry;
  const shown = Math.max(Math.ceil(before / clusterSize) * clusterSize, backing?.size ?? 0);
  const end = Math.min(size, shown);
  if (end > before) await image.zeroExclusively(before, end - before, true);
  // Tables behind the end: saved machine state, or leftovers of other programs.
  for (let i = Math.floor(end / l2Coverage); i * l2Coverage < size; i++) {
    if (i >= mapping.l1Size || mapping.tableOffset(i) === 0) continue;
    const from = Math.max(end, i * l2Coverage);
    const to = Math.min(size, (i + 1) * l2Coverage);
    if (to > from) await image.zeroExclusively(from, to - from, true);
  }
}

/**
 * Clusters that are given up show what lies below: version 2 has no flag for zeros. They are given up when the disk
 * has become shorter; after a stop before that they lie behind its end, where growing it finds them.
 */
function showsBelow({ geometry, backing }: QcowImage): boolean {
  return geometry.version === 2 && backing !== undefined;
}

/** Gives up the clusters behind the new end. */
async function giveUp(image: QcowImage, size: number, before: number): Promise<void> {
  const { geometry, mapping } = image;
  const { clusterSize, l2Coverage } = geometry;
  const from = Math.ceil(size / clusterSize) * clusterSize;
  const to = Math.ceil(before / clusterSize) * clusterSize;
  for (let i = Math.floor(from / l2Coverage); i * l2Coverage < to; i++) {
    if (i >= mapping.l1Size || mapping.tableOffset(i) === 0) continue;
    const start = Math.max(from, i * l2Coverage);
    const stop = Math.min(to, (i + 1) * l2Coverage);
    if (stop <= start) continue;
    if (showsBelow(image)) await image.giveUpExclusively(start, stop);
    else await image.zeroExclusively(start, stop - start, true);
  }
}
