// SPDX-License-Identifier: Apache-2.0
/**
 * The CRC-32 of two pieces together, from the CRC-32 of each: no byte is read again.
 *
 * A CRC is a polynomial over GF(2) modulo that of IEEE 802.3, bits reflected: appending n bytes multiplies what came before
 * by x^(8n), and adds.
 */
const POLYNOMIAL = 0xedb88320;
/** x^0. */
const ONE = 0x80000000;

/** Product modulo the polynomial. */
function multiply(a: number, b: number): number {
  let product = 0;
  let factor = b;
  for (let bit = ONE; bit !== 0; bit >>>= 1) {
    if ((a & bit) !== 0) product ^= factor;
    factor = (factor & 1) !== 0 ? (factor >>> 1) ^ POLYNOMIAL : factor >>> 1;
  }
  return product >>> 0;
}

/** x^(8n). */
function shiftBy(bytes: number): number {
  let power = 0x00800000;
  let result = ONE;
  for (let left = bytes; left > 0; left = Math.floor(left / 2)) {
    if (left % 2 === 1) result = multiply(result, power);
    power = multiply(power, power);
  }
  return result;
}

/** Pieces are of one size, but for a few. */
let last = { bytes: 0, shift: ONE };

/** @param first CRC-32 of what comes first; @param second of the `bytes` behind it */
export function combineCrc(first: number, second: number, bytes: number): number {
  if (last.bytes !== bytes) last = { bytes, shift: shiftBy(bytes) };
  return (multiply(last.shift, first) ^ second) >>> 0;
}
