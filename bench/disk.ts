// SPDX-License-Identifier: Apache-2.0
/**
 * The disk benchmark: fio over the file example and its peers, in a test kernel.
 *
 * Contract: `bench/guest.sh` measures inside the guest and leaves files; this module says what to measure, boots, and turns the files into
 * samples. Two settings. `uml`, user-mode Linux: wall clock, where only ratios within one boot mean something. `icount`, QEMU
 * counting instructions: guest time is 4 ns an instruction of the whole stack (fio, block layer, target, handler), so what is
 * left of a second for one command is its price. It sees neither caches nor the cost of a switch as such.
 */
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { runQemu } from '../test/vm/qemu.js';
import { runUml } from '../test/vm/uml.js';
import { baseModules, type VmOptions, type VmResult } from '../test/vm/vm.js';
import { parseFio } from './fio.js';
import type { Bar, Metric, Sample } from './report.js';

export const settings = ['uml', 'icount'] as const;
export type Setting = (typeof settings)[number];

/** Names in the reports, by their names in guest.sh. */
export const subjects = { ours: 'ours', runner: 'tcmu-runner', fileio: 'fileio' } as const;
export type Subject = keyof typeof subjects;

export interface Job {
  name: string;
  /** `write:60k`: 60 KiB are left out between writes. */
  rw: 'randread' | 'randwrite' | 'read' | 'write' | 'write:60k';
  blockSize: number;
  depth: number;
}

const KIB = 1024;
export const jobs: readonly Job[] = (
  [
    ['randread', 4 * KIB, 1],
    ['randread', 4 * KIB, 32],
    ['randwrite', 4 * KIB, 1],
    ['randwrite', 4 * KIB, 32],
    ['read', 128 * KIB, 8],
    ['write', 128 * KIB, 8],
    ['read', 1024 * KIB, 4],
    ['write', 1024 * KIB, 4],
  ] as const
).map(([rw, blockSize, depth]) => ({
  name: `${rw}-${blockSize / KIB}k-d${depth}`,
  rw,
  blockSize,
  depth,
}));

export const metrics = {
  iops: { name: 'iops', unit: '1/s', better: 'higher' },
  throughput: { name: 'throughput', unit: 'MB/s', better: 'higher' },
  p99: { name: 'p99', unit: 'µs', better: 'lower' },
  hops: { name: 'hops', unit: 'switches/command', better: 'lower' },
  instructions: { name: 'instructions', unit: '1/command', better: 'lower' },
  syscalls: { name: 'icount-syscalls', unit: 'calls/command', better: 'lower' },
  countedHops: { name: 'icount-hops', unit: 'switches/command', better: 'lower' },
} as const satisfies Record<string, Metric>;

export const bars: readonly Bar[] = [
  bar('instructions', 'tcmu-runner', 1.2, ({ depth }) => depth === 1),
  bar('instructions', 'tcmu-runner', 1.3, ({ depth }) => depth === 32),
  bar('instructions', 'tcmu-runner', 1, ({ blockSize }) => blockSize > 4 * KIB),
  bar('instructions', 'fileio', 0.7, ({ depth }) => depth === 32),
  bar('iops', 'tcmu-runner', 1.3, ({ depth }) => depth === 1),
  bar('iops', 'tcmu-runner', 2, ({ depth }) => depth === 32),
  bar('throughput', 'tcmu-runner', 2, ({ blockSize }) => blockSize > 4 * KIB),
];

function bar(metric: string, peer: string, ratio: number, holds: (job: Job) => boolean): Bar {
  return { metric, peer, ratio, jobs: jobs.filter(holds).map(({ name }) => name) };
}

export interface Plan {
  root: string;
  jobs: readonly Job[];
  subjects: readonly Subject[];
  rounds: number;
  sizeMb: number;
  /** Release of the Debian kernel that counts are made on; default: Debian's newest. */
  kernel?: string | undefined;
  /** What the disks are made of; `make_image` in guest.sh. Default `raw`. */
  image?: 'raw' | 'allocated' | 'chain';
  /** The example under test, and what its command line takes before the image. Default: the file example. */
  example?: { dir: string; arguments: readonly string[] };
  onProgress: (text: string) => void;
}

/** Nobody writes to a chain here: it would become an image of its own. */
const warmUp = { raw: 'randrw', allocated: 'randrw', chain: 'randread' };

const fileExample = { dir: 'examples/file', arguments: [] };

/** What differs between the settings. Instruction counts hardly vary, so few and short rounds do. */
const runs = {
  uml: { rounds: (wanted: number) => wanted, runtime: 2000, minutes: 20 },
  icount: { rounds: (wanted: number) => Math.min(wanted, 2), runtime: 2000, minutes: 30 },
};

/** @throws Error saying which step failed in which setting, with the guest's own words */
export async function measure(setting: Setting, plan: Plan): Promise<Sample[]> {
  const outDir = mkdtempSync(join(tmpdir(), 'tcmu-bench-'));
  const cleanUp = () => rmSync(outDir, { recursive: true, force: true });
  process.once('exit', cleanUp); // A signal ends the process without the finally below.
  try {
    const result = await boot(setting, plan, outDir);
    const failure = /^bench: failed: ([\s\S]*)/m.exec(result.output)?.[1];
    if (failure !== undefined) {
      throw new Error(`${setting}: ${failure.trimEnd()}\n${lastLines(result.output)}`);
    }
    if (result.exitCode !== 0 || !result.output.includes('bench: finished')) {
      const why = result.timedOut ? 'it ran out of time' : `exit code ${result.exitCode ?? 'none'}`;
      const tails = [result.output, result.kernelLog].map(lastLines);
      throw new Error(`${setting}: ${why}\n${tails.join('\n')}`);
    }
    return collect(setting, plan, outDir);
  } finally {
    process.removeListener('exit', cleanUp);
    cleanUp();
  }
}

