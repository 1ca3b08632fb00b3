// SPDX-License-Identifier: Apache-2.0
/**
 * Writes cpio archives of the kind an initramfs is made of ("newc", Documentation/driver-api/early-userspace/buffer-format.rst).
 * The writer owns the file it opens; file contents are streamed, so an archive may be larger than memory allows for one buffer.
 * Everything inside belongs to root and carries no time: the same input gives the same bytes.
 */
import { closeSync, openSync, readSync, statSync, writeSync } from 'node:fs';

const S_IFDIR = 0o040000;
const S_IFREG = 0o100000;
const S_IFLNK = 0o120000;
const S_IFCHR = 0o020000;
const CHUNK = 1 << 20;

export class CpioWriter implements Disposable {
  readonly #fd: number;
  readonly #directories = new Set<string>();
  #inode = 1;

  constructor(path: string) {
    this.#fd = openSync(path, 'w', 0o600);
  }

  /** A directory and, before it, those above it that are not in the archive yet. Mode 0755. */
  directory(name: string): void {
    const parts = relative(name).split('/').filter(Boolean);
    for (let depth = 1; depth <= parts.length; depth++) {
      const path = parts.slice(0, depth).join('/');
      if (this.#directories.has(path)) continue;
      this.#directories.add(path);
      this.#header(path, S_IFDIR | 0o755, 0);
    }
  }

  /** A regular file with the bytes given. */
  text(name: string, content: string, mode = 0o644): void {
    const bytes = Buffer.from(content);
    this.#parent(name);
    this.#header(name, S_IFREG | mode, bytes.length);
    this.#write(bytes);
    this.#pad(bytes.length);
  }

  /** A copy of a host file, symbolic links followed, mode kept. Throws what `fs` throws if it can't be read or shrinks meanwhile. */
  file(name: string, source: string): void {
    const { size, mode } = statSync(source);
    this.#parent(name);
    this.#header(name, S_IFREG | (mode & 0o7777), size);
    const input = openSync(source, 'r');
    try {
      const chunk = Buffer.allocUnsafe(Math.min(CHUNK, size));
      for (let done = 0; done < size; ) {
        const count = readSync(input, chunk, 0, Math.min(chunk.length, size - done), done);
        if (count === 0) throw new Error(`${source} shrank while it was copied into an initramfs`);
        this.#write(chunk.subarray(0, count));
        done += count;
      }
    } finally {
      closeSync(input);
    }
    this.#pad(size);
  }

  symlink(name: string, target: string): void {
    const bytes = Buffer.from(target);
    this.#parent(name);
    this.#header(name, S_IFLNK | 0o777, bytes.length);
    this.#write(bytes);
    this.#pad(bytes.length);
  }

  characterDevice(name: string, major: number, minor: number): void {
    this.#parent(name);
    this.#header(name, S_IFCHR | 0o600, 0, major, minor);
  }

  /** Writes the trailer; the archive is complete afterwards. */
  finish(): void {
    this.#header('TRAILER!!!', 0, 0);
  }

  [Symbol.dispose](): void {
    closeSync(this.#fd);
  }

  #parent(name: string): void {
    const slash = relative(name).lastIndexOf('/');
    if (slash > 0) this.directory(relative(name).slice(0, slash));
  }

  #header(name: string, mode: number, size: number, major = 0, minor = 0): void {
    const path = Buffer.from(`${relative(name)}\0`);
    const links = (mode & S_IFDIR) === S_IFDIR ? 2 : 1;
    const fields = [this.#inode++, mode, 0, 0, links, 0, size, 0, 0, major, minor, path.length, 0];
    const head = `070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}`;
    this.#write(Buffer.concat([Buffer.from(head), path]));
    this.#pad(head.length + path.length);
  }

  #pad(length: number): void {
    this.#write(Buffer.alloc((4 - (length % 4)) % 4));
  }

  #write(bytes: Buffer): void {
    for (let done = 0; done < bytes.length; ) done += writeSync(this.#fd, bytes, done);
  }
}

function relative(name: string): string {
  return name.replace(/^\/+/, '');
}
