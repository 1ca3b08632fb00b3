// SPDX-License-Identifier: Apache-2.0
/**
 * Clusters ready for new data: counted, inside the file, and zeros, all of that durably. An entry that refers to one
 * of them may reach the device before its data or after it: until the data is there the cluster reads as what the
 * disk showed before, zeros. So such a write needs no flush on its way.
 *
 * The reserve fills itself in the background, the faster it is used the larger. What a stop leaves in it is lost space,
 * at most `MOST_BYTES`; at a regular end it is given back.
 */
import type { HostFile } from './host/host-file.js';
import type { MetadataSync } from './metadata-sync.js';
import type { ClusterRun, Refcounts } from './refcounts.js';

export interface ReserveParts {
  readonly file: HostFile;
  readonly clusterSize: number;
  readonly refcounts: Refcounts;
  readonly sync: MetadataSync;
}

const FIRST = 8;
const MOST_CLUSTERS = 4096;
const MOST_BYTES = 64 * 1024 * 1024;
/** Space used before has to be zeroed: no more of it than this at once. */
const MOST_ZEROED = 4 * 1024 * 1024;
const SECTOR = 512;

export class Reserve {
  readonly #on: ReserveParts;
  readonly #most: number;
  /** Behind one another in use. */
  #ready: ClusterRun[] = [];
  #count = 0;
  #wanted: number;
  /** It was empty since it was filled last. */
  #ranDry = false;
  #filling: Promise<void> | undefined;
  #paused = false;
  /** Where, at the last `drain`, the part of the file began that had never been used. */
  #tail = 0;

  constructor(parts: ReserveParts) {
    this.#on = parts;
    this.#most = Math.max(1, Math.min(MOST_CLUSTERS, MOST_BYTES / parts.clusterSize));
    this.#wanted = Math.min(FIRST, this.#most);
  }

  /** Up to `count` clusters in a row, now the caller's; undefined when there are none ready. */
  take(count: number): ClusterRun | undefined {
    if (this.#paused) return undefined;
    const run = this.#ready[0];
    if (run === undefined) {
      this.#ranDry = true;
      this.#fill();
      return undefined;
    }
    const taken = Math.min(count, run.count);
    if (taken === run.count) this.#ready.shift();
    else {
      const offset = run.offset + taken * this.#on.clusterSize;
      this.#ready[0] = { offset, count: run.count - taken };
    }
    this.#count -= taken;
    if (this.#count * 2 < this.#wanted) this.#fill();
    return { offset: run.offset, count: taken };
  }

  /** Gives everything back, and stays empty until `resume`. */
  async drain(): Promise<void> {
    this.#paused = true;
    await this.#filling;
    const { file, refcounts, clusterSize } = this.#on;
    const rest = this.#ready;
    this.#ready = [];
    this.#count = 0;
    this.#tail = file.size();
    for (const { offset, count } of [...rest].reverse()) {
      if (offset + count * clusterSize < this.#tail) break;
      this.#tail = offset;
    }
    for (const { offset, count } of rest) {
      const first = offset / clusterSize;
      for (let c = first; c < first + count; c++) await refcounts.add(c, -1);
    }
  }

  resume(): void {
    this.#paused = false;
  }

  /** After `drain`, when that is durable: cuts off what it made the file longer by, and nobody has used since. */
  async cut(): Promise<void> {
    const { file, refcounts, clusterSize } = this.#on;
    const size = file.size();
    let end = Math.ceil(size / clusterSize);
    while (end * clusterSize > this.#tail && (await refcounts.get(end - 1)) === 0) end--;
    if (end * clusterSize < size) await file.truncate(end * clusterSize);
  }

  #fill(): void {
    if (this.#filling !== undefined) return;
    if (this.#ranDry) this.#wanted = Math.min(this.#wanted * 2, this.#most);
    this.#ranDry = false;
    const taken: ClusterRun[] = [];
    this.#filling = this.#prepare(taken, this.#wanted - this.#count)
      .then(
        () => {
          this.#ready.push(...taken);
          for (const { count } of taken) this.#count += count;
        },
        () => this.#giveUp(taken),
      )
      .finally(() => {
        this.#filling = undefined;
      });
  }

  async #prepare(taken: ClusterRun[], wanted: number): Promise<void> {
    const { file, refcounts, sync, clusterSize } = this.#on;
    let zeroed = 0;
    let end = 0;
    for (let left = wanted; left > 0 && zeroed < MOST_ZEROED; ) {
      const run = await refcounts.allocate(left);
      const length = run.count * clusterSize;
      const fresh = refcounts.isFresh(run.offset);
      refcounts.use(run);
      taken.push(run);
      left -= run.count;
      if (fresh) end = Math.max(end, run.offset + length);
      else {
        await file.writeZeroes(run.offset, length);
        zeroed += length;
      }
    }
    // The file reaches behind them: an entry must not point behind its end. Not by cutting it to a length, which
    // could cut what others write meanwhile.
    if (end > file.size()) await file.write(new Uint8Array(SECTOR), end - SECTOR);
    await sync.counted();
  }

  /** Whoever needs space finds the reason again, and says it. */
  #giveUp(taken: readonly ClusterRun[]): void {
    const { sync, clusterSize } = this.#on;
    this.#wanted = 1;
    for (const { offset, count } of taken) {
      const first = offset / clusterSize;
      for (let c = first; c < first + count; c++) sync.free(c);
    }
  }
}
