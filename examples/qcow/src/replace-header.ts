// SPDX-License-Identifier: Apache-2.0
/**
 * Puts another header in place of an image's: other extensions, another backing file. Wherever that is stopped, and
 * whatever of it a device has done, the image has the one or the other, as a whole.
 *
 * One write of the first sector switches. What lies behind that sector is durable before, and differs nowhere from
 * what the header in use has there. When there is no way round that, the switch is made twice: to a copy of the new
 * header's parts behind all that is in use, which an extension that means nothing skips to, and from there to where
 * they belong.
 */
import { QcowError } from './errors.js';
import { ExtensionType, encodeHeader, extensionsEnd, type Header } from './format/header.js';
import type { HostFile } from './host/host-file.js';

const SECTOR = 512;

/**
 * @param current what the file has
 * @param next its `backingOffset`, and when there is no other way its table of feature names, are changed
 * @throws QcowError `ERR_TCMU_QCOW_STATE` when it does not fit; FileError
 */
export async function replaceHeader(file: HostFile, current: Header, next: Header): Promise<void> {
  next.extensions = next.extensions.filter(({ type }) => type !== ExtensionType.PADDING);
  const clusterSize = 2 ** current.clusterBits;
  const stored = new Uint8Array(clusterSize);
  await file.read(stored, 0);
  const inUse = { offset: current.backingOffset, length: nameLength(current) };
  const bytes = encodeHeader(next, file.path, inUse);
  const differs = (start: number, end: number) =>
    Buffer.compare(bytes.subarray(start, end), stored.subarray(start, end)) !== 0;
  const nameEnd = inUse.offset + inUse.length;
  if (
    !differs(SECTOR, Math.max(SECTOR, extensionsEnd(current))) &&
    !differs(Math.max(SECTOR, inUse.offset), Math.max(SECTOR, nameEnd))
  ) {
    return switchTo(file, bytes, SECTOR, clusterSize);
  }
  const needed = extensionsEnd(next) + nameLength(next);
  const behind = Math.ceil(Math.max(SECTOR, extensionsEnd(current), nameEnd, needed) / 8) * 8;
  if (behind + needed - next.headerLength <= clusterSize) {
    const data = new Uint8Array(behind - next.headerLength - 8);
    const padding = { type: ExtensionType.PADDING, data };
    const detour = { ...next, extensions: [padding, ...next.extensions] };
    await switchTo(file, encodeHeader(detour, file.path), behind, clusterSize);
    return switchTo(file, encodeHeader(next, file.path), SECTOR, behind);
  }
  // Names of features help only those who don't know the features.
  const bare = next.extensions.filter(({ type }) => type !== ExtensionType.FEATURE_NAMES);
  if (bare.length < next.extensions.length) {
    next.extensions = bare;
    return replaceHeader(file, current, next);
  }
  throw new QcowError(
    'ERR_TCMU_QCOW_STATE',
    `a cluster of ${clusterSize} bytes has no room to replace the header such that a stop leaves the old one or the new one; take a shorter name for the backing file`,
    { path: file.path, structure: 'header', offset: 0 },
  );
}

function nameLength({ backingFile }: Header): number {
  return Buffer.byteLength(backingFile ?? '');
}

/** Bytes `start` to `end` first, then the sector that refers to them. */
async function switchTo(file: HostFile, bytes: Buffer, start: number, end: number): Promise<void> {
  if (end > start) {
    await file.write(bytes.subarray(start, end), start);
    await file.flush();
  }
  await file.write(bytes.subarray(0, SECTOR), 0);
  await file.flush();
}
