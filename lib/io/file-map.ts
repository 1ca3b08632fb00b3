// SPDX-License-Identifier: Apache-2.0
/**
 * The other half of the express lane: what a store says of where its bytes lie. A table of bounded size that
 * the addon reads at each plain command; whatever is not in it goes to the store. Everything here takes effect
 * at once: the addon moves data only while no JavaScript runs, and begins and ends a command's move without
 * letting any run. It owns no file; the device listens by `watch`, a file ends the map when it closes.
 */
import { ArgumentError } from '../errors.js';
import type { NativeRing } from '../native.js';
import type { BackingFile } from './backing-file.js';

/** How a `FileMap` divides the disk. */
export interface FileMapOptions {
  /** Bytes of a unit, which lies in one piece in one file: a power of two from 512 to 2^52. */
  unit: number;
  /**
   * Units that are remembered at most: a power of two. A unit takes the place of another one whose number is the same modulo
   * this. Each takes 16 bytes of memory.
   */
  units: number;
}

// Words of the table, as addon/ring/express.h has them.
const FILES = 16;
const FILE_WORDS = 3;
const ENTRIES = FILES * FILE_WORDS;
/** What offsets are multiples of: the bits below say file and permission. */
const ALIGNMENT = 512;

function isPowerOfTwo(value: number, least: number, most: number): boolean {
  return value >= least && value <= most && 2 ** Math.round(Math.log2(value)) === value;
}

/**
 * A store's word where in files its bytes lie, unit by unit. Where a store gives it (`BlockStore.fileMap`), plain
 * reads and writes whose bytes are all known are carried out without calling the store: for these, `read` and
 * `write` must be no more than `readFrom` and `writeTo` of the files then, apart from how they report what fails.
 *
 * The store takes its word back before anything makes it wrong: `forget` for a range whose place
 * changes, `clear` and `allow` for all. Closing one of the files takes all of it back for good.
 */
export class FileMap {
  readonly #unit: number;
  readonly #mask: number;
  readonly #words: Float64Array;
  readonly #files: BackingFile[] = [];
  /** Something was set since it was empty. */
  #used = false;
  #readable = 0;
  #writable = 0;
  #closed = false;
  readonly #watchers = new Set<() => void>();

  /**
   * Nothing is known, and nothing allowed, at first.
   * @throws ArgumentError when either number is none that it may be
   */
  constructor({ unit, units }: FileMapOptions) {
    if (!isPowerOfTwo(unit, ALIGNMENT, 2 ** 52) || !isPowerOfTwo(units, 1, 2 ** 24)) {
      throw new ArgumentError(
        `tcmu: file map: ${units} units of ${unit} bytes; give powers of two, up to 2^24 units of 512 bytes to 2^52`,
      );
    }
    this.#unit = unit;
    this.#mask = units - 1;
    this.#words = new Float64Array(ENTRIES + 2 * units).fill(-1);
  }

  /** A map that knows all of the disk: byte n is byte n of `file`. Nothing is allowed at first. */
  static linear(file: BackingFile): FileMap {
    const map = new FileMap({ unit: 2 ** 52, units: 1 });
    map.set(0, 2 ** 52, file, 0, true);
    return map;
  }

  /** Bytes from the start that may be read past the store. */
  get readable(): number {
    return this.#readable;
  }

  /** Bytes from the start that may be written past the store. */
  get writable(): number {
    return this.#writable;
  }

  /**
   * Sets both ends, in bytes; 0 allows nothing, nor does a map one of whose files is closed. A command in part behind an end goes to
   * the store. Only a store whose settled writes may be volatile allows writing.
   */
  allow(readable: number, writable: number): void {
    this.#readable = this.#closed ? 0 : readable;
    this.#writable = this.#closed ? 0 : writable;
    for (const changed of this.#watchers) changed();
  }

  /**
   * The bytes `[position, position + length)` of the disk lie at `offset` of `file`, and may be written there or only read. Whole
   * units are remembered, parts of units at either end are not; nor is anything of a file that is only used through the thread
   * pool, or of a seventeenth file.
   * @throws ArgumentError when position and offset differ by other than a multiple of 512
   */
  set(
    position: number,
    length: number,
    file: BackingFile,
    offset: number,
    writable: boolean,
  ): void {
    if ((offset - position) % ALIGNMENT !== 0) {
      throw new ArgumentError(
        `tcmu: file map: position ${position} at offset ${offset} of ${file.path}: they must differ by a multiple of ${ALIGNMENT}`,
      );
    }
    const number = this.#fileNumber(file);
    if (number < 0) return;
    const unit = this.#unit;
    const words = this.#words;
    const end = Math.floor((position + length) / unit);
    let at = Math.ceil(position / unit);
    const flags = 2 * number + (writable && file.writeMode !== 0 ? 1 : 0);
    let place = offset + (at * unit - position) + flags;
    for (; at < end; at++) {
      const word = ENTRIES + 2 * (at & this.#mask);
      words[word] = at;
      words[word + 1] = place;
      place += unit;
    }
    this.#used = true;
  }

  /** Nothing is known any more of the units that have a part of `[position, position + length)`. */
  forget(position: number, length: number): void {
    const first = Math.floor(position / this.#unit);
    const end = Math.ceil((position + length) / this.#unit);
    if (end - first > this.#mask) return this.clear();
    const words = this.#words;
    for (let at = first; at < end; at++) {
      const word = ENTRIES + 2 * (at & this.#mask);
      if (words[word] === at) words[word] = -1;
    }
  }

  /** Nothing is known any more. */
  clear(): void {
    if (!this.#used) return;
    this.#words.fill(-1, ENTRIES);
    this.#used = false;
  }

  /** The number of a file in the table; -1 when it can't be there. */
  #fileNumber(file: BackingFile): number {
    const files = this.#files;
    // Mostly it is the disk's own, which is asked for first.
    if (files[0] === file) return 0;
    const known = files.indexOf(file);
    if (known >= 0) return known;
    if (files.length === FILES || this.#closed || file.closed || file.readMode === 0) return -1;
    const number = files.push(file) - 1;
    file.maps.add(this);
    this.#words.set([file.fd, file.readMode, file.writeMode], number * FILE_WORDS);
    return number;
  }

  /** One of the files goes: its number may be another file's soon. @internal */
  close(): void {
    this.#closed = true;
    this.clear();
    this.allow(0, 0);
  }

  /** Calls `changed` after every change of what is allowed, until the result is called. @internal */
  watch(changed: () => void): () => void {
    this.#watchers.add(changed);
    return () => this.#watchers.delete(changed);
  }

  /** The ring's express lane goes by this map from now on. @internal */
  bind(ring: NativeRing): void {
    ring.useFileMap(this.#words, Math.log2(this.#unit));
  }
}
