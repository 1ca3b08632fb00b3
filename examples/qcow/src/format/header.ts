// SPDX-License-Identifier: Apache-2.0
/**
 * The image header: the fixed fields, the header extensions behind them, and the backing file's name,
 * all in the first cluster (qcow2 specification, "Header", "Header extensions").
 *
 * Whatever is not understood is kept: fields behind the known ones, unknown extensions, unknown
 * compatible bits. What must not be ignored (incompatible bits) refuses the image.
 */
import { QcowError } from '../errors.js';

export const MAGIC = 0x514649fb;

/** Incompatible feature bits. */
export const Incompatible = {
  DIRTY: 1n << 0n,
  CORRUPT: 1n << 1n,
  DATA_FILE: 1n << 2n,
  COMPRESSION: 1n << 3n,
  EXTENDED_L2: 1n << 4n,
} as const;
export const Compatible = { LAZY_REFCOUNTS: 1n << 0n } as const;
export const Autoclear = { BITMAPS: 1n << 0n, DATA_FILE_RAW: 1n << 1n } as const;

export const ExtensionType = {
  END: 0,
  BACKING_FORMAT: 0xe2792aca,
  FEATURE_NAMES: 0x6803f857,
  BITMAPS: 0x23852875,
  ENCRYPTION: 0x0537be77,
  DATA_FILE: 0x44415441,
  /** Unknown to the specification: to be skipped, while `replaceHeader` is at work. */
  PADDING: 0x70616464,
} as const;

export interface Extension {
  type: number;
  data: Uint8Array;
}

export interface Header {
  version: 2 | 3;
  clusterBits: number;
  /** Virtual disk size in bytes. */
  size: number;
  /** 0 none, 1 AES, 2 LUKS. */
  cryptMethod: number;
  /** Entries of the active L1 table. */
  l1Size: number;
  l1Offset: number;
  refcountTableOffset: number;
  refcountTableClusters: number;
  snapshotCount: number;
  snapshotsOffset: number;
  incompatible: bigint;
  compatible: bigint;
  autoclear: bigint;
  refcountOrder: number;
  headerLength: number;
  /** 0 deflate, 1 zstd. */
  compressionType: number;
  /** Fields behind the known ones, kept as they are. */
  unknownFields: Uint8Array;
  extensions: Extension[];
  backingFile: string | undefined;
  /** Where the name is in the first cluster. */
  backingOffset: number;
}

const V2_LENGTH = 72;
const KNOWN_LENGTH = 112;
const MIN_V3_LENGTH = 104;
const MAX_CLUSTER_BITS = 21;
/** QEMU's limits: more would not be opened by it, and would let a header claim any amount of memory. */
const MAX_L1_BYTES = 32 * 1024 * 1024;
const MAX_REFCOUNT_TABLE_BYTES = 8 * 1024 * 1024;
const MAX_SNAPSHOTS = 65536;
const MAX_BACKING_NAME = 1023;

/** What is known of each incompatible bit, for messages and for the feature name table. */
const FEATURES: readonly (readonly [type: number, bit: number, name: string])[] = [
  [0, 0, 'dirty bit'],
  [0, 1, 'corrupt bit'],
  [0, 2, 'external data file'],
  [0, 3, 'compression type'],
  [0, 4, 'extended L2 entries'],
  [1, 0, 'lazy refcounts'],
  [2, 0, 'bitmaps'],
  [2, 1, 'raw external data'],
];

/** Version of the image, or undefined when it is no qcow image at all. */
export function versionOf(start: Uint8Array): number | undefined {
  if (start.length < 8) return undefined;
  const view = viewOf(start);
  return view.getUint32(0) === MAGIC ? view.getUint32(4) : undefined;
}

/** Bytes of the first cluster, from the first bytes of an image. */
export function headerBytes(start: Uint8Array): number {
  const bits = viewOf(start).getUint32(20);
  return bits >= 9 && bits <= MAX_CLUSTER_BITS ? 2 ** bits : 512;
}

/**
 * @param bytes the first cluster
 * @throws QcowError `ERR_TCMU_QCOW_FORMAT`, `ERR_TCMU_QCOW_UNSUPPORTED`
 */
