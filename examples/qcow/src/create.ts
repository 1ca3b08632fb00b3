// SPDX-License-Identifier: Apache-2.0
/** Making a new image. */
import { ArgumentError } from 'tcmu';
import { pathFrom } from './allowed-path.js';
import { createLuks, type LuksOptions } from './encryption/luks.js';
import { geometryOf } from './format/geometry.js';
import {
  Autoclear,
  Compatible,
  ExtensionType,
  encodeHeader,
  featureNames,
  type Header,
  Incompatible,
  l1EntriesFor,
  setExtension,
} from './format/header.js';
import { DiskFile } from './host/disk-file.js';
import type { HostFile } from './host/host-file.js';
import { type OpenOptions, openLayer } from './open.js';
import { writeRefcount } from './refcount-codec.js';

export interface CreateOptions {
  /** Bytes of the disk: a multiple of 512. Default: what the backing file has. */
  size?: number | undefined;
  /** 2 or 3 (default). */
  version?: 2 | 3 | undefined;
  /** Bytes: a power of two from 512 to 2 MiB. Default 65536. */
  clusterSize?: number | undefined;
  /** 1, 2, 4, 8, 16 (default), 32 or 64. */
  refcountBits?: number | undefined;
  /** 32 subclusters a cluster, for clusters of 16 KiB and more. Default false. */
  extendedL2?: boolean | undefined;
  /** Of compressed clusters. Default `zlib`. */
  compressionType?: 'zlib' | 'zstd' | undefined;
  /** Postpone refcounts, and repair after a crash. Default false. */
  lazyRefcounts?: boolean | undefined;
  /** As it is to stand in the image: relative names start from the image's folder. */
  backingFile?: string | undefined;
  /** Needed with `backingFile`: `raw`, `qcow2` or `qcow`. */
  backingFormat?: string | undefined;
  /** Name of the file for guest data, as it is to stand in the image. Created when missing. */
  dataFile?: string | undefined;
  /** The data file is to be right without the image's metadata. Default false. */
  dataFileRaw?: boolean | undefined;
  encryption?: ({ passphrase: string | Uint8Array } & LuksOptions) | undefined;
  /** Replace an image that is there. Default false. */
  overwrite?: boolean | undefined;
  allowedDirectory?: string | undefined;
  openFile?: OpenOptions['openFile'];
}

/**
 * @throws ArgumentError for options that don't go together; QcowError; FileError, EEXIST when there is
 *   such a file and `overwrite` is not given
 */
export async function createImage(path: string, options: CreateOptions = {}): Promise<void> {
  const header = await headerFor(path, options);
  const { openFile } = options;
  const open = async (name: string): Promise<HostFile> =>
    openFile === undefined
      ? DiskFile.open(name, { create: true, exclusive: !options.overwrite })
      : openFile(name, { readOnly: false });
  const file = await open(path);
  try {
    if (file.backing !== undefined) file.backing.lockImage(true);
    if (file.size() > 0) await file.truncate(0);
    await writeNew(file, header, options);
    if (options.dataFile !== undefined) await makeDataFile(path, options, header.size);
  } finally {
    await file.close();
  }
}

async function headerFor(path: string, options: CreateOptions): Promise<Header> {
  const {
    version = 3,
    clusterSize = 65536,
    refcountBits = 16,
    extendedL2 = false,
    compressionType = 'zlib',
    lazyRefcounts = false,
    backingFile,
    dataFile,
    dataFileRaw = false,
    encryption,
  } = options;
  const refuse = (problem: string) => new ArgumentError(`tcmu: create ${path}: ${problem}`);
  const clusterBits = Math.log2(clusterSize);
  if (!Number.isInteger(clusterBits) || clusterBits < 9 || clusterBits > 21) {
    throw refuse(`clusters of ${clusterSize} bytes; take a power of two from 512 to 2097152`);
  }
  const refcountOrder = Math.log2(refcountBits);
  if (!Number.isInteger(refcountOrder) || refcountOrder < 0 || refcountOrder > 6) {
    throw refuse(`refcounts of ${refcountBits} bits; take 1, 2, 4, 8, 16, 32 or 64`);
  }
  const only3 = [
    refcountBits !== 16 && 'refcounts of other than 16 bits',
    extendedL2 && 'extended L2 entries',
    compressionType === 'zstd' && 'zstd',
    lazyRefcounts && 'lazy refcounts',
    dataFile !== undefined && 'data files',
  ].filter(Boolean);
  if (version === 2 && only3.length > 0) throw refuse(`version 2 has no ${only3.join(', no ')}`);
  if (extendedL2 && clusterBits < 14) {
    throw refuse('extended L2 entries need clusters of 16384 bytes or more');
  }
  if (dataFileRaw && dataFile === undefined) throw refuse('a raw data file needs a name');
  if (dataFileRaw && backingFile !== undefined) {
    throw refuse('a raw data file and a backing file do not go together');
  }
  if (backingFile !== undefined && options.backingFormat === undefined) {
    throw refuse('say the format of the backing file: guessing it is not safe');
  }
  const size = options.size ?? (await backingSize(path, options));
  if (size === undefined) throw refuse('how large is the disk to be? Give its size');
  if (!Number.isSafeInteger(size) || size < 0 || size % 512 !== 0) {
    throw refuse(`${size} bytes; give a multiple of 512`);
  }
  const l1Size = Math.max(1, l1EntriesFor(size, clusterBits, extendedL2));
  if (l1Size * 8 > 32 * 1024 * 1024) {
    throw refuse(`${size} bytes need larger clusters than ${clusterSize} bytes`);
  }
  const header: Header = {
    version,
    clusterBits,
    size,
    cryptMethod: encryption === undefined ? 0 : 2,
    l1Size,
    l1Offset: 0,
    refcountTableOffset: 0,
    refcountTableClusters: 0,
    snapshotCount: 0,
    snapshotsOffset: 0,
    incompatible:
      (dataFile === undefined ? 0n : Incompatible.DATA_FILE) |
      (compressionType === 'zstd' ? Incompatible.COMPRESSION : 0n) |
      (extendedL2 ? Incompatible.EXTENDED_L2 : 0n),
    compatible: lazyRefcounts ? Compatible.LAZY_REFCOUNTS : 0n,
    autoclear: dataFileRaw ? Autoclear.DATA_FILE_RAW : 0n,
    refcountOrder,
    headerLength: version === 2 ? 72 : 112,
    compressionType: compressionType === 'zstd' ? 1 : 0,
    unknownFields: new Uint8Array(0),
    extensions: [],
    backingFile,
    backingOffset: 0,
  };
  if (options.backingFormat !== undefined && backingFile !== undefined) {
    setExtension(header, ExtensionType.BACKING_FORMAT, Buffer.from(options.backingFormat));
  }
  if (dataFile !== undefined) setExtension(header, ExtensionType.DATA_FILE, Buffer.from(dataFile));
  if (encryption !== undefined) {
    // Its place is known later; its length decides what else fits.
    setExtension(header, ExtensionType.ENCRYPTION, new Uint8Array(16));
  }
  if (version === 3) addFeatureNames(header);
  encodeHeader(header, path);
  return header;
}

