// SPDX-License-Identifier: Apache-2.0
/**
 * The interface most handler authors implement: a disk as a row of bytes. Which optional methods
 * exist decides which capabilities the device advertises; what is missing is emulated from what is
 * there, or refused with the right sense. Every method may answer at once or by a promise.
 *
 * The caller guarantees: `position` and lengths are multiples of `blockSize`, within `size`, and
 * data buffers are valid until the method has settled. Methods are called concurrently, up to the
 * device's `concurrency`; writes that overlap in time may land in either order (SAM-5 simple
 * tasks). A thrown `SenseError` goes to the initiator as it is; ENOSPC, EROFS and the like are
 * translated (see `tcmu/scsi`); anything else becomes HARDWARE ERROR or MEDIUM ERROR and a
 * diagnostics event.
 */
import type { DataIn, DataOut, MaybePromise } from '../device/data.js';
import type { FileMap } from '../io/file-map.js';

/** What a store is told about a request besides its data. */
export interface RequestContext {
  /** Aborted when the initiator gave up on the request; made when first asked for. */
  readonly signal: AbortSignal;
}

export interface WriteContext extends RequestContext {
  /** The write must be durable when the method settles. Only ever true when `supportsFua` is. */
  readonly fua: boolean;
}

export interface UnmapContext extends RequestContext {
  /** Blocks may be deallocated rather than written (they must read as zeros either way). */
  readonly mayUnmap: boolean;
}

/** A run of blocks with one provisioning status (SBC-4, GET LBA STATUS). */
export interface BlockExtent {
  /** Bytes, a multiple of the block size. */
  readonly length: number;
  /**
   * `data`: mapped; `hole`: deallocated, reads as zeros; `zero`: mapped or anchored, reads as
   * zeros.
   */
  readonly status: 'data' | 'hole' | 'zero';
}

/** Space behind a thin disk, in bytes. */
export interface StoreSpace {
  /** Bytes that the store takes up. */
  readonly used: number;
  /** Bytes that it can still take. */
  readonly available: number;
}

/**
 * Where a disk's data is: what most handlers implement. Positions and lengths are bytes, whole
 * blocks, inside the disk: they have been checked. Which optional methods exist decides what the
 * disk advertises; they may be synchronous or return a promise. What a method throws becomes sense
 * data: a `SenseError` as it is, another error by `toSense`.
 */
export interface BlockStore {
  /**
   * Capacity in bytes: a multiple of `blockSize`, above 0, at most 2^53 - 1. Read again after
   * `resize`.
   */
  readonly size: number;
  /** Logical block size in bytes: 512 (default), 1024, 2048 or 4096. */
  readonly blockSize?: number;
  /** Bytes a physical block has; a power of two times the logical one. Default: `blockSize`. */
  readonly physicalBlockSize?: number;
  /** Reported as WP in the mode parameter header; writes are refused with DATA PROTECT. */
  readonly readOnly?: boolean;
  /**
   * Whether an acknowledged write may still be volatile (WCE in the caching mode page). Default:
   * true when there is a `flush`, false otherwise: a store without `flush` promises that a settled
   * write is durable.
   */
  readonly writeCache?: boolean;
  /** `write` honours `context.fua`. Without it a FUA write is a write followed by `flush`. */
  readonly supportsFua?: boolean;
  /**
   * Largest transfer in bytes that is best for the store (OPTIMAL TRANSFER LENGTH, SBC-4 Block
   * Limits VPD page).
   */
  readonly optimalTransferLength?: number;
  /**
   * Granularity of unmap in bytes, a multiple of `blockSize` (the default). `unmap` is only called for
   * whole granules, and to the end of the disk; what an initiator unmaps beside them is zeroed.
   */
  readonly unmapGranularity?: number;
  /**
   * No seek costs (MEDIUM ROTATION RATE 1, SBC-4 Block Device Characteristics VPD page). Default
   * true.
   */
  readonly nonRotational?: boolean;

  /**
   * Bytes that one `write` puts down all or nothing, even when power fails, a multiple of `blockSize`
   * (WRITE ATOMIC (16), SBC-4 Block Limits VPD page). Default: none promised.
   */
  readonly atomicWriteLength?: number;
  /**
   * Where in files the store's bytes lie: plain reads and writes of what it knows go straight to the files and do not
   * call `read` and `write`, as long as it allows that.
   */
  readonly fileMap?: FileMap;

  /** Fills all of `data` from `position`. */
  read(position: number, data: DataIn, context: RequestContext): MaybePromise<unknown>;
  /** Takes all of `data` to `position`. */
  write(position: number, data: DataOut, context: WriteContext): MaybePromise<unknown>;
  /** Makes every write that settled before this call durable. */
  flush?(context: RequestContext): MaybePromise<unknown>;
  /**
   * Deallocates whole granules of `unmapGranularity`; the range must read as zeros afterwards (LBPRZ
   * 001b).
   */
  unmap?(position: number, length: number, context: RequestContext): MaybePromise<unknown>;
  /** Writes `length` bytes of zeros at byte `position`, without a buffer for them. */
  writeZeroes?(position: number, length: number, context: UnmapContext): MaybePromise<unknown>;
  /** Writes `block` (one logical block) over the range. */
  writeSame?(
    position: number,
    length: number,
    block: Uint8Array,
    context: RequestContext,
  ): MaybePromise<unknown>;
  /**
   * Atomically: when the bytes at `position` equal `expected`, writes `replacement` and answers -1;
   * otherwise answers the offset of the first difference. Emulated under a range lock when absent.
   */
  compareAndWrite?(
    position: number,
    expected: Uint8Array,
    replacement: Uint8Array,
    context: RequestContext,
  ): MaybePromise<number>;
  /** Extents from `position`, in order, covering at least one block and at most `length` bytes. */
  blockStatus?(
    position: number,
    length: number,
    context: RequestContext,
  ): MaybePromise<readonly BlockExtent[]>;
  /**
   * Copies `length` bytes from `source`, which may be this store itself, as far as that is cheap: shared
   * clusters, a reflink, a copy on the server (EXTENDED COPY). Answers how many bytes, from the start on,
   * read like the source's now: a multiple of the block size, 0 for a source it knows nothing cheap for. The
   * caller copies the rest. Ranges of one store do not overlap.
   */
  copyFrom?(
    source: BlockStore,
    sourcePosition: number,
    position: number,
    length: number,
    context: RequestContext,
  ): MaybePromise<number>;
  /**
   * Space that the disk takes now and could still take, in bytes (SBC-4, Logical Block Provisioning log
   * page and soft thresholds). Asked about once a second at most.
   */
  space?(): MaybePromise<StoreSpace>;
  /** Makes all data unreadable by forgetting its key (SANITIZE, CRYPTOGRAPHIC ERASE). */
  cryptoErase?(context: RequestContext): MaybePromise<unknown>;
  /** Called once before the first request. */
  open?(): MaybePromise<unknown>;
  /** Called once after the last request has settled. The store flushes what it holds. */
  close?(): MaybePromise<unknown>;
  /** Makes the disk `size` bytes long. Absent: the disk can't be resized. */
  resize?(size: number): MaybePromise<unknown>;
}
