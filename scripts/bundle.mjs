// SPDX-License-Identifier: Apache-2.0
/** Bundles the project's own TypeScript programs (tests on kernels, benchmarks, conformance) for plain Node. */
import { readdirSync, rmSync } from 'node:fs';
import { join, relative } from 'node:path';
import { projectRoot } from './setup.mjs';

/**
 * One file an entry point, the packages left outside. `options`: esbuild's, paths from the project's root.
 * @returns what esbuild returns
 */
export async function bundle(options) {
  // Imported here: the scripts that import this module run before `npm ci` too.
  const { build } = await import('esbuild');
  return build({
    absWorkingDir: projectRoot,
    bundle: true,
    platform: 'node',
    format: 'esm',
    target: 'node20',
    packages: 'external',
    sourcemap: 'inline',
    logLevel: 'warning',
    ...options,
  });
}

/** Bundles the programs `names` of the directory `from` as `<name>.mjs`. @returns the directory they are in, `build/<from>` */
export async function bundlePrograms(from, names, options) {
  const outdir = join(projectRoot, 'build', from);
  await bundle({
    entryPoints: names.map((name) => `${from}/${name}.ts`),
    outdir,
    outExtension: { '.js': '.mjs' },
    ...options,
  });
  return outdir;
}

/** Bundles the TypeScript of test/kernel, for inside the guest and out. @returns the directory of the bundles, `build/test-kernel` */
export async function bundleKernelTests() {
  const kernel = join(projectRoot, 'test/kernel');
  const entryPoints = ['harness/host.ts', 'harness/guest.ts', 'demo/host.ts', 'demo/guest.ts'];
  for (const dir of ['scenarios', 'programs']) {
    for (const file of readdirSync(join(kernel, dir))) {
      if (file.endsWith('.ts')) entryPoints.push(`${dir}/${file}`);
    }
  }
  const outdir = join(projectRoot, 'build/test-kernel');
  const { metafile } = await bundle({
    entryPoints: entryPoints.map((file) => join(kernel, file)),
    outbase: join(projectRoot, 'test'),
    outdir,
    splitting: true,
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
