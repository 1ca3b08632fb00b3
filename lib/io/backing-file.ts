// SPDX-License-Identifier: Apache-2.0
/**
 * A file or block device that holds a disk's bytes, with what `node:fs` lacks for the purpose: I/O
 * straight between a command's memory and the file, I/O that is tried without blocking first, holes,
 * SEEK_DATA and SEEK_HOLE, and locks.
 *
 * Methods that return `MaybePromise` answer at once when that did not block, and by a promise
 * otherwise. `close` waits for operations under way; using the file after it throws
 * `ERR_TCMU_FILE_CLOSED`.
 */
import { constants, fstatSync } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import type { MaybePromise } from '../device/data.js';
import { ArgumentError, errnoOf, FileError } from '../errors.js';
import { IO_INLINE, IO_NOWAIT, type NativeFileFacts, native } from '../native.js';
import type { FileMap } from './file-map.js';
import { fileError, io, queued, wrapFileError } from './io-queue.js';

/** How a backing file is opened, for `BackingFile.open`. */
export interface BackingFileOptions {
  /** Open for reading only. Default false. */
  readOnly?: boolean;
  /** Create the file when it does not exist. Default false. */
  create?: boolean;
  /**
   * With `create`: fail when it exists. Without: claim a block device (O_EXCL), EBUSY while it is
   * mounted or otherwise claimed, and so for others from then on. Default false.
   */
  exclusive?: boolean;
  /** O_DIRECT: no page cache; positions and lengths must suit the device's blocks. Default false. */
  direct?: boolean;
  /** Refuse a symbolic link as the last component (O_NOFOLLOW). Default false. */
  noFollow?: boolean;
  /**
   * Where file I/O happens. `auto` (default): at once on the JavaScript thread when the kernel says
   * that it need not wait (RWF_NOWAIT) or the file lives in memory, in the thread pool otherwise.
   * `inline`: always at once, blocking the thread. `pool`: never on the JavaScript thread.
   */
  io?: 'auto' | 'inline' | 'pool';
  /** Permission bits of a created file. Default 0o600. */
  mode?: number;
}

// linux/falloc.h
const FALLOC_FL_KEEP_SIZE = 0x01;
const FALLOC_FL_PUNCH_HOLE = 0x02;
const FALLOC_FL_ZERO_RANGE = 0x10;
// QEMU's image locks: first byte of either row, and permissions.
const PERMISSION = 100;
const UNSHARED = 200;
const CONSISTENT_READ = 0;
const WRITE = 1;
const RESIZE = 3;
// unistd.h
const SEEK_DATA = 3;
const SEEK_HOLE = 4;

/**
 * An open file or block device that commands' data moves to and from without a JavaScript buffer
 * between them: `data.readFrom(file, position)`, `data.writeTo(file, position)`.
 */
export class BackingFile {
  /** As it was given to `open`. */
  readonly path: string;
  /** Whether it was opened for reading alone. */
  readonly readOnly: boolean;
  /** What the kernel says of the file, as of opening. */
  readonly facts: Readonly<NativeFileFacts>;
  /** How reads are tried: IO_* in native.ts. @internal */
  readonly readMode: number;
  /** How writes are tried. @internal */
  readonly writeMode: number;
  /** What passes by stores to this file; taken back before the descriptor goes. @internal */
  readonly maps = new Set<FileMap>();
  readonly #handle: FileHandle;
  #closed = false;
  #running = 0;
  #idle: (() => void) | undefined;

  private constructor(path: string, handle: FileHandle, options: BackingFileOptions) {
    this.path = path;
    this.readOnly = options.readOnly ?? false;
    this.#handle = handle;
    this.facts = native.fileFacts(handle.fd);
    const choice = options.io ?? 'auto';
    const inline = choice === 'inline' || (choice === 'auto' && this.facts.memory);
    const fast = choice === 'auto';
    this.readMode = inline ? IO_INLINE : fast && this.facts.nowaitRead ? IO_NOWAIT : 0;
    this.writeMode = inline ? IO_INLINE : fast && this.facts.nowaitWrite ? IO_NOWAIT : 0;
  }

