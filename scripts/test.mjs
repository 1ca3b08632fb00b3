// SPDX-License-Identifier: Apache-2.0
/**
 * npm test: sets up what is missing, then every suite, one after another, whatever fails.
 *
 * Prints what failed once more, a table and, as its last line, `N passed, N failed, N skipped` over all suites.
 * Exit code 1 when anything failed, or when a suite ran no test although this machine could run it.
 */
import { spawn } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { join, relative } from 'node:path';
import { stripVTControlCharacters } from 'node:util';
import { canInstall } from './packages.mjs';
import { projectRoot, setupOrExit } from './setup.mjs';

const results = join(projectRoot, 'build/test-results');

/**
 * @typedef {{ passed: number, failed: number, skipped: number }} Counts
 * @typedef {{ name: string, about: string, command: string[], minutes: number,
 *   count: (output: string, code: number | null) => Counts,
 *   failures?: () => string[] }} Suite
 */

/** Most lines that the digest at the end shows of one failure: a log is often kept by its end only. */
const failureLines = 16;

/** One test that is a command: it passes when that exits with 0. */
function wholeCommand(_output, code) {
  return { passed: code === 0 ? 1 : 0, failed: code === 0 ? 0 : 1, skipped: 0 };
}

/** The last line of the form `N passed, N failed[, N skipped]`. */
function lastLine(output, code) {
  const line = [...output.matchAll(/^(\d+) passed, (\d+) failed(?:, (\d+) skipped)?$/gm)].at(-1);
  if (line === undefined) return { passed: 0, failed: 1, skipped: 0 };
  const [passed, failed, skipped] = [line[1], line[2], line[3] ?? 0].map(Number);
  // A suite that died after its last test has failed too.
  return { passed, failed: failed === 0 && code !== 0 && passed > 0 ? 1 : failed, skipped };
}

/** Every failure of an output that says it in a line that begins with FAIL, with what is around it. */
function failLines(output) {
  const lines = stripVTControlCharacters(output).trimEnd().split('\n');
  const found = lines.flatMap((line, index) =>
    /^FAIL/.test(line)
      ? [lines.slice(Math.max(0, index - 4), index + failureLines - 4).join('\n')]
      : [],
  );
  return found.length > 0 ? found : [lines.slice(-failureLines).join('\n')];
}

/** Every failure in vitest's JSON report; what could not be loaded has a message of its own. */
function reportedFailures(file) {
  if (!existsSync(file)) return [];
  const { testResults } = JSON.parse(readFileSync(file, 'utf8'));
  return testResults.flatMap(({ name, message, assertionResults }) => {
    const failed = assertionResults.filter(({ status }) => status === 'failed');
    const texts = failed.map(({ fullName, failureMessages }) => [fullName, ...failureMessages]);
    if (failed.length === 0 && message) texts.push([message]);
    return texts.map((text) =>
      [relative(projectRoot, name), ...stripVTControlCharacters(text.join('\n')).split('\n')]
        .filter((line) => !/^ +at .*node_modules/.test(line))
        .slice(0, failureLines)
        .join('\n'),
    );
  });
}

/** vitest's JSON report; its console output is for people. */
function vitestReport(file) {
  return (_output, code) => {
    if (!existsSync(file)) return { passed: 0, failed: 1, skipped: 0 };
    const report = JSON.parse(readFileSync(file, 'utf8'));
    const failed = report.numFailedTests;
    return {
      passed: report.numPassedTests,
      // A file that can't be loaded has no tests to fail.
      failed: failed === 0 && code !== 0 ? 1 : failed,
      skipped: report.numPendingTests + (report.numTodoTests ?? 0),
    };
  };
}

function vitest(name) {
  const file = join(results, `${name}.json`);
  return {
    args: ['--reporter=default', '--reporter=json', `--outputFile.json=${file}`],
    count: vitestReport(file),
    failures: () => reportedFailures(file),
  };
}

