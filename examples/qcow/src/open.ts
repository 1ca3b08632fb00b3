// SPDX-License-Identifier: Apache-2.0
/**
 * From a path to an open disk: the files that belong to it are found, locked as QEMU locks them, and
 * unlocked with the passphrase; the chain of backing files is followed to its end.
 */
import { stat } from 'node:fs/promises';
import { FileError } from 'tcmu';
import { checkOpened, pathFrom, resolveInside } from './allowed-path.js';
import { checkFile } from './check.js';
import { codecFor } from './compression/index.js';
import { legacyAes } from './encryption/aes.js';
import type { DataCipher } from './encryption/cipher.js';
import { openLuks } from './encryption/luks.js';
import { QcowError } from './errors.js';
import {
  ExtensionType,
  extension,
  type Header,
  hasFeature,
  Incompatible,
  textExtension,
  versionOf,
} from './format/header.js';
import { DiskFile } from './host/disk-file.js';
import type { HostFile } from './host/host-file.js';
import { QcowImage, readHeader } from './image.js';
import { type Layer, RawLayer } from './layer.js';
import { Qcow1Layer, readHeader1 } from './qcow1.js';

export interface OpenOptions {
  /** Default false. Layers below are always opened for reading. */
  readOnly?: boolean | undefined;
  /** For encrypted images; the layers below are tried with it, too. */
  passphrase?: string | Uint8Array | undefined;
  /** Refuse files outside this directory, symbolic links resolved: the image itself and all it names. */
  allowedDirectory?: string | undefined;
  /** Lock the files as QEMU does. Default true. */
  lock?: boolean | undefined;
  /** Memory for L2 tables. Default 32 MiB. */
  l2CacheBytes?: number | undefined;
  /** Memory for refcount blocks. Default 4 MiB. */
  refcountCacheBytes?: number | undefined;
  /** Store whole new clusters compressed. Default false. */
  compress?: boolean | undefined;
  /** Give the space of freed clusters back to the file system. Default true. */
  discard?: boolean | undefined;
  /**
   * When a change is acknowledged that takes new space or gives some up: once the metadata, too, is
   * `written` to the file (default), so that it is there when this process is killed and served anew; or
   * already in `memory`, which is faster, as QEMU does. Neither means durable: that is what `flush` is for.
   */
  acknowledge?: 'written' | 'memory' | undefined;
  /** Repair an image that was not closed (dirty bit) when it is opened for writing. Default true. */
  repair?: boolean | undefined;
  /** Where file I/O happens; see `BackingFileOptions.io`. Default `auto`. */
  io?: 'auto' | 'inline' | 'pool' | undefined;
  onWarning?: ((message: string) => void) | undefined;
  /** Opens the files instead: for tests, or images that are not on a disk. */
  openFile?: ((path: string, options: { readOnly: boolean }) => Promise<HostFile>) | undefined;
}

/** What this module's own callers may ask for besides. */
interface InternalOptions extends OpenOptions {
  /** The image alone: what it does not hold itself is not looked at. */
  alone?: boolean;
}

/** Longer chains are a mistake, or an attack. */
const MAX_DEPTH = 200;

/** What has been opened so far, so that a chain that comes back to itself is noticed. */
type Seen = ReadonlySet<string>;

/** Opens a file and takes its lock. @throws FileError; QcowError `ERR_TCMU_QCOW_LOCKED`, `_BACKING` */
export async function openHostFile(
  path: string,
  options: OpenOptions & { readOnly: boolean },
): Promise<{ file: HostFile; identity: string }> {
  const { readOnly, openFile, allowedDirectory } = options;
  if (openFile !== undefined) {
    const file = await openFile(path, { readOnly });
    return { file, identity: path };
  }
  const real = await resolveInside(path, allowedDirectory);
  const file = await DiskFile.open(real, { readOnly, io: options.io ?? 'auto', noFollow: true });
  try {
    if (allowedDirectory !== undefined) await checkOpened(file.backing.fd, path, allowedDirectory);
    if (options.lock ?? true) lock(file, readOnly);
    const { dev, ino } = await stat(`/proc/self/fd/${file.backing.fd}`);
    return { file: Object.assign(file, { path }), identity: `${dev}:${ino}` };
  } catch (error) {
    await file.close();
    throw error;
  }
}

