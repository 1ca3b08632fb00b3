// SPDX-License-Identifier: Apache-2.0
/**
 * Buffers that are used again. Memory for data comes and goes by the hundred MiB a second; left to the garbage collector
 * it would be counted only now and then, and each time anew be fetched from the kernel.
 *
 * Contract: a buffer belongs to whoever took it, until it is given back: then nobody may look at it any more. What is in it is
 * what was. Not giving one back costs nothing but its use again.
 */
export class Buffers {
  readonly size: number;
  readonly #keep: number;
  readonly #free: Buffer[] = [];

  /** @param size bytes of each; @param keep most that are kept for use again */
  constructor(size: number, keep: number) {
    this.size = size;
    this.#keep = keep;
  }

  /** Bytes kept for use again. */
  get freeBytes(): number {
    return this.#free.length * this.size;
  }

  take(): Buffer {
    return this.#free.pop() ?? Buffer.allocUnsafeSlow(this.size);
  }

  /** Keeps no more than so many bytes of it for now. */
  trim(bytes: number): void {
    while (this.#free.length > 0 && this.freeBytes > bytes) this.#free.pop();
  }

  /** Takes back what it gave; anything else is left to the garbage collector. */
  give(buffer: Buffer): void {
    if (buffer.length === this.size && this.#free.length < this.#keep) this.#free.push(buffer);
  }
}

/** For answers of the bucket: of the sizes that are powers of two. */
export class AnswerBuffers {
  readonly #bySize = new Map<number, Buffers>();
  readonly #keepBytes: number;
  #takenBytes = 0;

  /** @param keepBytes of each size, kept for use again */
  constructor(keepBytes: number) {
    this.#keepBytes = keepBytes;
  }

  /** Bytes of memory, in use or kept. */
  get bytes(): number {
    let bytes = this.#takenBytes;
    for (const { freeBytes } of this.#bySize.values()) bytes += freeBytes;
    return bytes;
  }

  /** One of at least so many bytes. */
  take(bytes: number): Buffer {
    const size = 2 ** Math.ceil(Math.log2(Math.max(bytes, 4096)));
    let buffers = this.#bySize.get(size);
    if (buffers === undefined) {
      buffers = new Buffers(size, Math.floor(this.#keepBytes / size));
      this.#bySize.set(size, buffers);
    }
    this.#takenBytes += size;
    return buffers.take();
  }

  give(buffer: Buffer): void {
    this.#takenBytes -= buffer.length;
    this.#bySize.get(buffer.length)?.give(buffer);
  }
}
