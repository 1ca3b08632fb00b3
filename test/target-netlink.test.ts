// SPDX-License-Identifier: Apache-2.0
import { rmSync, writeFileSync } from 'node:fs';
import { setTimeout as wait } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { ArgumentError, TargetError } from '../lib/errors.js';
import { type Backstore, createBackstore } from '../lib/target/backstore.js';
import {
  type NetlinkHandlers,
  type NetlinkOptions,
  type Reconfiguration,
  TcmuNetlink,
} from '../lib/target/netlink.js';
import { FakeKernel } from './target-fake.js';
import { eventMessage, type FakeEvent } from './target-fake-netlink.js';

/** Far away: no test here waits for it. */
const DEADLINE = 60_000;
let kernel: FakeKernel;
let listeners: TcmuNetlink[];

beforeEach(() => {
  kernel = new FakeKernel();
  listeners = [];
});
afterEach(async () => {
  for (const listener of listeners) await listener.close();
  kernel.destroy();
});

async function listen(
  handlers: NetlinkHandlers,
  options: NetlinkOptions = {},
): Promise<TcmuNetlink> {
  const listener = await TcmuNetlink.open(handlers, {
    host: kernel.host,
    deadline: DEADLINE,
    ...options,
  });
  listeners.push(listener);
  return listener;
}

function event(kind: FakeEvent['kind'], name = 'd', more: Partial<FakeEvent> = {}): FakeEvent {
  return { kind, name: `tcm-user/0/${name}/file/x`, minor: 4, id: 40, ...more };
}

async function make(name: string): Promise<Backstore> {
  return createBackstore({ name, size: 1 << 20, config: 'file/x', host: kernel.host });
}

/** Waits until `list` holds what it should. */
async function holds(list: unknown[], wanted: unknown): Promise<void> {
  await expect.poll(() => list).toEqual(wanted);
}

async function failure(action: Promise<unknown>): Promise<TargetError> {
  const error = await action.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(TargetError);
  return error as TargetError;
}

