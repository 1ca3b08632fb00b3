// SPDX-License-Identifier: Apache-2.0
/**
 * Where the chunks are: a manifest names leaves, a leaf names the 256 chunks after each other that it
 * covers. Both are immutable. Leaves are loaded when needed and dropped again, so memory is bounded
 * however large the disk is: 100 bytes a leaf that exists, plus the leaves that are held.
 *
 * Every name comes with length and checksums, so an object that is stale, cut or exchanged is found out
 * by whoever holds its parent.
 */

import { failureKind } from '../object-store.js';
import { type BlobCodec, BlobKind, ENTRY_BYTES, type EncodedBlob, HEADER_BYTES } from './blob.js';
import { damaged, Gone } from './errors.js';
import { leafName } from './names.js';
import type { Requests } from './requests.js';

export const LEAF_CHUNKS = 256;

/** Whose objects a disk uses: its own (0), its origin's (1), its origin's origin's … */
export interface Origin {
  readonly prefix: string;
  readonly id: string;
}

interface Version {
  /** Index into the manifest's origins. */
  readonly origin: number;
  readonly n: number;
  readonly epoch: number;
  readonly writer: string;
  readonly keyId: number;
}

export interface LeafRef extends Version {
  readonly length: number;
  /** Of header and table. */
  readonly crc: number;
}

/** A chunk's object. */
export interface ChunkRef extends Version {
  /** Stored length with coding, CRC; two numbers a frame. A stored length of 0: zeros. */
  readonly frames: Uint32Array;
}

/** The whole disk at a point of its log. */
export interface Manifest {
  readonly n: number;
  readonly epoch: number;
  readonly writer: string;
  /** Everything in slots before this one is in the chunks. */
  readonly cut: number;
  /** Epoch and writer of the segment before `cut`. */
  readonly cutEpoch: number;
  readonly cutWriter: string;
  /** Milliseconds of the lease of the writer that made it (`lease.ts`). */
  readonly lease: number;
  /** Bytes of the disk at `cut`. */
  readonly size: number;
  /** Slots that were claimed or fenced: never deleted, they are what stops old writers. */
  readonly claims: readonly number[];
  readonly origins: readonly Origin[];
  readonly leaves: ReadonlyMap<number, LeafRef>;
}

export function encodeManifest(manifest: Manifest): Buffer {
  const leaves = [...manifest.leaves].map(([index, ref]) => [
    index,
    ref.origin,
    ref.n,
    ref.epoch,
    ref.writer,
    ref.keyId,
    ref.length,
    ref.crc,
  ]);
  return Buffer.from(JSON.stringify({ ...manifest, leaves }));
}

/** @throws DiskError `damaged` */
export function decodeManifest(key: string, bytes: Buffer): Manifest {
  type Row = [number, number, number, number, string, number, number, number];
  try {
    const parsed = JSON.parse(bytes.toString()) as Omit<Manifest, 'leaves'> & { leaves: Row[] };
    const leaves = new Map<number, LeafRef>();
    for (const [index, origin, n, epoch, writer, keyId, length, crc] of parsed.leaves) {
      leaves.set(index, { origin, n, epoch, writer, keyId, length, crc });
    }
    return { ...parsed, leaves };
  } catch (cause) {
    throw damaged(key, 'it can’t be parsed', cause);
  }
}

/** Bytes in front of a chunk's frames in a leaf: u16 index, u16 origin, u32 key, n, epoch, writer. */
const RECORD_HEAD = 32;

/** The decoded bytes of a leaf, with an index; chunk references are made when asked for. */
export class Leaf {
  readonly #bytes: Buffer;
  readonly #frames: number;
  readonly #at = new Int32Array(LEAF_CHUNKS).fill(-1);

  constructor(bytes: Buffer, framesPerChunk: number) {
    this.#bytes = bytes;
    this.#frames = framesPerChunk;
    const size = RECORD_HEAD + framesPerChunk * 8;
    for (let at = 0; at + size <= bytes.length; at += size) {
      const index = bytes.readUInt16LE(at);
      if (index < LEAF_CHUNKS) this.#at[index] = at;
    }
  }

  get bytes(): number {
    return this.#bytes.length + this.#at.byteLength;
  }

