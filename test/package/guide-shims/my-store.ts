// SPDX-License-Identifier: Apache-2.0
/** The store that the guides' tests are about. */
import { MemoryStore } from 'tcmu/store';

export class MyStore extends MemoryStore {
  constructor() {
    super({ size: 1 << 20 });
  }
}
