/**
 * The package on every Node.js version it is for, and on arm64 under qemu-user: test/package with the binaries of
 * test/package/nodes, which `npm ci` gets there (700 MB, and so no part of `npm test`).
 *
 *     npm run test:nodes
 */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { projectRoot, setupOrExit } from './setup.mjs';

setupOrExit(['cross'], '0 passed, 1 failed, 0 skipped');
const folder = join(projectRoot, 'test/package/nodes');
run('npm', ['ci', '--force', '--no-audit', '--no-fund', '--prefix', folder]);
run(process.execPath, ['scripts/prebuild.mjs']);

const binary = (name) => join(folder, 'node_modules', name, 'bin/node');
const nodes = ['node20', 'node22', 'node24', 'node26'].map(binary);
if (process.arch === 'x64')
  nodes.push(`qemu-aarch64-static -L /usr/aarch64-linux-gnu ${binary('node-arm64')}`);
for (const node of nodes) {
  const path = node.split(' ').at(-1);
  if (!existsSync(path)) throw new Error(`test:nodes: ${path} is missing after npm ci`);
}
run('npx', ['--no-install', 'vitest', 'run', '--config', 'test/package/vitest.config.ts'], {
  TCMU_TEST_NODES: nodes.join(':'),
});

function run(command, args, env = {}) {
  const { status } = spawnSync(command, args, {
    cwd: projectRoot,
    stdio: 'inherit',
    env: { ...process.env, ...env },
  });
  if (status !== 0) process.exit(status ?? 1);
}
