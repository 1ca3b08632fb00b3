// SPDX-License-Identifier: Apache-2.0
/**
 * Replaces an image's metadata as a whole: what snapshots and repairs need, where no order of changes in
 * place would be right at every moment.
 *
 * New tables are written behind everything that is in use: L2 tables whose "refcount is one" flags
 * change, the L1 table, the snapshot table, the refcount blocks that change, the refcount table. Nothing
 * refers to them until, after a flush, one write of the header's first sector switches to all of them
 * at once. A stop before leaves the old image, a stop after it the new one.
 */
import type { MaybePromise } from 'tcmu';
import type { ClusterCounts } from './cluster-counts.js';
import { QcowError } from './errors.js';
import { COMPRESSED, COPIED, eachReference, entryOffset, putEntry } from './format/entries.js';
import type { Geometry } from './format/geometry.js';
import { encodeFields, type Header } from './format/header.js';
import { encodeSnapshots, type Snapshot } from './format/snapshot-table.js';
import type { HostFile } from './host/host-file.js';
import { maxRefcount, readRefcount, writeRefcount } from './refcount-codec.js';

/** Refcounts as they are stored now. */
export interface StoredCounts {
  get(cluster: number): MaybePromise<number>;
  readonly blockCount: number;
  blockOffset(index: number): number;
}

export interface Restructuring {
  readonly file: HostFile;
  readonly geometry: Geometry;
  /** Changed, and written, at the end: l1, refcount table and snapshot fields by this function. */
  readonly header: Header;
  /** What the disk is to show: entries of an L1 table. Changed: flags and places of L2 tables. */
  readonly l1: Uint8Array;
  /** The L1 table in the image belongs to a snapshot from now on, or to nobody. */
  readonly oldL1: 'kept' | 'given up';
  readonly snapshots: readonly Snapshot[];
  /** Bytes that the snapshot table takes now. */
  readonly snapshotTableLength: number;
  /** References to clusters, more (or fewer) than stored. With nothing stored: all there will be. */
  readonly deltas: ClusterCounts;
  /** Absent: the refcounts in the image count for nothing, and are made anew. */
  readonly stored: StoredCounts | undefined;
}

export interface Restructured {
  l1: Uint8Array;
  refcountTable: Uint8Array;
  snapshotTableLength: number;
  /** Clusters that nothing refers to any more. */
  freed: number[];
}

/** @throws QcowError `ERR_TCMU_QCOW_STATE` when a refcount does not fit its width; the image is as before */
export async function restructure(work: Restructuring): Promise<Restructured> {
  const { file, geometry, header, deltas, stored, snapshots } = work;
  const { clusterSize } = geometry;
  let next = await firstUnused(work);
  const allocate = (count: number): number => {
    const first = next;
    next += count;
    for (let c = first; c < next; c++) deltas.add(c, 1);
    return first * clusterSize;
  };
  const writeTable = async (content: Uint8Array): Promise<number> => {
    const clusters = Math.max(1, Math.ceil(content.length / clusterSize));
    const offset = allocate(clusters);
    const padded = new Uint8Array(clusters * clusterSize);
    padded.set(content);
    await file.write(padded, offset);
    return offset;
  };

  await checkWidths(work);
  await setFlags(work, writeTable);
  const l1Offset = work.l1.length === 0 ? header.l1Offset : await writeTable(work.l1);
  if (stored !== undefined) {
    if (work.oldL1 === 'given up') {
      deltas.addRange(header.l1Offset, header.l1Size * 8, clusterSize, -1);
    }
    deltas.addRange(header.snapshotsOffset, work.snapshotTableLength, clusterSize, -1);
    const tableBytes = header.refcountTableClusters * clusterSize;
    deltas.addRange(header.refcountTableOffset, tableBytes, clusterSize, -1);
  }
  const snapshotBytes = encodeSnapshots(snapshots);
  const snapshotsOffset = snapshots.length === 0 ? 0 : await writeTable(snapshotBytes);

  const { blocks, tableOffset, tableClusters } = placeBlocks(work, allocate);
  const refcountTable = new Uint8Array(tableClusters * clusterSize);
  const tableView = new DataView(refcountTable.buffer);
  for (let i = 0; stored !== undefined && i < stored.blockCount; i++) {
    putEntry(tableView, i * 8, stored.blockOffset(i), false);
  }
  const freed: number[] = [];
  for (const [index, offset] of blocks) {
    await file.write(await newBlock(work, index, freed), offset);
    putEntry(tableView, index * 8, offset, false);
  }
  await file.write(refcountTable, tableOffset);
  await file.flush();

  const switched = {
    l1Offset,
    l1Size: work.l1.length / 8,
    refcountTableOffset: tableOffset,
    refcountTableClusters: tableClusters,
    snapshotsOffset,
    snapshotCount: snapshots.length,
  };
  await file.write(encodeFields({ ...header, ...switched }), 0);
  await file.flush();
  Object.assign(header, switched);
  return { l1: work.l1, refcountTable, snapshotTableLength: snapshotBytes.length, freed };
}

