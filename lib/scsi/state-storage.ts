// SPDX-License-Identifier: Apache-2.0
/** What a unit keeps over restarts, and where: its owner's business, in a file beside the disk, say. */
import type { MaybePromise } from '../device/data.js';

/** Keeps a few bytes over restarts. They are opaque. */
export interface StateStorage {
  /** What was saved last; undefined when nothing was. */
  load(): MaybePromise<Uint8Array | undefined>;
  /** Must be durable when it settles. No bytes: there is nothing to keep any more. */
  save(state: Uint8Array): MaybePromise<unknown>;
}
