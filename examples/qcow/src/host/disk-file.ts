// SPDX-License-Identifier: Apache-2.0
/**
 * A host file on disk, over the package's BackingFile: data goes between a command's memory and the
 * file without a copy in JavaScript. What the file system can't do (holes, zeroing) is done by
 * writing, or, for a discard, left out.
 */
import {
  BackingFile,
  type BackingFileOptions,
  type DataIn,
  type DataOut,
  type FileError,
  type MaybePromise,
} from 'tcmu';
import { eachInTurn, orElse } from '../maybe.js';
import type { HostFile } from './host-file.js';

const PIECE = 1024 * 1024;

export class DiskFile implements HostFile {
  readonly backing: BackingFile;
  readonly readOnly: boolean;
  readonly path: string;
  #canZero = true;
  #canPunch = true;

  private constructor(backing: BackingFile, path: string) {
    this.backing = backing;
    this.readOnly = backing.readOnly;
    this.path = path;
  }

  /** @throws FileError `ERR_TCMU_IO`; ArgumentError when it is neither a file nor a block device */
  static async open(path: string, options: BackingFileOptions = {}): Promise<DiskFile> {
    return new DiskFile(await BackingFile.open(path, options), path);
  }

  size(): number {
    return this.backing.size();
  }

  read(target: Uint8Array, position: number): MaybePromise<unknown> {
    return this.backing.readInto(target, position);
  }

  write(source: Uint8Array, position: number): MaybePromise<unknown> {
    return this.backing.writeFrom(source, position);
  }

  readData(data: DataIn, position: number): MaybePromise<unknown> {
    return data.readFrom(this.backing, position);
  }

  writeData(data: DataOut, position: number): MaybePromise<unknown> {
    return data.writeTo(this.backing, position);
  }

  writeZeroes(position: number, length: number): MaybePromise<unknown> {
    if (!this.#canZero) return this.#fill(position, length);
    return orElse(
      () => this.backing.zeroRange(position, length),
      (error) => {
        if (!unsupported(error)) throw error;
        this.#canZero = false;
        return this.#fill(position, length);
      },
    );
  }

  discard(position: number, length: number): MaybePromise<unknown> {
    if (!this.#canPunch) return;
    return orElse(
      () => this.backing.punchHole(position, length),
      (error) => {
        if (!unsupported(error)) throw error;
        this.#canPunch = false;
      },
    );
  }

  flush(): MaybePromise<unknown> {
    return this.backing.datasync();
  }

  truncate(length: number): MaybePromise<unknown> {
    return this.backing.truncate(length);
  }

  nextData(position: number): MaybePromise<number | undefined> {
    return this.backing.nextData(position);
  }

  nextHole(position: number): MaybePromise<number | undefined> {
    return this.backing.nextHole(position);
  }

  close(): Promise<void> {
    return this.backing.close();
  }

  #fill(position: number, length: number): MaybePromise<unknown> {
    const zeros = new Uint8Array(Math.min(length, PIECE));
    return eachInTurn(Math.ceil(length / PIECE), (i) =>
      this.backing.writeFrom(zeros.subarray(0, length - i * PIECE), position + i * PIECE),
    );
  }
}

function unsupported(error: unknown): boolean {
  return ['EOPNOTSUPP', 'ENOTSUP', 'ENOSYS', 'EINVAL'].includes((error as FileError).errno ?? '');
}
