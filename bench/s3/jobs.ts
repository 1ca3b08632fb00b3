// SPDX-License-Identifier: Apache-2.0
/** What is measured, and which ratios are good enough. Nothing here measures. */
import type { Bar, Metric } from '../report.js';

export interface Job {
  readonly name: string;
  readonly rw: 'randread' | 'randwrite' | 'read' | 'write';
  readonly blockSize: number;
  readonly depth: number;
  readonly processes: number;
  /** A flush after each write. */
  readonly sync: boolean;
  /**
   * `cold`: caches have nothing of what is read; `warm`: over a part of the disk that fits them, once read; `full`: as much was
   * written as fits them, and not flushed, so that what goes in is what goes out; `filling`: the whole disk once.
   */
  readonly cache: 'any' | 'cold' | 'warm' | 'full' | 'filling';
  /** What is added to each request, ms. */
  readonly latencyMs: number;
}

const KIB = 1024;
const base = { processes: 1, sync: false, cache: 'any', latencyMs: 0, depth: 1 } as const;
/** Reads come first: of a disk as it was filled, not as random writes leave it. */
const near: readonly Job[] = [
  { ...base, name: 'randread-4k-cold-d1', rw: 'randread', blockSize: 4 * KIB, cache: 'cold' },
  {
    ...base,
    name: 'randread-4k-cold-d16',
    rw: 'randread',
    blockSize: 4 * KIB,
    cache: 'cold',
    depth: 16,
  },
  {
    ...base,
    name: 'randread-4k-warm-d16',
    rw: 'randread',
    blockSize: 4 * KIB,
    cache: 'warm',
    depth: 16,
  },
  { ...base, name: 'read-1m-d4', rw: 'read', blockSize: 1024 * KIB, cache: 'cold', depth: 4 },
  {
    ...base,
    name: 'write-1m-d4',
    rw: 'write',
    blockSize: 1024 * KIB,
    cache: 'full',
    depth: 4,
  },
  { ...base, name: 'fsync-4k-j1', rw: 'randwrite', blockSize: 4 * KIB, sync: true },
  { ...base, name: 'fsync-4k-j16', rw: 'randwrite', blockSize: 4 * KIB, sync: true, processes: 16 },
  { ...base, name: 'randwrite-4k-d1', rw: 'randwrite', blockSize: 4 * KIB },
  { ...base, name: 'randwrite-4k-d16', rw: 'randwrite', blockSize: 4 * KIB, depth: 16 },
];

/** What memory is, once it is full of data. */
const filling: Job = {
  ...base,
  name: 'fill-caches',
  rw: 'read',
  blockSize: 1024 * KIB,
  cache: 'filling',
  depth: 4,
};

/** Whether a disk is not as it was filled any more. */
export const scatters = ({ rw }: Job): boolean => rw === 'randwrite';

/** Each job as it is, and with 20 ms added to each request. */
export const jobs: readonly Job[] = [
  filling,
  ...near,
  ...near.map((job) => ({ ...job, name: `${job.name}+20ms`, latencyMs: 20 })),
];

export const metrics = {
  iops: { name: 'iops', unit: '1/s', better: 'higher' },
  throughput: { name: 'throughput', unit: 'MB/s', better: 'higher' },
  p99: { name: 'p99', unit: 'ms', better: 'lower' },
  requests: { name: 'requests', unit: '1/1000 operations', better: 'lower' },
  /** Resident at most, the program's text and its libraries included. */
  memory: { name: 'memory', unit: 'MiB', better: 'lower' },
  /** Without what is read from files, which can be dropped, and is shared with other processes. */
  anonymous: { name: 'anonymous', unit: 'MiB', better: 'lower' },
} as const satisfies Record<string, Metric>;

function bar(metric: Metric, peer: string, ratio: number, holds: (job: Job) => boolean): Bar {
  return { metric: metric.name, peer, ratio, jobs: jobs.filter(holds).map(({ name }) => name) };
}

const durable = 's3backer-durable';
const cached = 's3backer-cached';
const small = ({ blockSize }: Job) => blockSize === 4 * KIB;
const reads = ({ rw }: Job) => rw.endsWith('read');

export const bars: readonly Bar[] = [
  bar(metrics.iops, durable, 10, (job) => job.rw === 'randwrite' && !job.sync),
  bar(metrics.iops, durable, 5, (job) => job.sync && job.processes === 16),
  ...[durable, cached].flatMap((peer) => [
    bar(metrics.iops, peer, 1, (job) => small(job) && reads(job)),
    bar(metrics.throughput, peer, 1, (job) => !small(job) && job.cache !== 'filling'),
  ]),
  // At full caches: elsewhere it says which cache has more in it.
  ...[metrics.anonymous, metrics.memory].map((metric) =>
    bar(metric, cached, 1, (job) => job.cache === 'filling' || job.cache === 'full'),
  ),
];
