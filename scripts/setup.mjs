// SPDX-License-Identifier: Apache-2.0
/**
 * Makes sure that a fresh clone can do what is asked of it: Node, Debian packages, npm packages, the build.
 *
 *     node scripts/setup.mjs [build] [kernel] [fuzz] [peer] [qemu] [nbd] [s3] [s3peer] [bench] [cross] [docs] [tidy] [zero-copy]
 *
 * Does only what is missing, and says what it does. What it can't do (packages, without root or outside
 * Debian) it names, with the command that does, and goes on. Imports nothing but Node: it runs before npm ci.
 */
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { canInstall, missingPackages } from './packages.mjs';

export const projectRoot = dirname(dirname(fileURLToPath(import.meta.url)));

/** What stops working without the packages of a purpose. */
const consequences = {
  build: 'the addon cannot be compiled',
  kernel: 'nothing that needs a real kernel can run',
  fuzz: 'the ring is not fuzzed',
  peer: 'nothing is compared with tcmu-runner',
  qemu: 'the qcow example cannot be tested: its judge is QEMU',
  nbd: 'the NBD server is tested by its own client only',
  bench: 'some of the peers and the counting of instructions are missing',
  cross: 'no binary for arm64 can be made and tried',
  tidy: 'the C++ is not checked by clang-tidy',
  docs: 'the documentation cannot be looked at in a browser',
  'zero-copy': 'the kernel module with zero copy is neither built nor tested',
  s3: 'the S3 example is tested against a server in memory only',
  s3peer: 'the S3 example is not compared with s3backer and nbdkit',
};

class SetupError extends Error {}

/**
 * @param {string[]} purposes
 * @param {{ demo?: boolean }} options `demo`: of the build only what can be run, without types, the library and the
 *   file example: a newcomer is waiting
 * @returns {{ missing: { name: string, for: string }[] }} packages that are still missing
 */
export function setup(purposes, { demo = false } = {}) {
  checkNode();
  const missing = installPackages(['build', ...purposes]);
  installModules();
  build(missing, demo);
  return { missing };
}

function checkNode() {
  const { engines } = JSON.parse(readFileSync(join(projectRoot, 'package.json'), 'utf8'));
  const wanted = /(\d+)\.(\d+)/.exec(engines.node);
  const [major, minor] = process.versions.node.split('.').map(Number);
  if (major < Number(wanted[1]) || (major === Number(wanted[1]) && minor < Number(wanted[2]))) {
    throw new SetupError(
      `Node.js ${process.versions.node} is too old: install ${wanted[0]} or later (https://nodejs.org)`,
    );
  }
}

function installPackages(purposes) {
  let missing = missingPackages(purposes);
  if (missing.length > 0 && canInstall()) {
    // The first round may bring what names the rest (clang, its runtime's version).
    for (let round = 0; round < 2 && missing.length > 0; round++) {
      if (round === 0) run('apt-get', ['-qq', 'update'], 'update the package lists');
      const names = missing.map(({ name }) => name);
      const install = ['-qq', '-y', '--no-install-recommends', 'install'];
      if (!run('apt-get', [...install, ...names], `install ${names.join(' ')}`)) {
        // One package that this release lacks must not cost the others.
        for (const name of names) run('apt-get', [...install, name], `install ${name}`);
      }
      missing = missingPackages(purposes);
    }
  }
  for (const purpose of new Set(missing.map((entry) => entry.for))) {
    const names = missing.filter((entry) => entry.for === purpose).map(({ name }) => name);
    console.log(`setup: missing: ${names.join(' ')}; without them ${consequences[purpose]}`);
    console.log(
      `       on Debian: sudo apt-get install --no-install-recommends ${names.join(' ')}`,
    );
  }
  return missing;
}

