/**
 * `tcmu/store`: the interface of a disk's contents, and stores and middleware to build with.
 * @packageDocumentation
 */
export type {
  BlockExtent,
  BlockStore,
  RequestContext,
  UnmapContext,
  WriteContext,
} from './block-store.js';
export { MemoryDataIn, MemoryDataOut } from './memory-data.js';
export { MemoryStore, type MemoryStoreOptions } from './memory-store.js';
