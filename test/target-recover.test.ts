// SPDX-License-Identifier: Apache-2.0
import { rmSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { TargetError } from '../lib/errors.js';
import { type Backstore, createBackstore } from '../lib/target/backstore.js';
import { discover } from '../lib/target/discover.js';
import { attachLoopback } from '../lib/target/loopback.js';
import { recoverBackstore, takeOver } from '../lib/target/recover.js';
import { rescueNetlink } from '../lib/target/rescue.js';
import { FakeKernel } from './target-fake.js';

let kernel: FakeKernel;

beforeEach(() => {
  kernel = new FakeKernel();
});
afterEach(() => {
  kernel.destroy();
});

async function make(name: string, config = `file/${name}`): Promise<Backstore> {
  return createBackstore({ name, size: 1 << 20, config, host: kernel.host });
}

function actions(): string[] {
  return kernel.log
    .filter(({ path }) => /action|parameters/.test(path))
    .map(({ path, data }) => `${path.split('/').at(-1)}=${data}`);
}

describe('recoverBackstore', () => {
  it('blocks, empties the ring, opens, unblocks', async () => {
    const backstore = await make('disk0');
    const value = await recoverBackstore(backstore, async (given) => {
      expect(given).toBe(backstore);
      expect((await backstore.settings()).blocked).toBe(true);
      expect(actions()).toEqual(['block_dev=1', 'reset_ring=1']);
      return 'served';
    });
    expect(value).toBe('served');
    expect(actions()).toEqual(['block_dev=1', 'reset_ring=1', 'block_dev=0']);
  });

  it('fails what was in flight when told to', async () => {
    await recoverBackstore(await make('disk0'), () => {}, { inFlight: 'fail' });
    expect(actions()).toEqual(['block_dev=1', 'reset_ring=2', 'block_dev=0']);
  });

  it('unblocks also when the handler could not be opened, or the ring not reset', async () => {
    const backstore = await make('disk0');
    const problem = new Error('no such file');
    const failed = recoverBackstore(backstore, () => {
      throw problem;
    });
    await expect(failed).rejects.toBe(problem);
    expect(actions().at(-1)).toBe('block_dev=0');
    kernel.failures = ({ path }) => (path.endsWith('reset_ring') ? 'EINVAL' : undefined);
    await expect(recoverBackstore(backstore, () => {})).rejects.toMatchObject({ errno: 'EINVAL' });
    expect(actions().at(-1)).toBe('block_dev=0');
    expect((await backstore.settings()).blocked).toBe(false);
  });

  it('tells both what failed and that it is still blocked', async () => {
    const backstore = await make('disk0');
    kernel.failures = ({ path, data }) =>
      path.endsWith('block_dev') && data === '0' ? 'EIO' : undefined;
    const failed = recoverBackstore(backstore, () => Promise.reject(new Error('no such file')));
    await expect(failed).rejects.toThrow(/^no such file\nUndoing.*\n.*block_dev: EIO/);
  });

  it('changes nothing when there is no uio device to take', async () => {
    const backstore = await make('disk0');
    rmSync(backstore.uioPath);
    await expect(recoverBackstore(backstore, () => {})).rejects.toMatchObject({
      code: 'ERR_TCMU_TARGET_NOT_FOUND',
      path: backstore.uioPath,
    });
    expect(actions()).toEqual([]);
  });
});

describe('takeOver', () => {
  it('brings every device back: blocked ones, disabled ones, in spite of bad ones', async () => {
    const { host } = kernel;
    await make('good');
    await (await make('blocked')).block();
    await make('bad');
    await make('slow');
    await make('foreign', 'qcow/foreign');
    await host.mkdir(host.target('core/user_9'));
    await host.mkdir(host.target('core/user_9/half'));
    await host.write(host.target('core/user_9/half/attrib/dev_config'), 'file/half');
    await host.mkdir(host.target('core/user_8'));
    await host.mkdir(host.target('core/user_8/new'));
    await host.write(host.target('core/user_8/new/attrib/dev_config'), 'file/new');
    await host.write(host.target('core/user_8/new/control'), 'dev_size=1048576,hw_block_size=512');

    const opened: string[] = [];
    let release = (): void => {};
    const slow = new Promise<void>((resolve) => {
      release = resolve;
    });
    const all = takeOver(
      async ({ name }) => {
        if (name === 'slow') await slow;
        if (name === 'bad') throw new Error('cannot open it');
        opened.push(name);
        if (opened.length === 3) release();
        return name.toUpperCase();
      },
      { subtype: 'file', host },
    );
    const results = await all;
    expect(opened.sort()).toEqual(['blocked', 'good', 'new', 'slow']);
    const byName = Object.fromEntries(results.map((result) => [result.backstore.name, result]));
    expect(Object.keys(byName).sort()).toEqual(['bad', 'blocked', 'good', 'new', 'slow']);
    expect(byName['good']?.value).toBe('GOOD');
    expect(byName['bad']?.error).toBeInstanceOf(TargetError);
    expect(byName['bad']?.error?.message).toContain('cannot open it');
    for (const { backstore } of results) {
      expect(await backstore.settings()).toMatchObject({ blocked: false, enabled: true });
    }
  });
});

describe('discover', () => {
  it('finds backstores with their settings, devices and users', async () => {
    const backstore = await make('disk0');
    const disk = await attachLoopback(backstore);
    await kernel.host.mkdir(kernel.path('core/user_5'));
    await kernel.host.mkdir(kernel.path('core/user_5/half'));
    const { backstores, problems } = await discover(kernel.host);
    expect(problems).toEqual([]);
    expect(backstores.map((found) => found.backstore.path)).toEqual([
      kernel.path('core/user_0/disk0'),
      kernel.path('core/user_5/half'),
    ]);
    expect(backstores[0]).toMatchObject({
      settings: { enabled: true, config: 'file/disk0' },
      luns: [{ fabric: 'loopback', wwn: disk.target.wwn, tag: 1, lun: 0 }],
    });
    expect(backstores[0]?.backstore.uioPath).toMatch(/uio0$/);
    expect(backstores[1]).toMatchObject({ settings: { enabled: false, size: 0 }, luns: [] });
  });

  it('finds nothing on a machine without LIO', async () => {
    rmSync(kernel.configfs, { recursive: true });
    await expect(discover(kernel.host)).resolves.toEqual({ backstores: [], problems: [] });
  });

  it('tells of what it could not look at, and goes on', async () => {
    await make('disk0');
    await make('disk1');
    rmSync(kernel.path('core/user_0/disk0/info'));
    const { backstores, problems } = await discover(kernel.host);
    expect(backstores.map((found) => found.backstore.name)).toEqual(['disk1']);
    expect(problems.map((problem) => problem.path)).toEqual([
      kernel.path('core/user_0/disk0/info'),
    ]);
  });
});

describe('rescueNetlink', () => {
  it('lets waiters go in the only order that works', async () => {
    kernel.netlink.replies = true;
    const waiting = kernel.netlink.emit({ kind: 'added', name: 'tcm-user/0/d', minor: 0, id: 1 });
    await rescueNetlink(kernel.host);
    expect(actions()).toEqual(['block_netlink=1', 'reset_netlink=1', 'block_netlink=0']);
    expect(await waiting).toBe(-4);
    expect(kernel.netlink.blocked).toBe(false);
  });

  it('never leaves it blocked', async () => {
    kernel.failures = ({ path }) => (path.endsWith('reset_netlink') ? 'EBUSY' : undefined);
    await expect(rescueNetlink(kernel.host)).rejects.toMatchObject({ errno: 'EBUSY' });
    expect(kernel.netlink.blocked).toBe(false);
  });

  it('says when the module is missing', async () => {
    rmSync(`${kernel.root}/sys/module`, { recursive: true });
    await expect(rescueNetlink(kernel.host)).rejects.toMatchObject({
      code: 'ERR_TCMU_TARGET_NO_MODULE',
    });
  });
});
