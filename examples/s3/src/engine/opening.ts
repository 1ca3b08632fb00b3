/**
 * From the bucket to a disk's state: the newest manifest that the log has declared valid, and the log
 * after it. And the claim, which makes us the one writer.
 *
 * A manifest counts once a checkpoint record naming it is in the log, before a segment that is missing:
 * until then an older one does. Objects may be collected under us by the disk's writer while we read;
 * a newer manifest tells, and we begin anew.
 */
import { failureKind } from '../object-store.js';
import { type BlobCodec, type BlobIdentity, BlobKind } from './blob.js';
import { ChunkMap, decodeManifest, type Manifest } from './chunk-map.js';
import { DiskImage, type ImageParts } from './disk-image.js';
import { DiskError, damaged, Gone } from './errors.js';
import { LogReader } from './log-reader.js';
import { WINDOW } from './log-writer.js';
import { manifestName, segmentName, versionOf } from './names.js';
import type { DiskRecord, Pin } from './records.js';
import type { Requests } from './requests.js';
import { RecordType } from './segment.js';

export interface OpeningParts extends Omit<ImageParts, 'geometry'> {
  readonly disk: DiskRecord;
  /** Bytes of memory for leaves. */
  readonly mapLimit: number;
}

/** Of a log that nobody has written yet. */
export const NO_WRITER = '0'.repeat(16);

const MAX_ATTEMPTS = 20;
/** Slots claimed at once when another writer is faster than us. */
const CLAIMS = WINDOW;

/** A manifest by its name. @throws Gone; DiskError `damaged` */
export async function loadManifest(
  requests: Requests,
  codec: BlobCodec,
  prefix: string,
  disk: DiskRecord,
  n: number,
  epoch: number,
): Promise<Manifest> {
  if (n === 0 && disk.initial === undefined) return initialManifest(prefix, disk);
  const key = `${prefix}/${manifestName(n, epoch)}`;
  const { body } = await requests.get(key).catch((error: unknown) => {
    if (failureKind(error) === 'not-found') throw new Gone(key);
    throw error;
  });
  const { header, frames } = codec.decode(key, body, disk.id);
  if (header.kind !== BlobKind.manifest || header.number !== n || header.epoch !== epoch) {
    throw damaged(key, 'it is not that manifest');
  }
  const manifest = decodeManifest(key, frames[0] as Buffer);
  // The bucket may have been moved since.
  return { ...manifest, origins: [{ prefix, id: disk.id }, ...manifest.origins.slice(1)] };
}

function initialManifest(prefix: string, { id, size }: DiskRecord): Manifest {
  const origins = [{ prefix, id }];
  return {
    n: 0,
    epoch: 0,
    writer: NO_WRITER,
    cut: 1,
    cutEpoch: 0,
    cutWriter: NO_WRITER,
    size,
    claims: [],
    origins,
    leaves: new Map(),
  };
}

/** A disk as of some slot; `advance` goes on to the end of the log. */
export class DiskState {
  readonly image: DiskImage;
  readonly #parts: OpeningParts;
  readonly #reader: LogReader;
  /** First slot not applied. */
  slot: number;
  epoch: number;
  writer: string;
  readonly claims: number[];
  /** Whether the log says that the manifest counts. */
  committed: boolean;

  constructor(parts: OpeningParts, manifest: Manifest) {
    const { requests, codec, disk } = parts;
    const framesPerChunk = disk.chunkSize / disk.frameSize;
    this.#parts = parts;
    const map = new ChunkMap(manifest, requests, codec, framesPerChunk, parts.mapLimit);
    this.image = new DiskImage({ ...parts, geometry: disk }, map);
    this.#reader = new LogReader(requests, codec, parts.prefix, disk.id);
    this.slot = manifest.cut;
    this.epoch = manifest.cutEpoch;
    this.writer = manifest.cutWriter;
    this.claims = [...manifest.claims];
    // The first one is created with the disk.
    this.committed = manifest.n === 0;
  }

  get manifest(): Manifest {
    return this.image.map.manifest;
  }

