// SPDX-License-Identifier: Apache-2.0
import { rmSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { ArgumentError, TargetError } from '../lib/errors.js';
import { type Backstore, createBackstore } from '../lib/target/backstore.js';
import { exportsOf } from '../lib/target/exports.js';
import { localHost } from '../lib/target/host.js';
import { attachIscsi, createIscsiTarget, type IscsiOptions } from '../lib/target/iscsi.js';
import { attachLoopback, createLoopbackTarget } from '../lib/target/loopback.js';
import { attachVhost } from '../lib/target/vhost.js';
import { FakeKernel } from './target-fake.js';

const IQN = 'iqn.2026-01.org.example:disk0';
const CLIENT = 'iqn.2026-01.org.example:client';
const WWN = 'naa.5001405000000001';
const BACKSTORE = ['core/user_0', 'core/user_0/disk0'];
let kernel: FakeKernel;
let backstore: Backstore;

async function make(name: string): Promise<Backstore> {
  return createBackstore({ name, size: 1 << 20, host: kernel.host });
}

beforeEach(async () => {
  kernel = new FakeKernel();
  backstore = await make('disk0');
});
afterEach(() => {
  kernel.destroy();
});

async function failure(action: Promise<unknown>): Promise<TargetError> {
  const error = await action.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(TargetError);
  return error as TargetError;
}

/** Fails each step of an action in turn; nothing but the backstore may be left. */
async function failEachStep(action: () => Promise<{ detach(): Promise<void> }>): Promise<void> {
  kernel.log.length = 0;
  const done = await action();
  const steps = kernel.log.length;
  await done.detach();
  expect(kernel.made()).toEqual(BACKSTORE);
  for (let step = 1; step <= steps; step += 1) {
    let count = 0;
    kernel.failures = ({ call }) => {
      if (call === 'rmdir' || call === 'unlink') return undefined;
      count += 1;
      return count === step ? 'EIO' : undefined;
    };
    expect((await failure(action())).errno).toBe('EIO');
    kernel.failures = () => undefined;
    expect(kernel.made()).toEqual(BACKSTORE);
  }
}

describe('loopback', () => {
  it('makes a disk of a backstore, found by its SCSI address', async () => {
    const disk = await attachLoopback(backstore);
    expect(disk).toMatchObject({
      path: `${kernel.root}/dev/sda`,
      genericPath: `${kernel.root}/dev/sg0`,
      address: '0:0:1:0',
      lun: 0,
    });
    expect(disk.target.wwn).toMatch(/^naa\.5001405[0-9a-f]{9}$/);
    expect(kernel.read('loopback', disk.target.wwn, 'tpgt_1/nexus')).toMatch(/^naa\.5001405/);
    expect(kernel.read('loopback', disk.target.wwn, 'tpgt_1/nexus')).not.toBe(disk.target.wwn);
    expect(await disk.size()).toBe(1 << 20);
    await disk.detach();
    expect(kernel.made()).toEqual(BACKSTORE);
    await disk.detach();
  });

  it('rescans', async () => {
    const disk = await attachLoopback(backstore, { wwn: WWN });
    await disk.rescan();
    expect(kernel.calls().at(-1)).toBe('open-write bus/scsi/devices/0:0:1:0/rescan');
  });

  it('holds several LUNs on one target, and takes them away in any order', async () => {
    const target = await createLoopbackTarget(WWN, kernel.host);
    const other = await make('disk1');
    const [first, second] = [await target.attach(backstore), await target.attach(other)];
    expect([first.lun, second.lun, second.path]).toEqual([0, 1, `${kernel.root}/dev/sdb`]);
    expect((await failure(target.attach(other, 1))).message).toContain(
      'LUN 1 of this target is taken',
    );
    await first.detach();
    expect(target.disks).toEqual([second]);
    expect((await target.attach(backstore)).lun).toBe(0);
    await target[Symbol.asyncDispose]();
    expect(kernel.made().filter((path) => path.startsWith('loopback'))).toEqual([]);
  });

  it('leaves nothing behind, whichever step fails', async () => {
    await failEachStep(() => attachLoopback(backstore));
  });

  it('says that no handler answered, and takes the LUN back', async () => {
    kernel.handlerAnswers = false;
    const error = await failure(attachLoopback(backstore, { wwn: WWN }));
    expect(error.code).toBe('ERR_TCMU_TARGET_NO_DEVICE');
    expect(error.message).toContain('no handler answered INQUIRY');
    expect(error.message).toContain('uio0');
    expect(kernel.made()).toEqual(BACKSTORE);
  });

  it('says how to make the node of a disk', async () => {
    kernel.destroy();
    kernel = new FakeKernel({ deviceTimeout: 50 });
    backstore = await make('disk0');
    kernel.makesNodes = false;
    const error = await failure(attachLoopback(backstore, { wwn: WWN }));
    expect(error.message).toContain(`mknod ${kernel.root}/dev/sda b 8 0`);
  });

  it('attaches what is no disk too', async () => {
    kernel.deviceType = 1;
    const tape = await attachLoopback(backstore);
    expect(tape.genericPath).toBe(`${kernel.root}/dev/sg0`);
    expect(() => tape.path).toThrow(/no block device/);
    await tape.detach();
    expect(kernel.made()).toEqual(BACKSTORE);
  });

  it('says which module is missing', async () => {
    kernel.modules.delete('tcm_loop');
    const error = await failure(attachLoopback(backstore));
    expect(error.code).toBe('ERR_TCMU_TARGET_NO_MODULE');
    expect(error.message).toContain('modprobe tcm_loop');
  });

  it('leaves a mounted disk alone unless forced', async () => {
    const disk = await attachLoopback(backstore);
    kernel.claimed.set('sda', true);
    expect((await failure(disk.detach())).message).toMatch(/sda: it is mounted.*force/);
    kernel.claimed.set('sda', undefined);
    expect((await failure(disk.detach())).message).toMatch(/does not answer.*force/);
    expect(kernel.made().length).toBeGreaterThan(BACKSTORE.length);
    await disk.detach({ force: true });
    expect(kernel.log.find((entry) => entry.path.endsWith('/state'))?.data).toBe('offline');
    expect(kernel.made()).toEqual(BACKSTORE);
  });

  it('does not take a disk for unclaimed that it may not look at', async () => {
    // An attribute without a read side: the kernel refuses root, too, as a device cgroup does.
    const error = await failure(localHost.claimed('/sys/bus/platform/drivers_probe'));
    expect(error.code).toBe('ERR_TCMU_TARGET_PERMISSION');
  });

  it('refuses a backstore that is not enabled, a taken name, a bad name', async () => {
    await attachLoopback(backstore, { wwn: WWN });
    const other = await make('disk1');
    expect((await failure(attachLoopback(other, { wwn: WWN }))).code).toBe(
      'ERR_TCMU_TARGET_NAME_TAKEN',
    );
    await expect(attachLoopback(other, { wwn: '../x' })).rejects.toBeInstanceOf(ArgumentError);
    await expect(attachLoopback(other, { lun: 16384 })).rejects.toBeInstanceOf(ArgumentError);
    kernel.failures = ({ call }) => (call === 'symlink' ? 'ENODEV' : undefined);
    expect((await failure(attachLoopback(other))).message).toContain('not enabled');
  });

  it('names the LUN that keeps a backstore from being removed', async () => {
    const disk = await attachLoopback(backstore, { wwn: WWN });
    const error = await failure(backstore.remove());
    expect(error.code).toBe('ERR_TCMU_TARGET_BUSY');
    expect(error.message).toContain(`loopback/${WWN}/tpgt_1/lun/lun_0`);
    await disk.detach();
    await backstore.remove();
    expect(kernel.made()).toEqual([]);
  });

  it('can be detached later when a step fails first', async () => {
    const disk = await attachLoopback(backstore);
    let busy = true;
    kernel.failures = ({ call, path }) =>
      call === 'rmdir' && path.endsWith('tpgt_1') && busy ? 'EBUSY' : undefined;
    expect((await failure(disk.detach())).code).toBe('ERR_TCMU_TARGET_BUSY');
    busy = false;
    await disk.detach();
    expect(kernel.made()).toEqual(BACKSTORE);
  });
});

describe('iscsi', () => {
  it('offers a backstore, enabled last and disabled first', async () => {
    const lun = await attachIscsi(backstore, {
      iqn: IQN,
      portals: ['127.0.0.1', '[::1]:3261'],
      initiators: [{ name: CLIENT }, { name: `${CLIENT}2`, readOnly: true }],
    });
    expect(lun.url).toBe(`iscsi://127.0.0.1:3260/${IQN}/0`);
    const tpg = `iscsi/${IQN}/tpgt_1`;
    expect(kernel.read(tpg, 'enable')).toBe('1');
    expect(kernel.read(tpg, 'attrib/generate_node_acls')).toBe('0');
    expect(kernel.read(tpg, 'acls', CLIENT, 'lun_0/write_protect')).toBe('0');
    expect(kernel.read(tpg, 'acls', `${CLIENT}2`, 'lun_0/write_protect')).toBe('1');
    expect(kernel.made()).toEqual(
      expect.arrayContaining([`${tpg}/np/127.0.0.1:3260`, `${tpg}/np/[::1]:3261`]),
    );
    expect(kernel.calls().at(-1)).toBe(`open-write ${tpg}/enable`);
    kernel.log.length = 0;
    await lun.target.remove();
    expect(kernel.log[0]).toMatchObject({ path: `${tpg}/enable`, data: '0' });
    expect(kernel.made()).toEqual(BACKSTORE);
    await lun.detach();
    await lun.target.remove();
  });

  it('leaves nothing behind, whichever step fails', async () => {
    await failEachStep(() =>
      attachIscsi(backstore, {
        iqn: IQN,
        initiators: [
          {
            name: CLIENT,
            chap: { user: 'u', password: 'p', mutual: { user: 'm', password: 'q' } },
          },
        ],
      }),
    );
  });

  it('opens to anyone only when told to', async () => {
    const target = await createIscsiTarget({ iqn: IQN, anyone: {}, host: kernel.host });
    const tpg = `iscsi/${IQN}/tpgt_1`;
    expect(kernel.read(tpg, 'attrib/generate_node_acls')).toBe('1');
    expect(kernel.read(tpg, 'attrib/demo_mode_write_protect')).toBe('0');
    expect(kernel.read(tpg, 'attrib/authentication')).toBe('0');
    await target.remove();
    await createIscsiTarget({
      iqn: IQN,
      anyone: { readOnly: true, chap: { user: 'u', password: 'p' } },
      host: kernel.host,
    });
    expect(kernel.read(tpg, 'attrib/demo_mode_write_protect')).toBe('1');
    expect(kernel.read(tpg, 'attrib/authentication')).toBe('1');
    expect(kernel.read(tpg, 'auth/password')).toBe('p');
  });

  it('sets CHAP per initiator, mutual when asked', async () => {
    const lun = await attachIscsi(backstore, {
      iqn: IQN,
      initiators: [
        { name: CLIENT, chap: { user: 'u', password: 'p' } },
        {
          name: `${CLIENT}2`,
          chap: { user: 'u', password: 'p', mutual: { user: 'm', password: 'q' } },
        },
        { name: `${CLIENT}3` },
      ],
    });
    const acls = `${lun.target.path}/acls`;
    const read = (name: string, attribute: string): Promise<string> =>
      kernel.host.read(`${acls}/${name}/${attribute}`);
    expect(await read(CLIENT, 'attrib/authentication')).toBe('1');
    expect(await read(CLIENT, 'auth/userid')).toBe('u');
    expect(await read(CLIENT, 'auth/authenticate_target')).toBe('0');
    expect(await read(`${CLIENT}2`, 'auth/authenticate_target')).toBe('1');
    expect(await read(`${CLIENT}3`, 'attrib/authentication')).toBe('0');
  });

  it('keeps secrets out of everything that can be printed', async () => {
    const chap = {
      user: 'u',
      password: 'a-secret-of-ours',
      mutual: { user: 'm', password: 'a-secret-of-theirs' },
    };
    const options: IscsiOptions = { iqn: IQN, initiators: [{ name: CLIENT, chap }] };
    for (const name of ['password', 'password_mutual']) {
      kernel.failures = ({ path }) => (path.endsWith(`/${name}`) ? 'EPERM' : undefined);
      const error = await failure(attachIscsi(backstore, options));
      expect(error.message).toContain('write a secret to');
      expect(inspectAll(error)).not.toContain('a-secret');
    }
    kernel.failures = () => undefined;
    const lun = await attachIscsi(backstore, options);
    expect(inspectAll(lun)).not.toContain('a-secret');
    const same = { ...chap, mutual: { user: 'm', password: chap.password } };
    const error = await createIscsiTarget({ iqn: IQN, anyone: { chap: same } }).catch(
      (reason: unknown) => reason,
    );
    expect(error).toBeInstanceOf(ArgumentError);
    expect(inspectAll(error)).not.toContain('a-secret');
  });

  it.each<[string, Partial<IscsiOptions>, RegExp]>([
    ['nobody to let in', {}, /who may log in/],
    ['both ways at once', { anyone: {}, initiators: [{ name: CLIENT }] }, /who may log in/],
    ['no portal', { portals: [], anyone: {} }, /at least one/],
    ['a portal twice', { portals: ['::1', '[::1]:3260'], anyone: {} }, /there twice/],
    ['an initiator twice', { initiators: [{ name: CLIENT }, { name: CLIENT }] }, /there twice/],
    ['a host name', { portals: ['localhost'], anyone: {} }, /IP address/],
    ['a bad initiator', { initiators: [{ name: '../x' }] }, /iSCSI name/],
    ['a bad iqn', { iqn: 'disk0', anyone: {} }, /iSCSI name/],
    ['tag 0', { tag: 0, anyone: {} }, /tag/],
    ['an empty secret', { anyone: { chap: { user: 'u', password: '' } } }, /password/],
  ])('refuses %s before touching anything', async (_what, bad, rule) => {
    kernel.log.length = 0;
    const action = attachIscsi(backstore, { iqn: IQN, ...bad });
    await expect(action).rejects.toThrow(rule);
    await expect(action).rejects.toBeInstanceOf(ArgumentError);
    expect(kernel.log).toEqual([]);
  });

  it('explains what is wrong with a portal', async () => {
    kernel.failures = ({ path }) => (path.includes('/np/') ? 'EINVAL' : undefined);
    const error = await failure(attachIscsi(backstore, { iqn: IQN, anyone: {} }));
    expect(error.code).toBe('ERR_TCMU_TARGET_REJECTED');
    expect(error.message).toContain('another program');
    expect(kernel.made()).toEqual(BACKSTORE);
  });

  it('holds several LUNs', async () => {
    const target = await createIscsiTarget({
      iqn: IQN,
      initiators: [{ name: CLIENT }],
      host: kernel.host,
    });
    const other = await make('disk1');
    await target.attach(backstore);
    const second = await target.attach(other);
    expect(second.lun).toBe(1);
    expect(kernel.exists(`iscsi/${IQN}/tpgt_1/acls/${CLIENT}/lun_1/lun`)).toBe(true);
    await second.detach();
    expect(kernel.exists(`iscsi/${IQN}/tpgt_1/acls/${CLIENT}/lun_1`)).toBe(false);
    expect(target.luns).toHaveLength(1);
    await target.remove();
    expect(kernel.exists('iscsi')).toBe(false);
  });
});

describe('vhost', () => {
  it('offers a backstore to virtual machines', async () => {
    const lun = await attachVhost(backstore);
    expect(lun.qemuArguments).toEqual(['-device', `vhost-scsi-pci,wwpn=${lun.wwn}`]);
    expect(kernel.read(`vhost/${lun.wwn}/tpgt_1/nexus`)).toMatch(/^naa\./);
    await lun.detach();
    expect(kernel.made()).toEqual(BACKSTORE);
    await lun.detach();
  });

  it('leaves nothing behind, whichever step fails', async () => {
    await failEachStep(() => attachVhost(backstore));
  });

  it('leaves a target alone that a virtual machine uses', async () => {
    const lun = await attachVhost(backstore, { wwn: WWN });
    kernel.failures = ({ call, path }) =>
      call === 'rmdir' && path === `vhost/${WWN}/tpgt_1` ? 'EBUSY' : undefined;
    const error = await failure(lun.detach());
    expect(error.code).toBe('ERR_TCMU_TARGET_BUSY');
    expect(error.message).toContain('virtual machine');
    expect(kernel.exists(`vhost/${WWN}/tpgt_1/lun/lun_0/disk0`)).toBe(true);
  });

  it('says which module is missing', async () => {
    kernel.modules.delete('vhost_scsi');
    const error = await failure(attachVhost(backstore));
    expect(error.message).toContain('modprobe vhost_scsi');
    expect(kernel.made()).toEqual(BACKSTORE);
  });
});

describe('exportsOf', () => {
  it('finds all that a handler before us has made, and takes it away', async () => {
    await attachLoopback(backstore);
    await attachIscsi(backstore, { iqn: IQN, initiators: [{ name: CLIENT }] });
    await attachVhost(backstore);
    const found = await exportsOf(backstore);
    expect(found.loopback[0]?.path).toBe(`${kernel.root}/dev/sda`);
    expect(found.iscsi[0]?.url).toBe(`iscsi://127.0.0.1:3260/${IQN}/0`);
    expect(found.vhost[0]?.wwn).toMatch(/^naa\./);
    for (const lun of [...found.loopback, ...found.iscsi, ...found.vhost]) await lun.detach();
    expect(kernel.made()).toEqual([...BACKSTORE, 'iscsi', 'loopback', 'vhost']);
    await expect(exportsOf(backstore)).resolves.toEqual({ loopback: [], iscsi: [], vhost: [] });
  });

  it('brings up a disk whose handler died while the kernel was probing it', async () => {
    const disk = await attachLoopback(backstore);
    rmSync(`${kernel.root}/sys/bus/scsi/devices/${disk.address}`, { recursive: true });
    const [found] = (await exportsOf(backstore)).loopback;
    expect(found?.path).toMatch(/\/dev\/sd[ab]$/);
    expect(kernel.log.at(-1)).toMatchObject({ path: 'class/scsi_host/host0/scan', data: '0 1 -' });
  });

  it("leaves a shared target with its other LUNs, and other backstores' alone", async () => {
    const other = await make('disk1');
    const target = await createIscsiTarget({
      iqn: IQN,
      initiators: [{ name: CLIENT }],
      host: kernel.host,
    });
    const port = await createLoopbackTarget(WWN, kernel.host);
    for (const each of [backstore, other]) {
      await target.attach(each);
      await port.attach(each);
    }
    const found = await exportsOf(backstore);
    for (const lun of [...found.loopback, ...found.iscsi]) await lun.detach();
    expect(kernel.made().filter((path) => path.includes('lun_0'))).toEqual([]);
    expect(kernel.exists(`iscsi/${IQN}/tpgt_1/acls/${CLIENT}/lun_1/lun`)).toBe(true);
    expect(kernel.exists(`loopback/${WWN}/tpgt_1/lun/lun_1/disk1`)).toBe(true);
    expect(kernel.read(`iscsi/${IQN}/tpgt_1/enable`)).toBe('1');
  });

  it('attaches anew over what an attach left that was killed at any step', async () => {
    const attaches = {
      loopback: () => attachLoopback(backstore),
      vhost: () => attachVhost(backstore),
      iscsi: () => attachIscsi(backstore, { iqn: IQN, initiators: [{ name: CLIENT }] }),
    };
    for (const attach of Object.values(attaches)) {
      for (let step = 1; ; step += 1) {
        let count = 0;
        // From this step on the process is dead: nothing works, the undoing neither.
        kernel.failures = () => {
          count += 1;
          return count > step ? 'EIO' : undefined;
        };
        const dead = await attach().catch(() => undefined);
        kernel.failures = () => undefined;
        const found = await exportsOf(backstore);
        const kept = [...found.loopback, ...found.iscsi, ...found.vhost];
        const lun = kept[0] ?? (await attach());
        await lun.detach();
        expect(kernel.made().filter((path) => /^\w+\/(naa|iqn)/.test(path))).toEqual([]);
        if (dead !== undefined) break;
      }
    }
  });

  it("never clears away a target that holds somebody else's LUN, or is in use", async () => {
    const other = await make('disk1');
    await attachIscsi(other, { iqn: IQN, anyone: {} });
    await kernel.host.write(kernel.path(`iscsi/${IQN}/tpgt_1/enable`), '0');
    const taken = await failure(attachIscsi(backstore, { iqn: IQN, anyone: {} }));
    expect(taken.code).toBe('ERR_TCMU_TARGET_NAME_TAKEN');
    const empty = `${IQN}2`;
    await createIscsiTarget({ iqn: empty, anyone: {}, host: kernel.host });
    expect((await failure(attachIscsi(backstore, { iqn: empty, anyone: {} }))).code).toBe(
      'ERR_TCMU_TARGET_NAME_TAKEN',
    );
  });
});

/** Everything reachable, causes included, as text. */
function inspectAll(value: unknown): string {
  const seen = new Set<unknown>();
  const parts: string[] = [];
  const walk = (node: unknown): void => {
    if (typeof node === 'string') parts.push(node);
    if (typeof node !== 'object' || node === null || seen.has(node)) return;
    // The fake kernel keeps what was written to it, as the real one does.
    if (node === kernel || node === kernel.host) return;
    seen.add(node);
    for (const key of Reflect.ownKeys(node)) walk((node as Record<PropertyKey, unknown>)[key]);
  };
  walk(value);
  return parts.join('\n');
}
