// SPDX-License-Identifier: Apache-2.0
/**
 * Encryption method 2: LUKS version 1 (LUKS on-disk format 1.2.3) in the crypto header's clusters, as
 * QEMU writes it. The master key encrypts the data; each of eight key slots holds it encrypted with a
 * passphrase, split into stripes so that wiping a slot really destroys it.
 *
 * The functions work on the header's bytes in memory and say what is to be written; offsets are relative
 * to its start. The initialization vector of data counts sectors of the host file (qcow2's
 * specification, "Data encryption"), that of key material those of its slot.
 *
 * A hostile header can name no more than `MAX_ITERATIONS` of key stretching, which bounds the time that
 * one guess of a passphrase takes, and no key material outside its own bytes.
 */
import { pbkdf2, randomBytes, randomUUID, timingSafeEqual } from 'node:crypto';
import { promisify } from 'node:util';
import { QcowError, type QcowErrorCode } from '../errors.js';
import { merge, split } from './af-splitter.js';
import { type DataCipher, passphraseBytes } from './cipher.js';
import { hashName, SECTOR, type SectorCipher, sectorCipher } from './sector-cipher.js';

const stretch = promisify(pbkdf2);

const MAGIC = Buffer.from('LUKS\xba\xbe', 'latin1');
const HEADER_BYTES = 592;
const SLOTS = 8;
const SLOTS_AT = 208;
const SLOT_BYTES = 48;
const ENABLED = 0x00ac71f3;
const DISABLED = 0x0000dead;
const DIGEST_BYTES = 20;
const SALT_BYTES = 32;
const STRIPES = 4000;
const KEY_MATERIAL_ALIGNMENT = 4096;
const MIN_ITERATIONS = 1000;
const MAX_ITERATIONS = 1 << 26;

export interface LuksSlot {
  readonly active: boolean;
  readonly iterations: number;
  readonly salt: Uint8Array;
  /** In bytes, from the start of the header. */
  readonly keyOffset: number;
  readonly stripes: number;
}

/** What a header says, without any secret. */
export interface LuksInfo {
  /** `aes` */
  readonly cipher: string;
  /** `xts-plain64` */
  readonly mode: string;
  /** `sha256` */
  readonly hash: string;
  readonly keyBytes: number;
  readonly uuid: string;
  readonly payloadOffset: number;
  readonly masterKeyIterations: number;
  readonly slots: readonly LuksSlot[];
}

export interface LuksOptions {
  /** Bits of the AES key: 128, 192 or 256 (default). */
  keyBits?: 128 | 192 | 256;
  /** `xts-plain64` (default), `cbc-essiv:sha256` … */
  mode?: string;
  /** For key stretching and splitting. Default `sha256`. */
  hash?: string;
  /** Milliseconds that a guess of the passphrase shall take on this machine. Default 2000. */
  iterationTime?: number;
}

/** Bytes to be written into the header. */
export interface LuksChange {
  readonly offset: number;
  readonly bytes: Uint8Array;
}

/**
 * @param header all bytes of the crypto header
 * @throws QcowError `ERR_TCMU_QCOW_FORMAT`, or `_UNSUPPORTED` for ciphers, modes and hashes that are not
 *   done here (structure `LUKS header`)
 */
export function readLuks(header: Uint8Array, path?: string): LuksInfo {
  const bytes = Buffer.from(header.buffer, header.byteOffset, header.byteLength);
  const bad = (problem: string, offset: number, code: QcowErrorCode = 'ERR_TCMU_QCOW_FORMAT') =>
    new QcowError(code, problem, { path, structure: 'LUKS header', offset });
  if (bytes.length < HEADER_BYTES) throw bad(`${bytes.length} bytes, it needs ${HEADER_BYTES}`, 0);
  if (!bytes.subarray(0, MAGIC.length).equals(MAGIC)) throw bad('it has no LUKS magic', 0);
  const version = bytes.readUInt16BE(6);
  if (version !== 1) throw bad(`version ${version}, known is 1`, 6, 'ERR_TCMU_QCOW_UNSUPPORTED');

  const iterations = (offset: number): number => {
    const count = bytes.readUInt32BE(offset);
    if (count >= 1 && count <= MAX_ITERATIONS) return count;
    throw bad(`${count} iterations of key stretching, allowed are 1 to ${MAX_ITERATIONS}`, offset);
  };
  const keyBytes = bytes.readUInt32BE(108);
  const slots = Array.from({ length: SLOTS }, (_, i): LuksSlot => {
    const at = SLOTS_AT + i * SLOT_BYTES;
    const state = bytes.readUInt32BE(at);
    if (state !== ENABLED && state !== DISABLED) {
      throw bad(`state 0x${state.toString(16)} of key slot ${i}`, at);
    }
    const slot = {
      active: state === ENABLED,
      iterations: state === ENABLED ? iterations(at + 4) : bytes.readUInt32BE(at + 4),
      salt: bytes.subarray(at + 8, at + 8 + SALT_BYTES),
      keyOffset: bytes.readUInt32BE(at + 40) * SECTOR,
      stripes: bytes.readUInt32BE(at + 44),
    };
    const end = slot.keyOffset + slot.stripes * keyBytes;
    if (slot.stripes < 1 || slot.keyOffset < HEADER_BYTES || end > bytes.length) {
      throw bad(`key material of slot ${i} lies at ${slot.keyOffset} to ${end}, outside`, at + 40);
    }
    return slot;
  });
  const byOffset = slots.toSorted((a, b) => a.keyOffset - b.keyOffset);
  for (const [i, { keyOffset, stripes }] of byOffset.entries()) {
    const next = byOffset[i + 1];
    if (next !== undefined && keyOffset + stripes * keyBytes > next.keyOffset) {
      throw bad(`key material at ${keyOffset} and at ${next.keyOffset} overlaps`, SLOTS_AT);
    }
  }
  const info: LuksInfo = {
    cipher: text(bytes, 8, 32),
    mode: text(bytes, 40, 32),
    hash: text(bytes, 72, 32),
    keyBytes,
    uuid: text(bytes, 168, 40),
    payloadOffset: bytes.readUInt32BE(104) * SECTOR,
    masterKeyIterations: iterations(164),
    slots,
  };
  try {
    if (info.cipher !== 'aes') throw new RangeError(`cipher ${info.cipher}; known is aes`);
    hashName(info.hash);
    sectorCipher(info.mode, new Uint8Array(keyBytes));
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw bad(error.message, 8, 'ERR_TCMU_QCOW_UNSUPPORTED');
  }
  return info;
}

