// SPDX-License-Identifier: Apache-2.0
/**
 * DataIn and DataOut over a command's iovecs in the ring mapping.
 *
 * Contract: no method touches memory once the command has been completed (it throws
 * `ERR_TCMU_BUFFER_REVOKED`). Data-In keeps a high-water mark of what is written or about to be:
 * every byte below it has been, or will be by an operation that pins the command, given a value by
 * us; what lies above is zeroed or cut when the command is published. So a jump ahead zeroes the gap
 * at once, and handing out raw memory zeroes it first.
 */
import { ArgumentError, BufferError } from '../errors.js';
import type { BackingFile } from '../io/backing-file.js';
import { wrapFileError } from '../io/io-queue.js';
import { moveFile, type NativeRing } from '../native.js';
import type { DataIn, DataOut, MaybePromise } from './data.js';

/** What a buffer needs of its command. */
export interface DataOwner {
  readonly ring: NativeRing;
  readonly slot: number;
  /** False from completion on. */
  readonly active: boolean;
  /** First byte of Data-In in the slot's memory: behind Data-Out for a bidirectional command. */
  readonly inBase: number;
  /** Data-In can't be stored into: it is Data-Out, of zero copy. */
  readonly readOnly: boolean;
  /** Data-In's high-water mark, relative to `inBase`. */
  written: number;
  /** Raw memory has been handed out. */
  exposed: boolean;
  describe(): string;
}

function revoked(owner: DataOwner): BufferError {
  return new BufferError(
    'ERR_TCMU_BUFFER_REVOKED',
    `tcmu: ${owner.describe()}: its data was used after the command had been completed; finish with the data before complete(), or copy it`,
  );
}

function readOnly(owner: DataOwner): BufferError {
  return new BufferError(
    'ERR_TCMU_BUFFER_READ_ONLY',
    `tcmu: ${owner.describe()}: a store into dataIn, but the command's data goes the other way, and it is the initiator's own memory (zero copy): read dataOut`,
  );
}

function outside(what: string, start: number, length: number, size: number): BufferError {
  return new BufferError(
    'ERR_TCMU_BUFFER_RANGE',
    `tcmu: ${what}: bytes ${start} to ${start + length} are not inside a buffer of ${size} bytes`,
  );
}

/** Start and end as `slice` takes them: whole numbers inside the buffer. */
function window(length: number, start: number, end: number): number {
  if (
    !Number.isInteger(start) ||
    !Number.isInteger(end) ||
    start < 0 ||
    end < start ||
    end > length
  ) {
    throw outside('slice', start, end - start, length);
  }
  return end - start;
}

function checkFileRange(file: BackingFile, operation: string, position: number): void {
  if (!Number.isSafeInteger(position) || position < 0) {
    throw new ArgumentError(
      `tcmu: ${operation} ${file.path}: position ${position} is no file offset`,
    );
  }
}

export class RingDataOut implements DataOut {
  readonly length: number;
  readonly #owner: DataOwner;
  readonly #start: number;

  constructor(owner: DataOwner, start: number, length: number) {
    this.#owner = owner;
    this.#start = start;
    this.length = length;
  }

  #live(): NativeRing {
    if (!this.#owner.active) throw revoked(this.#owner);
    return this.#owner.ring;
  }

