/** The parts to build on: the disk, and what keeps its objects. The command line is `cli.ts`. */
export {
  type ByteRange,
  type CallOptions,
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
