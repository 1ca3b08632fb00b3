// SPDX-License-Identifier: Apache-2.0
/**
 * Copy on write: a disk that begins as `base` and keeps every change in `top`; `base` is never
 * written. Which blocks are in `top` is kept in memory only, a bit a block where anything was written:
 * the changes are gone when the overlay is, even if `top` lives on.
 *
 * The overlay owns both stores: opening and closing pass through. Block granular, so nothing is ever
 * copied up.
 */
import type { DataIn, DataOut, MaybePromise } from '../device/data.js';
import { ArgumentError } from '../errors.js';
import type { BlockExtent, BlockStore, RequestContext, WriteContext } from './block-store.js';
import { blockSizeOf, unmap, writeSame, writeZeroes } from './emulate.js';
import { chain, isPromise } from './maybe.js';

/** Bits a page of the map holds. */
const PAGE_BITS = 32768;

/** A set of block numbers, sparse in memory. */
class BlockSet {
  readonly #pages = new Map<number, Uint8Array>();

  has(block: number): boolean {
    const page = this.#pages.get(Math.floor(block / PAGE_BITS));
    if (page === undefined) return false;
    const bit = block % PAGE_BITS;
    return ((page[bit >>> 3] as number) & (1 << (bit & 7))) !== 0;
  }

  add(start: number, end: number): void {
    for (let block = start; block < end; block++) {
      const index = Math.floor(block / PAGE_BITS);
      let page = this.#pages.get(index);
      if (page === undefined) {
        page = new Uint8Array(PAGE_BITS / 8);
        this.#pages.set(index, page);
      }
      const bit = block % PAGE_BITS;
      if (bit === 0 && end - block >= PAGE_BITS) {
        page.fill(0xff);
        block += PAGE_BITS - 1;
      } else {
        (page[bit >>> 3] as number) |= 1 << (bit & 7);
      }
    }
  }

  /** First block in `[start, end)` that is not as `start` is: in the set, or not. */
  runEnd(start: number, end: number): number {
    const inside = this.has(start);
    let block = start + 1;
    while (block < end) {
      if (!inside && block % PAGE_BITS === 0 && !this.#pages.has(block / PAGE_BITS)) {
        block = Math.min(block + PAGE_BITS, end);
      } else if (this.has(block) === inside) {
        block++;
      } else {
        return block;
      }
    }
    return end;
  }
}

class OverlayStore implements BlockStore {
  readonly #base: BlockStore;
  readonly #top: BlockStore;
  readonly #written = new BlockSet();
  /** Present as `top` has them. */
  readonly flush?: NonNullable<BlockStore['flush']>;
  readonly unmap?: NonNullable<BlockStore['unmap']>;

  constructor(base: BlockStore, top: BlockStore) {
    this.#base = base;
    this.#top = top;
    if (top.flush !== undefined) this.flush = (context) => top.flush?.(context);
    if (top.unmap !== undefined) {
      this.unmap = (position, length, context) =>
        this.#change(position, length, () => unmap(top, position, length, context));
    }
  }

  get blockSize(): number {
    return blockSizeOf(this.#base);
  }

  get size(): number {
    return this.#base.size;
  }

  get physicalBlockSize(): number {
    return this.#base.physicalBlockSize ?? this.blockSize;
  }

  get readOnly(): boolean {
    return this.#top.readOnly ?? false;
  }

  get writeCache(): boolean {
    return this.#top.writeCache ?? this.#top.flush !== undefined;
  }

  get supportsFua(): boolean {
    return this.#top.supportsFua ?? false;
  }

  get unmapGranularity(): number {
    return this.#top.unmapGranularity ?? this.blockSize;
  }

  get nonRotational(): boolean {
    return this.#base.nonRotational ?? true;
  }

  read(position: number, data: DataIn, context: RequestContext): MaybePromise<unknown> {
    const reads: MaybePromise<unknown>[] = [];
    for (const run of this.#runs(position, data.length)) {
      const start = run.position - position;
      const window = run.length === data.length ? data : data.slice(start, start + run.length);
      try {
        reads.push((run.inTop ? this.#top : this.#base).read(run.position, window, context));
      } catch (error) {
        if (reads.length === 0) throw error;
        reads.push(Promise.reject(error));
        break;
      }
    }
    return reads.length === 1 ? reads[0] : settleAll(reads);
  }

  write(position: number, data: DataOut, context: WriteContext): MaybePromise<unknown> {
    return this.#change(position, data.length, () => this.#top.write(position, data, context));
  }

  writeZeroes(
    position: number,
    length: number,
    context: RequestContext & { mayUnmap: boolean },
  ): MaybePromise<unknown> {
    return this.#change(position, length, () =>
      writeZeroes(this.#top, position, length, context.mayUnmap, context),
    );
  }

  writeSame(
    position: number,
    length: number,
    block: Uint8Array,
    context: RequestContext,
  ): MaybePromise<unknown> {
    return this.#change(position, length, () =>
      writeSame(this.#top, position, length, block, context),
    );
  }

  /** The status of the first run: of what `top` or `base` says of its own. */
  blockStatus(
    position: number,
    length: number,
    context: RequestContext,
  ): MaybePromise<readonly BlockExtent[]> {
    const run = this.#runs(position, length).next().value as Run;
    const store = run.inTop ? this.#top : this.#base;
    if (store.blockStatus === undefined) return [{ length: run.length, status: 'data' }];
    return store.blockStatus(position, run.length, context);
  }

  open(): MaybePromise<unknown> {
    return chain(this.#base.open?.(), () =>
      chain(this.#top.open?.(), () => {
        if (blockSizeOf(this.#top) !== this.blockSize) {
          throw new ArgumentError(
            `overlay: base has blocks of ${this.blockSize} bytes, top of ${blockSizeOf(this.#top)}; they must be alike`,
          );
        }
        if (this.#top.size < this.#base.size) {
          throw new ArgumentError(
            `overlay: top has ${this.#top.size} bytes, base ${this.#base.size}; top must be as large`,
          );
        }
      }),
    );
  }

  close(): MaybePromise<unknown> {
    return chain(this.#top.close?.(), () => this.#base.close?.());
  }

  /** Blocks count as written once they are: a failed write leaves the old contents to be seen. */
  #change(
    position: number,
    length: number,
    run: () => MaybePromise<unknown>,
  ): MaybePromise<unknown> {
    return chain(run(), () =>
      this.#written.add(position / this.blockSize, (position + length) / this.blockSize),
    );
  }

  *#runs(position: number, length: number): Generator<Run> {
    const end = (position + length) / this.blockSize;
    for (let block = position / this.blockSize; block < end; ) {
      const stop = this.#written.runEnd(block, end);
      yield {
        position: block * this.blockSize,
        length: (stop - block) * this.blockSize,
        inTop: this.#written.has(block),
      };
      block = stop;
    }
  }
}

interface Run {
  readonly position: number;
  readonly length: number;
  readonly inTop: boolean;
}

/** Waits for all, also when one fails: the buffer must not be in use any more when we settle. */
function settleAll(reads: readonly MaybePromise<unknown>[]): MaybePromise<unknown> {
  if (!reads.some(isPromise)) return;
  return Promise.allSettled(reads).then((results) => {
    for (const result of results) if (result.status === 'rejected') throw result.reason;
  });
}

/**
 * A disk of `base`'s size and contents whose changes go to `top`.
 * @param top at least as large, with the same block size; what it holds at first is never read.
 *   `open` throws an ArgumentError where it is not so.
 */
export function overlay(base: BlockStore, top: BlockStore): BlockStore {
  return new OverlayStore(base, top);
}
