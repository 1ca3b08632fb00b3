// SPDX-License-Identifier: Apache-2.0
/**
 * Block ciphers over sectors of 512 bytes: AES in XTS (IEEE 1619) or CBC mode, and how the number of a
 * sector becomes its initialization vector (dm-crypt's plain, plain64, essiv).
 *
 * Setting a cipher up for each sector costs ten times the encryption itself, so XTS, and reading CBC,
 * go through one long-lived AES-ECB cipher of node:crypto per key, a whole request per call; the
 * chaining around it is done here, 32 bits at a time, on little-endian machines as all that Node's
 * binaries of this package are for.
 */
import { type Cipher, createCipheriv, createDecipheriv, createHash, getHashes } from 'node:crypto';

export const SECTOR = 512;
const BLOCK = 16;
const WORDS_PER_SECTOR = SECTOR / 4;

/** In place, over whole sectors; `sector` is the number of the first one. */
export interface SectorCipher {
  encrypt(data: Uint8Array, sector: number): void;
  decrypt(data: Uint8Array, sector: number): void;
}

/** Fills `vectors`, 16 bytes a sector, from `sector` on. */
type VectorMaker = (vectors: Uint8Array, sector: number) => Uint8Array;

/**
 * @param mode as a LUKS header spells it: `xts-plain64`, `cbc-essiv:sha256`
 * @param key of XTS: both keys
 * @throws RangeError naming the mode or key length that is not known here
 */
export function sectorCipher(mode: string, key: Uint8Array): SectorCipher {
  const [, chaining, name, hash] = /^(xts|cbc)-(plain|plain64|essiv)(?::(\w+))?$/.exec(mode) ?? [];
  const keyLength = chaining === 'xts' ? key.length / 2 : key.length;
  if (chaining === undefined || (name === 'essiv') !== (hash !== undefined)) {
    throw new RangeError(`cipher mode ${mode}; known are xts and cbc with plain, plain64, essiv`);
  }
  if (![16, 24, 32].includes(keyLength)) {
    throw new RangeError(`an AES key of ${keyLength} bytes for cipher mode ${mode}`);
  }
  // Of XTS, the first key only: the second makes the tweak.
  const dataKey = key.subarray(0, keyLength);
  const vectors = hash === undefined ? numbers(name === 'plain') : essiv(hash, dataKey);
  return chaining === 'xts'
    ? xts(dataKey, key.subarray(keyLength), vectors)
    : cbc(dataKey, vectors);
}

/** The sector number, little-endian; `plain` has 32 bits of it. */
function numbers(short: boolean): VectorMaker {
  return (vectors, first) => {
    const view = new DataView(vectors.buffer, vectors.byteOffset, vectors.byteLength);
    for (let at = 0, sector = first; at < vectors.length; at += BLOCK, sector++) {
      view.setUint32(at, sector >>> 0, true);
      if (!short) view.setUint32(at + 4, Math.floor(sector / 2 ** 32), true);
    }
    return vectors;
  };
}

/** The number encrypted with the hash of the key. */
function essiv(hash: string, key: Uint8Array): VectorMaker {
  const salt = hashName(hash);
  const encrypt = ecb('encrypt', createHash(salt).update(key).digest());
  const number = numbers(false);
  return (vectors, sector) => encrypt(number(vectors, sector));
}

/** A hash by the name of LUKS headers, as node:crypto has it. @throws RangeError */
export function hashName(name: string): string {
  const known = ['sha1', 'sha224', 'sha256', 'sha384', 'sha512', 'ripemd160'];
  if (known.includes(name) && getHashes().includes(name)) return name;
  throw new RangeError(`hash ${name}; known are ${known.join(', ')}`);
}

/** AES of independent blocks; the returned function may be called for ever. */
function ecb(direction: 'encrypt' | 'decrypt', key: Uint8Array): (data: Uint8Array) => Uint8Array {
  const algorithm = `aes-${8 * key.length}-ecb`;
  const cipher: Pick<Cipher, 'setAutoPadding' | 'update'> =
    direction === 'encrypt'
      ? createCipheriv(algorithm, key, null)
      : createDecipheriv(algorithm, key, null);
  cipher.setAutoPadding(false);
  return (data) => cipher.update(data);
}

