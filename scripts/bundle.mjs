/** Bundles the TypeScript of test/kernel for plain Node, inside the guest and out. */
import { readdirSync, rmSync } from 'node:fs';
import { join, relative } from 'node:path';
import { projectRoot } from './setup.mjs';

/** Answers the directory of the bundles, `build/test-kernel`. */
export async function bundleKernelTests() {
  // Imported here: the scripts that import this module run before `npm ci` too.
  const { build } = await import('esbuild');
  const kernel = join(projectRoot, 'test/kernel');
  const entryPoints = ['harness/host.ts', 'harness/guest.ts', 'demo/host.ts', 'demo/guest.ts'];
  for (const dir of ['scenarios', 'programs']) {
    for (const file of readdirSync(join(kernel, dir))) {
      if (file.endsWith('.ts')) entryPoints.push(`${dir}/${file}`);
    }
  }
  const outdir = join(projectRoot, 'build/test-kernel');
  const { metafile } = await build({
    absWorkingDir: projectRoot,
    entryPoints: entryPoints.map((file) => join(kernel, file)),
    outbase: join(projectRoot, 'test'),
    outdir,
    bundle: true,
    splitting: true,
    platform: 'node',
    format: 'esm',
    target: 'node20',
    packages: 'external',
    sourcemap: 'inline',
    logLevel: 'warning',
    metafile: true,
  });
  // What was built from a source that is gone must not be found and run.
  for (const dir of ['scenarios', 'programs']) {
    for (const file of readdirSync(join(outdir, 'kernel', dir))) {
      const path = join(outdir, 'kernel', dir, file);
      if (!(relative(projectRoot, path) in metafile.outputs)) rmSync(path);
    }
  }
  return outdir;
}
