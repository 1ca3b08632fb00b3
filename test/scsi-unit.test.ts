// SPDX-License-Identifier: Apache-2.0
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import {
  type AskNexuses,
  type BlockDevice,
  decodeSense,
  type Nexuses,
  type Sense,
  sense,
} from '../lib/scsi/index.js';
import { MemoryStore } from '../lib/store/index.js';
import { CDB, cdb, openDevice, run } from './scsi-fake-command.js';

const memory = () => new MemoryStore({ size: 1 << 20 });
const cached = () => {
  const store = Object.assign(memory(), { flushes: 0, flush: async () => void store.flushes++ });
  return store;
};
const LOEJ = 2;
const START = 1;
const NO_FLUSH = 4;
const startStop = (options: number, immediate = 0) => cdb(0x1b, immediate, 0, 0, options, 0);
const requestSense = (allocation = 252, descriptor = 0) =>
  cdb(0x03, descriptor, 0, 0, allocation, 0);
const prevent = (value: number) => cdb(0x1e, 0, 0, 0, value, 0);

test('TEST UNIT READY', async () => {
  expect((await run(await openDevice(memory()), CDB.testUnitReady())).outcome).toBe('GOOD');
});

describe('REQUEST SENSE', () => {
  test('without anything pending is NO SENSE, in both formats', async () => {
    const device = await openDevice(memory());
    const fixed = await run(device, requestSense(), { in: 252 });
    expect(fixed.outcome).toBe('GOOD');
    expect([...fixed.data]).toEqual([0x70, 0, 0, 0, 0, 0, 0, 10, ...new Array(10).fill(0)]);
    const descriptor = await run(device, requestSense(252, 1), { in: 252 });
    expect([...descriptor.data]).toEqual([0x72, 0, 0, 0, 0, 0, 0, 0]);
  });

  test('hands out a pending unit attention, once, and cuts at the allocation length', async () => {
    const device = await openDevice(memory(), { powerOnAttention: true });
    const first = await run(device, requestSense(), { in: 252 });
    expect(decodeSense(first.data)).toMatchObject({ key: 6, asc: 0x29, ascq: 0 });
    const second = await run(device, requestSense(4), { in: 252 });
    expect([...second.data]).toEqual([0x70, 0, 0, 0]);
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('GOOD');
  });
});

describe('START STOP UNIT of a fixed disk', () => {
  test('stopping writes the cache out and changes nothing else', async () => {
    const store = cached();
    const device = await openDevice(store);
    expect((await run(device, startStop(0))).outcome).toBe('GOOD');
    expect(store.flushes).toBe(1);
    expect((await run(device, startStop(NO_FLUSH))).outcome).toBe('GOOD');
    expect((await run(device, startStop(START))).outcome).toBe('GOOD');
    expect(store.flushes).toBe(1);
    expect((await run(device, startStop(LOEJ))).outcome).toBe('GOOD');
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('GOOD');
  });

  test('a failing flush fails it', async () => {
    const broken = Object.assign(memory(), { flush: () => Promise.reject(sense.hardwareError()) });
    expect((await run(await openDevice(broken), startStop(0))).outcome).toBe('4/44/0');
  });

  test('its medium cannot be locked in', async () => {
    expect((await run(await openDevice(memory()), prevent(1))).outcome).toBe('5/20/0');
  });
});

