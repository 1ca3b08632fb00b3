// SPDX-License-Identifier: Apache-2.0
/**
 * What is done to whole disks: create, clone, delete, check.
 *
 * Whoever makes a disk takes its place with the record `disk`, which one of any number gets, and has written nothing before;
 * then come, in the disk's own home, all the things it begins with, and `state/whole` last. Whoever deletes one says so by
 * `state/deleted-…`, looks then at what there is, and frees the place at the end. So, whoever else is at it and wherever
 * somebody is killed, a place is free, or a whole disk's, or one's that nobody opens and everybody can delete.
 *
 * Two pairs look at each other after they have said what they are about: who deletes, for clones' pins, and who clones, for the
 * origin's deletion; who makes a disk, before it is whole, for somebody who deletes it already.
 */
import { randomBytes } from 'node:crypto';
import { ArgumentError } from 'tcmu';
import { MemoryDataIn } from 'tcmu/store';
import { failureKind } from '../object-store.js';
import { BlobCodec, BlobKind, type Compression, canCompress } from './blob.js';
import { ChunkMap, encodeManifest, type Manifest, type Origin } from './chunk-map.js';
import { Keyring } from './cipher.js';
import { DiskError, Gone } from './errors.js';
import { FrameCache } from './frame-cache.js';
import { RUN } from './log-index.js';
import { LogWriter } from './log-writer.js';
import {
  chunkName,
  deletedName,
  diskName,
  homeOf,
  isInHome,
  keyringName,
  leafName,
  manifestName,
  pinName,
  segmentName,
  stateFolder,
  wholeName,
} from './names.js';
import {
  claim,
  type DiskState,
  loadPinned,
  loadState,
  NO_WRITER,
  type OpeningParts,
} from './opening.js';
import { inParallel } from './parallel.js';
import { freePlace, honouredIn, takePlace } from './place.js';
import {
  type DiskRecord,
  decodeRecord,
  encodeJson,
  encodeKeyring,
  FORMAT,
  type KeySource,
  listPins,
  loadDisk,
  loadKeyring,
  loadPin,
  type Pin,
  readRecord,
  savePin,
  standingOf,
} from './records.js';
import type { Requests } from './requests.js';
import { type PinPurpose, pinNow } from './snapshots.js';

const MiB = 1024 * 1024;
const KiB = 1024;
/** Bytes of a segment of a clone's first log. */
const TAIL_SEGMENT = 4 * MiB;

export interface CreateOptions {
  /** Bytes: a multiple of the block size, from 1 MiB on. */
  size: number;
  /** 512 or 4096 (default). */
  blockSize?: number | undefined;
  /** Bytes of a chunk: a power of two of frames. Default 1 MiB. */
  chunkSize?: number | undefined;
  /** Bytes that are read, verified and compressed together. Default 64 KiB. */
  frameSize?: number | undefined;
  compression?: Compression | undefined;
  /** Makes it an encrypted disk. */
  key?: KeySource | undefined;
}

function powerOfTwo(value: number, low: number, high: number): boolean {
  return value >= low && value <= high && Number.isInteger(Math.log2(value));
}

/** @throws ArgumentError */
function checkCreate(options: CreateOptions): Required<Omit<CreateOptions, 'key'>> {
  const { size, blockSize = 4096, compression = 'none' } = options;
  const { chunkSize = MiB, frameSize = Math.min(64 * KiB, chunkSize) } = options;
  const complain = (what: string): never => {
    throw new ArgumentError(`create: ${what}`);
  };
  if (blockSize !== 512 && blockSize !== 4096)
    complain(`block size ${blockSize}: take 512 or 4096`);
  if (!Number.isSafeInteger(size) || size < MiB || size % blockSize !== 0) {
    complain(`size ${size} must be a multiple of ${blockSize} from 1 MiB on`);
  }
  if (!powerOfTwo(frameSize, 4 * KiB, MiB)) complain(`frame size ${frameSize}: 4 KiB to 1 MiB`);
  if (!powerOfTwo(chunkSize, frameSize, 64 * MiB) || chunkSize / frameSize > 1024) {
    complain(`chunk size ${chunkSize}: a power of two, 1 to 1024 frames, at most 64 MiB`);
  }
  if (!canCompress(compression)) {
    complain('Zstandard needs Node.js 22.15 or later; take deflate, or a newer Node.js');
  }
  return { size, blockSize, chunkSize, frameSize, compression };
}

