/** The parts to build on. The command line is `cli.ts`. */
export { QcowError, type QcowErrorCode, type QcowErrorDetails } from './errors.js';
export { DiskFile } from './host/disk-file.js';
export type { HostFile } from './host/host-file.js';
export { MemoryFile } from './host/memory-file.js';
export { type ImageOptions, QcowImage, readHeader } from './image.js';
