// SPDX-License-Identifier: Apache-2.0
/** Which Debian packages a purpose needs, which of them are missing, and whether this user can install them. */
import { spawnSync } from 'node:child_process';
import { accessSync, constants, existsSync, readdirSync, readFileSync } from 'node:fs';
import { delimiter, isAbsolute, join } from 'node:path';

/**
 * @typedef {{ name: string, probe: string, for: string }} DebianPackage
 */

/** @returns {DebianPackage[]} */
export function packagesFor(purposes) {
  const { packages } = JSON.parse(readFileSync(new URL('packages.json', import.meta.url), 'utf8'));
  return packages.filter((entry) => purposes.includes(entry.for));
}

/** @returns {DebianPackage[]} with every placeholder of their names filled in */
export function missingPackages(purposes) {
  return packagesFor(purposes)
    .filter(({ probe }) => !isThere(probe))
    .map((entry) => ({ ...entry, name: entry.name.replace('{clang}', () => clangVersion()) }));
}

function isThere(probe) {
  if (probe.startsWith('clang:')) {
    if (!hasCommand('clang')) return false;
    const { stdout } = spawnSync('clang', [`--print-file-name=${probe.slice('clang:'.length)}`]);
    const file = stdout.toString().trim();
    return isAbsolute(file) && existsSync(file);
  }
  if (probe.startsWith('nbdkit:')) {
    const plugin = probe.slice('nbdkit:'.length);
    return spawnSync('nbdkit', [plugin, '--dump-plugin']).status === 0;
  }
  if (probe.startsWith('headers:')) {
    const prefix = `linux-headers-${probe.slice('headers:'.length)}.`;
    return (
      existsSync('/usr/src') &&
      readdirSync('/usr/src').some((name) => name.startsWith(prefix) && name.endsWith('-amd64'))
    );
  }
  return isAbsolute(probe) ? existsSync(probe) : hasCommand(probe);
}

function hasCommand(name) {
  const { PATH = '' } = process.env;
  // A plain user's PATH lacks the sbin directories; the test kernel's has them.
  return [...PATH.split(delimiter), '/usr/sbin', '/sbin', '/usr/bin'].some((dir) => {
    try {
      accessSync(join(dir, name), constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
}

/** Major version of the clang that the package `clang` brings, or has brought. */
function clangVersion() {
  const { stdout } = spawnSync('apt-cache', ['depends', 'clang']);
  return /Depends: clang-(\d+)/.exec(stdout?.toString() ?? '')?.[1] ?? '14';
}

/** Whether setup may install packages: Debian or a descendant, and root. */
export function canInstall() {
  return existsSync('/etc/debian_version') && hasCommand('apt-get') && process.getuid?.() === 0;
}
