/**
 * Frames in memory, least recently used first out. Keys are numbers: a chunk's frame by its place on the
 * disk, a segment's by its slot (negative). Whoever replaces a chunk drops its frames. What else takes of the same
 * memory is asked for, and makes way for nothing here.
 */
export class FrameCache {
  readonly #frames = new Map<number, Buffer>();
  #bytes = 0;
  readonly #limit: number;
  readonly #taken: () => number;
  hits = 0;
  misses = 0;

  /** @param limit bytes, of which `taken` are in other use at the moment */
  constructor(limit: number, taken = (): number => 0) {
    this.#limit = limit;
    this.#taken = taken;
  }

  get bytes(): number {
    return this.#bytes;
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

  put(key: number, frame: Buffer): void {
    this.delete(key);
    // A frame cut out of a larger answer would keep all of that in memory.
    const own = frame.buffer.byteLength > frame.length + 4096 ? Buffer.from(frame) : frame;
    this.#frames.set(key, own);
    this.#bytes += own.length;
    this.trim();
  }

  /** Down to what is left of the limit. */
  trim(): void {
    const limit = this.#limit - this.#taken();
    for (const [old, { length }] of this.#frames) {
      if (this.#bytes <= limit) break;
      this.#frames.delete(old);
      this.#bytes -= length;
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
  }
}
