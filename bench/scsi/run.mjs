/** npm run bench:scsi [-- <million commands a round>]: what the SCSI layer itself costs a command. */
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { projectRoot } from '../../scripts/setup.mjs';

const { build } = await import('esbuild');
const outfile = join(projectRoot, 'build/bench/scsi.mjs');
await build({
  absWorkingDir: projectRoot,
  entryPoints: ['bench/scsi/main.ts'],
  outfile,
  bundle: true,
  platform: 'node',
  format: 'esm',
  target: 'node20',
  logLevel: 'warning',
});
await import(pathToFileURL(outfile).href);
