// SPDX-License-Identifier: Apache-2.0
/**
 * A disk in a bucket.
 *
 * What it promises:
 * - A settled `flush`, a settled write with `fua`, and with `writeCache: false` every settled change, is in
 *   the bucket (with a journal: on this host's disk). After a crash the disk is what a prefix of the
 *   acknowledged changes made of it, everything flushed included.
 * - From the moment another writer has opened the disk, no change and no flush of this one succeeds, not even a
 *   flush that has nothing to send, and none of its later bytes is ever seen. What goes into the write cache, or a
 *   journal, is acknowledged under a lease (`engine/lease`), and opening waits until that of the writer before is over,
 *   unless that was closed, or is dead for certain.
 * - What is read has been verified; damage is an error that names the object.
 * - While the bucket doesn't answer, what is in memory is served, writes are taken up to the dirty limit,
 *   and whoever waits longer than `patienceMs` is told NOT READY; nothing is acknowledged that isn't so.
 *
 * Layers: `engine/log-writer` appends and uploads, `engine/disk-image` reads, `engine/checkpoint` moves the
 * log into chunks, `engine/garbage` deletes what is not needed, `engine/opening` finds all that after a
 * crash and keeps rivals out.
 */
import { randomBytes } from 'node:crypto';
import {
  ArgumentError,
  type BlockExtent,
  type BlockStore,
  type DataIn,
  type DataOut,
  type MaybePromise,
  type WriteContext,
} from 'tcmu';
import { SenseError, SenseKey, sense } from 'tcmu/scsi';
import { MemoryDataIn } from 'tcmu/store';
import { BlobCodec } from './engine/blob.js';
import { Checkpointer } from './engine/checkpoint.js';
import type { Manifest } from './engine/chunk-map.js';
import type { DiskImage } from './engine/disk-image.js';
import { DiskError, damaged, Gone } from './engine/errors.js';
import { FileCache } from './engine/file-cache.js';
import { FrameCache } from './engine/frame-cache.js';
import { collectSuperseded, type SweepResult, sweep } from './engine/garbage.js';
import { Journal } from './engine/journal.js';
import { waitFor } from './engine/lease.js';
import { CHUNK_COST, RUN_COST } from './engine/log-index.js';
import { LogWriter } from './engine/log-writer.js';
import { homeOf, pinName } from './engine/names.js';
import {
  claim,
  type DiskState,
  listManifests,
  loadPinned,
  loadState,
  type OpeningParts,
  probeFencing,
} from './engine/opening.js';
import { Pace } from './engine/pace.js';
import {
  type DiskRecord,
  type KeySource,
  loadDisk,
  loadKeyring,
  loadPin,
  type Pin,
  savePin,
} from './engine/records.js';
import {
  type Clock,
  isRefusal,
  type Log,
  type RequestCounters,
  Requests,
  systemClock,
} from './engine/requests.js';
import type { SegmentFacts } from './engine/segment-facts.js';
import { pinNow, pinOf } from './engine/snapshots.js';
import { failureKind, type ObjectStore } from './object-store.js';

const MiB = 1024 * 1024;
/** For how long a closed disk tries to say that it is closed. */
const RELEASE_PATIENCE_MS = 5000;
/** A segment has about this part of what the log's index may take, when it is all discards. */
const INDEX_PIECES = 8;

