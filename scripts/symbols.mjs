// SPDX-License-Identifier: Apache-2.0
/**
 * What a compiled addon asks of the system it is loaded on, and shows to the process that loads it.
 *
 *     node scripts/symbols.mjs FILE…      exit code 1 when one asks for more than the floor
 *
 * The floor is glibc 2.28 (RHEL 8, Debian 10), which Node's own binaries have, and no libstdc++.
 */
import { spawnSync } from 'node:child_process';
import { resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

/** Newest versions that may be asked for. GCC_4.3.0 is older than any libgcc_s beside glibc 2.28. */
const FLOOR = { GLIBC: '2.28', GCC: '4.3.0' };
/** libpthread, libdl and libm are part of any glibc; libgcc_s comes with Node's own need of it. */
const LIBRARIES =
  /^(libc\.so\.6|libm\.so\.6|libpthread\.so\.0|libdl\.so\.2|libgcc_s\.so\.1|ld-linux-(x86-64|aarch64)\.so\.[12])$/;
/** What Node looks up in an addon (node_api.h). */
const EXPORTS = /^(napi_register_module_v1|node_api_module_get_api_version_v1)$/;

/** @returns {{ floor: Record<string, string>, problems: string[] }} */
export function symbolsOf(file) {
  const problems = [];
  const floor = {};
  for (const [, library] of readelf(file, '--dynamic').matchAll(/\(NEEDED\).*\[(.+)\]/g)) {
    if (!LIBRARIES.test(library)) problems.push(`needs ${library}`);
  }
  const symbols = readelf(file, '--dyn-syms').matchAll(
    /^ *\d+: +\S+ +\S+ +\S+ +(\S+) +\S+ +(\S+) +([^\s@]+)(?:@+(\w+?)_([\d.]+))?/gm,
  );
  for (const [, binding, section, name, family, version] of symbols) {
    if (binding === 'LOCAL') continue;
    if (section !== 'UND') {
      if (!EXPORTS.test(name)) problems.push(`shows ${name}`);
    } else if (family !== undefined) {
      if (FLOOR[family] === undefined) problems.push(`${name} wants ${family}_${version}`);
      else if (newer(version, FLOOR[family])) {
        problems.push(`${name} wants ${family}_${version}, the floor is ${FLOOR[family]}`);
      }
      if (floor[family] === undefined || newer(version, floor[family])) floor[family] = version;
    }
  }
  if (floor.GLIBC === undefined) problems.push('asks nothing of glibc: readelf was not understood');
  return { floor, problems };
}

function newer(a, b) {
  const [left, right] = [a, b].map((version) => version.split('.').map(Number));
  for (let i = 0; i < Math.max(left.length, right.length); i++) {
    if ((left[i] ?? 0) !== (right[i] ?? 0)) return (left[i] ?? 0) > (right[i] ?? 0);
  }
  return false;
}

function readelf(file, what) {
  const { status, stdout, stderr, error } = spawnSync('readelf', ['--wide', what, file], {
    encoding: 'utf8',
    env: { ...process.env, LC_ALL: 'C' },
    maxBuffer: 1 << 26,
  });
  if (status !== 0) throw new Error(`readelf ${file}: ${error?.message ?? stderr}`);
  return stdout;
}

if (process.argv[1] !== undefined && resolve(process.argv[1]) === fileURLToPath(import.meta.url)) {
  for (const file of process.argv.slice(2)) {
    const { floor, problems } = symbolsOf(file);
    const asks = Object.entries(floor).map(([family, version]) => `${family} ${version}`);
    console.log(`${file}: asks for ${asks.join(', ')}`);
    for (const problem of problems) console.log(`  ${problem}`);
    if (problems.length > 0) process.exitCode = 1;
  }
}