/** npm's own record of what it installed says whether it is what the lock file asks for. */
function installedModulesMatch() {
  const record = join(projectRoot, 'node_modules/.package-lock.json');
  if (!existsSync(record)) return false;
  const installed = JSON.parse(readFileSync(record, 'utf8')).packages;
  const wanted = JSON.parse(readFileSync(join(projectRoot, 'package-lock.json'), 'utf8')).packages;
  return Object.entries(wanted).every(
    ([path, entry]) =>
      !path.startsWith('node_modules/') ||
      (installed[path] === undefined
        ? entry.optional === true
        : installed[path].version === entry.version),
  );
}

function installModules() {
  if (installedModulesMatch()) return;
  if (!run('npm', ['ci', '--no-audit', '--no-fund'], 'npm ci')) {
    throw new SetupError('npm ci failed (its output is above)');
  }
}

/** A hash over everything that the build reads. */
function sourceHash() {
  const hash = createHash('sha256').update(process.versions.modules).update(process.arch);
  const add = (path) => {
    for (const entry of readdirSync(path, { withFileTypes: true }).sort((a, b) =>
      a.name < b.name ? -1 : 1,
    )) {
      if (['node_modules', 'dist', 'build'].includes(entry.name)) continue;
      const child = join(path, entry.name);
      if (entry.isDirectory()) add(child);
      else if (entry.isFile()) hash.update(child).update(readFileSync(child));
    }
  };
  for (const dir of ['lib', 'addon', 'examples']) {
    if (existsSync(join(projectRoot, dir))) add(join(projectRoot, dir));
  }
  for (const file of ['package-lock.json', 'tsconfig.json', 'tsup.config.ts', 'CMakeLists.txt']) {
    hash.update(readFileSync(join(projectRoot, file)));
  }
  return hash.digest('hex');
}

function build(missing, demo) {
  const stamps = ['setup-stamp', 'demo-stamp'].map((name) => join(projectRoot, 'build', name));
  const hash = sourceHash();
  const built =
    existsSync(join(projectRoot, 'dist/index.js')) &&
    stamps
      .slice(0, demo ? 2 : 1)
      .some((stamp) => existsSync(stamp) && readFileSync(stamp, 'utf8') === hash);
  if (built) return;
  if (missing.some((entry) => entry.for === 'build')) {
    throw new SetupError('the build needs the packages named above');
  }
  // A build that fails half-way leaves neither the old result nor the new one.
  for (const stamp of stamps) rmSync(stamp, { force: true });
  const script = demo ? 'build:demo' : 'build';
  if (!run('npm', ['run', script], `npm run ${script}`)) {
    throw new SetupError('the build failed (its output is above)');
  }
  const stamp = stamps[demo ? 1 : 0];
  mkdirSync(dirname(stamp), { recursive: true });
  writeFileSync(stamp, hash);
}

/** Runs a step quietly; its output is shown only when it fails. */
function run(command, args, what) {
  const started = Date.now();
  process.stdout.write(`setup: ${what} … `);
  const { status, stdout, stderr, error } = spawnSync(command, args, {
    cwd: projectRoot,
    env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive' },
    stdio: ['ignore', 'pipe', 'pipe'],
    maxBuffer: 1 << 28,
  });
  const seconds = ((Date.now() - started) / 1000).toFixed(0);
  if (status === 0) {
    console.log(`done (${seconds} s)`);
    return true;
  }
  console.log(`failed (${seconds} s)`);
  console.log(`${stdout ?? ''}${stderr ?? ''}${error?.message ?? ''}`.trimEnd());
  return false;
}

/** As `setup`; when it fails, says why, and `lastWords`, and ends the process. */
export function setupOrExit(purposes, lastWords, options) {
  try {
    return setup(purposes, options);
  } catch (error) {
    if (!(error instanceof SetupError)) throw error;
    console.error(`setup: ${error.message}`);
    if (lastWords !== undefined) console.log(lastWords);
    process.exit(1);
  }
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const purposes = process.argv.slice(2);
  const unknown = purposes.filter((purpose) => !(purpose in consequences));
  if (unknown.length > 0) {
    console.error(
      `setup: unknown: ${unknown.join(' ')}; known: ${Object.keys(consequences).join(' ')}`,
    );
    process.exit(2);
  }
  setupOrExit(purposes);
}
