// SPDX-License-Identifier: Apache-2.0
/**
 * Compression type 1: Zstandard frames (RFC 8878).
 *
 * Node's own zstd came with 22.15, so the reference implementation compiled to WebAssembly is used on
 * every version: `@bokuweb/zstd-wasm` has both directions, no install script and no dependency, and
 * whatever a hostile frame does to it stays inside its sandbox. It is loaded at first use. What it would
 * take on trust, the size that a frame says it has, is checked here first, and the frame is cut from
 * what lies behind it, since a cluster's last sector belongs to others, too.
 */
import type { ClusterCodec } from './codec.js';
import { damaged } from './damaged.js';

type Library = typeof import('@bokuweb/zstd-wasm');

let library: Promise<Library> | undefined;

function load(): Promise<Library> {
  library ??= import('@bokuweb/zstd-wasm').then(async (module) => {
    await module.init();
    return module;
  });
  return library;
}

const LEVEL = 3;

export const zstd: ClusterCodec = {
  name: 'zstd',

  async compress(cluster) {
    const packed = (await load()).compress(cluster, LEVEL);
    return packed.length < cluster.length ? packed : undefined;
  },

  async decompress(compressed, clusterSize) {
    const { decompress } = await load();
    const cluster = new Uint8Array(clusterSize);
    let filled = 0;
    for (let start = 0; filled < clusterSize; ) {
      const room = clusterSize - filled;
      const end = frameEnd(compressed, start, room);
      let bytes: Uint8Array;
      try {
        bytes = decompress(compressed.subarray(start, end), { defaultHeapSize: room });
      } catch (cause) {
        throw damaged(`the zstd frame is damaged: ${(cause as Error).message}`, cause);
      }
      cluster.set(bytes, filled);
      filled += bytes.length;
      start = end;
    }
    return cluster;
  },
};

const MAGIC = 0xfd2fb528;
const RLE_BLOCK = 1;
const RESERVED_BLOCK = 3;

/** End of the frame that starts at `start` (RFC 8878 3.1.1), which says of itself to need at most `room` bytes. */
function frameEnd(bytes: Uint8Array, start: number, room: number): number {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  try {
    if (view.getUint32(start, true) !== MAGIC) throw damaged('no zstd frame where one must begin');
    const descriptor = view.getUint8(start + 4);
    const singleSegment = (descriptor >> 5) & 1;
    const dictionaryBytes = (descriptor & 3) === 3 ? 4 : descriptor & 3;
    const sizeFlag = descriptor >> 6;
    const sizeBytes = sizeFlag === 0 ? singleSegment : 1 << sizeFlag;
    let at = start + 5 + (1 - singleSegment) + dictionaryBytes;
    const size = contentSize(view, at, sizeBytes);
    if (size > room) throw damaged(`the zstd frame says it holds ${size} bytes, more than ${room}`);
    at += sizeBytes;
    for (let last = 0; !last; ) {
      const header = view.getUint16(at, true) | (view.getUint8(at + 2) << 16);
      const type = (header >> 1) & 3;
      if (type === RESERVED_BLOCK) throw damaged('the zstd frame has a block of a reserved type');
      last = header & 1;
      at += 3 + (type === RLE_BLOCK ? 1 : header >> 3);
    }
    if (descriptor & 4) at += 4;
    if (at > bytes.length) throw new RangeError();
    return at;
  } catch (error) {
    if (error instanceof RangeError) throw damaged('the zstd frame goes on behind its sectors');
    throw error;
  }
}

/** 0 when the frame does not say. */
function contentSize(view: DataView, at: number, sizeBytes: number): number {
  switch (sizeBytes) {
    case 0:
      return 0;
    case 1:
      return view.getUint8(at);
    case 2:
      return view.getUint16(at, true) + 256;
    case 4:
      return view.getUint32(at, true);
    default:
      return Number(view.getBigUint64(at, true));
  }
}
