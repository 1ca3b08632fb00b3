// SPDX-License-Identifier: Apache-2.0
/**
 * The end of the log that is being written: the open segment, the sealed ones on their way to the bucket,
 * and those that are there already and still in memory.
 *
 * What it promises:
 * - Segments are uploaded side by side but count in order: `durable` is the first slot that may be missing,
 *   and a flush is answered when it is past everything appended before.
 * - Every slot is created under If-None-Match. Whoever opens the disk for writing claims the first slot
 *   that is missing, or puts a fence into a later one, so the upload that loses ends this writer for good:
 *   every waiting and later write and flush fails with `fenced`. A flush that has nothing to send looks into
 *   the slot that would be next instead: none succeeds that began when another writer had opened the disk.
 * - `lease` holds only for so long after a moment when the disk was ours; `renew` asks. It counts from before a
 *   slot was first sent, once that and all before it are ours, and from before a look that found nobody else's in any slot
 *   from the first that may be missing to the one never sent: a successor's claim would be in one of them, and claims are never deleted.
 *   What we have sent may be: it may have arrived untold, been taken over and collected.
 * - No more than `WINDOW` slots are under way from the first missing one on, and a claim or fence leaves that many free behind itself: late uploads of an old writer fill slots that
 *   nobody reads.
 * - While the bucket does not answer, uploads are tried again for ever; callers wait, at most as long as
 *   they are patient, and are told `unreachable` or `refused`. Their data stays and goes out later.
 * - Appending never waits; `room` says whether it should.
 */
import type { DataOut } from 'tcmu';
import { failureKind } from '../object-store.js';
import { type BlobCodec, BlobKind, decodeHead, type EncodedBlob, HEADER_BYTES } from './blob.js';
import { Buffers } from './buffers.js';
import { DiskError } from './errors.js';
import { Lease, type Moment } from './lease.js';
import { segmentName } from './names.js';
import { isRefusal, isTransient, type Requests, unreachable } from './requests.js';
import {
  FENCE_EPOCH,
  framesOf,
  MAX_RECORD_BLOCKS,
  OpenSegment,
  type Placed,
  RecordType,
} from './segment.js';
import type { SegmentFacts } from './segment-facts.js';

/** Slots that may be on their way at a time, from the first that is missing. Part of the format. */
export const WINDOW = 16;

/** Uploads a flush may start while others are under way; more flushes than that share one. */
const FLUSH_UPLOADS = 2;
/** Segments with less data than this are copied out of their buffer, which is used again. */
const SMALL_SHARE = 4;

export interface LogWriterOptions {
  readonly prefix: string;
  readonly epoch: number;
  readonly writer: string;
  readonly blockSize: number;
  readonly chunkSize: number;
  readonly frameSize: number;
  readonly segmentSize: number;
  /** Bytes appended and not yet durable, from which on writers should wait. */
  readonly dirtyLimit: number;
  /** Bytes of uploaded segments kept in memory for reading, and of those that are loaded again, together. */
  readonly residentLimit: number;
  readonly uploads: number;
  readonly patience: number;
  /** Whether the store honours conditions; if not, a HEAD before the PUT is better than nothing. */
  readonly conditional: boolean;
  /** Milliseconds (`lease.ts`). */
  readonly lease: number;
}

export interface LogWriterEvents {
  /** Data of the open segment is elsewhere in it now: at once, before anybody looks. */
  arranged(slot: number, placed: readonly Placed[]): void;
  /** A segment is in the bucket; all before it are too. */
  durable(facts: SegmentFacts): void;
  /** Nothing can be written any more. */
  failed(error: DiskError): void;
}

interface Sealed {
  readonly slot: number;
  readonly payload: Buffer;
  readonly records: Buffer;
  facts: SegmentFacts | undefined;
  /** Before it was first sent. */
  sent: Moment | undefined;
}

interface Waiter {
  /** Answered when `durable` is above it. */
  readonly slot: number;
  readonly since: number;
  readonly patience: number;
  readonly resolve: () => void;
  readonly reject: (error: Error) => void;
}

