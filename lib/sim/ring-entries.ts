/**
 * Decodes ring entries as the kernel wrote them, for comparison and for people. The layout is that of
 * the kernel header <linux/target_core_user.h>.
 */

export interface Segment {
  /** From the start of the mapping. */
  offset: number;
  length: number;
}

export type RingEntry =
  | { op: 'pad'; at: number; length: number }
  | {
      op: 'command';
      /** Offset in the ring. */
      at: number;
      /** Bytes of the entry. */
      length: number;
      id: number;
      kernelFlags: number;
      userFlags: number;
      segments: Segment[];
      bidirectional: Segment[];
      /** From the start of the mapping. */
      cdbOffset: number;
      /** To the end of the entry: zero-padded to a multiple of 8. */
      cdb: Uint8Array;
    }
  | { op: 'task-management'; at: number; length: number; type: number; ids: number[] }
  | { op: 'unknown'; at: number; length: number; code: number };

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
