// SPDX-License-Identifier: Apache-2.0
/** What is done to whole disks: create, clone, delete, check. */
import { randomBytes } from 'node:crypto';
import { ArgumentError } from 'tcmu';
import { MemoryDataIn } from 'tcmu/store';
import { failureKind } from '../object-store.js';
import { BlobCodec, BlobKind, type Compression, canCompress } from './blob.js';
import { inParallel } from './checkpoint.js';
import { ChunkMap, encodeManifest, type Manifest, type Origin } from './chunk-map.js';
import { Keyring } from './cipher.js';
import { DiskError, Gone } from './errors.js';
import { FrameCache } from './frame-cache.js';
import { RUN } from './log-index.js';
import { LogWriter } from './log-writer.js';
import {
  chunkName,
  cloneName,
  diskName,
  leafName,
  manifestName,
  pinName,
  segmentName,
} from './names.js';
import {
  claim,
  type DiskState,
  loadPinned,
  loadState,
  NO_WRITER,
  type OpeningParts,
} from './opening.js';
import {
  type CloneNote,
  type DiskRecord,
  encodeJson,
  FORMAT,
  type KeySource,
  listPins,
  loadCloneNote,
  loadDisk,
  loadKeyring,
  loadPin,
  newestKeys,
  type Pin,
  saveKeyring,
  savePin,
  unfinished,
} from './records.js';
import type { Requests } from './requests.js';
import { type PinPurpose, pinNow } from './snapshots.js';

const MiB = 1024 * 1024;
const KiB = 1024;
/** Bytes of a segment of a clone's first log, and milliseconds it waits for a bucket that doesn't answer. */
const TAIL_SEGMENT = 4 * MiB;
const TAIL_PATIENCE_MS = 25_000;

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
 * Creates an empty disk. The record `disk` comes last: until then there is none.
 * @throws ArgumentError; DiskError `exists`, `unfinished`
 */
export async function createDisk(
  requests: Requests,
  prefix: string,
  options: CreateOptions,
): Promise<DiskRecord> {
  const record: DiskRecord = {
    format: FORMAT,
    id: randomBytes(16).toString('hex'),
    ...checkCreate(options),
    encrypted: options.key !== undefined,
    created: new Date().toISOString(),
  };
  await assertFree(requests, prefix);
  if (options.key !== undefined) {
    await placeKeys(requests, prefix, record, Keyring.create(), options.key);
  }
  await placeRecord(requests, prefix, record);
  return record;
}

function exists(requests: Requests, prefix: string): DiskError {
  return new DiskError(
    'exists',
    `${requests.objects.description}/${prefix}: there is a disk already; take another name, or delete it`,
  );
}

async function assertFree(requests: Requests, prefix: string): Promise<void> {
  if (await isThere(requests, `${prefix}/${diskName}`)) throw exists(requests, prefix);
  if (await isThere(requests, `${prefix}/${cloneName}`)) throw unfinished(requests, prefix);
}

async function isThere(requests: Requests, key: string): Promise<boolean> {
  try {
    await requests.head(key);
    return true;
  } catch (error) {
    if (failureKind(error) === 'not-found') return false;
    throw error;
  }
}

/** Behind whatever a creation that failed has left. */
async function placeKeys(
  requests: Requests,
  prefix: string,
  record: DiskRecord,
  keyring: Keyring,
  key: KeySource,
): Promise<void> {
  const left = await requests.list(`${prefix}/keys/`);
  const n = left.length === 0 ? 1 : (await newestKeys(requests, prefix))[0] + 1;
  if (!(await saveKeyring(requests, prefix, record, keyring, key, n))) {
    throw exists(requests, prefix);
  }
}

async function placeRecord(requests: Requests, prefix: string, record: DiskRecord): Promise<void> {
  if (!(await requests.claim(`${prefix}/${diskName}`, [encodeJson(record)]))) {
    throw exists(requests, prefix);
  }
}