export class LogWriter {
  readonly #requests: Requests;
  readonly #codec: BlobCodec;
  readonly #options: LogWriterOptions;
  readonly #events: LogWriterEvents;
  readonly lease: Lease;
  #open: OpenSegment;
  /** When the first change came into it. */
  #openSince = 0;
  #staging: Buffer;
  /** Of segments. They go round: what is dirty becomes resident, makes way for what is loaded, or is written again. */
  readonly #buffers: Buffers;
  /** Sealed, not started. */
  readonly #queue: Sealed[] = [];
  readonly #underWay = new Map<number, Sealed>();
  /** Done, but one before them isn't. */
  readonly #done = new Map<number, Sealed>();
  readonly #payloads = new Map<number, Buffer>();
  #residentBytes = 0;
  readonly #resident: number[] = [];
  #durable: number;
  #dirty = 0;
  #sealWanted = false;
  #waiters: Waiter[] = [];
  #writersWaiting = 0;
  /** Settles when the last writer in the queue has had its turn. */
  #turn: Promise<void> = Promise.resolve();
  #failure: DiskError | undefined;
  /** The bucket refuses us: callers are told at once, uploads go on being tried. */
  #refusal: unknown;
  #watching = false;
  /** Looks for a rival: the one under way, and the one that begins after it. */
  #looking: Promise<void> | undefined;
  #lookingNext: Promise<void> | undefined;
  #renewing: Promise<void> | undefined;
  #released = false;
  #holders = 0;
  /** Segments before it may be held. */
  #heldBefore = 0;
  /** Of segments that are forgotten, and may be held all the same. */
  readonly #held: Buffer[] = [];
  #heldBytes = 0;
  #lentBytes = 0;

  /** @param slot the first to write */
  constructor(
    requests: Requests,
    codec: BlobCodec,
    slot: number,
    options: LogWriterOptions,
    events: LogWriterEvents,
  ) {
    this.#requests = requests;
    this.#codec = codec;
    this.#options = options;
    this.#events = events;
    this.lease = new Lease(requests.clock, options.lease);
    this.#durable = slot;
    const { segmentSize, dirtyLimit, residentLimit } = options;
    this.#buffers = new Buffers(segmentSize, Math.ceil((dirtyLimit + residentLimit) / segmentSize));
    this.#staging = this.#buffers.take();
    this.#open = new OpenSegment(slot, options.blockSize, this.#staging);
  }

  /** First slot that may not be in the bucket. */
  get durable(): number {
    return this.#durable;
  }

  /** Slot that what is appended now goes to. */
  get slot(): number {
    return this.#open.slot;
  }

  /** Bytes not durable yet. */
  get dirty(): number {
    return this.#dirty;
  }

  /** Bytes of memory that segments in the bucket take here. */
  get residentBytes(): number {
    return this.#residentBytes + this.#heldBytes;
  }

  /** Bytes of memory that are lent, and of those kept for use again what is more than may be dirty. */
  get lentBytes(): number {
    const kept = this.#dirty + this.#buffers.freeBytes;
    return this.#lentBytes + Math.max(0, kept - this.#options.dirtyLimit);
  }

