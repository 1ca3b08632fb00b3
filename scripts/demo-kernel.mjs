// SPDX-License-Identifier: Apache-2.0
/**
 * npm run demo:kernel: the main job on a real kernel, each step shown. A file becomes /dev/sda of a user-mode Linux,
 * a file system lives on it, the handler is killed under load and comes back.
 */
import { spawnSync } from 'node:child_process';
import { projectRoot, setupOrExit } from './setup.mjs';

const { missing } = setupOrExit(['kernel']);
if (missing.length > 0) {
  console.error(
    'demo: it needs the packages named above; on other distributions: a Linux kernel with',
  );
  console.error('      TCMU, root, and `node examples/file/dist/cli.js IMAGE --name d0` directly');
  process.exit(1);
}
// After the setup: esbuild is one of the things that it brings.
const { bundleKernelTests } = await import('./bundle.mjs');
const outdir = await bundleKernelTests();
const { status } = spawnSync(process.execPath, [`${outdir}/kernel/demo/host.js`], {
  cwd: projectRoot,
  stdio: 'inherit',
});
if (status === 0) {
  console.log(`
What to try next
  npm run test:kernel -- --list       every scenario on a real kernel; add a name to run one
  node examples/file/dist/cli.js -h   the file example's options: iSCSI, block size, read-only, …
  as root, on a kernel with target_core_user and tcm_loop:
    truncate -s 1G disk.img && node examples/file/dist/cli.js disk.img --name d0
  README.md                           a handler of your own in 20 lines`);
}
process.exit(status ?? 1);
