// SPDX-License-Identifier: Apache-2.0
/** Numbers by host cluster, sparse: references found by a check, or gained and lost by an operation. */
const CHUNK = 4096;

export class ClusterCounts {
  readonly #chunks = new Map<number, Int32Array>();

  get(cluster: number): number {
    return this.#chunks.get(Math.floor(cluster / CHUNK))?.[cluster % CHUNK] ?? 0;
  }

  add(cluster: number, delta: number): void {
    const index = Math.floor(cluster / CHUNK);
    let chunk = this.#chunks.get(index);
    if (chunk === undefined) {
      chunk = new Int32Array(CHUNK);
      this.#chunks.set(index, chunk);
    }
    const at = cluster % CHUNK;
    chunk[at] = (chunk[at] as number) + delta;
  }

  addRange(offset: number, length: number, clusterSize: number, delta = 1): void {
    const end = Math.ceil((offset + length) / clusterSize);
    for (let c = Math.floor(offset / clusterSize); c < end; c++) this.add(c, delta);
  }

  /** Calls `visit` for every number that is not 0, in order of the clusters. */
  each(visit: (cluster: number, count: number) => void): void {
    const indexes = [...this.#chunks.keys()].sort((a, b) => a - b);
    for (const index of indexes) {
      const chunk = this.#chunks.get(index) as Int32Array;
      for (let at = 0; at < CHUNK; at++) {
        const count = chunk[at] as number;
        if (count !== 0) visit(index * CHUNK + at, count);
      }
    }
  }

  /** The highest cluster with a number, or -1. */
  get highest(): number {
    const index = Math.max(-1, ...this.#chunks.keys());
    const chunk = this.#chunks.get(index);
    for (let at = CHUNK - 1; chunk !== undefined && at >= 0; at--) {
      if (chunk[at] !== 0) return index * CHUNK + at;
    }
    return -1;
  }
}