/** The bytes as words of this machine: a view where they are aligned, a copy where not. */
function words(bytes: Uint8Array): Uint32Array {
  const aligned = bytes.byteOffset % 4 === 0 ? bytes : new Uint8Array(bytes);
  return new Uint32Array(aligned.buffer, aligned.byteOffset, aligned.length / 4);
}

function bytesOf(array: Uint32Array): Uint8Array {
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
}

function xor(target: Uint32Array, other: Uint32Array): void {
  for (let i = 0; i < target.length; i++) target[i] = (target[i] as number) ^ (other[i] as number);
}

function xts(dataKey: Uint8Array, tweakKey: Uint8Array, vectors: VectorMaker): SectorCipher {
  const encryptTweak = ecb('encrypt', tweakKey);
  const run = (cipher: (data: Uint8Array) => Uint8Array, data: Uint8Array, sector: number) => {
    const sectors = data.length / SECTOR;
    const tweaks = tweakBlocks(
      words(encryptTweak(vectors(new Uint8Array(sectors * BLOCK), sector))),
    );
    const mixed = words(data).slice();
    xor(mixed, tweaks);
    const result = words(cipher(bytesOf(mixed)));
    xor(result, tweaks);
    data.set(bytesOf(result));
  };
  const encryptBlocks = ecb('encrypt', dataKey);
  const decryptBlocks = ecb('decrypt', dataKey);
  return {
    encrypt: (data, sector) => run(encryptBlocks, data, sector),
    decrypt: (data, sector) => run(decryptBlocks, data, sector),
  };
}

/** For each block of each sector the sector's tweak times x^j in GF(2^128) (IEEE 1619-2007 5.2). */
function tweakBlocks(first: Uint32Array): Uint32Array {
  const blocks = new Uint32Array((first.length / 4) * WORDS_PER_SECTOR);
  for (let at = 0, from = 0; from < first.length; from += 4) {
    let a = first[from] as number;
    let b = first[from + 1] as number;
    let c = first[from + 2] as number;
    let d = first[from + 3] as number;
    for (const end = at + WORDS_PER_SECTOR; at < end; at += 4) {
      blocks[at] = a;
      blocks[at + 1] = b;
      blocks[at + 2] = c;
      blocks[at + 3] = d;
      const carry = -(d >>> 31) & 0x87;
      d = (d << 1) | (c >>> 31);
      c = (c << 1) | (b >>> 31);
      b = (b << 1) | (a >>> 31);
      a = (a << 1) ^ carry;
    }
  }
  return blocks;
}

function cbc(key: Uint8Array, vectors: VectorMaker): SectorCipher {
  const algorithm = `aes-${8 * key.length}-cbc`;
  const decryptBlocks = ecb('decrypt', key);
  const vectorsOf = (data: Uint8Array, sector: number) =>
    vectors(new Uint8Array((data.length / SECTOR) * BLOCK), sector);
  return {
    encrypt(data, sector) {
      const all = vectorsOf(data, sector);
      for (let i = 0; i < data.length / SECTOR; i++) {
        const vector = all.subarray(i * BLOCK, (i + 1) * BLOCK);
        const bytes = data.subarray(i * SECTOR, (i + 1) * SECTOR);
        bytes.set(createCipheriv(algorithm, key, vector).setAutoPadding(false).update(bytes));
      }
    },
    decrypt(data, sector) {
      // Each block is chained to the encrypted one before it, each sector's first to its vector.
      const previous = new Uint8Array(data.length);
      previous.set(data.subarray(0, data.length - BLOCK), BLOCK);
      const all = vectorsOf(data, sector);
      for (let i = 0; i < data.length / SECTOR; i++) {
        previous.set(all.subarray(i * BLOCK, (i + 1) * BLOCK), i * SECTOR);
      }
      const result = words(decryptBlocks(data));
      xor(result, words(previous));
      data.set(bytesOf(result));
    },
  };
}