/**
 * Creates an empty disk.
 * @throws ArgumentError; DiskError `exists`, `unfinished`, `key`, `in-use`
 */
export async function createDisk(
  requests: Requests,
  place: string,
  options: CreateOptions,
): Promise<DiskRecord> {
  const record: DiskRecord = {
    format: FORMAT,
    id: randomBytes(16).toString('hex'),
    ...checkCreate(options),
    encrypted: options.key !== undefined,
    created: new Date().toISOString(),
  };
  const { key } = options;
  const keys =
    key === undefined ? undefined : await encodeKeyring(Keyring.create(), key, record.id);
  await make(requests, place, record, keys, async () => {});
  return record;
}

/**
 * Takes the place, fills the home, calls it whole. What can't be finished is deleted.
 * @param keys of an encrypted disk
 */
async function make(
  requests: Requests,
  place: string,
  record: DiskRecord,
  keys: Buffer | undefined,
  fill: () => Promise<void>,
): Promise<void> {
  await takePlace(requests, place, record);
  const home = homeOf(place, record.id);
  const isStillOurs = async (): Promise<boolean> =>
    !(await standingOf(requests, home)).isDeleted &&
    (await readRecord(requests, place))?.id === record.id;
  const deleted = (cause?: unknown): DiskError =>
    new DiskError('in-use', `${place}: the disk was deleted while it was being made`, { cause });
  try {
    if (keys !== undefined) await requests.create(`${home}/${keyringName(1)}`, [keys]);
    await fill();
    if (!(await isStillOurs())) throw deleted();
    await requests.create(`${home}/${wholeName}`, [encodeJson({ at: new Date().toISOString() })]);
  } catch (error) {
    const isOurs = await isStillOurs().catch(() => true);
    // Where that fails too, the record stays, and says what there is to delete.
    await remove(requests, place, record, false).catch(() => {});
    throw isOurs ? error : deleted(error);
  }
}

/** What reading a disk without serving it takes. */
export async function readingParts(
  requests: Requests,
  place: string,
  key: KeySource | undefined,
): Promise<OpeningParts> {
  const disk = await loadDisk(requests, place);
  const prefix = homeOf(place, disk.id);
  const keyring = await loadKeyring(requests, prefix, disk, key);
  return readingPartsOf(requests, prefix, disk, new BlobCodec(disk.id, disk.compression, keyring));
}

function readingPartsOf(
  requests: Requests,
  prefix: string,
  disk: DiskRecord,
  codec: BlobCodec,
): OpeningParts {
  return {
    requests,
    codec,
    prefix,
    disk,
    cache: new FrameCache(16 * MiB, disk.frameSize),
    fileCache: undefined,
    payload: () => undefined,
    readAhead: false,
    mapLimit: 32 * MiB,
  };
}

/**
 * A writable disk that begins as a snapshot (or the present state) of another one, whose chunks it uses.
 * @throws DiskError `exists`, `unfinished`, `not-a-disk`, `in-use`, `key`, `unreachable`
 */
