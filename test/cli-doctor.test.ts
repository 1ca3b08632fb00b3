// SPDX-License-Identifier: Apache-2.0
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { describe as describeDiagnosis, type Examined, examine } from '../lib/cli/doctor.js';

let root: string;
const put = (path: string, text = ''): void => {
  mkdirSync(dirname(join(root, path)), { recursive: true });
  writeFileSync(join(root, path), text);
};
const me = (changes: Partial<Examined> = {}): Examined => ({
  root,
  platform: 'linux',
  arch: 'x64',
  node: 'v22.1.0',
  uid: 0,
  addonFailure: undefined,
  ...changes,
});
const finding = (name: string, changes: Partial<Examined> = {}) =>
  examine(me(changes)).findings.find((entry) => entry.name === name);

/** A machine that lacks nothing. */
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'tcmu-doctor-'));
  put('proc/sys/kernel/osrelease', '6.1.0-28-amd64\n');
  put('proc/mounts', 'sysfs /sys sysfs rw 0 0\nnone /sys/kernel/config configfs rw,relatime 0 0\n');
  put(
    'proc/self/limits',
    'Max open files            1048576              1048576              files\n',
  );
  put('sys/kernel/config/target/version', 'v5.0');
  for (const module of ['target_core_user', 'tcm_loop', 'iscsi_target_mod']) {
    put(`sys/module/${module}/refcnt`, '0');
  }
  put('lib/modules/6.1.0-28-amd64/modules.builtin', 'kernel/drivers/vhost/vhost-scsi.ko\n');
  put('sys/module/target_core_user/parameters/global_max_data_area_mb', '2048\n');
  put('sys/module/target_core_user/parameters/block_netlink', 'unblocked\n');
  put('sys/class/uio/uio0/name', 'tcm-user/0/d0/file//srv/d0\n');
  put('sys/class/uio/uio1/name', 'a_card\n');
  put('dev/uio0');
  put('etc/target/pr/aptpl_x');
});
afterEach(() => rmSync(root, { recursive: true }));

test('a machine that lacks nothing is fine, and every finding says what was found', () => {
  const diagnosis = examine(me());
  expect(diagnosis.findings.filter(({ verdict }) => verdict !== 'ok')).toEqual([]);
  expect(diagnosis).toMatchObject({ ok: true, kernel: '6.1.0-28-amd64', node: 'v22.1.0' });
  expect(diagnosis.findings.map(({ name }) => name)).toContain('device:uio0');
  expect(diagnosis.findings.map(({ name }) => name)).not.toContain('device:uio1');
});

test('a module that can be loaded names modprobe, one that is not there a package', () => {
  rmSync(join(root, 'sys/module/target_core_user'), { recursive: true });
  expect(finding('module:target_core_user')).toMatchObject({ verdict: 'missing' });
  put('etc/os-release', 'NAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\n');
  expect(finding('module:target_core_user')?.mend).toBe(
    'apt-get install linux-modules-extra-6.1.0-28-amd64',
  );
  put('etc/os-release', 'ID=debian\n');
  expect(finding('module:target_core_user')?.mend).toMatch(/apt-get install linux-image-/);
  put(
    'lib/modules/6.1.0-28-amd64/modules.dep',
    'kernel/drivers/target/target_core_user.ko.xz: kernel/drivers/uio/uio.ko.xz\n',
  );
  expect(finding('module:target_core_user')).toMatchObject({
    verdict: 'missing',
    mend: 'modprobe target_core_user',
  });
});

test('a fabric that is missing is a warning: the others work', () => {
  rmSync(join(root, 'sys/module/tcm_loop'), { recursive: true });
  expect(examine(me()).ok).toBe(true);
  expect(finding('module:tcm_loop')?.verdict).toBe('warning');
});

test.each([
  ['', 'mount -t configfs none /sys/kernel/config'],
  ['none /sys/kernel/config configfs ro,relatime 0 0', /remount,rw/],
])('configfs mounted as %j', (mounts, mend) => {
  put('proc/mounts', mounts);
  expect(finding('configfs')).toMatchObject({
    verdict: 'missing',
    mend: expect.stringMatching(mend),
  });
});

test('configfs without the target core', () => {
  rmSync(join(root, 'sys/kernel/config/target'), { recursive: true });
  expect(finding('configfs')?.mend).toBe('modprobe target_core_mod');
});

test('Node, platform, addon, kernel and user', () => {
  expect(finding('node', { node: 'v20.16.0' })?.verdict).toBe('missing');
  expect(finding('node', { node: 'v20.17.0' })?.verdict).toBe('ok');
  expect(finding('platform', { platform: 'darwin' })?.verdict).toBe('missing');
  const addonFailure = new Error('no binary');
  expect(finding('addon', { addonFailure })).toMatchObject({
    verdict: 'missing',
    found: 'no binary',
    mend: expect.stringContaining('npx tcmu compile'),
  });
  expect(finding('permission', { uid: 1000 })?.verdict).toBe('warning');
  put('proc/sys/kernel/osrelease', '5.9.16\n');
  expect(finding('kernel')?.verdict).toBe('warning');
});

test('limits, a blocked netlink, a device without a node', () => {
  put('sys/module/target_core_user/parameters/global_max_data_area_mb', '256\n');
  expect(finding('data-area')?.mend).toMatch(/^echo 2048 > \/sys\/module\/target_core_user\//);
  put('sys/module/target_core_user/parameters/block_netlink', 'blocked\n');
  expect(finding('netlink')?.mend).toMatch(/reset_netlink; echo 0 > .*block_netlink$/);
  put(
    'proc/self/limits',
    'Max open files            256                  256                  files\n',
  );
  expect(finding('open-files')?.verdict).toBe('warning');
  rmSync(join(root, 'dev/uio0'));
  put('sys/class/uio/uio0/dev', '243:0\n');
  expect(finding('device:uio0')?.mend).toBe('mknod /dev/uio0 c 243 0');
  rmSync(join(root, 'etc/target'), { recursive: true });
  expect(finding('reservations')?.verdict).toBe('warning');
});

test('an empty machine is described with a mend for every lack', () => {
  rmSync(root, { recursive: true });
  mkdirSync(root);
  const diagnosis = examine(me());
  expect(diagnosis.ok).toBe(false);
  for (const { verdict, mend } of diagnosis.findings)
    expect(mend !== undefined).toBe(verdict !== 'ok');
  const text = describeDiagnosis(diagnosis);
  expect(text).toContain('MISSING  configfs: not mounted\n           → mount -t configfs');
  expect(text).toMatch(/Missing: 2\./);
});
