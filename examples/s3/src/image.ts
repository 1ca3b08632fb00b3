/**
 * Images in and out: raw files, sparse ones as such. What is all zeros is neither read twice nor sent. An
 * import ends with a flush, an export with fsync: before that nothing is promised. QEMU's formats go
 * through `qemu-img`, which is asked for what it knows best.
 */
import { spawn } from 'node:child_process';
import { mkdtemp, open, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { ArgumentError } from 'tcmu';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import type { S3Disk } from './s3-disk.js';

const PIECE = 1024 * 1024;
const DEPTH = 8;
const never = new AbortController().signal;

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

/** Bytes of the disk in an image. @throws ArgumentError when qemu-img can't read it */
export async function imageSize(path: string, format: ImageFormat): Promise<number> {
  if (format === 'qcow2') {
    const { 'virtual-size': size } = JSON.parse(
      await qemuImg(['info', '--output=json', '-f', 'qcow2', path]),
    ) as { 'virtual-size': number };
    return size;
  }
  const file = await open(path, 'r');
  try {
    const { size } = await file.stat();
    if (size > 0) return size;
    throw new ArgumentError(`${path} is empty, or a device whose size is not known: give a file`);
  } finally {
    await file.close();
  }
}

/** @throws ArgumentError when the image is larger than the disk; FileError; what the disk throws */
export async function importImage(
  path: string,
  format: ImageFormat,
  disk: S3Disk,
  progress: Progress = () => {},
): Promise<void> {
  if (format === 'qcow2') {
    await throughRaw(path, async (raw) => {
      await qemuImg(['convert', '-f', 'qcow2', '-O', 'raw', path, raw]);
      await importImage(raw, 'raw', disk, progress);
    });
    return;
  }
  const file = await open(path, 'r');
  try {
    const { size } = await file.stat();
    if (size > disk.size) {
      throw new ArgumentError(
        `${path} has ${size} bytes, the disk ${disk.size}: make the disk as large (serve --size)`,
      );
    }
    let done = 0;
    await pieces(size, async (at, length) => {
      // The last block may be half a file's.
      const bytes = Buffer.alloc(Math.ceil(length / disk.blockSize) * disk.blockSize);
      for (let got = 0; got < length; ) {
        const { bytesRead } = await file.read(bytes, got, length - got, at + got);
        if (bytesRead === 0) throw new ArgumentError(`${path} became shorter while it was read`);
        got += bytesRead;
      }
      const context = { fua: false, mayUnmap: true, signal: never };
      await disk.write(at, new MemoryDataOut(bytes), context);
      done += length;
      progress(done, size);
    });
    await disk.flush();
  } finally {
    await file.close();
  }
}

/** The file is created, and must not exist. */
export async function exportImage(
  disk: S3Disk,
  path: string,
  format: ImageFormat,
  progress: Progress = () => {},
): Promise<void> {
  if (format === 'qcow2') {
    await throughRaw(path, async (raw) => {
      await exportImage(disk, raw, 'raw', progress);
      // A file that exists is not overwritten here either.
      await (await open(path, 'wx')).close();
      await qemuImg(['convert', '-f', 'raw', '-O', 'qcow2', raw, path]);
    });
    return;
  }
  const file = await open(path, 'wx');
  try {
    await file.truncate(disk.size);
    let done = 0;
    await pieces(disk.size, async (at, length) => {
      let position = at;
      while (position < at + length) {
        for (const extent of await disk.blockStatus(position, at + length - position)) {
          if (extent.status === 'data') {
            const data = new MemoryDataIn(Buffer.allocUnsafe(extent.length));
            await disk.read(position, data);
            await file.write(data.bytes, 0, extent.length, position);
          }
          position += extent.length;
        }
      }
      done += length;
      progress(done, disk.size);
    });
    await file.sync();
  } finally {
    await file.close();
  }
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

/** A raw image beside `path`, for a while; sparse, but it needs room. */
async function throughRaw(path: string, run: (raw: string) => Promise<void>): Promise<void> {
  const folder = await mkdtemp(join(dirname(path), '.tcmu-s3-'));
  try {
    await run(join(folder, 'image.raw'));
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

function qemuImg(args: readonly string[]): Promise<string> {
  return new Promise((resolve, reject) => {
    const child = spawn('qemu-img', args, { stdio: ['ignore', 'pipe', 'pipe'] });
    let out = '';
    let complaint = '';
    child.stdout.on('data', (chunk: Buffer) => {
      out += chunk;
    });
    child.stderr.on('data', (chunk: Buffer) => {
      complaint += chunk;
    });
    child.on('error', (cause) => {
      reject(
        new ArgumentError(`qemu-img: ${cause.message}; qcow2 images need it (Debian: qemu-utils)`, {
          cause,
        }),
      );
    });
    child.on('close', (code) => {
      if (code === 0) resolve(out);
      else reject(new ArgumentError(`qemu-img ${args[0]}: ${complaint.trim()}`));
    });
  });
}
