/**
 * Frames in memory, least recently used first out. Keys are numbers: a chunk's frame by its place on the
 * disk, a segment's by its slot (negative). Whoever replaces a chunk drops its frames. What else takes of the same
 * memory is asked for, and makes way for nothing here.
 *
 * What is put is copied; what `get` answers is good until the next `put`, which may use its memory again.
 */
import { Buffers } from './buffers.js';

/** Bytes of frames that were dropped, kept for those to come. */
const KEEP_BYTES = 2 * 1024 * 1024;

export class FrameCache {
  readonly #frames = new Map<number, Buffer>();
  #bytes = 0;
  readonly #limit: number;
  readonly #taken: () => number;
  readonly #buffers: Buffers;
  hits = 0;
  misses = 0;

  /** @param limit bytes, of which `taken` are in other use at the moment; @param frameSize of most */
  constructor(limit: number, frameSize: number, taken = (): number => 0) {
    this.#limit = limit;
    this.#taken = taken;
    this.#buffers = new Buffers(frameSize, Math.floor(KEEP_BYTES / frameSize));
  }

  get bytes(): number {
    return this.#bytes;
  }

  /** Bytes that could be put without dropping anything. */
  get room(): number {
    return this.#limit - this.#taken() - this.#bytes;
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
    return frame;
  }

  /** Without counting, or taking it for used. */
  has(key: number): boolean {
    return this.#frames.has(key);
  }

  put(key: number, frame: Uint8Array): void {
    this.delete(key);
    this.#trim(frame.length);
    if (this.room < frame.length) return;
    const whole = frame.length === this.#buffers.size;
    const own = whole ? this.#buffers.take() : Buffer.allocUnsafeSlow(frame.length);
    own.set(frame);
    this.#frames.set(key, own);
    this.#bytes += own.length;
  }

  /** Down to what is left of the limit. */
  trim(): void {
    this.#trim(0);
  }

  #trim(wanted: number): void {
    const limit = this.#limit - this.#taken() - wanted;
    for (const old of this.#frames.keys()) {
      if (this.#bytes <= limit) break;
      this.delete(old);
    }
  }

  deleteIf(which: (key: number) => boolean): void {
    for (const key of [...this.#frames.keys()]) if (which(key)) this.delete(key);
  }

  delete(key: number): void {
    const frame = this.#frames.get(key);
    if (frame === undefined) return;
    this.#frames.delete(key);
    this.#bytes -= frame.length;
    this.#buffers.give(frame);
  }
}
