// SPDX-License-Identifier: Apache-2.0
/** What is remembered of a segment in the bucket, to read its data a frame at a time. */
import type { BlobHeader, FrameTable } from './blob.js';

export interface SegmentFacts {
  readonly header: BlobHeader;
  /** Frame 0 is the list of changes, frame i + 1 the data from i times the frame size on. */
  readonly table: FrameTable;
}
