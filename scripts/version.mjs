/**
 * Turns the changesets into the next version and its part of CHANGELOG.md: npm run release:version.
 *
 * changesets knows the packages of a workspace or the one at the root, not both: while it works, the examples, which are
 * not published, are no workspace.
 */
import { spawnSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';

const read = () => JSON.parse(readFileSync('package.json', 'utf8'));
const write = (manifest) => writeFileSync('package.json', `${JSON.stringify(manifest, null, 2)}\n`);
const whole = read();
const { workspaces: _, ...alone } = whole;
write(alone);
let status = null;
try {
  ({ status } = spawnSync('npx', ['--no-install', 'changeset', 'version'], { stdio: 'inherit' }));
} finally {
  write({ ...whole, version: read().version });
}
process.exitCode = status ?? 1;