function text(bytes: Buffer, offset: number, length: number): string {
  const field = bytes.subarray(offset, offset + length);
  const end = field.indexOf(0);
  return field.toString('latin1', 0, end < 0 ? length : end);
}

/**
 * Tries the passphrase on every active slot.
 * @throws QcowError `ERR_TCMU_QCOW_PASSPHRASE` when it opens none; what `readLuks` throws
 */
export async function openLuks(
  header: Uint8Array,
  passphrase: string | Uint8Array,
  path?: string,
): Promise<DataCipher> {
  const info = readLuks(header, path);
  const { key } = await unlock(header, info, passphrase, path);
  return dataCipher(sectorCipher(info.mode, key));
}

/** A new header with one key slot in use, all of what is stored, and the cipher of the data. */
export async function createLuks(
  passphrase: string | Uint8Array,
  options: LuksOptions = {},
): Promise<{ header: Uint8Array; cipher: DataCipher }> {
  const { keyBits = 256, mode = 'xts-plain64', hash = 'sha256', iterationTime = 2000 } = options;
  const keyBytes = (keyBits / 8) * (mode.startsWith('xts') ? 2 : 1);
  const slotBytes =
    Math.ceil((keyBytes * STRIPES) / KEY_MATERIAL_ALIGNMENT) * KEY_MATERIAL_ALIGNMENT;
  const header = Buffer.alloc(KEY_MATERIAL_ALIGNMENT + SLOTS * slotBytes);
  const key = randomBytes(keyBytes);
  const salt = randomBytes(SALT_BYTES);
  const speed = await iterationsPerMillisecond(hash, keyBytes);
  // Its input is a random key, so the digest needs far less stretching than a passphrase does.
  const iterations = clampIterations((speed * iterationTime) / 8);
  MAGIC.copy(header);
  header.writeUInt16BE(1, 6);
  header.write('aes', 8, 'latin1');
  header.write(mode, 40, 'latin1');
  header.write(hash, 72, 'latin1');
  header.writeUInt32BE(header.length / SECTOR, 104);
  header.writeUInt32BE(keyBytes, 108);
  header.set(await digestOf(key, salt, iterations, hash), 112);
  header.set(salt, 132);
  header.writeUInt32BE(iterations, 164);
  header.write(randomUUID(), 168, 'latin1');
  for (let i = 0; i < SLOTS; i++) {
    const at = SLOTS_AT + i * SLOT_BYTES;
    header.writeUInt32BE(DISABLED, at);
    header.writeUInt32BE((KEY_MATERIAL_ALIGNMENT + i * slotBytes) / SECTOR, at + 40);
    header.writeUInt32BE(STRIPES, at + 44);
  }
  for (const { offset, bytes } of await fillSlot(header, 0, key, passphrase, iterationTime)) {
    header.set(bytes, offset);
  }
  return { header, cipher: dataCipher(sectorCipher(mode, key)) };
}

/**
 * Lets a second passphrase open the image. The changes are to be written in their order, each durable
 * before the next: a slot is switched on after its key material is there.
 * @throws QcowError `ERR_TCMU_QCOW_PASSPHRASE` when `passphrase` opens nothing; `_STATE` when all slots are in use
 */
export async function addLuksKey(
  header: Uint8Array,
  passphrase: string | Uint8Array,
  added: string | Uint8Array,
  options: Pick<LuksOptions, 'iterationTime'> & { path?: string } = {},
): Promise<{ slot: number; changes: LuksChange[] }> {
  const info = readLuks(header, options.path);
  const { key } = await unlock(header, info, passphrase, options.path);
  const slot = info.slots.findIndex(({ active }) => !active);
  if (slot < 0) throw stateError('all eight key slots are in use; remove one first', options.path);
  const copy = Buffer.from(header);
  return { slot, changes: await fillSlot(copy, slot, key, added, options.iterationTime ?? 2000) };
}