  get #usedBytes(): number {
    return this.residentBytes + this.#lentBytes;
  }

  get failure(): DiskError | undefined {
    return this.#failure;
  }

  get uploading(): number {
    return this.#underWay.size;
  }

  /** Data of a segment, while it is in memory. */
  payload(slot: number): Buffer | undefined {
    return slot === this.#open.slot ? this.#staging : this.#payloads.get(slot);
  }

  /** @throws DiskError once writing is over, or while the bucket refuses us */
  check(): void {
    if (this.#failure !== undefined) throw this.#failure;
    if (this.#refusal !== undefined) throw refused(this.#refusal);
  }

  room(length: number): boolean {
    return this.#writersWaiting === 0 && this.#fits(length);
  }

  /** Until there is room, first come, first served. @throws DiskError */
  makeRoom(length: number): Promise<void> {
    const { patience } = this.#options;
    return this.#requests.background.ahead(this.makeRoomWithin(length, patience));
  }

  /** The same for who is in no hurry. @param patience milliseconds */
  makeRoomWithin(length: number, patience: number): Promise<void> {
    const until = this.#requests.clock.now() + patience;
    this.#writersWaiting++;
    const turn = this.#turn.then(() => this.#waitForRoom(length, until));
    this.#turn = turn.catch(() => {});
    return turn.finally(() => {
      this.#writersWaiting--;
    });
  }

  async #waitForRoom(length: number, until: number): Promise<void> {
    while (!this.#fits(length)) {
      if (this.#failure !== undefined) throw this.#failure;
      this.#seal();
      await this.#wait(this.#durable, until - this.#requests.clock.now());
    }
    if (this.#failure !== undefined) throw this.#failure;
  }

  #fits(length: number): boolean {
    return this.#dirty === 0 || this.#dirty + length <= this.#options.dirtyLimit;
  }

  /** At most a segment's worth. @returns where it is in which segment */
  append(block: number, data: DataOut | Uint8Array): { slot: number; offset: number } {
    if (!this.#open.fits(data.length)) this.#seal();
    if (this.#open.empty) this.#openSince = this.#requests.clock.now();
    const before = this.#open.cost;
    const offset = this.#open.append(block, data);
    this.#dirty += this.#open.cost - before;
    return { slot: this.#open.slot, offset };
  }

  /** @returns the slot it is in */
  zero(block: number, blocks: number): number {
    // A list without data has an end too.
    if (this.#open.cost >= this.#options.segmentSize) this.#seal();
    for (let done = 0; done < blocks; ) {
      const count = Math.min(MAX_RECORD_BLOCKS, blocks - done);
      this.#note(RecordType.zero, block + done, count);
      done += count;
    }
    return this.#open.slot;
  }

  resize(blocks: number): void {
    this.#note(RecordType.resize, blocks);
  }

  /** @returns its slot */
  checkpoint(n: number): number {
    this.#note(RecordType.checkpoint, n);
    return this.#open.slot;
  }

  #note(type: Exclude<RecordType, 1>, block: number, blocks = 0): void {
    if (this.#open.empty) this.#openSince = this.#requests.clock.now();
    const before = this.#open.cost;
    this.#open.note(type, block, blocks);
    this.#dirty += this.#open.cost - before;
  }

  /**
   * Everything appended so far is in the bucket, and the disk was ours at some moment since the call.
   * @throws DiskError `fenced`, `unreachable`, `refused`, `closed`
   */
  async flush(): Promise<void> {
    const { patience } = this.#options;
    // What is still here proves it when it gets its slot. What was sent before the call may have arrived
    // before somebody else opened the disk: its success says nothing about now.
    const proof =
      this.#open.empty && this.#failure === undefined ? this.#look(patience) : undefined;
    await this.#requests.background.ahead(Promise.all([this.drain(patience), proof]));
  }

  /**
   * Everything appended so far is in the bucket.
   * @throws DiskError `fenced`, `unreachable`, `refused`, `closed`
   */
  drain(patience: number): Promise<void> {
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    if (this.#open.empty) {
      if (this.#durable === this.#open.slot) return Promise.resolve();
      return this.#wait(this.#open.slot - 1, patience);
    }
    const { slot } = this.#open;
    if (this.#underWay.size + this.#queue.length < FLUSH_UPLOADS) this.#seal();
    else this.#sealWanted = true;
    return this.#wait(slot, patience);
  }

  /** By requests that begin now, or, while others are under way, by the next ones, which all share. */
  #look(patience: number): Promise<void> {
    const look = (): Promise<void> => {
      this.#lookingNext = undefined;
      const running = this.#lookNow(patience).finally(() => {
        if (this.#looking === running) this.#looking = undefined;
      });
      this.#looking = running;
      return running;
    };
    if (this.#looking === undefined) return look();
    this.#lookingNext ??= this.#looking.then(look, look);
    return this.#lookingNext;
  }

  /**
   * A claim that is there already is in the slot that we have never sent anything to, or in one that is under
   * way, and then what waits for that one fails.
   * @throws DiskError `fenced`, `unreachable`, `closed`; ObjectStoreError
   */
  async #lookNow(patience: number): Promise<void> {
    const key = this.#key(this.#unsent);
    await this.#orEnd(
      this.#requests.retry(`get ${key}`, () => this.#assertNotTheirs(key), patience),
    );
  }

  get #unsent(): number {
    return this.#queue[0]?.slot ?? this.#open.slot;
  }

  #key(slot: number): string {
    return `${this.#options.prefix}/${segmentName(slot)}`;
  }

  /** @throws what it does; when we are fenced, for ever */
  async #orEnd(looking: Promise<unknown>): Promise<void> {
    try {
      await looking;
    } catch (error) {
      if (!(error instanceof DiskError && error.failure === 'fenced')) throw error;
      this.#fail(error);
    }
    if (this.#failure !== undefined) throw this.#failure;
  }

  /**
   * Settled when what is in memory may be acknowledged.
   * @throws DiskError `fenced`, `unreachable`, `closed`; ObjectStoreError
   */
  async renew(): Promise<void> {
    const { clock } = this.#requests;
    const until = clock.now() + this.#options.patience;
    for (;;) {
      if (this.#failure !== undefined) throw this.#failure;
      if (this.#released) throw new DiskError('closed', 'write: the disk is closed');
      if (this.lease.holds) return;
      const left = until - clock.now();
      // The bucket may answer, and each time too late.
      if (left <= 0) throw unreachable('write', undefined);
      this.#renewing ??= this.verify(left).finally(() => {
        this.#renewing = undefined;
      });
      await this.#renewing;
    }
  }

  /**
   * That nobody had opened the disk when it began, or a little later.
   * @throws DiskError `fenced`, `unreachable`, `closed`; ObjectStoreError
   */
  verify(patience = this.#options.patience): Promise<void> {
    return this.#lookEverywhere((key) =>
      this.#requests.retry(`get ${key}`, () => this.#assertNotTheirs(key), patience),
    );
  }

  async #lookEverywhere(look: (key: string) => Promise<void>): Promise<void> {
    const moment = this.lease.moment();
    const slots: number[] = [];
    for (let slot = this.#durable; slot <= this.#unsent; slot++) {
      if (!this.#done.has(slot)) slots.push(slot);
    }
    await this.#orEnd(Promise.all(slots.map((slot) => look(this.#key(slot)))));
    this.lease.proved(moment);
  }

  /** That a slot is empty, or ours. @throws DiskError `fenced`; ObjectStoreError */
  async #assertNotTheirs(key: string): Promise<void> {
    const { counters, objects, signal } = this.#requests;
    counters.gets++;
    const range = { start: 0, end: HEADER_BYTES };
    let start: Buffer;
    try {
      start = (await objects.get(key, { range, signal })).body;
    } catch (error) {
      if (failureKind(error) === 'not-found') return;
      throw error;
    }
    const { header } = decodeHead(key, start);
    if (header.writer !== this.#options.writer) {
      throw fenced(key, header.epoch, this.#options.epoch);
    }
  }

  /** Sends on its way what is in the open segment, without waiting, if the first of it came by `since`. */
  writeBack(since: number): void {
    if (this.#failure === undefined && this.#openSince <= since) this.#seal();
  }

  #wait(slot: number, patience: number): Promise<void> {
    if (this.#refusal !== undefined && patience !== Number.POSITIVE_INFINITY) {
      return Promise.reject(refused(this.#refusal));
    }
    return new Promise((resolve, reject) => {
      const since = this.#requests.clock.now();
      this.#waiters.push({ slot, since, patience, resolve, reject });
      void this.#watch();
    });
  }

  /** Tells waiters whose patience is over. */
  async #watch(): Promise<void> {
    if (this.#watching) return;
    this.#watching = true;
    const { clock, signal } = this.#requests;
    while (this.#waiters.length > 0 && !signal.aborted) {
      await clock.sleep(Math.max(10, Math.min(1000, this.#options.patience / 4)), signal);
      const now = clock.now();
      this.#reject(
        (waiter) => now - waiter.since >= waiter.patience,
        () => unreachable('flush', undefined),
      );
    }
    this.#watching = false;
    if (signal.aborted) {
      this.#reject(
        () => true,
        () => new DiskError('closed', 'flush: the disk was closed before it was durable'),
      );
    }
  }

  #reject(which: (waiter: Waiter) => boolean, error: () => Error): void {
    const leaving = this.#waiters.filter(which);
    if (leaving.length === 0) return;
    this.#waiters = this.#waiters.filter((waiter) => !which(waiter));
    for (const waiter of leaving) waiter.reject(error());
  }

  #seal(): void {
    const open = this.#open;
    this.#sealWanted = false;
    if (open.empty) return;
    const { blockSize, chunkSize, segmentSize } = this.#options;
    const small = open.used <= segmentSize / SMALL_SHARE;
    const cost = open.cost;
    const placed = open.arrange(chunkSize / blockSize, () =>
      small ? Buffer.allocUnsafeSlow(open.used) : this.#buffers.take(),
    );
    // Records may have been split, or come together.
    this.#dirty += open.cost - cost;
    const whole = open.payload();
    const isMoved = placed.length > 0;
    const payload = small && !isMoved ? copyOf(whole) : whole;
    if (payload.buffer === this.#staging.buffer) this.#staging = this.#buffers.take();
    this.#payloads.set(open.slot, payload);
    if (isMoved) this.#events.arranged(open.slot, placed);
    const records = open.encodeRecords();
    this.#queue.push({ slot: open.slot, payload, records, facts: undefined, sent: undefined });
    this.#open = new OpenSegment(open.slot + 1, blockSize, this.#staging);
    this.#pump();
  }

  #pump(): void {
    while (this.#failure === undefined) {
      const next = this.#queue[0];
      if (next === undefined || this.#underWay.size >= this.#options.uploads) return;
      if (next.slot >= this.#durable + WINDOW) return;
      this.#queue.shift();
      this.#underWay.set(next.slot, next);
      void this.#upload(next);
    }
  }

  async #upload(sealed: Sealed): Promise<void> {
    try {
      await this.#send(sealed);
    } catch (error) {
      this.#fail(
        error instanceof DiskError
          ? error
          : new DiskError('refused', `the log can't be written: ${(error as Error).message}`, {
              cause: error,
            }),
      );
      return;
    }
    if (this.#failure !== undefined) return;
    this.#underWay.delete(sealed.slot);
    this.#done.set(sealed.slot, sealed);
    this.#advance();
    if (this.#sealWanted && this.#underWay.size + this.#queue.length < FLUSH_UPLOADS) this.#seal();
    this.#pump();
  }

  #advance(): void {
    const before = this.#durable;
    for (;;) {
      const sealed = this.#done.get(this.#durable);
      if (sealed === undefined) break;
      this.#done.delete(this.#durable);
      this.#durable++;
      this.#dirty -= sealed.payload.length + sealed.records.length;
      this.lease.proved(sealed.sent as Moment);
      this.#keep(sealed);
      this.#events.durable(sealed.facts as SegmentFacts);
    }
    if (this.#durable === before) return;
    const answered = this.#waiters.filter((waiter) => waiter.slot < this.#durable);
    if (answered.length === 0) return;
    this.#waiters = this.#waiters.filter((waiter) => waiter.slot >= this.#durable);
    for (const waiter of answered) waiter.resolve();
  }

  /** Uploaded segments stay for readers, the newest ones, up to the limit. */
  #keep({ slot, payload }: Sealed): void {
    this.#residentBytes += payload.buffer.byteLength;
    this.#resident.push(slot);
    this.#makeWay();
  }

  /** Down to the limit; forgetting what is held would free nothing. */
  #makeWay(): void {
    while (this.#usedBytes > this.#options.residentLimit) {
      const oldest = this.#resident.findIndex((slot) => slot >= this.#heldBefore);
      if (oldest < 0) return;
      this.#forget(this.#resident.splice(oldest, 1)[0] as number);
    }
  }

  #forget(slot: number): void {
    const payload = this.#payloads.get(slot) as Buffer;
    this.#payloads.delete(slot);
    this.#residentBytes -= payload.buffer.byteLength;
    const whole = Buffer.from(payload.buffer);
    if (slot >= this.#heldBefore) return this.#giveBack(whole);
    this.#held.push(whole);
    this.#heldBytes += whole.length;
  }

  /** What is kept for use again is no more than could be in use. */
  #giveBack(buffer: Buffer): void {
    const { dirtyLimit, residentLimit } = this.#options;
    const bytes = this.#dirty + this.#buffers.freeBytes + this.#usedBytes;
    if (bytes < dirtyLimit + residentLimit) this.#buffers.give(buffer);
  }

  /** Lets go of memory that only what is not done now would need: for whoever has been quiet for a while. */
  tidy(): void {
    this.#buffers.trim(this.#options.dirtyLimit - this.#dirty);
  }

  /** Memory for so many bytes of a segment, of what is for those in the bucket: the oldest resident ones make way. */
  lend(length: number): Buffer {
    const { segmentSize } = this.#options;
    const whole = length <= segmentSize && length > segmentSize / 2;
    this.#lentBytes += whole ? segmentSize : length;
    this.#makeWay();
    return whole ? this.#buffers.take().subarray(0, length) : Buffer.allocUnsafeSlow(length);
  }

  /** What was lent, and nobody will touch any more. */
  takeBack({ buffer }: Buffer): void {
    this.#lentBytes -= buffer.byteLength;
    this.#giveBack(Buffer.from(buffer));
  }

  /** While `run` is under way, what `payload` answered of segments before `slot`, all of them durable, stays as it is. */
  async holding<T>(slot: number, run: () => Promise<T>): Promise<T> {
    this.#holders++;
    this.#heldBefore = Math.max(this.#heldBefore, slot);
    try {
      return await run();
    } finally {
      if (--this.#holders === 0) {
        this.#heldBefore = 0;
        this.#heldBytes = 0;
        for (const buffer of this.#held.splice(0)) this.#giveBack(buffer);
        this.#makeWay();
      }
    }
  }

  /** Segments before `slot` are needed no more. */
  forgetBefore(slot: number): void {
    while (this.#resident.length > 0 && (this.#resident[0] as number) < slot) {
      this.#forget(this.#resident.shift() as number);
    }
  }

  async #send(sealed: Sealed): Promise<void> {
    const { epoch, writer, frameSize, prefix } = this.#options;
    const identity = {
      kind: BlobKind.segment,
      number: sealed.slot,
      // What this proves to be there, should it ever be missing.
      n: this.#durable,
      epoch,
      writer,
    };
    const frames = [sealed.records, ...framesOf(sealed.payload, frameSize)];
    const blob = await this.#codec.encode(identity, frames, sealed.slot + 1);
    sealed.facts = { header: blob.header, table: blob.table };
    const key = `${prefix}/${segmentName(sealed.slot)}`;
    const body = blob.parts;
    const requests = this.#requests;
    sealed.sent = this.lease.moment();
    for (let attempt = 0; ; attempt++) {
      if (this.#failure !== undefined) throw this.#failure;
      try {
        if (!this.#options.conditional && (await this.#isMine(key, blob))) return;
        await requests.put(key, body, { ifNoneMatch: '*', crc32: blob.crc });
        this.#answered();
        return;
      } catch (error) {
        if (requests.signal.aborted) {
          throw new DiskError('closed', `put ${key}: the disk was closed`, { cause: error });
        }
        if (failureKind(error) === 'precondition') {
          const mine = await requests.retry(
            `get ${key}`,
            () => this.#isMine(key, blob),
            Number.POSITIVE_INFINITY,
          );
          if (mine) return this.#answered();
          // It went away between the two: nobody deletes what is not durable yet. Try again.
        } else if (isRefusal(error)) {
          this.#refused(error);
        } else if (!isTransient(error)) {
          throw error;
        }
        requests.failed(error);
        await requests.clock.sleep(requests.backoff(attempt), requests.signal);
      }
    }
  }

  /**
   * Whether the slot holds what we are about to write; false when it is empty.
   * @throws DiskError `fenced` when somebody else's is in it
   */
  async #isMine(key: string, blob: EncodedBlob): Promise<boolean> {
    this.#requests.counters.gets++;
    let start: Buffer;
    try {
      start = (
        await this.#requests.objects.get(key, {
          range: { start: 0, end: HEADER_BYTES },
          signal: this.#requests.signal,
        })
      ).body;
    } catch (error) {
      if (failureKind(error) === 'not-found') return false;
      throw error;
    }
    const { header } = decodeHead(key, start);
    if (header.crc === blob.header.crc && header.writer === blob.header.writer) return true;
    throw fenced(key, header.epoch, this.#options.epoch);
  }

  /** Looks whether somebody has taken over: while nothing is sent, which would tell, or the lease ages. */
  async probe(): Promise<void> {
    const isBusy = this.#underWay.size > 0 || this.#queue.length > 0;
    if (this.#failure !== undefined || (isBusy && !this.lease.ages)) return;
    try {
      await this.#lookEverywhere((key) => this.#assertNotTheirs(key));
    } catch (error) {
      if (error !== this.#failure) this.#requests.log('info', (error as Error).message);
    }
  }

  /**
   * The last thing: tells who opens the disk next that nothing will be acknowledged any more. Otherwise they wait.
   */
  async release(patience: number): Promise<void> {
    this.#released = true;
    if (this.lease.length === 0 || this.#failure !== undefined) return;
    this.#note(RecordType.release, 0);
    try {
      await this.drain(patience);
    } catch (error) {
      if (this.#failure !== undefined) return;
      this.#requests.log(
        'warning',
        `${(error as Error).message}: whoever opens the disk next waits for our lease, ${this.lease.length / 1000} s`,
      );
    }
  }

  #answered(): void {
    this.#requests.succeeded();
    if (this.#refusal === undefined) return;
    this.#refusal = undefined;
    this.#requests.log('info', `${this.#requests.objects.description} takes our writes again`);
  }

  #refused(error: unknown): void {
    if (this.#refusal === undefined) {
      this.#requests.log('error', `${(error as Error).message}; nothing can be made durable`);
    }
    this.#refusal = error;
    this.#reject(
      (waiter) => waiter.patience !== Number.POSITIVE_INFINITY,
      () => refused(error),
    );
  }

  #fail(error: DiskError): void {
    if (this.#failure !== undefined) return;
    this.#failure = error;
    this.#queue.length = 0;
    this.#reject(
      () => true,
      () => error,
    );
    this.#events.failed(error);
  }
}

function fenced(key: string, theirs: number, ours: number): DiskError {
  return new DiskError(
    'fenced',
    `${key}: another writer ${theirs === FENCE_EPOCH ? 'is taking over' : `has opened the disk (epoch ${theirs}, ours is ${ours})`}; this one is finished. Its writes since the last flush are not in the disk`,
    { operation: 'write', path: key },
  );
}

function refused(cause: unknown): DiskError {
  return new DiskError(
    'refused',
    `the bucket refuses writes: ${(cause as Error).message}; what is not durable is kept and sent when it takes it`,
    { cause },
  );
}

/** In memory of its own, so that what keeps a few bytes alive is a few bytes. */
function copyOf(bytes: Buffer): Buffer {
  const copy = Buffer.allocUnsafeSlow(bytes.length);
  bytes.copy(copy);
  return copy;
}
