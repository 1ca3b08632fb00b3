/**
 * npm run test:kernel -- [part of a name…] [--list] [--verbose] [--jobs N]
 *
 * Bundles the harness and the scenarios (TypeScript) into build/test-kernel and runs them there. `tcmu` stays an
 * external import, so handlers run against dist/ as a user's would: build first (`npm run build`).
 */
import { spawnSync } from 'node:child_process';
import { bundleKernelTests, projectRoot } from './bundle.mjs';

const outdir = await bundleKernelTests();
const { status } = spawnSync(
  process.execPath,
  [`${outdir}/kernel/harness/host.js`, ...process.argv.slice(2)],
  { cwd: projectRoot, stdio: 'inherit' },
);
process.exit(status ?? 1);
