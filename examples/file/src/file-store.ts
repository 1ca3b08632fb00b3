// SPDX-License-Identifier: Apache-2.0
/**
 * A disk whose bytes are those of a raw file or block device, position for position.
 *
 * What it promises:
 * - A settled `flush`, a settled `write` with `fua`, and with `writeCache: false` every settled change,
 *   is on the device: fdatasync(2) has said so. After one failed fdatasync the kernel no longer knows
 *   what was lost, so the store takes no further change and no further flush until it is opened anew;
 *   reading goes on, to save what can be saved.
 * - A file that became shorter than the disk is never served as zeros: what is missing can't be read,
 *   nor written (which would turn the rest into a hole), and no flush succeeds, until it is long again.
 *   Reads and flushes notice at once, writes within a second.
 * - The file is locked while it is open, against other processes that lock (fcntl F_OFD_SETLK);
 *   a block device is claimed too (O_EXCL), so that nobody mounts it meanwhile.
 *
 * It owns the file's descriptors from `open` to `close`. Requests go from the command's memory to the
 * file and back without passing through JavaScript; reading and writing answer at once when the
 * kernel need not wait.
 */
import { existsSync, fstatSync, readFileSync } from 'node:fs';
import { readlink, statfs, unlink } from 'node:fs/promises';
import { setImmediate as nextTurn } from 'node:timers/promises';
import {
  ArgumentError,
  BackingFile,
  type BlockExtent,
  type BlockStore,
  type DataIn,
  type DataOut,
  FileError,
  FileMap,
  type MaybePromise,
  type RequestContext,
  type StoreSpace,
  type UnmapContext,
  type WriteContext,
} from 'tcmu';
import { type SenseError, sense } from 'tcmu/scsi';
import { formatSize } from 'tcmu/store';
import { checkOpened, resolvePath } from './allowed-path.js';
import { GroupSync } from './group-sync.js';

export interface FileStoreOptions {
  /**
   * Bytes. A file that does not exist is created with this size, a shorter one grows to it, without
   * allocating. Default: the size the file has.
   */
  size?: number | undefined;
  /** Logical block size: 512, 1024, 2048 or 4096 bytes. Default 512, or the block device's own. */
  blockSize?: number | undefined;
  /** What initiators should align to, a multiple of `blockSize`. Default the file system's block, at most 4096. */
  physicalBlockSize?: number | undefined;
  readOnly?: boolean | undefined;
  /** Deallocate nothing: the disk has no `unmap`. Default false. */
  thick?: boolean | undefined;
  /** Acknowledge writes once the kernel has them (default), or once they are durable (false). */
  writeCache?: boolean | undefined;
  /** O_DIRECT: past the host's page cache. Default false. */
  direct?: boolean | undefined;
  /** Where file I/O runs; see `BackingFileOptions.io`. Default `auto`. */
  io?: 'auto' | 'inline' | 'pool' | undefined;
  /** Refuse a path that leads out of this directory, symbolic links resolved. */
  allowedDirectory?: string | undefined;
  /** Let `size` and `resize` cut data off. Default false: making the disk shorter is refused. */
  allowShrink?: boolean | undefined;
  /** Told what an administrator should know: the file was cut, deleted, failed to sync. */
  onWarning?: ((message: string) => void) | undefined;
}

/** Zeroes and patterns are written in pieces of this size, one after the other. */
const PIECE = 1024 * 1024;
/** Extents one `blockStatus` looks for at most. */
const MAX_EXTENTS = 256;
const WATCH_INTERVAL_MS = 1000;

export class FileStore implements BlockStore {
  readonly blockSize: number;
  readonly physicalBlockSize: number;
  readonly readOnly: boolean;
  readonly writeCache: boolean;
  readonly supportsFua: boolean;
  readonly optimalTransferLength = PIECE;
  readonly unmapGranularity: number;
  /** There only where the file system or device deallocates: the disk is thin then. */
  readonly unmap?: NonNullable<BlockStore['unmap']>;
  /** The file did not exist and was made. */
  readonly created: boolean;
  /** There only for files: block devices don't tell. */
  readonly blockStatus?: NonNullable<BlockStore['blockStatus']>;
  /** There only for files. */
  readonly copyFrom?: NonNullable<BlockStore['copyFrom']>;
  /** There only for thin files: what they take of the file system, and what is left there. */
  readonly space?: NonNullable<BlockStore['space']>;

