// SPDX-License-Identifier: Apache-2.0
/** `npm run bench:s3`: what was asked for, the measurements, the table, the bars. See bench/README.md. */
import { cpus, release } from 'node:os';
import { dirname } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { checkBars, formatTable, summarise, writeJson } from '../report.js';
import { bars, jobs } from './jobs.js';
import { measure } from './measure.js';
import { type SubjectName, subjects } from './subjects.js';

const usage = `npm run bench:s3 -- [options]

  --jobs <parts>        comma-separated parts of names, of: ${jobs.map(({ name }) => name).join(', ')}
  --subjects <names>    comma-separated, of: ${Object.keys(subjects).join(', ')}
  --rounds <n>          interleaved. Default 3
  --seconds <n>         of each measurement. Default 5
  --size <MiB>          of each disk. Default 512
  --cache <MiB>         memory for data, of those that have any. Default 256
  --json <file>         write the results there too
  --no-setup            measure what is built, install nothing

Exit code: 0 when all bars that were measured are met, 1 when one is not, 2 when the benchmark failed.
`;

class UsageError extends Error {}

function positive(text: string, option: string): number {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1) {
    throw new UsageError(`--${option}: ${text} is not a positive whole number`);
  }
  return value;
}

function chosenJobs(text: string | undefined) {
  const parts = text?.split(',') ?? [''];
  for (const part of parts) {
    if (!jobs.some(({ name }) => name.includes(part))) {
      throw new UsageError(`--jobs: no job is named like ${part}`);
    }
  }
  return jobs.filter(({ name }) => parts.some((part) => name.includes(part)));
}

function chosenSubjects(text: string | undefined): SubjectName[] {
  const all = Object.keys(subjects) as SubjectName[];
  return (text?.split(',') ?? all).map((name) => {
    const found = all.find((candidate) => candidate === name);
    if (!found) throw new UsageError(`--subjects: ${name} is none of ${all.join(', ')}`);
    return found;
  });
}

async function main(): Promise<number> {
  const { values } = parseArgs({
    options: {
      jobs: { type: 'string' },
      subjects: { type: 'string' },
      rounds: { type: 'string', default: '3' },
      seconds: { type: 'string', default: '5' },
      size: { type: 'string', default: '512' },
      cache: { type: 'string', default: '256' },
      json: { type: 'string' },
      'no-setup': { type: 'boolean' },
      help: { type: 'boolean', short: 'h' },
    },
  });
  if (values.help) {
    process.stdout.write(usage);
    return 0;
  }
  const plan = {
    jobs: chosenJobs(values.jobs),
    subjects: chosenSubjects(values.subjects),
    rounds: positive(values.rounds, 'rounds'),
    seconds: positive(values.seconds, 'seconds'),
    sizeMb: positive(values.size, 'size'),
    cacheMb: positive(values.cache, 'cache'),
  };
  const samples = await measure({
    ...plan,
    programs: dirname(fileURLToPath(import.meta.url)),
    onProgress: (text) => process.stderr.write(`${text}\n`),
  });
  const meta = {
    date: new Date().toISOString(),
    host: { kernel: release(), cpu: cpus()[0]?.model, cpus: cpus().length },
    node: process.version,
    rounds: plan.rounds,
    seconds: plan.seconds,
    diskMiB: plan.sizeMb,
    cacheMiB: plan.cacheMb,
    subjects: Object.fromEntries(
      plan.subjects.map((name) => [subjects[name].name, subjects[name].about]),
    ),
  };
  const report = summarise(meta, samples, subjects.ours.name);
  console.log(`\n${formatTable(report)}`);
  const checked = checkBars(report, bars);
  if (checked.text) console.log(`\nBars\n${checked.text}`);
  if (values.json !== undefined) writeJson(values.json, report);
  return checked.met ? 0 : 1;
}

// Servers are taken down when this process exits, which a signal alone would not make it do.
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => process.exit(130));
try {
  process.exitCode = await main();
} catch (error) {
  const usageError =
    error instanceof UsageError ||
    (error as NodeJS.ErrnoException).code?.startsWith('ERR_PARSE_ARGS');
  console.error(`bench:s3: ${(error as Error).message}${usageError ? `\n\n${usage}` : ''}`);
  process.exitCode = 2;
}