export interface OpenOptions {
  /**
   * `write` (default): as the one writer; any other is fenced off. `follow`: read-only, a consistent
   * state that follows the writer's.
   */
  mode?: 'write' | 'follow' | undefined;
  /** Read-only, as of this snapshot. */
  snapshot?: string | undefined;
  /** Of an encrypted disk. */
  key?: KeySource | undefined;
  /**
   * `required` (default): refuse a store that ignores conditional writes. `none`: take it; you make sure
   * that there is only one writer.
   */
  fencing?: 'required' | 'none' | undefined;
  /** Acknowledge writes when they are in memory (default), or when they are durable (false). */
  writeCache?: boolean | undefined;
  /** Bytes of data in a log segment. Default 4 MiB. */
  segmentSize?: number | undefined;
  /** Bytes acknowledged and not durable, at most. Default 64 MiB. */
  dirtyLimit?: number | undefined;
  /** Bytes of memory for what was read and what was written lately. Default 64 MiB. */
  cacheSize?: number | undefined;
  /** Bytes of memory for the chunk map. Default 32 MiB. */
  mapSize?: number | undefined;
  /** Bytes of log from which on it is moved into chunks. Default 512 MiB. */
  logLimit?: number | undefined;
  /** Segments of log from which on it is moved. Default 4096. */
  segmentLimit?: number | undefined;
  /**
   * Bytes of memory of the log's index (130 a chunk that is in the log, also as discarded, and 32 a run of blocks) from
   * which on the log is moved; at twice that, changes wait. Default 32 MiB.
   */
  indexLimit?: number | undefined;
  /** Uploads of segments at a time, 1 to 16. Default 8. */
  uploads?: number | undefined;
  /** Milliseconds after which, twice that at most, what is written goes to the bucket without a flush. Default 2000. */
  writeBackMs?: number | undefined;
  /** Milliseconds between looks for another writer (or, following, for news). Default 2000; 0: never. */
  watchMs?: number | undefined;
  /**
   * Milliseconds for which what is only in memory (or in a journal) is acknowledged without knowing from the
   * bucket that the disk is still ours; then a change waits for that. Whoever opens the disk after us waits
   * so long, if we were not closed. Default 10000, 60000 at most. 0: such a change may be
   * acknowledged, and lost, after somebody else has opened the disk, for about `watchMs`.
   */
  leaseMs?: number | undefined;
  /** You know that whoever wrote before is dead: don't wait for its lease. */
  assumeDead?: boolean | undefined;
  /** Milliseconds a request may wait for the bucket, below the initiator's time-out. Default 25000. */
  patienceMs?: number | undefined;
  /** Default true. */
  readAhead?: boolean | undefined;
  /** A local file that keeps what was read, also over restarts. */
  cacheFile?: string | undefined;
  /** Bytes. Default 1 GiB. */
  cacheFileSize?: number | undefined;
  /**
   * A local file that makes a flush durable **on this host only**, until it is in the bucket, and in which
   * every change is before it is acknowledged, so that a killed process loses none. If the host's disk
   * is lost, so is what was flushed lately; another host must not open the disk before this one
   * has been opened again, or it is lost too.
   */
  journal?: string | undefined;
  /**
   * A local file in which every change is before it is acknowledged, so that a killed process loses none, while
   * a flush is in the bucket as ever: for initiators that outlive the process. It may be lost with the host.
   * Nothing is written there without a write cache. Not together with `journal`, which does the same and more.
   */
  restartFile?: string | undefined;
  /** Throw away what a journal or restart file holds and can't be applied any more. */
  discardJournal?: boolean | undefined;
  onLog?: Log | undefined;
  /** Chunks after which a checkpoint writes a manifest of those that are done. Default 1024. For tests. */
  manifestChunks?: number | undefined;
  /** For tests. */
  clock?: Clock | undefined;
  /** 16 hexadecimal digits that no other writer has. For tests. */
  writer?: string | undefined;
}

/** Counters since the disk was opened, and sizes now. */
export interface DiskStatistics extends RequestCounters {
  reads: number;
  writes: number;
  flushes: number;
  bytesUserRead: number;
  bytesUserWritten: number;
  cacheHits: number;
  cacheMisses: number;
  cacheFileHits: number;
  /** Bytes of memory. */
  cacheBytes: number;
  mapBytes: number;
  logBytesInMemory: number;
  /** Bytes of memory of the checkpoint under way, and of what is kept of the last one for the next. */
  checkpointBytes: number;
  logRuns: number;
  /** Bytes of memory of the log's index. */
  indexBytes: number;
  /** Bytes acknowledged and not in the bucket. */
  dirtyBytes: number;
  /** Bytes and segments of log in the bucket. */
  logBytes: number;
  logSegments: number;
  checkpoints: number;
  chunksWritten: number;
  bytesRelocated: number;
  objectsCollected: number;
  /** Milliseconds for which the bucket has not answered; 0: it does. */
  outageMs: number;
}