/** Bytes between the end of a file and the last cluster that is counted: a crash leaves no more. */
const MOST_BEHIND = 32 * 1024 * 1024;

/** The first cluster behind all that is in the file or counted. */
async function firstUnused({ file, geometry, deltas, stored }: Restructuring): Promise<number> {
  const { clusterSize, refcountsPerBlock, refcountBits } = geometry;
  const atLeast = Math.max(Math.ceil(file.size() / clusterSize), deltas.highest + 1);
  if (stored === undefined) return atLeast;
  for (let index = stored.blockCount - 1; index >= 0; index--) {
    const offset = stored.blockOffset(index);
    if (offset === 0 || (index + 1) * refcountsPerBlock <= atLeast) continue;
    const block = new Uint8Array(clusterSize);
    await file.read(block, offset);
    const view = new DataView(block.buffer);
    for (let i = refcountsPerBlock - 1; i >= 0; i--) {
      if (readRefcount(view, i, refcountBits) === 0) continue;
      const end = index * refcountsPerBlock + i + 1;
      if ((end - atLeast) * clusterSize > MOST_BEHIND) {
        throw new QcowError(
          'ERR_TCMU_QCOW_CORRUPT',
          `it counts cluster 0x${((end - 1) * clusterSize).toString(16)} as used, far behind the end of the file; repair leaks first`,
          { path: file.path, structure: 'refcount block', offset },
        );
      }
      return Math.max(atLeast, end);
    }
  }
  return atLeast;
}

async function finalCount({ stored, deltas }: Restructuring, cluster: number): Promise<number> {
  return ((await stored?.get(cluster)) ?? 0) + deltas.get(cluster);
}

/** Refuses before anything is written. */
async function checkWidths(work: Restructuring): Promise<void> {
  const { geometry, deltas, file } = work;
  const more: number[] = [];
  deltas.each((cluster, delta) => {
    if (delta > 0) more.push(cluster);
  });
  for (const cluster of more) {
    const count = await finalCount(work, cluster);
    if (count <= maxRefcount(geometry.refcountBits)) continue;
    throw new QcowError(
      'ERR_TCMU_QCOW_STATE',
      `${count} references do not fit into refcounts of ${geometry.refcountBits} bits; an image with wider refcounts can hold more snapshots`,
      {
        path: file.path,
        structure: 'refcount of cluster',
        offset: cluster * geometry.clusterSize,
      },
    );
  }
}

/** Makes the flags of the disk's L1 and L2 entries say what the refcounts will be. */
async function setFlags(
  work: Restructuring,
  writeTable: (content: Uint8Array) => Promise<number>,
): Promise<void> {
  const { file, geometry, l1, deltas } = work;
  const { clusterSize, l2EntrySize, dataFile } = geometry;
  const l1View = new DataView(l1.buffer, l1.byteOffset, l1.byteLength);
  const table = new Uint8Array(clusterSize);
  const view = new DataView(table.buffer);
  const made = new Set<number>();
  for (let again = true; again; ) {
    again = false;
    for (let i = 0; i < l1.length; i += 8) {
      const offset = entryOffset(l1View, i);
      if (offset === 0) continue;
      await file.read(table, offset);
      let changed = false;
      for (let at = 0; at < clusterSize && !dataFile; at += l2EntrySize) {
        const high = view.getUint32(at);
        const host = entryOffset(view, at);
        if ((high & COMPRESSED) !== 0 || host === 0) continue;
        checkCluster(file, geometry, host / clusterSize, offset + at);
        const copied = (await finalCount(work, host / clusterSize)) === 1;
        if (copied === ((high & COPIED) !== 0)) continue;
        view.setUint32(at, (copied ? high | COPIED : high & ~COPIED) >>> 0);
        changed = true;
      }
      if (!changed) {
        putEntry(l1View, i, offset, (await finalCount(work, offset / clusterSize)) === 1);
      } else if (made.has(offset)) {
        await file.write(table, offset);
      } else {
        deltas.add(offset / clusterSize, -1);
        const moved = await writeTable(table);
        made.add(moved);
        putEntry(l1View, i, moved, true);
        // A damaged image may map guest data to the old table, which has one reference less now. In one
        // that is not being repaired the worst of that is a copy more.
        again = work.stored === undefined;
      }
    }
  }
}

