// SPDX-License-Identifier: Apache-2.0
/** A store that only reads: the device reports write protection, and nothing reaches the inner store. */
import { FileError } from '../errors.js';
import type { BlockStore } from './block-store.js';
import { StoreMiddleware } from './middleware.js';

class ReadOnlyStore extends StoreMiddleware {
  constructor(inner: BlockStore) {
    super(inner);
    this.hide('flush', 'unmap', 'writeZeroes', 'writeSame', 'compareAndWrite', 'cryptoErase');
    this.hide('resize');
  }

  override get readOnly(): boolean {
    return true;
  }

  override get writeCache(): boolean {
    return false;
  }

  override write(): never {
    throw new FileError('ERR_TCMU_IO', 'write: the store is read-only', {
      operation: 'write',
      errno: 'EROFS',
    });
  }
}

/** `store`, without any way to change it. */
export function readOnly(store: BlockStore): BlockStore {
  return new ReadOnlyStore(store);
}
