// SPDX-License-Identifier: Apache-2.0
/**
 * npm run record:fidelity [-- --no-setup]: runs the sequences of test/fidelity on a real kernel (user-mode Linux; QEMU for
 * those that need a kernel module) and writes what came of them into test/fidelity/fixtures, which the unit tests
 * compare the simulated kernel with.
 */
import { spawn } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { projectRoot, setupOrExit } from './setup.mjs';

if (!process.argv.includes('--no-setup')) setupOrExit(['kernel', 'peer', 'zero-copy']);
const fixtures = join(projectRoot, 'test/fidelity/fixtures');
mkdirSync(fixtures, { recursive: true });
// The scenarios fail where the fixtures were not so yet: what they print is what counts here.
const runs = [
  { script: 'scripts/test-kernel.mjs', args: ['fidelity.fixtures', '--verbose'], env: {} },
  {
    script: 'scripts/test-zero-copy.mjs',
    args: ['fidelity'],
    env: { TCMU_ZERO_COPY_VERBOSE: '1' },
  },
];
let failed = false;
for (const { script, args, env } of runs) {
  const child = spawn(process.execPath, [script, ...args], {
    cwd: projectRoot,
    env: { ...process.env, ...env },
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  let output = '';
  child.stdout.setEncoding('utf8').on('data', (text) => {
    output += text;
  });
  await new Promise((resolve) => child.once('close', resolve));
  const found = [...output.matchAll(/fidelity\| fixture (\S+) (\[.*\])$/gm)];
  for (const [, name, notes] of found) {
    const lines = JSON.parse(notes).map((note) => `  ${JSON.stringify(note)}`);
    writeFileSync(join(fixtures, `${name}.json`), `[\n${lines.join(',\n')}\n]\n`);
    console.log(`recorded ${name}: ${lines.length} steps`);
  }
  if (found.length > 0) continue;
  failed = true;
  console.error(output.split('\n').slice(-60).join('\n'));
}
process.exit(failed ? 1 : 0);
