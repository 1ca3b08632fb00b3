// SPDX-License-Identifier: Apache-2.0
/**
 * The package on every Node.js version it is for: test/package with the binaries of test/package/nodes, which
 * `npm ci` gets there.
 *
 *     npm run test:nodes                         each version, and arm64 under qemu-user (900 MB of Node)
 *     node scripts/test-nodes.mjs --native …     this machine's processor alone; part of `npm test`
 *
 * What follows is vitest's.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { projectRoot, setupOrExit } from './setup.mjs';

const native = process.argv[2] === '--native';
const rest = process.argv.slice(native ? 3 : 2);
setupOrExit(native ? [] : ['cross'], '0 passed, 1 failed, 0 skipped');
const folder = join(projectRoot, 'test/package/nodes');
const binary = (name) => join(folder, 'node_modules', name, 'bin/node');

/** Commands that run Node; in full, since the tests have nothing on PATH. */
const nodes = [[process.execPath]];
const wanted = [];
if (process.arch === 'x64') {
  const [running] = process.versions.node.split('.');
  wanted.push(
    ...['node20', 'node22', 'node24', 'node26'].filter((name) => name !== `node${running}`),
  );
  nodes.push(...wanted.map((name) => [binary(name)]));
  if (!native) {
    wanted.push('node-arm64');
    const emulator = ['/usr/bin/qemu-aarch64-static', '-L', '/usr/aarch64-linux-gnu'];
    nodes.push([...emulator, binary('node-arm64')]);
  }
}
if (!wanted.every(isInstalled)) {
  // Binaries for another processor are refused without --force; those are the only dev dependency.
  const omit = native ? ['--omit=dev'] : [];
  run('npm', ['ci', '--force', ...omit, '--no-audit', '--no-fund', '--prefix', folder]);
}
if (!native) run(process.execPath, ['scripts/prebuild.mjs']);
run(
  'npx',
  ['--no-install', 'vitest', 'run', '--config', 'test/package/vitest.config.ts', ...rest],
  {
    TCMU_TEST_NODES: nodes.map((command) => command.join(' ')).join(':'),
    ...(native ? {} : { TCMU_TEST_EVERYTHING: '1' }),
  },
);

function isInstalled(name) {
  const read = (path) => JSON.parse(readFileSync(join(folder, path), 'utf8'));
  const path = `node_modules/${name}`;
  if (!existsSync(binary(name))) return false;
  return read(`${path}/package.json`).version === read('package-lock.json').packages[path].version;
}

function run(command, args, env = {}) {
  const { status } = spawnSync(command, args, {
    cwd: projectRoot,
    stdio: 'inherit',
    env: { ...process.env, ...env },
  });
  if (status !== 0) process.exit(status ?? 1);
}
