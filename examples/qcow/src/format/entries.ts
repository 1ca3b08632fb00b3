// SPDX-License-Identifier: Apache-2.0
/**
 * Entries of L1 and L2 tables and of the refcount table, as two big-endian 32-bit halves: faster than
 * 64-bit integers, and enough, since no host file is larger than 2^53 bytes (qcow2 specification,
 * "Cluster mapping", "Extended L2 Entries").
 */
import type { Geometry } from './geometry.js';

/** Bit 63: the refcount is exactly one, so that it may be written in place. */
export const COPIED = 0x80000000;
/** Bit 62 of an L2 entry. */
export const COMPRESSED = 0x40000000;
const HIGH_OFFSET = 0x00ffffff;
const LOW_OFFSET = 0xfffffe00;

/** Where a piece of the guest's disk is. */
export const Kind = {
  /** Not here: the backing file has it, or it reads as zeros. */
  UNALLOCATED: 0,
  ZERO: 1,
  DATA: 2,
  COMPRESSED: 3,
  /** The entry can't be right. */
  INVALID: 4,
} as const;
export type Kind = (typeof Kind)[keyof typeof Kind];

/** Bits 9 to 55. */
export function offsetOf(high: number, low: number): number {
  return (high & HIGH_OFFSET) * 0x100000000 + ((low & LOW_OFFSET) >>> 0);
}

/** Reads the entry at byte `at`: its host offset. */
export function entryOffset(view: DataView, at: number): number {
  return offsetOf(view.getUint32(at), view.getUint32(at + 4));
}

/** Writes a host offset with flags. */
export function putEntry(view: DataView, at: number, offset: number, copied: boolean, low = 0) {
  view.setUint32(at, (Math.floor(offset / 0x100000000) | (copied ? COPIED : 0)) >>> 0);
  view.setUint32(at + 4, ((offset % 0x100000000) | low) >>> 0);
}

/** Where the data of a compressed cluster lies. */
export interface CompressedExtent {
  offset: number;
  /** Bytes up to the end of its last sector. */
  length: number;
}

export function compressedExtent(high: number, low: number, geometry: Geometry): CompressedExtent {
  const shift = geometry.compressedShift;
  const descriptor = ((BigInt(high) & 0x3fffffffn) << 32n) | BigInt(low);
  const offset = descriptor & ((1n << BigInt(shift)) - 1n);
  const sectors = Number(descriptor >> BigInt(shift)) + 1;
  const start = Number(offset);
  return { offset: start, length: sectors * 512 - (start % 512) };
}

/** The descriptor of compressed data of `length` bytes at `offset`. */
export function putCompressed(
  view: DataView,
  at: number,
  { offset, length }: CompressedExtent,
  geometry: Geometry,
): void {
  const sectors = Math.floor((offset + length - 1) / 512) - Math.floor(offset / 512);
  const descriptor =
    (BigInt(COMPRESSED) << 32n) |
    (BigInt(sectors) << BigInt(geometry.compressedShift)) |
    BigInt(offset);
  view.setBigUint64(at, descriptor);
}

/**
 * Calls `visit` for each host cluster that an L2 entry at byte `at` refers to: none, one, or for
 * compressed data up to two or three.
 * @param flags called for a standard cluster with the byte position of its entry
 */
export function eachReference(
  view: DataView,
  at: number,
  geometry: Geometry,
  visit: (cluster: number, standard: boolean) => void,
): void {
  const high = view.getUint32(at);
  const low = view.getUint32(at + 4);
  if ((high & COMPRESSED) !== 0) {
    const { offset, length } = compressedExtent(high, low, geometry);
    const last = Math.floor((offset + length - 1) / geometry.clusterSize);
    for (let c = Math.floor(offset / geometry.clusterSize); c <= last; c++) visit(c, false);
    return;
  }
  if (geometry.dataFile) return;
  const offset = offsetOf(high, low);
  if (offset !== 0) visit(Math.floor(offset / geometry.clusterSize), true);
}