export function parseHeader(bytes: Uint8Array, path: string): Header {
  const view = viewOf(bytes);
  const wrong = (field: string, offset: number, problem: string) =>
    new QcowError('ERR_TCMU_QCOW_FORMAT', problem, {
      path,
      structure: `header field ${field}`,
      offset,
    });
  const u64 = (field: string, offset: number): number => {
    const value = view.getBigUint64(offset);
    if (value > BigInt(Number.MAX_SAFE_INTEGER)) {
      throw wrong(field, offset, `0x${value.toString(16)} is larger than any image can be`);
    }
    return Number(value);
  };
  if (bytes.length < V2_LENGTH || versionOf(bytes) === undefined) {
    throw new QcowError('ERR_TCMU_QCOW_FORMAT', 'it is no qcow image: the magic is missing', {
      structure: 'header',
      offset: 0,
      path,
    });
  }
  const version = view.getUint32(4);
  if (version !== 2 && version !== 3) {
    throw new QcowError('ERR_TCMU_QCOW_UNSUPPORTED', `qcow version ${version} is not known`, {
      path,
      structure: 'header field version',
      offset: 4,
    });
  }
  const clusterBits = view.getUint32(20);
  if (clusterBits < 9 || clusterBits > MAX_CLUSTER_BITS) {
    throw wrong('cluster_bits', 20, `${clusterBits} is not within 9 to ${MAX_CLUSTER_BITS}`);
  }
  if (version === 3 && bytes.length < MIN_V3_LENGTH) {
    throw wrong('header_length', 100, 'the file ends within the header');
  }
  const clusterSize = 2 ** clusterBits;
  const headerLength = version === 2 ? V2_LENGTH : view.getUint32(100);
  if (
    version === 3 &&
    (headerLength < MIN_V3_LENGTH || headerLength % 8 !== 0 || headerLength > bytes.length)
  ) {
    throw wrong('header_length', 100, `${headerLength} can't be`);
  }
  const v3 = version === 3;
  const header: Header = {
    version,
    clusterBits,
    size: u64('size', 24),
    cryptMethod: view.getUint32(32),
    l1Size: view.getUint32(36),
    l1Offset: u64('l1_table_offset', 40),
    refcountTableOffset: u64('refcount_table_offset', 48),
    refcountTableClusters: view.getUint32(56),
    snapshotCount: view.getUint32(60),
    snapshotsOffset: u64('snapshots_offset', 64),
    incompatible: v3 ? view.getBigUint64(72) : 0n,
    compatible: v3 ? view.getBigUint64(80) : 0n,
    autoclear: v3 ? view.getBigUint64(88) : 0n,
    refcountOrder: v3 ? view.getUint32(96) : 4,
    headerLength,
    compressionType: v3 && headerLength > 104 ? (bytes[104] as number) : 0,
    unknownFields: bytes.slice(Math.min(headerLength, KNOWN_LENGTH), headerLength),
    extensions: [],
    backingFile: undefined,
    backingOffset: u64('backing_file_offset', 8),
  };
  const { backingOffset } = header;
  const backingLength = view.getUint32(16);
  if (backingOffset !== 0) {
    if (backingLength > MAX_BACKING_NAME) {
      throw wrong('backing_file_size', 16, `${backingLength} is more than ${MAX_BACKING_NAME}`);
    }
    if (backingOffset < headerLength || backingOffset + backingLength > clusterSize) {
      throw wrong('backing_file_offset', 8, `the name lies outside the first cluster`);
    }
    const name = bytes.subarray(backingOffset, backingOffset + backingLength);
    header.backingFile = Buffer.from(name).toString('utf8');
    if (header.backingFile.includes('\0')) {
      throw wrong('backing_file_name', backingOffset, 'the name has a zero byte in it');
    }
  }
  header.extensions = parseExtensions(
    bytes.subarray(0, backingOffset === 0 ? bytes.length : backingOffset),
    headerLength,
    path,
  );
  checkHeader(header, wrong, path);
  return header;
}

function parseExtensions(bytes: Uint8Array, start: number, path: string): Extension[] {
  const view = viewOf(bytes);
  const extensions: Extension[] = [];
  const seen = new Set<number>();
  for (let at = start; at + 8 <= bytes.length; ) {
    const type = view.getUint32(at);
    const length = view.getUint32(at + 4);
    if (type === ExtensionType.END) break;
    const fail = (problem: string) =>
      new QcowError('ERR_TCMU_QCOW_FORMAT', problem, {
        path,
        structure: `header extension 0x${type.toString(16)}`,
        offset: at,
      });
    if (length > bytes.length - at - 8) {
      throw fail(`its ${length} bytes do not fit before the end of the header area`);
    }
    if (seen.has(type) && Object.values(ExtensionType).includes(type as 0)) {
      throw fail('it is there twice');
    }
    seen.add(type);
    extensions.push({ type, data: bytes.slice(at + 8, at + 8 + length) });
    at += 8 + Math.ceil(length / 8) * 8;
  }
  return extensions;
}

