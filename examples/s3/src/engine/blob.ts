// SPDX-License-Identifier: Apache-2.0
/**
 * The container of everything but the small JSON records: a header, a table, frames.
 *
 * Header, 64 bytes, little endian: magic `TCS3`, u8 version, u8 kind, u16 0, u32 frames, u32 data key
 * (0: not encrypted), f64 number (slot, chunk, leaf or checkpoint), f64 checkpoint (or durable slot), f64 epoch, 8 bytes writer,
 * f64 next slot, u32 length of the object, u32 CRC-32 of header and table. Table: per frame u32 stored
 * length with the coding in its two highest bits, u32 CRC-32 of the stored bytes, u32 length before coding.
 * A frame can be fetched and verified alone by whoever knows its table entry. An empty frame, which in a
 * chunk stands for zeros, takes no bytes.
 *
 * What is handed over is not copied when it is stored as it is: it must not change until the upload is done.
 */

import { promisify } from 'node:util';
import * as zlib from 'node:zlib';
import { constants, crc32, deflateRaw, inflateRawSync } from 'node:zlib';
import type { Keyring, ObjectCipher } from './cipher.js';
import { combineCrc } from './crc-combine.js';
import { DiskError, damaged } from './errors.js';

export const HEADER_BYTES = 64;
export const ENTRY_BYTES = 12;
const MAGIC = 0x33534354;
const VERSION = 1;
const LENGTH_MASK = 0x3fffffff;

export const BlobKind = { segment: 1, chunk: 2, leaf: 3, manifest: 4 } as const;
export type BlobKind = (typeof BlobKind)[keyof typeof BlobKind];

export type Compression = 'none' | 'deflate' | 'zstd';
const Coding = { none: 0, deflate: 1, zstd: 2 } as const;

/** Who wrote an object and where it belongs: all that makes it unlike any other. */
export interface BlobIdentity {
  readonly kind: BlobKind;
  /** Slot, chunk, leaf or checkpoint number. */
  readonly number: number;
  /** Checkpoint it was made for. Of a segment: every slot before this one was durable by then; of a claim: its lease. */
  readonly n: number;
  readonly epoch: number;
  /** 16 hexadecimal digits, drawn when the disk was opened for writing. */
  readonly writer: string;
}

export interface BlobHeader extends BlobIdentity {
  readonly frames: number;
  readonly keyId: number;
  readonly next: number;
  readonly length: number;
  /** Of header and table: tells objects apart. */
  readonly crc: number;
}

/** A frame as its table says: [stored length and coding, CRC, length before coding] a frame. */
export type FrameTable = Uint32Array;

export interface EncodedBlob {
  readonly header: BlobHeader;
  readonly table: FrameTable;
  readonly parts: readonly Uint8Array[];
  /** CRC-32 of all parts together. */
  readonly crc: number;
}

export const storedLength = (table: FrameTable, frame: number): number =>
  (table[frame * 3] as number) & LENGTH_MASK;

/** Where frame `frame` begins in the object. */
export function frameOffset(table: FrameTable, frame: number): number {
  let at = HEADER_BYTES + (table.length / 3) * ENTRY_BYTES;
  for (let i = 0; i < frame; i++) at += storedLength(table, i);
  return at;
}

interface Zstd {
  zstdCompress(data: Uint8Array, done: (error: Error | null, data: Buffer) => void): void;
  zstdDecompressSync(data: Uint8Array): Buffer;
}
const zstd = 'zstdCompress' in zlib ? (zlib as unknown as Zstd) : undefined;
const deflateAsync = promisify(deflateRaw) as (
  data: Uint8Array,
  options: zlib.ZlibOptions,
) => Promise<Buffer>;

/** Whether this Node.js has it. Zstandard came with 22.15. */
export function canCompress(compression: Compression): boolean {
  return compression !== 'zstd' || zstd !== undefined;
}

function compress(data: Uint8Array, compression: Compression): Promise<Buffer> {
  if (compression === 'zstd' && zstd !== undefined) {
    return promisify(zstd.zstdCompress)(data) as Promise<Buffer>;
  }
  return deflateAsync(data, { level: constants.Z_BEST_SPEED });
}

/** A disk's way of storing frames. */
export class BlobCodec {
  readonly diskId: string;
  readonly compression: Compression;
  readonly keyring: Keyring | undefined;

