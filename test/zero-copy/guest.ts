// SPDX-License-Identifier: Apache-2.0
/**
 * Runs scenarios one after another in one boot: `guest.js [part of a name…]`. A line for each, `pass NAME SECONDS` or
 * `FAIL NAME …`. What a scenario leaves behind, or makes the kernel log, fails it and ends the run: the machine is
 * no longer what the next one expects. Exit code 1 when any failed.
 */
import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Kit } from '../kernel/harness/kit.js';
import { within } from '../kernel/harness/process.js';
import { kernelProblems } from '../vm/vm.js';
import { choose } from './scenarios.js';

const here = dirname(fileURLToPath(import.meta.url));
const parts = process.argv.slice(2);
const chosen = choose(parts, process.env['TCMU_ZERO_COPY_FAULTS'] !== undefined);
let seen = 0;

/** What the kernel has complained of since the last look. */
async function complaints(kit: Kit): Promise<string[]> {
  const log = await kit.out('dmesg', { quiet: true });
  const fresh = log.slice(seen);
  seen = log.length;
  return kernelProblems(fresh);
}

/** On a kernel with lockdep: it still looks. It stops for good, and not always loudly, when its tables are full. */
function assertLockdepLooks(): void {
  const statistics = '/proc/lockdep_stats';
  if (!existsSync(statistics)) return;
  assert.match(readFileSync(statistics, 'utf8'), /^ *debug_locks: +1$/m, 'lockdep is off');
}

let failed = false;
for (const { name, run, timeoutSeconds = 120 } of chosen) {
  const started = Date.now();
  const kit = new Kit(join(here, 'programs'));
  const end = (verdict: string): void =>
    console.log(`${verdict} ${name} ${((Date.now() - started) / 1000).toFixed(1)}`);
  try {
    await complaints(kit);
    await kit.sh(`rm -rf ${kit.dir} && mkdir -p ${kit.dir}`, { quiet: true });
    await within(run(kit), timeoutSeconds, `scenario ${name}`);
    await kit.assertNoStuckTasks();
    kit.assertNothingLeft();
    const found = await complaints(kit);
    if (found.length > 0) throw new Error(`kernel log: ${found.join(' | ')}`);
    assertLockdepLooks();
    kit.destroy();
    end('pass');
  } catch (error) {
    failed = true;
    console.log(error instanceof Error ? (error.stack ?? error.message) : String(error));
    await kit.describeState();
    console.log((await kit.sh('dmesg | tail -n 40', { anyCode: true, quiet: true })).stdout);
    end('FAIL');
    kit.destroy();
    break;
  }
}
process.exit(failed ? 1 : 0);
