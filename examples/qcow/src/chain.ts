// SPDX-License-Identifier: Apache-2.0
/**
 * Operations on a chain of images that nobody has open: `commit` brings what an image holds into the file
 * below it, `rebase` puts another file, or none, below it.
 */
import { ArgumentError } from 'tcmu';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import { pathFrom } from './allowed-path.js';
import { QcowError } from './errors.js';
import { Kind } from './format/entries.js';
import { Autoclear, ExtensionType, hasFeature, textExtension } from './format/header.js';
import type { HostFile } from './host/host-file.js';
import type { QcowImage } from './image.js';
import { type Layer, readLayer } from './layer.js';
import { type OpenOptions, openHostFile, openImage, openLayer } from './open.js';
import { resizeImage } from './resize.js';

type FileOptions = Omit<OpenOptions, 'readOnly' | 'compress' | 'repair'>;

/** Data is copied in pieces of this size, or of a cluster where that is larger. */
const PIECE = 2 * 1024 * 1024;

/** Calls `visit` for each run of one kind that the image itself has, in order. */
async function eachRun(
  image: QcowImage,
  visit: (kind: Kind, position: number, length: number) => Promise<void>,
): Promise<void> {
  const { mapping } = image;
  for (let at = 0; at < image.size; ) {
    let slice = mapping.lookup(at);
    while (slice instanceof Promise) {
      await slice;
      slice = mapping.lookup(at);
    }
    mapping.resolve(slice, at, Math.min(PIECE - (at % PIECE), image.size - at));
    const { kind, length } = mapping;
    if (kind === Kind.INVALID) throw mapping.invalid(at);
    await visit(kind, at, length);
    at += length;
  }
}

/** What a commit writes to. */
interface Target {
  readonly size: number;
  grow(size: number): Promise<void>;
  write(position: number, bytes: Uint8Array): Promise<unknown>;
  writeZeroes(position: number, length: number): Promise<unknown>;
  flush(): Promise<unknown>;
  close(): Promise<unknown>;
}

async function openTarget(
  path: string,
  format: string | undefined,
  options: FileOptions,
): Promise<Target> {
  if (format === 'qcow2') {
    const image = await openImage(path, { ...options, readOnly: false });
    return {
      get size() {
        return image.size;
      },
      grow: (size) => resizeImage(image, size),
      write: async (position, bytes) => image.write(position, new MemoryDataOut(bytes)),
      writeZeroes: async (position, length) => image.writeZeroes(position, length, true),
      flush: async () => image.flush(),
      close: () => image.close(),
    };
  }
  if (format === 'raw')
    return rawTarget((await openHostFile(path, { ...options, readOnly: false })).file);
  throw new QcowError(
    'ERR_TCMU_QCOW_UNSUPPORTED',
    `nothing can be committed to a backing file of ${format === undefined ? 'unknown format: say which by rebase' : `format ${format}`}`,
    { path, operation: 'commit' },
  );
}

function rawTarget(file: HostFile): Target {
  return {
    get size() {
      return file.size();
    },
    grow: async (size) => {
      await file.truncate(size);
    },
    write: async (position, bytes) => file.write(bytes, position),
    writeZeroes: async (position, length) => file.writeZeroes(position, length),
    flush: async () => file.flush(),
    close: async () => file.close(),
  };
}

/**
 * Writes what an image holds into its backing file, which becomes as long as the image at least, and
 * empties the image. Stopped in between, the image still shows what it showed.
 * @throws QcowError `ERR_TCMU_QCOW_STATE` without a backing file; what opening throws
 */
export async function commitImage(
  path: string,
  options: FileOptions & { keep?: boolean } = {},
): Promise<void> {
  const { keep = false, ...opening } = options;
  const top = await openImage(path, { ...opening, readOnly: false, alone: true });
  try {
    const { header } = top;
    if (header.backingFile === undefined) {
      throw new QcowError('ERR_TCMU_QCOW_STATE', 'it has no backing file to commit to', {
        path,
        operation: 'commit',
      });
    }
    const format = textExtension(header, ExtensionType.BACKING_FORMAT);
    const target = await openTarget(pathFrom(path, header.backingFile), format, opening);
    try {
      if (target.size < top.size) await target.grow(top.size);
      await eachRun(top, async (kind, position, length) => {
        if (kind === Kind.ZERO) await target.writeZeroes(position, length);
        else if (kind !== Kind.UNALLOCATED) {
          await target.write(position, await top.reader.readBytes(position, length));
        }
      });
      await target.flush();
    } finally {
      await target.close();
    }
    if (!keep) await top.exclusively(() => top.empty());
  } finally {
    await top.close();
  }
}

export interface RebaseOptions extends FileOptions {
  /** Needed with a new backing file. */
  backingFormat?: string | undefined;
  /** Only change the name: right when the new file shows the same, or the old one is gone. Default false. */
  unsafe?: boolean | undefined;
}

/**
 * Gives an image another backing file, or none. What the disk shows stays the same: where the old and
 * the new file differ, the old one's data is copied into the image first.
 * @param backingFile as it is to stand in the image; undefined: none
 * @throws ArgumentError without a format; QcowError; FileError
 */
export async function rebaseImage(
  path: string,
  backingFile: string | undefined,
  options: RebaseOptions = {},
): Promise<void> {
  const { backingFormat, unsafe = false, ...opening } = options;
  if (backingFile !== undefined && backingFormat === undefined) {
    throw new ArgumentError(
      `tcmu: rebase ${path}: say the format of ${backingFile}: guessing it is not safe`,
    );
  }
  const image = await openImage(path, { ...opening, readOnly: false, alone: unsafe });
  try {
    const raw = hasFeature(image.header.autoclear, Autoclear.DATA_FILE_RAW);
    if (raw && backingFile !== undefined) {
      throw new QcowError(
        'ERR_TCMU_QCOW_STATE',
        'a raw data file and a backing file do not go together',
        { path, operation: 'rebase' },
      );
    }
    if (!unsafe) {
      const next =
        backingFile === undefined
          ? undefined
          : await openLayer(pathFrom(path, backingFile), backingFormat, opening);
      try {
        await copyDifferences(image, next);
      } finally {
        await next?.close();
      }
      await image.flush();
    }
    const format = backingFile === undefined ? undefined : backingFormat;
    await image.exclusively(() => image.setBacking(backingFile, format));
  } finally {
    await image.close();
  }
}

/** Copies into the image what its layers below show and `next` would not. */
async function copyDifferences(image: QcowImage, next: Layer | undefined): Promise<void> {
  const { backing, geometry } = image;
  const unit = geometry.subclusterSize;
  // Where the image shows zeros already it would not be marked: then zeros are written as data.
  const canMark = geometry.version === 3 && backing !== undefined;
  await eachRun(image, async (kind, position, length) => {
    if (kind !== Kind.UNALLOCATED) return;
    const before = await contents(backing, position, length);
    const after = await contents(next, position, length);
    for (let at = 0; at < length; ) {
      const end = Math.min(length, at + unit - ((position + at) % unit));
      const old = before.subarray(at, end);
      if (Buffer.compare(old, after.subarray(at, end)) !== 0) {
        if (canMark && old.every((byte) => byte === 0)) {
          await image.writeZeroes(position + at, end - at, true);
        } else {
          await image.write(position + at, new MemoryDataOut(old));
        }
      }
      at = end;
    }
  });
}

async function contents(
  layer: Layer | undefined,
  position: number,
  length: number,
): Promise<Uint8Array> {
  const data = new MemoryDataIn(new Uint8Array(length));
  await readLayer(layer, position, data);
  return data.bytes;
}