describe('listening', () => {
  it('tells of devices, and touches nothing', async () => {
    const seen: unknown[] = [];
    const listener = await listen({
      added: ({ name, hba, config, uioPath, minor }) => {
        seen.push(['added', hba, name, config, uioPath, minor]);
      },
      removed: ({ name }) => void seen.push(['removed', name]),
      reconfigured: ({ name }, change) => void seen.push(['reconfigured', name, change]),
    });
    await kernel.netlink.emit(event('added'));
    await kernel.netlink.emit(event('reconfigured', 'd', { size: 4096n }));
    await kernel.netlink.emit(event('reconfigured', 'd', { config: 'file/y' }));
    await kernel.netlink.emit(event('reconfigured', 'd', { writeCache: 1 }));
    await expect.poll(() => seen).toHaveLength(4);
    expect(listener.devices).toMatchObject([{ name: 'd', minor: 4 }]);
    await kernel.netlink.emit(event('removed'));
    await holds(seen, [
      ['added', 0, 'd', 'file/x', `${kernel.root}/dev/uio4`, 4],
      ['reconfigured', 'd', { size: 4096 }],
      ['reconfigured', 'd', { config: 'file/y' }],
      ['reconfigured', 'd', { writeCache: true }],
      ['removed', 'd'],
    ]);
    expect(listener.devices).toEqual([]);
    await listener.close();
    await listener.close();
    expect(kernel.netlink.done).toEqual([]);
    expect(kernel.netlink.replies).toBe(false);
    expect(kernel.log).toEqual([]);
    expect(kernel.netlink.heard).toBe(false);
  });

  it('announces what is there already, when asked', async () => {
    await make('a');
    await make('b');
    const seen: string[] = [];
    const listener = await listen({ added: ({ name }) => void seen.push(name) });
    expect(listener.devices.map((device) => device.name)).toEqual(['a', 'b']);
    const more: string[] = [];
    await listen({ added: ({ name }) => void more.push(name) }, { existing: true });
    await holds(more, ['a', 'b']);
    expect(seen).toEqual([]);
  });

  it('ignores malformed datagrams, and other traffic', async () => {
    const seen: string[] = [];
    await listen({ added: ({ name }) => void seen.push(name) });
    const socket = kernel.netlink.sockets.at(-1);
    for (const bytes of [[], [1], [255, 255, 255, 255], new Array<number>(64).fill(0)]) {
      socket?.deliver(Uint8Array.from(bytes));
    }
    await kernel.netlink.emit(event('added'));
    await holds(seen, ['d']);
  });

  it('keeps the events of one device in order and lets no device wait for another', async () => {
    const seen: string[] = [];
    let opened = (): void => {};
    const quick = new Promise<void>((resolve) => {
      opened = resolve;
    });
    await listen({
      added: async ({ name }) => {
        seen.push(`${name} opens`);
        if (name === 'slow') await quick;
        seen.push(`${name} open`);
        if (name === 'quick') opened();
      },
      removed: ({ name }) => void seen.push(`${name} closed`),
    });
    await kernel.netlink.emit(event('added', 'slow'));
    await kernel.netlink.emit(event('removed', 'slow'));
    await kernel.netlink.emit(event('added', 'quick', { id: 41 }));
    await holds(seen, ['slow opens', 'quick opens', 'quick open', 'slow open', 'slow closed']);
  });

  it('says what is missing', async () => {
    kernel.modules.delete('target_core_user');
    const error = await failure(TcmuNetlink.open({}, { host: kernel.host }));
    expect(error.code).toBe('ERR_TCMU_TARGET_NO_MODULE');
    expect(error.message).toContain('modprobe target_core_user');
    expect(kernel.netlink.sockets.every((socket) => socket.closed)).toBe(true);
    const bad = TcmuNetlink.open({}, { host: kernel.host, deadline: 0 });
    await expect(bad).rejects.toBeInstanceOf(ArgumentError);
  });

  it('gives up on a kernel that does not answer', async () => {
    kernel.netlink.silent = true;
    const error = await failure(TcmuNetlink.open({}, { host: kernel.host }));
    expect(error.code).toBe('ERR_TCMU_TARGET_NETLINK');
    expect(error.message).toContain('did not answer');
    expect(kernel.netlink.sockets.every((socket) => socket.closed)).toBe(true);
  });

  it('finds an answer that came while this process was busy, however long', async () => {
    const { netlink } = kernel;
    const request = netlink.request.bind(netlink);
    vi.spyOn(netlink, 'request').mockImplementationOnce((...args) => {
      request(...args);
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 2100);
    });
    // From where timers come before what was received.
    await new Promise(setImmediate);
    await listen({});
  });
});

