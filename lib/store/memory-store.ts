// SPDX-License-Identifier: Apache-2.0
/**
 * A RAM disk: pages of memory made when first written, given back when unmapped. The contents live
 * as long as the object; `close` keeps them, so the same store can be served again. Every method
 * answers at once. Writes are as durable as the process: there is no flush, hence no write cache.
 */
import type { DataIn, DataOut } from '../device/data.js';
import { ArgumentError } from '../errors.js';
import type { BlockExtent, BlockStore, StoreSpace } from './block-store.js';
import { isZero } from './memory-data.js';

/** Options of `MemoryStore`. */
export interface MemoryStoreOptions {
  /** Capacity in bytes: a multiple of the block size. */
  size: number;
  /** Logical block size in bytes. Default 512. */
  blockSize?: number;
  /**
   * Bytes per page, the unit of allocation: a power of two, at least the block size. Default 64
   * KiB.
   */
  pageSize?: number;
}

/** A sparse disk in memory. */
export class MemoryStore implements BlockStore {
  readonly blockSize: number;
  readonly unmapGranularity: number;
  /** Bytes. Nothing comes in between, and a loss of power takes the whole disk. */
  readonly atomicWriteLength = 1024 * 1024;
  readonly #pageSize: number;
  readonly #pages = new Map<number, Uint8Array>();
  #size: number;

  /** @throws ArgumentError for sizes that do not fit together. */
  constructor(options: MemoryStoreOptions) {
    const { size, blockSize = 512, pageSize = 65536 } = options;
    if (pageSize < blockSize || !Number.isInteger(Math.log2(pageSize))) {
      throw new ArgumentError(
        `pageSize ${pageSize} must be a power of two of at least the block size ${blockSize}`,
      );
    }
    this.blockSize = blockSize;
    // Part of a page is zeroed in place, so any block can be unmapped.
    this.unmapGranularity = blockSize;
    this.#pageSize = pageSize;
    this.#size = this.#checkSize(size);
  }

  get size(): number {
    return this.#size;
  }

  /** Bytes of memory in use. */
  get allocated(): number {
    return this.#pages.size * this.#pageSize;
  }

  read(position: number, data: DataIn): void {
    const pageSize = this.#pageSize;
    for (let done = 0; done < data.length; ) {
      const at = position + done;
      const offset = at % pageSize;
      const length = Math.min(pageSize - offset, data.length - done);
      const page = this.#pages.get((at - offset) / pageSize);
      if (page === undefined) data.fill(0, done, done + length);
      else data.copyFrom(page.subarray(offset, offset + length), done);
      done += length;
    }
  }

  write(position: number, data: DataOut): void {
    const pageSize = this.#pageSize;
    for (let done = 0; done < data.length; ) {
      const at = position + done;
      const offset = at % pageSize;
      const length = Math.min(pageSize - offset, data.length - done);
      const part = length === data.length ? data : data.slice(done, done + length);
      part.copyTo(this.#page((at - offset) / pageSize), offset);
      done += length;
    }
  }

  unmap(position: number, length: number): void {
    const pageSize = this.#pageSize;
    const end = position + length;
    for (let at = position; at < end; ) {
      const offset = at % pageSize;
      const stop = Math.min(at - offset + pageSize, end);
      const index = (at - offset) / pageSize;
      if (offset === 0 && (stop - at === pageSize || stop === this.#size)) {
        this.#pages.delete(index);
      } else {
        this.#pages.get(index)?.fill(0, offset, offset + stop - at);
      }
      at = stop;
    }
  }

  writeZeroes(position: number, length: number): void {
    this.unmap(position, length);
  }

  writeSame(position: number, length: number, block: Uint8Array): void {
    if (isZero(block)) return this.unmap(position, length);
    for (let at = position; at < position + length; at += block.length) {
      const offset = at % this.#pageSize;
      this.#page((at - offset) / this.#pageSize).set(block, offset);
    }
  }

  blockStatus(position: number, length: number): readonly BlockExtent[] {
    const pageSize = this.#pageSize;
    const extents: BlockExtent[] = [];
    const end = position + length;
    // A long way of pages costs time; an answer need not reach the end of the range.
    for (let at = position; at < end && extents.length < 4096; ) {
      const stop = Math.min(at - (at % pageSize) + pageSize, end);
      const status = this.#pages.has(Math.floor(at / pageSize)) ? 'data' : 'hole';
      extents.push({ length: stop - at, status });
      at = stop;
    }
    return extents;
  }

  space(): StoreSpace {
    return { used: this.allocated, available: Math.max(0, this.#size - this.allocated) };
  }

  /** Makes the disk `size` bytes long; what is cut off is gone. */
  resize(size: number): void {
    this.#checkSize(size);
    if (size < this.#size) {
      this.unmap(size, this.#size - size);
    }
    this.#size = size;
  }

  #checkSize(size: number): number {
    if (!Number.isSafeInteger(size) || size <= 0 || size % this.blockSize !== 0) {
      throw new ArgumentError(
        `size ${size} must be a positive multiple of the block size ${this.blockSize}`,
      );
    }
    return size;
  }

  #page(index: number): Uint8Array {
    let page = this.#pages.get(index);
    if (page === undefined) {
      page = new Uint8Array(this.#pageSize);
      this.#pages.set(index, page);
    }
    return page;
  }
}
