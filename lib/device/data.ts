// SPDX-License-Identifier: Apache-2.0
/**
 * The two data buffers of a SCSI command, named as SAM names them. Both are windows on memory that
 * belongs to somebody else (the kernel's ring mapping, or a scratch Uint8Array): they are valid until
 * the command completes, and every method throws `ERR_TCMU_BUFFER_REVOKED` after that.
 *
 * All offsets and lengths are bytes.
 */
import type { BackingFile } from '../io/backing-file.js';

/** A value, or a promise of it. A handler that can answer at once should: no microtask is taken. */
export type MaybePromise<T> = T | Promise<T>;

/** Data from the initiator (SAM-5 Data-Out Buffer): WRITE data, parameter lists. Read-only. */
export interface DataOut {
  /** Bytes that the initiator sends, over all segments. */
  readonly length: number;
  /**
   * A window on the bytes `[start, end)` of the same memory; nothing is copied. Default: all of it.
   * @throws BufferError `ERR_TCMU_BUFFER_RANGE` outside the buffer
   */
  slice(start?: number, end?: number): DataOut;
  /** Copies all bytes to `target` at `targetStart`. @throws BufferError `ERR_TCMU_BUFFER_RANGE`. */
  copyTo(target: Uint8Array, targetStart?: number): void;
  /** A copy that outlives the command. */
  toBytes(): Uint8Array;
  /**
   * Writes all bytes to `file` at `position` without passing through JavaScript memory; resolves (or
   * returns, when it was possible without blocking) once the kernel has taken all of them.
   * The memory is pinned meanwhile. @throws FileError
   */
  writeTo(file: BackingFile, position: number): MaybePromise<void>;
  /** Whether every byte is zero. */
  isZero(): boolean;
  /** Offset of the first byte that differs from `other` (of the same length), or -1. */
  mismatch(other: Uint8Array | DataOut | DataIn): number;
  /**
   * The memory itself, one view an iovec segment, made when first asked for. The views are detached
   * (length 0) when the command completes. Do not store into them.
   */
  segments(): readonly Uint8Array[];
}

/**
 * Data to the initiator (SAM-5 Data-In Buffer): READ data, INQUIRY data. What the handler leaves
 * unwritten is never delivered as it was: it reads as zeros or is cut off as a residual. The exceptions, both
 * with nothing written: a command whose `dataOut` was asked for as well, completed with `completeKeeping()`
 * (it may as well be a write); and one by zero copy with its scrub off whose `dataIn` was never asked for.
 *
 * By zero copy the data of a command that has none to receive can't be stored into: the methods that store throw
 * BufferError `ERR_TCMU_BUFFER_READ_ONLY`, and asking for it does no harm.
 */
export interface DataIn {
  /** Bytes that the initiator has room for, over all segments. */
  readonly length: number;
  /**
   * A window on the bytes `[start, end)` of the same memory; nothing is copied. Default: all of it.
   * @throws BufferError `ERR_TCMU_BUFFER_RANGE` outside the buffer
   */
  slice(start?: number, end?: number): DataIn;
  /** Copies `source` to `start`; it must fit. @throws BufferError `ERR_TCMU_BUFFER_RANGE`. */
  copyFrom(source: Uint8Array, start?: number): void;
  /** Sets bytes `[start, end)` to `value`. */
  fill(value: number, start?: number, end?: number): void;
  /**
   * Fills the whole window from `file` at `position` without passing through JavaScript memory.
   * Bytes behind the end of the file are set to zero; the result is the number of bytes that came
   * from the file. The memory is pinned meanwhile. @throws FileError
   */
  readFrom(file: BackingFile, position: number): MaybePromise<number>;
  /**
   * The memory itself, one view an iovec segment, made (and zeroed where not yet written) when first
   * asked for. The views are detached (length 0) when the command completes.
   */
  segments(): readonly Uint8Array[];
}
