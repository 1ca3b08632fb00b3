// SPDX-License-Identifier: Apache-2.0
/** Packs the package once, as it would be published, and gives every test the tarball's path. */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, realpathSync, rmSync } from 'node:fs';
import { delimiter, join, resolve } from 'node:path';
import type { TestProject } from 'vitest/node';

declare module 'vitest' {
  export interface ProvidedContext {
    tarball: string;
    /** Paths in the tarball. */
    files: string[];
    npm: string;
  }
}

export const root = resolve(import.meta.dirname, '../..');

export default function setup(project: TestProject): void {
  const folder = join(root, 'build/package');
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  // `npm run prebuilds` makes the other machines' too; this one's is enough to try the package here.
  run(process.execPath, ['scripts/prebuild.mjs', process.arch]);
  const npm = findNpm();
  const packed = run(process.execPath, [npm, 'pack', '--json', '--pack-destination', folder]);
  const [{ filename, files }] = JSON.parse(packed) as [
    { filename: string; files: { path: string }[] },
  ];
  project.provide('tarball', join(folder, filename));
  project.provide(
    'files',
    files.map(({ path }) => path),
  );
  project.provide('npm', npm);
}

/** npm's own JavaScript, so that it can be run without anything on PATH. */
function findNpm(): string {
  const { npm_execpath: running, PATH = '' } = process.env;
  const found = PATH.split(delimiter).map((folder) => join(folder, 'npm'));
  const npm = [running, ...found].find(
    (path) => path?.match(/npm(-cli\.js)?$/) && existsSync(path),
  );
  if (npm === undefined) throw new Error('npm is not on PATH');
  return realpathSync(npm);
}

function run(command: string, args: string[]): string {
  const { status, stdout, stderr } = spawnSync(command, args, { cwd: root, encoding: 'utf8' });
  if (status !== 0) throw new Error(`${command} ${args.join(' ')}: ${stdout}${stderr}`);
  return stdout;
}
