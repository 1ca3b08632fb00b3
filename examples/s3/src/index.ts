// SPDX-License-Identifier: Apache-2.0
/** The parts to build on: the disk, and what keeps its objects. The command line is `cli.ts`. */
export { type Connected, type ConnectOptions, connect } from './client/index.js';
export {
  type CheckResult,
  type CreateOptions,
  checkDisk,
  cloneDisk,
  createDisk,
  deleteDisk,
  readingParts,
} from './engine/admin.js';
export type { Compression } from './engine/blob.js';
export { DiskError, type DiskFailure } from './engine/errors.js';
export {
  type DiskRecord,
  type KeySource,
  loadDisk,
  type Pin,
  rotateKeys,
} from './engine/records.js';
export {
  type Clock,
  type Log,
  type LogLevel,
  type RequestCounters,
  Requests,
  systemClock,
} from './engine/requests.js';
export { deleteSnapshot, listSnapshots } from './engine/snapshots.js';
export {
  type ByteRange,
  type CallOptions,
  type DeleteOptions,
  type FailureKind,
  failureKind,
  type GetOptions,
  type GetResult,
  type ListedObject,
  type ListOptions,
  type ObjectFacts,
  type ObjectStore,
  ObjectStoreError,
  type ObjectStoreErrorDetails,
  type PutOptions,
} from './object-store.js';
export { type DiskStatistics, type OpenOptions, S3Disk } from './s3-disk.js';
