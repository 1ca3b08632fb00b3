// SPDX-License-Identifier: Apache-2.0
/**
 * The small objects: a disk's identity, its wrapped keys, its pins. JSON, one line, then its CRC-32 in
 * hexadecimal.
 */
import { crc32 } from 'node:zlib';
import { failureKind } from '../object-store.js';
import type { Compression } from './blob.js';
import { Keyring, type WrappedKey } from './cipher.js';
import { DiskError, damaged } from './errors.js';
import { cloneName, diskName, isPinName, keyringName, pinName } from './names.js';
import type { Requests } from './requests.js';

export const FORMAT = 1;

/** What never changes about a disk. */
export interface DiskRecord {
  readonly format: number;
  /** 32 hexadecimal digits. */
  readonly id: string;
  readonly blockSize: number;
  readonly chunkSize: number;
  readonly frameSize: number;
  readonly compression: Compression;
  readonly encrypted: boolean;
  /** Bytes it began with. */
  readonly size: number;
  /** Second part of the name of the manifest it began with; without one it began as zeros. */
  readonly initial?: number;
  /** Of a clone: whose objects it uses, and the pin that keeps them. */
  readonly origin?: { readonly prefix: string; readonly pin: string };
  /** ISO 8601. */
  readonly created: string;
}

/** Keeps what a manifest and the log up to a slot need. */
export interface Pin {
  readonly name: string;
  /** Tells it from another of the same name: a PUT that is in doubt is looked at. */
  readonly id: string;
  readonly kind: 'snapshot' | 'clone';
  /** Manifest. */
  readonly n: number;
  readonly epoch: number;
  /** Slots `[from, to)` are needed too. */
  readonly from: number;
  readonly to: number;
  /** Bytes. */
  readonly size: number;
  readonly created: string;
  /** Of a clone: where it is. */
  readonly clone?: string;
}

export function encodeJson(value: unknown): Buffer {
  const text = JSON.stringify(value);
  return Buffer.from(`${text}\n${crc32(text).toString(16).padStart(8, '0')}\n`);
}

/** @throws DiskError `damaged` */
export function decodeJson<T>(key: string, body: Buffer): T {
  const [text = '', crc] = body.toString().split('\n');
  if (crc !== crc32(text).toString(16).padStart(8, '0'))
    throw damaged(key, 'it fails its checksum');
  return JSON.parse(text) as T;
}

/** Of a clone, from before it is made until after it is deleted: what finds its pin. */
export interface CloneNote {
  /** Of the clone. */
  readonly id: string;
  readonly origin: { readonly prefix: string; readonly pin: string };
}

/** @returns undefined when there is none */
export async function loadCloneNote(
  requests: Requests,
  prefix: string,
): Promise<CloneNote | undefined> {
  const key = `${prefix}/${cloneName}`;
  try {
    return decodeJson<CloneNote>(key, (await requests.get(key)).body);
  } catch (error) {
    if (failureKind(error) === 'not-found') return undefined;
    throw error;
  }
}

export function unfinished(requests: Requests, prefix: string): DiskError {
  return new DiskError(
    'unfinished',
    `${requests.objects.description}/${prefix}: a clone that is being made, or whose making or deletion was broken off; if nobody is at it, delete it (\`tcmu-s3 delete\`), and clone again`,
    { operation: 'open', path: `${prefix}/${cloneName}` },
  );
}

/** @throws DiskError `not-a-disk`, `unfinished`, `format` */
export async function loadDisk(requests: Requests, prefix: string): Promise<DiskRecord> {
  const key = `${prefix}/${diskName}`;
  let body: Buffer;
  try {
    ({ body } = await requests.get(key));
  } catch (error) {
    if (failureKind(error) !== 'not-found') throw error;
    if ((await loadCloneNote(requests, prefix)) !== undefined) throw unfinished(requests, prefix);
    throw new DiskError(
      'not-a-disk',
      `${requests.objects.description}/${prefix}: there is no disk; create one (\`tcmu-s3 create\`) or check the name`,
      { operation: 'open', path: key },
    );
  }
  const record = decodeJson<DiskRecord>(key, body);
  if (record.format !== FORMAT) {
    throw new DiskError(
      'format',
      `${key}: format ${record.format}, this program knows ${FORMAT} only: use a newer one`,
      { operation: 'open', path: key },
    );
  }
  return record;
}

