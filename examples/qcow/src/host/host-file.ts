// SPDX-License-Identifier: Apache-2.0
/**
 * The file under an image, reduced to what the format needs. Every layer above reads and writes
 * through this interface, so that tests can record, cut and reorder what reaches the file.
 *
 * A settled write is seen by every later read. It is durable only after a `flush` that began after it
 * had settled; until then writes may reach the device in any order. Methods answer at once where
 * nothing blocked.
 */
import type { BackingFile, DataIn, DataOut, MaybePromise } from 'tcmu';

export interface HostFile {
  /** For messages, and for paths relative to it. */
  readonly path: string;
  readonly readOnly: boolean;
  /** The file behind it, for locks; absent in memory. */
  readonly backing?: BackingFile;
  /** Bytes now. */
  size(): number;
  /** Fills all of `target`; what lies behind the end of the file is zeros. */
  read(target: Uint8Array, position: number): MaybePromise<unknown>;
  /** Takes all of `source`, which must not change until it is settled; makes the file longer where needed. */
  write(source: Uint8Array, position: number): MaybePromise<unknown>;
  /** `read` into a command's memory, which JavaScript never sees. */
  readData(data: DataIn, position: number): MaybePromise<unknown>;
  /** `write` out of a command's memory. */
  writeData(data: DataOut, position: number): MaybePromise<unknown>;
  /** The range reads as zeros and stays allocated where that is possible. */
  writeZeroes(position: number, length: number): MaybePromise<unknown>;
  /** The range's content is not needed any more. It may read as anything afterwards. */
  discard(position: number, length: number): MaybePromise<unknown>;
  /** Makes every write that settled before this call durable. */
  flush(): MaybePromise<unknown>;
  /** Sets the length; what is added reads as zeros. */
  truncate(length: number): MaybePromise<unknown>;
  /** First byte at or behind `position` that may be other than zero, or undefined when there is none. */
  nextData(position: number): MaybePromise<number | undefined>;
  /** First byte at or behind `position` in a hole; the end of the file is one. */
  nextHole(position: number): MaybePromise<number | undefined>;
  /** Waits for what is under way. Does not flush. */
  close(): MaybePromise<unknown>;
}
