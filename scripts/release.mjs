// SPDX-License-Identifier: Apache-2.0
/**
 * Publishes the version that package.json names, with binaries for every processor the package is for.
 *
 *     npm run release -- --dry-run     everything but the publishing: what the tarball would hold, and whether it may
 *     npm run release                  in CI alone: provenance is signed with the identity of the workflow
 *
 * Refuses with changesets left (`npm run release:version` first), a changelog without the version, changes that are not
 * committed, or a tarball that lacks a binary; a version that has a tag is left alone. Debian's cross compiler is needed: node scripts/setup.mjs cross.
 */
import { spawnSync } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { projectRoot, setupOrExit } from './setup.mjs';

const dry = process.argv.includes('--dry-run');
const { version } = JSON.parse(readFileSync(join(projectRoot, 'package.json'), 'utf8'));

// Each push to main comes by here; most of them release nothing.
if (run('git', ['tag', '--list', `v${version}`]) !== '') {
  console.log(`release: v${version} is out already`);
  process.exit(0);
}
const pending = readdirSync(join(projectRoot, '.changeset')).filter(
  (name) => name.endsWith('.md') && name !== 'README.md',
);
if (pending.length > 0)
  refuse(`changesets are left (${pending.join(', ')}): npm run release:version, and commit`);
const changelog = readFileSync(join(projectRoot, 'CHANGELOG.md'), 'utf8');
if (!changelog.split('\n').includes(`## ${version}`))
  refuse(`CHANGELOG.md does not speak of ${version}`);
if (run('git', ['status', '--porcelain']) !== '')
  refuse('there are changes that are not committed');
if (!dry && process.env.GITHUB_ACTIONS !== 'true')
  refuse('publishing is done by .github/workflows/release.yml; here: --dry-run');

const { missing } = setupOrExit(['cross']);
if (missing.length > 0) process.exit(1);
run(process.execPath, ['scripts/prebuild.mjs']);
const [{ files, filename, size }] = JSON.parse(run('npm', ['pack', '--dry-run', '--json']));
const paths = files.map(({ path }) => path);
for (const needed of [
  ...['x64', 'arm64'].map((arch) => `prebuilds/linux-${arch}/tcmu.glibc.node`),
  ...['index', 'scsi', 'store', 'target', 'sim', 'program'].flatMap((entry) =>
    ['js', 'cjs', 'd.ts', 'd.cts'].map((ending) => `dist/${entry}.${ending}`),
  ),
  ...['LICENSE', 'README.md', 'dist/cli.js'],
]) {
  if (!paths.includes(needed)) refuse(`${filename} would lack ${needed}`);
}
console.log(`release: ${filename}, ${(size / 2 ** 20).toFixed(1)} MiB, ${paths.length} files`);
if (!dry) {
  // Provenance names the repository of the workflow, and the registry compares it with package.json.
  const { GITHUB_SERVER_URL: server, GITHUB_REPOSITORY: repository } = process.env;
  run('npm', [
    'pkg',
    'set',
    'repository.type=git',
    `repository.url=git+${server}/${repository}.git`,
  ]);
  run('npm', ['publish', '--provenance', '--access', 'public'], 'inherit');
  // changesets/action pushes the tag that it reads here, and makes a release of it.
  run('git', ['tag', `v${version}`]);
  console.log(`New tag: v${version}`);
}

/** @returns {string} what it prints */
function run(command, args, stdout = 'pipe') {
  const done = spawnSync(command, args, {
    cwd: projectRoot,
    encoding: 'utf8',
    stdio: ['ignore', stdout, 'inherit'],
    maxBuffer: 1 << 26,
  });
  if (done.status !== 0)
    refuse(`${command} ${args.join(' ')} failed${done.error ? `: ${done.error.message}` : ''}`);
  return done.stdout ?? '';
}

function refuse(why) {
  console.error(`release: ${why}`);
  process.exit(1);
}