/** What reading a disk without serving it takes. */
export async function readingParts(
  requests: Requests,
  prefix: string,
  key: KeySource | undefined,
): Promise<OpeningParts> {
  const disk = await loadDisk(requests, prefix);
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
 *
 * First a note takes the name and says which pin will keep the origin's objects, then comes the pin, then all
 * that the clone is made of, and its record `disk` last: broken off anywhere, there is a whole clone, or one
 * that nobody can open, whose deletion takes the pin along.
 * @throws DiskError `exists`, `unfinished`, `not-a-disk`, `in-use`, `unreachable`
 */
export async function cloneDisk(
  requests: Requests,
  source: string,
  snapshot: string | undefined,
  target: string,
  key: KeySource | undefined,
): Promise<DiskRecord> {
  const parts = await readingParts(requests, source, key);
  if (snapshot !== undefined) await loadPin(requests, source, snapshot);
  await assertFree(requests, target);
  const id = randomBytes(16).toString('hex');
  const origin = { prefix: source, pin: `clone-${id}` };
  if (!(await requests.claim(`${target}/${cloneName}`, [encodeJson({ id, origin })]))) {
    throw unfinished(requests, target);
  }
  let pin: Pin;
  try {
    pin = await placeClonePin(parts, snapshot, { name: origin.pin, kind: 'clone', clone: target });
  } catch (error) {
    // Where that fails too, the note stays: it is what finds the pin.
    await giveUp(requests, target, { id, origin }).catch(() => {});
    throw error;
  }
  const tail = await loadPinned(parts, pin);
  const initial = randomBytes(4).readUInt32LE();
  const { disk } = parts;
  const record: DiskRecord = {
    format: FORMAT,
    id,
    blockSize: disk.blockSize,
    chunkSize: disk.chunkSize,
    frameSize: disk.frameSize,
    compression: disk.compression,
    encrypted: disk.encrypted,
    size: tail.image.size,
    initial,
    origin,
    created: new Date().toISOString(),
  };
  const keyring = parts.codec.keyring?.extended();
  if (keyring !== undefined && key !== undefined) {
    await placeKeys(requests, target, record, keyring, key);
  }
  const own: Origin = { prefix: target, id };
  const { leaves, origins } = tail.manifest;
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
    origins: [own, ...origins],
    leaves: new Map([...leaves].map(([i, ref]) => [i, { ...ref, origin: ref.origin + 1 }])),
  };
  const codec = new BlobCodec(id, disk.compression, keyring);
  const identity = { kind: BlobKind.manifest, number: 0, n: 0, epoch: initial };
  const blob = await codec.encode({ ...identity, writer: manifest.writer }, [
    encodeManifest(manifest),
  ]);
  await requests.create(`${target}/${manifestName(0, initial)}`, blob.parts);
  await copyTail(tail, readingPartsOf(requests, target, record, codec));
  // Deleted meanwhile, it must not come back without its objects.
  if ((await loadCloneNote(requests, target))?.id !== id) {
    throw new DiskError('in-use', `${target}: the clone was deleted while it was being made`);
  }
  await placeRecord(requests, target, record);
  return record;
}

async function giveUp(requests: Requests, target: string, note: CloneNote): Promise<void> {
  await requests.delete([`${note.origin.prefix}/${pinName(note.origin.pin)}`]);
  if ((await loadCloneNote(requests, target))?.id !== note.id) return;
  await requests.delete([`${target}/${cloneName}`]);
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
      frameSize: disk.frameSize,
      segmentSize: TAIL_SEGMENT,
      dirtyLimit: 4 * TAIL_SEGMENT,
      residentLimit: 0,
      uploads: 4,
      patience: TAIL_PATIENCE_MS,
      conditional: true,
      lease: 0,
    },
    { durable: () => {}, failed: () => {} },
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
  await log.drain(TAIL_PATIENCE_MS);
}

/**
 * Deletes a disk with its snapshots, or what is there of a clone that was broken off.
 * @param force also when clones need it (they are damaged then), or when it is half there
 * @throws DiskError `in-use`, `not-a-disk`
 */
export async function deleteDisk(
  requests: Requests,
  prefix: string,
  force: boolean,
): Promise<number> {
  let record: Pick<DiskRecord, 'origin'> | undefined;
  try {
    record = await loadDisk(requests, prefix);
  } catch (error) {
    if (!(error instanceof DiskError)) throw error;
    if (error.failure === 'unfinished') record = await loadCloneNote(requests, prefix);
    else if (!force) throw error;
  }
  if (!force) {
    const clone = (await listPins(requests, prefix)).find(({ kind }) => kind === 'clone');
    if (clone !== undefined) {
      throw new DiskError(
        'in-use',
        `${prefix}: the clone ${clone.clone} needs it: delete it first`,
      );
    }
  }
  const keys = (await requests.list(`${prefix}/`)).map(({ key }) => key);
  // Without its record it is no disk: a deletion that is interrupted leaves nothing that opens, and of a clone the
  // note that names its pin.
  const first = `${prefix}/${diskName}`;
  const last = `${prefix}/${cloneName}`;
  await requests.delete([first]);
  await requests.delete(keys.filter((key) => key !== first && key !== last));
  if (record?.origin !== undefined) {
    await requests.delete([`${record.origin.prefix}/${pinName(record.origin.pin)}`]);
  }
  await requests.delete([last]);
  return keys.length;
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