describe('power conditions', () => {
  const set = (condition: number, modifier = 0, options = 0) =>
    cdb(0x1b, 0, 0, modifier, (condition << 4) | options, 0);
  const reported = async (device: BlockDevice) => {
    const { data } = await run(device, requestSense(), { in: 252 });
    const { key, asc, ascq } = decodeSense(data) as Sense;
    return `${key.toString(16)}/${asc.toString(16)}/${ascq.toString(16)}`;
  };

  test.each([
    ['active', 0x1, 0, '0/0/0'],
    ['idle_a', 0x2, 0, '0/5e/3'],
    ['idle_b', 0x2, 1, '0/5e/6'],
    ['idle_c', 0x2, 2, '0/5e/8'],
    ['standby_z', 0x3, 0, '0/5e/4'],
    ['standby_y', 0x3, 1, '0/5e/a'],
    ['idle_a by force', 0xa, 0, '0/5e/3'],
    ['standby_y by force', 0xb, 1, '0/5e/a'],
  ])(
    '%s is told by REQUEST SENSE, until the medium is needed',
    async (_, condition, modifier, told) => {
      const device = await openDevice(memory());
      expect((await run(device, set(condition, modifier))).outcome).toBe('GOOD');
      expect((await run(device, CDB.testUnitReady())).outcome).toBe('GOOD');
      expect(await reported(device)).toBe(told);
      expect((await run(device, CDB.read10(0, 1), { in: 512 })).outcome).toBe('GOOD');
      expect(await reported(device)).toBe('0/0/0');
    },
  );

  test('a start, and a reset, leave them; so does LU_CONTROL, since there are no timers', async () => {
    const device = await openDevice(memory());
    for (const leave of [
      () => run(device, startStop(START)),
      async () => device.taskManagement({ type: 'lun-reset', commands: [] }),
      () => run(device, set(0x7)),
    ]) {
      await run(device, set(0x3));
      expect(await reported(device)).toBe('0/5e/4');
      await leave();
      expect(await reported(device)).toBe('0/0/0');
    }
  });

  test('standby writes the cache out, unless it is not to; idle does not', async () => {
    const store = cached();
    const device = await openDevice(store);
    await run(device, set(0x2));
    await run(device, set(0x3, 0, NO_FLUSH));
    expect(store.flushes).toBe(0);
    await run(device, set(0x3));
    expect(store.flushes).toBe(1);
  });

  test('those that the standard does not have change nothing', async () => {
    const device = await openDevice(memory(), { removable: true });
    await run(device, set(0x3));
    for (const condition of [0x4, 0x5, 0x6, 0x8, 0xf]) {
      // Nor does LOEJ mean anything beside them.
      expect((await run(device, set(condition, 0, LOEJ))).outcome).toBe('GOOD');
      expect(await reported(device)).toBe('0/5e/4');
    }
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('GOOD');
  });

  test('modifiers that a condition does not have are refused', async () => {
    const device = await openDevice(memory());
    for (const [condition, modifier] of [
      [0x0, 1],
      [0x1, 1],
      [0x2, 3],
      [0x3, 2],
    ] as const) {
      expect((await run(device, set(condition, modifier))).outcome).toBe('5/24/0');
    }
  });
});

describe('a removable disk', () => {
  test('can be ejected and loaded; reading needs the medium', async () => {
    const store = cached();
    const device = await openDevice(store, { removable: true });
    expect((await run(device, startStop(LOEJ))).outcome).toBe('GOOD');
    expect(store.flushes).toBe(1);
    for (const bytes of [CDB.testUnitReady(), CDB.read10(0, 1), CDB.synchronizeCache10()]) {
      expect((await run(device, bytes, { in: 512 })).outcome).toBe('2/3a/0');
    }
    expect((await run(device, CDB.write10(0, 1), { out: new Uint8Array(512) })).outcome).toBe(
      '2/3a/0',
    );
    expect((await run(device, CDB.inquiry(), { in: 96 })).outcome).toBe('GOOD');
    expect((await run(device, startStop(LOEJ | START))).outcome).toBe('GOOD');
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('GOOD');
  });

  test('stays when LOEJ is not set, or a power condition is', async () => {
    const device = await openDevice(memory(), { removable: true });
    for (const options of [0, START, NO_FLUSH, 0x10 | LOEJ, 0x30 | LOEJ]) {
      expect((await run(device, startStop(options, 1))).outcome).toBe('GOOD');
      expect((await run(device, CDB.testUnitReady())).outcome).toBe('GOOD');
    }
  });

  test('stays when removal is prevented, until that is lifted or the unit reset', async () => {
    const device = await openDevice(memory(), { removable: true });
    expect((await run(device, prevent(1))).outcome).toBe('GOOD');
    expect((await run(device, startStop(LOEJ))).outcome).toBe('5/53/2');
    await run(device, prevent(0));
    expect((await run(device, startStop(LOEJ))).outcome).toBe('GOOD');
    await run(device, prevent(1));
    expect((await run(device, startStop(LOEJ | START))).outcome).toBe('5/53/2');
    await run(device, prevent(0));
    await run(device, startStop(LOEJ | START));
    await run(device, prevent(1));
    device.taskManagement({ type: 'lun-reset', commands: [] });
    expect((await run(device, startStop(LOEJ))).outcome).toBe('GOOD');
  });
});

