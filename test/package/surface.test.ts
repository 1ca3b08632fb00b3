// SPDX-License-Identifier: Apache-2.0
/** What tools say of the package as a package: its manifest, its types, its public surface, its binaries. */
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { expect, inject, test } from 'vitest';
import { root } from './tarball.js';

function tool(...args: string[]): { status: number | null; output: string } {
  const { status, stdout, stderr } = spawnSync(process.execPath, args, {
    cwd: root,
    encoding: 'utf8',
    env: { ...process.env, NO_COLOR: '1' },
    maxBuffer: 1 << 28,
  });
  return { status, output: `${stdout}${stderr}` };
}

test('publint finds nothing', () => {
  const { status, output } = tool('node_modules/publint/src/cli.js', '--strict', inject('tarball'));
  expect(output).toContain('All good!');
  expect(status).toBe(0);
});

test('every entry has the right types for every way of resolving it', () => {
  const cli = 'node_modules/@arethetypeswrong/cli/dist/index.js';
  // node10 knows no `exports`; TypeScript deprecates it.
  const { status, output } = tool(cli, inject('tarball'), '--profile', 'node16', '--no-emoji');
  expect({ status, output }).toMatchObject({ status: 0 });
  for (const entry of ['"tcmu"', '"tcmu/sim"', '"tcmu/target"']) expect(output).toContain(entry);
});

test('the public surface is what etc/ says', () => {
  const { status, output } = tool('scripts/api.mjs', '--check');
  expect({ status, output }).toEqual({ status: 0, output: 'api: 6 reports hold\n' });
});

test('a binary that asks too much is found out', () => {
  const good = tool('scripts/symbols.mjs', `prebuilds/linux-${process.arch}/tcmu.glibc.node`);
  expect(good.output).toMatch(/asks for .*GLIBC 2\.\d+/);
  expect(good.status).toBe(0);
  // Node itself shows thousands of symbols and wants libstdc++.
  const bad = tool('scripts/symbols.mjs', process.execPath);
  expect(bad.status).toBe(1);
  expect(bad.output).toContain('needs libstdc++.so.6');
});

test('no dependency is needed at run time', () => {
  const { output } = tool(
    '-p',
    `JSON.stringify(require(${JSON.stringify(join(root, 'package.json'))}))`,
  );
  const manifest = JSON.parse(output) as Record<string, unknown>;
  expect(manifest['dependencies']).toBeUndefined();
  const scripts = Object.keys(manifest['scripts'] as object);
  const hooks = /^(pre|post)?(install|pack|publish|prepare|build)$|^prepublishOnly$/;
  expect(scripts.filter((name) => hooks.test(name) && name !== 'build')).toEqual([]);
});
