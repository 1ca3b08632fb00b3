// SPDX-License-Identifier: Apache-2.0
/**
 * npm run bench:zero-copy [-- --handlers null,file --jobs read-1024k-d1 --runtime 250 --min-bytes 0 --minutes 90 --json FILE]: builds the
 * module with zero copy, the handlers, and bench/zero-copy/main.ts; runs it.
 */
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { bundle } from '../../scripts/bundle.mjs';
import { projectRoot, setupOrExit } from '../../scripts/setup.mjs';
import { buildZeroCopy, compile } from '../../scripts/zero-copy.mjs';

setupOrExit(['kernel', 'bench', 'zero-copy']);
const { out, release } = buildZeroCopy();
compile(join(projectRoot, 'bench/zero-copy/peer.c'), join(out, 'peer'));
await bundle({
  entryPoints: ['main', 'handlers'].map((name) => `bench/zero-copy/${name}.ts`),
  outdir: out,
});
process.chdir(projectRoot);
process.argv.push('--release', release);
await import(pathToFileURL(join(out, 'main.js')).href);
