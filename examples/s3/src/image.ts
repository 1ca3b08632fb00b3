// SPDX-License-Identifier: Apache-2.0
/**
 * Images in and out: raw files and qcow2 images, sparse ones as such. What is all zeros is neither read twice
 * nor sent. An import ends with a flush, an export with fsync: before that nothing is promised.
 */
import { open } from 'node:fs/promises';
import { ArgumentError, type BlockExtent, type MaybePromise } from 'tcmu';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import type { S3Disk } from './s3-disk.js';

const PIECE = 1024 * 1024;
const DEPTH = 8;
const context = { fua: false, mayUnmap: true, signal: new AbortController().signal };

/** @param done bytes, @param all bytes */
export type Progress = (done: number, all: number) => void;

export type ImageFormat = 'raw' | 'qcow2';

/** `qcow2` for files that begin as one, or are to be named like one. */
export async function guessFormat(path: string): Promise<ImageFormat> {
  try {
    const file = await open(path, 'r');
    try {
      const { buffer, bytesRead } = await file.read(Buffer.alloc(4), 0, 4, 0);
      return bytesRead === 4 && buffer.readUInt32BE(0) === 0x514649fb ? 'qcow2' : 'raw';
    } finally {
      await file.close();
    }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    return path.endsWith('.qcow2') ? 'qcow2' : 'raw';
  }
}

/** Bytes of the disk in an image. @throws ArgumentError; QcowError when it is no sound qcow2 image */
export async function imageSize(path: string, format: ImageFormat): Promise<number> {
  const source = await openSource(path, format);
  await source.close();
  if (source.size > 0) return source.size;
  throw new ArgumentError(`${path} is empty, or a device whose size is not known: give a file`);
}

/** @throws ArgumentError when the image is larger than the disk; QcowError; FileError; what the disk throws */
export async function importImage(
  path: string,
  format: ImageFormat,
  disk: S3Disk,
  progress: Progress = () => {},
): Promise<void> {
  const source = await openSource(path, format);
  try {
    const { size } = source;
    if (size > disk.size) {
      throw new ArgumentError(
        `${path} has ${size} bytes, the disk ${disk.size}: make the disk as large (serve --size)`,
      );
    }
    let done = 0;
    await pieces(size, async (at, length) => {
      // The last block may be half a file's.
      const bytes = Buffer.alloc(Math.ceil(length / disk.blockSize) * disk.blockSize);
      await source.read(at, bytes.subarray(0, length));
      await disk.write(at, new MemoryDataOut(bytes), context);
      done += length;
      progress(done, size);
    });
    await disk.flush();
  } finally {
    await source.close();
  }
}

/** The file is created, and must not exist. */
export async function exportImage(
  disk: S3Disk,
  path: string,
  format: ImageFormat,
  progress: Progress = () => {},
): Promise<void> {
  const target = await createTarget(path, format, disk.size);
  try {
    let done = 0;
    await pieces(disk.size, async (at, length) => {
      for (const { position, bytes } of await dataOf(disk, at, length)) {
        await target.write(position, bytes);
      }
      done += length;
      progress(done, disk.size);
    });
    await target.flush();
  } finally {
    await target.close();
  }
}

/** What has to be known of a store for its data to be read. */
interface Readable {
  read(position: number, data: MemoryDataIn): MaybePromise<unknown>;
  blockStatus(position: number, length: number): MaybePromise<readonly BlockExtent[]>;
}

/** The data in a part of it, without its holes. */
async function dataOf(
  store: Readable,
  from: number,
  length: number,
): Promise<{ position: number; bytes: Uint8Array }[]> {
  const found: { position: number; bytes: Uint8Array }[] = [];
  for (let position = from; position < from + length; ) {
    for (const extent of await store.blockStatus(position, from + length - position)) {
      if (extent.status === 'data') {
        const data = new MemoryDataIn(Buffer.allocUnsafe(extent.length));
        await store.read(position, data);
        found.push({ position, bytes: data.bytes });
      }
      position += extent.length;
    }
  }
  return found;
}

interface Source {
  readonly size: number;
  /** Fills `bytes`, which are zeros. */
  read(position: number, bytes: Buffer): Promise<void>;
  close(): Promise<void>;
}

async function openSource(path: string, format: ImageFormat): Promise<Source> {
  if (format === 'qcow2') {
    const { QcowStore } = await import('tcmu-qcow');
    const store = await QcowStore.open(path, { readOnly: true });
    return {
      size: store.size,
      async read(position, bytes) {
        for (const piece of await dataOf(store, position, bytes.length)) {
          bytes.set(piece.bytes, piece.position - position);
        }
      },
      close: () => store.close(),
    };
  }
  const file = await open(path, 'r');
  const { size } = await file.stat();
  return {
    size,
    async read(position, bytes) {
      for (let got = 0; got < bytes.length; ) {
        const { bytesRead } = await file.read(bytes, got, bytes.length - got, position + got);
        if (bytesRead === 0) throw new ArgumentError(`${path} became shorter while it was read`);
        got += bytesRead;
      }
    },
    close: () => file.close(),
  };
}

interface Target {
  write(position: number, bytes: Uint8Array): Promise<void>;
  flush(): Promise<void>;
  close(): Promise<void>;
}

async function createTarget(path: string, format: ImageFormat, size: number): Promise<Target> {
  if (format === 'qcow2') {
    const { QcowStore, createImage } = await import('tcmu-qcow');
    await createImage(path, { size });
    const store = await QcowStore.open(path);
    return {
      async write(position, bytes) {
        await store.write(position, new MemoryDataOut(bytes), context);
      },
      async flush() {
        await store.flush();
      },
      close: () => store.close(),
    };
  }
  const file = await open(path, 'wx');
  await file.truncate(size);
  return {
    async write(position, bytes) {
      for (let done = 0; done < bytes.length; ) {
        const left = bytes.length - done;
        done += (await file.write(bytes, done, left, position + done)).bytesWritten;
      }
    },
    flush: () => file.sync(),
    close: () => file.close(),
  };
}

/** Consecutive pieces, several at a time. */
async function pieces(
  size: number,
  run: (at: number, length: number) => Promise<void>,
): Promise<void> {
  let next = 0;
  let failed = false;
  const worker = async (): Promise<void> => {
    while (next < size && !failed) {
      const at = next;
      next += PIECE;
      try {
        await run(at, Math.min(PIECE, size - at));
      } catch (error) {
        failed = true;
        throw error;
      }
    }
  };
  const results = await Promise.allSettled(Array.from({ length: DEPTH }, worker));
  for (const result of results) if (result.status === 'rejected') throw result.reason;
}
