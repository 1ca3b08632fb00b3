// SPDX-License-Identifier: Apache-2.0
/**
 * Runs the jobs: one S3 server for all, a bucket and a filled disk for each subject, fio in turn.
 *
 * Contract: each round measures every job on every subject and begins with another subject. Each measurement is of a process of its own that has first
 * done the same work for a moment, unmeasured, where that leaves its caches as the job wants them. A job of small writes ends with a flush, and its time
 * counts: for those that have a flush, what is measured is what became durable. Requests are the S3 server's own count.
 */
import { spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { bucketRequest } from '../../examples/s3/test/support/bucket.js';
import { onLeash } from '../../examples/s3/test/support/leash.js';
import { type Radosgw, startRadosgw } from '../../examples/s3/test/support/radosgw.js';
import { type FioResult, parseFio } from '../fio.js';
import type { Sample } from '../report.js';
import { type Job, metrics, scatters } from './jobs.js';
import { LatencyRelay } from './latency.js';
import { type Bucket, MIB, type Place, Running, type SubjectName, subjects } from './subjects.js';

export interface Plan {
  readonly jobs: readonly Job[];
  readonly subjects: readonly SubjectName[];
  readonly rounds: number;
  readonly seconds: number;
  readonly sizeMb: number;
  /** Memory for data, of all that have any. */
  readonly cacheMb: number;
  /** Where the bundled programs lie. */
  readonly programs: string;
  readonly onProgress: (text: string) => void;
}

/** What fits every cache. */
const warmMb = 32;
/** Of each measurement, before it begins. */
const warmUpSeconds = 2;

export async function measure(plan: Plan): Promise<Sample[]> {
  const dir = mkdtempSync(join(tmpdir(), 'tcmu-bench-s3-'));
  const cleanUp = () => rmSync(dir, { recursive: true, force: true });
  process.once('exit', cleanUp);
  // An OSD in memory grows to some three times what is stored, and nothing is compacted while we measure.
  const server = await startRadosgw({ capacityMb: 16 * 1024 });
  const relay = await new LatencyRelay(server.endpoint).start();
  try {
    const session = new Session(plan, server, relay, dir);
    for (const name of plan.subjects) await session.prepare(name);
    const samples: Sample[] = [];
    for (let round = 1; round <= plan.rounds; round++) {
      for (const job of plan.jobs) {
        for (let turn = 0; turn < plan.subjects.length; turn++) {
          const name = plan.subjects[(turn + round) % plan.subjects.length];
          if (name === undefined) continue;
          samples.push(...(await session.run(name, job, round)));
          plan.onProgress(`measured ${round} ${job.name} ${subjects[name].name}`);
        }
      }
    }
    return samples;
  } finally {
    await relay.stop();
    await server.stop();
    process.removeListener('exit', cleanUp);
    cleanUp();
  }
}

class Session {
  readonly #plan: Plan;
  readonly #server: Radosgw;
  readonly #relay: LatencyRelay;
  readonly #dir: string;
  /** Disks that random writes have scattered. */
  readonly #scattered = new Set<SubjectName>();

  constructor(plan: Plan, server: Radosgw, relay: LatencyRelay, dir: string) {
    this.#plan = plan;
    this.#server = server;
    this.#relay = relay;
    this.#dir = dir;
  }

  #place(name: SubjectName): Place {
    const dir = join(this.#dir, name);
    mkdirSync(dir, { recursive: true });
    return {
      dir,
      sizeBytes: this.#plan.sizeMb * MIB,
      cacheBytes: this.#plan.cacheMb * MIB,
      programs: this.#plan.programs,
    };
  }

  #bucket(name: SubjectName, latencyMs: number): Bucket {
    const { accessKeyId, secretAccessKey, region } = this.#server;
    const { endpoint } = latencyMs > 0 ? this.#relay : this.#server;
    return { endpoint, region, accessKeyId, secretAccessKey, bucket: `bench-${name}` };
  }

  /** A disk full of data. */
  async prepare(name: SubjectName): Promise<void> {
    const bucket = this.#bucket(name, 0);
    await bucketRequest(this.#server, bucket.bucket, 'PUT');
    await this.#fill(name);
  }

  async #fill(name: SubjectName): Promise<void> {
    const bucket = this.#bucket(name, 0);
    const running = await Running.start(subjects[name], bucket, this.#place(name));
    try {
      await this.#fio(running, ['--rw=write', '--bs=1M', '--iodepth=4', '--end_fsync=1']);
    } finally {
      await running.stop();
    }
    this.#scattered.delete(name);
    this.#plan.onProgress(`filled ${subjects[name].name}`);
  }

  async run(name: SubjectName, job: Job, round: number): Promise<Sample[]> {
    const subject = subjects[name];
    if (scatters(job)) this.#scattered.add(name);
    else if (this.#scattered.has(name)) await this.#fill(name);
    this.#relay.delayMs = job.latencyMs;
    // A new process for each job: caches are cold, and memory is this job's.
    const bucket = this.#bucket(name, job.latencyMs);
    const running = await Running.start(subject, bucket, this.#place(name));
    try {
      const work = [
        `--rw=${job.rw}`,
        `--bs=${job.blockSize}`,
        `--iodepth=${job.depth}`,
        `--numjobs=${job.processes}`,
        ...(job.sync ? ['--fsync=1'] : []),
        '--group_reporting',
        // FUSE does its work while a request is submitted.
        '--lat_percentiles=1',
        '--norandommap',
      ];
      const measured = this.#measured(job);
      await this.#warmUp(running, job, work);
      const before = await this.#server.requests();
      const result = await this.#fio(running, [...work, ...measured, `--randseed=${round}`]);
      running.assertAlive();
      const requests = (await this.#server.requests()) - before;
      const add = (metric: (typeof metrics)[keyof typeof metrics], value: number): Sample => ({
        job: job.name,
        metric,
        subject: subject.name,
        round,
        value,
      });
      return [
        job.blockSize >= MIB
          ? add(metrics.throughput, result.bytesPerSecond / 1e6)
          : add(metrics.iops, result.iops),
        add(metrics.p99, result.p99Ns / 1e6),
        add(metrics.requests, (requests / result.operations) * 1000),
        add(metrics.memory, running.peak.residentMib),
        add(metrics.anonymous, running.peak.anonymousMib),
      ];
    } finally {
      await running.stop();
    }
  }

  /** Where and for how long. */
  #measured({ cache, rw }: Job): string[] {
    const { sizeMb, seconds } = this.#plan;
    const timed = ['--time_based', `--runtime=${seconds}`];
    switch (cache) {
      case 'filling':
        return [];
      case 'warm':
        return [`--size=${warmMb}M`, ...timed];
      case 'cold':
        return [`--offset=${this.#apartMb}M`, `--size=${sizeMb - this.#apartMb}M`, ...timed];
      case 'full':
        return timed;
      case 'any':
        return [...timed, ...(rw.endsWith('write') ? ['--end_fsync=1'] : [])];
    }
  }

  /** The part of the disk where those warm up whose caches are to have nothing of the rest. */
  get #apartMb(): number {
    return this.#plan.sizeMb / 8;
  }

  async #warmUp(running: Running, { cache }: Job, work: readonly string[]): Promise<void> {
    const { sizeMb, cacheMb } = this.#plan;
    const timed = ['--time_based', `--runtime=${warmUpSeconds}`];
    switch (cache) {
      case 'filling':
        return;
      case 'warm':
        await this.#fio(running, ['--rw=read', '--bs=128k', '--iodepth=4', `--size=${warmMb}M`]);
        break;
      case 'cold':
        await this.#fio(running, [...work, `--size=${this.#apartMb}M`, ...timed]);
        break;
      case 'full':
        // The end of the disk: what follows begins at the other one, and finds nothing of its own in the cache.
        await this.#fio(running, [...work, `--offset=${sizeMb - cacheMb}M`, `--size=${cacheMb}M`]);
        break;
      case 'any':
        await this.#fio(running, [...work, ...timed, '--randseed=0']);
        break;
    }
  }

  async #fio(running: Running, args: readonly string[]): Promise<FioResult> {
    const { sizeMb, seconds } = this.#plan;
    const all = [
      '--name=job',
      '--output-format=json',
      `--size=${sizeMb}M`,
      ...running.fio,
      ...args,
    ];
    const [program, line] = onLeash(['fio', ...all]);
    const child = spawn(program, line, { stdio: ['ignore', 'pipe', 'pipe'] });
    let output = '';
    let errors = '';
    child.stdout.setEncoding('utf8').on('data', (text: string) => (output += text));
    child.stderr.setEncoding('utf8').on('data', (text: string) => (errors += text));
    const limit = setTimeout(() => child.kill('SIGKILL'), (seconds * 4 + 300) * 1000);
    const code = await new Promise<number | null>((resolve, reject) => {
      child.once('error', reject);
      child.once('close', resolve);
    });
    clearTimeout(limit);
    running.assertAlive();
    if (code !== 0)
      throw new Error(
        `fio ${all.join(' ')}: ${code ?? 'stopped'}: ${errors}${output.slice(0, 500)}`,
      );
    return parseFio(output, all.join(' '));
  }
}