  /** @throws FileError `ERR_TCMU_IO` with the errno; ArgumentError when it is no file or block device. */
  static async open(path: string, options: BackingFileOptions = {}): Promise<BackingFile> {
    const flags =
      (options.readOnly ? constants.O_RDONLY : constants.O_RDWR) |
      (options.create ? constants.O_CREAT : 0) |
      (options.exclusive ? constants.O_EXCL : 0) |
      (options.direct ? constants.O_DIRECT : 0) |
      (options.noFollow ? constants.O_NOFOLLOW : 0) |
      // A FIFO would block the open; it is refused below.
      constants.O_NONBLOCK;
    const mode = options.mode ?? 0o600;
    let handle: FileHandle;
    try {
      // No access time to keep up to date at every read; only the file's owner may ask for that.
      handle = await open(path, flags | constants.O_NOATIME, mode).catch((error: unknown) => {
        if (errnoOf(error) !== 'EPERM') throw error;
        return open(path, flags, mode);
      });
    } catch (error) {
      throw wrapFileError('open', path, error);
    }
    try {
      const stat = fstatSync(handle.fd);
      if (!stat.isFile() && !stat.isBlockDevice()) {
        throw new ArgumentError(`tcmu: open ${path}: neither a file nor a block device`, {
          operation: 'open',
          path,
        });
      }
      return new BackingFile(path, handle, options);
    } catch (error) {
      await handle.close();
      throw error;
    }
  }

  /** Whether `close` has been called. */
  get closed(): boolean {
    return this.#closed;
  }

  /** The descriptor, valid until `close`. @throws FileError `ERR_TCMU_FILE_CLOSED` */
  get fd(): number {
    if (this.#closed) {
      throw new FileError('ERR_TCMU_FILE_CLOSED', `tcmu: ${this.path} was closed`, {
        path: this.path,
      });
    }
    return this.#handle.fd;
  }

  /** Bytes now: of a file by fstat, of a block device as of opening. */
  size(): number {
    if (this.facts.kind === 'block') return native.fileFacts(this.fd).size;
    return fstatSync(this.fd).size;
  }

  /** Takes over an operation the addon queued for this file under `id`. @internal */
  pending(operation: string, id: number): Promise<number> {
    this.#running++;
    return queued(id, operation, this.path, this.#settled);
  }

  readonly #settled = (): void => {
    if (--this.#running === 0) this.#idle?.();
  };

  #run(operation: string, result: number): MaybePromise<number> {
    return result >= 0 ? result : this.pending(operation, -result);
  }

  /** Reads into `target`; bytes behind the end of the file are zeros. Answers the bytes that came from it. */
  readInto(target: Uint8Array, position: number): MaybePromise<number> {
    try {
      return this.#run('read', io.read(target, this.fd, position, this.readMode));
    } catch (error) {
      throw wrapFileError('read', this.path, error);
    }
  }

  /** Writes all of `source`, which must not change until it is done. */
  writeFrom(source: Uint8Array, position: number): MaybePromise<void> {
    try {
      return done(this.#run('write', io.write(source, this.fd, position, this.writeMode)));
    } catch (error) {
      throw wrapFileError('write', this.path, error);
    }
  }

  /** fdatasync(2): data and the metadata needed to find it are on the device. */
  datasync(): MaybePromise<void> {
    const mode = this.facts.memory ? this.writeMode : 0;
    try {
      return done(this.#run('fdatasync', io.datasync(this.fd, mode)));
    } catch (error) {
      throw wrapFileError('fdatasync', this.path, error);
    }
  }

  /**
   * Deallocates `length` bytes at byte `position`: they read as zeros (fallocate(2), PUNCH_HOLE).
   * @throws FileError `ERR_TCMU_IO`, errno ENOTSUP or EOPNOTSUPP where the file system can't
   */
  punchHole(position: number, length: number): MaybePromise<void> {
    return this.#allocate(
      'punch hole in',
      FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
      position,
      length,
    );
  }

  /**
   * Zeros `length` bytes at byte `position` and keeps them allocated (fallocate(2), ZERO_RANGE).
   * @throws FileError `ERR_TCMU_IO`, errno ENOTSUP or EOPNOTSUPP where the file system can't
   */
  zeroRange(position: number, length: number): MaybePromise<void> {
    return this.#allocate('zero', FALLOC_FL_ZERO_RANGE, position, length);
  }

  /**
   * Allocates `length` bytes at byte `position`, so that writing there can't fail for lack of
   * space.
   * @throws FileError `ERR_TCMU_IO_NO_SPACE`, `ERR_TCMU_IO`
   */
  allocate(position: number, length: number): MaybePromise<void> {
    return this.#allocate('allocate', 0, position, length);
  }

  #allocate(
    operation: string,
    flags: number,
    position: number,
    length: number,
  ): MaybePromise<void> {
    const mode = this.facts.memory ? this.writeMode : 0;
    try {
      return done(this.#run(operation, io.allocate(this.fd, flags, position, length, mode)));
    } catch (error) {
      throw wrapFileError(operation, this.path, error);
    }
  }

  /**
   * Copies a range of another file, or of another place of this one, inside the kernel
   * (copy_file_range(2)): shared blocks where the file system can, never through this process.
   *
   * @returns bytes copied; fewer than `length` when the source ends, or failed later on
   * @throws FileError `ERR_TCMU_IO`: EXDEV, EOPNOTSUPP or EINVAL where the two files can't be copied so
   */
  async copyFrom(
    source: BackingFile,
    sourcePosition: number,
    position: number,
    length: number,
  ): Promise<number> {
    source.#running++;
    try {
      const { fd } = source;
      const queued = io.copy(fd, sourcePosition, this.fd, position, length, 0);
      return await this.#run('copy into', queued);
    } catch (error) {
      throw wrapFileError('copy into', this.path, error);
    } finally {
      source.#settled();
    }
  }

  /**
   * Sets the file's length, in bytes.
   * @throws FileError `ERR_TCMU_IO` with the errno
   */
  async truncate(length: number): Promise<void> {
    await this.#run('truncate', io.truncate(this.fd, length, 0));
  }

  /**
   * First offset in bytes at or behind `position` that holds data, or undefined when only a hole
   * follows.
   * @throws FileError `ERR_TCMU_IO` with the errno
   */
  nextData(position: number): Promise<number | undefined> {
    return this.#seek(position, SEEK_DATA);
  }

  /**
   * First offset in bytes at or behind `position` in a hole (the end of the file counts as one).
   * @throws FileError `ERR_TCMU_IO` with the errno
   */
  nextHole(position: number): Promise<number | undefined> {
    return this.#seek(position, SEEK_HOLE);
  }

  async #seek(position: number, whence: number): Promise<number | undefined> {
    try {
      return await this.#run('seek', io.seek(this.fd, position, whence, 0));
    } catch (error) {
      if ((error as FileError).errno === 'ENXIO') return undefined;
      throw error;
    }
  }