export class S3Disk implements BlockStore {
  readonly blockSize: number;
  readonly physicalBlockSize = 4096;
  readonly readOnly: boolean;
  readonly writeCache: boolean;
  readonly supportsFua = true;
  readonly optimalTransferLength = MiB;
  readonly unmapGranularity: number;
  readonly record: DiskRecord;
  /** Of all its objects but its record. */
  readonly prefix: string;
  readonly snapshotName: string | undefined;
  readonly #requests: Requests;
  readonly #codec: BlobCodec;
  readonly #parts: OpeningParts;
  readonly #cache: FrameCache;
  readonly #fileCache: FileCache | undefined;
  readonly #options: OpenOptions;
  readonly #segmentSize: number;
  #state: DiskState;
  #log: LogWriter | undefined;
  #journal: Journal | undefined;
  #checkpointer: Checkpointer | undefined;
  #checkpointing: Promise<unknown> | undefined;
  /** Checkpoints, snapshots and sweeps, one after the other. */
  #serial: Promise<unknown> = Promise.resolve();
  #reloading: Promise<void> | undefined;
  /** Checkpoints that somebody waits for. */
  #wanted = 0;
  /** Snapshots and sweeps that wait for a checkpoint's next manifest. */
  #behind = 0;
  #logBytes = 0;
  readonly #pace: Pace;
  /** What COMPARE AND WRITE is reading: bytes `[start, end)`, and whether they were changed meanwhile. */
  readonly #compared = new Set<{ start: number; end: number; isChanged: boolean }>();
  /** Bytes of the index when a segment was last sealed for its sake. */
  #indexSealed = 0;
  #closed = false;
  #counts = {
    reads: 0,
    writes: 0,
    flushes: 0,
    bytesUserRead: 0,
    bytesUserWritten: 0,
    checkpoints: 0,
    chunksWritten: 0,
    bytesRelocated: 0,
    objectsCollected: 0,
  };

  private constructor(
    parts: OpeningParts,
    state: DiskState,
    options: OpenOptions,
    readOnly: boolean,
  ) {
    this.#parts = parts;
    this.#state = state;
    this.#options = options;
    this.#requests = parts.requests;
    this.#codec = parts.codec;
    this.#cache = parts.cache;
    this.#fileCache = parts.fileCache;
    this.record = parts.disk;
    this.prefix = parts.prefix;
    this.blockSize = parts.disk.blockSize;
    this.unmapGranularity = this.blockSize;
    this.readOnly = readOnly;
    this.writeCache = !readOnly && (options.writeCache ?? true);
    this.snapshotName = options.snapshot;
    this.#segmentSize = options.segmentSize ?? 4 * MiB;
    this.#pace = new Pace(
      parts.requests.clock,
      () => ({
        bytes: (this.#logBytes + (this.#log?.dirty ?? 0)) / this.#logLimit,
        segments: this.#image.segments.size / this.#segmentLimit,
        index: this.#image.index.bytes / this.#indexLimit,
      }),
      () => this.#checkpointing !== undefined && !this.#closed && this.failure === undefined,
    );
  }

  /**
   * Opens a disk. As the writer it is replayed, and any other writer is fenced off, before this settles.
   * @throws DiskError `not-a-disk`, `format`, `key`, `no-fencing`, `damaged`, `unreachable`, `journal`, `in-use`;
   *   ObjectStoreError when the bucket refuses; ArgumentError
   */
  static async open(
    objects: ObjectStore,
    place: string,
    options: OpenOptions = {},
  ): Promise<S3Disk> {
    const { clock = systemClock, onLog = () => {}, patienceMs = 25_000 } = options;
    const requests = new Requests(objects, clock, onLog, patienceMs);
    const disk = await loadDisk(requests, place);
    const prefix = homeOf(place, disk.id);
    checkOptions(options, disk);
    const keyring = await loadKeyring(requests, prefix, disk, options.key);
    const codec = new BlobCodec(disk.id, disk.compression, keyring);
    const cacheSize = options.cacheSize ?? 64 * MiB;
    const readOnly = options.mode === 'follow' || options.snapshot !== undefined;
    let self: S3Disk | undefined;
    const fileCache =
      options.cacheFile === undefined
        ? undefined
        : FileCache.open(options.cacheFile, disk.frameSize, options.cacheFileSize ?? 1024 * MiB);
    const parts: OpeningParts = {
      requests,
      codec,
      prefix,
      disk,
      // Of what was written lately as much is kept as is there, up to half; the rest is for what was read.
      cache: new FrameCache(
        cacheSize,
        disk.frameSize,
        () => (self === undefined ? 0 : self.#otherMemory),
        () => {
          if (self !== undefined) self.#tidy();
        },
      ),
      fileCache,
      payload: (slot) => (self === undefined ? undefined : self.#log?.payload(slot)),
      readAhead: options.readAhead ?? true,
      mapLimit: options.mapSize ?? 32 * MiB,
    };
    try {
      if (options.snapshot !== undefined) {
        const pin = await loadPin(requests, prefix, options.snapshot);
        self = new S3Disk(parts, await loadPinned(parts, pin), options, true);
      } else if (readOnly) {
        self = new S3Disk(parts, await loadState(parts), options, true);
        void self.#watch();
      } else {
        self = await S3Disk.#openForWriting(parts, options, (disk) => {
          self = disk;
        });
      }
      return self;
    } catch (error) {
      requests.close();
      await fileCache?.close();
      throw error instanceof Gone ? damaged(error.key, 'it is missing') : error;
    }
  }

  static async #openForWriting(
    parts: OpeningParts,
    options: OpenOptions,
    known: (disk: S3Disk) => void,
  ): Promise<S3Disk> {
    const { requests, prefix } = parts;
    const writer = options.writer ?? randomBytes(8).toString('hex');
    const conditional = options.fencing !== 'none';
    if (conditional)
      await probeFencing(requests, prefix, `${writer}-${randomBytes(4).toString('hex')}`);
    else requests.log('warning', `fencing is off: make sure that nobody else writes ${prefix}`);
    const path = options.journal ?? options.restartFile;
    const limit = options.dirtyLimit ?? 64 * MiB;
    const journal =
      path === undefined
        ? undefined
        : Journal.open(path, parts.disk, parts.codec, limit, requests.log);
    if (journal?.holds) {
      if (options.discardJournal !== true) {
        const state = await loadState(parts).catch((error: unknown) => {
          const isBusy = error instanceof DiskError && error.failure === 'in-use';
          throw isBusy ? journal.refuse(error) : error;
        });
        journal.check(state);
      }
    }
    journal?.bequeath(writer);
    // What has to be durable asks the bucket by itself.
    const isCached = (options.writeCache ?? true) && conditional;
    const length = isCached ? (options.leaseMs ?? 10_000) : 0;
    const isOver = (who: string): boolean =>
      options.assumeDead === true || (journal?.isGone(who) ?? false);
    const state = await claim(parts, writer, { length, isOver }, conditional);
    const claimed = requests.clock.now();
    const [newest] = await listManifests(requests, prefix);
    const self = new S3Disk(parts, state, options, false);
    known(self);
    self.#begin(state, writer, conditional, length, newest?.n ?? 0);
    await self.#waitForPredecessor(claimed);
    if (journal !== undefined) await self.#replay(journal, state);
    if (journal !== undefined && (options.journal !== undefined || self.writeCache)) {
      self.#journal = journal;
    } else await journal?.close(true);
    // Whoever has come after us meanwhile ends this now.
    await self.#log?.renew();
    void self.#watch();
    return self;
  }

  /** Until it acknowledges nothing any more. Before a journal says that we were there: it tells that this is done. */
  async #waitForPredecessor(claimed: number): Promise<void> {
    const { clock, log, signal } = this.#requests;
    const wait = claimed + waitFor(this.#state.predecessor.lease) - clock.now();
    if (wait <= 0) return;
    log(
      'info',
      `whoever wrote ${this.prefix} last was not closed: it may take itself for the writer for ${(wait / 1000).toFixed(1)} s more, which is waited for (--assume-dead, if you know better)`,
    );
    await clock.sleep(wait, signal);
  }

  #begin(
    state: DiskState,
    writer: string,
    conditional: boolean,
    lease: number,
    newest: number,
  ): void {
    const { codec, disk, prefix } = this.#parts;
    const options = this.#options;
    const { image, epoch, claims } = state;
    const segmentSize = this.#segmentSize;
    const log = new LogWriter(
      this.#requests,
      codec,
      state.slot,
      {
        prefix,
        epoch,
        writer,
        blockSize: disk.blockSize,
        chunkSize: disk.chunkSize,
        frameSize: disk.frameSize,
        segmentSize,
        dirtyLimit: options.dirtyLimit ?? 64 * MiB,
        residentLimit: (options.cacheSize ?? 64 * MiB) / 2,
        uploads: options.uploads ?? 8,
        patience: this.#patience,
        conditional,
        lease,
      },
      {
        arranged: (slot, placed) => image.index.moved(slot, placed),
        durable: (facts) => this.#durable(facts),
        failed: (error) => {
          this.#requests.log('error', error.message);
          this.#pace.look();
        },
      },
    );
    this.#log = log;
    this.#measureLog();
    this.#checkpointer = new Checkpointer(
      {
        requests: this.#requests,
        codec,
        prefix,
        image,
        log,
        pace: this.#pace,
        epoch,
        writer,
        claims,
        lease: state.lease,
        logLimit: this.#logLimit,
        segmentLimit: this.#segmentLimit,
        indexLimit: this.#indexLimit,
        segmentSize,
        manifestChunks: options.manifestChunks ?? 1024,
        isAwaited: () => this.#isManifestAwaited,
        loadLimit: Math.max(16 * MiB, Math.min(64 * MiB, (options.cacheSize ?? 64 * MiB) / 4)),
      },
      newest,
    );
    this.#requests.background.owed = () => this.#owed;
  }

  get #logLimit(): number {
    return this.#options.logLimit ?? 512 * MiB;
  }

  get #segmentLimit(): number {
    return this.#options.segmentLimit ?? 4096;
  }

  get #indexLimit(): number {
    return this.#options.indexLimit ?? 32 * MiB;
  }

  /** Bytes that are the cache's, and in other use. */
  get #otherMemory(): number {
    const written = this.#log?.residentBytes ?? 0;
    return written + this.#checkpointBytes + this.#image.answerBytes;
  }

  get #checkpointBytes(): number {
    return (this.#log?.lentBytes ?? 0) + (this.#checkpointer?.bytes ?? 0);
  }

  /** What is only kept for use again, of the cache's memory. */
  #tidy(): void {
    this.#log?.tidy();
    this.#checkpointer?.tidy();
  }

  get #image(): DiskImage {
    return this.#state.image;
  }

  get size(): number {
    return this.#image.size;
  }

  /** The manifest that counts. */
  get manifest(): Manifest {
    return this.#state.manifest;
  }

  get epoch(): number {
    return this.#state.epoch;
  }

  /** Why nothing can be written any more; undefined while all is well. */
  get failure(): DiskError | undefined {
    return this.#log?.failure;
  }

  /** Every so often: what is written goes out, a rival or news are noticed. */
  async #watch(): Promise<void> {
    const { watchMs = 2000, writeBackMs = 2000 } = this.#options;
    const { clock, signal } = this.#requests;
    const lease = this.#log?.lease.length || Number.POSITIVE_INFINITY;
    const pause = watchMs === 0 ? Number.POSITIVE_INFINITY : Math.min(watchMs, lease / 3);
    const pace = Math.min(pause, writeBackMs);
    let looked = clock.now();
    let looking: Promise<void> | undefined;
    while (!signal.aborted) {
      await clock.sleep(pace, signal);
      if (signal.aborted) return;
      const now = clock.now();
      this.#log?.writeBack(now - writeBackMs);
      if (now - looked < pause || looking !== undefined) continue;
      looked = now;
      // Not waited for: an answer that doesn't come holds nothing up.
      looking = this.#lookAround().finally(() => {
        looking = undefined;
      });
      if (this.#checkpointing === undefined) this.#tidy();
    }
  }

  async #lookAround(): Promise<void> {
    try {
      if (this.#log !== undefined) await this.#log.probe();
      else await this.refresh();
    } catch (error) {
      if (!this.#requests.signal.aborted) this.#requests.log('warning', (error as Error).message);
    }
  }

  #durable(facts: SegmentFacts): void {
    this.#image.segments.set(facts.header.number, facts);
    this.#logBytes += facts.header.length;
    this.#cache.trim();
    this.#journal?.durable(facts.header.number);
    this.#state.slot = facts.header.next;
    if (!this.#logFull || this.#checkpointing !== undefined) return;
    this.#checkpointing = this.#maintain().finally(() => {
      this.#checkpointing = undefined;
      this.#pace.look();
    });
  }

  /** Whether a checkpoint is wanted, of what is in the bucket. */
  get #logFull(): boolean {
    return (
      this.#logBytes > this.#logLimit ||
      this.#image.segments.size > this.#segmentLimit ||
      this.#image.index.bytes > this.#indexLimit
    );
  }

  /** How much of what the log may be too long it is: from 0 to 1, where writes wait. */
  get #owed(): number {
    return this.#wanted > 0 || this.#isManifestAwaited ? 1 : this.#pace.owed;
  }

  get #isManifestAwaited(): boolean {
    return this.#closed || this.#behind > 0;
  }

  #measureLog(): void {
    this.#logBytes = 0;
    for (const { header } of this.#image.segments.values()) this.#logBytes += header.length;
  }

  /** Until the log is short enough; a failure is told, and met again at the next segment. */
  async #maintain(): Promise<void> {
    try {
      while ((this.#logFull || this.#checkpointer?.isUnderWay) && !this.#closed) {
        if (!(await this.#runCheckpoint(false))) return;
      }
    } catch (error) {
      if (this.#closed || this.failure !== undefined) return;
      this.#requests.log('warning', `checkpoint: ${(error as Error).message}; tried again later`);
      await this.#requests.clock.sleep(1000, this.#requests.signal);
    }
  }

  #inTurn<T>(run: () => Promise<T>): Promise<T> {
    const turn = this.#serial.then(run, run);
    this.#serial = turn.catch(() => {});
    return turn;
  }

  /** A checkpoint under way makes way after what it has done. */
  #inNextTurn<T>(run: () => Promise<T>): Promise<T> {
    this.#behind++;
    return this.#inTurn(() => {
      this.#behind--;
      return run();
    });
  }

  #runCheckpoint(all: boolean): Promise<boolean> {
    return this.#inTurn(async () => {
      const result = await this.#checkpointer?.run(all);
      if (result === undefined) return false;
      if (result.isDone) {
        this.#measureLog();
        this.#pace.free();
        this.#counts.checkpoints++;
      }
      this.#indexSealed = Math.min(this.#indexSealed, this.#image.index.bytes);
      this.#counts.chunksWritten += result.chunksWritten;
      this.#counts.bytesRelocated += result.bytesRelocated;
      if (result.superseded !== undefined) {
        this.#counts.objectsCollected += await collectSuperseded(
          this.#requests,
          this.prefix,
          result.superseded,
        );
      }
      return true;
    }).finally(() => {
      if (this.#checkpointer?.isUnderWay !== true) this.#pace.end();
    });
  }

  #writable(operation: string): LogWriter {
    if (this.#closed) throw new DiskError('closed', `${operation}: the disk is closed`);
    if (this.#log === undefined) {
      throw new DiskError('read-only', `${operation}: the disk is open read-only`);
    }
    this.#log.check();
    return this.#log;
  }

  read(position: number, data: DataIn): MaybePromise<void> {
    this.#counts.reads++;
    this.#counts.bytesUserRead += data.length;
    try {
      const answer = this.#image.read(position, data);
      if (answer === undefined) return;
      return answer.catch((error: unknown) => this.#readAgain(position, data, error));
    } catch (error) {
      throw translate(error, 'read');
    }
  }

  /** A follower's map may name what the writer has collected: it is brought up to date. */
  async #readAgain(position: number, data: DataIn, first: unknown): Promise<void> {
    let error = first;
    for (let attempt = 0; error instanceof Gone && attempt < 3; attempt++) {
      if (this.#log !== undefined || this.snapshotName !== undefined) break;
      try {
        await this.#reload();
        await this.#image.read(position, data);
        return;
      } catch (again) {
        error = again;
      }
    }
    throw translate(error instanceof Gone ? damaged(error.key, 'it is missing') : error, 'read');
  }

  write(position: number, data: DataOut, context: WriteContext): MaybePromise<void> {
    this.#counts.writes++;
    this.#counts.bytesUserWritten += data.length;
    try {
      const log = this.#writable('write');
      if (data.isZero()) {
        if (!this.#admits) return this.#discard(position, data.length, context.fua);
        this.#zero(log, position, data.length);
      } else if (data.length <= this.#segmentSize && log.room(data.length) && this.#admits) {
        this.#append(log, position, data);
      } else return this.#writeInPieces(log, position, data, context.fua);
      return this.#settle(context.fua);
    } catch (error) {
      throw translate(error, 'write');
    }
  }

  async #writeInPieces(
    log: LogWriter,
    position: number,
    data: DataOut,
    fua: boolean,
  ): Promise<void> {
    try {
      for (let at = 0; at < data.length; at += this.#segmentSize) {
        const piece = data.slice(at, Math.min(data.length, at + this.#segmentSize));
        await this.#makeRoom(log, piece.length);
        this.#assertInside(position + data.length);
        this.#append(log, position + at, piece);
      }
    } catch (error) {
      throw translate(error, 'write');
    }
    await this.#settle(fua);
  }

  /** What a change waits for before it is acknowledged. */
  #settle(fua: boolean): MaybePromise<void> {
    if (fua || !this.writeCache) return this.#flush();
    const log = this.#log as LogWriter;
    try {
      const written = this.#journal?.written(log);
      // Last, and at once before the answer: whatever took its time, the disk is ours now.
      if (written === undefined && log.lease.holds) return;
      return this.#acknowledge(log, written);
    } catch (error) {
      throw translate(error, 'write');
    }
  }

  async #acknowledge(log: LogWriter, written: Promise<void> | undefined): Promise<void> {
    try {
      await written;
      await log.renew();
    } catch (error) {
      throw translate(error, 'write');
    }
  }

  /** In the log, and in the buffer. */
  async #makeRoom(log: LogWriter, length: number): Promise<void> {
    await this.#paced();
    if (this.#indexFull) {
      // Of what is not in the bucket no checkpoint can free the index, and little log may be all of it.
      await this.#requests.background.ahead(log.drain(this.#patience));
      await this.#paced();
    }
    if (!log.room(length)) await log.makeRoom(length);
    this.#writable('write');
  }

  /** Whether the log takes a change at once. */
  get #admits(): boolean {
    return this.#pace.admits && !this.#indexFull;
  }

  get #indexFull(): boolean {
    return this.#image.index.bytes > this.#indexLimit * 2;
  }

  /** Until a log that is too long takes another change. */
  async #paced(): Promise<void> {
    if (await this.#pace.wait(this.#patience)) return;
    throw new DiskError(
      'unreachable',
      'write: the log is as long as it may be, and nothing of it has become chunks for too long; it is tried on',
    );
  }

  get #patience(): number {
    return this.#options.patienceMs ?? 25_000;
  }

  /** It may have shrunk while a change waited: what is cut off must not come back when it grows. */
  #assertInside(end: number): void {
    if (end > this.size) throw sense.lbaOutOfRange();
  }

  #append(log: LogWriter, position: number, data: DataOut | Uint8Array): void {
    const block = position / this.blockSize;
    const { slot, offset } = log.append(block, data);
    this.#changed(position, data.length);
    this.#image.index.put(block, data.length / this.blockSize, slot, offset);
    this.#journal?.noteData(slot, position, data);
  }

  #changed(position: number, length: number): void {
    for (const compared of this.#compared) {
      if (position < compared.end && position + length > compared.start) compared.isChanged = true;
    }
  }

  #zero(log: LogWriter, position: number, length: number): void {
    this.#changed(position, length);
    const block = position / this.blockSize;
    const blocks = length / this.blockSize;
    const slot = log.zero(block, blocks);
    this.#image.zero(block, blocks, slot);
    this.#journal?.noteZero(slot, position, length);
    const { bytes } = this.#image.index;
    if (bytes - this.#indexSealed <= this.#indexLimit / INDEX_PIECES) return;
    // A few bytes of log may be much index: checkpoints take it a segment at a time.
    log.writeBack(Number.POSITIVE_INFINITY);
    this.#indexSealed = bytes;
  }

  /** Bytes of the disk that may be zeroed at once, all of it in chunks. */
  get #zeroPiece(): number {
    const chunks = Math.floor(this.#indexLimit / INDEX_PIECES / (CHUNK_COST + RUN_COST));
    return Math.max(1, chunks) * this.record.chunkSize;
  }

  /** Zeros over any length: what is more than a piece not at once, but with bounded memory. */
  async #zeroInPieces(log: LogWriter, position: number, length: number): Promise<void> {
    const { chunkSize } = this.record;
    const most = this.#zeroPiece;
    const end = position + length;
    for (let at = position; at < end; ) {
      const next = Math.min(end, (Math.floor(at / chunkSize) + 1) * chunkSize + most);
      if (!log.room(0) || !this.#admits) await this.#makeRoom(log, 0);
      this.#assertInside(end);
      this.#zero(log, at, next - at);
      at = next;
    }
  }

  flush(): Promise<void> {
    this.#counts.flushes++;
    return this.#flush();
  }

  async #flush(): Promise<void> {
    try {
      const log = this.#writable('flush');
      if (this.#journal === undefined || this.#options.journal === undefined) await log.flush();
      else {
        await this.#journal.flush(log);
        if (!log.lease.holds) await log.renew();
      }
    } catch (error) {
      throw translate(error, 'write');
    }
  }

  async unmap(position: number, length: number): Promise<void> {
    await this.#discard(position, length, false);
  }

  async writeZeroes(position: number, length: number): Promise<void> {
    await this.#discard(position, length, false);
  }

  async #discard(position: number, length: number, fua: boolean): Promise<void> {
    try {
      await this.#zeroInPieces(this.#writable('unmap'), position, length);
    } catch (error) {
      throw translate(error, 'write');
    }
    await this.#settle(fua);
  }

  async writeSame(position: number, length: number, block: Uint8Array): Promise<void> {
    if (block.every((byte) => byte === 0)) return this.#discard(position, length, false);
    try {
      const log = this.#writable('write');
      const pattern = Buffer.alloc(Math.min(length, this.#segmentSize, MiB), block);
      for (let at = 0; at < length; at += pattern.length) {
        const piece = pattern.subarray(0, Math.min(pattern.length, length - at));
        await this.#makeRoom(log, piece.length);
        this.#assertInside(position + length);
        this.#append(log, position + at, piece);
      }
    } catch (error) {
      throw translate(error, 'write');
    }
    await this.#settle(false);
  }

  /** Nothing comes between the look that compares and the write: what was changed meanwhile is read again. */
  async compareAndWrite(
    position: number,
    expected: Uint8Array,
    replacement: Uint8Array,
  ): Promise<number> {
    const current = new MemoryDataIn(Buffer.allocUnsafe(expected.length));
    const compared = { start: position, end: position + expected.length, isChanged: false };
    this.#compared.add(compared);
    try {
      const log = this.#writable('compare and write');
      do {
        compared.isChanged = false;
        await this.#image.read(position, current);
        await this.#makeRoom(log, replacement.length);
        this.#assertInside(compared.end);
      } while (compared.isChanged);
      const at = firstDifference(current.bytes, expected);
      if (at >= 0) return at;
      for (let done = 0; done < replacement.length; done += this.#segmentSize) {
        const piece = replacement.subarray(done, done + this.#segmentSize);
        this.#append(log, position + done, piece);
      }
    } catch (error) {
      throw translate(error, 'write');
    } finally {
      this.#compared.delete(compared);
    }
    await this.#settle(false);
    return -1;
  }

  async blockStatus(position: number, length: number): Promise<readonly BlockExtent[]> {
    try {
      return await this.#image.status(position, length);
    } catch (error) {
      throw translate(error, 'read');
    }
  }

  /** Durable when settled. What is cut off is gone; it is zeros if the disk grows again. */
  async resize(size: number): Promise<void> {
    if (!Number.isSafeInteger(size) || size <= 0 || size % this.blockSize !== 0) {
      throw new ArgumentError(`size ${size} must be a multiple of ${this.blockSize} above 0`);
    }
    try {
      const log = this.#writable('resize');
      if (size < this.size) {
        const length = this.size - size;
        if (length > this.#zeroPiece) {
          // Before, and in chunks, so that there is little left to note together with the new size.
          await this.#zeroInPieces(log, size, length);
          await this.#requests.background.ahead(log.drain(this.#patience));
          await this.#checkpointing;
        }
        // Another one may have come first.
        if (size < this.size) this.#zero(log, size, this.size - size);
      }
      this.#setSize(log, size);
      await this.#flush();
    } catch (error) {
      throw translate(error, 'write');
    }
  }

  #setSize(log: LogWriter, size: number): void {
    log.resize(size / this.blockSize);
    this.#journal?.noteSize(log.slot, size);
    this.#image.size = size;
  }

  /** Follows the writer. @returns whether anything is new */
  async refresh(): Promise<boolean> {
    if (this.#log !== undefined || this.snapshotName !== undefined) return false;
    const { slot, manifest } = this.#state;
    try {
      if ((await this.#state.advance()) > 0) return true;
    } catch (error) {
      if (!(error instanceof Gone)) throw error;
      await this.#reload();
      return true;
    }
    // The end of the log, or collected while we looked away: then there is a newer manifest.
    const [newest] = await listManifests(this.#requests, this.prefix);
    if (newest === undefined || newest.n <= manifest.n) return false;
    await this.#reload();
    return this.#state.slot !== slot;
  }

  #reload(): Promise<void> {
    this.#reloading ??= loadState(this.#parts)
      .then((state) => {
        this.#state.image.retire(state.image);
        this.#state = state;
      })
      .finally(() => {
        this.#reloading = undefined;
      });
    return this.#reloading;
  }

  /**
   * Everything written so far into chunks: the log is empty then, and snapshots cost least.
   */
  async checkpoint(): Promise<void> {
    const log = this.#writable('checkpoint');
    await log.flush();
    const { durable } = log;
    this.#wanted++;
    try {
      while (this.manifest.cut < durable) {
        this.#writable('checkpoint');
        if (!(await this.#runCheckpoint(true))) break;
      }
    } finally {
      this.#wanted--;
    }
  }

  /**
   * A snapshot: of a writer after a flush, else of what is in the bucket.
   * @throws DiskError `in-use` when the name is taken, `fenced`
   */
  snapshot(name: string): Promise<Pin> {
    const log = this.#log;
    if (log === undefined) return pinNow(this.#parts, { name, kind: 'snapshot' });
    return this.#inNextTurn(async () => {
      this.#writable('snapshot');
      const { size } = this;
      await log.flush();
      const pin = { ...pinOf(this.#state, { name, kind: 'snapshot' }, log.durable), size };
      await savePin(this.#requests, this.prefix, pin);
      // Fenced meanwhile, the successor may have collected what we have just pinned.
      try {
        await log.verify();
      } catch (error) {
        await this.#requests.delete([`${this.prefix}/${pinName(name)}`]);
        throw error;
      }
      return pin;
    });
  }

  /**
   * Deletes what nobody needs, by looking at every object's name.
   * @throws DiskError `fenced`, `damaged`; ObjectStoreError
   */
  collect(onProgress?: (deleted: number) => void): Promise<SweepResult> {
    return this.#inNextTurn(async () => {
      const { manifest, record, prefix } = this;
      try {
        return await sweep(this.#requests, this.#codec, prefix, record, manifest, onProgress);
      } catch (error) {
        if (!(error instanceof Gone)) throw error;
        await this.#log?.probe();
        throw this.failure ?? damaged(error.key, 'it is missing');
      }
    });
  }

  statistics(): DiskStatistics {
    const image = this.#image;
    return {
      ...this.#requests.counters,
      ...this.#counts,
      cacheHits: this.#cache.hits,
      cacheMisses: this.#cache.misses,
      cacheFileHits: this.#fileCache?.hits ?? 0,
      cacheBytes: this.#cache.bytes,
      mapBytes: image.map.bytes,
      logBytesInMemory: (this.#log?.residentBytes ?? 0) + (this.#log?.dirty ?? 0),
      checkpointBytes: this.#checkpointBytes,
      logRuns: image.index.runs,
      indexBytes: image.index.bytes,
      dirtyBytes: this.#log?.dirty ?? 0,
      logBytes: this.#logBytes,
      logSegments: image.segments.size,
      outageMs: this.#requests.outage,
    };
  }

  /**
   * Makes everything durable, however long that takes, and ends. A fenced disk is just closed.
   * @param options.discard don't wait: what is not durable is lost
   */
  async close(options: { discard?: boolean } = {}): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#pace.look();
    let done = false;
    try {
      const log = this.#log;
      if (log !== undefined && log.failure === undefined && options.discard !== true) {
        await log.drain(Number.POSITIVE_INFINITY);
        await this.#serial;
        await log.drain(Number.POSITIVE_INFINITY);
        await log.release(RELEASE_PATIENCE_MS);
        done = true;
      }
    } catch (error) {
      throw translate(error, 'write');
    } finally {
      this.#requests.close();
      await this.#serial;
      await this.#journal?.close(done);
      await this.#fileCache?.close();
    }
  }

  /** What the journal holds and the bucket does not goes to the bucket, before anybody is served. */
  async #replay(journal: Journal, state: DiskState): Promise<void> {
    const log = this.#log as LogWriter;
    const count = await journal.replay(
      state,
      this.#options.discardJournal ?? false,
      async (change) => {
        if (change.type === 'size') {
          this.#setSize(log, change.size);
          return;
        }
        await this.#makeRoom(log, change.length);
        if (change.type === 'zero') await this.#zeroInPieces(log, change.position, change.length);
        else this.#append(log, change.position, change.data);
      },
      () => log.drain(Number.POSITIVE_INFINITY),
    );
    if (count > 0) {
      this.#requests.log('info', `${count} changes of ${journal.path} are in the bucket now`);
    }
  }
}

function checkOptions(options: OpenOptions, disk: DiskRecord): void {
  if (options.journal !== undefined && options.restartFile !== undefined) {
    throw new ArgumentError('journal and restartFile exclude each other: a journal does both');
  }
  const { segmentSize = 4 * MiB, uploads = 8, dirtyLimit = 64 * MiB, leaseMs = 0 } = options;
  const good =
    segmentSize % disk.frameSize === 0 && segmentSize > 0 && segmentSize <= 4096 * disk.frameSize;
  if (!good) {
    throw new ArgumentError(
      `segmentSize ${segmentSize} must be a multiple of ${disk.frameSize} and at most ${4096 * disk.frameSize}`,
    );
  }
  if (!Number.isInteger(uploads) || uploads < 1 || uploads > 16) {
    throw new ArgumentError(`uploads ${uploads} must be 1 to 16`);
  }
  if (!(leaseMs >= 0 && leaseMs <= 60_000)) {
    throw new ArgumentError(`leaseMs ${leaseMs} must be 0 to 60000`);
  }
  if (!(dirtyLimit >= segmentSize)) {
    throw new ArgumentError(`dirtyLimit ${dirtyLimit} must be at least the segment size`);
  }
}

function firstDifference(a: Uint8Array, b: Uint8Array): number {
  if (Buffer.compare(a, b) === 0) return -1;
  return a.findIndex((byte, i) => byte !== b[i]);
}

/** What the initiator is told; the cause says what happened. */
export function translate(error: unknown, operation: 'read' | 'write'): Error {
  if (SenseError.is(error)) return error;
  const options = { cause: error };
  if (error instanceof DiskError) {
    switch (error.failure) {
      case 'unreachable':
        return sense.notReadyBecomingReady(options);
      case 'fenced':
      case 'refused':
      case 'key':
      case 'closed':
        return manualIntervention(options);
      case 'read-only':
        return sense.writeProtected(options);
      default:
        return sense.mediumError(operation, options);
    }
  }
  if (isRefusal(error)) return manualIntervention(options);
  if (failureKind(error) !== undefined) return sense.notReadyBecomingReady(options);
  return error as Error;
}

/** SPC-5: LOGICAL UNIT NOT READY, MANUAL INTERVENTION REQUIRED. */
function manualIntervention(options: { cause: unknown }): SenseError {
  return new SenseError(
    SenseKey.NOT_READY,
    0x04,
    0x03,
    'LOGICAL UNIT NOT READY, MANUAL INTERVENTION REQUIRED',
    options,
  );
}
