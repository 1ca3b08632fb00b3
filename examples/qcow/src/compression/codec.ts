// SPDX-License-Identifier: Apache-2.0
/** How the data of a compressed cluster is made and undone: one object per compression type. */
import type { MaybePromise } from 'tcmu';

export interface ClusterCodec {
  readonly name: 'zlib' | 'zstd';
  /** The compressed form, or undefined when it would not be shorter than `cluster`. */
  compress(cluster: Uint8Array): MaybePromise<Uint8Array | undefined>;
  /**
   * The `clusterSize` bytes that `compressed` stands for. The input may end in up to 511 bytes that do
   * not belong to it, and must not be changed.
   * @throws QcowError `ERR_TCMU_QCOW_CORRUPT` (structure `compressed cluster`; the caller adds path and
   *   offset) when it is damaged or yields fewer bytes; never allocates much more than `clusterSize`
   */
  decompress(compressed: Uint8Array, clusterSize: number): MaybePromise<Uint8Array>;
}
