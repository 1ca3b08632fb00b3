/**
 * The other half of the express lane: what a store says of its bytes. It owns nothing; the device listens by
 * `watch`, the file takes its word back when it closes.
 */
import type { BackingFile } from './backing-file.js';

/**
 * A store's word that its bytes are a file's bytes: byte n of the disk is byte n of the file, for reading up
 * to one end and for writing up to another. Where a store gives it (`BlockStore.linear`), plain reads and
 * writes are carried out without calling the store: `read` and `write` must be no more than `readFrom` and
 * `writeTo` of that file then, apart from how they report what fails.
 *
 * The store takes it back, wholly or in part, with `allow`, at once; closing the file takes it back, too.
 */
export class LinearFile {
  /** The file. */
  readonly file: BackingFile;
  #readable = 0;
  #writable = 0;
  readonly #watchers = new Set<() => void>();

  /** Nothing is allowed at first. */
  constructor(file: BackingFile) {
    this.file = file;
    file.linear.add(this);
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
   * Sets both ends, in bytes; 0 allows nothing, nor does a file that is closed. A command in part behind an end goes to the store.
   * Only a store whose settled writes may be volatile allows writing.
   */
  allow(readable: number, writable: number): void {
    const there = !this.file.closed;
    this.#readable = there ? readable : 0;
    this.#writable = there ? writable : 0;
    for (const changed of this.#watchers) changed();
  }

  /** Calls `changed` after every change, until the result is called. @internal */
  watch(changed: () => void): () => void {
    this.#watchers.add(changed);
    return () => this.#watchers.delete(changed);
  }
}
