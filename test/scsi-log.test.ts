// SPDX-License-Identifier: Apache-2.0
/** LOG SENSE, and the soft thresholds of thin provisioning. */
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import type { BlockDevice } from '../lib/scsi/index.js';
import { type BlockStore, MemoryStore } from '../lib/store/index.js';
import { BareStore, CDB, cdb, openDevice, run } from './scsi-fake-command.js';

const SIZE = 1 << 20;
const memory = () => new MemoryStore({ size: SIZE, pageSize: 4096 });
const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
const logSense = (page: number, subpage = 0, pointer = 0, allocation = 1000) =>
  cdb(0x4d, 0, 0x40 | page, subpage, 0, [pointer, 2], [allocation, 2], 0);

async function page(device: BlockDevice, code: number, subpage = 0, pointer = 0) {
  const command = await run(device, logSense(code, subpage, pointer), { in: 1000 });
  expect(command.outcome).toBe('GOOD');
  const data = Buffer.from(command.data);
  expect(data[0]).toBe(code | (subpage === 0 ? 0 : 0x40));
  expect(data[1]).toBe(subpage);
  expect(data.readUInt16BE(2)).toBe(data.length - 4);
  return data.subarray(4);
}

/** Parameters by code. */
function parameters(data: Buffer): Map<number, Buffer> {
  const found = new Map<number, Buffer>();
  for (let at = 0; at < data.length; at += 4 + (data[at + 3] as number)) {
    found.set(data.readUInt16BE(at), data.subarray(at + 4, at + 4 + (data[at + 3] as number)));
  }
  return found;
}

describe('LOG SENSE', () => {
  test('page 00h lists the pages, and each is there', async () => {
    const device = await openDevice(memory());
    const codes = [...(await page(device, 0x00))];
    expect(codes).toEqual([0x00, 0x0c, 0x0d, 0x0e, 0x19, 0x2f]);
    for (const code of codes) await page(device, code);
    expect(hex(await page(device, 0x00, 0xff))).toBe('000000ff' + '0c000d000e0019002f00');
    expect(hex(await page(device, 0x0d, 0xff))).toBe('0d00');
    const bare = await openDevice(new BareStore(memory()));
    expect([...(await page(bare, 0x00))]).not.toContain(0x0c);
  });

  test('what is not known says so', async () => {
    const device = await openDevice(memory());
    expect(hex(await page(device, 0x0d))).toBe('0000030200ff' + '0001030200ff');
    expect(hex(await page(device, 0x2f))).toBe('000003040000ff00');
    const cycles = parameters(await page(device, 0x0e));
    expect(cycles.get(1)?.toString('latin1')).toBe('      ');
    expect(cycles.get(3)?.readUInt32BE()).toBe(0xffff_ffff);
    expect(cycles.get(4)?.readUInt32BE()).toBe(0);
  });

  test('counts commands and blocks', async () => {
    const device = await openDevice(memory());
    await run(device, CDB.read10(0, 3), { in: 1536 });
    await run(device, CDB.read16(0, 4), { in: 2048 });
    await run(device, CDB.write10(0, 2), { out: new Uint8Array(1024) });
    const general = parameters(await page(device, 0x19)).get(1) as Buffer;
    expect([0, 8, 16, 24].map((at) => Number(general.readBigUInt64BE(at)))).toEqual([2, 1, 2, 7]);
  });

  test('counts how often a removable medium was loaded', async () => {
    const device = await openDevice(memory(), { removable: true });
    for (let i = 0; i < 3; i++) {
      await run(device, cdb(0x1b, 0, 0, 0, 0x02, 0));
      await run(device, cdb(0x1b, 0, 0, 0, 0x03, 0));
    }
    expect(
      parameters(await page(device, 0x0e))
        .get(6)
        ?.readUInt32BE(),
    ).toBe(3);
  });

  test('the parameter pointer begins there; past the last it is refused', async () => {
    const device = await openDevice(memory());
    expect([...parameters(await page(device, 0x0e, 0, 4)).keys()]).toEqual([4, 5, 6]);
    const past = await run(device, logSense(0x0e, 0, 7), { in: 100 });
    expect(past.sense?.field).toEqual({ in: 'cdb', byte: 5, bit: undefined });
  });

  test('what is not there is refused, and the allocation length cuts', async () => {
    const device = await openDevice(memory());
    expect((await run(device, logSense(0x01), { in: 100 })).outcome).toBe('5/24/0');
    expect((await run(device, logSense(0x0d, 1), { in: 100 })).outcome).toBe('5/24/0');
    expect((await run(device, logSense(0x01, 0xff), { in: 100 })).outcome).toBe('5/24/0');
    const sp = logSense(0x0d);
    sp[1] = 1;
    expect((await run(device, sp, { in: 100 })).outcome).toBe('5/24/0');
    expect((await run(device, logSense(0x0d, 0, 0, 7), { in: 100 })).written).toBe(7);
  });
});

