// SPDX-License-Identifier: Apache-2.0
/** The snapshot table: entries of variable length, one behind the other (specification, "Snapshots"). */
import { QcowError } from '../errors.js';

export interface Snapshot {
  /** Unique; a decimal number in images made by QEMU and by this package. */
  id: string;
  name: string;
  l1Offset: number;
  l1Size: number;
  /** When it was taken. */
  date: { seconds: number; nanoseconds: number };
  /** How long the guest had been running, in nanoseconds. */
  guestClock: bigint;
  /** Bytes of saved machine state behind the end of the disk. */
  vmStateSize: bigint;
  /** Virtual disk size then; undefined in old images. */
  diskSize: number | undefined;
  /** Extra data behind the known fields, kept. */
  unknownExtra: Uint8Array;
  /** Instructions executed, for record and replay; all ones when that was off. */
  icount: bigint | undefined;
}

/** More extra data or longer tables are refused: they would let an image claim any amount of memory. */
const MAX_EXTRA = 1024;
export const MAX_SNAPSHOT_TABLE = 64 * 1024 * 1024;
const FIXED = 40;

/**
 * Entries from as much of the table as `bytes` holds.
 * @returns the snapshots and how many bytes they take; undefined when `bytes` ends before
 * @throws QcowError `ERR_TCMU_QCOW_FORMAT`
 */
export function parseSnapshots(
  bytes: Uint8Array,
  count: number,
  where: { path: string; offset: number; clusterSize: number },
): { snapshots: Snapshot[]; length: number } | undefined {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const snapshots: Snapshot[] = [];
  let at = 0;
  for (let i = 0; i < count; i++) {
    const fail = (problem: string) =>
      new QcowError('ERR_TCMU_QCOW_FORMAT', problem, {
        path: where.path,
        structure: `snapshot table entry ${i}`,
        offset: where.offset + at,
      });
    if (at + FIXED > bytes.length) return undefined;
    const l1Offset = view.getBigUint64(at);
    const l1Size = view.getUint32(at + 8);
    const idLength = view.getUint16(at + 12);
    const nameLength = view.getUint16(at + 14);
    const extraLength = view.getUint32(at + 36);
    if (extraLength > MAX_EXTRA) throw fail(`${extraLength} bytes of extra data are too many`);
    const end = at + FIXED + extraLength + idLength + nameLength;
    if (end > bytes.length) return undefined;
    if (l1Offset > BigInt(Number.MAX_SAFE_INTEGER) || Number(l1Offset) % where.clusterSize !== 0) {
      throw fail(`its L1 table at 0x${l1Offset.toString(16)} is on no cluster boundary`);
    }
    if (l1Size * 8 > 32 * 1024 * 1024) throw fail(`an L1 table of ${l1Size} entries is too large`);
    const extra = at + FIXED;
    const diskSize = extraLength >= 16 ? view.getBigUint64(extra + 8) : undefined;
    if (diskSize !== undefined && diskSize > BigInt(Number.MAX_SAFE_INTEGER)) {
      throw fail(`a disk of ${diskSize} bytes can't be`);
    }
    const text = Buffer.from(bytes.buffer, bytes.byteOffset + extra + extraLength);
    snapshots.push({
      id: text.toString('utf8', 0, idLength),
      name: text.toString('utf8', idLength, idLength + nameLength),
      l1Offset: Number(l1Offset),
      l1Size,
      date: { seconds: view.getUint32(at + 16), nanoseconds: view.getUint32(at + 20) },
      guestClock: view.getBigUint64(at + 24),
      vmStateSize: extraLength >= 8 ? view.getBigUint64(extra) : BigInt(view.getUint32(at + 32)),
      diskSize: diskSize === undefined ? undefined : Number(diskSize),
      icount: extraLength >= 24 ? view.getBigUint64(extra + 16) : undefined,
      unknownExtra: bytes.slice(extra + Math.min(24, extraLength), extra + extraLength),
    });
    at = Math.ceil(end / 8) * 8;
  }
  return { snapshots, length: at };
}

export function encodeSnapshots(snapshots: readonly Snapshot[]): Uint8Array {
  return Buffer.concat(snapshots.map(encodeSnapshot));
}

function encodeSnapshot(snapshot: Snapshot): Buffer {
  const id = Buffer.from(snapshot.id);
  const name = Buffer.from(snapshot.name);
  const known = snapshot.icount !== undefined ? 24 : snapshot.diskSize !== undefined ? 16 : 8;
  const extraLength = known + snapshot.unknownExtra.length;
  const end = FIXED + extraLength + id.length + name.length;
  const bytes = Buffer.alloc(Math.ceil(end / 8) * 8);
  bytes.writeBigUInt64BE(BigInt(snapshot.l1Offset), 0);
  bytes.writeUInt32BE(snapshot.l1Size, 8);
  bytes.writeUInt16BE(id.length, 12);
  bytes.writeUInt16BE(name.length, 14);
  bytes.writeUInt32BE(snapshot.date.seconds, 16);
  bytes.writeUInt32BE(snapshot.date.nanoseconds, 20);
  bytes.writeBigUInt64BE(snapshot.guestClock, 24);
  bytes.writeUInt32BE(Number(snapshot.vmStateSize & 0xffffffffn), 32);
  bytes.writeUInt32BE(extraLength, 36);
  bytes.writeBigUInt64BE(snapshot.vmStateSize, FIXED);
  if (known >= 16) bytes.writeBigUInt64BE(BigInt(snapshot.diskSize ?? 0), FIXED + 8);
  if (known >= 24) bytes.writeBigUInt64BE(snapshot.icount ?? 0n, FIXED + 16);
  bytes.set(snapshot.unknownExtra, FIXED + known);
  bytes.set(id, FIXED + extraLength);
  bytes.set(name, FIXED + extraLength + id.length);
  return bytes;
}
