/**
 * npm run record:fidelity [-- --no-setup]: runs the sequences of test/fidelity on a real kernel (user-mode Linux) and writes
 * what came of them into test/fidelity/fixtures, which the unit tests compare the simulated kernel with.
 */
import { spawn } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { projectRoot, setupOrExit } from './setup.mjs';

if (!process.argv.includes('--no-setup')) setupOrExit(['kernel']);
const fixtures = join(projectRoot, 'test/fidelity/fixtures');
mkdirSync(fixtures, { recursive: true });
// The scenario fails where the fixtures were not so yet: what it prints is what counts here.
const child = spawn(
  process.execPath,
  ['scripts/test-kernel.mjs', 'fidelity.fixtures', '--verbose'],
  { cwd: projectRoot, stdio: ['ignore', 'pipe', 'inherit'] },
);
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
if (found.length === 0) {
  console.error(output.split('\n').slice(-60).join('\n'));
  process.exit(1);
}
