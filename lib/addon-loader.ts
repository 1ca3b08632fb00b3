// SPDX-License-Identifier: Apache-2.0
/**
 * Finds and loads the compiled addon: the local build first, then the prebuilt binary in the package.
 * Collects every failure, so that the one error at the end says all that was tried and what to do.
 */
import { existsSync, readdirSync } from 'node:fs';
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

/** Version of the C library, or `undefined` where that isn't glibc. */
function glibcVersion(): string | undefined {
  const report = process.report?.getReport() as
    | { header?: { glibcVersionRuntime?: string } }
    | undefined;
  return report?.header?.glibcVersionRuntime;
}

/** What may be loaded, best first; what can't be there is told to `missing`. */
function candidates(root: string, glibc: string | undefined, missing: string[]): string[] {
  const local = join(root, 'build/addon/Release/tcmu.node');
  const list: string[] = [];
  if (existsSync(local)) list.push(local);
  else missing.push(`${local}: not there; npx tcmu compile makes it`);

  const platform = `${process.platform}-${process.arch}`;
  const folder = join(root, 'prebuilds');
  const prebuilt = join(
    folder,
    platform,
    glibc === undefined ? 'tcmu.musl.node' : 'tcmu.glibc.node',
  );
  if (existsSync(prebuilt)) list.push(prebuilt);
  else if (!existsSync(folder)) {
    missing.push(
      `${folder}: not there; a bundler or a copy left it out (keep tcmu external when bundling)`,
    );
  } else missing.push(`${prebuilt}: not there; the package has ${readdirSync(folder).join(', ')}`);
  return list;
}

/** @throws AddonError `ERR_TCMU_ADDON` */
export function loadAddon(contract: number): NativeAddon {
  if (process.platform !== 'linux') {
    throw new AddonError(`tcmu: TCMU exists on Linux only, this is ${process.platform}`);
  }
  const root = packageRoot();
  const glibc = glibcVersion();
  const tried: string[] = [];
  const failures: Error[] = [];
  for (const path of candidates(root, glibc, tried)) {
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
  tried.push(...failures.map((failure) => failure.message.split('\n')[0] ?? ''));
  const library = glibc === undefined ? 'not glibc' : `glibc ${glibc}`;
  throw new AddonError(
    [
      `tcmu: no native addon for ${process.platform}-${process.arch}, ${library}, Node ${process.version}. Tried:`,
      ...tried.map((line) => `  - ${line}`),
      ...(glibc === undefined
        ? ['The binaries of the package are for glibc (Debian, Fedora …), this is musl (Alpine).']
        : []),
      ...(tried.some((line) => line.includes('version `GLIBC_'))
        ? ['The binaries of the package need glibc 2.28 or later (Debian 10, RHEL 8).']
        : []),
      'Compile it with cmake and a C++20 compiler: npx tcmu compile',
    ].join('\n'),
    { operation: 'load addon', path: root, cause: new AggregateError(failures) },
  );
}
