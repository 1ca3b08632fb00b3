// SPDX-License-Identifier: Apache-2.0
/** What follows from the header's fields and never changes while an image is open. */
import { type Header, hasFeature, Incompatible } from './header.js';

/** Tables are cached in slices of at most this size, so that large clusters don't mean large reads. */
const MAX_SLICE = 64 * 1024;

export interface Geometry {
  readonly version: 2 | 3;
  readonly clusterBits: number;
  readonly clusterSize: number;
  /** L2 entries are extended: 32 subclusters each. */
  readonly extended: boolean;
  /** The unit of allocation as L2 entries see it: a cluster, or a 32nd of it. */
  readonly subclusterSize: number;
  /** 8 or 16 bytes. */
  readonly l2EntrySize: number;
  readonly l2Entries: number;
  /** Guest bytes that one L2 table maps. */
  readonly l2Coverage: number;
  /** Bytes of a slice of an L2 table or refcount block. */
  readonly sliceSize: number;
  readonly sliceEntries: number;
  /** Guest bytes that one slice of an L2 table maps. */
  readonly sliceCoverage: number;
  /** Width of a refcount. */
  readonly refcountBits: number;
  /** Refcounts in one block. */
  readonly refcountsPerBlock: number;
  /** Refcounts in one slice of a block. */
  readonly refcountsPerSlice: number;
  /** Guest data lies in another file, guest offset for offset. */
  readonly dataFile: boolean;
  /** Bit position of the sector count in a compressed cluster's descriptor. */
  readonly compressedShift: number;
}

export function geometryOf(header: Header): Geometry {
  const { clusterBits, version, refcountOrder } = header;
  const clusterSize = 2 ** clusterBits;
  const extended = hasFeature(header.incompatible, Incompatible.EXTENDED_L2);
  const l2EntrySize = extended ? 16 : 8;
  const l2Entries = clusterSize / l2EntrySize;
  const sliceSize = Math.min(clusterSize, MAX_SLICE);
  const sliceEntries = sliceSize / l2EntrySize;
  const refcountBits = 2 ** refcountOrder;
  return {
    version,
    clusterBits,
    clusterSize,
    extended,
    subclusterSize: extended ? clusterSize / 32 : clusterSize,
    l2EntrySize,
    l2Entries,
    l2Coverage: l2Entries * clusterSize,
    sliceSize,
    sliceEntries,
    sliceCoverage: sliceEntries * clusterSize,
    refcountBits,
    refcountsPerBlock: (clusterSize * 8) / refcountBits,
    refcountsPerSlice: (sliceSize * 8) / refcountBits,
    dataFile: hasFeature(header.incompatible, Incompatible.DATA_FILE),
    compressedShift: 62 - (clusterBits - 8),
  };
}
