// SPDX-License-Identifier: Apache-2.0
/**
 * npm run test:kernel -- [part of a name…] [--list] [--verbose] [--jobs N]
 *
 * Bundles the harness and the scenarios (TypeScript) into build/test-kernel and runs them there. `tcmu` stays an
 * external import, so handlers run against dist/ as a user's would: build first (`npm run build`).
 */
import { spawnSync } from 'node:child_process';
import { bundleKernelTests } from './bundle.mjs';
import { missingPackages } from './packages.mjs';
import { projectRoot } from './setup.mjs';

const outdir = await bundleKernelTests();
const missing = missingPackages(['kernel', 'peer', 'nbd', 'qemu']).flatMap((entry) => [
  '--missing',
  `${entry.for}:${entry.name}`,
]);
const { status } = spawnSync(
  process.execPath,
  [`${outdir}/kernel/harness/host.js`, ...missing, ...process.argv.slice(2)],
  { cwd: projectRoot, stdio: 'inherit' },
);
process.exit(status ?? 1);
