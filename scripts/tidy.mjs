// SPDX-License-Identifier: Apache-2.0
/**
 * clang-tidy over the addon's C++, with the checks of .clang-tidy; any finding is an error.
 *
 *     npm run tidy [-- PATTERN…]      files whose path contains a pattern; default: all
 *
 * Reads the compiler's arguments from build/addon, so the addon is built first. clang-tidy is Debian's.
 */
import { spawn } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { projectRoot, setupOrExit } from './setup.mjs';

const { missing } = setupOrExit(['tidy']);
if (missing.length > 0) process.exit(1);
const patterns = process.argv.slice(2);
// The tests have a build of their own, under the sanitizers.
const files = readdirSync(join(projectRoot, 'addon'), { recursive: true })
  .map((path) => join('addon', path))
  .filter((path) => path.endsWith('.cc') && !path.includes('/test/'))
  .filter((path) => patterns.length === 0 || patterns.some((part) => path.includes(part)))
  .sort();
const waiting = [...files];
const failed = [];

async function worker() {
  for (let file = waiting.shift(); file !== undefined; file = waiting.shift()) {
    const child = spawn('clang-tidy', ['-p', 'build/addon', '--quiet', file], {
      cwd: projectRoot,
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    let output = '';
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', (text) => {
        output += text;
      });
    }
    const code = await new Promise((resolve) => {
      child.once('error', (error) => {
        output += error.message;
        resolve(127);
      });
      child.once('close', resolve);
    });
    if (code === 0) continue;
    failed.push(file);
    console.log(output.replace(/^\d+ warnings? generated\.\n/gm, ''));
  }
}
await Promise.all(Array.from({ length: availableParallelism() }, worker));
console.log(`tidy: ${files.length} files, ${failed.length} with findings`);
process.exitCode = failed.length > 0 || files.length === 0 ? 1 : 0;
