// SPDX-License-Identifier: Apache-2.0
/**
 * Everything that reached the files of a store, in order, so that a test can ask: what could be on the
 * device if the power failed here?
 *
 * The model of a device: a change that had settled before a flush began is there once that flush has
 * settled. Of every other change issued before the cut any part may be there, in pieces of a sector
 * (512 bytes, which a device writes whole), whatever became of changes before and after it; two
 * changes of one sector keep their order. Time is counted in events: a change or flush issued, a change
 * or flush settled, a mark of the test.
 */
import type { HostFile } from '../host/host-file.js';
import { RecordingFile, type RecordingOptions } from './recording-file.js';

export const SECTOR = 512;

export type Change =
  | { readonly type: 'write'; readonly position: number; readonly bytes: Uint8Array }
  | { readonly type: 'zero' | 'discard'; readonly position: number; readonly length: number }
  | { readonly type: 'truncate'; readonly length: number };

interface Entry {
  readonly file: number;
  readonly change: Change | 'flush';
  readonly issued: number;
  /** Infinity while it is under way, and for ever when it failed. */
  settled: number;
}

interface Recorded {
  readonly path: string;
  readonly before: Uint8Array;
}

/** Decides whether a piece of a change that no flush has covered is on the device. */
export type Keep = (change: Change, piece: number) => boolean;

export class CrashJournal {
  readonly #files: Recorded[] = [];
  readonly #entries: Entry[] = [];
  #clock = 0;

  /**
   * The same file, its changes recorded from now on.
   * @param before what it holds now, durably
   */
  record(file: HostFile, before: Uint8Array, options: RecordingOptions = {}): RecordingFile {
    const index = this.#files.length;
    this.#files.push({ path: file.path, before: before.slice() });
    return new RecordingFile(file, (change) => this.#begin(index, change), options);
  }

  /** Events so far. Cuts are from 0, nothing has happened, to this. */
  get now(): number {
    return this.#clock;
  }

  /** A moment of its own, for notes about what the store was asked and has answered. */
  mark(): number {
    return ++this.#clock;
  }

  /** Cuts after which the device can hold something else than after the one before. */
  cuts(): number[] {
    const moments = this.#entries.flatMap(({ change, issued, settled }) =>
      change === 'flush' ? [settled] : [issued],
    );
    return [0, ...moments.filter(Number.isFinite)].sort((a, b) => a - b);
  }

  /**
   * What the files hold when the power fails after event `cut`, by path.
   * @param keep asked for each piece of each change that need not be there. Pieces are the sectors of a
   *   change, the first one 0; a truncation is one piece.
   */
  crash(cut: number, keep: Keep = () => true): Map<string, Uint8Array> {
    return new Map(
      this.#files.map(({ path, before }, file) => [path, this.#contents(file, before, cut, keep)]),
    );
  }

  #begin(file: number, change: Change | 'flush'): () => void {
    const entry: Entry = { file, change, issued: ++this.#clock, settled: Infinity };
    this.#entries.push(entry);
    return () => {
      entry.settled = ++this.#clock;
    };
  }

  #contents(file: number, before: Uint8Array, cut: number, keep: Keep): Uint8Array {
    const issued = this.#entries.filter((entry) => entry.file === file && entry.issued <= cut);
    let flushed = 0;
    for (const entry of issued) {
      if (entry.change === 'flush' && entry.settled <= cut) {
        flushed = Math.max(flushed, entry.issued);
      }
    }
    const device = new Device(before);
    for (const { change, settled } of issued) {
      if (change !== 'flush') device.apply(change, settled < flushed ? () => true : keep);
    }
    return device.contents();
  }
}

/** Bytes that grow by writing. */
class Device {
  #bytes: Uint8Array;
  #length: number;

  constructor(before: Uint8Array) {
    this.#bytes = before.slice();
    this.#length = before.length;
  }

  contents(): Uint8Array {
    return this.#bytes.slice(0, this.#length);
  }

  apply(change: Change, keep: Keep): void {
    if (change.type === 'truncate') {
      if (!keep(change, 0)) return;
      if (change.length < this.#length) this.#bytes.fill(0, change.length, this.#length);
      this.#reserve(change.length);
      this.#length = change.length;
      return;
    }
    const { position } = change;
    const length = change.type === 'write' ? change.bytes.length : change.length;
    for (let at = position, piece = 0; at < position + length; piece++) {
      const end = Math.min((Math.floor(at / SECTOR) + 1) * SECTOR, position + length);
      if (keep(change, piece)) this.#put(change, at, end);
      at = end;
    }
  }

  #put(change: Exclude<Change, { type: 'truncate' }>, start: number, end: number): void {
    if (change.type === 'discard') {
      this.#bytes.fill(0, Math.min(start, this.#length), Math.min(end, this.#length));
      return;
    }
    this.#reserve(end);
    this.#length = Math.max(this.#length, end);
    if (change.type === 'write') {
      const { bytes, position } = change;
      this.#bytes.set(bytes.subarray(start - position, end - position), start);
    } else this.#bytes.fill(0, start, end);
  }

  #reserve(end: number): void {
    if (end <= this.#bytes.length) return;
    const grown = new Uint8Array(Math.max(end, 2 * this.#bytes.length));
    grown.set(this.#bytes);
    this.#bytes = grown;
  }
}
