// SPDX-License-Identifier: Apache-2.0
/**
 * Decodes ring entries as the kernel wrote them, for comparison and for people. The layout is that of
 * the kernel header <linux/target_core_user.h>.
 */

export interface Segment {
  /** Bytes from the start of the mapping. */
  offset: number;
  /** Bytes. */
  length: number;
}

/**
 * One entry of the command ring (`struct tcmu_cmd_entry`, `struct tcmu_tmr_entry`), by its `op`.
 */
export type RingEntry =
  | {
      /** Filling up to the ring's end. */
      op: 'pad';
      /** Bytes from the start of the ring. */
      at: number;
      /** Bytes of the entry. */
      length: number;
    }
  | {
      /** A SCSI command. */
      op: 'command';
      /** Bytes from the start of the ring. */
      at: number;
      /** Bytes of the entry. */
      length: number;
      /** `cmd_id`. */
      id: number;
      /** `kflags`. */
      kernelFlags: number;
      /** `uflags`. */
      userFlags: number;
      /** Its buffer: Data-Out of a bidirectional command. */
      segments: Segment[];
      /** Data-In of a bidirectional command, else empty. */
      bidirectional: Segment[];
      /** Bytes from the start of the mapping. */
      cdbOffset: number;
      /** To the end of the entry: zero-padded to a multiple of 8. */
      cdb: Uint8Array;
    }
  | {
      /** Notice of a task management function. */
      op: 'task-management';
      /** Bytes from the start of the ring. */
      at: number;
      /** Bytes of the entry. */
      length: number;
      /** `tmr_type`. */
      type: number;
      /** `cmd_id` of each command that it ended. */
      ids: number[];
    }
  | {
      /** A kind that the header does not have. */
      op: 'unknown';
      /** Bytes from the start of the ring. */
      at: number;
      /** Bytes of the entry. */
      length: number;
      /** The low three bits of `len_op`. */
      code: number;
    };

const MAILBOX_BYTES = 128;
const IOV = 48;

/** @param bytes whole entries, of which the first is at `from` in the ring */
export function decodeEntries(bytes: Uint8Array, from: number, ringSize: number): RingEntry[] {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const entries: RingEntry[] = [];
  for (let start = 0; start < bytes.length; ) {
    const word = view.getUint32(start, true);
    const code = word & 7;
    const length = (word & ~7) >>> 0;
    const at = (from + start) % ringSize;
    if (code === 0) entries.push({ op: 'pad', at, length });
    else if (code === 1) entries.push(decodeCommand(view, start, at, length));
    else if (code === 2) {
      const ids: number[] = [];
      const count = view.getUint32(start + 12, true);
      for (let i = 0; i < count; i++) ids.push(view.getUint16(start + 32 + 2 * i, true));
      entries.push({ op: 'task-management', at, length, type: view.getUint8(start + 8), ids });
    } else entries.push({ op: 'unknown', at, length, code });
    if (length < 8) break; // damaged: nothing can be found behind it
    start += length;
  }
  return entries;
}

function decodeCommand(view: DataView, start: number, at: number, length: number): RingEntry {
  const count = view.getUint32(start + 8, true);
  const bidi = view.getUint32(start + 12, true);
  const all: Segment[] = [];
  for (let i = 0; i < count + bidi; i++) {
    const iov = start + IOV + 16 * i;
    all.push({
      offset: Number(view.getBigUint64(iov, true)),
      length: Number(view.getBigUint64(iov + 8, true)),
    });
  }
  const cdbOffset = Number(view.getBigUint64(start + 24, true));
  const cdbStart = start + cdbOffset - MAILBOX_BYTES - at;
  return {
    op: 'command',
    at,
    length,
    id: view.getUint16(start + 4, true),
    kernelFlags: view.getUint8(start + 6),
    userFlags: view.getUint8(start + 7),
    segments: all.slice(0, count),
    bidirectional: all.slice(count),
    cdbOffset,
    cdb: new Uint8Array(
      view.buffer.slice(view.byteOffset + cdbStart, view.byteOffset + start + length),
    ),
  };
}
