// SPDX-License-Identifier: Apache-2.0
/** The parts to build on. The command line is `cli.ts`. */
export { commitImage, type RebaseOptions, rebaseImage } from './chain.js';
export type { CheckOptions, CheckResult } from './check.js';
export { type CreateOptions, createImage } from './create.js';
export { QcowError, type QcowErrorCode, type QcowErrorDetails } from './errors.js';
export { DiskFile } from './host/disk-file.js';
export type { HostFile } from './host/host-file.js';
export { MemoryFile } from './host/memory-file.js';
export { type ImageOptions, QcowImage, readHeader } from './image.js';
export type { Layer } from './layer.js';
export { type OpenOptions, openImage, openLayer } from './open.js';
export { QcowStore, type QcowStoreOptions } from './qcow-store.js';
export { resizeImage } from './resize.js';
export { type SnapshotInfo, Snapshots } from './snapshots.js';
export { checkImage, type ImageInfo, imageInfo } from './tools.js';