  /** Plain reads and writes need not come here; not with O_DIRECT, whose refusals `#aligned` answers. */
  readonly fileMap?: FileMap;

  readonly #file: BackingFile;
  /** Without O_DIRECT: for memory that does not suit it. The same as `#file` when not `direct`. */
  readonly #buffered: BackingFile;
  readonly #sync: GroupSync;
  readonly #allowShrink: boolean;
  readonly #warn: (message: string) => void;
  #closed = false;
  #size: number;
  /** Where writing ends: the disk's end, or the file's when that is shorter. */
  #end: number;
  #deleted = false;
  #canZeroRange = true;
  #watch: NodeJS.Timeout | undefined;

  private constructor(
    file: BackingFile,
    buffered: BackingFile,
    facts: { size: number; created: boolean; canPunch: boolean },
    options: FileStoreOptions,
  ) {
    const { kind, blockSize, physicalBlockSize } = file.facts;
    this.#file = file;
    this.#buffered = buffered;
    this.#size = facts.size;
    this.#end = 0;
    this.created = facts.created;
    this.#allowShrink = options.allowShrink ?? false;
    this.#warn = options.onWarning ?? (() => {});
    this.blockSize = blockSizeFor(file, options.blockSize);
    this.physicalBlockSize = multipleOf(
      this.blockSize,
      options.physicalBlockSize ??
        (kind === 'block' ? physicalBlockSize : Math.min(blockSize, 4096)),
    );
    this.unmapGranularity = multipleOf(this.blockSize, blockSize);
    this.readOnly = file.readOnly;
    this.writeCache = (options.writeCache ?? true) && !this.readOnly;
    this.supportsFua = !this.readOnly;
    if (facts.canPunch) this.unmap = (position, length) => this.#zero(position, length, true);
    if (kind === 'file' && facts.canPunch) this.space = () => this.#space();
    if (kind === 'file') {
      this.blockStatus = (position, length) => this.#extents(position, length);
      this.copyFrom = (source, from, to, length) => this.#copy(source, from, to, length);
      this.#watch = setInterval(() => this.check(), WATCH_INTERVAL_MS).unref();
    }
    this.#sync = new GroupSync(
      () => file.datasync(),
      (cause) => {
        const message = `fdatasync of ${this.path} failed (${(cause as FileError).errno ?? cause}): written data may be lost; no more writes until it is served anew`;
        this.#warn(message);
        this.fileMap?.allow(this.#end, 0);
        return sense.writeError({ cause });
      },
    );
    if (buffered === file) this.fileMap = FileMap.linear(file);
    this.#endAt(facts.size);
  }

  /**
   * Opens, locks and measures the file, and creates it when `size` is given.
   * @throws ArgumentError for sizes that don't fit, a path outside `allowedDirectory`, a directory, FIFO or
   *   character device; FileError `ERR_TCMU_IO` (ENOENT, EACCES, EBUSY, ENOSPC …) or
   *   `ERR_TCMU_FILE_LOCKED`. Nothing is left behind then, a file created in vain included.
   */
  static async open(path: string, options: FileStoreOptions = {}): Promise<FileStore> {
    checkSize(path, options.size, options.blockSize ?? 512);
    const real = await resolvePath(path, options.allowedDirectory);
    const { file, created } = await openOrCreate(real, options);
    let buffered = file;
    try {
      if (options.allowedDirectory !== undefined) {
        await checkOpened(file.fd, path, options.allowedDirectory);
      }
      file.lock();
      const size = fitSize(file, options, 0);
      if (size !== file.size()) await file.truncate(size);
      if (options.direct) {
        // The same file whatever the path says by now.
        buffered = await BackingFile.open(`/proc/self/fd/${file.fd}`, {
          readOnly: file.readOnly,
          io: options.io ?? 'auto',
        });
      }
      const facts = { size, created, canPunch: options.thick !== true && (await canPunch(file)) };
      return new FileStore(file, buffered, facts, options);
    } catch (error) {
      if (created) await unlink(await readlink(`/proc/self/fd/${file.fd}`));
      if (buffered !== file) await buffered.close();
      await file.close();
      throw error;
    }
  }

  /** The real path of what is served. */
  get path(): string {
    return this.#file.path;
  }

  /** Bytes of the disk. */
  get size(): number {
    return this.#size;
  }

  /** Bytes of the file or device now: what `resize` may be called with after an administrator changed it. */
  get fileSize(): number {
    return this.#file.size();
  }

