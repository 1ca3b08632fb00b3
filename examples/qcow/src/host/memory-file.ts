// SPDX-License-Identifier: Apache-2.0
/** A host file in memory: for tests, and for looking at images that are not on a disk. */
import type { DataIn, DataOut } from 'tcmu';
import type { HostFile } from './host-file.js';

export class MemoryFile implements HostFile {
  readonly path: string;
  readonly readOnly: boolean;
  #bytes: Uint8Array;
  #size: number;

  /** @param content copied */
  constructor(
    content: Uint8Array = new Uint8Array(0),
    { path = 'memory', readOnly = false }: { path?: string; readOnly?: boolean } = {},
  ) {
    this.path = path;
    this.readOnly = readOnly;
    this.#bytes = content.slice();
    this.#size = content.length;
  }

  size(): number {
    return this.#size;
  }

  /** A copy of what the file holds. */
  toBytes(): Uint8Array {
    return this.#bytes.slice(0, this.#size);
  }

  read(target: Uint8Array, position: number): void {
    const found = this.#bytes.subarray(
      Math.min(position, this.#size),
      Math.min(position + target.length, this.#size),
    );
    target.set(found);
    target.fill(0, found.length);
  }

  write(source: Uint8Array, position: number): void {
    this.#reserve(position + source.length);
    this.#bytes.set(source, position);
  }

  readData(data: DataIn, position: number): void {
    const bytes = new Uint8Array(data.length);
    this.read(bytes, position);
    data.copyFrom(bytes);
  }

  writeData(data: DataOut, position: number): void {
    this.#reserve(position + data.length);
    data.copyTo(this.#bytes, position);
  }

  writeZeroes(position: number, length: number): void {
    this.#reserve(position + length);
    this.#bytes.fill(0, position, position + length);
  }

  discard(position: number, length: number): void {
    const end = Math.min(position + length, this.#size);
    this.#bytes.fill(0, Math.min(position, end), end);
  }

  flush(): void {}

  truncate(length: number): void {
    if (length < this.#size) this.#bytes.fill(0, length, this.#size);
    else this.#reserve(length);
    this.#size = length;
  }

  nextData(position: number): number | undefined {
    return position < this.#size ? position : undefined;
  }

  nextHole(): number {
    return this.#size;
  }

  close(): void {}

  #reserve(end: number): void {
    if (end > this.#bytes.length) {
      const grown = new Uint8Array(Math.max(end, 2 * this.#bytes.length));
      grown.set(this.#bytes);
      this.#bytes = grown;
    }
    if (end > this.#size) this.#size = end;
  }
}
