// SPDX-License-Identifier: Apache-2.0
/**
 * `tcmu/store`: the interface of a disk's contents, and stores and middleware to build with.
 *
 * @packageDocumentation
 */
export type {
  BlockExtent,
  BlockStore,
  RequestContext,
  StoreSpace,
  UnmapContext,
  WriteContext,
} from './block-store.js';
export { type Delay, delay } from './delay.js';
export { type FaultRule, faults } from './faults.js';
export { MemoryDataIn, MemoryDataOut } from './memory-data.js';
export { MemoryStore, type MemoryStoreOptions } from './memory-store.js';
export {
  type OperationName,
  type OptionalMethod,
  StoreMiddleware,
  type StoreOperation,
} from './middleware.js';
export { overlay } from './overlay.js';
export { type RateLimitOptions, rateLimit } from './rate-limit.js';
export { readOnly } from './read-only.js';
export { formatSize, parseSize } from './size.js';
export {
  CountingStore,
  type OperationStatistics,
  type StoreStatistics,
  statistics,
} from './statistics.js';