/** @throws QcowError `ERR_TCMU_QCOW_CORRUPT` for an L2 entry that points to no cluster of the file */
function checkCluster(
  file: HostFile,
  { clusterSize }: Geometry,
  cluster: number,
  offset: number,
): void {
  const host = cluster * clusterSize;
  if (Number.isInteger(cluster) && host < file.size()) return;
  throw new QcowError(
    'ERR_TCMU_QCOW_CORRUPT',
    `it points to 0x${host.toString(16)}, where the file of ${file.size()} bytes has no cluster`,
    { path: file.path, structure: 'L2 table entry', offset },
  );
}

/** Places for every refcount block that changes, and for the table; what that takes is counted, too. */
function placeBlocks(
  { geometry, deltas, stored, file }: Restructuring,
  allocate: (count: number) => number,
): { blocks: Map<number, number>; tableOffset: number; tableClusters: number } {
  const { clusterSize, refcountsPerBlock } = geometry;
  const blocks = new Map<number, number>();
  const place = (index: number) => {
    if (blocks.has(index)) return;
    blocks.set(index, allocate(1));
    const old = stored === undefined ? 0 : stored.blockOffset(index);
    if (old !== 0) deltas.add(old / clusterSize, -1);
  };
  const placeAll = () => {
    for (let before = -1; before !== blocks.size; ) {
      before = blocks.size;
      deltas.each((cluster) => place(Math.floor(cluster / refcountsPerBlock)));
    }
  };
  placeAll();
  const entriesPerCluster = clusterSize / 8;
  for (let spare = 0; ; spare = spare * 2 + 1) {
    const entries = Math.max(stored?.blockCount ?? 0, 1 + Math.max(...blocks.keys()));
    const tableClusters = Math.ceil((entries + spare) / entriesPerCluster);
    if (tableClusters * clusterSize > 8 * 1024 * 1024) {
      throw new QcowError('ERR_TCMU_QCOW_STATE', 'the refcount table would become too large', {
        path: file.path,
        structure: 'refcount table',
      });
    }
    const tableOffset = allocate(tableClusters);
    placeAll();
    if (Math.max(...blocks.keys()) < tableClusters * entriesPerCluster) {
      return { blocks, tableOffset, tableClusters };
    }
    // The table's own place needs more entries: another, larger one.
    deltas.addRange(tableOffset, tableClusters * clusterSize, clusterSize, -1);
  }
}

async function newBlock(
  { file, geometry, deltas, stored }: Restructuring,
  index: number,
  freed: number[],
): Promise<Uint8Array> {
  const { clusterSize, refcountsPerBlock, refcountBits } = geometry;
  const block = new Uint8Array(clusterSize);
  const old = stored === undefined ? 0 : stored.blockOffset(index);
  if (old !== 0) await file.read(block, old);
  const view = new DataView(block.buffer);
  for (let i = 0; i < refcountsPerBlock; i++) {
    const cluster = index * refcountsPerBlock + i;
    const delta = deltas.get(cluster);
    if (delta === 0) continue;
    const count = readRefcount(view, i, refcountBits) + delta;
    if (count < 0) {
      throw new QcowError('ERR_TCMU_QCOW_CORRUPT', 'a cluster in use has refcount 0', {
        path: file.path,
        structure: 'refcount of cluster',
        offset: cluster * clusterSize,
      });
    }
    if (count === 0 && delta < 0) freed.push(cluster);
    writeRefcount(view, i, refcountBits, count);
  }
  return block;
}

/**
 * Adds `delta` for every cluster that an L1 table's tree refers to, the L2 tables included.
 * @throws QcowError `ERR_TCMU_QCOW_CORRUPT` for a table that can't be
 */
export async function countTree(
  file: HostFile,
  geometry: Geometry,
  l1: Uint8Array,
  delta: number,
  deltas: ClusterCounts,
): Promise<void> {
  const { clusterSize, l2EntrySize } = geometry;
  const l1View = new DataView(l1.buffer, l1.byteOffset, l1.byteLength);
  const table = new Uint8Array(clusterSize);
  const view = new DataView(table.buffer);
  for (let i = 0; i < l1.length; i += 8) {
    const offset = entryOffset(l1View, i);
    if (offset === 0) continue;
    if (offset % clusterSize !== 0 || offset >= file.size()) {
      throw new QcowError('ERR_TCMU_QCOW_CORRUPT', 'it can not be there', {
        path: file.path,
        structure: 'L2 table',
        offset,
      });
    }
    deltas.add(offset / clusterSize, delta);
    await file.read(table, offset);
    for (let at = 0; at < clusterSize; at += l2EntrySize) {
      eachReference(view, at, geometry, (cluster) => {
        if (!geometry.dataFile) checkCluster(file, geometry, cluster, offset + at);
        deltas.add(cluster, delta);
      });
    }
  }
}