  survey(): Promise<readonly number[]> {
    return this.#reader.survey(this.slot);
  }

  /** @param end slot to stop before. @returns segments applied. @throws Gone; DiskError */
  async advance(end = Number.POSITIVE_INFINITY): Promise<number> {
    let count = 0;
    for (; this.slot < end; count++) {
      const segment = await this.#reader.read(this.slot);
      if (segment === undefined) break;
      const { header } = segment.facts;
      if (header.epoch < this.epoch || header.next <= this.slot) {
        throw damaged(
          `${this.#parts.prefix}/${segmentName(this.slot)}`,
          `epoch ${header.epoch} comes after ${this.epoch}`,
        );
      }
      if (segment.records.length === 0) this.claims.push(this.slot);
      this.image.apply(segment);
      for (const { type, block: n } of segment.records) {
        if (type !== RecordType.checkpoint) continue;
        if (n > this.manifest.n) await this.#adopt(n, header.epoch);
        if (n === this.manifest.n && header.epoch === this.manifest.epoch) this.committed = true;
      }
      this.epoch = header.epoch;
      this.writer = header.writer;
      this.slot = header.next;
    }
    return count;
  }

  /**
   * What is behind the end of the log was on its way when its writer died. If one of them was written
   * when our end was durable already, that has been lost since.
   * @param behind slots that exist. @throws DiskError `damaged`
   */
  async assertEnd(behind: readonly number[]): Promise<void> {
    const looked = new Set([...behind.slice(0, WINDOW), ...behind.slice(-1)]);
    for (const slot of looked) {
      const segment = await this.#reader.read(slot);
      if (segment === undefined || segment.facts.header.n <= this.slot) continue;
      const { prefix } = this.#parts;
      throw damaged(
        `${prefix}/${segmentName(this.slot)}`,
        `it is missing, and ${segmentName(slot)}, written later, is there`,
      );
    }
  }

  async #adopt(n: number, epoch: number): Promise<void> {
    const { requests, codec, prefix, disk } = this.#parts;
    const manifest = await loadManifest(requests, codec, prefix, disk, n, epoch);
    const map = this.image.map.successor(manifest, new Map());
    this.image.adopt(map);
    this.committed = true;
  }
}

/** Versions of all manifests, the newest first. */
export async function listManifests(
  requests: Requests,
  prefix: string,
): Promise<{ n: number; epoch: number }[]> {
  const found = await requests.list(`${prefix}/m/`);
  return found
    .map(({ key }) => versionOf(key.slice(prefix.length + 1)))
    .filter((version) => version !== undefined)
    .reverse();
}

async function attempt<T>(prefix: string, run: () => Promise<T | undefined>): Promise<T> {
  let gone: Gone | undefined;
  for (let tries = 0; tries < MAX_ATTEMPTS; tries++) {
    try {
      const result = await run();
      if (result !== undefined) return result;
    } catch (error) {
      if (!(error instanceof Gone)) throw error;
      gone = error;
    }
  }
  throw damaged(gone?.key ?? `${prefix}/s/`, 'it is missing, or the log never ends');
}

/**
 * The state at the end of the log.
 * @throws DiskError `damaged`, `unreachable`, `key`
 */
export function loadState(parts: OpeningParts): Promise<DiskState> {
  const { requests, codec, prefix, disk } = parts;
  return attempt(prefix, async () => {
    const candidates = await listManifests(requests, prefix);
    const initial = { n: 0, epoch: disk.initial ?? 0 };
    for (const { n, epoch } of [...candidates.filter(({ n }) => n > 0), initial]) {
      const manifest = await loadManifest(requests, codec, prefix, disk, n, epoch);
      const state = new DiskState(parts, manifest);
      const known = await state.survey();
      await state.advance();
      if (!state.committed) continue;
      // A hole in the log is its end, unless what was there has been collected meanwhile.
      const now = (await listManifests(requests, prefix))[0];
      const before = candidates[0];
      if (now?.n !== before?.n || now?.epoch !== before?.epoch) return undefined;
      await state.assertEnd(known.filter((slot) => slot > state.slot));
      return state;
    }
    throw damaged(`${prefix}/m/`, 'no manifest is valid');
  });
}