export async function cloneDisk(
  requests: Requests,
  source: string,
  snapshot: string | undefined,
  target: string,
  key: KeySource | undefined,
): Promise<DiskRecord> {
  const parts = await readingParts(requests, source, key);
  const { disk, prefix, codec } = parts;
  if (snapshot !== undefined) await loadPin(requests, prefix, snapshot);
  const id = randomBytes(16).toString('hex');
  const record: DiskRecord = {
    format: FORMAT,
    id,
    blockSize: disk.blockSize,
    chunkSize: disk.chunkSize,
    frameSize: disk.frameSize,
    compression: disk.compression,
    encrypted: disk.encrypted,
    initial: randomBytes(4).readUInt32LE(),
    origin: { prefix, pin: `clone-${id}` },
    created: new Date().toISOString(),
  };
  const keyring = codec.keyring?.extended();
  const keys =
    keyring === undefined || key === undefined ? undefined : await encodeKeyring(keyring, key, id);
  const own = readingPartsOf(
    requests,
    homeOf(target, id),
    record,
    new BlobCodec(id, disk.compression, keyring),
  );
  await make(requests, target, record, keys, async () => {
    const purpose = { name: `clone-${id}`, kind: 'clone', clone: target } as const;
    const pin = await placeClonePin(parts, snapshot, purpose);
    // Whoever began to delete the origin before may have seen no pin.
    if ((await loadDisk(requests, source)).id !== disk.id) {
      throw new DiskError('in-use', `${source}: it was deleted while it was being cloned`);
    }
    await beginAs(await loadPinned(parts, pin), own);
  });
  return record;
}

/** What a clone begins with: a manifest that names its origin's leaves, and the origin's log as its own. */
async function beginAs(tail: DiskState, own: OpeningParts): Promise<void> {
  const { requests, codec, prefix, disk } = own;
  const { leaves, origins } = tail.manifest;
  const initial = disk.initial as number;
  const manifest: Manifest = {
    n: 0,
    epoch: initial,
    writer: randomBytes(8).toString('hex'),
    cut: 1,
    cutEpoch: 0,
    cutWriter: NO_WRITER,
    lease: 0,
    size: tail.image.size,
    claims: [],
    origins: [{ prefix, id: disk.id }, ...origins],
    leaves: new Map([...leaves].map(([i, ref]) => [i, { ...ref, origin: ref.origin + 1 }])),
  };
  const identity = { kind: BlobKind.manifest, number: 0, n: 0, epoch: initial };
  const blob = await codec.encode({ ...identity, writer: manifest.writer }, [
    encodeManifest(manifest),
  ]);
  await requests.create(`${prefix}/${manifestName(0, initial)}`, blob.parts);
  await copyTail(tail, own);
}

async function placeClonePin(
  parts: OpeningParts,
  snapshot: string | undefined,
  purpose: PinPurpose,
): Promise<Pin> {
  const { requests, prefix } = parts;
  if (snapshot === undefined) return pinNow(parts, purpose);
  const pin = { ...(await loadPin(requests, prefix, snapshot)), ...purpose };
  await savePin(requests, prefix, pin);
  try {
    // It may have been deleted, and collected, just before ours was there.
    await loadPin(requests, prefix, snapshot);
  } catch (error) {
    await requests.delete([`${prefix}/${pinName(pin.name)}`]);
    throw error;
  }
  return pin;
}

