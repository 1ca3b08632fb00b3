// SPDX-License-Identifier: Apache-2.0
/**
 * `npm run bench:ring`: handlers on the ring of the simulated kernel, beside one in C++; zero copy beside copying;
 * and, over NBD, beside other servers. See bench/README.md.
 */
import { type ChildProcess, execFile, spawn, spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { cpus, release, tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs, promisify } from 'node:util';
import { type BlockStore, type CommandHandler, type DataIn, type DataOut, Device } from 'tcmu';
import { BlockDevice } from 'tcmu/scsi';
import { SimulatedDevice, type SimulatedDeviceOptions, serveNbd } from 'tcmu/sim';
import { type Bar, checkBars, formatTable, type Sample, summarise, writeJson } from './report.js';

const usage = `npm run bench:ring -- [options]

  --only <part>      ring, zero-copy or nbd. Default: all
  --rounds <n>       interleaved rounds. Default 5
  --seconds <s>      of each measurement. Default 2
  --json <file>      write the results there too
  --no-setup         measure what is built, install nothing

Exit code: 0 when all bars that were measured are met, 1 when one is not, 2 when the benchmark failed.
`;

const DISK = 256 << 20;
const DEPTH = 32;
const SIZES = { '512': 512, '4k': 4096, '64k': 65536, '256k': 262144, '1M': 1 << 20 };
const HANDLERS = ['null', 'ram', 'file'] as const;
type HandlerKind = (typeof HANDLERS)[number];

const RATE = { name: 'rate', unit: 'commands/s', better: 'higher' } as const;
const P50 = { name: 'p50', unit: 'µs', better: 'lower' } as const;
const P99 = { name: 'p99', unit: 'µs', better: 'lower' } as const;
const CPU = { name: 'cpu', unit: 'µs/command', better: 'lower' } as const;

export const bars: Bar[] = [
  { metric: 'rate', peer: 'c++', ratio: 1 / 3, jobs: ['null-4k'] },
  {
    metric: 'rate',
    peer: 'copy',
    ratio: 1.5,
    jobs: [
      'zero-copy-read-256k',
      'zero-copy-read-1M',
      'zero-copy-write-256k',
      'zero-copy-write-1M',
    ],
  },
  { metric: 'rate', peer: 'copy', ratio: 0.9, jobs: ['zero-copy-read-4k', 'zero-copy-write-4k'] },
  { metric: 'rate', peer: 'nbdkit python', ratio: 1.5, jobs: ['nbd-randread-4k-d16'] },
  { metric: 'rate', peer: 'nbdkit memory', ratio: 0.6, jobs: ['nbd-randread-4k-d16'] },
];

interface Measured {
  commandsPerSecond: number;
  /** Seconds. */
  p50: number;
  p99: number;
  /** Seconds of the process per command: handler, simulated kernel and load. */
  cpu?: number;
}

/** What a newcomer would write: the README's. */
class RamDisk implements BlockStore {
  readonly #memory = new Uint8Array(DISK);
  readonly size = DISK;
  read(position: number, data: DataIn): void {
    data.copyFrom(this.#memory.subarray(position, position + data.length));
  }
  write(position: number, data: DataOut): void {
    data.copyTo(this.#memory, position);
  }
}

const nullHandler: CommandHandler = { handle: (command) => command.complete() };

async function handlerOf(kind: HandlerKind, file: string): Promise<CommandHandler> {
  if (kind === 'null') return nullHandler;
  if (kind === 'ram') return new BlockDevice(new RamDisk(), { serial: 'BENCH' });
  const { FileStore } = (await import(
    join(process.cwd(), 'examples/file/dist/index.js')
  )) as typeof import('../examples/file/src/index.js');
  return new BlockDevice(await FileStore.open(file), { serial: 'BENCH' });
}

async function measure(
  handler: CommandHandler,
  options: SimulatedDeviceOptions,
  load: { bytes: number; readShare?: number; milliseconds: number },
): Promise<Measured> {
  using kernel = new SimulatedDevice(options);
  const device = await Device.open(kernel.open(), { handler });
  // Its unit attention.
  await kernel.submit({ cdb: new Uint8Array(6) });
  const all = {
    depth: DEPTH,
    bytes: load.bytes,
    blocks: DISK / 512,
    readShare: load.readShare ?? 1,
  };
  await kernel.load({ ...all, duration: load.milliseconds / 4 });
  const before = process.cpuUsage();
  const report = await kernel.load({ ...all, duration: load.milliseconds });
  const { user, system } = process.cpuUsage(before);
  await device.close();
  if (report.failed > 0) throw new Error(`${report.failed} commands failed`);
  return {
    commandsPerSecond: report.commandsPerSecond,
    p50: report.latency.p50,
    p99: report.latency.p99,
    cpu: (user + system) / 1e6 / report.commands,
  };
}

function samplesOf(job: string, subject: string, round: number, measured: Measured): Sample[] {
  const { commandsPerSecond, p50, p99, cpu } = measured;
  const sample = (metric: Sample['metric'], value: number) => ({
    job,
    metric,
    subject,
    round,
    value,
  });
  return [
    sample(RATE, commandsPerSecond),
    sample(P50, p50 * 1e6),
    sample(P99, p99 * 1e6),
    ...(cpu === undefined ? [] : [sample(CPU, cpu * 1e6)]),
  ];
}

interface Plan {
  rounds: number;
  milliseconds: number;
  directory: string;
  native: string;
}

type Add = (job: string, subject: string, round: number, measured: Measured) => void;

async function ringPart({ rounds, milliseconds, directory, native }: Plan, add: Add) {
  const file = join(directory, 'disk.img');
  writeFileSync(file, '');
  truncateSync(file, DISK);
  for (let round = 1; round <= rounds; round++) {
    for (const kind of HANDLERS) {
      for (const [size, bytes] of Object.entries(SIZES)) {
        const job = `${kind}-${size}`;
        add(
          job,
          'ours',
          round,
          await measure(await handlerOf(kind, file), {}, { bytes, milliseconds }),
        );
        const args = [kind, `${bytes}`, `${DEPTH}`, `${milliseconds}`, file];
        const { stdout } = await promisify(execFile)(native, args);
        add(job, 'c++', round, JSON.parse(stdout) as Measured);
      }
    }
  }
}

async function zeroCopyPart({ rounds, milliseconds }: Plan, add: Add) {
  for (let round = 1; round <= rounds; round++) {
    for (const [size, bytes] of Object.entries(SIZES)) {
      for (const [direction, readShare] of [
        ['read', 1],
        ['write', 0],
      ] as const) {
        const job = `zero-copy-${direction}-${size}`;
        const load = { bytes, readShare, milliseconds };
        add(job, 'ours', round, await measure(nullHandler, { zeroCopy: true }, load));
        add(job, 'copy', round, await measure(nullHandler, {}, load));
        if (direction === 'read') {
          const unscrubbed = { zeroCopy: { scrub: false } };
          add(job, 'without scrub', round, await measure(nullHandler, unscrubbed, load));
        }
      }
    }
  }
}

interface NbdPeer {
  name: string;
  /** Serves at the socket until killed. */
  start(socket: string, directory: string): ChildProcess;
}

const PYTHON = `
disk = bytearray(${DISK})
API_VERSION = 2
def open(readonly):
    return 1
def get_size(h):
    return len(disk)
def pread(h, buf, offset, flags):
    buf[:] = disk[offset:offset+len(buf)]
def pwrite(h, buf, offset, flags):
    disk[offset:offset+len(buf)] = buf
`;

const peers: NbdPeer[] = [
  {
    name: 'nbdkit memory',
    start: (socket) => spawn('nbdkit', ['-f', '-U', socket, 'memory', `${DISK}`]),
  },
  {
    name: 'nbdkit python',
    start(socket, directory) {
      const script = join(directory, 'disk.py');
      writeFileSync(script, PYTHON);
      return spawn('nbdkit', ['-f', '-U', socket, 'python', script]);
    },
  },
  {
    name: 'qemu-nbd',
    start(socket, directory) {
      const file = join(directory, 'qemu.img');
      writeFileSync(file, '');
      truncateSync(file, DISK);
      return spawn('qemu-nbd', ['-f', 'raw', '-k', socket, '-t', file]);
    },
  },
];

interface FioReport {
  jobs: {
    error: number;
    read: { iops: number; clat_ns: { percentile: Record<string, number> } };
  }[];
}

async function fio(
  socket: string,
  depth: number,
  { milliseconds, directory }: Plan,
): Promise<Measured> {
  const output = join(directory, 'fio.json');
  await promisify(execFile)(
    'fio',
    [
      ...['--name=job', '--ioengine=nbd', `--uri=nbd+unix:///?socket=${socket}`, '--rw=randread'],
      ...['--bs=4k', `--iodepth=${depth}`, `--size=${DISK}`, '--time_based'],
      ...[`--runtime=${milliseconds / 1000}`, '--output-format=json', `--output=${output}`],
    ],
    { cwd: directory },
  );
  const text = readFileSync(output, 'utf8');
  const job = (JSON.parse(text.slice(text.indexOf('{\n'))) as FioReport).jobs[0];
  if (job === undefined || job.error !== 0) throw new Error(`fio at ${socket} met an error`);
  const { percentile } = job.read.clat_ns;
  return {
    commandsPerSecond: job.read.iops,
    p50: (percentile['50.000000'] ?? 0) / 1e9,
    p99: (percentile['99.000000'] ?? 0) / 1e9,
  };
}

async function nbdPart(plan: Plan, add: Add) {
  const { directory, rounds } = plan;
  const socketOf = (name: string) => join(directory, `${name.replace(' ', '-')}.sock`);
  const server = await serveNbd(new RamDisk(), { path: socketOf('ours') });
  const running = peers
    .filter(({ name }) => has(name.split(' ')[0] as string))
    .map((peer) => ({ name: peer.name, child: peer.start(socketOf(peer.name), directory) }));
  try {
    await sleep(1000);
    const names = ['ours', ...running.map(({ name }) => name)];
    for (let round = 1; round <= rounds; round++) {
      for (const depth of [1, 16]) {
        for (const name of names) {
          add(`nbd-randread-4k-d${depth}`, name, round, await fio(socketOf(name), depth, plan));
        }
      }
    }
  } finally {
    for (const { child } of running) child.kill();
    await server.close();
  }
}

function has(program: string): boolean {
  return spawnSync('sh', ['-c', `command -v ${program}`]).status === 0;
}

function compileNative(): string {
  const output = 'build/bench/ring-native';
  const sources = spawnSync('sh', ['-c', 'ls addon/sim/*.cc']).stdout.toString().trim().split('\n');
  const { status, stderr } = spawnSync('g++', [
    ...['-std=c++20', '-O2', '-pthread', '-o', output, 'bench/ring-native.cc', ...sources],
    'addon/memory/mapping_watch.cc',
  ]);
  if (status !== 0) throw new Error(`the C++ handler does not compile: ${stderr}`);
  return join(process.cwd(), output);
}

async function main(): Promise<number> {
  const { values } = parseArgs({
    options: {
      only: { type: 'string' },
      rounds: { type: 'string', default: '5' },
      seconds: { type: 'string', default: '2' },
      json: { type: 'string' },
      'no-setup': { type: 'boolean' },
      help: { type: 'boolean', short: 'h' },
    },
  });
  const parts = { ring: ringPart, 'zero-copy': zeroCopyPart, nbd: nbdPart };
  const wanted = Object.entries(parts).filter(
    ([name]) => values.only === undefined || name === values.only,
  );
  const [rounds, milliseconds] = [Number(values.rounds), Number(values.seconds) * 1000];
  if (values.help || wanted.length === 0 || !(rounds >= 1) || !(milliseconds >= 100)) {
    process.stdout.write(usage);
    return values.help ? 0 : 2;
  }
  const directory = mkdtempSync(join(tmpdir(), 'tcmu-bench-'));
  const samples: Sample[] = [];
  try {
    const plan = { rounds, milliseconds, directory, native: compileNative() };
    for (const [name, part] of wanted) {
      await part(plan, (job, subject, round, measured) => {
        process.stderr.write(
          `${name} round ${round}: ${job} ${subject} ${Math.round(measured.commandsPerSecond)}/s\n`,
        );
        samples.push(...samplesOf(job, subject, round, measured));
      });
    }
  } finally {
    rmSync(directory, { recursive: true });
  }
  const meta = {
    date: new Date().toISOString(),
    host: { kernel: release(), cpu: cpus()[0]?.model, cpus: cpus().length },
    node: process.version,
    depth: DEPTH,
    rounds,
    seconds: milliseconds / 1000,
  };
  const report = summarise(meta, samples, 'ours');
  console.log(`\n${formatTable(report)}`);
  const checked = checkBars(report, bars);
  if (checked.text) console.log(`\nBars\n${checked.text}`);
  if (values.json !== undefined) writeJson(values.json, report);
  return checked.met ? 0 : 1;
}

try {
  process.exitCode = await main();
} catch (error) {
  console.error(`bench:ring: ${(error as Error).message}`);
  process.exitCode = 2;
}
