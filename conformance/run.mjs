// SPDX-License-Identifier: Apache-2.0
/**
 * npm run conformance [-- --help]: sets up what is missing, bundles the runner for plain Node, and runs it.
 */
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { bundle, bundlePrograms } from '../scripts/bundle.mjs';
import { missingPackages } from '../scripts/packages.mjs';
import { projectRoot, setupOrExit } from '../scripts/setup.mjs';

const args = process.argv.slice(2);
if (!['--no-setup', '--help', '-h'].some((option) => args.includes(option))) {
  setupOrExit(['kernel', 'peer'], '0 passed, 1 failed, 0 skipped');
}
const missing = missingPackages(['kernel']);
if (missing.length > 0) {
  console.log(`conformance: missing packages: ${missing.map(({ name }) => name).join(' ')}`);
  console.log('0 passed, 0 failed, 1 skipped');
  process.exit(0);
}
const built = await bundlePrograms('conformance', ['main', 'guest'], { packages: 'bundle' });
await bundle({
  entryPoints: ['test/kernel/programs/s3-server.ts'],
  outdir: join(built, 'programs'),
});
process.chdir(projectRoot);
await import(pathToFileURL(join(built, 'main.mjs')).href);
