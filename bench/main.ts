// SPDX-License-Identifier: Apache-2.0
/** `npm run bench`: what was asked for, the measurements, the table, the bars. See docs in bench/README.md. */
import { cpus, release } from 'node:os';
import { parseArgs } from 'node:util';
import { bars, jobs, measure, type Setting, type Subject, settings, subjects } from './disk.js';
import { checkBars, formatTable, type Sample, summarise, writeJson } from './report.js';

const usage = `npm run bench -- [options]

  --only <setting>      uml (wall clock in user-mode Linux) or icount (instructions, in QEMU). Default: both
  --rounds <n>          rounds in user-mode Linux, interleaved; counted instructions take at most 2. Default 5
  --jobs <names>        comma-separated, of: ${jobs.map(({ name }) => name).join(', ')}
  --subjects <names>    comma-separated, of: ${Object.keys(subjects).join(', ')}
  --size <MiB>          of each subject's file, on tmpfs. Default 256
  --kernel <release>    Debian's kernel that instructions are counted on. Default: the newest installed, or apt's
  --json <file>         write the results there too
  --no-setup            measure what is built, install nothing

Exit code: 0 when all bars that were measured are met, 1 when one is not, 2 when the benchmark failed.
`;

class UsageError extends Error {}

function pick<T extends string>(text: string | undefined, all: readonly T[], option: string): T[] {
  if (text === undefined) return [...all];
  return text.split(',').map((name) => {
    const found = all.find((candidate) => candidate === name);
    if (!found) throw new UsageError(`--${option}: ${name} is none of ${all.join(', ')}`);
    return found;
  });
}

function positive(text: string, option: string): number {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1) {
    throw new UsageError(`--${option}: ${text} is not a positive whole number`);
  }
  return value;
}

function options() {
  const { values } = parseArgs({
    options: {
      only: { type: 'string' },
      rounds: { type: 'string', default: '5' },
      jobs: { type: 'string' },
      subjects: { type: 'string' },
      size: { type: 'string', default: '256' },
      kernel: { type: 'string' },
      json: { type: 'string' },
      'no-setup': { type: 'boolean' },
      help: { type: 'boolean', short: 'h' },
    },
  });
  const names = jobs.map(({ name }) => name);
  const wanted = pick(values.jobs, names, 'jobs');
  return {
    help: values.help ?? false,
    json: values.json,
    settings: pick<Setting>(values.only, settings, 'only'),
    jobs: jobs.filter(({ name }) => wanted.includes(name)),
    subjects: pick(values.subjects, Object.keys(subjects) as Subject[], 'subjects'),
    rounds: positive(values.rounds, 'rounds'),
    sizeMb: positive(values.size, 'size'),
    kernel: values.kernel,
  };
}

async function main(): Promise<number> {
  const { help, json, settings: chosen, ...plan } = options();
  if (help) {
    process.stdout.write(usage);
    return 0;
  }
  const root = process.cwd();
  const onProgress = (text: string) => process.stderr.write(`${text}\n`);
  const samples: Sample[] = [];
  for (const setting of chosen) {
    const started = Date.now();
    samples.push(...(await measure(setting, { ...plan, root, onProgress })));
    console.log(`${setting}: measured in ${Math.round((Date.now() - started) / 1000)} s`);
  }
  const meta = {
    date: new Date().toISOString(),
    host: { kernel: release(), cpu: cpus()[0]?.model, cpus: cpus().length },
    node: process.version,
    settings: chosen,
    rounds: plan.rounds,
    fileMiB: plan.sizeMb,
    ...(plan.kernel === undefined ? {} : { countedOn: plan.kernel }),
  };
  const report = summarise(meta, samples, subjects.ours);
  console.log(`\n${formatTable(report)}`);
  const checked = checkBars(report, bars);
  if (checked.text) console.log(`\nBars\n${checked.text}`);
  if (json !== undefined) writeJson(json, report);
  return checked.met ? 0 : 1;
}

try {
  process.exitCode = await main();
} catch (error) {
  const usageError =
    error instanceof UsageError ||
    (error as NodeJS.ErrnoException).code?.startsWith('ERR_PARSE_ARGS');
  console.error(`bench: ${(error as Error).message}${usageError ? `\n\n${usage}` : ''}`);
  process.exitCode = 2;
}
