// SPDX-License-Identifier: Apache-2.0
/**
 * Makes the binaries that the package carries: prebuilds/linux-<arch>/tcmu.glibc.node, stripped, and checked
 * against the floor of scripts/symbols.mjs.
 *
 *     npm run prebuilds [-- x64 arm64]      default: both
 *
 * This machine's own is what `npm run build:addon` makes; the other is cross-compiled (on Debian:
 * g++-aarch64-linux-gnu, or g++-x86-64-linux-gnu).
 */
import { copyFileSync, mkdirSync, rmSync, statSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { compileAddon, run } from './compile.mjs';
import { projectRoot } from './setup.mjs';
import { symbolsOf } from './symbols.mjs';

const MACHINES = { x64: 'x86_64', arm64: 'aarch64' };

const wanted = process.argv.slice(2);
for (const arch of wanted.length > 0 ? wanted : Object.keys(MACHINES)) {
  const machine = MACHINES[arch];
  if (machine === undefined) throw new Error(`prebuilds: x64 or arm64, not ${arch}`);
  const cross = arch !== process.arch;
  const prefix = cross ? `${machine}-linux-gnu-` : '';
  if (!cross) run('npm', ['run', '--silent', 'build:addon']);
  const built = cross
    ? compileAddon({ out: join(projectRoot, 'build', `addon-${arch}`), machine, prefix })
    : join(projectRoot, 'build/addon/Release/tcmu.node');
  const file = join(projectRoot, 'prebuilds', `linux-${arch}`, 'tcmu.glibc.node');
  mkdirSync(dirname(file), { recursive: true });
  copyFileSync(built, file);
  run(`${prefix}strip`, ['--strip-unneeded', file]);
  const { floor, problems } = symbolsOf(file);
  if (problems.length > 0) {
    rmSync(file);
    throw new Error(`prebuilds: ${built} does not fit:\n  ${problems.join('\n  ')}`);
  }
  const kib = (statSync(file).size / 1024).toFixed(0);
  console.log(`${relative(projectRoot, file)}: ${kib} KiB, asks for glibc ${floor.GLIBC}`);
}