describe('replies', () => {
  it('are switched on by name only, and off at close', async () => {
    const listener = await listen({}, { replies: true });
    expect(kernel.netlink.replies).toBe(true);
    expect(kernel.log.map((entry) => `${entry.path.split('/').at(-1)}=${entry.data}`)).toEqual([
      'block_netlink=1',
      'reset_netlink=1',
      'block_netlink=0',
    ]);
    await listener.close();
    expect(kernel.netlink.replies).toBe(false);
  });

  it('are switched off when the process exits without closing', async () => {
    const before = process.listeners('exit');
    await listen({}, { replies: true });
    const [atExit] = process.listeners('exit').filter((listener) => !before.includes(listener));
    atExit?.(0);
    expect(kernel.netlink.replies).toBe(false);
  });

  it('are switched off by another socket when its own has failed', async () => {
    const errors: string[] = [];
    const listener = await listen(
      { error: (error) => void errors.push(error.code) },
      { replies: true },
    );
    const socket = kernel.netlink.sockets.at(-1);
    socket?.close();
    socket?.options.failed('EIO', 'recv');
    await listener.close();
    expect(kernel.netlink.replies).toBe(false);
    expect(errors).toEqual(['ERR_TCMU_TARGET_NETLINK', 'ERR_TCMU_TARGET_NETLINK']);
  });

  it('come once for each event, with what the handler said', async () => {
    const errors: TargetError[] = [];
    await listen(
      {
        added: ({ name }) => {
          if (name === 'denied') throw Object.assign(new Error('no'), { code: 'EACCES' });
          if (name === 'broken') throw new Error('a bug');
        },
        error: (error) => void errors.push(error),
      },
      { replies: true },
    );
    expect(await kernel.netlink.emit(event('added', 'good'))).toBe(0);
    expect(await kernel.netlink.emit(event('added', 'denied', { id: 41 }))).toBe(-13);
    expect(await kernel.netlink.emit(event('added', 'broken', { id: 42 }))).toBe(-5);
    expect(await kernel.netlink.emit(event('reconfigured', 'good', { size: 1n }))).toBe(0);
    expect(await kernel.netlink.emit(event('removed', 'good'))).toBe(0);
    expect(kernel.netlink.done).toHaveLength(5);
    expect(errors.map((error) => error.message)).toEqual([
      expect.stringContaining('"added" of user_0/denied: EACCES'),
      expect.stringContaining('"added" of user_0/broken'),
    ]);
    expect(errors[1]?.cause).toMatchObject({ message: 'a bug' });
  });

  it('come at the deadline when a handler hangs', async () => {
    const aborted: unknown[] = [];
    const errors: string[] = [];
    await listen(
      {
        added: async (_device, signal) => {
          await new Promise((resolve) => signal.addEventListener('abort', resolve));
          aborted.push(signal.reason);
          throw new Error('too late to matter');
        },
        error: (error) => void errors.push(error.code),
      },
      { replies: true, deadline: 100 },
    );
    const start = performance.now();
    expect(await kernel.netlink.emit(event('added', 'hung'))).toBe(-110);
    // A timer may end a millisecond or two early.
    expect(performance.now() - start).toBeGreaterThanOrEqual(95);
    expect(aborted).toHaveLength(1);
    expect(errors).toEqual(['ERR_TCMU_TARGET_STUCK']);
    // Answered once, and the device goes on.
    expect(await kernel.netlink.emit(event('removed', 'hung'))).toBe(0);
    expect(kernel.netlink.done).toEqual(['added 40 -110', 'removed 40 0']);
  });

  it('come for other devices while a handler takes its time', async () => {
    let finish = (): void => {};
    const finished = new Promise<void>((resolve) => {
      finish = resolve;
    });
    const added = async ({ name }: { name: string }): Promise<void> => {
      if (name === 'slow') await finished;
    };
    await listen({ added }, { replies: true });
    const slow = kernel.netlink.emit(event('added', 'slow'));
    expect(await kernel.netlink.emit(event('added', 'other', { id: 41 }))).toBe(0);
    finish();
    expect(await slow).toBe(0);
    expect(kernel.netlink.done).toEqual(['added 41 0', 'added 40 0']);
  });

  it('come for events that nobody handles, or that cannot be understood', async () => {
    await listen({}, { replies: true });
    expect(await kernel.netlink.emit(event('added'))).toBe(0);
    expect(await kernel.netlink.emit({ kind: 'added', name: 'odd', minor: 0, id: 9 })).toBe(-22);
  });

  it('come also when the error handler throws', async () => {
    await listen(
      {
        added: () => Promise.reject(new Error('a bug')),
        error: () => {
          throw new Error('another');
        },
      },
      { replies: true },
    );
    expect(await kernel.netlink.emit(event('added'))).toBe(-5);
  });

  it('come before close returns, for what is under way', async () => {
    let begun = false;
    const added = async (): Promise<void> => {
      begun = true;
      await wait(200);
    };
    const listener = await listen({ added }, { replies: true });
    const waiting = kernel.netlink.emit(event('added'));
    await expect.poll(() => begun).toBe(true);
    await listener.close();
    expect(await waiting).toBe(0);
    expect(kernel.netlink.done).toEqual(['added 40 0']);
  });

  it('wake an `enable` that a dead listener left waiting, and fail what else it left', async () => {
    const { netlink, host } = kernel;
    const late = await make('late');
    netlink.replies = true;
    // As in the kernel: the uio device is there, `enable` says 0 until it returns.
    writeFileSync(`${late.path}/enable`, '0\n');
    const id = Number(await host.read(`${late.path}/statistics/scsi_dev/indx`));
    const enabling = netlink.emit(event('added', 'late', { minor: 0, id }));
    const resizing = netlink.emit(event('reconfigured', 'old', { id: 77, size: 1n }));
    const seen: string[] = [];
    await listen({ added: ({ name }) => void seen.push(name) }, { replies: true });
    expect(await enabling).toBe(0);
    expect(await resizing).toBe(-4);
    expect(netlink.lost).toEqual([]);
    // Its event, read only now: a second answer could meet a wait of another kind.
    const renaming = netlink.emit(
      event('reconfigured', 'late', { minor: 0, id, config: 'file/y' }),
    );
    netlink.sockets.at(-1)?.deliver(eventMessage(event('added', 'late', { minor: 0, id })));
    expect(await renaming).toBe(0);
    expect(await netlink.emit(event('removed', 'late', { minor: 0, id }))).toBe(0);
    expect(netlink.done.filter((done) => done.startsWith('added'))).toEqual([`added ${id} 0`]);
    expect(seen).toEqual(['late']);
  });

  it('answer an event once that comes after its device was found', async () => {
    const { netlink, host } = kernel;
    const late = await make('late');
    writeFileSync(`${late.path}/enable`, '0\n');
    const id = Number(await host.read(`${late.path}/statistics/scsi_dev/indx`));
    const seen: string[] = [];
    // Nobody waits yet when it is found; the wait begins right after.
    await listen({ added: ({ name }) => void seen.push(name) }, { replies: true });
    expect(netlink.done).toEqual([`added ${id} 0`]);
    expect(await netlink.emit(event('added', 'late', { minor: 0, id }))).toBe(0);
    expect(seen).toEqual(['late']);
  });
});

