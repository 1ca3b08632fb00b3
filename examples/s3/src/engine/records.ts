// SPDX-License-Identifier: Apache-2.0
/**
 * The small objects: a disk's identity, its wrapped keys, its pins. JSON, one line, then its CRC-32 in
 * hexadecimal.
 */
import { randomBytes } from 'node:crypto';
import { crc32 } from 'node:zlib';
import { failureKind } from '../object-store.js';
import type { Compression } from './blob.js';
import { Keyring, type WrappedKey } from './cipher.js';
import { DiskError, damaged } from './errors.js';
import {
  diskName,
  homeOf,
  isPinName,
  keyringName,
  pinName,
  stateFolder,
  wholeName,
} from './names.js';
import type { Requests } from './requests.js';

export const FORMAT = 2;

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
  /** Bytes it began with, of a disk that began as zeros. */
  readonly size?: number;
  /** Of any other: the second part of the name of the manifest it began with. */
  readonly initial?: number;
  /** Of a clone: the home of the disk whose objects it uses, and the pin that keeps them. */
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

/** What the `format` of a record would be. */
const VACANT = 'free';

/** What is at a place that is nobody's, where it can't be nothing: unlike any other. */
export function encodeVacancy(): Buffer {
  return encodeJson({ format: VACANT, id: randomBytes(16).toString('hex') });
}

/** Whether what is at a place is there for nothing. */
export function isVacant(body: Buffer): boolean {
  try {
    return decodeJson<{ format: unknown }>(diskName, body).format === VACANT;
  } catch {
    return false;
  }
}

/** The record of whose a place is; undefined when it is nobody's. @throws DiskError `damaged`, `format` */
export async function readRecord(
  requests: Requests,
  place: string,
): Promise<DiskRecord | undefined> {
  const key = `${place}/${diskName}`;
  let body: Buffer;
  try {
    ({ body } = await requests.get(key));
  } catch (error) {
    if (failureKind(error) === 'not-found') return undefined;
    throw error;
  }
  return decodeRecord(key, body);
}

/** @returns undefined when the place is nobody's. @throws DiskError `damaged`, `format` */
export function decodeRecord(key: string, body: Buffer): DiskRecord | undefined {
  if (isVacant(body)) return undefined;
  const record = decodeJson<DiskRecord>(key, body);
  if (record.format !== FORMAT) {
    throw new DiskError(
      'format',
      `${key}: format ${record.format}, this program knows ${FORMAT} only: use the version that made it`,
      { operation: 'open', path: key },
    );
  }
  return record;
}

/** How a disk's making and deleting stand. */
export interface DiskStanding {
  readonly isWhole: boolean;
  readonly isDeleted: boolean;
}

export async function standingOf(requests: Requests, home: string): Promise<DiskStanding> {
  const found = (await requests.list(`${home}/${stateFolder}`)).map(({ key }) => key);
  const isWhole = found.includes(`${home}/${wholeName}`);
  return { isWhole, isDeleted: found.length > (isWhole ? 1 : 0) };
}

/** @throws DiskError `not-a-disk`, `unfinished`, `format`, `damaged` */
export async function loadDisk(requests: Requests, place: string): Promise<DiskRecord> {
  const { description } = requests.objects;
  const path = `${place}/${diskName}`;
  for (let seen: string | undefined; ; ) {
    const record = await readRecord(requests, place);
    if (record === undefined) {
      throw new DiskError(
        'not-a-disk',
        `${description}/${place}: there is no disk; create one (\`tcmu-s3 create\`) or check the name`,
        { operation: 'open', path },
      );
    }
    // Unless another one has taken the place meanwhile.
    if (record.id === seen) {
      throw new DiskError(
        'unfinished',
        `${description}/${place}: a disk that is being made or deleted, or whose making or deletion was broken off; if nobody is at it, delete it (\`tcmu-s3 delete\`), and make it again`,
        { operation: 'open', path },
      );
    }
    const { isWhole, isDeleted } = await standingOf(requests, homeOf(place, record.id));
    if (isWhole && !isDeleted) return record;
    seen = record.id;
  }
}

