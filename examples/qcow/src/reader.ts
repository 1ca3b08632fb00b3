// SPDX-License-Identifier: Apache-2.0
/** Reading: from a guest's position to where its bytes are, through the backing chain. */
import type { BlockExtent, DataIn, FileMap, MaybePromise } from 'tcmu';
import { MemoryDataIn } from 'tcmu/store';
import type { ClusterCodec } from './compression/codec.js';
import { QcowError } from './errors.js';
import { compressedExtent, Kind } from './format/entries.js';
import type { Geometry } from './format/geometry.js';
import type { GuestData } from './guest-data.js';
import type { HostFile } from './host/host-file.js';
import { type Layer, readLayer } from './layer.js';
import type { Mapping } from './mapping.js';
import { allSettled } from './metadata-sync.js';

export interface ReaderParts {
  readonly file: HostFile;
  readonly data: GuestData;
  readonly geometry: Geometry;
  readonly mapping: Mapping;
  readonly backing: Layer | undefined;
  readonly codec: ClusterCodec;
}

/** Decompressed clusters that are kept: enough for a few sequential readers. */
const KEPT_BYTES = 4 * 1024 * 1024;
const KEPT_CLUSTERS = 16;

export class Reader {
  readonly #parts: ReaderParts;
  /** Decompressed clusters by the host offset of their data. */
  readonly #decompressed = new Map<number, Uint8Array>();
  /** Changes whenever compressed data may have been replaced. */
  #generation = 0;

  constructor(parts: ReaderParts) {
    this.#parts = parts;
  }

  read(position: number, data: DataIn): MaybePromise<unknown> {
    const { mapping } = this.#parts;
    const slice = mapping.lookup(position);
    if (!(slice instanceof Promise)) {
      mapping.resolve(slice, position, data.length);
      if (mapping.length === data.length) return this.#readRun(position, data);
    }
    return this.#readRuns(position, data);
  }

  /**
   * Tells `map` where the bytes of a range lie, in layers below, too, as far as that is known at once.
   * @param mayWrite whether a place of the image's own may be written to, given that its refcount is one
   */
  mapInto(
    map: FileMap,
    position: number,
    length: number,
    mayWrite: (host: number, length: number) => boolean,
  ): void {
    const { mapping, backing, data } = this.#parts;
    const file = data.file.backing;
    if (file === undefined || !data.plain) return;
    const end = position + length;
    for (let at = position, found: number; at < end; at += found) {
      const slice = mapping.peek(at);
      if (slice === false) return;
      mapping.resolve(slice, at, end - at);
      found = mapping.length;
      if (mapping.kind === Kind.DATA) {
        const { host, copied } = mapping;
        map.set(at, found, file, host, copied && mayWrite(host, found));
      } else if (mapping.kind === Kind.UNALLOCATED && backing !== undefined) {
        const there = Math.min(found, backing.size - at);
        if (there > 0) backing.mapInto?.(map, at, there);
      }
    }
  }

