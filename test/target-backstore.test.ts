// SPDX-License-Identifier: Apache-2.0
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { ArgumentError, TargetError } from '../lib/errors.js';
import { type BackstoreOptions, createBackstore, openBackstore } from '../lib/target/backstore.js';
import { TargetHost } from '../lib/target/host.js';
import { listUio, parseConfig, parseUioName } from '../lib/target/uio.js';
import { FakeKernel } from './target-fake.js';

const MIB = 1 << 20;
let kernel: FakeKernel;

beforeEach(() => {
  kernel = new FakeKernel();
});
afterEach(() => {
  vi.useRealTimers();
  kernel.destroy();
});

/** Instead of the kernel that is there, one whose device nodes are not waited for long. */
function lackNodes(): void {
  kernel.destroy();
  kernel = new FakeKernel({ deviceTimeout: 50 });
  kernel.makesNodes = false;
}

function options(more: Partial<BackstoreOptions> = {}): BackstoreOptions {
  return { name: 'disk0', size: 64 * MIB, config: 'file//srv/disk0', host: kernel.host, ...more };
}

async function failure(action: Promise<unknown>): Promise<TargetError> {
  const error = await action.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(TargetError);
  return error as TargetError;
}

describe('createBackstore', () => {
  it('makes, configures and enables a device, and says where it is', async () => {
    const backstore = await createBackstore(options({ serial: 'abc', taskManagement: true }));
    expect(backstore).toMatchObject({
      hba: 0,
      name: 'disk0',
      path: kernel.path('core/user_0/disk0'),
    });
    expect(backstore.uioPath).toBe(`${kernel.root}/dev/uio0`);
    expect(backstore.uio).toMatchObject({ minor: 0, deviceNumber: '252:0', mapSize: 1082130432 });
    expect(await backstore.config()).toEqual({ subtype: 'file', rest: '/srv/disk0' });
    expect(await backstore.settings()).toEqual({
      enabled: true,
      blocked: false,
      size: 64 * MIB,
      blockSize: 512,
      maxSectors: 2048,
      config: 'file//srv/disk0',
      serial: 'abc',
      commandTimeout: 30,
      queueFullTimeout: -1,
      dataAreaMiB: 1024,
      pagesPerBlock: 16,
      ringMiB: 8,
      netlinkReply: -1,
      taskManagement: true,
      writeCache: false,
      zeroCopy: false,
    });
  });

  describe('zero copy', () => {
    it('is set before enable, read back and counted', async () => {
      kernel.zeroCopy = true;
      const backstore = await createBackstore(
        options({ zeroCopy: { windowMiB: 16, scrub: false, minBytes: 8192 } }),
      );
      expect(await backstore.settings()).toMatchObject({
        commandTimeout: 0,
        zeroCopy: { windowMiB: 16, scrub: false, minBytes: 8192 },
      });
      expect(await backstore.zeroCopyStatistics()).toEqual({
        commands: 7,
        copied: 6,
        noSpace: 5,
        faults: 4,
        denied: 3,
        zaps: 2,
        scrubbed: 1,
      });
      await backstore.setZeroCopy({ scrub: true });
      expect(await backstore.settings()).toMatchObject({
        zeroCopy: { scrub: true, minBytes: 8192 },
      });
    });

    it('says why it is not to be had, and leaves nothing', async () => {
      const error = await failure(createBackstore(options({ zeroCopy: true })));
      expect(error.code).toBe('ERR_TCMU_TARGET_UNSUPPORTED');
      expect(error.message).toMatch(/target_core_user has no zero copy.*docs\/zero-copy\.md/);
      expect(kernel.made()).toEqual([]);
    });

    it("is done without by 'auto' where the module lacks it", async () => {
      const backstore = await createBackstore(options({ zeroCopy: 'auto' }));
      expect(await backstore.settings()).toMatchObject({ zeroCopy: false, commandTimeout: 30 });
      expect(await backstore.zeroCopyStatistics()).toBe(undefined);
      expect((await failure(backstore.setZeroCopy({ scrub: false }))).code).toBe(
        'ERR_TCMU_TARGET_UNSUPPORTED',
      );
    });

    it('excludes a command time-out', async () => {
      kernel.zeroCopy = true;
      for (const wrong of [
        { zeroCopy: true, commandTimeout: 30 },
        { zeroCopy: { windowMiB: 0 } },
        { zeroCopy: { minBytes: -1 } },
      ]) {
        await expect(createBackstore(options(wrong))).rejects.toThrow(ArgumentError);
      }
    });
  });

  it('keeps I/O at 1 MiB whatever the block size', async () => {
    const backstore = await createBackstore(options({ blockSize: 4096 }));
    expect((await backstore.settings()).maxSectors).toBe(256);
  });

  it('carries every option to the kernel', async () => {
    const backstore = await createBackstore(
      options({
        maxSectors: 4096,
        waitForListener: true,
        dataAreaMiB: 64,
        pagesPerBlock: 4,
        ringMiB: 2,
        commandTimeout: 0,
        queueFullTimeout: 5,
        taskManagement: false,
        writeCache: true,
      }),
    );
    expect(await backstore.settings()).toMatchObject({
      maxSectors: 4096,
      netlinkReply: 1,
      dataAreaMiB: 64,
      pagesPerBlock: 4,
      ringMiB: 2,
      commandTimeout: 0,
      queueFullTimeout: 5,
      taskManagement: false,
      writeCache: true,
    });
  });

  it('carries a comma in the configuration string, which `control` would split', async () => {
    const config = 'file//srv/a,hw_block_size=4096';
    const backstore = await createBackstore(options({ config }));
    expect(await backstore.settings()).toMatchObject({ config, blockSize: 512 });
  });

  it('gives every device a folder of its own, the lowest that is free', async () => {
    const first = await createBackstore(options({ name: 'a' }));
    const second = await createBackstore(options({ name: 'b' }));
    expect([first.hba, second.hba]).toEqual([0, 1]);
    await first.remove();
    expect((await createBackstore(options({ name: 'c' }))).hba).toBe(0);
  });

  it('shares a folder that was asked for', async () => {
    await createBackstore(options({ name: 'a', hba: 7 }));
    const b = await createBackstore(options({ name: 'b', hba: 7 }));
    await b.remove();
    expect(kernel.made()).toEqual(['core/user_7', 'core/user_7/a']);
  });

  it('takes the next folder when another process takes the free one', async () => {
    let once = true;
    kernel.failures = ({ call, path }) => {
      if (call !== 'mkdir' || path !== 'core/user_0' || !once) return undefined;
      once = false;
      return 'EEXIST';
    };
    expect((await createBackstore(options())).hba).toBe(0);
  });

  it('makes the folder anew when a neighbour has removed it meanwhile', async () => {
    let once = true;
    kernel.failures = ({ call, path }) => {
      if (call !== 'mkdir' || path !== 'core/user_0/disk0' || !once) return undefined;
      once = false;
      return 'ENOENT';
    };
    expect((await createBackstore(options())).hba).toBe(0);
  });

  it('refuses a name that exists in any folder', async () => {
    await createBackstore(options());
    const error = await failure(createBackstore(options({ hba: 3 })));
    expect(error.code).toBe('ERR_TCMU_TARGET_NAME_TAKEN');
    expect(error.message).toContain(`${kernel.configfs}/core/user_0/disk0`);
    expect(error.message).toContain('openBackstore');
    expect(kernel.made()).toEqual(['core/user_0', 'core/user_0/disk0']);
  });

  it('never lets two processes make the same name at once', async () => {
    const results = await Promise.allSettled([
      createBackstore(options()),
      createBackstore(options()),
    ]);
    expect(results.filter((result) => result.status === 'fulfilled').length).toBeLessThan(2);
    expect(kernel.made().filter((path) => path.endsWith('disk0')).length).toBeLessThan(2);
  });

  it.each<[string, Partial<BackstoreOptions>]>([
    ['a name with a slash', { name: '../disk0' }],
    ['a size between blocks', { size: 1000 }],
    ['odd blocks', { blockSize: 520 }],
    ['a newline in the config', { config: 'file/a\ndev_size=1' }],
    ['a config of 256 bytes', { config: `file/${'x'.repeat(251)}` }],
    ['a ring of 9 MiB', { ringMiB: 9 }],
    ['no data pages', { pagesPerBlock: 0 }],
    ['a negative data area', { dataAreaMiB: -1 }],
    ['less than a page per I/O', { maxSectors: 7 }],
    ['a time-out the kernel cannot hold', { commandTimeout: 4_294_968 }],
    ['a queue time-out of -2', { queueFullTimeout: -2 }],
    ['an hba that is no number', { hba: -1 }],
    ['a serial with a space', { serial: 'a b' }],
  ])('refuses %s before touching anything', async (_what, bad) => {
    await expect(createBackstore(options(bad))).rejects.toBeInstanceOf(ArgumentError);
    expect(kernel.log).toEqual([]);
  });

  it('notices a setting that had no effect', async () => {
    const error = await failure(createBackstore(options({ dataAreaMiB: 4096 })));
    expect(error.code).toBe('ERR_TCMU_TARGET_NO_EFFECT');
    expect(error.message).toContain('2048 MiB');
    expect(error.message).toContain('global_max_data_area_mb');
    expect(kernel.made()).toEqual([]);
  });

  it('notices an option that the kernel is too old for, and that `control` swallows', async () => {
    kernel.lacks.add('cmd_ring_size_mb');
    const error = await failure(createBackstore(options({ ringMiB: 4 })));
    expect(error.code).toBe('ERR_TCMU_TARGET_UNSUPPORTED');
    expect(error.message).toContain('attrib/cmd_ring_size_mb');
    expect(error.message).toContain('too old');
    expect(kernel.made()).toEqual([]);
  });

  it('does without task management where the kernel has none, unless it was asked for', async () => {
    kernel.lacks.add('tmr_notification');
    const backstore = await createBackstore(options());
    expect((await backstore.settings()).taskManagement).toBeUndefined();
    const error = await failure(createBackstore(options({ name: 'b', taskManagement: true })));
    expect(error.code).toBe('ERR_TCMU_TARGET_UNSUPPORTED');
  });

  it('says which module is missing', async () => {
    kernel.modules.delete('target_core_user');
    const error = await failure(createBackstore(options()));
    expect(error).toMatchObject({ code: 'ERR_TCMU_TARGET_NO_MODULE', errno: 'EINVAL' });
    expect(error.message).toContain('modprobe target_core_user');
  });

  it('says that configfs is missing', async () => {
    const configfs = `${kernel.root}/nowhere/target`;
    const host = new TargetHost({ configfs, calls: kernel.host.calls });
    kernel.failures = () => 'ENOENT';
    const error = await failure(createBackstore(options({ host })));
    expect(error.code).toBe('ERR_TCMU_TARGET_NO_CONFIGFS');
    expect(error.message).toContain(`mount -t configfs none ${kernel.root}/nowhere`);
  });

  it('says who may', async () => {
    kernel.failures = ({ path }) => (path === 'core/user_0' ? 'EACCES' : undefined);
    const error = await failure(createBackstore(options()));
    expect(error).toMatchObject({ code: 'ERR_TCMU_TARGET_PERMISSION', errno: 'EACCES' });
    expect(error.message).toContain(process.geteuid?.() === 0 ? 'container' : 'as root');
  });

  it('leaves nothing behind, whichever step fails', async () => {
    const full = options({ serial: 'abc', commandTimeout: 10, writeCache: true });
    await (await createBackstore(full)).remove();
    const steps = kernel.log.filter((entry) => entry.call !== 'rmdir').length;
    expect(steps).toBeGreaterThan(8);
    for (let step = 1; step <= steps; step += 1) {
      let count = 0;
      kernel.failures = ({ call }) => {
        if (call !== 'rmdir') count += 1;
        return call !== 'rmdir' && count === step ? 'EIO' : undefined;
      };
      const error = await failure(createBackstore(full));
      expect(error.errno).toBe('EIO');
      expect(kernel.made()).toEqual([]);
      expect(await listUio(kernel.host)).toEqual([]);
    }
  });

  it('reports what could not be undone, beside what failed', async () => {
    kernel.failures = ({ call, path }) => {
      if (path.endsWith('/enable')) return 'ENOMEM';
      return call === 'rmdir' && path === 'core/user_0/disk0' ? 'EBUSY' : undefined;
    };
    const error = await failure(createBackstore(options()));
    expect(error).toMatchObject({ code: 'ERR_TCMU_TARGET_NO_MEMORY', errno: 'ENOMEM' });
    expect(error.message).toMatch(
      /enable: ENOMEM;.*\nUndoing.*failed too:\n {2}- .*remove .*EBUSY/,
    );
    expect((error.cause as AggregateError).errors).toHaveLength(2);
  });

  it('gives up on a kernel that does not come back, and keeps its hands off', async () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    let hangs = false;
    kernel.failures = ({ path }) => {
      if (!path.endsWith('/enable')) return undefined;
      hangs = true;
      return 'hang';
    };
    const failing = failure(createBackstore(options()));
    while (!hangs) await new Promise(setImmediate);
    vi.advanceTimersByTime(kernel.host.callTimeout);
    const error = await failing;
    expect(error.code).toBe('ERR_TCMU_TARGET_STUCK');
    expect(error.message).toContain('rescueNetlink()');
    expect(error.message).toContain(`remove ${kernel.path('core/user_0/disk0')}`);
    expect(kernel.calls()).not.toContain('rmdir core/user_0/disk0');
  });

  it('says how to make a node that does not appear', async () => {
    lackNodes();
    const error = await failure(createBackstore(options()));
    expect(error.code).toBe('ERR_TCMU_TARGET_NO_DEVICE');
    expect(error.message).toContain(`mknod ${kernel.root}/dev/uio0 c 252 0`);
    expect(kernel.made()).toEqual([]);
  });

  it("does not take another device's node for its own", async () => {
    lackNodes();
    kernel.nodes.set('uio0', '10:0');
    expect((await failure(createBackstore(options()))).code).toBe('ERR_TCMU_TARGET_NO_DEVICE');
  });

  it('waits for a node that udev makes late', async () => {
    kernel.makesNodes = false;
    setTimeout(() => kernel.nodes.set('uio0', '252:0'), 30);
    expect((await createBackstore(options())).uioPath).toMatch(/uio0$/);
  });
});

