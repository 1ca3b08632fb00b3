// SPDX-License-Identifier: Apache-2.0
/**
 * Frames in a local file, as they are in the bucket (compressed, encrypted), so that it tells no more than
 * the bucket does and survives restarts. It may lose anything at any time: what is read is what the
 * caller's checksum says, or a miss. Nothing is ever synced.
 *
 * The file is a row of slots of fixed size: a head of 64 bytes (SHA-256 of the object's key and frame, u32
 * length, u32 CRC), then the frame. A frame goes where the hash says, or one of the next few slots; the one
 * used longest ago makes room.
 */
import { createHash } from 'node:crypto';
import { closeSync, fstatSync, ftruncateSync, openSync, read, readSync, write } from 'node:fs';
import { crc32 } from 'node:zlib';
import { DiskError } from './errors.js';

const HEAD_BYTES = 64;
const WAYS = 8;
/** Writes under way; more are not begun: a cache may leave things out. */
const MAX_WRITES = 32;

export class FileCache {
  readonly #fd: number;
  readonly #slotBytes: number;
  readonly #slots: number;
  /** First 6 bytes of the id of what is in a slot; 0: nothing. */
  readonly #ids: Float64Array;
  readonly #used: Uint32Array;
  /** 0: never used. */
  #tick = 1;
  #writes = 0;
  hits = 0;
  misses = 0;

  private constructor(fd: number, frameSize: number, size: number) {
    this.#fd = fd;
    this.#slotBytes = HEAD_BYTES + frameSize + HEAD_BYTES;
    this.#slots = Math.max(WAYS, Math.floor(size / this.#slotBytes));
    this.#ids = new Float64Array(this.#slots);
    this.#used = new Uint32Array(this.#slots);
  }

  /** @param size bytes the file may take. @throws DiskError when it can't be opened */
  static open(path: string, frameSize: number, size: number): FileCache {
    let fd: number;
    try {
      fd = openSync(path, 'a+', 0o600);
      closeSync(fd);
      fd = openSync(path, 'r+');
    } catch (cause) {
      throw new DiskError(
        'refused',
        `cache file ${path}: ${(cause as Error).message}; give a path that can be written`,
        { operation: 'open', path, cause },
      );
    }
    const cache = new FileCache(fd, frameSize, size);
    cache.#load();
    return cache;
  }

  #load(): void {
    const bytes = this.#slots * this.#slotBytes;
    if (fstatSync(this.#fd).size !== bytes) {
      // Another size, another layout: begin anew.
      ftruncateSync(this.#fd, 0);
      ftruncateSync(this.#fd, bytes);
      return;
    }
    const head = Buffer.alloc(HEAD_BYTES);
    for (let slot = 0; slot < this.#slots; slot++) {
      readSync(this.#fd, head, 0, HEAD_BYTES, slot * this.#slotBytes);
      this.#ids[slot] = head.readUIntLE(0, 6);
      // Before anything that is used from now on, and after what is empty.
      if (this.#ids[slot] !== 0) this.#used[slot] = this.#tick;
    }
  }

  /** The frame as stored, or undefined. */
  get(key: string, frame: number, length: number, crc: number): Promise<Buffer | undefined> {
    const id = idOf(key, frame);
    const slot = this.#find(id);
    if (slot < 0) {
      this.misses++;
      return Promise.resolve(undefined);
    }
    this.#used[slot] = ++this.#tick;
    const bytes = Buffer.allocUnsafe(HEAD_BYTES + length);
    return new Promise((resolve) => {
      read(this.#fd, bytes, 0, bytes.length, slot * this.#slotBytes, (error, got) => {
        const stored = bytes.subarray(HEAD_BYTES);
        const good =
          error === null &&
          got === bytes.length &&
          bytes.subarray(0, 32).equals(id) &&
          bytes.readUInt32LE(32) === length &&
          crc32(stored) === crc;
        if (good) this.hits++;
        else this.misses++;
        resolve(good ? stored : undefined);
      });
    });
  }

  /** In the background. */
  put(key: string, frame: number, stored: Buffer, crc: number): void {
    if (this.#writes >= MAX_WRITES || stored.length > this.#slotBytes - HEAD_BYTES) return;
    const id = idOf(key, frame);
    const first = this.#first(id);
    let slot = this.#find(id);
    if (slot < 0) {
      slot = first;
      for (let i = 1; i < WAYS; i++) {
        const other = (first + i) % this.#slots;
        if ((this.#used[other] as number) < (this.#used[slot] as number)) slot = other;
      }
    }
    const bytes = Buffer.alloc(HEAD_BYTES + stored.length);
    id.copy(bytes);
    bytes.writeUInt32LE(stored.length, 32);
    bytes.writeUInt32LE(crc, 36);
    stored.copy(bytes, HEAD_BYTES);
    this.#ids[slot] = id.readUIntLE(0, 6);
    this.#used[slot] = ++this.#tick;
    this.#writes++;
    write(this.#fd, bytes, 0, bytes.length, slot * this.#slotBytes, (error) => {
      this.#writes--;
      if (error !== null) this.#ids[slot] = 0;
    });
  }

  #first(id: Buffer): number {
    return id.readUInt32LE(6) % this.#slots;
  }

  #find(id: Buffer): number {
    const first = this.#first(id);
    const short = id.readUIntLE(0, 6);
    for (let i = 0; i < WAYS; i++) {
      const slot = (first + i) % this.#slots;
      if (this.#ids[slot] === short) return slot;
    }
    return -1;
  }

  async close(): Promise<void> {
    while (this.#writes > 0) await new Promise((resolve) => setImmediate(resolve));
    closeSync(this.#fd);
  }
}

function idOf(key: string, frame: number): Buffer {
  return createHash('sha256').update(`${key}#${frame}`).digest();
}
