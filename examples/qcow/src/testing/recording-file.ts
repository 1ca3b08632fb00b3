// SPDX-License-Identifier: Apache-2.0
/**
 * A host file that tells of every change and flush as it is issued and as it settles. With `turns` it
 * also answers late and out of order, as a disk under load does.
 */
import type { DataIn, DataOut, MaybePromise } from 'tcmu';
import type { HostFile } from '../host/host-file.js';
import { chain } from '../maybe.js';
import type { Change } from './crash-journal.js';

export interface RecordingOptions {
  /**
   * Turns of the event loop to wait, asked twice for each operation: before it takes effect, and after.
   * Default: it happens and is answered as the file does it.
   */
  turns?: () => number;
}

/** Called when a change is issued; what it answers is called when that has settled. */
export type Observer = (change: Change | 'flush') => () => void;

export class RecordingFile implements HostFile {
  readonly path: string;
  readonly readOnly: boolean;
  readonly #file: HostFile;
  readonly #observe: Observer;
  readonly #turns: (() => number) | undefined;

  constructor(file: HostFile, observe: Observer, { turns }: RecordingOptions = {}) {
    this.path = file.path;
    this.readOnly = file.readOnly;
    this.#file = file;
    this.#observe = observe;
    this.#turns = turns;
  }

  get backing(): HostFile['backing'] {
    return this.#file.backing;
  }

  size(): number {
    return this.#file.size();
  }

  read(target: Uint8Array, position: number): MaybePromise<unknown> {
    return this.#do(() => this.#file.read(target, position));
  }

  readData(data: DataIn, position: number): MaybePromise<unknown> {
    return this.#do(() => this.#file.readData(data, position));
  }

  write(source: Uint8Array, position: number): MaybePromise<unknown> {
    return this.#change({ type: 'write', position, bytes: source.slice() }, () =>
      this.#file.write(source, position),
    );
  }

  writeData(data: DataOut, position: number): MaybePromise<unknown> {
    const bytes = new Uint8Array(data.length);
    data.copyTo(bytes);
    return this.#change({ type: 'write', position, bytes }, () =>
      this.#file.writeData(data, position),
    );
  }

  writeZeroes(position: number, length: number): MaybePromise<unknown> {
    return this.#change({ type: 'zero', position, length }, () =>
      this.#file.writeZeroes(position, length),
    );
  }

  discard(position: number, length: number): MaybePromise<unknown> {
    return this.#change({ type: 'discard', position, length }, () =>
      this.#file.discard(position, length),
    );
  }

  truncate(length: number): MaybePromise<unknown> {
    return this.#change({ type: 'truncate', length }, () => this.#file.truncate(length));
  }

  flush(): MaybePromise<unknown> {
    return this.#change('flush', () => this.#file.flush());
  }

  nextData(position: number): MaybePromise<number | undefined> {
    return this.#file.nextData(position);
  }

  nextHole(position: number): MaybePromise<number | undefined> {
    return this.#file.nextHole(position);
  }

  close(): MaybePromise<unknown> {
    return this.#file.close();
  }

  #change(change: Change | 'flush', run: () => MaybePromise<unknown>): MaybePromise<unknown> {
    const settled = this.#observe(change);
    return chain(this.#do(run), settled);
  }

  #do<T>(run: () => MaybePromise<T>): MaybePromise<T> {
    return this.#turns === undefined ? run() : this.#late(run, this.#turns);
  }

  async #late<T>(run: () => MaybePromise<T>, turns: () => number): Promise<T> {
    await wait(turns());
    const answer = await run();
    await wait(turns());
    return answer;
  }
}

async function wait(turns: number): Promise<void> {
  for (let i = 0; i < turns; i++) await new Promise((resolve) => setImmediate(resolve));
}
