// SPDX-License-Identifier: Apache-2.0
/**
 * npm run test:zero-copy [-- part of a name…]: the scenarios of test/zero-copy in QEMU, on Debian's kernel with the
 * module of kernel/. Build the package first (`npm run build`). TCMU_ZERO_COPY_KERNEL names the directory of another
 * kernel to boot (kernel/debug and kernel/test/elsewhere.sh make one).
 */
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { bundle } from './bundle.mjs';
import { missingPackages } from './packages.mjs';
import { projectRoot } from './setup.mjs';
import { buildZeroCopy } from './zero-copy.mjs';

const missing = missingPackages(['kernel', 'peer', 'zero-copy']);
if (missing.length > 0) {
  console.log(`missing packages: ${missing.map(({ name }) => name).join(' ')}`);
  console.log('0 passed, 0 failed, 1 skipped');
  process.exit(1);
}
const { out, release } = buildZeroCopy();
await bundle({
  entryPoints: [
    ...['host', 'guest', 'programs/stray', 'programs/forward'].map((name) => ({
      in: join(projectRoot, `test/zero-copy/${name}.ts`),
      out: name,
    })),
    { in: join(projectRoot, 'test/kernel/programs/fidelity.ts'), out: 'programs/fidelity' },
  ],
  outdir: join(out, 'scenarios'),
});
const { status } = spawnSync(
  process.execPath,
  [join(out, 'scenarios/host.js'), release, ...process.argv.slice(2)],
  { cwd: projectRoot, stdio: 'inherit' },
);
process.exit(status ?? 1);
