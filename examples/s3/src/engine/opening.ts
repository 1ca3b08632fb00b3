// SPDX-License-Identifier: Apache-2.0
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
import { LogReader, listSlots } from './log-reader.js';
import { WINDOW } from './log-writer.js';
import { manifestName, probeName, segmentName, versionOf } from './names.js';
import type { DiskRecord, Pin } from './records.js';
import type { Requests } from './requests.js';
import { FENCE_EPOCH, RecordType } from './segment.js';

export interface OpeningParts extends Omit<ImageParts, 'geometry'> {
  readonly disk: DiskRecord;
  /** Bytes of memory for leaves. */
  readonly mapLimit: number;
}

/** Of a log that nobody has written yet. */
export const NO_WRITER = '0'.repeat(16);

const MAX_ATTEMPTS = 20;
/**
 * How far ahead of the last slot that is known a fence is put first; each further one twice as far: the one
 * before came too late, be it that its slot was taken, be it that it had been collected already.
 */
const FENCE_AHEAD = 2 * WINDOW;
const FENCE_AHEAD_MOST = 256 * WINDOW;

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

function initialManifest(prefix: string, { id, size = 0 }: DiskRecord): Manifest {
  const origins = [{ prefix, id }];
  return {
    n: 0,
    epoch: 0,
    writer: NO_WRITER,
    cut: 1,
    cutEpoch: 0,
    cutWriter: NO_WRITER,
    lease: 0,
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
  /** Milliseconds for which the writer may acknowledge what the bucket lacks; 0 once it has ended by itself. */
  lease: number;
  /** Who wrote before this writer's claim, and its lease. */
  predecessor = { writer: NO_WRITER, lease: 0 };
  /** And fences. */
  readonly claims: number[];
  readonly #ends = new Map<number, number>();
  /** Highest slot that was ever seen taken. */
  #lastKnown = 0;
  #behindFence = false;
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
    this.lease = manifest.lease;
    this.claims = [...manifest.claims];
    // The first one is created with the disk.
    this.committed = manifest.n === 0;
  }

  get manifest(): Manifest {
    return this.image.map.manifest;
  }

  /** Lists what there is from here on, and fetches it ahead. */
  async survey(): Promise<readonly number[]> {
    const known = await this.#reader.survey(this.slot);
    this.#lastKnown = Math.max(this.#lastKnown, known.at(-1) ?? 0);
    return known;
  }

  /** The highest slot that is known to be taken; 0: none. */
  get lastKnown(): number {
    return Math.max(this.#lastKnown, this.slot - 1);
  }

  /** Slot of the claim or fence that ended the writer of an epoch, if we came by. */
  endOf(epoch: number): number | undefined {
    return this.#ends.get(epoch);
  }

  /** @param end slot to stop before. @returns segments applied. @throws Gone; DiskError */
  async advance(end = Number.POSITIVE_INFINITY): Promise<number> {
    let count = 0;
    for (; this.slot < end; count++) {
      const segment = await this.#reader.read(this.slot);
      if (segment === undefined) break;
      const { header } = segment.facts;
      const key = `${this.#parts.prefix}/${segmentName(this.slot)}`;
      const isClaim = segment.records.length === 0;
      const isFence = isClaim && header.epoch === FENCE_EPOCH;
      if ((header.epoch < this.epoch && !isFence) || header.next <= this.slot) {
        throw damaged(key, `epoch ${header.epoch} comes after ${this.epoch}`);
      }
      if (isClaim) {
        this.claims.push(this.slot);
        if (!this.#ends.has(this.epoch)) this.#ends.set(this.epoch, this.slot);
      } else if (this.#behindFence) {
        // The fence came so late that its slot had been collected: we have missed a newer manifest.
        throw new Gone(key);
      }
      this.image.apply(segment);
      for (const { type, block: n } of segment.records) {
        if (type === RecordType.release) this.lease = 0;
        if (type !== RecordType.checkpoint) continue;
        if (n > this.manifest.n) await this.#adopt(n, header.epoch);
        if (n === this.manifest.n && header.epoch === this.manifest.epoch) this.committed = true;
      }
      if (!isFence) {
        if (isClaim) {
          this.predecessor = { writer: this.writer, lease: this.lease };
          this.lease = header.n;
        }
        this.epoch = header.epoch;
        this.writer = header.writer;
      }
      this.#behindFence = isFence;
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
      // Claims and fences prove nothing of the kind.
      if (segment === undefined || segment.records.length === 0) continue;
      if (segment.facts.header.n <= this.slot) continue;
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
    gone = undefined;
    try {
      const result = await run();
      if (result !== undefined) return result;
    } catch (error) {
      if (!(error instanceof Gone)) throw error;
      gone = error;
    }
  }
  if (gone !== undefined) throw damaged(gone.key, 'it is missing');
  throw new DiskError(
    'in-use',
    `${prefix}: somebody is writing the disk, and puts its log into chunks faster than it can be read from here; try again, from nearer or with less beside`,
    { operation: 'open', path: prefix },
  );
}

/**
 * The state at the end of the log, as it was at some moment meanwhile: a writer at work may be faster than
 * we follow.
 * @throws DiskError `damaged`, `unreachable`, `key`, `in-use`
 */
export function loadState(parts: OpeningParts): Promise<DiskState> {
  const seen: { hole?: number } = {};
  return attempt(parts.prefix, () => tryLoad(parts, seen));
}

/**
 * @param seen of the attempt before
 * @returns undefined when the log went away under us: it is being written
 */
async function tryLoad(
  parts: OpeningParts,
  seen: { hole?: number },
): Promise<DiskState | undefined> {
  const { requests, codec, prefix, disk } = parts;
  const candidates = await listManifests(requests, prefix);
  const before = candidates[0];
  const isStillNewest = async (): Promise<boolean> => {
    const now = (await listManifests(requests, prefix))[0];
    return now?.n === before?.n && now?.epoch === before?.epoch;
  };
  const initial = { n: 0, epoch: disk.initial ?? 0 };
  try {
    for (const { n, epoch } of [...candidates.filter(({ n }) => n > 0), initial]) {
      const manifest = await loadManifest(requests, codec, prefix, disk, n, epoch);
      const state = new DiskState(parts, manifest);
      const known = await state.survey();
      await state.advance(state.lastKnown + 1);
      if (!state.committed) continue;
      // A hole in the log is its end, unless what was there has been collected meanwhile.
      if (!(await isStillNewest())) return undefined;
      // Or a newer manifest didn't count when we looked, and does now. If it does not when we look again,
      // nothing was collected for it.
      const isNewest = before === undefined || (n === before.n && epoch === before.epoch);
      if (!isNewest && state.slot < (known.at(-1) ?? 0) && state.slot !== seen.hole) {
        seen.hole = state.slot;
        return undefined;
      }
      await state.assertEnd(known.filter((slot) => slot > state.slot));
      return state;
    }
  } catch (error) {
    if (!(error instanceof Gone) || (await isStillNewest())) throw error;
    return undefined;
  }
  throw damaged(`${prefix}/m/`, 'no manifest is valid');
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
  const key = `${prefix}/${probeName(id)}`;
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
 * Makes us the one writer: claims the first missing slot, after everything before it has been applied. From
 * then on no older writer gets anything in.
 *
 * A writer that is faster than we may fill that slot first, again and again, or collect what we are
 * reading. Then a fence goes up ahead of the log: the older one can't pass it, so we come to the end.
 *
 * @param lease our own, in milliseconds, and whether that of a writer is over for certain. The claim names the
 *   longest that whoever comes after us has to wait for: we may die before the one before us is over
 * @returns the state; its predecessor's lease is 0 when it is over
 */
export async function claim(
  parts: OpeningParts,
  writer: string,
  lease: { readonly length: number; isOver(writer: string): boolean },
  conditional: boolean,
): Promise<DiskState> {
  const { requests, codec, prefix, disk } = parts;
  const identity = { kind: BlobKind.segment, n: 0, writer };
  const seen: { hole?: number } = {};
  const aim = { ahead: FENCE_AHEAD };
  let fence = 0;
  let isBusy = false;
  return attempt(prefix, async () => {
    if (isBusy) fence = await placeFence(parts, 1, aim, identity, conditional);
    const state = await tryLoad(parts, seen);
    isBusy = state === undefined;
    if (state === undefined) return undefined;
    for (let fences = 0; ; ) {
      const mine = state.slot;
      // Neither what an old writer has under way nor a fence, ours or one left behind, is in our way.
      const next = Math.max(mine + WINDOW, fence + 1, state.lastKnown + 1);
      if (lease.isOver(state.writer)) state.lease = 0;
      const n = Math.max(lease.length, state.lease);
      const ours = { ...identity, number: mine, n, epoch: state.epoch + 1 };
      if (await claimSlot(parts, ours, next, conditional)) {
        await state.advance(mine + 1);
        if (state.writer !== writer || state.claims.at(-1) !== mine) return undefined;
        break;
      }
      if (mine > fence) {
        if (fences++ === MAX_ATTEMPTS) return undefined;
        fence = await placeFence(parts, mine, aim, identity, conditional);
      }
      await state.survey();
      await state.advance(fence + 1);
    }
    // Whether all that we came along was still the log when we came: a newer manifest tells what has been
    // collected. It covers none of its writer's slots behind the writer's end.
    const mine = state.claims.at(-1) as number;
    for (const { n, epoch: by } of await listManifests(requests, prefix)) {
      if (n <= state.manifest.n) break;
      const newer = await loadManifest(requests, codec, prefix, disk, n, by);
      if (newer.cut <= (state.endOf(by) ?? mine)) continue;
      // Where it covers our slot nobody comes by any more; else it stays the end of that writer.
      if (newer.cut > mine) await requests.delete([`${prefix}/${segmentName(mine)}`]);
      return undefined;
    }
    return state;
  });
}

/**
 * @param from a slot up to which the log is known
 * @param aim how far ahead the next fence goes, of all for one opening
 * @returns the fence's slot: no writer that has not got there yet gets past it
 */
async function placeFence(
  parts: OpeningParts,
  from: number,
  aim: { ahead: number },
  identity: Pick<BlobIdentity, 'kind' | 'n' | 'writer'>,
  conditional: boolean,
): Promise<number> {
  for (;;) {
    const taken = await listSlots(parts.requests, parts.prefix, from);
    const slot = (taken.at(-1) ?? from) + aim.ahead;
    aim.ahead = Math.min(2 * aim.ahead, FENCE_AHEAD_MOST);
    const fence = { ...identity, number: slot, epoch: FENCE_EPOCH };
    const isUp = claimSlot(parts, fence, slot + WINDOW, conditional).catch((error: unknown) => {
      if (error instanceof Gone) return false;
      throw error;
    });
    if (await isUp) return slot;
  }
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
  try {
    if (!conditional) {
      const there = await requests.head(key).catch((error: unknown) => {
        if (failureKind(error) !== 'not-found') throw error;
      });
      if (there !== undefined) return false;
    }
    return await requests.claim(key, blob.parts);
  } catch (error) {
    // Taken when we came, and collected when we looked by whom.
    throw failureKind(error) === 'not-found' ? new Gone(key) : error;
  }
}
