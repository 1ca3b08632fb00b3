/**
 * npm run bench [-- --help]: sets up what is missing, bundles bench/main.ts for plain Node, and runs it.
 */
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
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
const { status } = spawnSync(process.execPath, [outfile, ...args], {
  cwd: projectRoot,
  stdio: 'inherit',
});
process.exit(status ?? 2);
