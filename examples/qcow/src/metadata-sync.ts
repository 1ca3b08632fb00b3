// SPDX-License-Identifier: Apache-2.0
/**
 * Brings changed metadata to the file, in the one order that is right at every moment:
 *
 * 1. refcount blocks; then, after a flush, the refcount table's new entries (or a moved table, and,
 *    after one more flush, the header that names it);
 * 2. flush: whatever will be referred to is counted, and its content is durable;
 * 3. L2 and L1 entries (a new L2 table has been there, empty or as a copy, since before 2);
 * 4. flush: whatever was referred to before and isn't any more may be used anew.
 *
 * So a stop between any two writes, and any order of the writes between two flushes, leaves refcounts that
 * are never too low, and entries whose data is there. What is lost is space: clusters counted and not
 * used.
 *
 * A change outlives this process from step 3 on: that is what `written` waits for. A run that nobody wants to be
 * durable leaves step 4 to the one after it, and gives nothing free. When, besides, nothing that it writes depends
 * on a flush (`Mapping.dependOnFlush`), step 3 is all of it.
 *
 * Runs follow one another; callers that come while one is under way share the next. When a flush fails, the
 * kernel may have dropped what was written, and no later success would prove anything: from then on
 * every sync fails.
 */
import type { MaybePromise } from 'tcmu';
import { QcowError } from './errors.js';
import type { HostFile } from './host/host-file.js';
import type { InFlight } from './in-flight.js';
import type { Mapping } from './mapping.js';
import type { Refcounts } from './refcounts.js';

export interface SyncTargets {
  readonly file: HostFile;
  /** The same, unless guest data lies in another. */
  readonly dataFile: HostFile;
  readonly mapping: Mapping;
  readonly refcounts: Refcounts;
  readonly inFlight: InFlight;
  readonly clusterSize: number;
  /** Writes the header's fixed fields, with the refcount table's new place. */
  writeHeader(): Promise<void>;
  /** Refcounts need not reach the file now: the image is marked dirty. */
  lazy(): boolean;
  /** What was freed is given back to the file system. */
  readonly discard: boolean;
  /** No change is taken any more. */
  failed(): void;
}

/** One pass through the four steps. */
class Run {
  /** Somebody waits for step 4. */
  durable: boolean;
  /** Somebody waits for step 2. */
  counts = false;
  /** Step 3 is done. */
  isWritten = false;
  readonly written: Promise<void>;
  readonly counted: Promise<void>;
  markWritten!: () => void;
  markCounted!: () => void;
  markFailed!: (error: unknown) => void;
  /** The end of it all. */
  done: Promise<void> = Promise.resolve();

  constructor(durable: boolean) {
    this.durable = durable;
    let failCounted: (error: unknown) => void;
    this.counted = new Promise((resolve, reject) => {
      this.markCounted = resolve;
      failCounted = reject;
    });
    this.written = new Promise((resolve, reject) => {
      this.markWritten = () => {
        this.isWritten = true;
        resolve();
      };
      this.markFailed = (error) => {
        failCounted(error);
        reject(error);
      };
    });
    // Those who wait are told; that nobody waits is no mistake.
    this.counted.catch(() => {});
    this.written.catch(() => {});
  }
}

export class MetadataSync {
  readonly #on: SyncTargets;
  /** Host clusters that nothing will refer to after the next sync. */
  #freed: number[] = [];
  /** Those whose sync is done, waiting for operations under way. */
  #releasing = 0;
  #running: Run | undefined;
  /** Steps 1 and 2 alone, beside no run that has them. */
  #counting: Promise<void> | undefined;
  #next: Run | undefined;
  #failure: QcowError | undefined;
  #releaseFailure: unknown;
  #settling = false;
  #onReleased: (() => void)[] = [];

  constructor(targets: SyncTargets) {
    this.#on = targets;
  }

  /** Why no change is taken any more; undefined while all is well. */
  get failure(): QcowError | undefined {
    return this.#failure;
  }

  get pendingFrees(): number {
    return this.#freed.length;
  }

  /** From now on every sync fails with this. */
  fail(error: QcowError): void {
    this.#failure ??= error;
    this.#on.failed();
  }

  /** One reference to a host cluster (by number) is gone, as soon as the next sync is through. */
  free(cluster: number): void {
    this.#freed.push(cluster);
  }