/** What is in the origin's log becomes the clone's log, in the order of the disk. */
async function copyTail({ image }: DiskState, target: OpeningParts): Promise<void> {
  const { blockSize, chunkSize } = image.geometry;
  const { requests, codec, prefix, disk } = target;
  const writer = randomBytes(8).toString('hex');
  // Nobody can open it yet: there are no rivals, and no lease to wait for.
  const { slot, epoch } = await claim(target, writer, { length: 0, isOver: () => true }, true);
  const log = new LogWriter(
    requests,
    codec,
    slot,
    {
      prefix,
      epoch,
      writer,
      blockSize,
      chunkSize,
      frameSize: disk.frameSize,
      segmentSize: TAIL_SEGMENT,
      dirtyLimit: 4 * TAIL_SEGMENT,
      residentLimit: 0,
      uploads: 4,
      patience: requests.patience,
      conditional: true,
      lease: 0,
    },
    { arranged: () => {}, durable: () => {}, failed: () => {} },
  );
  for (const chunk of [...image.index.indexes()].sort((a, b) => a - b)) {
    const runs = image.index.of(chunk) ?? [];
    for (let i = 0; i < runs.length; i += RUN) {
      const position = chunk * chunkSize + (runs[i] as number) * blockSize;
      const end = position + (runs[i + 1] as number) * blockSize;
      // What was cut off is in the log, but not in the disk.
      if (position >= image.size) continue;
      if ((runs[i + 3] as number) < 0) {
        if (!log.room(0)) await log.makeRoom(0);
        log.zero(position / blockSize, (end - position) / blockSize);
        continue;
      }
      for (let at = position; at < end; at += TAIL_SEGMENT) {
        const data = new MemoryDataIn(Buffer.allocUnsafe(Math.min(end - at, TAIL_SEGMENT)));
        await image.read(at, data);
        if (!log.room(data.length)) await log.makeRoom(data.length);
        log.append(at / blockSize, data.bytes);
      }
    }
  }
  await log.drain(requests.patience);
}

/**
 * Deletes a disk with its snapshots, or what is there of one whose making or deletion was broken off.
 * @param force also when clones need it (they are damaged then), when its record is damaged, or when there is none, but
 *   objects of disks that were there
 * @returns how many objects were deleted
 * @throws DiskError `in-use`, `not-a-disk`, `damaged`
 */
export async function deleteDisk(
  requests: Requests,
  place: string,
  force: boolean,
): Promise<number> {
  let record: DiskRecord | undefined;
  try {
    record = await readRecord(requests, place);
  } catch (error) {
    if (!(error instanceof DiskError) || !force) throw error;
    const honoured = await honouredIn(requests, homeOf(place, randomBytes(16).toString('hex')));
    await freePlace(requests, place, isUnreadable, honoured);
  }
  if (record !== undefined) return remove(requests, place, record, force);
  if (!force) await loadDisk(requests, place);
  return (await clear(requests, place, undefined)).length;
}

function isUnreadable(body: Buffer): boolean {
  try {
    decodeRecord(diskName, body);
    return false;
  } catch {
    return true;
  }
}

/** @throws DiskError `in-use` */
async function remove(
  requests: Requests,
  place: string,
  { id, origin }: Pick<DiskRecord, 'id' | 'origin'>,
  force: boolean,
): Promise<number> {
  const home = homeOf(place, id);
  if (!force) await assertUnneeded(requests, place, home);
  const honoured = await honouredIn(requests, home);
  const deleted = `${home}/${deletedName(randomBytes(4).toString('hex'))}`;
  await requests.create(deleted, [encodeJson({ at: new Date().toISOString() })]);
  if (!force) {
    await assertUnneeded(requests, place, home).catch(async (error: unknown) => {
      if (error instanceof DiskError) await requests.delete([deleted]);
      throw error;
    });
  }
  const gone = await clear(requests, place, id);
  if (origin !== undefined) await requests.delete([`${origin.prefix}/${pinName(origin.pin)}`]);
  const isMeant = (body: Buffer): boolean => decodeRecord(diskName, body)?.id === id;
  await freePlace(requests, place, isMeant, honoured);
  await requests.delete(gone.filter((key) => key.startsWith(`${home}/${stateFolder}`)));
  return gone.length;
}

async function assertUnneeded(requests: Requests, place: string, home: string): Promise<void> {
  const clone = (await listPins(requests, home)).find(({ kind }) => kind === 'clone');
  if (clone === undefined) return;
  throw new DiskError('in-use', `${place}: the clone ${clone.clone} needs it: delete it first`);
}

/**
 * Deletes what there is in a disk's home, all but what says that it is being deleted. While the place is that disk's,
 * or with `undefined` nobody's, homes of others were left by disks that are gone, and go too.
 * @returns the keys, the ones left to the caller among them
 */