  get kind(): 'file' | 'block device' {
    return this.#file.facts.kind === 'block' ? 'block device' : 'file';
  }

  read(position: number, data: DataIn): MaybePromise<unknown> {
    const { length } = data;
    const got =
      this.#buffered === this.#file
        ? data.readFrom(this.#file, position)
        : this.#aligned((file) => data.readFrom(file, position));
    if (got === length) return;
    if (typeof got === 'number') throw this.#shorter('read', position + length);
    return got.then((count) => {
      if (count !== length) throw this.#shorter('read', position + length);
    });
  }

  write(position: number, data: DataOut, context: WriteContext): MaybePromise<unknown> {
    this.#assertWritable(position + data.length);
    const done =
      this.#buffered === this.#file
        ? data.writeTo(this.#file, position)
        : this.#aligned((file) => data.writeTo(file, position));
    if (this.writeCache && !context.fua) return done;
    return done === undefined ? this.#sync.sync() : done.then(() => this.#sync.sync());
  }

  flush(): MaybePromise<void> {
    if (this.readOnly) return;
    this.check();
    if (this.#end < this.#size) throw this.#shorter('flush', this.#size);
    return this.#sync.sync();
  }

  writeZeroes(position: number, length: number, context: UnmapContext): Promise<void> {
    return this.#zero(position, length, context.mayUnmap, context);
  }

  async writeSame(
    position: number,
    length: number,
    block: Uint8Array,
    context: RequestContext,
  ): Promise<void> {
    if (block.every((byte) => byte === 0)) return this.#zero(position, length, false, context);
    const pattern = Buffer.alloc(Math.min(length, PIECE), block);
    await this.#repeat(position, length, pattern, context);
    if (!this.writeCache) await this.#sync.sync();
  }

  /**
   * Makes the disk `size` bytes long. The file grows without allocating; it is cut only with
   * `allowShrink`. A block device must have been resized by its own means before.
   * @throws ArgumentError when the size does not fit; FileError
   */
  async resize(size: number): Promise<void> {
    this.#assertWritable(0);
    const before = this.#size;
    const options = { size, blockSize: this.blockSize, allowShrink: this.#allowShrink };
    const truncates = fitSize(this.#file, options, before) !== this.#file.size();
    // Nothing may be written behind a new end while it is being cut.
    this.#size = Math.min(size, before);
    this.#endAt(Math.min(size, this.#end));
    try {
      if (truncates) await this.#file.truncate(size);
    } catch (error) {
      this.#size = before;
      this.#endAt(Math.min(before, this.#file.size()));
      throw error;
    }
    this.#size = size;
    this.#endAt(size);
  }

  /** Looks whether the file was cut or deleted meanwhile. Done every second and by each flush. */
  check(): void {
    if (this.#file.facts.kind !== 'file') return;
    const { size, nlink } = fstatSync(this.#file.fd);
    if (nlink === 0 && !this.#deleted) {
      this.#deleted = true;
      this.#warn(
        `${this.path} was deleted: it is served as long as this process runs, then its data is gone; to keep it, copy /proc/${process.pid}/fd/${this.#file.fd}`,
      );
    }
    const end = Math.min(size, this.#size);
    if (end < this.#end) {
      this.#warn(
        `${this.path} was cut to ${formatSize(size)}: the disk has ${formatSize(this.#size)}, what lies behind can't be read or written; truncate -s ${this.#size} makes it zeros`,
      );
    } else if (end > this.#end) {
      this.#warn(`${this.path} was made longer again; all of the disk is served`);
    }
    if (end !== this.#end) this.#endAt(end);
  }

  #endAt(end: number): void {
    this.#end = end;
    const writes = this.writeCache && this.#sync.failure === undefined;
    this.fileMap?.allow(end, writes ? end : 0);
  }

  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    clearInterval(this.#watch);
    try {
      // A failure is thrown once more here: whoever closes must not believe that all is well.
      if (!this.readOnly) await this.#sync.sync();
    } finally {
      if (this.#buffered !== this.#file) await this.#buffered.close();
      await this.#file.close();
    }
  }

  /** O_DIRECT refuses memory or lengths that don't suit the device (EINVAL); those go through the cache. */
  async #aligned<T>(transfer: (file: BackingFile) => MaybePromise<T>): Promise<T> {
    try {
      return await transfer(this.#file);
    } catch (error) {
      if ((error as FileError).errno !== 'EINVAL') throw error;
      return transfer(this.#buffered);
    }
  }

  #assertWritable(end: number): void {
    if (this.#sync.failure !== undefined) throw this.#sync.failure;
    if (end > this.#end) throw this.#shorter('write', end);
  }

  #shorter(operation: 'read' | 'write' | 'flush', end: number): SenseError {
    this.check();
    const cause = new FileError(
      'ERR_TCMU_IO_SHORT',
      `tcmu: ${operation} ${this.path} up to byte ${end}: the file ends before; somebody cut it, the disk has ${this.#size} bytes`,
      { operation, path: this.path },
    );
    return operation === 'read'
      ? sense.unrecoveredReadError({ cause })
      : sense.writeError({ cause });
  }

  /** Shares blocks with, or lets the kernel copy from, another file; nothing where it can't. */
  async #copy(source: BlockStore, from: number, to: number, length: number): Promise<number> {
    if (!(source instanceof FileStore) || source.kind !== 'file') return 0;
    this.#assertWritable(to + length);
    let copied = 0;
    const could = await supported(async () => {
      copied = await this.#buffered.copyFrom(source.#buffered, from, to, length);
    }, UNCOPIABLE);
    if (!could) return 0;
    if (!this.writeCache) await this.#sync.sync();
    return copied - (copied % this.blockSize);
  }

  /** Makes a range read as zeros, by the cheapest way that file system and request allow. */
  async #zero(
    position: number,
    length: number,
    mayUnmap: boolean,
    context?: RequestContext,
  ): Promise<void> {
    this.#assertWritable(position + length);
    const done =
      (mayUnmap &&
        this.unmap !== undefined &&
        (await supported(() => this.#file.punchHole(position, length)))) ||
      (this.#canZeroRange && (await supported(() => this.#file.zeroRange(position, length))));
    if (!done) {
      this.#canZeroRange = false;
      await this.#repeat(position, length, Buffer.alloc(Math.min(length, PIECE)), context);
    }
    if (!this.writeCache) await this.#sync.sync();
  }

  async #space(): Promise<StoreSpace> {
    const { bavail, bsize } = await statfs(this.path);
    const used = fstatSync(this.#file.fd).blocks * 512;
    return { used, available: Math.min(Math.max(0, this.#size - used), bavail * bsize) };
  }

  async #repeat(
    position: number,
    length: number,
    piece: Uint8Array,
    context: RequestContext | undefined,
  ): Promise<void> {
    for (let done = 0; done < length; done += piece.length) {
      if (done > 0) {
        // Writes that don't block would keep every other request waiting.
        await nextTurn();
        context?.signal.throwIfAborted();
      }
      const part = piece.subarray(0, length - done);
      this.#assertWritable(position + done + part.length);
      await this.#buffered.writeFrom(part, position + done);
    }
  }

  /** SEEK_DATA and SEEK_HOLE, rounded so that a block with any data counts as data. */
  async #extents(position: number, length: number): Promise<BlockExtent[]> {
    const { blockSize } = this;
    const end = position + length;
    // What a cut file lacks is no hole: it does not read as zeros.
    const fileEnd = Math.min(end, this.#file.size());
    const extents: BlockExtent[] = [];
    let at = position;
    while (at < fileEnd && extents.length < MAX_EXTENTS) {
      const data = (await this.#file.nextData(at)) ?? fileEnd;
      const first = Math.min(data - (data % blockSize), fileEnd);
      if (first > at) extents.push({ length: first - at, status: 'hole' });
      if (first >= fileEnd) break;
      const hole = (await this.#file.nextHole(data)) ?? fileEnd;
      at = Math.min(Math.max(Math.ceil(hole / blockSize), first / blockSize + 1) * blockSize, end);
      extents.push({ length: at - first, status: 'data' });
    }
    if (extents.length === 0) extents.push({ length, status: 'data' });
    return extents;
  }
}

/** Whether an operation was carried out; false when file system or device don't have it. */
async function supported(
  operation: () => MaybePromise<void>,
  refusals = UNSUPPORTED,
): Promise<boolean> {
  try {
    await operation();
    return true;
  } catch (error) {
    if (refusals.has((error as FileError).errno ?? '')) return false;
    throw error;
  }
}

const UNSUPPORTED = new Set(['EOPNOTSUPP', 'ENOTSUP', 'ENOSYS', 'ENOTTY']);
/** What copy_file_range(2) says of files that it can't copy between. */
const UNCOPIABLE = new Set([...UNSUPPORTED, 'EXDEV', 'EINVAL']);

async function openOrCreate(
  path: string,
  options: FileStoreOptions,
): Promise<{ file: BackingFile; created: boolean }> {
  const open = {
    readOnly: options.readOnly ?? false,
    direct: options.direct ?? false,
    io: options.io ?? 'auto',
    noFollow: true,
    exclusive: !options.readOnly,
  };
  try {
    return { file: await BackingFile.open(path, open), created: false };
  } catch (error) {
    const mayCreate = options.size !== undefined && !options.readOnly;
    if ((error as FileError).errno !== 'ENOENT' || !mayCreate) throw error;
    return { file: await BackingFile.open(path, { ...open, create: true }), created: true };
  }
}

function checkSize(path: string, size: number | undefined, blockSize: number): void {
  if (![512, 1024, 2048, 4096].includes(blockSize)) {
    throw new ArgumentError(
      `tcmu: ${path}: block size ${blockSize}; use 512, 1024, 2048 or 4096 bytes`,
    );
  }
  if (size === undefined) return;
  if (size === 0) throw new ArgumentError(`tcmu: ${path} would be an empty disk: give it a size`);
  if (!Number.isSafeInteger(size) || size < 0 || size % blockSize !== 0) {
    throw new ArgumentError(
      `tcmu: ${path}: ${size} bytes are no whole number of blocks of ${blockSize} bytes; a file is rounded up by truncate -s %${blockSize}`,
    );
  }
}

function blockSizeFor({ facts, path }: BackingFile, asked: number | undefined): number {
  if (facts.kind !== 'block') return asked ?? 512;
  if (asked !== undefined && asked < facts.blockSize) {
    throw new ArgumentError(
      `tcmu: ${path} has blocks of ${facts.blockSize} bytes: the disk's can't be of ${asked}`,
    );
  }
  return asked ?? Math.max(512, facts.blockSize);
}

/**
 * The size the disk is to have: the one asked for, or the file's. The file is to be truncated to it.
 * @param current the size of the disk so far
 */
function fitSize(file: BackingFile, options: FileStoreOptions, current: number): number {
  const actual = file.size();
  const size = options.size ?? actual;
  checkSize(file.path, size, blockSizeFor(file, options.blockSize));
  const refuse = (why: string) => new ArgumentError(`tcmu: ${file.path}: ${why}`);
  if (size < Math.max(actual, current) && !options.allowShrink) {
    throw refuse(
      `making ${Math.max(actual, current)} bytes into ${size} would cut data off; it is done only when shrinking is allowed by name`,
    );
  }
  if (size !== actual && file.facts.kind === 'block') {
    throw refuse(`a block device has the size it has, ${actual} bytes, not ${size}`);
  }
  if (size !== actual && file.readOnly) {
    throw refuse(`it has ${actual} bytes and is served read-only: it can't be made ${size}`);
  }
  return size;
}

/** `wanted` when it is the block size times a power of two (at most 32768), else the block size. */
function multipleOf(blockSize: number, wanted: number): number {
  const exponent = Math.log2(wanted / blockSize);
  return Number.isInteger(exponent) && exponent >= 0 && exponent <= 15 ? wanted : blockSize;
}

/** Whether ranges can be given back such that they read as zeros. Nothing is changed to find out. */
async function canPunch(file: BackingFile): Promise<boolean> {
  if (file.readOnly) return false;
  if (file.facts.kind === 'block') return canWriteZeroes(fstatSync(file.fd).rdev);
  // Behind the end of the file there is nothing to lose.
  const behind = Math.ceil(file.size() / 4096) * 4096;
  return supported(() => file.punchHole(behind, 4096));
}

/** A discarded block need not read as zeros (block/ioctl.c); only devices that zero by themselves do. */
function canWriteZeroes(rdev: number): boolean {
  const major = Math.floor(rdev / 256) % 4096;
  const minor = (rdev % 256) + Math.floor(rdev / 2 ** 20) * 256;
  const device = `/sys/dev/block/${major}:${minor}`;
  const queue = existsSync(`${device}/partition`) ? `${device}/../queue` : `${device}/queue`;
  try {
    return Number(readFileSync(`${queue}/write_zeroes_max_bytes`, 'utf8')) > 0;
  } catch {
    return false;
  }
}
