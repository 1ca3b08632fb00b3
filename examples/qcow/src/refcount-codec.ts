// SPDX-License-Identifier: Apache-2.0
/** Refcounts of every width, 1 to 64 bits, packed as the specification says ("Refcount block entry"). */

/** More references than any image can hold: what a larger stored value is read as. */
export const MANY = Number.MAX_SAFE_INTEGER;

/** The refcount at `index` of a block or a slice of one. */
export function readRefcount(view: DataView, index: number, bits: number): number {
  switch (bits) {
    case 64: {
      const high = view.getUint32(index * 8);
      return high > 0x1fffff ? MANY : high * 0x100000000 + view.getUint32(index * 8 + 4);
    }
    case 32:
      return view.getUint32(index * 4);
    case 16:
      return view.getUint16(index * 2);
    case 8:
      return view.getUint8(index);
    default: {
      const perByte = 8 / bits;
      const shift = (index % perByte) * bits;
      return (view.getUint8(Math.floor(index / perByte)) >> shift) & (2 ** bits - 1);
    }
  }
}

/** Sets it. @returns first and last byte + 1 of what changed, as [start, end) */
export function writeRefcount(
  view: DataView,
  index: number,
  bits: number,
  value: number,
): readonly [start: number, end: number] {
  switch (bits) {
    case 64:
      view.setUint32(index * 8, Math.floor(value / 0x100000000));
      view.setUint32(index * 8 + 4, value % 0x100000000);
      return [index * 8, index * 8 + 8];
    case 32:
      view.setUint32(index * 4, value);
      return [index * 4, index * 4 + 4];
    case 16:
      view.setUint16(index * 2, value);
      return [index * 2, index * 2 + 2];
    case 8:
      view.setUint8(index, value);
      return [index, index + 1];
    default: {
      const perByte = 8 / bits;
      const at = Math.floor(index / perByte);
      const shift = (index % perByte) * bits;
      const mask = (2 ** bits - 1) << shift;
      view.setUint8(at, (view.getUint8(at) & ~mask) | (value << shift));
      return [at, at + 1];
    }
  }
}

/** The largest refcount of a width. */
export function maxRefcount(bits: number): number {
  return bits === 64 ? MANY - 1 : 2 ** bits - 1;
}