describe('soft thresholds', () => {
  // Writes look at most once a second: the clock goes on when a test says so.
  beforeEach(() => {
    vi.useFakeTimers({ toFake: ['Date', 'performance'] });
  });
  afterEach(() => {
    vi.useRealTimers();
  });

  /** Threshold sets of two blocks: 1 KiB each. */
  const set = async (
    device: BlockDevice,
    available: number | undefined,
    used: number | undefined,
  ) => {
    const threshold = (arming: number, resource: number, count: number | undefined) => [
      ...[(count === undefined ? 0 : 0x80) | arming, resource, 0, 0],
      ...cdb([count ?? 0, 4]),
    ];
    const body = [
      ...new Array(12).fill(0),
      ...threshold(1, 1, available),
      ...threshold(2, 2, used),
    ];
    const list = Uint8Array.from([0, 0, 0, 0, 0x5c, 2, 0, 0x1c, ...body]);
    const command = await run(device, cdb(0x15, 0x10, 0, 0, list.length, 0), { out: list });
    expect(command.outcome).toBe('GOOD');
  };

  test('the log page counts what the thresholds do', async () => {
    const store = memory();
    const device = await openDevice(store);
    await run(device, CDB.write10(0, 1), { out: new Uint8Array(512).fill(1) });
    const counts = parameters(await page(device, 0x0c));
    expect(counts.get(1)?.readUInt32BE()).toBe((SIZE - 4096) / 1024);
    expect(counts.get(2)?.readUInt32BE()).toBe(4);
  });

  test('raise their unit attention once, and again after they were left', async () => {
    const store = memory();
    const device = await openDevice(store);
    const write = (lba: number) =>
      run(device, CDB.write10(lba, 8), { out: new Uint8Array(4096).fill(1) });
    await set(device, undefined, 8);
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('GOOD');
    await write(0);
    await write(8);
    // Set anew, it looks at once.
    await set(device, undefined, 8);
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('6/38/7');
    await set(device, undefined, 8);
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('GOOD');
    store.unmap(0, SIZE);
    await set(device, undefined, 8);
    await write(0);
    await write(8);
    await set(device, undefined, 8);
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('6/38/7');
  });

  test('a write looks a second after the last look, also when the clock was set back', async () => {
    const device = await openDevice(memory());
    const write = (lba: number) =>
      run(device, CDB.write10(lba, 8), { out: new Uint8Array(4096).fill(1) });
    await set(device, undefined, 8);
    await write(0);
    vi.setSystemTime(0);
    vi.advanceTimersByTime(999);
    await write(8);
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('GOOD');
    vi.advanceTimersByTime(1);
    await write(0);
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('6/38/7');
  });

  test('a write notices, also with a store that takes its time', async () => {
    const store: BlockStore = Object.assign(memory(), {
      space: async () => ({ used: 0, available: 4096 }),
    });
    const device = await openDevice(store);
    await set(device, 8, undefined);
    await new Promise((resolve) => setImmediate(resolve));
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('6/38/7');
  });

  test('a store that can’t tell is no failure', async () => {
    const store: BlockStore = Object.assign(memory(), {
      space: () => {
        throw new Error('not now');
      },
    });
    const device = await openDevice(store);
    await set(device, 8, 8);
    const out = new Uint8Array(512);
    expect((await run(device, CDB.write10(0, 1), { out })).outcome).toBe('GOOD');
  });

  test('there are none without a store that tells of its space', async () => {
    const device = await openDevice(new BareStore(memory(), 'unmap'));
    const sense = await run(device, cdb(0x5a, 0x08, 0x1c, 0x02, 0, 0, 0, [255, 2], 0), { in: 255 });
    expect(sense.outcome).toBe('5/24/0');
    expect((await run(device, CDB.inquiry(0xb2), { in: 64 })).data[4]).toBe(0);
  });
});
