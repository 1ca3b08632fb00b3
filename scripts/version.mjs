// SPDX-License-Identifier: Apache-2.0
/**
 * Turns the changesets into the next version and its part of CHANGELOG.md: npm run release:version.
 *
 * changesets knows the packages of a workspace or the one at the root, not both: while it works, the examples, which are
 * not published, are no workspace.
 */
import { spawnSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';

const read = (file = 'package.json') => JSON.parse(readFileSync(file, 'utf8'));
const write = (content, file = 'package.json') =>
  writeFileSync(file, `${JSON.stringify(content, null, 2)}\n`);
const whole = read();
const { workspaces: _, ...alone } = whole;
write(alone);
let status = null;
try {
  ({ status } = spawnSync('npx', ['--no-install', 'changeset', 'version'], { stdio: 'inherit' }));
} finally {
  const { version } = read();
  write({ ...whole, version });
  const lock = read('package-lock.json');
  lock.version = version;
  lock.packages[''].version = version;
  write(lock, 'package-lock.json');
}
process.exitCode = status ?? 1;
