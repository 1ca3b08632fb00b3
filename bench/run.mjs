// SPDX-License-Identifier: Apache-2.0
/**
 * npm run bench, npm run bench:ring [-- --help]: sets up what is missing, bundles bench/<name>.ts for plain Node, and
 * runs it. `run.mjs NAME [options]`.
 */
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { bundlePrograms } from '../scripts/bundle.mjs';
import { projectRoot, setupOrExit } from '../scripts/setup.mjs';

/** Packages by what they are for, of each benchmark. */
const purposes = { main: ['kernel', 'peer', 'bench'], ring: ['kernel', 'qemu', 'bench'] };

const [name, ...args] = process.argv.slice(2);
if (!['--no-setup', '--help', '-h'].some((option) => args.includes(option))) {
  setupOrExit(purposes[name]);
}
const built = await bundlePrograms('bench', [name]);
process.chdir(projectRoot);
process.argv.splice(2, 1);
await import(pathToFileURL(join(built, `${name}.mjs`)).href);
