/**
 * A qcow2 image as a `BlockStore`.
 *
 * What it promises: a settled `flush` means that everything settled before is on the device, data and
 * metadata; stopped at any moment, the image is free of errors (space may be lost), and shows every
 * flushed byte. Bad images are refused with what is wrong and where.
 */
import type {
  BlockExtent,
  BlockStore,
  DataIn,
  DataOut,
  MaybePromise,
  RequestContext,
  UnmapContext,
} from 'tcmu';
import { ArgumentError } from 'tcmu';
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

export class QcowStore implements BlockStore {
  readonly blockSize: number;
  readonly physicalBlockSize: number;
  readonly writeCache: boolean;
  readonly optimalTransferLength: number;
  readonly unmapGranularity: number;
  readonly unmap?: NonNullable<BlockStore['unmap']>;
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
    if (!image.readOnly) {
      this.unmap = (position, length) => this.#done(image.writeZeroes(position, length, true));
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