  constructor(diskId: string, compression: Compression, keyring?: Keyring) {
    this.diskId = diskId;
    this.compression = compression;
    this.keyring = keyring;
  }

  #cipher(identity: BlobIdentity, keyId: number, diskId: string): ObjectCipher | undefined {
    if (keyId === 0) return undefined;
    const { kind, number, n, epoch, writer } = identity;
    const text = `${diskId}/${kind}/${number}/${n}/${epoch}/${writer}`;
    if (this.keyring === undefined) {
      throw new DiskError('key', 'the disk is encrypted: give its key (--key-file, --key-command)');
    }
    return this.keyring.object(keyId, text);
  }

  /** At once, unless there is something to compress. */
  encode(
    identity: BlobIdentity,
    frames: readonly Uint8Array[],
    next = 0,
  ): EncodedBlob | Promise<EncodedBlob> {
    if (this.compression === 'none' || frames.length === 0) {
      return this.#assemble(identity, frames, frames, new Uint8Array(frames.length), next);
    }
    return this.#compressed(identity, frames, next);
  }

  async #compressed(
    identity: BlobIdentity,
    frames: readonly Uint8Array[],
    next: number,
  ): Promise<EncodedBlob> {
    const coding = new Uint8Array(frames.length);
    const code = this.compression === 'zstd' && zstd !== undefined ? Coding.zstd : Coding.deflate;
    const packed = await Promise.all(
      frames.map(async (frame, i) => {
        if (frame.length === 0) return frame;
        const smaller = await compress(frame, this.compression);
        // Less than an eighth saved is not worth the work of every read.
        if (smaller.length > frame.length - frame.length / 8) return frame;
        coding[i] = code;
        return smaller;
      }),
    );
    return this.#assemble(identity, frames, packed, coding, next);
  }

  #assemble(
    identity: BlobIdentity,
    raw: readonly Uint8Array[],
    packed: readonly Uint8Array[],
    coding: Uint8Array,
    next: number,
  ): EncodedBlob {
    const keyId = this.keyring?.current ?? 0;
    const cipher = raw.length === 0 ? undefined : this.#cipher(identity, keyId, this.diskId);
    const stored =
      cipher === undefined
        ? packed
        : packed.map((bytes, i) => (bytes.length === 0 ? bytes : cipher.encrypt(i, bytes)));
    const head = Buffer.alloc(HEADER_BYTES + stored.length * ENTRY_BYTES);
    const table = new Uint32Array(stored.length * 3);
    let length = head.length;
    for (const [i, bytes] of stored.entries()) {
      table[i * 3] = (bytes.length | ((coding[i] as number) << 30)) >>> 0;
      table[i * 3 + 1] = crc32(bytes);
      table[i * 3 + 2] = (raw[i] as Uint8Array).length;
      length += bytes.length;
    }
    for (let i = 0; i < table.length; i++) head.writeUInt32LE(table[i] as number, 64 + i * 4);
    head.writeUInt32LE(MAGIC, 0);
    head[4] = VERSION;
    head[5] = identity.kind;
    head.writeUInt32LE(stored.length, 8);
    head.writeUInt32LE(keyId, 12);
    head.writeDoubleLE(identity.number, 16);
    head.writeDoubleLE(identity.n, 24);
    head.writeDoubleLE(identity.epoch, 32);
    head.write(identity.writer, 40, 8, 'hex');
    head.writeDoubleLE(next, 48);
    head.writeUInt32LE(length, 56);
    const crc = headerCrc(head);
    head.writeUInt32LE(crc, 60);
    const header = { ...identity, frames: stored.length, keyId, next, length, crc };
    let whole = crc32(head);
    for (const [i, { length }] of stored.entries()) {
      whole = combineCrc(whole, table[i * 3 + 1] as number, length);
    }
    return { header, table, parts: [head, ...stored], crc: whole };
  }

  /**
   * One frame, verified.
   * @param diskId of the disk that wrote it: a clone reads its origin's objects
   * @throws DiskError `damaged`, `key`
   */
  decodeFrame(
    key: string,
    identity: BlobIdentity & { keyId: number },
    diskId: string,
    frame: number,
    entry: FrameEntry,
    stored: Uint8Array,
  ): Buffer {
    const what = `frame ${frame}`;
    if (entry.raw === 0 && entry.stored === 0 && stored.length === 0) return Buffer.alloc(0);
    if (stored.length !== (entry.stored & LENGTH_MASK)) throw damaged(key, `${what} is cut short`);
    if (crc32(stored) !== entry.crc) throw damaged(key, `${what} fails its checksum`);
    const cipher = this.#cipher(identity, identity.keyId, diskId);
    let bytes: Buffer;
    try {
      bytes =
        cipher === undefined
          ? Buffer.from(stored.buffer, stored.byteOffset, stored.length)
          : cipher.decrypt(frame, stored);
      const coding = entry.stored >>> 30;
      if (coding === Coding.deflate) {
        bytes = inflateRawSync(bytes, { maxOutputLength: Math.max(entry.raw, 1) });
      } else if (coding === Coding.zstd) {
        if (zstd === undefined) {
          throw new DiskError(
            'format',
            `${key}: compressed with Zstandard, which this Node.js lacks: use 22.15 or later`,
          );
        }
        bytes = zstd.zstdDecompressSync(bytes);
      }
    } catch (error) {
      if (error instanceof DiskError) throw error;
      throw damaged(key, `${what} is not what was written`, error);
    }
    if (bytes.length !== entry.raw) throw damaged(key, `${what} has the wrong length`);
    return bytes;
  }

  /** All frames of a whole object. @throws DiskError */
  decode(key: string, body: Buffer, diskId: string): { header: BlobHeader; frames: Buffer[] } {
    const { header, table } = decodeHead(key, body);
    if (table === undefined || body.length !== header.length) {
      throw damaged(key, `it has ${body.length} bytes instead of ${header.length}`);
    }
    const frames: Buffer[] = [];
    let at = frameOffset(table, 0);
    for (let i = 0; i < header.frames; i++) {
      const length = storedLength(table, i);
      const stored = body.subarray(at, at + length);
      frames.push(this.decodeFrame(key, header, diskId, i, tableEntry(table, i), stored));
      at += length;
    }
    return { header, frames };
  }
}