function lastLines(text: string): string {
  return text.trim().split('\n').slice(-10).join('\n');
}

async function boot(setting: Setting, plan: Plan, outDir: string): Promise<VmResult> {
  const { rounds, runtime, minutes } = runs[setting];
  const { image = 'raw', example = fileExample } = plan;
  const dist = join(plan.root, example.dir, 'dist');
  const command = [process.execPath, join(dist, 'cli.js'), ...example.arguments].join(' ');
  const options: VmOptions = {
    command: ['bash', join(plan.root, 'bench/guest.sh')],
    cwd: plan.root,
    outDir,
    memoryMb: 2048 + plan.subjects.length * plan.sizeMb,
    timeoutSeconds: minutes * 60 * Math.max(1, rounds(plan.rounds) / 5),
    modules: [...baseModules, 'target_core_file'],
    env: {
      SUBJECTS: plan.subjects.join(' '),
      ROUNDS: String(rounds(plan.rounds)),
      RUNTIME: String(runtime),
      SIZE_MB: String(plan.sizeMb),
      JOBS: plan.jobs
        .map(({ name, rw, blockSize, depth }) => `${name} ${rw} ${blockSize} ${depth}`)
        .join('\n'),
      OURS: `${command} PATH --name bench --max-sectors 2048 --nice 10 --export loopback`,
      IMAGE: image,
      WARM_UP: warmUp[image],
      COUNT: setting === 'icount' ? '1' : '0',
    },
    onLine: (line) => {
      if (line.startsWith('bench: measured')) plan.onProgress(`${setting} ${line.slice(16)}`);
    },
  };
  if (setting === 'uml') return runUml(options);
  const hot = [
    process.execPath,
    '/usr/bin/fio',
    '/usr/bin/tcmu-runner',
    '/usr/bin/dbus-daemon',
    ...glob('/usr/lib/x86_64-linux-gnu/tcmu-runner'),
    ...(image === 'raw' ? [] : ['/usr/bin/qemu-img', '/usr/bin/qemu-io']),
    join(plan.root, 'dist'),
    dist,
    join(plan.root, 'build/addon/Release/tcmu.node'),
  ].filter((path) => existsSync(path));
  const { kernel, root } = plan;
  const which = kernel === undefined ? {} : { kernel };
  return runQemu({ ...options, ...which, icount: true, hot, cacheDir: join(root, 'build/vm') });
}

function collect(setting: Setting, plan: Plan, outDir: string): Sample[] {
  const samples: Sample[] = [];
  const read = (name: string) => {
    const file = join(outDir, name);
    return existsSync(file) ? readFileSync(file, 'utf8') : undefined;
  };
  for (const job of plan.jobs) {
    for (const subject of plan.subjects) {
      for (let round = 1; round <= runs[setting].rounds(plan.rounds); round++) {
        const base = `${round}.${job.name}.${subject}`;
        const add = (metric: Metric, value: number) =>
          samples.push({ job: job.name, metric, subject: subjects[subject], round, value });
        const fio = parseFio(read(`${base}.json`) ?? '', base);
        if (setting === 'uml') {
          if (job.blockSize === 4 * KIB) add(metrics.iops, fio.iops);
          else add(metrics.throughput, fio.bytesPerSecond / 1e6);
          add(metrics.p99, fio.p99Ns / 1000);
          const counts = read(`${base}.switches`);
          if (counts) add(metrics.hops, parseSwitches(counts));
        } else {
          add(metrics.instructions, 1e9 / instructionNs / fio.iops);
          const counts = read(`${base}.trace.commands`);
          if (counts === undefined) continue;
          const [before = Number.NaN, after = Number.NaN] = numbers(counts);
          const tasks = new Set(numbers(read(`${base}.trace.tasks`) ?? ''));
          const per = (hits: number) => hits / (after - before);
          const calls = read(`${base}.trace.calls`) ?? '';
          add(metrics.syscalls, per(sumHistogram(calls, 'common_pid', tasks)));
          const hops = read(`${base}.trace.switches`) ?? '';
          add(metrics.countedHops, per(sumHistogram(hops, 'next_pid', tasks)));
        }
      }
    }
  }
  return samples;
}

/** QEMU's -icount shift=2. */
const instructionNs = 4;

/** Context switches a command, from "commands switches" before and after. */
function parseSwitches(text: string): number {
  const [commands = Number.NaN, switches = Number.NaN, ...after] = numbers(text);
  return ((after[1] ?? Number.NaN) - switches) / ((after[0] ?? Number.NaN) - commands);
}

function numbers(text: string): number[] {
  return text.trim().split(/\s+/).filter(Boolean).map(Number);
}

/** The hits of all entries of a tracing histogram (Documentation/trace/histogram.rst) whose key is among those wanted. */
export function sumHistogram(text: string, key: string, wanted: ReadonlySet<number>): number {
  let sum = 0;
  for (const [, keys = '', hits] of text.matchAll(/^\{(.*)\} hitcount:\s*(\d+)/gm)) {
    const value = new RegExp(`\\b${key}:\\s*(\\d+)`).exec(keys)?.[1];
    if (value !== undefined && wanted.has(Number(value))) sum += Number(hits);
  }
  return sum;
}

function glob(dir: string): string[] {
  return existsSync(dir) ? readdirSync(dir).map((name) => join(dir, name)) : [];
}