/** Gives the user's key: 32 bytes. */
export type KeySource = () => Promise<Uint8Array> | Uint8Array;

interface WrappedKeys {
  readonly keys: readonly WrappedKey[];
}

export async function newestKeys(
  requests: Requests,
  prefix: string,
): Promise<[number, WrappedKeys]> {
  const newest = (await requests.list(`${prefix}/keys/`)).at(-1);
  if (newest === undefined) throw damaged(`${prefix}/keys/`, 'the disk’s keys are missing');
  const { body } = await requests.get(newest.key);
  const n = Number.parseInt(newest.key.slice(prefix.length + '/keys/'.length), 16);
  return [n, decodeJson<WrappedKeys>(newest.key, body)];
}

/** @throws DiskError `key` */
export async function loadKeyring(
  requests: Requests,
  prefix: string,
  disk: DiskRecord,
  source: KeySource | undefined,
): Promise<Keyring | undefined> {
  if (!disk.encrypted) return undefined;
  if (source === undefined) {
    throw new DiskError(
      'key',
      `${prefix}: the disk is encrypted; give its key (--key-file or --key-command)`,
    );
  }
  const [, { keys }] = await newestKeys(requests, prefix);
  return Keyring.unwrap(keys, await userKey(source), disk.id);
}

async function userKey(source: KeySource): Promise<Uint8Array> {
  const key = await source();
  if (key.length !== 32) {
    throw new DiskError('key', `the key has ${key.length} bytes; it must have 32`);
  }
  return key;
}

export async function saveKeyring(
  requests: Requests,
  prefix: string,
  disk: DiskRecord,
  keyring: Keyring,
  source: KeySource,
  n = 1,
): Promise<boolean> {
  const wrapped: WrappedKeys = { keys: keyring.wrap(await userKey(source), disk.id) };
  return requests.claim(`${prefix}/${keyringName(n)}`, [encodeJson(wrapped)]);
}

/**
 * Wraps the data keys with a new user's key, and adds a data key for what is written after the disk is
 * opened next. The old user's key opens nothing any more once this has settled.
 * @throws DiskError `key`; `in-use` when another rotation ran at the same time
 */
export async function rotateKeys(
  requests: Requests,
  prefix: string,
  disk: DiskRecord,
  from: KeySource,
  to: KeySource,
): Promise<void> {
  const [n, { keys }] = await newestKeys(requests, prefix);
  const keyring = Keyring.unwrap(keys, await userKey(from), disk.id).extended();
  if (!(await saveKeyring(requests, prefix, disk, keyring, to, n + 1))) {
    throw new DiskError('in-use', `${prefix}: the keys were rotated at the same time; try again`);
  }
  const old = (await requests.list(`${prefix}/keys/`)).map(({ key }) => key);
  await requests.delete(old.filter((key) => key < `${prefix}/${keyringName(n + 1)}`));
}

export async function listPins(requests: Requests, prefix: string): Promise<Pin[]> {
  const found = await requests.list(`${prefix}/p/`);
  const pins = await Promise.all(
    found.map(async ({ key }) => {
      try {
        return decodeJson<Pin>(key, (await requests.get(key)).body);
      } catch (error) {
        // Deleted since it was listed.
        if (failureKind(error) === 'not-found') return undefined;
        throw error;
      }
    }),
  );
  return pins.filter((pin) => pin !== undefined);
}

/** @throws DiskError `not-a-disk` */
export async function loadPin(requests: Requests, prefix: string, name: string): Promise<Pin> {
  const key = `${prefix}/${pinName(name)}`;
  try {
    return decodeJson<Pin>(key, (await requests.get(key)).body);
  } catch (error) {
    if (failureKind(error) !== 'not-found') throw error;
    throw new DiskError('not-a-disk', `${prefix}: it has no snapshot ${name}`, { path: key });
  }
}

/** @throws DiskError `in-use` when the name is taken */
export async function savePin(requests: Requests, prefix: string, pin: Pin): Promise<void> {
  if (!isPinName(pin.name)) {
    throw new DiskError(
      'in-use',
      `${JSON.stringify(pin.name)} can't name a snapshot: take letters, digits, ".", "_" and "-"`,
    );
  }
  if (!(await requests.claim(`${prefix}/${pinName(pin.name)}`, [encodeJson(pin)]))) {
    throw new DiskError('in-use', `${prefix}: there is a snapshot ${pin.name} already`);
  }
}