describe('PREVENT ALLOW MEDIUM REMOVAL and its nexus', () => {
  const eject = cdb(0x1b, 0, 0, 0, 0x02, 0);
  const PREVENTED = '5/53/2';
  let now: Nexuses | undefined;
  const open = (nexuses: AskNexuses) => openDevice(memory(), { removable: true, nexuses });
  const connected = (...names: string[]) => ({ names: new Set(names) });
  const partly = (...names: string[]) => ({ names: new Set(names), incomplete: true });

  beforeEach(() => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout', 'performance'] });
  });
  afterEach(() => {
    vi.useRealTimers();
  });

  test('prevention ends when none is left of the nexuses that may have asked for it', async () => {
    now = connected('a', 'b');
    const device = await open(async () => now);
    expect((await run(device, prevent(1))).outcome).toBe('GOOD');
    now = connected('b', 'c');
    expect((await run(device, eject)).outcome).toBe(PREVENTED);
    now = undefined;
    expect((await run(device, eject)).outcome).toBe(PREVENTED);
    now = connected('c');
    expect((await run(device, eject)).outcome).toBe('GOOD');
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('2/3a/0');
  });

  test('stays when nobody knows the nexuses, or asking fails', async () => {
    for (const ask of [() => undefined, () => Promise.reject(new Error('no configfs'))]) {
      const device = await open(ask);
      await run(device, prevent(1));
      expect((await run(device, eject)).outcome).toBe(PREVENTED);
      await run(device, prevent(0));
      expect((await run(device, eject)).outcome).toBe('GOOD');
    }
  });

  test('an answer that takes long is waited for: the look for PREVENT goes on behind it', async () => {
    now = connected('a');
    const slow = () => new Promise<Nexuses>((resolve) => setTimeout(resolve, 3000, now as Nexuses));
    const device = await open(slow);
    const prevented = run(device, prevent(1));
    await vi.advanceTimersByTimeAsync(300);
    expect((await prevented).outcome).toBe('GOOD');
    const held = run(device, eject);
    await vi.advanceTimersByTimeAsync(6000);
    expect((await held).outcome).toBe(PREVENTED);
    now = connected('b');
    const ejected = run(device, eject);
    await vi.advanceTimersByTimeAsync(3000);
    expect((await ejected).outcome).toBe('GOOD');
  });

  test('without an answer the medium stays', async () => {
    now = connected('a');
    const device = await open(() => (now === undefined ? new Promise<never>(() => {}) : now));
    await run(device, prevent(1));
    now = undefined;
    const held = run(device, eject);
    await vi.advanceTimersByTimeAsync(10_000);
    expect((await held).outcome).toBe(PREVENTED);
  });

  test('a session that the kernel is about to free is waited for', async () => {
    now = connected('a 1');
    const device = await open(async () => now);
    await run(device, prevent(1));
    now = partly('a 2');
    const ejected = run(device, eject);
    await vi.advanceTimersByTimeAsync(1000);
    now = connected('a 2');
    await vi.advanceTimersByTimeAsync(100);
    expect((await ejected).outcome).toBe('GOOD');
  });

  test('prevention stays with a session that is hidden by another of its initiator', async () => {
    now = connected('a 1');
    const device = await open(async () => now);
    await run(device, prevent(1));
    now = partly('a 2');
    const held = run(device, eject);
    await vi.advanceTimersByTimeAsync(11_000);
    expect((await held).outcome).toBe(PREVENTED);
  });

  test('prevented beside a session about to be freed, it ends with the others', async () => {
    now = partly('a 2');
    const device = await open(async () => now);
    await run(device, prevent(1));
    now = connected('a 2');
    await vi.advanceTimersByTimeAsync(100);
    expect((await run(device, eject)).outcome).toBe(PREVENTED);
    now = connected('a 3');
    expect((await run(device, eject)).outcome).toBe('GOOD');
  });

  test('a PREVENT that comes while an ejection waits counts', async () => {
    now = connected('a 1');
    const device = await open(async () => now);
    await run(device, prevent(1));
    now = partly('b 1');
    const held = run(device, eject);
    now = connected('b 1');
    await run(device, prevent(1));
    await vi.advanceTimersByTimeAsync(1000);
    expect((await held).outcome).toBe(PREVENTED);
  });
});

describe('REPORT LUNS', () => {
  const reportLuns = (select: number, allocation = 1000) =>
    cdb(0xa0, 0, select, 0, 0, 0, [allocation, 4], 0, 0);

  test('reports LUN 0, and no well known ones', async () => {
    const device = await openDevice(memory());
    for (const select of [0, 2]) {
      const { data } = await run(device, reportLuns(select), { in: 1000 });
      expect([...data]).toEqual([0, 0, 0, 8, 0, 0, 0, 0, ...new Array(8).fill(0)]);
    }
    const { data } = await run(device, reportLuns(1), { in: 1000 });
    expect([...data]).toEqual(new Array(8).fill(0));
  });

  test('cuts at the allocation length; refuses an unknown selection', async () => {
    const device = await openDevice(memory());
    expect((await run(device, reportLuns(0, 10), { in: 1000 })).written).toBe(10);
    expect((await run(device, reportLuns(3), { in: 1000 })).outcome).toBe('5/24/0');
  });
});
