// SPDX-License-Identifier: Apache-2.0
/** The bitmaps extension and the directory it points to (specification, "Bitmaps"). */
import { QcowError } from '../errors.js';

export const BitmapFlags = { IN_USE: 1, AUTO: 2, EXTRA_COMPATIBLE: 4 } as const;

export interface BitmapsExtension {
  count: number;
  directorySize: number;
  directoryOffset: number;
}

export interface BitmapEntry {
  /** Byte position of the entry in the directory. */
  readonly at: number;
  tableOffset: number;
  /** Entries of its table, one a cluster of bitmap data. */
  tableSize: number;
  flags: number;
  readonly type: number;
  /** Log 2 of the guest bytes that a bit stands for. */
  readonly granularityBits: number;
  readonly name: string;
  readonly extraLength: number;
}

const FIXED = 24;
export const MAX_DIRECTORY = 64 * 1024 * 1024;

/** @throws QcowError `ERR_TCMU_QCOW_FORMAT` */
export function parseBitmapsExtension(data: Uint8Array, path: string): BitmapsExtension {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const fail = (problem: string) =>
    new QcowError('ERR_TCMU_QCOW_FORMAT', problem, { path, structure: 'bitmaps extension' });
  if (data.length !== 24) throw fail(`${data.length} bytes instead of 24`);
  const count = view.getUint32(0);
  const size = view.getBigUint64(8);
  const offset = view.getBigUint64(16);
  if (count === 0 || count > 65535) throw fail(`${count} bitmaps can't be`);
  if (size > BigInt(MAX_DIRECTORY)) throw fail(`a directory of ${size} bytes is too large`);
  if (offset > BigInt(Number.MAX_SAFE_INTEGER)) throw fail('the directory lies outside any file');
  return { count, directorySize: Number(size), directoryOffset: Number(offset) };
}

/** @throws QcowError `ERR_TCMU_QCOW_FORMAT` */
export function parseBitmapDirectory(
  bytes: Uint8Array,
  { count, directoryOffset }: BitmapsExtension,
  path: string,
): BitmapEntry[] {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const entries: BitmapEntry[] = [];
  let at = 0;
  for (let i = 0; i < count; i++) {
    const fail = (problem: string) =>
      new QcowError('ERR_TCMU_QCOW_FORMAT', problem, {
        path,
        structure: `bitmap directory entry ${i}`,
        offset: directoryOffset + at,
      });
    if (at + FIXED > bytes.length) throw fail('the directory ends before');
    const nameLength = view.getUint16(at + 18);
    const extraLength = view.getUint32(at + 20);
    const end = at + FIXED + extraLength + nameLength;
    if (end > bytes.length) throw fail('it reaches behind the end of the directory');
    const tableOffset = view.getBigUint64(at);
    if (tableOffset > BigInt(Number.MAX_SAFE_INTEGER))
      throw fail('its table lies outside any file');
    entries.push({
      at,
      tableOffset: Number(tableOffset),
      tableSize: view.getUint32(at + 8),
      flags: view.getUint32(at + 12),
      type: view.getUint8(at + 16),
      granularityBits: view.getUint8(at + 17),
      name: Buffer.from(bytes.subarray(at + FIXED + extraLength, end)).toString('utf8'),
      extraLength,
    });
    at = Math.ceil(end / 8) * 8;
  }
  return entries;
}