  /**
   * Takes an open file description lock on the whole file (fcntl F_OFD_SETLK): shared when read-only.
   * @throws FileError `ERR_TCMU_FILE_LOCKED` when another process holds it.
   */
  lock(exclusive = !this.readOnly): void {
    let taken: boolean;
    try {
      taken = native.lockFile(this.fd, exclusive, 0, 0);
    } catch (error) {
      throw wrapFileError('lock', this.path, error);
    }
    if (!taken) {
      throw new FileError(
        'ERR_TCMU_FILE_LOCKED',
        `tcmu: lock ${this.path}: another process has it open ${exclusive ? '' : 'for writing '}and locked; stop that process first (lsof ${this.path})`,
        { operation: 'lock', path: this.path, errno: 'EAGAIN' },
      );
    }
  }

  /**
   * Locks a disk image as QEMU does, so that QEMU's programs and this process keep off each other's
   * images: shared locks on single bytes, 100 + n for a permission used and 200 + n for one that nobody
   * else may use (QEMU, docs/interop and block/file-posix.c: 0 consistent read, 1 write, 3 resize).
   * Nobody else may write or resize then; read-only, others may read too. Until `close`.
   * @throws FileError `ERR_TCMU_FILE_LOCKED` when another process uses the image in a way that does not
   *   go with this; nothing is locked then.
   */
  lockImage(writable = !this.readOnly): void {
    const used = writable ? [CONSISTENT_READ, WRITE, RESIZE] : [CONSISTENT_READ];
    const unshared = [WRITE, RESIZE];
    const mine = [...used.map((p) => PERMISSION + p), ...unshared.map((p) => UNSHARED + p)];
    // Whoever locks first and looks afterwards can't miss another who does the same.
    const theirs = [...used.map((p) => UNSHARED + p), ...unshared.map((p) => PERMISSION + p)];
    const { fd } = this;
    try {
      if (
        mine.every((byte) => native.lockFile(fd, false, byte, 1)) &&
        !theirs.some((byte) => native.lockedByOthers(fd, byte, 1))
      ) {
        return;
      }
      for (const byte of mine) native.unlockFile(fd, byte, 1);
    } catch (error) {
      throw wrapFileError('lock', this.path, error);
    }
    throw new FileError(
      'ERR_TCMU_FILE_LOCKED',
      `tcmu: lock ${this.path}: another process has the image open${writable ? '' : ' for writing'}; stop that process first (lsof ${this.path})`,
      { operation: 'lock', path: this.path, errno: 'EAGAIN' },
    );
  }

  /**
   * Waits for operations under way, then closes. Does not sync. Idempotent.
   * @throws FileError `ERR_TCMU_IO` what close(2) reports
   */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    for (const map of this.maps) map.close();
    if (this.#running > 0) {
      await new Promise<void>((resolve) => {
        this.#idle = resolve;
      });
    }
    try {
      await this.#handle.close();
    } catch (error) {
      throw wrapFileError('close', this.path, error);
    }
  }

  /** As `close`, for `await using`; rejects as that does. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

function done(result: MaybePromise<number>): MaybePromise<void> {
  if (typeof result !== 'number') return result.then(() => undefined);
}

export { fileError };
