import { describe, expect, test } from 'vitest';
import { decodeSense, sense } from '../lib/scsi/index.js';
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
    for (const options of [0, START, NO_FLUSH, 0x10 | LOEJ, 0xf0 | LOEJ]) {
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
  const prevent = (value: number) => cdb(0x1e, 0, 0, 0, value, 0);
  const eject = cdb(0x1b, 0, 0, 0, 0x02, 0);

  test('prevention ends when none is left of the nexuses that may have asked for it', async () => {
    let nexuses: Set<string> | undefined = new Set(['a', 'b']);
    const device = await openDevice(memory(), { removable: true, nexuses: async () => nexuses });
    expect((await run(device, prevent(1))).outcome).toBe('GOOD');
    nexuses = new Set(['b', 'c']);
    expect((await run(device, eject)).outcome).toBe('5/53/2');
    nexuses = undefined;
    expect((await run(device, eject)).outcome).toBe('5/53/2');
    nexuses = new Set(['c']);
    expect((await run(device, eject)).outcome).toBe('GOOD');
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('2/3a/0');
  });

  test('stays when nobody knows the nexuses', async () => {
    const device = await openDevice(memory(), { removable: true, nexuses: () => undefined });
    await run(device, prevent(1));
    expect((await run(device, eject)).outcome).toBe('5/53/2');
    await run(device, prevent(0));
    expect((await run(device, eject)).outcome).toBe('GOOD');
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
