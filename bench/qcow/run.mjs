/**
 * npm run bench:qcow [-- --help]: sets up what is missing, bundles the benchmark for plain Node, and runs it.
 */
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { projectRoot, setupOrExit } from '../../scripts/setup.mjs';

const args = process.argv.slice(2);
if (!['--no-setup', '--help', '-h'].some((option) => args.includes(option))) {
  setupOrExit(['kernel', 'peer', 'qemu', 'bench']);
}
const { build } = await import('esbuild');
const outdir = join(projectRoot, 'build/bench/qcow');
await build({
  absWorkingDir: projectRoot,
  // The server is the disk's user: it takes the packages as they are built.
  entryPoints: ['bench/qcow/main.ts', 'bench/qcow/server.ts'],
  outdir,
  outExtension: { '.js': '.mjs' },
  bundle: true,
  platform: 'node',
  format: 'esm',
  target: 'node20',
  packages: 'external',
  sourcemap: 'inline',
  logLevel: 'warning',
});
process.chdir(projectRoot);
await import(pathToFileURL(join(outdir, 'main.mjs')).href);