export interface FrameEntry {
  /** Stored length and coding. */
  readonly stored: number;
  readonly crc: number;
  readonly raw: number;
}

export function tableEntry(table: FrameTable, frame: number): FrameEntry {
  return {
    stored: table[frame * 3] as number,
    crc: table[frame * 3 + 1] as number,
    raw: table[frame * 3 + 2] as number,
  };
}

function headerCrc(head: Buffer): number {
  return crc32(head.subarray(HEADER_BYTES), crc32(head.subarray(0, 60)));
}

/**
 * Header and table from the beginning of an object; no table when `start` is too short for it, and then
 * nothing is verified yet.
 * @throws DiskError `damaged`, `format`
 */
export function decodeHead(
  key: string,
  start: Buffer,
): { header: BlobHeader; table: FrameTable | undefined } {
  if (start.length < HEADER_BYTES || start.readUInt32LE(0) !== MAGIC) {
    throw damaged(key, 'it is none of this program’s objects');
  }
  if (start[4] !== VERSION) {
    throw new DiskError(
      'format',
      `${key}: format ${start[4]}, this program knows ${VERSION} only`,
      {
        path: key,
      },
    );
  }
  const frames = start.readUInt32LE(8);
  const header: BlobHeader = {
    kind: start[5] as BlobKind,
    frames,
    keyId: start.readUInt32LE(12),
    number: start.readDoubleLE(16),
    n: start.readDoubleLE(24),
    epoch: start.readDoubleLE(32),
    writer: start.toString('hex', 40, 48),
    next: start.readDoubleLE(48),
    length: start.readUInt32LE(56),
    crc: start.readUInt32LE(60),
  };
  const end = HEADER_BYTES + frames * ENTRY_BYTES;
  if (end > header.length) throw damaged(key, 'its header makes no sense');
  if (start.length < end) return { header, table: undefined };
  if (headerCrc(start.subarray(0, end)) !== header.crc) {
    throw damaged(key, 'its header fails its checksum');
  }
  const table = new Uint32Array(frames * 3);
  for (let i = 0; i < table.length; i++) table[i] = start.readUInt32LE(HEADER_BYTES + i * 4);
  return { header, table };
}
