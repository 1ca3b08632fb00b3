// SPDX-License-Identifier: Apache-2.0
/** `npm run conformance`: what to run, one boot, the table, the recorded best. See README.md beside it. */
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { runUml } from '../test/vm/uml.js';
import { baseModules } from '../test/vm/vm.js';
import { makePlan, type Plan } from './plan.js';
import {
  combine,
  count,
  formatTable,
  type LunResults,
  type SubjectReport,
  shortcomings,
} from './report.js';
import { parseOutput } from './suite.js';

const usage = `npm run conformance -- [options]

  --example <names>         comma-separated folders of examples/. Default file
  --configuration <names>   comma-separated: thin, 512e, thick, read-only, removable, 4k. Default: all
  --test <names>            suites or tests, such as Read10 or Inquiry.EVPD. Default: all
  --repeat <n>              everything n times in one boot: a test fails that failed once. Default 1
  --short                   the shortened run of npm test: no peers, the suites that take least
  --no-peers                without tcmu-runner and the kernel's fileio
  --json <file>             write every result there
  --record                  take this run's numbers for the best from now on
  --no-setup                test what is built, install nothing

Exit code: 0 when nothing failed that is ours and the recorded best is met, 1 when not, 2 when the run
itself went wrong.
`;

/** Passes to reach, by example; \`short\` for the shortened run. */
type Best = Record<string, { full?: number; short?: number }>;

const { values } = parseArgs({
  options: {
    example: { type: 'string', default: 'file' },
    configuration: { type: 'string' },
    test: { type: 'string' },
    repeat: { type: 'string', default: '1' },
    short: { type: 'boolean', default: false },
    'no-peers': { type: 'boolean', default: false },
    json: { type: 'string' },
    record: { type: 'boolean', default: false },
    'no-setup': { type: 'boolean' },
    help: { type: 'boolean', short: 'h' },
  },
});

const root = process.cwd();
const bestFile = join(root, 'conformance/best.json');

/** What each LUN of the plan answered. */
function collect(plan: Plan, outDir: string): LunResults[] {
  const files = readdirSync(outDir);
  return plan.luns.map(({ subject, configuration, tests }, number) => {
    const results = tests.flatMap((suite) => {
      const name = `${number}.${suite}.txt`;
      if (!files.includes(name)) return [];
      const text = readFileSync(join(outDir, name), 'utf8');
      const found = parseOutput(text, `no verdict within ${plan.suiteSeconds} s, or it crashed`);
      const detail = text.trim().split('\n')[0] ?? 'no output';
      return found.length > 0 ? found : [{ name: suite, verdict: 'failed' as const, detail }];
    });
    const failed = `${number}.failed`;
    const missing = tests.filter((suite) => !files.includes(`${number}.${suite}.txt`));
    const failure = files.includes(failed)
      ? readFileSync(join(outDir, failed), 'utf8')
      : missing.length > 0
        ? `not run: ${missing.join(' ')}`
        : undefined;
    return { subject, configuration, results, failure };
  });
}

async function run(plan: Plan): Promise<LunResults[]> {
  const outDir = mkdtempSync(join(tmpdir(), 'tcmu-conformance-'));
  try {
    writeFileSync(join(outDir, 'plan.json'), JSON.stringify(plan));
    const result = await runUml({
      command: [process.execPath, join(root, 'build/conformance/guest.mjs')],
      cwd: root,
      outDir,
      memoryMb: 6144,
      timeoutSeconds: 60 + 300 * plan.luns.length,
      modules: [...baseModules, 'target_core_file', 'iscsi_target_mod'],
      onLine: (line) => process.stderr.write(`${line}\n`),
    });
    const logs = join(root, 'build/conformance/logs');
    mkdirSync(logs, { recursive: true });
    writeFileSync(join(logs, 'kernel.log'), result.kernelLog);
    for (const name of readdirSync(outDir)) {
      if (name.endsWith('.txt')) writeFileSync(join(logs, name), readFileSync(join(outDir, name)));
    }
    if (result.exitCode !== 0) {
      throw new Error(
        `the guest ended with ${result.timedOut ? 'a time-out' : result.exitCode}; see ${logs}`,
      );
    }
    if (result.kernelProblems.length > 0) throw new Error(result.kernelProblems.join('\n'));
    return collect(plan, outDir);
  } finally {
    rmSync(outDir, { recursive: true, force: true });
  }
}

function wholeNumber(option: string, text: string): number {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1) {
    throw new Error(`${option} ${text}: a whole number above 0`);
  }
  return value;
}

async function main(): Promise<number> {
  if (values.help) {
    process.stdout.write(usage);
    return 0;
  }
  const examples = values.example.split(',');
  const chosen = values.configuration ?? values.test;
  const plan = makePlan({
    root,
    examples,
    peers: !values.short && !values['no-peers'],
    short: values.short,
    configurations: values.configuration?.split(','),
    tests: values.test?.split(','),
    repeat: wholeNumber('--repeat', values.repeat),
  });
  const luns = await run(plan);
  const reports = new Map<string, SubjectReport>();
  for (const { subject } of luns) {
    reports.set(subject, combine(luns.filter((lun) => lun.subject === subject)));
  }
  console.log(`\n${formatTable(reports)}\n`);
  if (values.json !== undefined) {
    const tables = Object.fromEntries(reports);
    const text = JSON.stringify(
      { date: new Date().toISOString(), luns, combined: tables },
      null,
      2,
    );
    writeFileSync(values.json, `${text}\n`);
  }

  const best: Best = existsSync(bestFile) ? JSON.parse(readFileSync(bestFile, 'utf8')) : {};
  const kind = values.short ? 'short' : 'full';
  const complaints: string[] = [];
  const total = { passed: 0, failed: 0, skipped: 0 };
  for (const example of examples) {
    const report = reports.get(example) ?? {};
    // A part of the suite can't be compared with the best of the whole.
    const goal = chosen === undefined ? best[example]?.[kind] : undefined;
    const own = luns.filter(({ subject }) => subject === example);
    complaints.push(...shortcomings(example, report, own, goal));
    for (const verdict of ['passed', 'failed', 'skipped'] as const) {
      total[verdict] += count(report, verdict);
    }
    total.failed += own.filter(({ failure }) => failure !== undefined).length;
    if (values.record) best[example] = { ...best[example], [kind]: count(report, 'passed') };
  }
  if (values.record) writeFileSync(bestFile, `${JSON.stringify(best, null, 2)}\n`);
  for (const complaint of complaints) console.log(complaint);
  console.log(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`);
  return complaints.length > 0 ? 1 : 0;
}

try {
  process.exitCode = await main();
} catch (error) {
  console.error(`conformance: ${(error as Error).message}`);
  console.log('0 passed, 1 failed, 0 skipped');
  process.exitCode = 2;
}
