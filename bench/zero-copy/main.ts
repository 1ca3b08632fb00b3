// SPDX-License-Identifier: Apache-2.0
/**
 * `npm run bench:zero-copy`: what one command costs, copied and with zero copy, in instructions of the whole stack.
 *
 * Contract: guest.sh measures in QEMU under -icount, where a guest's clock is the instructions executed (4 ns each), so 250,000,000
 * divided by fio's IOPS is the price of a command: fio, block layer, SCSI, LIO, handler, and what the handler does its I/O
 * with. Caches, TLB misses and the flushes that unmapping causes are not in it. The exit code is 1 when a bar is missed.
 */
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { runQemu } from '../../test/vm/qemu.js';
import { baseModules } from '../../test/vm/vm.js';
import { parseFio } from '../fio.js';

const handlers = ['c-null', 'c-memory', 'c-file', 'null', 'file', 'socket'] as const;
const modes = ['copy', 'scrub-on', 'scrub-off'] as const;
const KIB = 1024;
const jobs = (['write', 'read'] as const).flatMap((rw) =>
  [4, 16, 64, 256, 1024].flatMap((kib) =>
    [1, 16].map((depth) => ({ name: `${rw}-${kib}k-d${depth}`, rw, kib, depth })),
  ),
);
type Mode = (typeof modes)[number];
type Job = (typeof jobs)[number];
const NS_PER_INSTRUCTION = 4;

/**
 * The most that zero copy may cost, as a share of copy mode's price. Large commands: for handlers whose data doesn't pass through
 * JavaScript; what the socket handler does with it costs the same in both modes.
 */
function bar(handler: string, mode: Mode, { rw, kib, depth }: Job): number | undefined {
  if (mode === 'copy') return undefined;
  if (kib === 4 && depth === 16) return 1.05;
  if (kib !== 1024 || handler === 'socket') return undefined;
  return rw === 'read' && mode === 'scrub-on' ? 0.85 : 0.6;
}

const { values } = parseArgs({
  options: {
    release: { type: 'string', default: '' },
    handlers: { type: 'string', default: handlers.join(',') },
    jobs: { type: 'string', default: jobs.map(({ name }) => name).join(',') },
    runtime: { type: 'string', default: '250' },
    'min-bytes': { type: 'string' },
    minutes: { type: 'string', default: '90' },
    json: { type: 'string' },
  },
});
const chosenHandlers = values.handlers.split(',');
const chosenJobs = jobs.filter(({ name }) => values.jobs.split(',').includes(name));

const root = process.cwd();
const build = join(root, 'build/zero-copy', values.release);
const outDir = mkdtempSync(join(tmpdir(), 'tcmu-bench-'));
process.once('exit', () => rmSync(outDir, { recursive: true, force: true }));
const hot = [
  process.execPath,
  '/usr/bin/fio',
  join(root, 'dist'),
  join(root, 'examples/file/dist'),
  join(root, 'build/addon/Release/tcmu.node'),
  ...['consumer', 'peer', 'handlers.js', 'target_core_user.ko'].map((name) => join(build, name)),
];
const result = await runQemu({
  command: ['bash', join(root, 'bench/zero-copy/guest.sh')],
  kernel: values.release,
  cwd: root,
  cacheDir: join(root, 'build/vm'),
  icount: true,
  hot,
  outDir,
  memoryMb: 2048,
  timeoutSeconds: Number(values.minutes) * 60,
  modules: [...baseModules.filter((name) => name !== 'target_core_user'), 'uio'],
  env: {
    BUILD: build,
    NODE: process.execPath,
    CLI: join(root, 'examples/file/dist/cli.js'),
    HANDLERS: chosenHandlers.join(' '),
    MODES: modes.join(' '),
    RUNTIME: values.runtime,
    MIN_BYTES: values['min-bytes'] ?? '',
    JOBS: chosenJobs
      .map(({ name, rw, kib, depth }) => `${name} ${rw} ${kib * KIB} ${depth}`)
      .join('\n'),
  },
  onLine: (line) => {
    if (line.startsWith('bench: ')) process.stderr.write(`${line}\n`);
  },
});
if (!result.output.includes('bench: finished')) {
  const tails = [result.output, result.kernelLog].map((text) =>
    text.trim().split('\n').slice(-15).join('\n'),
  );
  console.error(`bench: ${result.timedOut ? 'out of time' : 'failed'}\n${tails.join('\n')}`);
  process.exit(2);
}
let met = true;
const prices: { handler: string; job: string; mode: Mode; instructions: number; share: number }[] =
  [];
const lines: string[] = [];
for (const handler of chosenHandlers) {
  for (const job of chosenJobs) {
    const price = (mode: Mode): number => {
      const name = `${handler}.${mode}.${job.name}`;
      const { iops } = parseFio(readFileSync(join(outDir, `${name}.json`), 'utf8'), name);
      return 1e9 / NS_PER_INSTRUCTION / iops;
    };
    const copy = price('copy');
    const cells = modes.map((mode) => {
      const instructions = price(mode);
      const share = instructions / copy;
      prices.push({ handler, job: job.name, mode, instructions, share });
      const limit = bar(handler, mode, job);
      const missed = limit !== undefined && share > limit;
      if (missed) met = false;
      const compared =
        mode === 'copy' ? '' : ` (${share.toFixed(2)}${missed ? `, NOT ${limit}` : ''})`;
      return `${(instructions / 1000).toFixed(1)}${compared}`;
    });
    lines.push(`| ${[handler, job.name, ...cells].join(' | ')} |`);
  }
}
console.log(`Thousand instructions a command; in brackets, as a share of copy mode.

| handler | job | ${modes.join(' | ')} |
| --- | --- | ${modes.map(() => '---').join(' | ')} |
${lines.join('\n')}
`);
for (const handler of chosenHandlers) {
  const stats = join(outDir, `${handler}.scrub-on.stats`);
  if (existsSync(stats)) {
    console.log(
      `${handler}, scrub-on: ${readFileSync(stats, 'utf8').trim().replaceAll('\n', ', ')}`,
    );
  }
}
if (values.json !== undefined) {
  writeFileSync(values.json, `${JSON.stringify({ node: process.version, prices }, null, 2)}\n`);
}
console.log(met ? 'all bars are met' : 'a bar is missed');
process.exitCode = met ? 0 : 1;