  async #readRuns(position: number, data: DataIn): Promise<void> {
    const { mapping } = this.#parts;
    const pending: Promise<unknown>[] = [];
    try {
      for (let at = 0; at < data.length; ) {
        let slice = mapping.lookup(position + at);
        while (slice instanceof Promise) {
          await slice;
          slice = mapping.lookup(position + at);
        }
        mapping.resolve(slice, position + at, data.length - at);
        const end = at + mapping.length;
        const read = this.#readRun(position + at, data.slice(at, end));
        if (read instanceof Promise) pending.push(read);
        at = end;
      }
    } finally {
      // Also after a failure: `data` is in use until the last one ends.
      await allSettled(pending);
    }
  }

  /** Reads what `mapping.resolve` has just described. */
  #readRun(position: number, data: DataIn): MaybePromise<unknown> {
    const { mapping, backing } = this.#parts;
    switch (mapping.kind) {
      case Kind.DATA:
        return this.#parts.data.read(data, mapping.host, position);
      case Kind.UNALLOCATED:
        return readLayer(backing, position, data);
      case Kind.ZERO:
        return data.fill(0);
      case Kind.COMPRESSED:
        return this.#readCompressed(position, data, mapping.high, mapping.low);
      default:
        throw mapping.invalid(position);
    }
  }

  async #readCompressed(position: number, data: DataIn, high: number, low: number): Promise<void> {
    const within = position % this.#parts.geometry.clusterSize;
    const cluster = await this.#decompress(high, low);
    data.copyFrom(cluster.subarray(within, within + data.length));
  }

  async #decompress(high: number, low: number): Promise<Uint8Array> {
    const { file, geometry, codec } = this.#parts;
    const { offset, length } = compressedExtent(high, low, geometry);
    const kept = this.#decompressed.get(offset);
    if (kept !== undefined) return kept;
    if (offset + length - 512 > file.size()) {
      throw new QcowError('ERR_TCMU_QCOW_CORRUPT', 'it lies behind the end of the file', {
        path: file.path,
        structure: 'compressed cluster',
        offset,
      });
    }
    const generation = this.#generation;
    const compressed = new Uint8Array(length);
    await file.read(compressed, offset);
    let cluster: Uint8Array;
    try {
      cluster = await codec.decompress(compressed, geometry.clusterSize);
    } catch (cause) {
      throw new QcowError(
        'ERR_TCMU_QCOW_CORRUPT',
        `its ${codec.name} data can't be decompressed (${(cause as Error).message})`,
        { path: file.path, structure: 'compressed cluster', offset, cause },
      );
    }
    const limit = Math.min(KEPT_CLUSTERS, Math.ceil(KEPT_BYTES / geometry.clusterSize));
    if (generation === this.#generation) {
      if (this.#decompressed.size >= limit) {
        this.#decompressed.delete(this.#decompressed.keys().next().value as number);
      }
      this.#decompressed.set(offset, cluster);
    }
    return cluster;
  }

  /** Compressed data was written, or its place given up. */
  forgetCompressed(): void {
    this.#generation++;
    this.#decompressed.clear();
  }

  /** The bytes from `position` on, as they are now. */
  async readBytes(position: number, length: number): Promise<Uint8Array> {
    const data = new MemoryDataIn(new Uint8Array(length));
    await this.read(position, data);
    return data.bytes;
  }

  /** Extents from `position` on. @param limit most extents answered */
  async status(position: number, length: number, limit = 256): Promise<BlockExtent[]> {
    const { mapping, backing } = this.#parts;
    const extents: BlockExtent[] = [];
    for (let at = 0; at < length && extents.length < limit; ) {
      let slice = mapping.lookup(position + at);
      while (slice instanceof Promise) {
        await slice;
        slice = mapping.lookup(position + at);
      }
      mapping.resolve(slice, position + at, length - at);
      const found = mapping.length;
      switch (mapping.kind) {
        case Kind.UNALLOCATED:
          for (const extent of await belowStatus(backing, position + at, found)) {
            append(extents, extent);
            at += extent.length;
          }
          continue;
        case Kind.ZERO:
          append(extents, { length: found, status: mapping.host >= 0 ? 'zero' : 'hole' });
          break;
        case Kind.INVALID:
          throw mapping.invalid(position + at);
        default:
          append(extents, { length: found, status: 'data' });
      }
      at += found;
    }
    return extents;
  }

  /** Whether a range is known to read as zeros, without reading it. */
  isZero(position: number, length: number): MaybePromise<boolean> {
    const { mapping, backing } = this.#parts;
    for (let at = 0; at < length; at += mapping.length) {
      const slice = mapping.lookup(position + at);
      if (slice instanceof Promise) return this.#isZeroBelow(position, length);
      mapping.resolve(slice, position + at, length - at);
      if (mapping.kind === Kind.ZERO) continue;
      if (mapping.kind !== Kind.UNALLOCATED) return false;
      if (backing !== undefined) return this.#isZeroBelow(position, length);
    }
    return true;
  }

  async #isZeroBelow(position: number, length: number): Promise<boolean> {
    for (let at = 0; at < length; ) {
      const extents = await this.status(position + at, length - at);
      for (const extent of extents) {
        if (extent.status === 'data') return false;
        at += extent.length;
      }
    }
    return true;
  }
}

function append(extents: BlockExtent[], extent: BlockExtent): void {
  const last = extents.at(-1);
  if (last?.status === extent.status) {
    extents[extents.length - 1] = { length: last.length + extent.length, status: last.status };
  } else {
    extents.push(extent);
  }
}

async function belowStatus(
  backing: Layer | undefined,
  position: number,
  length: number,
): Promise<readonly BlockExtent[]> {
  const there = backing === undefined ? 0 : backing.size - position;
  if (backing === undefined || there <= 0) return [{ length, status: 'hole' }];
  return backing.status(position, Math.min(length, there));
}
