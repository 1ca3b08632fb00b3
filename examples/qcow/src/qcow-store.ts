// SPDX-License-Identifier: Apache-2.0
/**
 * A qcow2 image as a `BlockStore`.
 *
 * What it promises: a settled `flush` means that everything settled before is on the device, data and
 * metadata; stopped at any moment, the image is free of errors (space may be lost), and shows every
 * flushed byte. Bad images are refused with what is wrong and where.
 */
import { fstatSync } from 'node:fs';
import { statfs } from 'node:fs/promises';
import type {
  BackingFile,
  BlockExtent,
  BlockStore,
  DataIn,
  DataOut,
  FileMap,
  MaybePromise,
  RequestContext,
  StoreSpace,
  UnmapContext,
} from 'tcmu';
import { ArgumentError } from 'tcmu';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import type { QcowImage } from './image.js';
import { type OpenOptions, openImage } from './open.js';
import { resizeImage } from './resize.js';
import { Snapshots } from './snapshots.js';

export interface QcowStoreOptions extends OpenOptions {
  /** Logical block size: 512 (default), 1024, 2048 or 4096 bytes. */
  blockSize?: number | undefined;
  /** Acknowledge changes before they are durable (default), or after (false). */
  writeCache?: boolean | undefined;
  /** Let `resize` cut data off. Default false. */
  allowShrink?: boolean | undefined;
}

/** Data is copied in pieces of this size. */
const PIECE = 1024 * 1024;

export class QcowStore implements BlockStore {
  readonly blockSize: number;
  readonly physicalBlockSize: number;
  readonly writeCache: boolean;
  readonly optimalTransferLength: number;
  readonly unmapGranularity: number;
  readonly unmap?: NonNullable<BlockStore['unmap']>;
  /** There only for writable images in files: what they take of the file system, and what is left there. */
  readonly space?: NonNullable<BlockStore['space']>;
  /** Not there for encrypted images. */
  readonly fileMap?: FileMap;
  readonly image: QcowImage;
  /** Created, listed, reverted to and deleted while the store is in use. */
  readonly snapshots: Snapshots;
  readonly #allowShrink: boolean;

  private constructor(image: QcowImage, options: QcowStoreOptions) {
    const { clusterSize, subclusterSize } = image.geometry;
    this.image = image;
    this.snapshots = new Snapshots(image);
    this.blockSize = options.blockSize ?? 512;
    this.physicalBlockSize = Math.max(this.blockSize, Math.min(subclusterSize, 4096));
    this.writeCache = (options.writeCache ?? true) && !image.readOnly;
    this.optimalTransferLength = Math.max(clusterSize, 1024 * 1024);
    this.unmapGranularity = Math.max(clusterSize, this.blockSize);
    this.#allowShrink = options.allowShrink ?? false;
    const fileMap = image.fileMap();
    if (fileMap !== undefined) this.fileMap = fileMap;
    if (!image.readOnly) {
      this.unmap = (position, length) => this.#done(image.writeZeroes(position, length, true));
      const files = [...new Set([image.file, image.data.file])].flatMap(({ backing }) =>
        backing?.facts.kind === 'file' ? [backing] : [],
      );
      if (files.length > 0) this.space = () => this.#space(files);
    }
  }

  /**
   * Opens an image, its data file and its backing files, and locks them.
   * @throws QcowError; FileError `ERR_TCMU_IO`; ArgumentError for a block size that does not fit
   */
  static async open(path: string, options: QcowStoreOptions = {}): Promise<QcowStore> {
    const { blockSize = 512 } = options;
    if (![512, 1024, 2048, 4096].includes(blockSize)) {
      throw new ArgumentError(
        `tcmu: ${path}: block size ${blockSize}; use 512, 1024, 2048 or 4096`,
      );
    }
    const image = await openImage(path, options);
    if (image.size === 0 || image.size % blockSize !== 0) {
      await image.close();
      throw new ArgumentError(
        `tcmu: ${path}: a disk of ${image.size} bytes is no whole number of blocks of ${blockSize} bytes`,
      );
    }
    return new QcowStore(image, options);
  }

  get size(): number {
    return this.image.size;
  }

  get readOnly(): boolean {
    return this.image.readOnly;
  }

  get path(): string {
    return this.image.path;
  }

  read(position: number, data: DataIn, _context?: RequestContext): MaybePromise<unknown> {
    return this.image.read(position, data);
  }

  write(position: number, data: DataOut, _context?: RequestContext): MaybePromise<unknown> {
    const written = this.image.write(position, data);
    return this.writeCache ? written : this.#done(written);
  }

  writeZeroes(position: number, length: number, context: UnmapContext): MaybePromise<unknown> {
    return this.#done(this.image.writeZeroes(position, length, context.mayUnmap));
  }

  flush(_context?: RequestContext): MaybePromise<unknown> {
    return this.readOnly ? undefined : this.image.flush();
  }

  blockStatus(
    position: number,
    length: number,
    _context?: RequestContext,
  ): MaybePromise<readonly BlockExtent[]> {
    return this.image.status(position, length);
  }

  /**
   * Copies from another image, or within this one: what reads as zeros takes no space here either, and the rest
   * goes through memory in pieces. Nothing of other kinds of store.
   */
  async copyFrom(
    source: BlockStore,
    from: number,
    to: number,
    length: number,
    { signal }: RequestContext,
  ): Promise<number> {
    if (!(source instanceof QcowStore) || this.readOnly) return 0;
    const copyData = async (at: number, size: number) => {
      const bytes = new Uint8Array(size);
      await source.image.read(from + at, new MemoryDataIn(bytes));
      await this.image.write(to + at, new MemoryDataOut(bytes));
    };
    for (let done = 0; done < length; ) {
      for (const extent of await source.image.status(from + done, length - done)) {
        const end = done + extent.length;
        if (extent.status !== 'data') await this.image.writeZeroes(to + done, end - done, true);
        else {
          for (let at = done; at < end; at += PIECE) {
            signal.throwIfAborted();
            await copyData(at, Math.min(PIECE, end - at));
          }
        }
        done = end;
      }
    }
    if (!this.writeCache) await this.image.flush();
    return length;
  }

  /** Snapshots may keep all there is, so that the disk can take its size once more. */
  async #space(files: readonly BackingFile[]): Promise<StoreSpace> {
    let used = 0;
    for (const { fd } of files) used += fstatSync(fd).blocks * 512;
    const { bavail, bsize } = await statfs(this.image.data.file.path);
    const rest = this.image.snapshots.length > 0 ? this.size : Math.max(0, this.size - used);
    return { used, available: Math.min(rest, bavail * bsize) };
  }

  /** @throws ArgumentError, QcowError when the size does not fit, or would cut data off */
  async resize(size: number): Promise<void> {
    if (size % this.blockSize !== 0) {
      throw new ArgumentError(
        `tcmu: ${this.path}: ${size} bytes are no whole number of blocks of ${this.blockSize} bytes`,
      );
    }
    if (size < this.size && !this.#allowShrink) {
      throw new ArgumentError(
        `tcmu: ${this.path}: making ${this.size} bytes into ${size} would cut data off; it is done only when shrinking is allowed by name`,
      );
    }
    await resizeImage(this.image, size);
  }

  close(): Promise<void> {
    return this.image.close();
  }

  /** Without a write cache a change is acknowledged when it is durable. */
  #done(change: MaybePromise<unknown>): MaybePromise<unknown> {
    if (this.writeCache) return change;
    return change instanceof Promise ? change.then(() => this.image.flush()) : this.image.flush();
  }
}
