// SPDX-License-Identifier: Apache-2.0
/** Operations on images that nobody has open: information, check, rebase, commit. */
import { readBitmapDirectory } from './bitmaps.js';
import { type CheckOptions, type CheckResult, checkFile } from './check.js';
import { readLuks } from './encryption/luks.js';
import { BitmapFlags } from './format/bitmap-directory.js';
import {
  Autoclear,
  Compatible,
  ExtensionType,
  hasFeature,
  Incompatible,
  textExtension,
} from './format/header.js';
import { loadSnapshots, readHeader } from './image.js';
import { luksHeader, type OpenOptions, openHostFile } from './open.js';

type FileOptions = Pick<
  OpenOptions,
  'allowedDirectory' | 'lock' | 'openFile' | 'io' | 'onWarning' | 'passphrase'
>;

/**
 * Checks an image, and repairs it when asked. Guest data is not looked at.
 * @throws QcowError; FileError
 */
export async function checkImage(
  path: string,
  options: CheckOptions & FileOptions = {},
): Promise<CheckResult> {
  const { repair, ...opening } = options;
  const { file } = await openHostFile(path, { ...opening, readOnly: repair === undefined });
  try {
    return await checkFile(file, { repair });
  } finally {
    await file.close();
  }
}

export interface ImageInfo {
  readonly path: string;
  readonly format: 'qcow2';
  readonly version: 2 | 3;
  /** Bytes of the disk, and of the host file. */
  readonly size: number;
  readonly fileSize: number;
  readonly clusterSize: number;
  readonly refcountBits: number;
  readonly extendedL2: boolean;
  readonly compressionType: 'zlib' | 'zstd';
  readonly lazyRefcounts: boolean;
  readonly dirty: boolean;
  readonly corrupt: boolean;
  readonly backingFile: string | undefined;
  readonly backingFormat: string | undefined;
  readonly dataFile: string | undefined;
  readonly dataFileRaw: boolean;
  readonly encryption: { method: 'aes' | 'luks'; cipher?: string; hash?: string } | undefined;
  readonly snapshots: readonly { id: string; name: string; date: Date; diskSize: number }[];
  readonly bitmaps: readonly {
    name: string;
    granularity: number;
    auto: boolean;
    inUse: boolean;
  }[];
}

/** What the image says of itself. @throws QcowError; FileError */
export async function imageInfo(path: string, options: FileOptions = {}): Promise<ImageInfo> {
  // As qemu-img info with --force-share would: looking does not keep others out.
  const { file } = await openHostFile(path, { lock: false, ...options, readOnly: true });
  try {
    const header = await readHeader(file);
    const { snapshots } = await loadSnapshots(file, header);
    const bitmaps = await readBitmapDirectory(file, header);
    const luks =
      header.cryptMethod === 2 ? readLuks(await luksHeader(file, header), path) : undefined;
    return {
      path,
      format: 'qcow2',
      version: header.version,
      size: header.size,
      fileSize: file.size(),
      clusterSize: 2 ** header.clusterBits,
      refcountBits: 2 ** header.refcountOrder,
      extendedL2: hasFeature(header.incompatible, Incompatible.EXTENDED_L2),
      compressionType: header.compressionType === 1 ? 'zstd' : 'zlib',
      lazyRefcounts: hasFeature(header.compatible, Compatible.LAZY_REFCOUNTS),
      dirty: hasFeature(header.incompatible, Incompatible.DIRTY),
      corrupt: hasFeature(header.incompatible, Incompatible.CORRUPT),
      backingFile: header.backingFile,
      backingFormat: textExtension(header, ExtensionType.BACKING_FORMAT),
      dataFile: textExtension(header, ExtensionType.DATA_FILE),
      dataFileRaw: hasFeature(header.autoclear, Autoclear.DATA_FILE_RAW),
      encryption:
        header.cryptMethod === 0
          ? undefined
          : luks === undefined
            ? { method: 'aes' }
            : { method: 'luks', cipher: `${luks.cipher}-${luks.mode}`, hash: luks.hash },
      snapshots: snapshots.map(({ id, name, date, diskSize }) => ({
        id,
        name,
        date: new Date(date.seconds * 1000 + Math.floor(date.nanoseconds / 1e6)),
        diskSize: diskSize ?? header.size,
      })),
      bitmaps: (bitmaps?.entries ?? []).map(({ name, granularityBits, flags }) => ({
        name,
        granularity: 2 ** granularityBits,
        auto: (flags & BitmapFlags.AUTO) !== 0,
        inUse: (flags & BitmapFlags.IN_USE) !== 0,
      })),
    };
  } finally {
    await file.close();
  }
}
