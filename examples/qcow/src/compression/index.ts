// SPDX-License-Identifier: Apache-2.0
/** Compression types as the header numbers them. */
import { QcowError } from '../errors.js';
import type { ClusterCodec } from './codec.js';
import { deflate } from './deflate.js';
import { zstd } from './zstd.js';

export type { ClusterCodec } from './codec.js';

/** @throws QcowError `ERR_TCMU_QCOW_UNSUPPORTED` for a type that the format has not (yet) */
export function codecFor(type: number): ClusterCodec {
  if (type === 0) return deflate;
  if (type === 1) return zstd;
  throw new QcowError('ERR_TCMU_QCOW_UNSUPPORTED', `type ${type}; known are 0 (zlib), 1 (zstd)`, {
    structure: 'compression type',
    offset: 104,
  });
}