function lock(file: DiskFile, readOnly: boolean): void {
  try {
    file.backing.lockImage(!readOnly);
  } catch (cause) {
    if (!(cause instanceof FileError) || cause.code !== 'ERR_TCMU_FILE_LOCKED') throw cause;
    throw new QcowError(
      'ERR_TCMU_QCOW_LOCKED',
      `another process has it open${readOnly ? ' for writing' : ''}; stop that first`,
      { path: file.path, operation: 'lock', cause },
    );
  }
}

/**
 * Opens a qcow2 image with all that belongs to it.
 * @throws QcowError; FileError `ERR_TCMU_IO`
 */
export async function openImage(path: string, options: InternalOptions = {}): Promise<QcowImage> {
  const readOnly = options.readOnly ?? false;
  const { file, identity } = await openHostFile(path, { ...options, readOnly });
  return openImageOn(file, options, new Set([identity]));
}

async function openImageOn(
  file: HostFile,
  options: InternalOptions,
  seen: Seen,
): Promise<QcowImage> {
  let dataFile: HostFile | undefined;
  let backing: Layer | undefined;
  try {
    const header = await readHeader(file);
    const { path } = file;
    const dirty = hasFeature(header.incompatible, Incompatible.DIRTY);
    if (dirty && !file.readOnly && (options.repair ?? true)) {
      options.onWarning?.(`${path} was not closed: its refcounts are being repaired`);
      await checkFile(file, { repair: 'all' });
      Object.assign(header, await readHeader(file));
    }
    const cipher = await cipherOf(file, header, options);
    if (hasFeature(header.incompatible, Incompatible.DATA_FILE)) {
      dataFile = await openDataFile(file, header, options);
    }
    if (header.backingFile !== undefined && header.backingFile !== '' && !options.alone) {
      const format = textExtension(header, ExtensionType.BACKING_FORMAT);
      backing = await openBacking(path, header.backingFile, format, options, seen);
    }
    return await QcowImage.open(file, header, {
      backing,
      dataFile,
      cipher,
      codec: codecFor(header.compressionType),
      l2CacheBytes: options.l2CacheBytes,
      refcountCacheBytes: options.refcountCacheBytes,
      compress: options.compress,
      discard: options.discard,
      acknowledge: options.acknowledge,
      onWarning: options.onWarning,
    });
  } catch (error) {
    await backing?.close();
    await dataFile?.close();
    await file.close();
    throw error;
  }
}

async function openDataFile(
  file: HostFile,
  header: Header,
  options: OpenOptions,
): Promise<HostFile> {
  const name = textExtension(header, ExtensionType.DATA_FILE);
  if (name === undefined || name === '') {
    throw new QcowError('ERR_TCMU_QCOW_FORMAT', 'its data file is not named in it', {
      path: file.path,
      structure: 'external data file name',
    });
  }
  const path = pathFrom(file.path, name);
  return (await openHostFile(path, { ...options, readOnly: file.readOnly })).file;
}

/** @throws QcowError `ERR_TCMU_QCOW_BACKING` that names the chain's member, with the cause */
async function openBacking(
  overlay: string,
  name: string,
  format: string | undefined,
  options: OpenOptions,
  seen: Seen,
): Promise<Layer> {
  const path = pathFrom(overlay, name);
  try {
    return await openLayer(path, format, options, seen);
  } catch (cause) {
    if (cause instanceof QcowError && cause.code === 'ERR_TCMU_QCOW_LOCKED') throw cause;
    throw new QcowError(
      'ERR_TCMU_QCOW_BACKING',
      `its backing file ${name} can't be opened: ${(cause as Error).message}`,
      { path: overlay, structure: 'backing file name', operation: 'open', cause },
    );
  }
}

