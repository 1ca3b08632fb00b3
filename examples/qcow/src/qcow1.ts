// SPDX-License-Identifier: Apache-2.0
/**
 * Version 1 of the format, for reading: no refcounts, no snapshots, compressed clusters of deflate data,
 * the old AES encryption. (QEMU never wrote a specification of it; the layout is that of the first
 * qcow images: a header of 48 bytes, an L1 table as large as the disk needs, L2 tables of 2^l2_bits
 * entries.)
 */
import type { BlockExtent, DataIn, MaybePromise } from 'tcmu';
import type { ClusterCodec } from './compression/codec.js';
import { codecFor } from './compression/index.js';
import type { DataCipher } from './encryption/cipher.js';
import { QcowError } from './errors.js';
import { GuestData } from './guest-data.js';
import type { HostFile } from './host/host-file.js';
import { type Layer, readLayer } from './layer.js';
import { allSettled } from './metadata-sync.js';
import { TableCache } from './table-cache.js';

export interface Header1 {
  readonly size: number;
  readonly clusterBits: number;
  readonly l2Bits: number;
  readonly cryptMethod: number;
  readonly l1Offset: number;
  readonly backingFile: string | undefined;
}

const HEADER_LENGTH = 48;
const MAX_L1_BYTES = 32 * 1024 * 1024;
const CACHE_BYTES = 8 * 1024 * 1024;
const COMPRESSED = 1n << 63n;

/** @throws QcowError `ERR_TCMU_QCOW_FORMAT` */
export async function readHeader1(file: HostFile): Promise<Header1> {
  const { path } = file;
  const bytes = Buffer.alloc(HEADER_LENGTH);
  await file.read(bytes, 0);
  const wrong = (field: string, offset: number, problem: string) =>
    new QcowError('ERR_TCMU_QCOW_FORMAT', problem, {
      path,
      structure: `header field ${field}`,
      offset,
    });
  const u64 = (field: string, offset: number): number => {
    const value = bytes.readBigUInt64BE(offset);
    if (value > BigInt(Number.MAX_SAFE_INTEGER)) throw wrong(field, offset, `${value} can't be`);
    return Number(value);
  };
  const size = u64('size', 24);
  const clusterBits = bytes[32] as number;
  const l2Bits = bytes[33] as number;
  const cryptMethod = bytes.readUInt32BE(36);
  const l1Offset = u64('l1_table_offset', 40);
  if (clusterBits < 9 || clusterBits > 16) throw wrong('cluster_bits', 32, `${clusterBits}`);
  if (l2Bits < 6 || l2Bits > 13) throw wrong('l2_bits', 33, `${l2Bits} can't be`);
  if (cryptMethod > 1) throw wrong('crypt_method', 36, `${cryptMethod} is not known`);
  const l1Bytes = 8 * Math.ceil(size / 2 ** (clusterBits + l2Bits));
  if (l1Bytes > MAX_L1_BYTES) throw wrong('size', 24, `${size} bytes are too many`);
  if (l1Offset + l1Bytes > file.size()) {
    throw wrong('l1_table_offset', 40, 'the table reaches behind the end of the file');
  }
  const nameOffset = u64('backing_file_offset', 8);
  const nameLength = bytes.readUInt32BE(16);
  let backingFile: string | undefined;
  if (nameOffset !== 0) {
    if (nameLength > 1023 || nameOffset + nameLength > file.size()) {
      throw wrong('backing_file_offset', 8, 'the name does not lie in the file');
    }
    const name = Buffer.alloc(nameLength);
    await file.read(name, nameOffset);
    backingFile = name.toString('utf8');
  }
  return { size, clusterBits, l2Bits, cryptMethod, l1Offset, backingFile };
}

export class Qcow1Layer implements Layer {
  readonly format = 'qcow';
  readonly file: HostFile;
  readonly header: Header1;
  readonly backing: Layer | undefined;
  readonly #l1: DataView;
  readonly #cache: TableCache;
  readonly #data: GuestData;
  readonly #codec: ClusterCodec = codecFor(0);