describe('Backstore', () => {
  it('resizes while enabled, with nobody else listening', async () => {
    const backstore = await createBackstore(options());
    await backstore.resize(128 * MIB);
    expect((await backstore.settings()).size).toBe(128 * MIB);
    expect(kernel.netlink.heard).toBe(false);
  });

  it('checks a new size against the block size', async () => {
    const backstore = await createBackstore(options({ blockSize: 4096 }));
    await expect(backstore.resize(64 * MIB + 512)).rejects.toBeInstanceOf(ArgumentError);
  });

  it('says that a listener refused a new size', async () => {
    const backstore = await createBackstore(options());
    kernel.failures = ({ path }) => (path.endsWith('dev_size') ? 'EINVAL' : undefined);
    const error = await failure(backstore.resize(128 * MIB));
    expect(error.code).toBe('ERR_TCMU_TARGET_REJECTED');
    expect(error.message).toContain('write "134217728" to');
    expect(kernel.netlink.heard).toBe(false);
  });

  it('changes config, write cache and command time-out', async () => {
    const backstore = await createBackstore(options());
    await backstore.setConfig('file//srv/other,x');
    await backstore.setWriteCache(true);
    await backstore.setCommandTimeout(5);
    expect(await backstore.settings()).toMatchObject({
      config: 'file//srv/other,x',
      writeCache: true,
      commandTimeout: 5,
    });
    expect(backstore.uio?.config).toBe('file//srv/other,x');
    await expect(backstore.setConfig('a\nb')).rejects.toBeInstanceOf(ArgumentError);
  });

  it('blocks and unblocks', async () => {
    const backstore = await createBackstore(options());
    await backstore.block();
    expect((await backstore.settings()).blocked).toBe(true);
    await backstore.unblock();
    expect((await backstore.settings()).blocked).toBe(false);
  });

  it('goes with its scope', async () => {
    const backstore = await createBackstore(options());
    await backstore[Symbol.asyncDispose]();
    expect(kernel.made()).toEqual([]);
    expect(() => backstore.uioPath).toThrow(/not enabled/);
    await backstore.remove();
  });

  it('can be removed later when it is busy first', async () => {
    const backstore = await createBackstore(options());
    let busy = true;
    kernel.failures = ({ call }) => (call === 'rmdir' && busy ? 'EBUSY' : undefined);
    expect((await failure(backstore.remove())).code).toBe('ERR_TCMU_TARGET_BUSY');
    busy = false;
    await backstore.remove();
    expect(kernel.made()).toEqual([]);
  });
});

