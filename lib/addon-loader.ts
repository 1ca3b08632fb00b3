/**
 * Finds and loads the compiled addon: the local build first, then the prebuilt binary in the package.
 * Collects every failure, so that the one error at the end says all that was tried and what to do.
 */
import { readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { AddonError } from './errors.js';
import type { NativeAddon } from './native.js';

const here = dirname(fileURLToPath(import.meta.url));
const require = createRequire(import.meta.url);

/** The package's root: the nearest folder upwards that holds our package.json. */
function packageRoot(): string {
  for (let folder = here; ; folder = dirname(folder)) {
    try {
      if ((require(join(folder, 'package.json')) as { name?: string }).name === 'tcmu')
        return folder;
    } catch {
      // not here
    }
    if (folder === dirname(folder)) {
      throw new AddonError(
        `tcmu: no package.json of tcmu above ${here}; the installation is incomplete`,
      );
    }
  }
}

function isMusl(): boolean {
  const report = process.report?.getReport() as
    | { header?: { glibcVersionRuntime?: string } }
    | undefined;
  return report?.header?.glibcVersionRuntime === undefined;
}

function candidates(root: string): string[] {
  const platform = `${process.platform}-${process.arch}`;
  const prebuilds = join(root, 'prebuilds', platform);
  const list = [join(root, 'build', 'addon', 'Release', 'tcmu.node')];
  try {
    const names = readdirSync(prebuilds);
    const wanted = isMusl() ? 'tcmu.musl.node' : 'tcmu.glibc.node';
    if (names.includes(wanted)) list.push(join(prebuilds, wanted));
  } catch {
    // no binary for this platform in the package
  }
  return list;
}

/** @throws AddonError `ERR_TCMU_ADDON` */
export function loadAddon(contract: number): NativeAddon {
  if (process.platform !== 'linux') {
    throw new AddonError(`tcmu: TCMU exists on Linux only, this is ${process.platform}`);
  }
  const root = packageRoot();
  const failures: Error[] = [];
  for (const path of candidates(root)) {
    try {
      const addon = require(path) as NativeAddon;
      if (addon.contract === contract) return addon;
      failures.push(
        new Error(
          `${path}: built for contract ${addon.contract}, this package needs ${contract}; build it anew`,
        ),
      );
    } catch (error) {
      failures.push(error instanceof Error ? error : new Error(String(error)));
    }
  }
  throw new AddonError(
    [
      `tcmu: no native addon for ${process.platform}-${process.arch}, Node ${process.version}. Tried:`,
      ...failures.map((failure) => `  - ${failure.message.split('\n')[0]}`),
      ...(isMusl()
        ? ['The binaries of the package are for glibc (Debian, Fedora …), this is musl (Alpine).']
        : []),
      'Compile it with cmake and a C++20 compiler: npx tcmu compile',
    ].join('\n'),
    { operation: 'load addon', path: root, cause: new AggregateError(failures) },
  );
}
