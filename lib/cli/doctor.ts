// SPDX-License-Identifier: Apache-2.0
/**
 * What this machine has and lacks for serving devices, each lack with the command that mends it.
 *
 * Reads only: nothing is loaded, mounted or written. Everything but the process itself is looked up below
 * `root`, so that tests (and a container that sees its host's files) can look elsewhere.
 */
import { accessSync, constants, existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';

/** `missing`: nothing can be served; `warning`: something can't, or will bite; `ok`. */
export type Verdict = 'ok' | 'warning' | 'missing';

export interface Finding {
  /** Stable, for programs: `module:tcm_loop`. */
  readonly name: string;
  readonly verdict: Verdict;
  /** What was found. */
  readonly found: string;
  /** A command, or a sentence where no command does it. Present unless the verdict is `ok`. */
  readonly mend?: string;
}

export interface Diagnosis {
  /** No finding is `missing`. */
  readonly ok: boolean;
  readonly kernel: string;
  readonly node: string;
  readonly findings: readonly Finding[];
}

/** What the process is, apart from the files it sees. */
export interface Examined {
  root: string;
  platform: string;
  arch: string;
  node: string;
  uid: number;
  /** Why the addon did not load; undefined when it did. */
  addonFailure: Error | undefined;
}

const MODULES = [
  { name: 'target_core_user', for: 'any device', required: true },
  { name: 'tcm_loop', for: "export: 'loopback'", required: false },
  { name: 'iscsi_target_mod', for: "export: { type: 'iscsi' }", required: false },
  { name: 'vhost_scsi', for: "export: 'vhost'", required: false },
];
const NODE_FLOOR = [20, 17];
/** Older ones lack task management notification (5.10), of what the package uses. */
const KERNEL_FLOOR = [5, 10];
/** What a few devices with many connections and files need. */
const FILES_FLOOR = 1024;

export function examine(examined: Examined): Diagnosis {
  const { root } = examined;
  const at = (...parts: string[]): string => join(root, ...parts);
  const read = (...parts: string[]): string | undefined => {
    try {
      return readFileSync(at(...parts), 'utf8').trim();
    } catch {
      return undefined;
    }
  };
  const kernel = read('proc/sys/kernel/osrelease') ?? 'unknown';
  const findings: Finding[] = [];
  const add = (name: string, verdict: Verdict, found: string, mend?: string): void => {
    findings.push({ name, verdict, found, ...(mend === undefined ? {} : { mend }) });
  };

  if (examined.platform === 'linux') add('platform', 'ok', `linux-${examined.arch}`);
  else
    add(
      'platform',
      'missing',
      examined.platform,
      'TCMU exists on Linux only; tests can run in a container or VM',
    );
  if (atLeast(examined.node, NODE_FLOOR)) add('node', 'ok', examined.node);
  else
    add(
      'node',
      'missing',
      examined.node,
      `install Node.js ${NODE_FLOOR.join('.')} or later: https://nodejs.org`,
    );
  const { addonFailure } = examined;
  if (addonFailure === undefined) add('addon', 'ok', 'loads');
  else add('addon', 'missing', addonFailure.message, 'npx tcmu compile (cmake, a C++20 compiler)');

  if (atLeast(kernel, KERNEL_FLOOR)) add('kernel', 'ok', kernel);
  else
    add(
      'kernel',
      'warning',
      kernel,
      `Linux ${KERNEL_FLOOR.join('.')} or later tells handlers of aborts and resets`,
    );

  const builtIn = read('lib/modules', kernel, 'modules.builtin') ?? '';
  const loadable = read('lib/modules', kernel, 'modules.dep') ?? '';
  for (const { name, for: use, required } of MODULES) {
    const id = `module:${name}`;
    const file = new RegExp(`(^|/)${name.replaceAll('_', '[-_]')}\\.ko`, 'm');
    if (existsSync(at('sys/module', name)) || file.test(builtIn)) {
      add(id, 'ok', `there, for ${use}`);
    } else if (file.test(loadable)) {
      add(id, required ? 'missing' : 'warning', `not loaded, for ${use}`, `modprobe ${name}`);
    } else {
      const found = `not in this kernel, for ${use}`;
      add(
        id,
        required ? 'missing' : 'warning',
        found,
        kernelPackage(read('etc/os-release'), kernel),
      );
    }
  }

  const mounts = (read('proc/mounts') ?? '').split('\n').map((line) => line.split(' '));
  const configfs = mounts.find(([, , type]) => type === 'configfs');
  if (configfs === undefined) {
    add('configfs', 'missing', 'not mounted', 'mount -t configfs none /sys/kernel/config');
  } else if (configfs[3]?.split(',').includes('ro')) {
    const mend =
      'mount -o remount,rw /sys/kernel/config, or run the container with it mounted writable';
    add('configfs', 'missing', `mounted read-only at ${configfs[1]}`, mend);
  } else if (!existsSync(at('sys/kernel/config/target'))) {
    add('configfs', 'missing', 'mounted, but without target/', 'modprobe target_core_mod');
  } else add('configfs', 'ok', `mounted at ${configfs[1]}`);

  if (examined.uid === 0) add('permission', 'ok', 'root');
  else {
    const mend =
      'sudo for creating and attaching devices; serving needs the uio device alone (docs/deployment.md)';
    add('permission', 'warning', `user ${examined.uid}`, mend);
  }

  for (const uio of list(at('sys/class/uio'))) {
    const label = read('sys/class/uio', uio, 'name');
    if (!label?.startsWith('tcm-user/')) continue;
    const node = at('dev', uio);
    if (!existsSync(node)) {
      const mend = `mknod /dev/${uio} c ${(read('sys/class/uio', uio, 'dev') ?? 'MAJOR:MINOR').replace(':', ' ')}`;
      add(`device:${uio}`, 'warning', `${label}, without a node in /dev`, mend);
    } else if (usable(node)) add(`device:${uio}`, 'ok', label);
    else
      add(
        `device:${uio}`,
        'warning',
        `${label}, not accessible to this user`,
        `setfacl -m u:${examined.uid}:rw /dev/${uio}`,
      );
  }

  const parameters = 'sys/module/target_core_user/parameters';
  if (read(parameters, 'block_netlink') === 'blocked') {
    const folder = `/${parameters}`;
    const mend = `echo 1 > ${folder}/reset_netlink; echo 0 > ${folder}/block_netlink`;
    add('netlink', 'warning', 'blocked: no device can be created or removed', mend);
  }
  const area = read(parameters, 'global_max_data_area_mb');
  if (area !== undefined) {
    const found = `${area} MiB of data area for all devices together`;
    // The kernel's default for one device is 1024.
    if (Number(area) >= 1024) add('data-area', 'ok', found);
    else add('data-area', 'warning', found, `echo 2048 > /${parameters}/global_max_data_area_mb`);
  }
  const files = /^Max open files +(\d+|unlimited)/m.exec(read('proc/self/limits') ?? '')?.[1];
  if (files !== undefined) {
    if (files === 'unlimited' || Number(files) >= FILES_FLOOR) add('open-files', 'ok', files);
    else add('open-files', 'warning', files, 'ulimit -n 65536 (systemd: LimitNOFILE=65536)');
  }
  const reservations = ['etc/target/pr', 'var/target/pr'].find((path) => existsSync(at(path)));
  if (reservations !== undefined) add('reservations', 'ok', `kept in /${reservations}`);
  else {
    const mend = 'mkdir -p /etc/target/pr /etc/target/alua, before the target core is loaded';
    add('reservations', 'warning', 'persistent reservations are lost at a restart', mend);
  }

  return {
    ok: findings.every(({ verdict }) => verdict !== 'missing'),
    kernel,
    node: examined.node,
    findings,
  };
}

/** For people: one line a finding, and the command below it. */
export function describe(diagnosis: Diagnosis): string {
  const marks: Record<Verdict, string> = { ok: 'ok     ', warning: 'warning', missing: 'MISSING' };
  const lines = diagnosis.findings.flatMap(({ name, verdict, found, mend }) => [
    `${marks[verdict]}  ${name}: ${found.split('\n').join('\n           ')}`,
    ...(mend === undefined ? [] : [`           → ${mend}`]),
  ]);
  const missing = diagnosis.findings.filter(({ verdict }) => verdict === 'missing').length;
  const end =
    missing === 0
      ? 'Devices can be served here.'
      : `Missing: ${missing}. The simulated kernel (tcmu/sim) needs the addon alone.`;
  return `${[...lines, '', end].join('\n')}\n`;
}

function kernelPackage(release: string | undefined, kernel: string): string {
  const id = `${/^ID=(.*)$/m.exec(release ?? '')?.[1]} ${/^ID_LIKE=(.*)$/m.exec(release ?? '')?.[1]}`;
  if (id.includes('ubuntu')) return `apt-get install linux-modules-extra-${kernel}`;
  if (id.includes('debian'))
    return 'apt-get install linux-image-$(dpkg --print-architecture), and boot it';
  return 'boot a kernel that has it (CONFIG_TCM_USER2, CONFIG_LOOPBACK_TARGET, CONFIG_ISCSI_TARGET, CONFIG_VHOST_SCSI)';
}

function atLeast(version: string, floor: readonly number[]): boolean {
  const [major = 0, minor = 0] = (/(\d+)\.(\d+)/.exec(version)?.slice(1) ?? []).map(Number);
  const [wantedMajor = 0, wantedMinor = 0] = floor;
  return major > wantedMajor || (major === wantedMajor && minor >= wantedMinor);
}

function list(path: string): string[] {
  try {
    return readdirSync(path).sort();
  } catch {
    return [];
  }
}

function usable(path: string): boolean {
  try {
    accessSync(path, constants.R_OK | constants.W_OK);
    return true;
  } catch {
    return false;
  }
}