describe('dropped events', () => {
  it('are made up for from sysfs and configfs', async () => {
    const gone = await make('gone');
    const kept = await make('kept');
    const seen: unknown[] = [];
    await listen({
      added: ({ name }) => void seen.push(`added ${name}`),
      removed: ({ name }) => void seen.push(`removed ${name}`),
      reconfigured: ({ name }, change: Reconfiguration) => void seen.push([name, change]),
    });
    await gone.remove();
    await make('fresh');
    await kept.resize(2 << 20);
    await kernel.netlink.emit(event('reconfigured', 'kept'), true);
    await holds(seen, [
      'removed gone',
      'added fresh',
      ['kept', { config: 'file/x', size: 2 << 20, writeCache: false }],
    ]);
  });

  it('are noticed when a device was replaced by one of the same name', async () => {
    await (await make('d')).remove();
    await make('d');
    const seen: string[] = [];
    await listen({
      added: ({ name }) => void seen.push(`added ${name}`),
      removed: ({ name }) => void seen.push(`removed ${name}`),
    });
    writeFileSync(kernel.path('core/user_0/d/statistics/scsi_dev/indx'), '99\n');
    await kernel.netlink.emit(event('added', 'd'), true);
    await holds(seen, ['removed d', 'added d']);
  });

  it('leave nobody waiting, and no wait is ever met by an answer of another kind', async () => {
    const { netlink } = kernel;
    const seen: string[] = [];
    await listen(
      {
        added: async ({ name }) => {
          await wait(15);
          seen.push(name);
        },
      },
      { replies: true },
    );
    const heard = netlink.emit(event('added', 'heard', { id: 41 }));
    const dropped = netlink.emit(event('reconfigured', 'other', { id: 42, size: 1n }), true);
    // Twice in a row, as when a full buffer is found full again.
    await netlink.emit(event('removed', 'third', { id: 43 }), true).then((status) => {
      expect(status).toBe(-4);
    });
    expect(await heard).toBe(0);
    expect(await dropped).toBe(-4);
    await expect.poll(() => netlink.emit(event('added', 'later', { id: 44 }))).toBe(0);
    expect(netlink.lost).toEqual([]);
    expect(netlink.waits).toEqual([]);
    expect(seen).toContain('later');
  });

  it('do not count those that lie in the socket unread', async () => {
    const { netlink } = kernel;
    await listen({}, { replies: true });
    const socket = netlink.sockets.at(-1);
    if (socket === undefined) throw new Error('no socket');
    socket.held = [];
    const unread = netlink.emit(event('added', 'unread'));
    socket.options.overrun();
    expect(await unread).toBe(0);
    expect(netlink.lost).toEqual([]);
  });

  it('are reported when they cannot be made up for', async () => {
    const errors: string[] = [];
    await listen({ error: (error) => void errors.push(error.message) }, { replies: true });
    rmSync(`${kernel.root}/sys/module`, { recursive: true });
    void kernel.netlink.emit(event('added'), true);
    await holds(errors, [expect.stringContaining('rescueNetlink()')]);
  });
});