/** Gives the user's key: 32 bytes. */
export type KeySource = () => Promise<Uint8Array> | Uint8Array;

interface WrappedKeys {
  readonly keys: readonly WrappedKey[];
}

async function newestKeys(requests: Requests, home: string): Promise<[number, WrappedKeys]> {
  const newest = (await requests.list(`${home}/keys/`)).at(-1);
  if (newest === undefined) throw damaged(`${home}/keys/`, 'the disk’s keys are missing');
  const { body } = await requests.get(newest.key);
  const n = Number.parseInt(newest.key.slice(home.length + '/keys/'.length), 16);
  return [n, decodeJson<WrappedKeys>(newest.key, body)];
}

/** @throws DiskError `key` */
export async function loadKeyring(
  requests: Requests,
  home: string,
  disk: DiskRecord,
  source: KeySource | undefined,
): Promise<Keyring | undefined> {
  if (!disk.encrypted) return undefined;
  if (source === undefined) {
    throw new DiskError(
      'key',
      `${home}: the disk is encrypted; give its key (--key-file or --key-command)`,
    );
  }
  const [, { keys }] = await newestKeys(requests, home);
  return Keyring.unwrap(keys, await userKey(source), disk.id);
}

async function userKey(source: KeySource): Promise<Uint8Array> {
  const key = await source();
  if (key.length !== 32) {
    throw new DiskError('key', `the key has ${key.length} bytes; it must have 32`);
  }
  return key;
}

/** What `keys/<n>` says. @throws DiskError `key` */
export async function encodeKeyring(
  keyring: Keyring,
  source: KeySource,
  diskId: string,
): Promise<Buffer> {
  const wrapped: WrappedKeys = { keys: keyring.wrap(await userKey(source), diskId) };
  return encodeJson(wrapped);
}

/**
 * Wraps the data keys with a new user's key, and adds a data key for what is written after the disk is
 * opened next. The old user's key opens nothing any more once this has settled.
 * @throws DiskError `key`; `in-use` when another rotation ran at the same time
 */
export async function rotateKeys(
  requests: Requests,
  place: string,
  disk: DiskRecord,
  from: KeySource,
  to: KeySource,
): Promise<void> {
  const home = homeOf(place, disk.id);
  const [n, { keys }] = await newestKeys(requests, home);
  const keyring = Keyring.unwrap(keys, await userKey(from), disk.id).extended();
  const newest = `${home}/${keyringName(n + 1)}`;
  if (!(await requests.claim(newest, [await encodeKeyring(keyring, to, disk.id)]))) {
    throw new DiskError('in-use', `${place}: the keys were rotated at the same time; try again`);
  }
  const old = (await requests.list(`${home}/keys/`)).map(({ key }) => key);
  await requests.delete(old.filter((key) => key < newest));
}

export async function listPins(requests: Requests, home: string): Promise<Pin[]> {
  const found = await requests.list(`${home}/p/`);
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
export async function loadPin(requests: Requests, home: string, name: string): Promise<Pin> {
  const key = `${home}/${pinName(name)}`;
  try {
    return decodeJson<Pin>(key, (await requests.get(key)).body);
  } catch (error) {
    if (failureKind(error) !== 'not-found') throw error;
    throw new DiskError('not-a-disk', `${home}: it has no snapshot ${name}`, { path: key });
  }
}

/** @throws DiskError `in-use` when the name is taken */
export async function savePin(requests: Requests, home: string, pin: Pin): Promise<void> {
  if (!isPinName(pin.name)) {
    throw new DiskError(
      'in-use',
      `${JSON.stringify(pin.name)} can't name a snapshot: take letters, digits, ".", "_" and "-"`,
    );
  }
  if (!(await requests.claim(`${home}/${pinName(pin.name)}`, [encodeJson(pin)]))) {
    throw new DiskError('in-use', `${home}: there is a snapshot ${pin.name} already`);
  }
}