/** The table of feature names is a courtesy: it is left out where it does not fit. */
function addFeatureNames(header: Header): void {
  const names = featureNames();
  const used = header.extensions.reduce((sum, { data }) => sum + 16 + data.length, 0);
  const name = Buffer.byteLength(header.backingFile ?? '');
  if (header.headerLength + used + names.length + name + 32 <= 2 ** header.clusterBits) {
    setExtension(header, ExtensionType.FEATURE_NAMES, names);
  }
}

async function backingSize(path: string, options: CreateOptions): Promise<number | undefined> {
  if (options.backingFile === undefined) return undefined;
  const { backingFormat, allowedDirectory, openFile } = options;
  const layer = await openLayer(pathFrom(path, options.backingFile), backingFormat, {
    allowedDirectory,
    openFile,
  });
  const { size } = layer;
  await layer.close();
  return Math.ceil(size / 512) * 512;
}

/** Header, refcounts, an empty L1 table and the encryption header, the header last. */
async function writeNew(file: HostFile, header: Header, options: CreateOptions): Promise<void> {
  const { clusterSize, refcountsPerBlock, refcountBits } = geometryOf(header);
  const luks =
    options.encryption === undefined
      ? undefined
      : (await createLuks(options.encryption.passphrase, options.encryption)).header;
  const clustersOf = (bytes: number) => Math.ceil(bytes / clusterSize);
  const l1Clusters = clustersOf(header.l1Size * 8);
  const luksClusters = clustersOf(luks?.length ?? 0);
  // The refcounts count themselves: more blocks and a longer table until they suffice.
  let blocks = 1;
  let tableClusters = 1;
  let total = 0;
  for (;;) {
    total = 1 + tableClusters + blocks + l1Clusters + luksClusters;
    const neededBlocks = Math.ceil(total / refcountsPerBlock);
    const neededTable = clustersOf(neededBlocks * 8);
    if (neededBlocks <= blocks && neededTable <= tableClusters) break;
    blocks = Math.max(blocks, neededBlocks);
    tableClusters = Math.max(tableClusters, neededTable);
  }
  header.refcountTableOffset = clusterSize;
  header.refcountTableClusters = tableClusters;
  const firstBlock = 1 + tableClusters;
  const firstL1 = firstBlock + blocks;
  const firstLuks = firstL1 + l1Clusters;
  header.l1Offset = firstL1 * clusterSize;
  const table = Buffer.alloc(tableClusters * clusterSize);
  for (let b = 0; b < blocks; b++) {
    table.writeBigUInt64BE(BigInt((firstBlock + b) * clusterSize), b * 8);
    const block = new Uint8Array(clusterSize);
    const view = new DataView(block.buffer);
    for (let i = 0; i < refcountsPerBlock && b * refcountsPerBlock + i < total; i++) {
      writeRefcount(view, i, refcountBits, 1);
    }
    await file.write(block, (firstBlock + b) * clusterSize);
  }
  await file.write(table, header.refcountTableOffset);
  await file.write(new Uint8Array(l1Clusters * clusterSize), header.l1Offset);
  if (luks !== undefined) {
    const offset = firstLuks * clusterSize;
    const padded = new Uint8Array(luksClusters * clusterSize);
    padded.set(luks);
    await file.write(padded, offset);
    const pointer = Buffer.alloc(16);
    pointer.writeBigUInt64BE(BigInt(offset), 0);
    pointer.writeBigUInt64BE(BigInt(luks.length), 8);
    setExtension(header, ExtensionType.ENCRYPTION, pointer);
  }
  await file.flush();
  await file.write(encodeHeader(header, file.path), 0);
  await file.flush();
}

/** An empty data file: a raw one is right without the image from the beginning. */
async function makeDataFile(path: string, options: CreateOptions, size: number): Promise<void> {
  const name = pathFrom(path, options.dataFile as string);
  const { openFile, overwrite = false } = options;
  const file: HostFile =
    openFile === undefined
      ? await DiskFile.open(name, { create: true, exclusive: !overwrite })
      : await openFile(name, { readOnly: false });
  try {
    file.backing?.lockImage(true);
    if (file.size() > 0) await file.truncate(0);
    if (options.dataFileRaw) await file.truncate(size);
    await file.flush();
  } finally {
    await file.close();
  }
}
