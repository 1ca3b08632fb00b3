// SPDX-License-Identifier: Apache-2.0
/**
 * Runs scenarios from the host, each in a boot of its own, two boots at a time, and reports one line each.
 *
 *     host.js [part of a name…] [--list] [--verbose] [--jobs N] [--missing PURPOSE:PACKAGE]…
 *
 * A scenario is skipped only when a Debian package it needs is missing (scripts/test-kernel.mjs finds out);
 * the skip is counted and named. The last line is `N passed, N failed, N skipped`. Exit code 1 when anything failed or when no scenario ran.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { runUml } from '../../vm/uml.js';
import { baseModules, type VmResult } from '../../vm/vm.js';
import { loadScenarios } from './catalog.js';
import type { Scenario } from './scenario.js';

/** Room for boot-independent work of the guest around `run`: start, diagnosis, clean-up. */
const graceSeconds = 20;
const tailLines = 30;

const here = dirname(fileURLToPath(import.meta.url));
const logDir = join(here, '../../logs');

/** Names of missing packages that keep a scenario from running. */
function missingFor(scenario: Scenario, missing: readonly string[]): string[] {
  return missing
    .map((entry) => entry.split(':') as [string, string])
    .filter(([purpose, name]) => purpose === 'kernel' || scenario.packages?.includes(name))
    .map(([, name]) => name);
}

interface Outcome {
  scenario: Scenario;
  result: VmResult;
  /** Why it failed; empty when it passed. */
  reasons: string[];
  log: string;
}

async function runOne(scenario: Scenario, verbose: boolean): Promise<Outcome> {
  const result = await runUml({
    command: [process.execPath, join(here, 'guest.js'), scenario.name],
    memoryMb: scenario.memoryMb ?? 1024,
    timeoutSeconds: (scenario.timeoutSeconds ?? 120) + graceSeconds,
    modules: [...baseModules, ...(scenario.modules ?? [])],
    ...(verbose ? { onLine: (line) => console.log(`  ${scenario.name}: ${line}`) } : {}),
  });
  const reasons: string[] = [];
  const failure = /^ *[\d.]+ FAILED (.*)$/m.exec(result.output)?.[1];
  if (failure !== undefined) reasons.push(failure);
  if (result.timedOut) reasons.push('the guest was stopped: out of time');
  else if (result.exitCode === undefined) reasons.push('the kernel went down');
  else if (result.exitCode !== 0 && failure === undefined) {
    reasons.push(`exit code ${result.exitCode}`);
  }
  const unexpected = result.kernelProblems.filter(
    (line) => scenario.expectedInKernelLog?.test(line) !== true,
  );
  if (unexpected.length > 0) reasons.push(`kernel log: ${unexpected[0]}`);
  mkdirSync(logDir, { recursive: true });
  const log = join(logDir, `${scenario.name}.log`);
  writeFileSync(log, `${result.output}\n---- kernel log\n${result.kernelLog}`);
  return { scenario, result, reasons, log };
}

function tail(text: string): string {
  const lines = text.trimEnd().split('\n').slice(-tailLines);
  return lines.map((line) => `      ${line}`).join('\n');
}

function report({ scenario, result, reasons, log }: Outcome): void {
  const verdict = reasons.length === 0 ? 'pass' : 'FAIL';
  console.log(
    `${verdict}  ${scenario.name.padEnd(28)} ${result.seconds.toFixed(1).padStart(6)} s  ${scenario.about}`,
  );
  if (reasons.length === 0) return;
  for (const reason of reasons) console.log(`    ${reason}`);
  console.log(`    the end of its log:\n${tail(result.output)}`);
  // The boot up to init is the same every time.
  const afterBoot = result.kernelLog.split('with environment:').at(-1) ?? '';
  console.log(`    the end of the kernel log:\n${tail(afterBoot)}`);
  console.log(`    all of it: ${log}`);
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    list: { type: 'boolean', default: false },
    verbose: { type: 'boolean', default: false },
    jobs: { type: 'string', default: '2' },
    missing: { type: 'string', multiple: true, default: [] },
  },
});
const jobs = Number(values.jobs);
if (!Number.isInteger(jobs) || jobs < 1) throw new Error('--jobs takes a number from 1 on');

const all = await loadScenarios(join(here, '../scenarios'));
for (const part of positionals) {
  if (!all.some((scenario) => scenario.name.includes(part))) {
    console.error(`no scenario is named like ${part}; --list shows them all`);
    process.exit(2);
  }
}
const chosen = all.filter(
  (scenario) =>
    positionals.length === 0 || positionals.some((part) => scenario.name.includes(part)),
);

if (values.list) {
  for (const { name, about } of chosen) console.log(`${name.padEnd(28)} ${about}`);
  process.exit(0);
}

let failed = 0;
let passed = 0;
let skipped = 0;
// The longest first, so that the last boot is a short one.
const queue = [...chosen].sort((a, b) => (b.timeoutSeconds ?? 120) - (a.timeoutSeconds ?? 120));
async function work(): Promise<void> {
  for (let scenario = queue.shift(); scenario !== undefined; scenario = queue.shift()) {
    const missing = missingFor(scenario, values.missing);
    if (missing.length > 0) {
      skipped++;
      console.log(`skip  ${scenario.name.padEnd(28)} missing packages: ${missing.join(' ')}`);
      continue;
    }
    const outcome = await runOne(scenario, values.verbose);
    if (outcome.reasons.length === 0) passed++;
    else failed++;
    report(outcome);
  }
}
await Promise.all(Array.from({ length: jobs }, work));
console.log(`${passed} passed, ${failed} failed, ${skipped} skipped`);
process.exit(failed > 0 || passed === 0 ? 1 : 0);
