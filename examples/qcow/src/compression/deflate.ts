// SPDX-License-Identifier: Apache-2.0
/**
 * Compression type 0: a raw deflate stream (RFC 1951) without zlib's header and checksum. QEMU keeps
 * and expects a window of 4 KiB, so that is what is written; any window is read. Runs in the thread pool.
 */
import { promisify } from 'node:util';
import { constants, deflateRaw, inflateRaw, type ZlibOptions } from 'node:zlib';
import type { ClusterCodec } from './codec.js';
import { damaged } from './damaged.js';

const QEMU_WINDOW_BITS = 12;

const inflate = promisify<Uint8Array, ZlibOptions, Uint8Array>(inflateRaw);
const pack = promisify<Uint8Array, ZlibOptions, Uint8Array>(deflateRaw);

export const deflate: ClusterCodec = {
  name: 'zlib',

  async compress(cluster) {
    const packed = await pack(cluster, { windowBits: QEMU_WINDOW_BITS, memLevel: 9 });
    return packed.length < cluster.length ? packed : undefined;
  },

  async decompress(compressed, clusterSize) {
    let bytes: Uint8Array;
    try {
      bytes = await inflate(compressed, {
        chunkSize: clusterSize,
        maxOutputLength: clusterSize,
        // What counts is whether the cluster is full, not whether the stream has its end block.
        finishFlush: constants.Z_SYNC_FLUSH,
      });
    } catch (cause) {
      throw damaged(`the deflate stream is damaged: ${(cause as Error).message}`, cause);
    }
    if (bytes.length === clusterSize) return bytes;
    throw damaged(`the deflate stream holds ${bytes.length} of ${clusterSize} bytes`);
  },
};