  /** Makes everything that settled before this call durable. */
  sync(): Promise<void> | undefined {
    if (this.#failure !== undefined) throw this.#failure;
    if (this.#next !== undefined) {
      this.#next.durable = true;
      return this.#next.done;
    }
    if (this.#running !== undefined) return this.#queue(this.#running, true).done;
    const { mapping, refcounts } = this.#on;
    if (mapping.dirty || refcounts.dirty || this.#freed.length > 0) return this.#start(true).done;
    const flushed = this.#flushAll();
    if (flushed === undefined) return;
    const run = new Run(true);
    run.markWritten();
    return this.#run(run, flushed).done;
  }

  /**
   * Waits until every change of the mapping made before this call is in the file, where it outlives this
   * process, though not yet a failing host. Undefined when that is so.
   */
  written(): Promise<void> | undefined {
    if (this.#failure !== undefined) throw this.#failure;
    const running = this.#running;
    if (!this.#on.mapping.dirty) return running?.isWritten === false ? running.written : undefined;
    if (this.#next !== undefined) return this.#next.written;
    if (running !== undefined) return this.#queue(running, false).written;
    return this.#on.mapping.needsFlush ? this.#start(false).written : this.#writeEntries();
  }

  /** Whether every change of the mapping is in the file, so that `written` has nothing to wait for. */
  get isWritten(): boolean {
    return !this.#on.mapping.dirty && this.#running?.isWritten !== false;
  }

  /** Makes refcounts, and content written before this call, durable: entries may refer to them from then on. */
  counted(): Promise<void> {
    if (this.#failure !== undefined) throw this.#failure;
    if (this.#running !== undefined) {
      const next = this.#next ?? this.#queue(this.#running, false);
      next.counts = true;
      return next.counted;
    }
    if (this.#counting !== undefined) {
      return this.#counting.catch(() => {}).then(() => this.counted());
    }
    this.#counting = this.#writeCounts(this.#takeCounts()).finally(() => {
      this.#counting = undefined;
    });
    return this.#counting;
  }

  /** Step 3, of entries that depend on no flush; undefined when it is done at once. */
  #writeEntries(): Promise<void> | undefined {
    const { mapping } = this.#on;
    const entries = mapping.cache.takeDirty();
    const l1 = mapping.takeDirtyL1();
    const restore = (error: unknown) => {
      mapping.cache.restore(entries);
      mapping.restoreL1(l1);
      throw error;
    };
    let written: MaybePromise<void>;
    try {
      written = this.#write([...entries, ...l1]);
    } catch (error) {
      return restore(error);
    }
    if (written === undefined) {
      mapping.cache.written(entries);
      return;
    }
    const run = new Run(false);
    const work = written.then(() => {
      run.markWritten();
      mapping.cache.written(entries);
    }, restore);
    return this.#run(run, work).written;
  }

  #queue(running: Run, durable: boolean): Run {
    const next = new Run(durable);
    next.done = running.done
      .catch(() => {})
      .then(() => {
        this.#next = undefined;
        if (this.#failure !== undefined) {
          next.markFailed(this.#failure);
          throw this.#failure;
        }
        return this.#run(next, this.#writeAll(next)).done;
      });
    next.done.catch(() => {});
    this.#next = next;
    return next;
  }

  #start(durable: boolean): Run {
    const run = new Run(durable);
    return this.#run(run, this.#writeAll(run));
  }

  #run(run: Run, work: Promise<void>): Run {
    const done = work.finally(() => {
      if (this.#running === run) this.#running = undefined;
    });
    done.catch(run.markFailed);
    run.done = done;
    this.#running = run;
    return run;
  }

  #flushAll(): Promise<void> | undefined {
    const { file, dataFile } = this.#on;
    try {
      const data = dataFile === file ? undefined : dataFile.flush();
      const metadata = file.flush();
      if (!(data instanceof Promise) && !(metadata instanceof Promise)) return;
      return Promise.all([data, metadata]).then(
        () => {},
        (error: unknown) => {
          throw this.#flushFailed(error);
        },
      );
    } catch (error) {
      throw this.#flushFailed(error);
    }
  }

  async #flush(): Promise<void> {
    try {
      await this.#on.file.flush();
    } catch (error) {
      throw this.#flushFailed(error);
    }
  }

  #flushFailed(cause: unknown): QcowError {
    const { path } = this.#on.file;
    this.fail(
      new QcowError(
        'ERR_TCMU_QCOW_STATE',
        'a flush failed, and written data may be lost: no more changes until it is opened anew',
        { path, operation: 'flush', cause },
      ),
    );
    return this.#failure as QcowError;
  }

