// SPDX-License-Identifier: Apache-2.0
/**
 * Boots Debian's kernel in QEMU with the module that `scripts/test-zero-copy.mjs` has built, runs the scenarios in it, and
 * reports: `host.js RELEASE [part of a name…]`. The last line is `N passed, N failed, 0 skipped`.
 */
import { existsSync, mkdirSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Kernel } from '../vm/debian-kernel.js';
import { runQemu } from '../vm/qemu.js';
import { choose } from './scenarios.js';

const here = dirname(fileURLToPath(import.meta.url));
const root = process.cwd();
const [release = '', ...parts] = process.argv.slice(2);
const build = join(root, 'build/zero-copy', release);
/** A kernel of one's own: its directory holds `image`, and the modules below `lib/modules/RELEASE`. */
const directory = process.env['TCMU_ZERO_COPY_KERNEL'];
const faults = process.env['TCMU_ZERO_COPY_FAULTS'] !== undefined;
const slowness = process.env['TCMU_ZERO_COPY_SLOWNESS'] ?? (faults ? '5' : '1');
const chosen = choose(parts, faults);
/** A quarter of an hour for them all, unless one may take longer by itself. */
const limit = Math.max(900, ...chosen.map(({ timeoutSeconds = 0 }) => timeoutSeconds + 120));
const kernel: string | Kernel =
  directory === undefined
    ? release
    : {
        release,
        image: join(directory, 'image'),
        modules: join(directory, 'lib/modules', release),
      };

const passed = new Set<string>();
let failed: string | undefined;
const result = await runQemu({
  cacheDir: join(root, 'build/vm'),
  kernel,
  cwd: root,
  command: [
    'sh',
    '-c',
    'mount -t tmpfs -o size=80% tmpfs /mnt && modprobe brd rd_nr=1 rd_size=131072 && insmod "$TCMU_ZERO_COPY_BUILD/target_core_user.ko" && exec "$@"',
    'sh',
    process.execPath,
    join(here, 'guest.js'),
    ...parts,
  ],
  env: {
    TCMU_ZERO_COPY_BUILD: build,
    TCMU_TEST_SLOWNESS: slowness,
    ...(faults ? { TCMU_ZERO_COPY_FAULTS: '1' } : {}),
  },
  cpus: 2,
  memoryMb: Number(process.env['TCMU_ZERO_COPY_MEMORY'] ?? 2048),
  timeoutSeconds: Number(process.env['TCMU_ZERO_COPY_SECONDS'] ?? limit),
  // Not the stock target_core_user: ours takes its place.
  modules: ['configfs', 'target_core_mod', 'tcm_loop', 'sd_mod', 'sg', 'uio'],
  hot: [
    process.execPath,
    join(root, 'dist'),
    join(root, 'examples/file/dist'),
    join(root, 'build/addon/Release/tcmu.node'),
    here,
    ...[
      '/usr/bin/fio',
      '/usr/bin/sg_raw',
      '/usr/bin/iscsi-test-cu',
      '/usr/bin/iscsi-perf',
      '/usr/bin/tcmu-runner',
    ],
    ...['/usr/bin/dd', '/usr/bin/cmp', '/usr/sbin/mkfs.ext4', '/usr/sbin/e2fsck'],
  ].filter((path) => existsSync(path)),
  onLine: (line) => {
    if (process.env['TCMU_ZERO_COPY_VERBOSE']) console.log(`  ${line}`);
    const [, verdict, name = '', seconds] = /^(pass|FAIL) (\S+) ([\d.]+)$/.exec(line) ?? [];
    if (verdict === undefined) return;
    if (verdict === 'pass') passed.add(name);
    else failed = name;
    const about = chosen.find((one) => one.name === name)?.about;
    console.log(`${verdict}  ${name.padEnd(18)} ${seconds?.padStart(6)} s  ${about}`);
  },
});

mkdirSync(join(build, 'logs'), { recursive: true });
const log = join(build, 'logs/run.log');
writeFileSync(log, `${result.output}\n---- kernel log\n${result.kernelLog}`);
if (failed === undefined && result.exitCode !== 0) {
  failed = result.timedOut
    ? 'out of time'
    : `exit code ${result.exitCode ?? 'none: the kernel went down'}`;
}
if (failed !== undefined) {
  console.log(`failed: ${failed}; the end of ${log}:`);
  console.log(result.output.split('\n').slice(-60).join('\n'));
  console.log(result.kernelLog.split('\n').slice(-20).join('\n'));
}
const expected = chosen.length;
console.log(`kernel ${release}, ${result.seconds.toFixed(0)} s`);
console.log(`${passed.size} passed, ${expected - passed.size} failed, 0 skipped`);
process.exitCode = passed.size === expected && failed === undefined ? 0 : 1;
