// SPDX-License-Identifier: Apache-2.0
/** `npm run bench:qcow`: the qcow2 example beside qemu-nbd and tcmu-runner. See bench/README.md. */
import { cpus, release } from 'node:os';
import { parseArgs } from 'node:util';
import { measure } from '../disk.js';
import {
  type Bar,
  checkBars,
  formatTable,
  type Report,
  type Sample,
  summarise,
  writeJson,
} from '../report.js';
import { type Kind, measureNbd, type QcowJob } from './nbd.js';

const settings = ['nbd', 'uml', 'icount'] as const;
const KIB = 1024;

export const jobs: readonly QcowJob[] = (
  [
    ['allocated', 'randread', 4, 1],
    ['allocated', 'randread', 4, 16],
    ['allocated', 'randwrite', 4, 1],
    ['allocated', 'randwrite', 4, 16],
    ['allocated', 'read', 1024, 4],
    ['allocated', 'write', 1024, 4],
    // One block in each cluster: every write allocates.
    ['fresh', 'write:60k', 4, 1],
    ['fresh', 'write:60k', 4, 16],
    ['chain', 'randread', 4, 1],
    ['chain', 'randread', 4, 16],
  ] as const
).map(([kind, rw, kib, depth]) => ({
  name: `${kind}-${rw.replace(/:.*/, '')}-${kib}k-d${depth}`,
  kind,
  rw,
  blockSize: kib * KIB,
  depth,
}));

const names = jobs.map(({ name }) => name);
const deep = jobs.filter(({ depth }) => depth === 16).map(({ name }) => name);

export const bars: readonly Bar[] = [
  { metric: 'iops', peer: 'qemu-nbd', ratio: 0.5, jobs: names },
  { metric: 'throughput', peer: 'qemu-nbd', ratio: 0.5, jobs: names },
  { metric: 'instructions', peer: 'tcmu-runner', ratio: 1.3, jobs: names },
  { metric: 'iops', peer: 'tcmu-runner', ratio: 2, jobs: deep },
];

const usage = `npm run bench:qcow -- [options]

  --only <setting>   nbd (beside qemu-nbd, here), uml (beside tcmu-runner, wall clock in user-mode Linux)
                     or icount (beside tcmu-runner, instructions, in QEMU). Default: all three
  --rounds <n>       rounds, interleaved; counted instructions take at most 2. Default 5
  --runtime <s>      seconds of one run over NBD. Default 3
  --jobs <names>     comma-separated, of: ${names.join(', ')}
  --size <MiB>       of an image. Default 128
  --kernel <release> Debian's kernel that instructions are counted on. Default: the newest installed, or apt's
  --json <file>      write the results there too
  --no-setup         measure what is built, install nothing

Exit code: 0 when all bars that were measured are met, 1 when one is not, 2 when the benchmark failed.
`;

async function main(): Promise<number> {
  const { values } = parseArgs({
    options: {
      only: { type: 'string', default: settings.join(',') },
      rounds: { type: 'string', default: '5' },
      runtime: { type: 'string', default: '3' },
      jobs: { type: 'string', default: names.join(',') },
      size: { type: 'string', default: '128' },
      kernel: { type: 'string' },
      json: { type: 'string' },
      'no-setup': { type: 'boolean' },
      help: { type: 'boolean', short: 'h' },
    },
  });
  if (values.help) {
    process.stdout.write(usage);
    return 0;
  }
  const wanted = values.jobs.split(',');
  const chosen = values.only.split(',');
  const unknown = [
    ...wanted.filter((name) => !names.includes(name)),
    ...chosen.filter((name) => !settings.some((setting) => setting === name)),
  ];
  const [rounds, runtime, sizeMb] = [values.rounds, values.runtime, values.size].map(Number);
  if (unknown.length > 0 || !rounds || !runtime || !sizeMb) {
    console.error(`bench: ${unknown.join(', ') || 'a number'}: not understood\n\n${usage}`);
    return 2;
  }
  const root = process.cwd();
  const onProgress = (text: string) => process.stderr.write(`${text}\n`);
  const mine = jobs.filter(({ name }) => wanted.includes(name));
  const samples: Sample[] = [];
  if (chosen.includes('nbd')) {
    samples.push(...(await measureNbd({ root, jobs: mine, rounds, sizeMb, runtime, onProgress })));
  }
  for (const setting of ['uml', 'icount'] as const) {
    if (!chosen.includes(setting)) continue;
    for (const image of new Set<Kind>(mine.map(({ kind }) => kind))) {
      // tcmu-runner 1.5.4 fails its first write to a new cluster of an image that QEMU made (EIO).
      if (image === 'fresh') continue;
      const plan = {
        root,
        jobs: mine.filter(({ kind }) => kind === image),
        subjects: ['ours', 'runner'] as const,
        rounds,
        sizeMb,
        kernel: values.kernel,
        image,
        example: { dir: 'examples/qcow', arguments: ['serve'] },
        onProgress,
      };
      samples.push(...(await measure(setting, plan)));
    }
  }
  const meta = {
    date: new Date().toISOString(),
    host: { kernel: release(), cpu: cpus()[0]?.model, cpus: cpus().length },
    node: process.version,
    settings: chosen,
    rounds,
    imageMiB: sizeMb,
  };
  const report: Report = summarise(meta, samples, 'ours');
  console.log(`\n${formatTable(report)}`);
  const checked = checkBars(report, bars);
  if (checked.text) console.log(`\nBars\n${checked.text}`);
  if (values.json !== undefined) writeJson(values.json, report);
  return checked.met ? 0 : 1;
}

try {
  process.exitCode = await main();
} catch (error) {
  console.error(`bench: ${(error as Error).message}`);
  process.exitCode = 2;
}
