// SPDX-License-Identifier: Apache-2.0
/**
 * The same image over NBD from our store on the simulated kernel, and from qemu-nbd: fio's own NBD client
 * drives both, in turns. Wall clock on this machine; the image files lie in memory (/dev/shm).
 *
 * What differs from a real kernel: the way of a command from NBD's socket to the ring costs ours a hop
 * between threads more than it costs qemu-nbd, which has the request at once.
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { type Job, metrics } from '../disk.js';
import { parseFio } from '../fio.js';
import type { Sample } from '../report.js';

export type Kind = 'allocated' | 'fresh' | 'chain';
export type QcowJob = Job & { kind: Kind };

export const servers = { ours: 'ours', qemu: 'qemu-nbd' } as const;
export type Server = keyof typeof servers;

const MIB = 2 ** 20;
/** What one run takes of an image whose clusters can be new only once. */
const FRESH = 256 * MIB;

export interface NbdPlan {
  root: string;
  jobs: readonly QcowJob[];
  rounds: number;
  sizeMb: number;
  /** Seconds a run. */
  runtime: number;
  onProgress: (text: string) => void;
}

function qemuImg(...args: string[]): void {
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', ...args]);
}

function makeImage(path: string, kind: Kind, size: number): void {
  if (kind === 'fresh') return qemuImg(path, String(64 * 1024 * MIB));
  const base = kind === 'chain' ? `${path}.base` : path;
  qemuImg(base, String(size));
  execFileSync('qemu-io', ['-f', 'qcow2', '-c', `write -q -P 1 0 ${size}`, base]);
  if (kind === 'allocated') return;
  qemuImg('-b', base, '-F', 'qcow2', `${path}.middle`);
  qemuImg('-b', `${path}.middle`, '-F', 'qcow2', path);
}

/** An image, served: lives until `stop`. */
class Export {
  readonly server: Server;
  readonly kind: Kind;
  readonly #child: ChildProcess;
  readonly #socket: string;
  #used = 0;

  private constructor(server: Server, kind: Kind, child: ChildProcess, socket: string) {
    this.server = server;
    this.kind = kind;
    this.#child = child;
    this.#socket = socket;
  }

  static async start(plan: NbdPlan, dir: string, server: Server, kind: Kind): Promise<Export> {
    const image = join(dir, `${server}-${kind}.qcow2`);
    const socket = join(dir, `${server}-${kind}.sock`);
    makeImage(image, kind, plan.sizeMb * MIB);
    const command =
      server === 'ours'
        ? [process.execPath, join(plan.root, 'build/bench/qcow/server.mjs'), image, socket]
        : ['qemu-nbd', '-t', '-f', 'qcow2', '--discard=unmap', '-e', '8', '-k', socket, image];
    const [program = '', ...args] = command;
    const child = spawn(program, args, { stdio: ['ignore', 'ignore', 'inherit'] });
    for (let i = 0; !existsSync(socket); i++) {
      if (i > 200 || child.exitCode !== null) throw new Error(`${command.join(' ')}: no socket`);
      await sleep(50);
    }
    return new Export(server, kind, child, socket);
  }

  /** One run of fio. @throws Error with fio's words */
  run(job: QcowJob, runtime: number): string {
    const amount =
      this.kind === 'fresh'
        ? [`--offset=${this.#used}`, `--size=${FRESH}`, `--io_size=${FRESH / 16}`]
        : ['--norandommap', '--randseed=1', '--time_based', `--runtime=${runtime}`];
    if (this.kind === 'fresh') this.#used += FRESH;
    return execFileSync(
      'fio',
      [
        ...['--name=job', '--ioengine=nbd', `--uri=nbd+unix:///?socket=${this.#socket}`],
        ...[`--rw=${job.rw}`, `--bs=${job.blockSize}`, `--iodepth=${job.depth}`],
        ...[...amount, '--output-format=json'],
      ],
      { encoding: 'utf8', maxBuffer: 1 << 26 },
    );
  }

  async stop(): Promise<void> {
    if (this.#child.exitCode !== null) return;
    const ended = new Promise((resolve) => this.#child.once('exit', resolve));
    this.#child.kill('SIGTERM');
    await ended;
  }
}

/** Samples of all jobs on both servers, the one that goes first alternating. */
export async function measureNbd(plan: NbdPlan): Promise<Sample[]> {
  const dir = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'tcmu-bench-'));
  const running: Export[] = [];
  const samples: Sample[] = [];
  try {
    for (const kind of new Set(plan.jobs.map((job) => job.kind))) {
      for (const server of ['ours', 'qemu'] as const) {
        running.push(await Export.start(plan, dir, server, kind));
      }
    }
    for (const { kind, ...job } of plan.jobs) {
      const pair = running.filter((each) => each.kind === kind);
      // A just-in-time compiler needs its seconds; what is measured is the steady state, for both.
      for (const each of pair) each.run({ ...job, kind }, 2);
    }
    for (let round = 1; round <= plan.rounds; round++) {
      for (const job of plan.jobs) {
        const pair = running.filter((each) => each.kind === job.kind);
        if (round % 2 === 0) pair.reverse();
        for (const each of pair) {
          const fio = parseFio(each.run(job, plan.runtime), `${job.name} on ${each.server}`);
          const add = (metric: Sample['metric'], value: number) =>
            samples.push({ job: job.name, metric, subject: servers[each.server], round, value });
          if (job.blockSize < MIB) add(metrics.iops, fio.iops);
          else add(metrics.throughput, fio.bytesPerSecond / 1e6);
          add(metrics.p99, fio.p99Ns / 1000);
          plan.onProgress(`nbd ${round} ${job.name} ${each.server}`);
        }
      }
    }
    return samples;
  } finally {
    for (const each of running) await each.stop();
    rmSync(dir, { recursive: true, force: true });
  }
}
