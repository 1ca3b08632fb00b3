// SPDX-License-Identifier: Apache-2.0
/**
 * Data-In and Data-Out buffers over ordinary memory: scratch memory of emulated operations,
 * parameter data, tests. The memory belongs to whoever made the buffer and is never revoked; slices
 * share it.
 */
import type { DataIn, DataOut, MaybePromise } from '../device/data.js';
import { BufferError } from '../errors.js';
import type { BackingFile } from '../io/backing-file.js';

abstract class MemoryData {
  /** The memory itself, not a copy. */
  readonly bytes: Uint8Array;

  constructor(bytes: Uint8Array) {
    this.bytes = bytes;
  }

  /** Bytes. */
  get length(): number {
    return this.bytes.length;
  }

  /** The memory as one piece. */
  segments(): readonly Uint8Array[] {
    return [this.bytes];
  }

  /**
   * The bytes of `[start, end)`, not a copy.
   * @throws BufferError `ERR_TCMU_BUFFER_RANGE` outside the buffer
   */
  protected window(start: number, end: number, operation: string): Uint8Array {
    if (start < 0 || end < start || end > this.bytes.length) {
      throw new BufferError(
        'ERR_TCMU_BUFFER_RANGE',
        `${operation}: [${start}, ${end}) is outside a buffer of ${this.bytes.length} bytes`,
        { operation },
      );
    }
    return this.bytes.subarray(start, end);
  }
}

/** A Data-Out Buffer in ordinary memory: what `write` takes. */
export class MemoryDataOut extends MemoryData implements DataOut {
  slice(start = 0, end = this.bytes.length): MemoryDataOut {
    return new MemoryDataOut(this.window(start, end, 'slice'));
  }

  copyTo(target: Uint8Array, targetStart = 0): void {
    if (targetStart < 0 || targetStart + this.bytes.length > target.length) {
      throw new BufferError(
        'ERR_TCMU_BUFFER_RANGE',
        `copyTo: ${this.bytes.length} bytes do not fit at ${targetStart} of ${target.length}`,
        { operation: 'copyTo' },
      );
    }
    target.set(this.bytes, targetStart);
  }

  toBytes(): Uint8Array {
    return this.bytes.slice();
  }

  writeTo(file: BackingFile, position: number): MaybePromise<void> {
    return file.writeFrom(this.bytes, position);
  }

  isZero(): boolean {
    return isZero(this.bytes);
  }

  mismatch(other: Uint8Array | DataOut | DataIn): number {
    const segments = other instanceof Uint8Array ? [other] : other.segments();
    let at = 0;
    for (const segment of segments) {
      const difference = firstDifference(this.bytes, at, segment);
      if (difference >= 0) return at + difference;
      at += segment.length;
    }
    return -1;
  }
}

/** A Data-In Buffer in ordinary memory: what `read` fills. */
export class MemoryDataIn extends MemoryData implements DataIn {
  slice(start = 0, end = this.bytes.length): MemoryDataIn {
    return new MemoryDataIn(this.window(start, end, 'slice'));
  }

  copyFrom(source: Uint8Array, start = 0): void {
    this.window(start, start + source.length, 'copyFrom').set(source);
  }

  fill(value: number, start = 0, end = this.bytes.length): void {
    this.window(start, end, 'fill').fill(value);
  }

  readFrom(file: BackingFile, position: number): MaybePromise<number> {
    return file.readInto(this.bytes, position);
  }
}

/** Whether every byte is zero. */
export function isZero(bytes: Uint8Array): boolean {
  // Comparing the bytes with themselves shifted by one is a memcmp: much faster than a loop.
  return (
    bytes.length === 0 || (bytes[0] === 0 && sameBytes(bytes.subarray(1), bytes.subarray(0, -1)))
  );
}

/** Offset in `part` of the first byte unlike `bytes` at `at`, or -1. */
export function firstDifference(bytes: Uint8Array, at: number, part: Uint8Array): number {
  if (sameBytes(bytes.subarray(at, at + part.length), part)) return -1;
  let i = 0;
  while (i < part.length && bytes[at + i] === part[i]) i++;
  return i;
}

function sameBytes(a: Uint8Array, b: Uint8Array): boolean {
  return Buffer.compare(a, b) === 0;
}