/** @returns {Suite[]} */
function suites() {
  const unit = vitest('unit');
  const published = vitest('package');
  const list = [
    {
      name: 'check',
      about: 'types, format, lint',
      command: ['npm', 'run', '--silent', 'check'],
      minutes: 5,
      count: wholeCommand,
    },
    {
      name: 'unit',
      about: 'vitest',
      command: ['npx', '--no-install', 'vitest', 'run', ...unit.args],
      minutes: 10,
      count: unit.count,
      failures: unit.failures,
    },
    {
      name: 'package',
      about: 'the tarball in empty projects on Node 20 to 26, the public surface, the guides',
      command: [process.execPath, 'scripts/test-nodes.mjs', '--native', ...published.args],
      minutes: 10,
      count: published.count,
      failures: published.failures,
    },
    {
      name: 'addon',
      about: 'C++ of ring, memory and file I/O under the sanitizers',
      command: ['bash', 'addon/test/run.sh'],
      minutes: 10,
      count: lastLine,
    },
    {
      name: 'fuzz',
      about: 'corrupt mailboxes and entries against the ring',
      command: ['bash', 'addon/test/fuzz.sh', '20'],
      minutes: 5,
      count: lastLine,
    },
    {
      name: 'sim',
      about: 'C++ of the simulated kernel under the sanitizers',
      command: ['bash', 'addon/sim/test/run.sh'],
      minutes: 10,
      count: lastLine,
    },
    {
      name: 'kernel',
      about: 'scenarios on a real kernel',
      command: [process.execPath, 'scripts/test-kernel.mjs'],
      minutes: 25,
      count: lastLine,
    },
    {
      name: 'conformance',
      about: 'the SCSI conformance suite, shortened',
      command: [process.execPath, 'conformance/run.mjs', '--no-setup', '--short'],
      minutes: 5,
      count: lastLine,
    },
    {
      name: 'zero-copy',
      about: "scenarios on Debian's kernel in QEMU, with the module of kernel/",
      command: [process.execPath, 'scripts/test-zero-copy.mjs'],
      minutes: 20,
      count: lastLine,
    },
  ];
  const examples = join(projectRoot, 'examples');
  for (const example of readdirSync(examples).sort()) {
    const manifest = join(examples, example, 'package.json');
    if (!existsSync(manifest)) continue;
    if (JSON.parse(readFileSync(manifest, 'utf8')).scripts?.test === undefined) continue;
    const report = vitest(`example-${example}`);
    list.push({
      name: `examples/${example}`,
      about: 'vitest',
      command: ['npm', 'test', '--silent', '-w', `examples/${example}`, '--', ...report.args],
      minutes: 10,
      count: report.count,
      failures: report.failures,
    });
  }
  return list;
}

/** Runs a suite with its output shown and kept. */
function run({ name, command, minutes }) {
  return new Promise((resolve) => {
    const [program, ...args] = command;
    const child = spawn(program, args, {
      cwd: projectRoot,
      stdio: ['ignore', 'pipe', 'pipe'],
      detached: true,
      env: { ...process.env, CI: '1' },
    });
    let output = '';
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', (text) => {
        output += text;
        process.stdout.write(text);
      });
    }
    const signal = (what) => {
      try {
        process.kill(-child.pid, what);
      } catch {
        // ESRCH: it has just ended.
      }
    };
    // SIGTERM first: the kernel suite takes its machines down with it.
    const limit = setTimeout(() => {
      console.log(`${name}: stopped after ${minutes} minutes`);
      signal('SIGTERM');
      setTimeout(signal, 10_000, 'SIGKILL').unref();
    }, minutes * 60_000);
    const stop = () => {
      signal('SIGTERM');
      process.exit(130);
    };
    process.once('SIGINT', stop).once('SIGTERM', stop);
    const end = (code) => {
      clearTimeout(limit);
      process.off('SIGINT', stop).off('SIGTERM', stop);
      resolve({ code, output });
    };
    child.once('error', (error) => {
      console.log(`${name}: ${error.message}`);
      end(127);
    });
    child.once('close', end);
  });
}

function row(name, passed, failed, skipped, seconds, about) {
  const columns = [passed, failed, skipped, seconds].map((value) => String(value).padStart(8));
  return `${name.padEnd(16)}${columns.join('')}   ${about}`;
}

const { missing } = setupOrExit(
  ['kernel', 'fuzz', 'peer', 'qemu', 'nbd', 's3', 'zero-copy'],
  '0 passed, 1 failed, 0 skipped',
);
rmSync(results, { recursive: true, force: true });
mkdirSync(results, { recursive: true });

const total = { passed: 0, failed: 0, skipped: 0 };
const table = [row('suite', 'passed', 'failed', 'skipped', 'seconds', '')];
const notes = [];
const failures = [];
for (const suite of suites()) {
  console.log(`\n──── ${suite.name}: ${suite.about}`);
  const started = Date.now();
  const { code, output } = await run(suite);
  const counts = suite.count(output, code);
  if (counts.passed + counts.failed === 0) {
    // Left out for want of packages is one thing, a suite that has lost its tests another.
    if (counts.skipped > 0 && !canInstall()) {
      notes.push(`${suite.name}: left out, packages are missing (see above)`);
    } else {
      counts.failed = 1;
      notes.push(`${suite.name}: ran no test`);
    }
  }
  if (counts.failed > 0) {
    const found = suite.failures?.() ?? [];
    for (const text of found.length > 0 ? found : failLines(output)) {
      failures.push(`\n──── failed: ${suite.name}\n${text}`);
    }
  }
  for (const key of Object.keys(total)) total[key] += counts[key];
  const seconds = ((Date.now() - started) / 1000).toFixed(0);
  table.push(row(suite.name, counts.passed, counts.failed, counts.skipped, seconds, suite.about));
}
for (const failure of failures.slice(0, 10)) console.log(failure);
if (failures.length > 10) console.log(`\n──── and ${failures.length - 10} more, see above`);
console.log(`\n${table.join('\n')}`);
if (missing.length > 0)
  notes.push(`missing packages: ${missing.map(({ name }) => name).join(' ')}`);
for (const note of notes) console.log(note);
console.log(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`);
process.exitCode = total.failed > 0 ? 1 : 0;
