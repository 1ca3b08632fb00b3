// SPDX-License-Identifier: Apache-2.0
/**
 * Frames in memory, least recently used first out. Keys are numbers: a chunk's frame by its place on the
 * disk, a segment's by its slot (negative). Whoever replaces a chunk drops its frames. What else takes of the same
 * memory is asked for, and makes way for nothing here, but for what is only kept for use again: that goes before any frame does.
 *
 * Contract: what is put is copied; what `get` answers is good until the next call, which may use its memory again.
 * Memory is taken in slabs of many frames, and given back in slabs when less of it is left: V8 collects garbage whenever a few MiB
 * of buffers were allocated, however much memory there is, so that a buffer a frame would cost more than the copying.
 */

/** Bytes of a slab, at most; at most the sixteenth part of the limit. */
const SLAB_BYTES = 8 * 1024 * 1024;
const SLABS = 16;

/** Memory for some frames. */
interface Slab {
  readonly free: Buffer[];
  /** Keys of the frames in it. */
  readonly keys: Set<number>;
}

interface Frame {
  readonly bytes: Buffer;
  /** Undefined: memory of its own. */
  readonly slab: Slab | undefined;
  readonly place: Buffer;
}

export class FrameCache {
  readonly #frames = new Map<number, Frame>();
  readonly #slabs = new Set<Slab>();
  /** Those with free places, and perhaps others. */
  #open: Slab[] = [];
  readonly #slabBytes: number;
  readonly #frameSize: number;
  readonly limit: number;
  readonly #taken: () => number;
  readonly #reclaim: () => void;
  /** In memory of their own. */
  #smallBytes = 0;
  #bytes = 0;
  hits = 0;
  misses = 0;

  /**
   * @param limit bytes, of which `taken` are in other use at the moment, less of them after `reclaim`
   * @param frameSize of the largest
   */
  constructor(limit: number, frameSize: number, taken = (): number => 0, reclaim = () => {}) {
    this.limit = limit;
    this.#frameSize = frameSize;
    this.#taken = taken;
    this.#reclaim = reclaim;
    const most = Math.min(SLAB_BYTES, limit / SLABS);
    this.#slabBytes = Math.max(frameSize, Math.floor(most / frameSize) * frameSize);
  }

  /** Bytes of the frames. */
  get bytes(): number {
    return this.#bytes;
  }

  /** Bytes of memory taken for them. */
  get memory(): number {
    return this.#slabs.size * this.#slabBytes + this.#smallBytes;
  }

  /** Bytes that may be put without dropping anything. */
  get room(): number {
    return this.limit - this.#taken() - this.#bytes;
  }

  get(key: number): Buffer | undefined {
    const frame = this.#frames.get(key);
    if (frame === undefined) {
      this.misses++;
      return undefined;
    }
    this.hits++;
    this.#frames.delete(key);
    this.#frames.set(key, frame);
    return frame.bytes;
  }

  /** Without counting, or taking it for used. */
  has(key: number): boolean {
    return this.#frames.has(key);
  }

  put(key: number, bytes: Uint8Array): void {
    this.delete(key);
    this.trim();
    // A small one would waste its place.
    const frame =
      bytes.length * 2 > this.#frameSize ? this.#place(key, bytes) : this.#small(bytes.length);
    if (frame === undefined) return;
    frame.bytes.set(bytes);
    this.#frames.set(key, frame);
    this.#bytes += bytes.length;
  }

  #small(length: number): Frame | undefined {
    if (!this.#fits(length)) return undefined;
    this.#smallBytes += length;
    const bytes = Buffer.allocUnsafeSlow(length);
    return { bytes, slab: undefined, place: bytes };
  }

  #place(key: number, { length }: Uint8Array): Frame | undefined {
    for (;;) {
      const slab = this.#open.at(-1);
      const place = slab?.free.pop();
      if (slab !== undefined && place !== undefined) {
        slab.keys.add(key);
        return { bytes: place.subarray(0, length), slab, place };
      }
      this.#open.pop();
      if (this.#open.length > 0) continue;
      if (this.#hasRoom(this.#slabBytes)) this.#addSlab();
      else if (!this.#dropOldest()) return undefined;
    }
  }

  #addSlab(): void {
    const memory = Buffer.allocUnsafeSlow(this.#slabBytes);
    const free: Buffer[] = [];
    for (let at = 0; at < memory.length; at += this.#frameSize) {
      free.push(memory.subarray(at, at + this.#frameSize));
    }
    const slab = { free, keys: new Set<number>() };
    this.#slabs.add(slab);
    this.#open.push(slab);
  }

  /** Down to what is left of the limit. */
  trim(): void {
    this.#fits(0);
  }

  /** Makes room for `length` bytes outside the slabs. */
  #fits(length: number): boolean {
    while (!this.#hasRoom(length)) {
      const oldest = this.#frames.values().next().value?.slab ?? this.#slabs.values().next().value;
      if (oldest !== undefined) this.#dropSlab(oldest);
      else if (!this.#dropOldest()) return false;
    }
    return true;
  }

  /** For `length` more bytes. */
  #hasRoom(length: number): boolean {
    const fits = (): boolean => this.memory + length <= this.limit - this.#taken();
    if (fits()) return true;
    this.#reclaim();
    return fits();
  }

  #dropSlab(slab: Slab): void {
    this.#slabs.delete(slab);
    this.#open = this.#open.filter((open) => open !== slab);
    for (const key of [...slab.keys]) this.delete(key);
  }

  #dropOldest(): boolean {
    const { value: oldest, done } = this.#frames.keys().next();
    if (done !== true) this.delete(oldest);
    return done !== true;
  }

  deleteIf(which: (key: number) => boolean): void {
    for (const key of [...this.#frames.keys()]) if (which(key)) this.delete(key);
  }

  delete(key: number): void {
    const frame = this.#frames.get(key);
    if (frame === undefined) return;
    const { slab, place, bytes } = frame;
    this.#frames.delete(key);
    this.#bytes -= bytes.length;
    if (slab === undefined) {
      this.#smallBytes -= bytes.length;
      return;
    }
    slab.keys.delete(key);
    if (slab.free.push(place) === 1 && this.#slabs.has(slab)) this.#open.push(slab);
  }
}