describe('openBackstore', () => {
  it('finds one by its name', async () => {
    await createBackstore(options({ hba: 4 }));
    const found = await openBackstore('disk0', { host: kernel.host });
    expect(found).toMatchObject({ hba: 4, name: 'disk0' });
    expect(found.uioPath).toMatch(/uio0$/);
    await found.remove();
    expect(kernel.made()).toEqual([]);
  });

  it('enables one that was left half-made', async () => {
    const { host } = kernel;
    await host.mkdir(host.target('core/user_0'));
    await host.mkdir(host.target('core/user_0/disk0'));
    const found = await openBackstore('disk0', { host });
    expect(() => found.uioPath).toThrow(/not enabled/);
    await host.write(`${found.path}/control`, 'dev_size=1048576,hw_block_size=512');
    expect((await found.enable()).uioPath).toMatch(/uio0$/);
    expect((await failure(found.enable())).message).toContain('enabled already');
  });

  it('says when there is none', async () => {
    const error = await failure(openBackstore('disk0', { host: kernel.host }));
    expect(error.code).toBe('ERR_TCMU_TARGET_NOT_FOUND');
  });

  it('wants to know which, of two of a name', async () => {
    const { host } = kernel;
    for (const hba of [0, 1]) {
      await host.mkdir(host.target(`core/user_${hba}`));
      await host.mkdir(host.target(`core/user_${hba}/disk0`));
    }
    await expect(openBackstore('disk0', { host })).rejects.toThrow(/user_0, user_1/);
    expect((await openBackstore('disk0', { host, hba: 1 })).hba).toBe(1);
  });
});

describe('uio names', () => {
  it('are taken apart', () => {
    expect(parseUioName('tcm-user/3/a b/file//x/y')).toEqual({
      hba: 3,
      name: 'a b',
      config: 'file//x/y',
    });
    expect(parseUioName('tcm-user/0/d')).toEqual({ hba: 0, name: 'd', config: '' });
    for (const other of [
      '',
      'uio_pdrv',
      'tcm-user/',
      'tcm-user/x/d',
      'tcm-user/0/',
      'tcm-user/0',
    ]) {
      expect(parseUioName(other)).toBeUndefined();
    }
    expect(parseConfig('file//srv/x')).toEqual({ subtype: 'file', rest: '/srv/x' });
    expect(parseConfig('file')).toEqual({ subtype: 'file', rest: '' });
  });

  it("leave other drivers' devices out", async () => {
    kernel.addUio('some_fpga');
    const minor = kernel.addUio('tcm-user/9/d/x');
    expect((await listUio(kernel.host)).map((device) => device.minor)).toEqual([minor]);
  });
});