async function clear(requests: Requests, place: string, id: string | undefined): Promise<string[]> {
  const keys = (await requests.list(`${place}/`)).map(({ key }) => key);
  // After the list: what was in it was there while the place was not another's.
  const isFree = (await readRecord(requests, place))?.id === id;
  const gone = keys.filter((key) =>
    isFree ? isInHome(key.slice(place.length + 1)) : key.startsWith(`${place}/${id}/`),
  );
  const kept = id === undefined ? undefined : `${homeOf(place, id)}/${deletedName('')}`;
  await requests.delete(gone.filter((key) => kept === undefined || !key.startsWith(kept)));
  return gone;
}

export interface CheckResult {
  /** Objects looked at, and their bytes. */
  objects: number;
  bytes: number;
  /** Objects of the disk that nothing needs: `gc` deletes them. */
  unused: number;
  /** What is wrong, with the object's name. */
  problems: string[];
}

/**
 * Reads every object that the disk, its snapshots and the clones' pins need, and verifies every byte.
 * @param onProgress objects done, objects in all
 */
export async function checkDisk(
  parts: OpeningParts,
  onProgress: (done: number, all: number) => void = () => {},
): Promise<CheckResult> {
  const { requests, prefix } = parts;
  const result: CheckResult = { objects: 0, bytes: 0, unused: 0, problems: [] };
  const problem = (error: unknown): void => {
    const text = error instanceof Gone ? `${error.key}: it is missing` : (error as Error).message;
    if (!result.problems.includes(text)) result.problems.push(text);
  };
  // Keys with the id of the disk that wrote them.
  const wanted = new Map<string, string>();
  const states: DiskState[] = [];
  try {
    states.push(await loadState(parts));
  } catch (error) {
    problem(error);
  }
  for (const pin of await listPins(requests, prefix)) {
    try {
      states.push(await loadPinned(parts, pin));
    } catch (error) {
      problem(error);
    }
  }
  for (const state of states) {
    try {
      await addObjects(parts, state, wanted);
    } catch (error) {
      problem(error);
    }
  }
  let done = 0;
  await inParallel([...wanted], 8, async ([key, id]) => {
    try {
      const { body } = await requests.get(key);
      result.objects++;
      result.bytes += body.length;
      parts.codec.decode(key, body, id);
    } catch (error) {
      if (failureKind(error) === 'not-found') problem(new Gone(key));
      else if (error instanceof DiskError && error.failure !== 'unreachable') problem(error);
      else throw error;
    }
    onProgress(++done, wanted.size);
  });
  for (const kind of ['c', 'l', 'm']) {
    for (const { key } of await requests.list(`${prefix}/${kind}/`)) {
      if (!wanted.has(key)) result.unused++;
    }
  }
  return result;
}

async function addObjects(
  { requests, codec, prefix, disk, mapLimit }: OpeningParts,
  { manifest, image }: DiskState,
  wanted: Map<string, string>,
): Promise<void> {
  const { n, epoch, origins } = manifest;
  if (n > 0 || disk.initial !== undefined) {
    wanted.set(`${prefix}/${manifestName(n, epoch)}`, disk.id);
  }
  for (const slot of image.segments.keys()) wanted.set(`${prefix}/${segmentName(slot)}`, disk.id);
  const framesPerChunk = disk.chunkSize / disk.frameSize;
  const map = new ChunkMap(manifest, requests, codec, framesPerChunk, mapLimit);
  for (const [index, ref] of manifest.leaves) {
    const owner = origins[ref.origin] as Origin;
    wanted.set(`${owner.prefix}/${leafName(index, ref.n, ref.epoch)}`, owner.id);
    for (const [within, chunk] of (await map.leaf(index, ref)).entries(ref.origin)) {
      const origin = origins[chunk.origin] as Origin;
      const name = chunkName(map.chunkOf(index, within), chunk.n, chunk.epoch);
      wanted.set(`${origin.prefix}/${name}`, origin.id);
    }
  }
}
