// SPDX-License-Identifier: Apache-2.0
/**
 * LUKS's anti-forensic splitter (LUKS on-disk format 1.2.3, 2.4): a key blown up to `stripes` times
 * its size, such that losing any part of that loses the key.
 */
import { createHash, randomBytes } from 'node:crypto';

/** @param hash as node:crypto names it */
export function split(key: Uint8Array, stripes: number, hash: string): Uint8Array {
  const parts = randomBytes(key.length * stripes);
  const last = parts.subarray(-key.length);
  last.set(mixed(parts.subarray(0, -key.length), key.length, hash));
  xorInto(last, key);
  return parts;
}

export function merge(parts: Uint8Array, keyBytes: number, hash: string): Uint8Array {
  const key = mixed(parts.subarray(0, -keyBytes), keyBytes, hash);
  xorInto(key, parts.subarray(-keyBytes));
  return key;
}

/** All stripes but the last, each xored into what was before and spread. */
function mixed(stripes: Uint8Array, keyBytes: number, hash: string): Uint8Array {
  let state: Uint8Array = new Uint8Array(keyBytes);
  for (let at = 0; at < stripes.length; at += keyBytes) {
    xorInto(state, stripes.subarray(at, at + keyBytes));
    state = spread(state, hash);
  }
  return state;
}

/** Each piece of a digest's length is replaced by the hash of its number and itself. */
function spread(state: Uint8Array, hash: string): Uint8Array {
  const result = new Uint8Array(state.length);
  const number = Buffer.alloc(4);
  for (let at = 0, piece = 0; at < state.length; piece++) {
    number.writeUInt32BE(piece);
    const { length } = createHash(hash).digest();
    const digest = createHash(hash)
      .update(number)
      .update(state.subarray(at, at + length))
      .digest();
    result.set(digest.subarray(0, state.length - at), at);
    at += length;
  }
  return result;
}

function xorInto(target: Uint8Array, other: Uint8Array): void {
  for (let i = 0; i < target.length; i++) target[i] = (target[i] as number) ^ (other[i] as number);
}