function checkHeader(
  header: Header,
  wrong: (field: string, offset: number, problem: string) => QcowError,
  path: string,
): void {
  const clusterSize = 2 ** header.clusterBits;
  const unknown = unknownIncompatible(header);
  if (unknown.length > 0) {
    throw new QcowError(
      'ERR_TCMU_QCOW_UNSUPPORTED',
      `it needs what this program does not know: ${unknown.join(', ')}`,
      { path, structure: 'header field incompatible_features', offset: 72 },
    );
  }
  const aligned = (field: string, offset: number, value: number) => {
    if (value % clusterSize !== 0) {
      throw wrong(field, offset, `0x${value.toString(16)} is not on a cluster boundary`);
    }
  };
  if (header.cryptMethod > 2) throw wrong('crypt_method', 32, `${header.cryptMethod} is not known`);
  if (header.refcountOrder > 6) {
    throw wrong('refcount_order', 96, `${header.refcountOrder} is more than 6`);
  }
  if (header.l1Size * 8 > MAX_L1_BYTES) {
    throw wrong('l1_size', 36, `${header.l1Size} entries are more than any image needs`);
  }
  aligned('l1_table_offset', 40, header.l1Offset);
  aligned('refcount_table_offset', 48, header.refcountTableOffset);
  aligned('snapshots_offset', 64, header.snapshotsOffset);
  if (header.refcountTableClusters * clusterSize > MAX_REFCOUNT_TABLE_BYTES) {
    throw wrong('refcount_table_clusters', 56, `${header.refcountTableClusters} are too many`);
  }
  if (header.refcountTableClusters === 0 || header.refcountTableOffset === 0) {
    throw wrong('refcount_table_offset', 48, 'there is no refcount table');
  }
  if (header.snapshotCount > MAX_SNAPSHOTS) {
    throw wrong('nb_snapshots', 60, `${header.snapshotCount} are more than ${MAX_SNAPSHOTS}`);
  }
  const extended = hasFeature(header.incompatible, Incompatible.EXTENDED_L2);
  if (extended && header.clusterBits < 14) {
    throw wrong('cluster_bits', 20, 'extended L2 entries need clusters of 16 KiB or more');
  }
  const needed = l1EntriesFor(header.size, header.clusterBits, extended);
  if (needed > header.l1Size) {
    throw wrong('l1_size', 36, `${header.l1Size} entries can't map ${header.size} bytes`);
  }
  if (header.l1Size > 0 && header.l1Offset === 0) {
    throw wrong('l1_table_offset', 40, 'there is no L1 table');
  }
  const typed = hasFeature(header.incompatible, Incompatible.COMPRESSION);
  if (typed !== (header.compressionType !== 0)) {
    throw wrong('compression_type', 104, 'it contradicts the compression type bit');
  }
  if (header.compressionType > 1) {
    throw new QcowError(
      'ERR_TCMU_QCOW_UNSUPPORTED',
      `compression type ${header.compressionType} is not known`,
      { path, structure: 'header field compression_type', offset: 104 },
    );
  }
}

export function hasFeature(bits: bigint, bit: bigint): boolean {
  return (bits & bit) !== 0n;
}

/** Entries that an L1 table needs for a disk of `size` bytes. */
export function l1EntriesFor(size: number, clusterBits: number, extended: boolean): number {
  const clusterSize = 2 ** clusterBits;
  return Math.ceil(size / ((clusterSize / (extended ? 16 : 8)) * clusterSize));
}

export function extension(header: Header, type: number): Uint8Array | undefined {
  return header.extensions.find((one) => one.type === type)?.data;
}

/** Sets, replaces or (undefined) removes an extension. */
export function setExtension(header: Header, type: number, data: Uint8Array | undefined): void {
  const at = header.extensions.findIndex((one) => one.type === type);
  if (data === undefined) {
    if (at >= 0) header.extensions.splice(at, 1);
  } else if (at >= 0) {
    header.extensions[at] = { type, data };
  } else {
    header.extensions.push({ type, data });
  }
}

/** A string extension, or undefined. */
export function textExtension(header: Header, type: number): string | undefined {
  const data = extension(header, type);
  return data === undefined ? undefined : Buffer.from(data).toString('utf8');
}