  /** @param index of the chunk in the leaf; @param base origin of the leaf itself */
  find(index: number, base: number): ChunkRef | undefined {
    const at = this.#at[index] as number;
    if (at < 0) return undefined;
    const bytes = this.#bytes;
    const frames = new Uint32Array(this.#frames * 2);
    for (let i = 0; i < frames.length; i++)
      frames[i] = bytes.readUInt32LE(at + RECORD_HEAD + i * 4);
    return {
      origin: base + bytes.readUInt16LE(at + 2),
      keyId: bytes.readUInt32LE(at + 4),
      n: bytes.readDoubleLE(at + 8),
      epoch: bytes.readDoubleLE(at + 16),
      writer: bytes.toString('hex', at + 24, at + 32),
      frames,
    };
  }

  /** Chunks it has, with their index. */
  *entries(base: number): Generator<[index: number, ref: ChunkRef]> {
    for (let index = 0; index < LEAF_CHUNKS; index++) {
      const ref = this.find(index, base);
      if (ref !== undefined) yield [index, ref];
    }
  }

  static encode(refs: ReadonlyMap<number, ChunkRef>, framesPerChunk: number): Buffer {
    const size = RECORD_HEAD + framesPerChunk * 8;
    const bytes = Buffer.alloc(refs.size * size);
    let at = 0;
    for (const [index, ref] of refs) {
      bytes.writeUInt16LE(index, at);
      bytes.writeUInt16LE(ref.origin, at + 2);
      bytes.writeUInt32LE(ref.keyId, at + 4);
      bytes.writeDoubleLE(ref.n, at + 8);
      bytes.writeDoubleLE(ref.epoch, at + 16);
      bytes.write(ref.writer, at + 24, 8, 'hex');
      for (const [i, value] of ref.frames.entries()) {
        bytes.writeUInt32LE(value, at + RECORD_HEAD + i * 4);
      }
      at += size;
    }
    return bytes;
  }
}

/** Where a chunk's frame is in its object. */
export function chunkFrameOffset(ref: ChunkRef, frame: number): number {
  let at = HEADER_BYTES + (ref.frames.length / 2) * ENTRY_BYTES;
  for (let i = 0; i < frame; i++) at += (ref.frames[i * 2] as number) & 0x3fffffff;
  return at;
}

/** A chunk reference of an object just encoded. */
export function chunkRef(blob: EncodedBlob): ChunkRef {
  const { n, epoch, writer, keyId } = blob.header;
  const frames = new Uint32Array(blob.header.frames * 2);
  for (let i = 0; i < blob.header.frames; i++) {
    frames[i * 2] = blob.table[i * 3] as number;
    frames[i * 2 + 1] = blob.table[i * 3 + 1] as number;
  }
  return { origin: 0, n, epoch, writer, keyId, frames };
}

/** The chunk map of one manifest. Looking up is at once when the leaf is in memory. */
export class ChunkMap {
  readonly manifest: Manifest;
  readonly #requests: Requests;
  readonly #codec: BlobCodec;
  readonly #framesPerChunk: number;
  readonly #limit: number;
  /** In the order of their last use. */
  readonly #leaves: Map<number, Leaf>;
  readonly #loading = new Map<number, Promise<Leaf>>();
  #bytes = 0;

  /** @param limit bytes of leaves held in memory; @param leaves known already */
  constructor(
    manifest: Manifest,
    requests: Requests,
    codec: BlobCodec,
    framesPerChunk: number,
    limit: number,
    leaves: ReadonlyMap<number, Leaf> = new Map(),
  ) {
    this.manifest = manifest;
    this.#requests = requests;
    this.#codec = codec;
    this.#framesPerChunk = framesPerChunk;
    this.#limit = limit;
    this.#leaves = new Map();
    for (const [index, leaf] of leaves) this.#hold(index, leaf);
  }

  /** Bytes of memory the leaves take. */
  get bytes(): number {
    return this.#bytes;
  }

  /** The same map as of another manifest; leaves that are still right are kept. */
  successor(manifest: Manifest, changed: ReadonlyMap<number, Leaf>): ChunkMap {
    const kept = new Map<number, Leaf>();
    for (const [index, leaf] of this.#leaves) {
      if (manifest.leaves.get(index)?.crc === this.manifest.leaves.get(index)?.crc) {
        kept.set(index, leaf);
      }
    }
    for (const [index, leaf] of changed) kept.set(index, leaf);
    return new ChunkMap(
      manifest,
      this.#requests,
      this.#codec,
      this.#framesPerChunk,
      this.#limit,
      kept,
    );
  }

  /** Whether any chunk of this one's leaf may exist. */
  hasLeafOf(chunk: number): boolean {
    return this.manifest.leaves.has(Math.floor(chunk / LEAF_CHUNKS));
  }

  /** @throws DiskError `damaged`, `unreachable` */
  lookup(chunk: number): ChunkRef | undefined | Promise<ChunkRef | undefined> {
    const index = Math.floor(chunk / LEAF_CHUNKS);
    const ref = this.manifest.leaves.get(index);
    if (ref === undefined) return undefined;
    const leaf = this.leaf(index, ref);
    const within = chunk - index * LEAF_CHUNKS;
    if (leaf instanceof Leaf) return leaf.find(within, ref.origin);
    return leaf.then((loaded) => loaded.find(within, ref.origin));
  }

  /** Number of a chunk by its leaf and place in it. */
  chunkOf(leaf: number, within: number): number {
    return leaf * LEAF_CHUNKS + within;
  }

  leaf(index: number, ref: LeafRef): Leaf | Promise<Leaf> {
    const held = this.#leaves.get(index);
    if (held !== undefined) {
      this.#leaves.delete(index);
      this.#leaves.set(index, held);
      return held;
    }
    let loading = this.#loading.get(index);
    if (loading === undefined) {
      loading = this.#load(index, ref).finally(() => this.#loading.delete(index));
      this.#loading.set(index, loading);
    }
    return loading;
  }

  async #load(index: number, ref: LeafRef): Promise<Leaf> {
    const origin = this.manifest.origins[ref.origin] as Origin;
    const key = `${origin.prefix}/${leafName(index, ref.n, ref.epoch)}`;
    const { body } = await this.#requests.get(key).catch((error: unknown) => {
      if (failureKind(error) === 'not-found') throw new Gone(key);
      throw error;
    });
    const { header, frames } = this.#codec.decode(key, body, origin.id);
    if (header.kind !== BlobKind.leaf || header.crc !== ref.crc || header.number !== index) {
      throw damaged(key, 'it is not the leaf that the manifest names');
    }
    const leaf = new Leaf(frames[0] ?? Buffer.alloc(0), this.#framesPerChunk);
    this.#hold(index, leaf);
    return leaf;
  }

  #hold(index: number, leaf: Leaf): void {
    this.#leaves.set(index, leaf);
    this.#bytes += leaf.bytes;
    for (const [old, { bytes }] of this.#leaves) {
      if (this.#bytes <= this.#limit || old === index) break;
      this.#leaves.delete(old);
      this.#bytes -= bytes;
    }
  }
}
