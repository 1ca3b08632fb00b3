// SPDX-License-Identifier: Apache-2.0
/**
 * A small file that keeps what a disk must remember over restarts beside its data: saved mode pages, a
 * format or sanitize operation that has not ended.
 *
 * Contract: a `save` that settled is durable; a crash leaves the state before a save or after it, whole. The
 * file is there only while there is something to keep. One process at a time uses it, as it does the disk.
 * Its folder may belong to somebody less trusted: no symbolic link is followed to it.
 */
import { constants } from 'node:fs';
import { open, readFile, rename, rm } from 'node:fs/promises';
import { dirname } from 'node:path';
import { FileError } from '../errors.js';
import type { StateStorage } from '../scsi/state-storage.js';
import { wrapFileError } from './io-queue.js';

/** Nor is a FIFO waited for. */
const READ = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;

/** How a state file is used. */
export interface StateFileOptions {
  /** Only load: saving fails with EROFS. Default false. */
  readOnly?: boolean;
}

/**
 * A small file with what a disk must remember over restarts, such as saved mode pages: in named parts, replaced
 * as a whole and durably (written beside it, then renamed) at each save.
 */
export class StateFile {
  /** Where the file is, or will be once there is something to keep. */
  readonly path: string;
  /** Saving fails with EROFS. */
  readonly readOnly: boolean;
  /** What the file holds; read once. */
  #state: Promise<Map<string, Uint8Array>> | undefined;
  #saved: Promise<unknown> = Promise.resolve();

  constructor(path: string, options: StateFileOptions = {}) {
    this.path = path;
    this.readOnly = options.readOnly ?? false;
  }

  /**
   * A part of the file by its name, for `modePageStorage` or `operationStorage` of a `BlockDevice`. Its
   * methods throw FileError: what the file system says, and `ERR_TCMU_STATE` for a file that is no state.
   */
  storage(name: string): StateStorage {
    return {
      load: async () => (await this.#load()).get(name),
      save: (state) => {
        const saved = this.#saved.then(async () => {
          const states = await this.#load();
          const changed = new Map(states);
          if (state.length === 0) changed.delete(name);
          else changed.set(name, state.slice());
          await this.#write(changed);
          this.#state = Promise.resolve(changed);
        });
        // One after the other; the failure of one is not the next one's.
        this.#saved = saved.catch(() => {});
        return saved;
      },
    };
  }

  #load(): Promise<Map<string, Uint8Array>> {
    this.#state ??= this.#read().catch((error: unknown) => {
      this.#state = undefined;
      throw error;
    });
    return this.#state;
  }

  async #read(): Promise<Map<string, Uint8Array>> {
    let text: string;
    try {
      text = await readFile(this.path, { encoding: 'utf8', flag: READ });
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return new Map();
      throw wrapFileError('read', this.path, error);
    }
    const states = decode(text);
    if (states !== undefined) return states;
    throw new FileError(
      'ERR_TCMU_STATE',
      `tcmu: read ${this.path}: it is no state of a disk; put the right file there, or remove it: the disk then forgets its saved mode pages, and that it was being formatted or sanitized`,
      { operation: 'read', path: this.path },
    );
  }

  async #write(states: ReadonlyMap<string, Uint8Array>): Promise<void> {
    const { path } = this;
    try {
      if (this.readOnly) throw Object.assign(new Error('read-only'), { code: 'EROFS' });
      if (states.size === 0) await rm(path, { force: true });
      else {
        const next = `${path}.new`;
        await rm(next, { force: true });
        const file = await open(next, 'wx', 0o600);
        try {
          await file.writeFile(encode(states));
          await file.sync();
        } finally {
          await file.close();
        }
        await rename(next, path);
      }
      // The name, too, must be durable.
      const folder = await open(dirname(path), 'r');
      try {
        await folder.sync();
      } finally {
        await folder.close();
      }
    } catch (error) {
      throw wrapFileError('save', path, error);
    }
  }
}

function encode(states: ReadonlyMap<string, Uint8Array>): string {
  const entries = [...states].map(([name, bytes]) => [name, Buffer.from(bytes).toString('hex')]);
  return `${JSON.stringify({ tcmu: 1, state: Object.fromEntries(entries) })}\n`;
}

function decode(text: string): Map<string, Uint8Array> | undefined {
  let read: unknown;
  try {
    read = JSON.parse(text);
  } catch {
    return undefined;
  }
  const { tcmu, state } = (read ?? {}) as Record<string, unknown>;
  if (tcmu !== 1 || typeof state !== 'object' || state === null) return undefined;
  const states = new Map<string, Uint8Array>();
  for (const [name, value] of Object.entries(state)) {
    if (typeof value !== 'string' || !/^([0-9a-f]{2})+$/.test(value)) return undefined;
    states.set(name, Buffer.from(value, 'hex'));
  }
  return states;
}