/** Names of set incompatible bits that are not known here: from the image's own table, or `bit 7`. */
function unknownIncompatible(header: Header): string[] {
  const known = Object.values(Incompatible).reduce((all, bit) => all | bit, 0n);
  const table = extension(header, ExtensionType.FEATURE_NAMES) ?? new Uint8Array(0);
  const names: string[] = [];
  for (let bit = 0; bit < 64; bit++) {
    if (!hasFeature(header.incompatible & ~known, 1n << BigInt(bit))) continue;
    let name: string | undefined;
    for (let at = 0; at + 48 <= table.length; at += 48) {
      if (table[at] !== 0 || table[at + 1] !== bit) continue;
      const text = Buffer.from(table.subarray(at + 2, at + 48));
      const end = text.indexOf(0);
      name = text.subarray(0, end < 0 ? text.length : end).toString('utf8');
    }
    names.push(name ? `${name} (bit ${bit})` : `bit ${bit}`);
  }
  return names;
}

/** The feature name table for new images. */
export function featureNames(): Uint8Array {
  const table = Buffer.alloc(FEATURES.length * 48);
  FEATURES.forEach(([type, bit, name], i) => {
    table[i * 48] = type;
    table[i * 48 + 1] = bit;
    table.write(name, i * 48 + 2, 46, 'utf8');
  });
  return table;
}

/** The fixed fields alone: what a switch to new tables writes, in one write of less than a sector. */
export function encodeFields(header: Header): Buffer {
  const { version, backingFile } = header;
  const bytes = Buffer.alloc(header.headerLength);
  bytes.writeUInt32BE(MAGIC, 0);
  bytes.writeUInt32BE(version, 4);
  if (backingFile !== undefined) {
    bytes.writeBigUInt64BE(BigInt(header.backingOffset), 8);
    bytes.writeUInt32BE(Buffer.byteLength(backingFile), 16);
  }
  bytes.writeUInt32BE(header.clusterBits, 20);
  bytes.writeBigUInt64BE(BigInt(header.size), 24);
  bytes.writeUInt32BE(header.cryptMethod, 32);
  bytes.writeUInt32BE(header.l1Size, 36);
  bytes.writeBigUInt64BE(BigInt(header.l1Offset), 40);
  bytes.writeBigUInt64BE(BigInt(header.refcountTableOffset), 48);
  bytes.writeUInt32BE(header.refcountTableClusters, 56);
  bytes.writeUInt32BE(header.snapshotCount, 60);
  bytes.writeBigUInt64BE(BigInt(header.snapshotsOffset), 64);
  if (version === 2) return bytes;
  bytes.writeBigUInt64BE(header.incompatible, 72);
  bytes.writeBigUInt64BE(header.compatible, 80);
  bytes.writeBigUInt64BE(header.autoclear, 88);
  bytes.writeUInt32BE(header.refcountOrder, 96);
  bytes.writeUInt32BE(header.headerLength, 100);
  if (header.headerLength > 104) bytes[104] = header.compressionType;
  bytes.set(header.unknownFields, Math.min(header.headerLength, KNOWN_LENGTH));
  return bytes;
}

/** Where the extensions end, their end marker included. */
export function extensionsEnd({ headerLength, extensions }: Header): number {
  return extensions.reduce(
    (end, { data }) => end + 8 + Math.ceil(data.length / 8) * 8,
    headerLength + 8,
  );
}

/**
 * The whole first cluster; decides where the backing file's name is. A name goes where no part of the one
 * in use has to be overwritten before the header's first sector can refer to it.
 * @param inUse place of the name that the image has now
 * @throws QcowError `ERR_TCMU_QCOW_STATE` when extensions and name don't fit
 */
export function encodeHeader(
  header: Header,
  path: string,
  inUse?: { offset: number; length: number },
): Buffer {
  const clusterSize = 2 ** header.clusterBits;
  const cluster = Buffer.alloc(clusterSize);
  const name = Buffer.from(header.backingFile ?? '');
  let backingOffset = extensionsEnd(header);
  if (inUse !== undefined && backingOffset + name.length > 512) {
    const behind = inUse.offset + inUse.length;
    if (backingOffset < behind && behind + name.length <= clusterSize) backingOffset = behind;
  }
  if (backingOffset + name.length > clusterSize) {
    throw new QcowError(
      'ERR_TCMU_QCOW_STATE',
      `the header's extensions and the backing file's name don't fit into a cluster of ${clusterSize} bytes; take larger clusters or a shorter name`,
      { path, structure: 'header', offset: 0 },
    );
  }
  header.backingOffset = backingOffset;
  cluster.set(encodeFields(header));
  let at = header.headerLength;
  for (const { type, data } of header.extensions) {
    cluster.writeUInt32BE(type, at);
    cluster.writeUInt32BE(data.length, at + 4);
    cluster.set(data, at + 8);
    at += 8 + Math.ceil(data.length / 8) * 8;
  }
  cluster.set(name, backingOffset);
  return cluster;
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
