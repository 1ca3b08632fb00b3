// SPDX-License-Identifier: Apache-2.0
/**
 * npm run bench:qcow [-- --help]: sets up what is missing, bundles the benchmark for plain Node, and runs it.
 */
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { bundlePrograms } from '../../scripts/bundle.mjs';
import { projectRoot, setupOrExit } from '../../scripts/setup.mjs';

const args = process.argv.slice(2);
if (!['--no-setup', '--help', '-h'].some((option) => args.includes(option))) {
  setupOrExit(['kernel', 'peer', 'qemu', 'bench']);
}
// The server is the disk's user: it takes the packages as they are built.
const built = await bundlePrograms('bench/qcow', ['main', 'server']);
process.chdir(projectRoot);
await import(pathToFileURL(join(built, 'main.mjs')).href);
