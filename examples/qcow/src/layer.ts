// SPDX-License-Identifier: Apache-2.0
/** A disk's content below an image: the next one in its backing chain. */
import type { BlockExtent, DataIn, FileMap, MaybePromise } from 'tcmu';
import type { HostFile } from './host/host-file.js';

export interface Layer {
  readonly path: string;
  readonly format: 'raw' | 'qcow2' | 'qcow';
  /** Bytes; what lies behind reads as zeros. */
  readonly size: number;
  /** Fills all of `data`, which lies within `size`. */
  read(position: number, data: DataIn): MaybePromise<unknown>;
  /** Extents from `position` on that cover at least one byte and at most `length`. */
  status(position: number, length: number): MaybePromise<readonly BlockExtent[]>;
  /**
   * Tells `map` where bytes of a range within `size` lie, as far as that is known at once; they may only be read. Absent
   * where bytes have to be worked on.
   */
  mapInto?(map: FileMap, position: number, length: number): void;
  close(): MaybePromise<unknown>;
}

/** A raw file as a layer. */
export class RawLayer implements Layer {
  readonly format = 'raw';
  readonly size: number;
  readonly file: HostFile;

  constructor(file: HostFile) {
    this.file = file;
    this.size = file.size();
  }

  get path(): string {
    return this.file.path;
  }

  read(position: number, data: DataIn): MaybePromise<unknown> {
    return this.file.readData(data, position);
  }

  async status(position: number, length: number): Promise<BlockExtent[]> {
    const data = await this.file.nextData(position);
    if (data === undefined || data >= position + length) return [{ length, status: 'hole' }];
    if (data > position) return [{ length: data - position, status: 'hole' }];
    const hole = (await this.file.nextHole(position)) ?? position + length;
    return [{ length: Math.min(length, hole - position), status: 'data' }];
  }

  mapInto(map: FileMap, position: number, length: number): void {
    const { backing } = this.file;
    if (backing !== undefined) map.set(position, length, backing, position, false);
  }

  close(): MaybePromise<unknown> {
    return this.file.close();
  }
}

/** Reads from a layer as if it were endless: zeros behind its end. */
export function readLayer(
  layer: Layer | undefined,
  position: number,
  data: DataIn,
): MaybePromise<unknown> {
  const there = layer === undefined ? 0 : Math.min(data.length, layer.size - position);
  if (layer === undefined || there <= 0) return data.fill(0);
  if (there === data.length) return layer.read(position, data);
  const read = layer.read(position, data.slice(0, there));
  data.fill(0, there);
  return read;
}
