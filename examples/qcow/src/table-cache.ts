// SPDX-License-Identifier: Apache-2.0
/**
 * A bounded cache of slices of metadata tables, addressed by their offset in the host file.
 *
 * Whoever changes a table asks for it and changes it without an await between (`edit` does that), and
 * calls `touch` for the changed bytes. Changed
 * tables stay until `takeDirty` has copied what changed and the copy has been written; the copy is
 * what a metadata sync writes, so that changes made meanwhile wait for the next one. Tables that are
 * not dirty go, least recently used first (by second chance), when the cache is full.
 */
import type { MaybePromise } from 'tcmu';
import type { HostFile } from './host/host-file.js';

/** Changes are written in whole sectors: a device writes these in one piece. */
const SECTOR = 512;

export class Table {
  readonly offset: number;
  readonly bytes: Uint8Array;
  readonly view: DataView;
  /** Still what the cache answers for its offset. */
  cached = true;
  /** Asked for since eviction last came by. */
  used = true;
  /** A copy of it is being written. */
  writing = false;
  dirtyStart = Number.POSITIVE_INFINITY;
  dirtyEnd = 0;

  constructor(offset: number, bytes: Uint8Array) {
    this.offset = offset;
    this.bytes = bytes;
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }
}

/** A copy of changed bytes on its way to the file. */
export interface DirtyRange {
  readonly position: number;
  readonly bytes: Uint8Array;
  readonly table: Table;
}

export class TableCache {
  readonly #file: HostFile;
  readonly #tableBytes: number;
  readonly #limit: number;
  readonly #tables = new Map<number, Table>();
  readonly #loading = new Map<number, Promise<Table>>();
  readonly #dirty = new Set<Table>();

  /** @param bytes memory for tables; at least two are kept */
  constructor(file: HostFile, tableBytes: number, bytes: number) {
    this.#file = file;
    this.#tableBytes = tableBytes;
    this.#limit = Math.max(2, Math.floor(bytes / tableBytes));
  }

  get dirtyCount(): number {
    return this.#dirty.size;
  }

  /** So much is dirty that a sync should come before more is. */
  get crowded(): boolean {
    return this.#dirty.size * 2 > this.#limit;
  }

  get count(): number {
    return this.#tables.size;
  }

  /** The table when it is in memory. */
  peek(offset: number): Table | undefined {
    const table = this.#tables.get(offset);
    if (table !== undefined) table.used = true;
    return table;
  }

  get(offset: number): MaybePromise<Table> {
    return this.peek(offset) ?? this.#loading.get(offset) ?? this.#load(offset);
  }

  /** What `change` makes of the table, called when it is in memory; for changes. */
  edit<R>(offset: number, change: (table: Table) => R): MaybePromise<R> {
    const table = this.get(offset);
    return table instanceof Promise ? this.#editLater(offset, table, change) : change(table);
  }

  async #editLater<R>(
    offset: number,
    loading: Promise<Table>,
    change: (table: Table) => R,
  ): Promise<R> {
    for (let next: MaybePromise<Table> = loading; ; ) {
      await next;
      // It may have been pushed out again before we came to run.
      next = this.get(offset);
      if (!(next instanceof Promise)) return change(next);
    }
  }

  /** A table whose content is known and need not be read: all zeros, as the file has it. */
  put(offset: number): Table {
    this.#evict();
    const table = new Table(offset, new Uint8Array(this.#tableBytes));
    this.#tables.set(offset, table);
    return table;
  }

  #load(offset: number): MaybePromise<Table> {
    const bytes = new Uint8Array(this.#tableBytes);
    const read = this.#file.read(bytes, offset);
    if (!(read instanceof Promise)) return this.#keep(offset, bytes);
    const loading = read.then(
      () => {
        this.#loading.delete(offset);
        return this.#tables.get(offset) ?? this.#keep(offset, bytes);
      },
      (error: unknown) => {
        this.#loading.delete(offset);
        throw error;
      },
    );
    this.#loading.set(offset, loading);
    return loading;
  }

  #keep(offset: number, bytes: Uint8Array): Table {
    this.#evict();
    const table = new Table(offset, bytes);
    this.#tables.set(offset, table);
    return table;
  }

  #evict(): void {
    if (this.#tables.size < this.#limit) return;
    // Twice round at most: the first may only take the second chances away.
    for (let left = 2 * this.#tables.size; left > 0 && this.#tables.size >= this.#limit; left--) {
      const [offset, table] = this.#tables.entries().next().value as [number, Table];
      this.#tables.delete(offset);
      if (table.used || table.writing || table.dirtyEnd > 0) {
        table.used = false;
        this.#tables.set(offset, table);
      } else {
        table.cached = false;
      }
    }
  }

  /** Bytes `[start, end)` of the table have been changed. */
  touch(table: Table, start: number, end: number): void {
    if (!table.cached) throw new Error(`table at ${table.offset} was changed behind the cache`);
    if (start < table.dirtyStart) table.dirtyStart = start;
    if (end > table.dirtyEnd) table.dirtyEnd = end;
    this.#dirty.add(table);
  }

  /** Copies of all that has changed; the tables count as clean, and stay until `written` or `restore`. */
  takeDirty(): DirtyRange[] {
    const ranges: DirtyRange[] = [];
    for (const table of this.#dirty) {
      const start = Math.floor(table.dirtyStart / SECTOR) * SECTOR;
      const end = Math.ceil(table.dirtyEnd / SECTOR) * SECTOR;
      ranges.push({
        position: table.offset + start,
        bytes: table.bytes.slice(start, end),
        table,
      });
      table.dirtyStart = Number.POSITIVE_INFINITY;
      table.dirtyEnd = 0;
      table.writing = true;
    }
    this.#dirty.clear();
    return ranges;
  }

  written(ranges: readonly DirtyRange[]): void {
    for (const { table } of ranges) table.writing = false;
  }

  /** The ranges could not be written: they are dirty again. */
  restore(ranges: readonly DirtyRange[]): void {
    for (const { table, position, bytes } of ranges) {
      table.writing = false;
      const start = position - table.offset;
      this.touch(table, start, start + bytes.length);
    }
  }

  /** Forgets the tables of a range of the file, dirty or not: the range is used for something else. */
  forget(position: number, length: number): void {
    for (let offset = position; offset < position + length; offset += this.#tableBytes) {
      const table = this.#tables.get(offset);
      if (table === undefined) continue;
      table.cached = false;
      this.#tables.delete(offset);
      this.#dirty.delete(table);
    }
  }

  /** Forgets everything. */
  clear(): void {
    for (const table of this.#tables.values()) table.cached = false;
    this.#tables.clear();
    this.#dirty.clear();
  }
}