  private constructor(
    file: HostFile,
    header: Header1,
    l1: Uint8Array,
    backing: Layer | undefined,
    cipher: DataCipher | undefined,
  ) {
    this.file = file;
    this.header = header;
    this.backing = backing;
    this.#l1 = new DataView(l1.buffer);
    this.#cache = new TableCache(file, 8 * 2 ** header.l2Bits, CACHE_BYTES);
    this.#data = new GuestData(file, cipher);
  }

  static async open(
    file: HostFile,
    header: Header1,
    backing: Layer | undefined,
    cipher: DataCipher | undefined,
  ): Promise<Qcow1Layer> {
    const l1 = new Uint8Array(
      8 * Math.ceil(header.size / 2 ** (header.clusterBits + header.l2Bits)),
    );
    await file.read(l1, header.l1Offset);
    return new Qcow1Layer(file, header, l1, backing, cipher);
  }

  get path(): string {
    return this.file.path;
  }

  get size(): number {
    return Math.floor(this.header.size / 512) * 512;
  }

  /** The L2 entry of the cluster at `position`: 0 when it is not allocated. */
  async #entry(position: number): Promise<bigint> {
    const { clusterBits, l2Bits } = this.header;
    const cluster = Math.floor(position / 2 ** clusterBits);
    const index = Math.floor(cluster / 2 ** l2Bits);
    const table = this.#l1.getBigUint64(index * 8);
    if (table === 0n) return 0n;
    if (table >= BigInt(this.file.size())) {
      throw new QcowError(
        'ERR_TCMU_QCOW_CORRUPT',
        `entry ${index} points to 0x${table.toString(16)}, behind the end of the file`,
        { path: this.path, structure: 'L1 table', offset: this.header.l1Offset + index * 8 },
      );
    }
    const slice = await this.#cache.get(Number(table));
    return slice.view.getBigUint64((cluster % 2 ** l2Bits) * 8);
  }

  async read(position: number, data: DataIn): Promise<void> {
    const clusterSize = 2 ** this.header.clusterBits;
    const pending: Promise<unknown>[] = [];
    try {
      for (let at = 0; at < data.length; ) {
        const here = position + at;
        const within = here % clusterSize;
        const end = Math.min(data.length, at + clusterSize - within);
        const entry = await this.#entry(here);
        const read = this.#readCluster(entry, here, within, data.slice(at, end));
        if (read instanceof Promise) pending.push(read);
        at = end;
      }
    } finally {
      await allSettled(pending);
    }
  }

  #readCluster(
    entry: bigint,
    position: number,
    within: number,
    data: DataIn,
  ): MaybePromise<unknown> {
    if (entry === 0n) return readLayer(this.backing, position, data);
    if ((entry & COMPRESSED) === 0n) return this.#data.read(data, Number(entry) + within, position);
    return this.#readCompressed(entry, within, data);
  }

  async #readCompressed(entry: bigint, within: number, data: DataIn): Promise<void> {
    const { clusterBits } = this.header;
    const shift = BigInt(63 - clusterBits);
    const offset = Number(entry & ((1n << shift) - 1n));
    const length = Number((entry >> shift) & BigInt(2 ** clusterBits - 1));
    const compressed = new Uint8Array(length);
    await this.file.read(compressed, offset);
    try {
      const cluster = await this.#codec.decompress(compressed, 2 ** clusterBits);
      data.copyFrom(cluster.subarray(within, within + data.length));
    } catch (cause) {
      throw new QcowError(
        'ERR_TCMU_QCOW_CORRUPT',
        `its data can't be decompressed (${(cause as Error).message})`,
        { path: this.path, structure: 'compressed cluster', offset, cause },
      );
    }
  }

  async status(position: number, length: number): Promise<readonly BlockExtent[]> {
    const clusterSize = 2 ** this.header.clusterBits;
    const found = Math.min(length, clusterSize - (position % clusterSize));
    if ((await this.#entry(position)) !== 0n) return [{ length: found, status: 'data' }];
    const there = this.backing === undefined ? 0 : this.backing.size - position;
    if (this.backing === undefined || there <= 0) return [{ length: found, status: 'hole' }];
    return this.backing.status(position, Math.min(found, there));
  }

  async close(): Promise<void> {
    await this.file.close();
    await this.backing?.close();
  }
}