/** Opens a file of a chain for reading. @param format as the overlay says; found out when it doesn't */
export async function openLayer(
  path: string,
  format: string | undefined,
  options: OpenOptions = {},
  seen: Seen = new Set(),
): Promise<Layer> {
  const { file, identity } = await openHostFile(path, { ...options, readOnly: true });
  let given = false;
  try {
    if (seen.has(identity)) throw new Error('the chain of backing files comes back to it');
    if (seen.size >= MAX_DEPTH) throw new Error(`the chain is longer than ${MAX_DEPTH} files`);
    const kind = format === undefined ? await probe(file, options) : format;
    if (kind === 'raw' || kind === 'host_device' || kind === 'file') return new RawLayer(file);
    const next = new Set(seen).add(identity);
    if (kind === 'qcow2') {
      given = true;
      return await openImageOn(file, { ...options, readOnly: true, repair: false }, next);
    }
    if (kind === 'qcow') return await openQcow1(file, options, next);
    throw new QcowError('ERR_TCMU_QCOW_UNSUPPORTED', `format ${kind} is not known`, { path });
  } catch (error) {
    if (!given) await file.close();
    throw error;
  }
}

async function openQcow1(file: HostFile, options: OpenOptions, seen: Seen): Promise<Layer> {
  const header = await readHeader1(file);
  const backing =
    header.backingFile === undefined
      ? undefined
      : await openBacking(file.path, header.backingFile, undefined, options, seen);
  const cipher =
    header.cryptMethod === 0 ? undefined : legacyAes(passphraseFor(file.path, options));
  return Qcow1Layer.open(file, header, backing, cipher);
}

async function probe(file: HostFile, options: OpenOptions): Promise<string> {
  const start = new Uint8Array(8);
  await file.read(start, 0);
  const version = versionOf(start);
  const format = version === undefined ? 'raw' : version === 1 ? 'qcow' : 'qcow2';
  options.onWarning?.(
    `${file.path}: the image over it does not say its format; it looks like ${format}`,
  );
  return format;
}

async function cipherOf(
  file: HostFile,
  header: Header,
  options: OpenOptions,
): Promise<DataCipher | undefined> {
  if (header.cryptMethod === 0) return undefined;
  const { path } = file;
  if (header.cryptMethod === 1) {
    if (!file.readOnly) {
      throw new QcowError(
        'ERR_TCMU_QCOW_UNSUPPORTED',
        'the old AES encryption is not safe: open it read-only, and copy the data elsewhere',
        { path, structure: 'header field crypt_method', offset: 32 },
      );
    }
    return legacyAes(passphraseFor(path, options));
  }
  return openLuks(await luksHeader(file, header), passphraseFor(path, options), path);
}

/** All of the LUKS header in an image. @throws QcowError `ERR_TCMU_QCOW_FORMAT` */
export async function luksHeader(file: HostFile, header: Header): Promise<Uint8Array> {
  const { path } = file;
  const pointer = extension(header, ExtensionType.ENCRYPTION);
  const fail = (problem: string) =>
    new QcowError('ERR_TCMU_QCOW_FORMAT', problem, { path, structure: 'encryption header' });
  if (pointer === undefined || pointer.length !== 16) throw fail('nothing says where it is');
  const view = new DataView(pointer.buffer, pointer.byteOffset, 16);
  const offset = view.getBigUint64(0);
  const length = view.getBigUint64(8);
  if (length > 64n * 1024n * 1024n || offset + length > BigInt(file.size())) {
    throw fail(`${length} bytes at 0x${offset.toString(16)} do not lie in the file`);
  }
  const bytes = new Uint8Array(Number(length));
  await file.read(bytes, Number(offset));
  return bytes;
}

function passphraseFor(path: string, { passphrase }: OpenOptions): string | Uint8Array {
  if (passphrase !== undefined) return passphrase;
  throw new QcowError('ERR_TCMU_QCOW_PASSPHRASE', 'it is encrypted: give the passphrase', { path });
}
