// SPDX-License-Identifier: Apache-2.0
/** What the tests of the disk share: small disks, a clock without waiting, a model. */
import type { UnmapContext, WriteContext } from 'tcmu';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import { createDisk } from '../../src/engine/admin.js';
import { type Clock, Requests } from '../../src/engine/requests.js';
import type { ObjectStore } from '../../src/object-store.js';
import { type OpenOptions, S3Disk } from '../../src/s3-disk.js';
import type { MemoryBucket } from './memory-objects.js';

export const KiB = 1024;
export const MiB = 1024 * KiB;
export const PREFIX = 'disks/d0';

/** A thousand times as fast as the world's; an endless sleep ends by its signal alone. */
export const quickClock: Clock = {
  now: () => performance.now() * 1000,
  wall: () => performance.now() * 1000,
  random: () => 0.5,
  sleep: (ms, signal) =>
    new Promise((resolve) => {
      if (signal?.aborted) return resolve();
      const timer = Number.isFinite(ms) ? setTimeout(done, ms / 1000) : undefined;
      function done(): void {
        clearTimeout(timer);
        signal?.removeEventListener('abort', done);
        resolve();
      }
      signal?.addEventListener('abort', done);
    }),
};

/** Where a disk's objects are, all but its record. */
export function homeIn(bucket: MemoryBucket, place = PREFIX): string {
  const record = bucket.objects.get(`${place}/disk`)?.body.toString().split('\n')[0] ?? '{}';
  return `${place}/${(JSON.parse(record) as { id?: string }).id}`;
}

/** Limits that make everything happen within a megabyte. */
export const SMALL: OpenOptions = {
  segmentSize: 32 * KiB,
  dirtyLimit: 128 * KiB,
  cacheSize: 64 * KiB,
  mapSize: 4 * KiB,
  logLimit: 128 * KiB,
  uploads: 4,
  writeBackMs: Number.POSITIVE_INFINITY,
  watchMs: 0,
  leaseMs: 0,
  patienceMs: Number.POSITIVE_INFINITY,
  clock: quickClock,
};

export const GEOMETRY = { chunkSize: 16 * KiB, frameSize: 4 * KiB };

export function requestsOf(objects: ObjectStore): Requests {
  return new Requests(objects, quickClock, () => {}, Number.POSITIVE_INFINITY);
}

export function create(
  objects: ObjectStore,
  options: Partial<Parameters<typeof createDisk>[2]> = {},
) {
  return createDisk(requestsOf(objects), PREFIX, { size: MiB, ...GEOMETRY, ...options });
}

export function open(objects: ObjectStore, options: OpenOptions = {}): Promise<S3Disk> {
  return S3Disk.open(objects, PREFIX, { ...SMALL, ...options });
}

export function request(fua = false): WriteContext & UnmapContext {
  return { fua, mayUnmap: true, signal: new AbortController().signal };
}

export async function readAll(disk: S3Disk, position = 0, length = disk.size - position) {
  const data = new MemoryDataIn(Buffer.alloc(length, 0xee));
  await disk.read(position, data);
  return Buffer.from(data.bytes);
}

export async function write(disk: S3Disk, position: number, bytes: Uint8Array, fua = false) {
  await disk.write(position, new MemoryDataOut(bytes), request(fua));
}

/** What a failing call rejects with or throws; fails when it does neither. */
export async function failure(run: () => unknown): Promise<Error & Record<string, unknown>> {
  try {
    await run();
  } catch (error) {
    return error as Error & Record<string, unknown>;
  }
  throw new Error('it did not fail');
}

/** The code of what is behind a sense error. */
export async function causeOf(run: () => unknown): Promise<unknown> {
  const error = await failure(run);
  const known = error['code'] === 'ERR_TCMU_SENSE' ? error.cause : error;
  return (known as { code?: unknown }).code;
}

type Change =
  | { kind: 'data'; position: number; bytes: Buffer }
  | { kind: 'zero'; position: number; length: number }
  | { kind: 'size'; size: number };

/** A disk as it should be: a state that is certain, and what came after it. */
export class Model {
  #base: Buffer<ArrayBufferLike>;
  readonly #changes: Change[] = [];
  /** Changes that must be there. */
  #certain = 0;

  constructor(size: number) {
    this.#base = Buffer.alloc(size);
  }

  get changes(): number {
    return this.#changes.length;
  }

  get size(): number {
    const last = this.#changes.findLast(({ kind }) => kind === 'size');
    return last?.kind === 'size' ? last.size : this.#base.length;
  }

  note(change: Change): void {
    this.#changes.push(change);
  }

  /** Everything up to change number `count` is durable. */
  certain(count: number): void {
    this.#certain = Math.max(this.#certain, count);
  }

  now(): Buffer {
    return this.#changes.reduce(apply, Buffer.from(this.#base) as Buffer);
  }

  /** Whether the disk has ever been `found`. */
  holds(found: Buffer): boolean {
    let state: Buffer<ArrayBufferLike> = Buffer.from(this.#base);
    return (
      state.equals(found) ||
      this.#changes.some((change) => {
        state = apply(state, change);
        return state.equals(found);
      })
    );
  }

  /**
   * Takes `found` for the state after a crash.
   * @returns how many changes survived, or undefined when it is no state the disk may be in
   */
  recover(found: Buffer): number | undefined {
    let state: Buffer<ArrayBufferLike> = Buffer.from(this.#base);
    for (let count = 0; ; count++) {
      if (count >= this.#certain && state.equals(found)) {
        this.#base = Buffer.from(found);
        this.#changes.length = 0;
        this.#certain = 0;
        return count;
      }
      const next = this.#changes[count];
      if (next === undefined) return undefined;
      state = apply(state, next);
    }
  }
}

function apply(state: Buffer, change: Change): Buffer {
  if (change.kind === 'data') change.bytes.copy(state, change.position);
  else if (change.kind === 'zero') {
    state.fill(0, change.position, change.position + change.length);
  } else if (change.size <= state.length) return Buffer.from(state.subarray(0, change.size));
  else return Buffer.concat([state, Buffer.alloc(change.size - state.length)]);
  return state;
}
