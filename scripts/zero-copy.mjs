// SPDX-License-Identifier: Apache-2.0
/**
 * Builds what tests and benchmarks of zero copy need into build/zero-copy/RELEASE: the kernel module and the test module
 * against the installed linux-headers, and the handler in C.
 */
import { spawnSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readdirSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { projectRoot } from './setup.mjs';

const kernelDir = join(projectRoot, 'kernel');

/** Runs a step; ends the process when it fails. */
function run(command, args) {
  const { status, error } = spawnSync(command, args, { stdio: 'inherit' });
  if (status === 0) return;
  console.error(error ? String(error) : `${command} failed (above)`);
  console.log('0 passed, 1 failed, 0 skipped');
  process.exit(1);
}

/** Compiles one C file. */
export function compile(source, target) {
  run('gcc', ['-O2', '-Wall', '-Wextra', '-Werror', '-pthread', '-o', target, source]);
}

/** The newest release of the series that headers are installed for. */
function newestHeaders(series) {
  return readdirSync('/usr/src')
    .map((name) => /^linux-headers-(\d.*-amd64)$/.exec(name)?.[1])
    .filter((release) => release?.startsWith(`${series}.`) && !/-(rt|cloud)-/.test(release))
    .sort((a, b) => b.localeCompare(a, 'en', { numeric: true }))[0];
}

/**
 * TCMU_ZERO_COPY_RELEASE names another kernel than Debian's newest 6.1, TCMU_ZERO_COPY_HEADERS its build tree when it isn't
 * one of Debian's, TCMU_ZERO_COPY_SOURCE its source.
 */
export function buildZeroCopy() {
  const { TCMU_ZERO_COPY_HEADERS: headers, TCMU_ZERO_COPY_SOURCE: source } = process.env;
  const release = process.env.TCMU_ZERO_COPY_RELEASE ?? newestHeaders('6.1') ?? '6.1 of Debian';
  const out = join(projectRoot, 'build/zero-copy', release);
  mkdirSync(join(out, 'bidi'), { recursive: true });
  compile(join(projectRoot, 'test/zero-copy/programs/consumer.c'), join(out, 'consumer'));
  const bidi = join(kernelDir, 'test/tcmu_bidi_test.c');
  const inputs = readdirSync(kernelDir, { recursive: true }).map((name) => join(kernelDir, name));
  const stamp = join(out, 'built');
  if (existsSync(stamp)) {
    const { mtimeMs } = statSync(stamp);
    if (inputs.every((input) => statSync(input).mtimeMs < mtimeMs)) return { out, release };
  }
  run(join(kernelDir, 'build.sh'), [
    ...['--kernel', release, '--out', out],
    ...(headers === undefined ? [] : ['--headers', headers]),
    ...(source === undefined ? [] : ['--source', source]),
  ]);
  cpSync(bidi, join(out, 'bidi/tcmu_bidi_test.c'));
  writeFileSync(join(out, 'bidi/Kbuild'), 'obj-m := tcmu_bidi_test.o\n');
  const tree = headers ?? `/usr/src/linux-headers-${release}`;
  run('make', ['-s', '-C', tree, `M=${join(out, 'bidi')}`, 'modules']);
  cpSync(join(out, 'bidi/tcmu_bidi_test.ko'), join(out, 'tcmu_bidi_test.ko'));
  writeFileSync(stamp, '');
  return { out, release };
}