/**
 * Takes a passphrase away. The changes are to be written in their order, each durable before the next: the
 * slot is switched off first, then its key material is overwritten.
 * @throws QcowError `ERR_TCMU_QCOW_PASSPHRASE` when it opens nothing; `_STATE` when it is the last one
 */
export async function removeLuksKey(
  header: Uint8Array,
  passphrase: string | Uint8Array,
  path?: string,
): Promise<{ slot: number; changes: LuksChange[] }> {
  const info = readLuks(header, path);
  const { slot } = await unlock(header, info, passphrase, path);
  if (info.slots.filter(({ active }) => active).length === 1) {
    throw stateError('this is the last key slot: without it nobody can read the data', path);
  }
  const { keyOffset, stripes } = info.slots[slot] as LuksSlot;
  const entry = Buffer.alloc(SLOT_BYTES);
  entry.writeUInt32BE(DISABLED, 0);
  entry.writeUInt32BE(keyOffset / SECTOR, 40);
  entry.writeUInt32BE(stripes, 44);
  const changes = [
    { offset: SLOTS_AT + slot * SLOT_BYTES, bytes: entry },
    { offset: keyOffset, bytes: randomBytes(stripes * info.keyBytes) },
  ];
  return { slot, changes };
}

function stateError(problem: string, path: string | undefined): QcowError {
  return new QcowError('ERR_TCMU_QCOW_STATE', problem, { path, structure: 'LUKS header' });
}

function dataCipher(cipher: SectorCipher): DataCipher {
  return {
    tweak: 'host',
    encrypt: (data, position) => cipher.encrypt(data, position / SECTOR),
    decrypt: (data, position) => cipher.decrypt(data, position / SECTOR),
  };
}

async function unlock(
  header: Uint8Array,
  info: LuksInfo,
  passphrase: string | Uint8Array,
  path: string | undefined,
): Promise<{ slot: number; key: Uint8Array }> {
  const { hash, keyBytes, mode, masterKeyIterations } = info;
  const password = passphraseBytes(passphrase);
  for (const [slot, { active, salt, iterations, keyOffset, stripes }] of info.slots.entries()) {
    if (!active) continue;
    const slotKey = await stretch(password, salt, iterations, keyBytes, hash);
    const length = stripes * keyBytes;
    const material = new Uint8Array(Math.ceil(length / SECTOR) * SECTOR);
    material.set(header.subarray(keyOffset, keyOffset + material.length));
    sectorCipher(mode, slotKey).decrypt(material, 0);
    const key = merge(material.subarray(0, length), keyBytes, hash);
    const digest = await digestOf(key, header.subarray(132, 164), masterKeyIterations, hash);
    if (timingSafeEqual(digest, header.subarray(112, 112 + DIGEST_BYTES))) return { slot, key };
  }
  throw new QcowError('ERR_TCMU_QCOW_PASSPHRASE', 'the passphrase opens none of its key slots', {
    path,
    structure: 'LUKS header',
  });
}

function digestOf(key: Uint8Array, salt: Uint8Array, iterations: number, hash: string) {
  return stretch(key, salt, iterations, DIGEST_BYTES, hash);
}

/** Key material, then the slot's entry: to be written in this order. */
async function fillSlot(
  header: Buffer,
  slot: number,
  key: Uint8Array,
  passphrase: string | Uint8Array,
  iterationTime: number,
): Promise<LuksChange[]> {
  const hash = text(header, 72, 32);
  const at = SLOTS_AT + slot * SLOT_BYTES;
  const stripes = header.readUInt32BE(at + 44);
  const speed = await iterationsPerMillisecond(hash, key.length);
  const iterations = clampIterations(speed * iterationTime);
  const salt = randomBytes(SALT_BYTES);
  const slotKey = await stretch(passphraseBytes(passphrase), salt, iterations, key.length, hash);
  const parts = split(key, stripes, hash);
  const material = new Uint8Array(Math.ceil(parts.length / SECTOR) * SECTOR);
  material.set(parts);
  sectorCipher(text(header, 40, 32), slotKey).encrypt(material, 0);
  const entry = Buffer.from(header.subarray(at, at + SLOT_BYTES));
  entry.writeUInt32BE(ENABLED, 0);
  entry.writeUInt32BE(iterations, 4);
  entry.set(salt, 8);
  return [
    { offset: header.readUInt32BE(at + 40) * SECTOR, bytes: material },
    { offset: at, bytes: entry },
  ];
}

/** How fast this machine stretches keys. */
async function iterationsPerMillisecond(hash: string, keyBytes: number): Promise<number> {
  const sample = 10_000;
  const started = performance.now();
  await stretch('speed', 'speed', sample, keyBytes, hashName(hash));
  return sample / (performance.now() - started);
}

function clampIterations(count: number): number {
  return Math.round(Math.min(Math.max(count, MIN_ITERATIONS), MAX_ITERATIONS));
}
