/**
 * npm run bench [-- --help]: sets up what is missing, bundles bench/main.ts for plain Node, and runs it.
 */
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { projectRoot, setupOrExit } from '../scripts/setup.mjs';

const args = process.argv.slice(2);
if (!['--no-setup', '--help', '-h'].some((option) => args.includes(option))) {
  setupOrExit(['kernel', 'peer', 'bench']);
}
const { build } = await import('esbuild');
const outfile = join(projectRoot, 'build/bench/main.mjs');
await build({
  absWorkingDir: projectRoot,
  entryPoints: ['bench/main.ts'],
  outfile,
  bundle: true,
  platform: 'node',
  format: 'esm',
  target: 'node20',
  sourcemap: 'inline',
  logLevel: 'warning',
});
process.chdir(projectRoot);
await import(pathToFileURL(outfile).href);