/** The state a pin keeps. @throws DiskError `damaged` */
export async function loadPinned(parts: OpeningParts, pin: Pin): Promise<DiskState> {
  const { requests, codec, prefix, disk } = parts;
  const manifest = await loadManifest(requests, codec, prefix, disk, pin.n, pin.epoch).catch(
    (error: unknown) => {
      throw error instanceof Gone ? damaged(error.key, `snapshot ${pin.name} needs it`) : error;
    },
  );
  const state = new DiskState(parts, manifest);
  await state.survey();
  await state.advance(pin.to);
  if (state.slot < pin.to) {
    const key = `${prefix}/${segmentName(state.slot)}`;
    throw damaged(key, `it is missing; snapshot ${pin.name} needs it`);
  }
  return state;
}

/** Whether the store honours conditions. @throws DiskError `no-fencing` */
export async function probeFencing(requests: Requests, prefix: string, id: string): Promise<void> {
  const key = `${prefix}/probe/${id}`;
  const refuse = (how: string): DiskError =>
    new DiskError(
      'no-fencing',
      `${requests.objects.description} ${how}: nothing would keep two writers apart. Use a store that honours If-None-Match (for Ceph: a bucket without versioning), or say \`--fencing none\` and make sure yourself that there is only one writer`,
      { operation: 'open', path: key },
    );
  try {
    await requests.create(key, [Buffer.from('first')]);
  } catch (error) {
    if (failureKind(error) === 'bad-request') throw refuse('refuses conditional writes');
    throw error;
  }
  const second = await requests.claim(key, [Buffer.from('second')]);
  await requests.delete([key]);
  if (second) throw refuse('ignores If-None-Match');
}

/**
 * Makes us the one writer: claims the first missing slot, after everything that is there has been
 * applied. From then on no older writer gets anything in.
 */
export async function claim(
  parts: OpeningParts,
  writer: string,
  conditional: boolean,
): Promise<DiskState> {
  const { requests, prefix } = parts;
  let width = 1;
  let state: DiskState | undefined;
  return attempt(prefix, async () => {
    const begun = state ?? (await loadState(parts));
    // Unless we come to the end of this attempt, the next one begins anew.
    state = undefined;
    const first = begun.slot;
    const epoch = begun.epoch + 1;
    const next = first + width - 1 + WINDOW;
    const won = await Promise.all(
      Array.from({ length: width }, (_, i) => {
        const identity = { kind: BlobKind.segment, number: first + i, n: 0, epoch, writer };
        return claimSlot(parts, identity, next, conditional);
      }),
    );
    const ours = won.indexOf(true);
    const mine = first + ours;
    width = CLAIMS;
    await begun.advance(ours < 0 ? Number.POSITIVE_INFINITY : mine + 1);
    if (ours < 0 || begun.claims.at(-1) !== mine || begun.writer !== writer) {
      state = begun;
      return undefined;
    }
    // If what we claimed is long past, it had been collected: a manifest covers it.
    for (const { n, epoch: by } of await listManifests(requests, prefix)) {
      if (n <= begun.manifest.n) break;
      const { codec, disk } = parts;
      const newer = await loadManifest(requests, codec, prefix, disk, n, by);
      if (newer.cut <= mine) continue;
      await requests.delete([`${prefix}/${segmentName(mine)}`]);
      return undefined;
    }
    return begun;
  });
}

async function claimSlot(
  parts: OpeningParts,
  identity: BlobIdentity,
  next: number,
  conditional: boolean,
): Promise<boolean> {
  const { requests, codec, prefix } = parts;
  const key = `${prefix}/${segmentName(identity.number)}`;
  const blob = await codec.encode(identity, [], next);
  if (!conditional) {
    try {
      await requests.head(key);
      return false;
    } catch (error) {
      if (failureKind(error) !== 'not-found') throw error;
    }
  }
  return requests.claim(key, blob.parts);
}
