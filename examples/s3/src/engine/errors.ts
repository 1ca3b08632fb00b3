// SPDX-License-Identifier: Apache-2.0
/** What can be wrong with a disk in a bucket, as opposed to with one request (`ObjectStoreError`). */
import { TcmuError, type TcmuErrorDetails } from 'tcmu';

/**
 * - `exists`, `not-a-disk`: the prefix holds a disk already, or none
 * - `unfinished`: a clone whose making, or deletion, is under way or was broken off
 * - `format`: written by a newer version, or not by this program
 * - `fenced`: another writer has opened the disk; this one writes no more, ever
 * - `no-fencing`: the store ignores conditional writes
 * - `damaged`: an object is missing, cut, or not what was written; the message names it
 * - `key`: the encryption key is missing or wrong
 * - `unreachable`: the bucket did not answer while somebody waited; the data is kept and sent later
 * - `refused`: the bucket refuses us (403, no such bucket); somebody has to do something
 * - `in-use`: a snapshot that a clone needs, a name that is taken, a log that moves faster than it can be read
 * - `journal`: the local journal belongs to another writer or disk
 * - `closed`: used after close
 * - `read-only`: a follower or snapshot was asked to change
 */
export type DiskFailure =
  | 'exists'
  | 'not-a-disk'
  | 'unfinished'
  | 'format'
  | 'fenced'
  | 'no-fencing'
  | 'damaged'
  | 'key'
  | 'unreachable'
  | 'refused'
  | 'in-use'
  | 'journal'
  | 'closed'
  | 'read-only';

/** Codes: `ERR_TCMU_S3_` and the failure: `ERR_TCMU_S3_FENCED`, `ERR_TCMU_S3_NO_FENCING` … */
export class DiskError extends TcmuError {
  readonly failure: DiskFailure;

  constructor(failure: DiskFailure, message: string, details?: TcmuErrorDetails) {
    super(`ERR_TCMU_S3_${failure.toUpperCase().replaceAll('-', '_')}`, message, details);
    this.failure = failure;
  }
}

/** An object that is not what was written. */
export function damaged(key: string, what: string, cause?: unknown): DiskError {
  return new DiskError(
    'damaged',
    `${key}: ${what}; its data is not served. Run \`tcmu-s3 check\`, and restore from a snapshot or a copy of the bucket`,
    { operation: 'read', path: key, cause },
  );
}

/** An object that a map names is not there: damage, unless the map is out of date. */
export class Gone extends Error {
  readonly key: string;

  constructor(key: string) {
    super(`${key} is gone`);
    this.key = key;
  }
}