  async #writeAll(run: Run): Promise<void> {
    const { mapping, inFlight } = this.#on;
    const complete = () => run.durable || run.counts || mapping.needsFlush;
    // What it writes must not be overtaken by older copies of the same.
    if (complete()) await this.#counting?.catch(() => {});
    if (this.#failure !== undefined) throw this.#failure;
    const withCounts = complete();
    const dependent = mapping.takeNeedsFlush();
    const entries = mapping.cache.takeDirty();
    const l1 = mapping.takeDirtyL1();
    let freed: number[] = [];
    let epoch = 0;
    try {
      if (withCounts) {
        freed = this.#freed;
        this.#freed = [];
        epoch = inFlight.advance();
        await this.#writeCounts(this.#takeCounts());
      }
      run.markCounted();
      if (entries.length > 0 || l1.length > 0) {
        await this.#write([...entries, ...l1]);
        run.markWritten();
        if (run.durable) await this.#flush();
        else {
          // What they were referred to by is not known to be gone until the next run's step 2.
          this.#freed.unshift(...freed);
          freed = [];
        }
      }
      run.markWritten();
    } catch (error) {
      mapping.cache.restore(entries);
      mapping.restoreL1(l1);
      if (dependent) mapping.dependOnFlush();
      this.#freed.unshift(...freed);
      throw error;
    }
    mapping.cache.written(entries);
    if (freed.length > 0) {
      this.#releasing++;
      inFlight.after(epoch, () => {
        this.#release(freed).then(
          () => this.#released(),
          (error: unknown) => this.#released(error),
        );
      });
    }
  }

  /** Copies of the changed refcounts, unless the image says that they don't count now. */
  #takeCounts(): ReturnType<Refcounts['takeDirty']> | undefined {
    const { refcounts, lazy } = this.#on;
    const needed = this.#settling || !lazy() || refcounts.cache.crowded;
    return needed ? refcounts.takeDirty() : undefined;
  }

  /** Steps 1 and 2. */
  async #writeCounts(counts: ReturnType<Refcounts['takeDirty']> | undefined): Promise<void> {
    const { refcounts } = this.#on;
    if (counts !== undefined) {
      const { blocks, table, moved } = counts.changes;
      try {
        await this.#write(blocks);
        if (table.length > 0) {
          await this.#flush();
          await this.#write(table);
          if (moved) {
            await this.#flush();
            await this.#on.writeHeader();
          }
        }
      } catch (error) {
        refcounts.restore(counts);
        throw error;
      }
      refcounts.written(counts);
      this.#releaseTables(counts.oldTables);
    }
    await this.#flushAll();
  }

  /** Old places of the refcount table: nobody but the header referred to them. */
  #releaseTables(tables: readonly { offset: number; count: number }[]): void {
    for (const { offset, count } of tables) {
      const first = offset / this.#on.clusterSize;
      for (let c = first; c < first + count; c++) this.free(c);
    }
  }

  /** Undefined when all is written at once. Throws, or rejects, when nothing of it is under way any more. */
  #write(ranges: readonly { position: number; bytes: Uint8Array }[]): MaybePromise<void> {
    const pending: Promise<unknown>[] = [];
    try {
      for (const { position, bytes } of ranges) {
        const written = this.#on.file.write(bytes, position);
        if (written instanceof Promise) pending.push(written);
      }
    } catch (error) {
      if (pending.length === 0) throw error;
      pending.push(Promise.reject(error));
    }
    return pending.length === 0 ? undefined : allSettled(pending);
  }

  #released(error?: unknown): void {
    this.#releasing--;
    if (error !== undefined) this.#releaseFailure ??= error;
    if (this.#releasing > 0) return;
    const waiting = this.#onReleased;
    this.#onReleased = [];
    for (const resolve of waiting) resolve();
  }

  /** Counts the references down, and gives what became free back to the file system before it is used anew. */
  async #release(clusters: number[]): Promise<void> {
    const { refcounts, file, clusterSize, discard } = this.#on;
    clusters.sort((a, b) => a - b);
    let start = -1;
    let end = -1;
    const flushRun = async () => {
      if (start < 0) return;
      if (discard) await file.discard(start * clusterSize, (end - start) * clusterSize);
      for (let c = start; c < end; c++) {
        refcounts.metadata.delete(c);
        await refcounts.add(c, -1);
      }
    };
    for (let i = 0; i < clusters.length; i++) {
      const cluster = clusters[i] as number;
      let references = 1;
      while (clusters[i + 1] === cluster) {
        references++;
        i++;
      }
      if ((await refcounts.get(cluster)) > references) {
        await refcounts.add(cluster, -references);
        continue;
      }
      // All but the last reference: until the discard is done it must not look free.
      if (references > 1) await refcounts.add(cluster, 1 - references);
      if (cluster !== end) {
        await flushRun();
        start = cluster;
      }
      end = cluster + 1;
    }
    await flushRun();
  }

  /** Syncs until nothing is left to be written or freed, refcounts included. Nothing else may be under way. */
  async settle(): Promise<void> {
    const { mapping, refcounts } = this.#on;
    this.#settling = true;
    try {
      do {
        await this.sync();
        if (this.#releasing > 0) {
          await new Promise<void>((resolve) => this.#onReleased.push(resolve));
        }
        if (this.#releaseFailure !== undefined) throw this.#releaseFailure;
      } while (mapping.dirty || refcounts.dirty || this.#freed.length > 0);
    } finally {
      this.#settling = false;
    }
  }
}

/** Waits for all, also when one fails: memory must not be given back while others work on it. */
export async function allSettled(pending: readonly Promise<unknown>[]): Promise<void> {
  if (pending.length === 0) return;
  if (pending.length === 1) {
    await pending[0];
    return;
  }
  for (const result of await Promise.allSettled(pending)) {
    if (result.status === 'rejected') throw result.reason;
  }
}
