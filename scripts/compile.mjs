// SPDX-License-Identifier: Apache-2.0
/**
 * Compiles the addon with CMake alone, where the package is installed as where it is developed: the command
 * `npx tcmu compile`, and the cross-compiling half of scripts/prebuild.mjs. Downloads nothing.
 */
import { spawnSync } from 'node:child_process';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const require = createRequire(import.meta.url);

const NEEDS = `compiling needs
  cmake, a C++20 compiler, uv.h    Debian, Ubuntu: apt-get install cmake g++ make libuv1-dev
                                   Fedora: dnf install cmake gcc-c++ make libuv-devel
                                   Alpine: apk add cmake g++ make libuv-dev linux-headers
  the headers of Node-API          npm install --save-dev node-api-headers node-addon-api`;

/**
 * @param {{ out?: string, debug?: boolean, machine?: string, prefix?: string }} options build folder, default
 *   `build/addon`, where the loader looks; `debug`: without optimization; `machine` (`aarch64`) and the tools'
 *   `prefix` for another than this machine
 * @returns {string} the addon
 */
export function compileAddon(options = {}) {
  const { out = join(root, 'build/addon'), debug = false, machine, prefix = '' } = options;
  const library = join(out, 'Release');
  run('cmake', [
    ...['-S', root, '-B', out, `-DCMAKE_BUILD_TYPE=${debug ? 'Debug' : 'Release'}`],
    ...(machine === undefined
      ? []
      : ['-DCMAKE_SYSTEM_NAME=Linux', `-DCMAKE_SYSTEM_PROCESSOR=${machine}`]),
    ...(prefix === '' ? [] : [`-DCMAKE_CXX_COMPILER=${prefix}g++`]),
    `-DCMAKE_JS_INC=${headers('node-api-headers', 'include')};${headers('node-addon-api', '.')}`,
    `-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=${library}`,
  ]);
  // Without a number make starts every compiler at once.
  run('cmake', ['--build', out, '--parallel', `${availableParallelism()}`]);
  return join(library, 'tcmu.node');
}

function headers(name, folder) {
  try {
    // Of the project that uses the package: installed by links, the package itself does not see them.
    const manifest = require.resolve(`${name}/package.json`, { paths: [root, process.cwd()] });
    return join(dirname(manifest), folder);
  } catch {
    throw new Error(`tcmu: ${name} is missing; ${NEEDS}`);
  }
}

/** Runs a tool quietly; its output is in the error when it fails. */
export function run(command, args) {
  const { status, stdout, stderr, error } = spawnSync(command, args, {
    cwd: root,
    encoding: 'utf8',
    maxBuffer: 1 << 26,
  });
  if (status === 0) return;
  if (error?.code === 'ENOENT') {
    throw new Error(`tcmu: ${command} is missing; ${NEEDS}`);
  }
  throw new Error(`tcmu: ${command} ${args.join(' ')}:\n${stdout}${stderr}\ntcmu: ${NEEDS}`);
}