  slice(start = 0, end = this.length): DataOut {
    return new RingDataOut(this.#owner, this.#start + start, window(this.length, start, end));
  }

  copyTo(target: Uint8Array, targetStart = 0): void {
    const ring = this.#live();
    if (!(targetStart >= 0) || targetStart + this.length > target.length) {
      throw outside('copyTo', targetStart, this.length, target.length);
    }
    if (this.length > 0) {
      ring.copyOut(this.#owner.slot, this.#start, this.length, target, targetStart);
    }
  }

  toBytes(): Uint8Array {
    const bytes = new Uint8Array(this.length);
    this.copyTo(bytes);
    return bytes;
  }

  writeTo(file: BackingFile, position: number): MaybePromise<void> {
    const ring = this.#live();
    checkFileRange(file, 'write', position);
    if (this.length === 0) return;
    let result: number;
    try {
      const { slot } = this.#owner;
      const { fd, writeMode } = file;
      result = moveFile(ring, true, slot, this.#start, this.length, fd, position, writeMode);
    } catch (error) {
      throw wrapFileError('write', file.path, error);
    }
    if (result < 0) return file.pending('write', -result) as Promise<unknown> as Promise<void>;
  }

  isZero(): boolean {
    return this.length === 0 || this.#live().isZero(this.#owner.slot, this.#start, this.length);
  }

  mismatch(other: Uint8Array | DataOut | DataIn): number {
    const ring = this.#live();
    if (other.length !== this.length) throw outside('mismatch', 0, this.length, other.length);
    let at = 0;
    for (const part of other instanceof Uint8Array ? [other] : other.segments()) {
      const found = ring.mismatch(this.#owner.slot, this.#start + at, part);
      if (found >= 0) return at + found;
      at += part.length;
    }
    return -1;
  }

  segments(): readonly Uint8Array[] {
    const ring = this.#live();
    if (this.length === 0) return [];
    this.#owner.exposed = true;
    return ring.segments(this.#owner.slot, this.#start, this.length);
  }
}

export class RingDataIn implements DataIn {
  readonly length: number;
  readonly #owner: DataOwner;
  /** Relative to the owner's Data-In. */
  readonly #start: number;

  constructor(owner: DataOwner, start: number, length: number) {
    this.#owner = owner;
    this.#start = start;
    this.length = length;
  }

  #live(): NativeRing {
    if (!this.#owner.active) throw revoked(this.#owner);
    return this.#owner.ring;
  }

  /** Announces that `[start, start + length)` of this window is about to be written. */
  #claim(start: number, length: number): void {
    const owner = this.#owner;
    if (owner.readOnly) throw readOnly(owner);
    const from = this.#start + start;
    if (from > owner.written) {
      owner.ring.fill(owner.slot, owner.inBase + owner.written, from - owner.written, 0);
    }
    if (from + length > owner.written) owner.written = from + length;
  }

  slice(start = 0, end = this.length): DataIn {
    return new RingDataIn(this.#owner, this.#start + start, window(this.length, start, end));
  }

  copyFrom(source: Uint8Array, start = 0): void {
    const ring = this.#live();
    if (!(start >= 0) || start + source.length > this.length) {
      throw outside('copyFrom', start, source.length, this.length);
    }
    if (source.length === 0) return;
    this.#claim(start, source.length);
    ring.copyIn(this.#owner.slot, this.#owner.inBase + this.#start + start, source);
  }

  fill(value: number, start = 0, end = this.length): void {
    const ring = this.#live();
    const length = window(this.length, start, end);
    if (length === 0) return;
    this.#claim(start, length);
    ring.fill(this.#owner.slot, this.#owner.inBase + this.#start + start, length, value & 0xff);
  }

  readFrom(file: BackingFile, position: number): MaybePromise<number> {
    const ring = this.#live();
    checkFileRange(file, 'read', position);
    if (this.length === 0) return 0;
    const owner = this.#owner;
    this.#claim(0, this.length);
    let result: number;
    try {
      const at = owner.inBase + this.#start;
      const { fd, readMode } = file;
      result = moveFile(ring, false, owner.slot, at, this.length, fd, position, readMode);
    } catch (error) {
      throw wrapFileError('read', file.path, error);
    }
    return result >= 0 ? result : file.pending('read', -result);
  }

  segments(): readonly Uint8Array[] {
    const ring = this.#live();
    if (this.length === 0) return [];
    const owner = this.#owner;
    const fresh = Math.max(owner.written, this.#start);
    const end = this.#start + this.length;
    this.#claim(0, this.length);
    if (end > fresh) ring.fill(owner.slot, owner.inBase + fresh, end - fresh, 0);
    owner.exposed = true;
    return ring.segments(owner.slot, owner.inBase + this.#start, this.length);
  }
}
