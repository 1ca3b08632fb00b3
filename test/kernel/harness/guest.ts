// SPDX-License-Identifier: Apache-2.0
/**
 * Runs one scenario inside the guest: `guest.js <scenario name>`. Exit code 0 when it passed; 1 when it threw,
 * took too long, or left something behind. All that helps to understand a failure is printed before.
 */
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { loadScenarios } from './catalog.js';
import { Kit } from './kit.js';
import { within } from './process.js';

const here = dirname(fileURLToPath(import.meta.url));
const name = process.argv[2];
const scenario = (await loadScenarios(join(here, '../scenarios'))).find(
  (candidate) => candidate.name === name,
);
if (scenario === undefined) throw new Error(`no scenario ${name}`);

const kit = new Kit(join(here, '../programs'));
let failed = false;
try {
  const limit = scenario.timeoutSeconds ?? 120;
  await within(scenario.run(kit), limit, `scenario ${scenario.name}`);
  kit.step('end of the scenario: nothing stuck, nothing left');
  await kit.assertNoStuckTasks();
  kit.assertNothingLeft();
} catch (error) {
  failed = true;
  kit.log(`FAILED ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`);
  await kit.describeState();
}
kit.destroy();
process.exit(failed ? 1 : 0);
