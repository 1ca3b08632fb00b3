// SPDX-License-Identifier: Apache-2.0
/**
 * The operations a BlockStore may leave out, made of those it has. Scratch memory is bounded: at
 * most `SCRATCH_BYTES` a call. All work at once with a synchronous store and wait only where it
 * does.
 *
 * None of them is atomic against other writes to the same blocks; who needs that holds a lock.
 */
import type { DataOut, MaybePromise } from '../device/data.js';
import type { BlockStore, RequestContext, WriteContext } from './block-store.js';
import { chain, eachPiece } from './maybe.js';
import { MemoryDataIn, MemoryDataOut } from './memory-data.js';

/** Scratch memory of one emulated operation. A multiple of every block size. */
export const SCRATCH_BYTES = 256 * 1024;

const ZEROS = new MemoryDataOut(new Uint8Array(64 * 1024));

class PlainWrite implements WriteContext {
  readonly #context: RequestContext;
  readonly fua = false;

  constructor(context: RequestContext) {
    this.#context = context;
  }

  get signal(): AbortSignal {
    return this.#context.signal;
  }
}

/** Logical block size of a store, in bytes. */
export function blockSizeOf(store: BlockStore): number {
  return store.blockSize ?? 512;
}

/** Makes `[position, position + length)` read as zeros; `mayUnmap` allows deallocation. */
export function writeZeroes(
  store: BlockStore,
  position: number,
  length: number,
  mayUnmap: boolean,
  context: RequestContext,
): MaybePromise<unknown> {
  if (length === 0) return undefined;
  if (store.writeZeroes !== undefined) {
    return store.writeZeroes(position, length, new ZeroRequest(context, mayUnmap));
  }
  if (store.writeSame !== undefined) {
    return store.writeSame(position, length, new Uint8Array(blockSizeOf(store)), context);
  }
  const write = new PlainWrite(context);
  return eachPiece(length, ZEROS.length, (offset, piece) =>
    chain(
      store.write(position + offset, piece === ZEROS.length ? ZEROS : ZEROS.slice(0, piece), write),
      notStopped,
    ),
  );
}

class ZeroRequest extends PlainWrite {
  readonly mayUnmap: boolean;

  constructor(context: RequestContext, mayUnmap: boolean) {
    super(context);
    this.mayUnmap = mayUnmap;
  }
}

/** Deallocates whole granules of the range and zeroes what is left at its edges. */
export function unmap(
  store: BlockStore,
  position: number,
  length: number,
  context: RequestContext,
): MaybePromise<unknown> {
  if (store.unmap === undefined) return writeZeroes(store, position, length, true, context);
  const granularity = Math.max(store.unmapGranularity ?? 0, blockSizeOf(store));
  const end = position + length;
  const first = Math.ceil(position / granularity) * granularity;
  // The last granule of a disk may be cut short; reaching the end of the disk covers it.
  const last = end >= store.size ? end : Math.floor(end / granularity) * granularity;
  if (first >= last) return writeZeroes(store, position, length, false, context);
  return chain(writeZeroes(store, position, first - position, false, context), () =>
    chain((store.unmap as NonNullable<BlockStore['unmap']>)(first, last - first, context), () =>
      writeZeroes(store, last, end - last, false, context),
    ),
  );
}

/** Writes `block`, one logical block, over the whole range. */
export function writeSame(
  store: BlockStore,
  position: number,
  length: number,
  block: Uint8Array,
  context: RequestContext,
): MaybePromise<unknown> {
  if (store.writeSame !== undefined) return store.writeSame(position, length, block, context);
  const pattern = new Uint8Array(Math.min(length, SCRATCH_BYTES));
  for (let at = 0; at < pattern.length; at += block.length) pattern.set(block, at);
  const data = new MemoryDataOut(pattern);
  const write = new PlainWrite(context);
  return eachPiece(length, pattern.length, (offset, piece) =>
    chain(store.write(position + offset, data.slice(0, piece), write), notStopped),
  );
}

/**
 * Compares the store's bytes from `position` with `expected`, which may end inside a block.
 * @returns the offset of the first byte that differs, or -1.
 */
export function compare(
  store: BlockStore,
  position: number,
  expected: DataOut,
  context: RequestContext,
): MaybePromise<number> {
  const blockSize = blockSizeOf(store);
  const wholeBlocks = (length: number) => Math.ceil(length / blockSize) * blockSize;
  const scratch = new Uint8Array(Math.min(wholeBlocks(expected.length), SCRATCH_BYTES));
  let difference = -1;
  const walk = eachPiece(expected.length, SCRATCH_BYTES, (offset, piece) => {
    const window = new MemoryDataIn(scratch.subarray(0, wholeBlocks(piece)));
    return chain(store.read(position + offset, window, context), () => {
      const at = expected.slice(offset, offset + piece).mismatch(scratch.subarray(0, piece));
      if (at >= 0) difference = offset + at;
      return difference < 0;
    });
  });
  return chain(walk, () => difference);
}

/** Keeps what a store's method happens to answer from ending the walk. */
function notStopped(): true {
  return true;
}
