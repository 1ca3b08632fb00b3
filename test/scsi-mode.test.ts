// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import type { StateStorage } from '../lib/scsi/index.js';
import { type BlockStore, MemoryStore, readOnly } from '../lib/store/index.js';
import { asynchronous, CDB, cdb, openDevice, run } from './scsi-fake-command.js';

const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');
const memory = () => new MemoryStore({ size: 1 << 20 });
/** A disk with a cache; counts its flushes. */
const cached = () => {
  const store = Object.assign(memory(), {
    flushes: 0,
    flush: () => {
      store.flushes++;
    },
  });
  return store;
};
const modeSense10 = (page: number, flags = 0, subpage = 0, control = 0) =>
  cdb(0x5a, flags, (control << 6) | page, subpage, 0, 0, 0, [1000, 2], 0);
const modeSelect6 = (length: number, flags = 0x10) => cdb(0x15, flags, 0, 0, length, 0);
const modeSelect10 = (length: number, flags = 0x10) => cdb(0x55, flags, 0, [0, 4], [length, 2], 0);

async function page(store: BlockStore, code: number, control = 0): Promise<string> {
  const command = await run(await openDevice(store), CDB.modeSense6(code, 255, control), {
    in: 255,
  });
  expect(command.outcome).toBe('GOOD');
  return hex(command.data.subarray(4));
}

const CACHING = (wce: boolean) => `0812${wce ? '04' : '00'}${'00'.repeat(17)}`;

describe('MODE SENSE', () => {
  test('(6) header: length, WP, DPOFUA, block descriptor', async () => {
    const device = await openDevice(memory());
    const { data } = await run(device, cdb(0x1a, 0, 0x08, 0, 255, 0), { in: 255 });
    expect(hex(data.subarray(0, 12))).toBe('1f0010080000080000000200');
    expect(data).toHaveLength(32);
    const without = await run(device, cdb(0x1a, 8, 0x08, 0, 255, 0), { in: 255 });
    expect(hex(without.data.subarray(0, 4))).toBe('17001000');
    const protectedDevice = await openDevice(readOnly(memory()));
    const command = await run(protectedDevice, CDB.modeSense6(0x08), { in: 255 });
    expect(command.data[2]).toBe(0x90);
  });

  test('(10) header, short and long block descriptor', async () => {
    const device = await openDevice(memory());
    const short = await run(device, modeSense10(0x08), { in: 1000 });
    expect(hex(short.data.subarray(0, 16))).toBe('00220010000000080000080000000200');
    const long = await run(device, modeSense10(0x08, 0x10), { in: 1000 });
    expect(hex(long.data.subarray(0, 24))).toBe(
      '002a001001000010000000000000080000000000' + '00000200',
    );
  });

  test('the caching page tells the truth about the write cache', async () => {
    expect(await page(memory(), 0x08)).toBe(CACHING(false));
    expect(await page(cached(), 0x08)).toBe(CACHING(true));
    expect(await page(Object.assign(cached(), { writeCache: false }), 0x08)).toBe(CACHING(false));
  });

  test('changeable and default values', async () => {
    expect(await page(cached(), 0x08, 1)).toBe(CACHING(true));
    expect(await page(memory(), 0x08, 1)).toBe(CACHING(false));
    expect(await page(cached(), 0x08, 2)).toBe(CACHING(true));
    expect(await page(memory(), 0x0a, 0)).toBe('0a0a00100040000000000000');
    expect(await page(memory(), 0x0a, 1)).toBe('0a0a04000800000000000000');
    expect(await page(memory(), 0x01, 1)).toBe('010a00000000000000000000');
  });

  test('all pages, with and without subpages', async () => {
    const codes = (data: Uint8Array) => {
      const found = [];
      for (let at = 8; at < data.length; ) {
        const sub = ((data[at] as number) & 0x40) !== 0;
        found.push(((data[at] as number) & 0x3f) * 256 + (sub ? (data[at + 1] as number) : 0));
        at += sub
          ? 4 + (((data[at + 2] as number) << 8) | (data[at + 3] as number))
          : 2 + (data[at + 1] as number);
      }
      return found;
    };
    const device = await openDevice(memory());
    const pages = await run(device, modeSense10(0x3f, 8), { in: 1000 });
    expect(codes(pages.data)).toEqual([0x0100, 0x0800, 0x0a00, 0x1c00]);
    const all = await run(device, modeSense10(0x3f, 8, 0xff), { in: 1000 });
    expect(codes(all.data)).toEqual([0x0100, 0x0800, 0x0a00, 0x0a01, 0x1c00, 0x1c02]);
    const control = await run(device, modeSense10(0x0a, 8, 0xff), { in: 1000 });
    expect(codes(control.data)).toEqual([0x0a00, 0x0a01]);
    const extension = await run(device, modeSense10(0x0a, 8, 0x01), { in: 1000 });
    expect(codes(extension.data)).toEqual([0x0a01]);
  });

  test('unknown pages and saved values are refused', async () => {
    const device = await openDevice(memory());
    for (const [code, subpage] of [
      [0x02, 0],
      [0x0a, 2],
      [0x3f, 1],
    ] as const) {
      expect((await run(device, modeSense10(code, 0, subpage), { in: 1000 })).outcome).toBe(
        '5/24/0',
      );
    }
    expect((await run(device, modeSense10(0x08, 0, 0, 3), { in: 1000 })).outcome).toBe('5/39/0');
  });

  test('the allocation length cuts', async () => {
    const device = await openDevice(memory());
    for (const allocation of [0, 1, 4, 20]) {
      const command = await run(device, cdb(0x1a, 0, 0x3f, 0, allocation, 0), { in: 255 });
      expect(command.outcome).toBe('GOOD');
      expect(command.written).toBe(allocation);
    }
  });
});

describe('MODE SELECT', () => {
  const caching = (wce: number) => [0x08, 0x12, wce, ...new Array(17).fill(0)];
  const control = (dSense: number, swp: number) => [
    ...[0x0a, 0x0a, dSense, 0x10, swp, 0x40],
    ...new Array(6).fill(0),
  ];
  const select6 = (...bytes: number[]) => Uint8Array.from([0, 0, 0, 0, ...bytes]);
  const select10 = (...bytes: number[]) => Uint8Array.from([0, 0, 0, 0, 0, 0, 0, 0, ...bytes]);

  test.each([
    ['synchronous', (store: BlockStore) => store],
    ['asynchronous', asynchronous],
  ])('switching the cache off flushes, and makes every write durable (%s)', async (_, wrap) => {
    const store = cached();
    const device = await openDevice(wrap(store));
    const off = select6(...caching(0));
    expect((await run(device, modeSelect6(off.length), { out: off })).outcome).toBe('GOOD');
    expect(store.flushes).toBe(1);
    const data = new Uint8Array(512).fill(1);
    await run(device, CDB.write10(0, 1), { out: data });
    expect(store.flushes).toBe(2);
    await run(device, CDB.writeSame10(0, 1), { out: data });
    expect(store.flushes).toBe(3);
    await run(device, CDB.writeSame10(0, 1), { out: new Uint8Array(512) });
    expect(store.flushes).toBe(4);
    const now = await run(device, CDB.modeSense6(0x08), { in: 255 });
    expect(now.data[6]).toBe(0);
    const on = select10(...caching(4));
    expect((await run(device, modeSelect10(on.length), { out: on })).outcome).toBe('GOOD');
    await run(device, CDB.write10(0, 1), { out: data });
    expect(store.flushes).toBe(4);
  });

  test('a cache that is not there cannot be switched on', async () => {
    const list = select6(...caching(4));
    const command = await run(await openDevice(memory()), modeSelect6(list.length), { out: list });
    expect(command.outcome).toBe('5/26/0');
    expect(command.sense?.field).toEqual({ in: 'parameters', byte: 6, bit: 2 });
  });

  test('SWP protects from writes, whatever the kind', async () => {
    const device = await openDevice(memory());
    const list = select6(...control(0, 8));
    expect((await run(device, modeSelect6(list.length), { out: list })).outcome).toBe('GOOD');
    const out = new Uint8Array(512);
    expect((await run(device, CDB.write10(0, 1), { out })).outcome).toBe('7/27/2');
    expect((await run(device, CDB.read10(0, 1), { in: 512 })).outcome).toBe('GOOD');
    const header = await run(device, CDB.modeSense6(0x0a), { in: 255 });
    expect(header.data[2]).toBe(0x90);
    const off = select6(...control(0, 0));
    await run(device, modeSelect6(off.length), { out: off });
    expect((await run(device, CDB.write10(0, 1), { out })).outcome).toBe('GOOD');
  });

  test('D_SENSE changes the format of sense data; a reset changes it back', async () => {
    const device = await openDevice(memory());
    const fails = () => run(device, CDB.read10(5000, 1), { in: 512 });
    expect((await fails()).senseBytes?.[0]).toBe(0x70);
    const list = select6(...control(4, 0));
    await run(device, modeSelect6(list.length), { out: list });
    expect((await fails()).senseBytes?.[0]).toBe(0x72);
    expect((await fails()).outcome).toBe('5/21/0');
    device.taskManagement({ type: 'abort-task', commands: [] });
    expect((await fails()).senseBytes?.[0]).toBe(0x72);
    device.taskManagement({ type: 'lun-reset', commands: [] });
    expect((await fails()).senseBytes?.[0]).toBe(0x70);
  });

  test('all pages or none: a wrong one undoes those before it', async () => {
    const device = await openDevice(memory());
    const list = select6(...control(4, 0), 0x1c, 0x0a, 0xff, ...new Array(9).fill(0));
    const command = await run(device, modeSelect6(list.length), { out: list });
    expect(command.outcome).toBe('5/26/0');
    expect(command.sense?.field).toEqual({ in: 'parameters', byte: 18, bit: 7 });
    expect(command.senseBytes?.[0]).toBe(0x70);
  });

  test('a block descriptor that changes nothing is taken; another is refused', async () => {
    const device = await openDevice(memory());
    const select = (...descriptor: number[]) => {
      const list = Uint8Array.from([0, 0, 0, 8, ...descriptor]);
      return run(device, modeSelect6(list.length), { out: list });
    };
    expect((await select(0, 0, 8, 0, 0, 0, 2, 0)).outcome).toBe('GOOD');
    expect((await select(0, 0, 0, 0, 0, 0, 2, 0)).outcome).toBe('GOOD');
    expect((await select(0xff, 0xff, 0xff, 0xff, 0, 0, 2, 0)).outcome).toBe('GOOD');
    expect((await select(0, 0, 9, 0, 0, 0, 2, 0)).sense?.field?.byte).toBe(4);
    expect((await select(0, 0, 8, 0, 0, 0, 16, 0)).sense?.field?.byte).toBe(9);
    const long = Uint8Array.from([0, 0, 0, 0, 1, 0, 0, 16, ...cdb([2048, 8], [0, 4], [512, 4])]);
    expect((await run(device, modeSelect10(long.length), { out: long })).outcome).toBe('GOOD');
  });

  test.each([
    ['no list', [], 'GOOD'],
    ['half a header', [0, 0], '5/1a/0'],
    ['a descriptor that is cut', [0, 0, 0, 8, 0, 0], '5/1a/0'],
    ['a descriptor of odd length', [0, 0, 0, 7, ...new Array(7).fill(0)], '5/26/0'],
    ['half a page header', [0, 0, 0, 0, 0x08], '5/1a/0'],
    ['half a page', [0, 0, 0, 0, 0x08, 0x12, 0], '5/1a/0'],
    ['a page of the wrong length', [0, 0, 0, 0, 0x08, 0x11, ...new Array(17).fill(0)], '5/26/0'],
    ['an unknown page', [0, 0, 0, 0, 0x02, 0x0e, ...new Array(14).fill(0)], '5/26/0'],
    [
      'a page in the wrong format',
      [0, 0, 0, 0, 0x48, 0, 0, 0x10, ...new Array(16).fill(0)],
      '5/26/0',
    ],
  ])('%s', async (_, bytes, outcome) => {
    const out = Uint8Array.from(bytes);
    const command = await run(await openDevice(memory()), modeSelect6(out.length), { out });
    expect(command.outcome).toBe(outcome);
  });

  test('saving is refused', async () => {
    const out = select6(...caching(0));
    const command = await run(await openDevice(memory()), modeSelect6(out.length, 0x11), { out });
    expect(command.sense?.field).toEqual({ in: 'cdb', byte: 1, bit: 0 });
  });
});

describe('saved mode pages', () => {
  const control = (page: number[]) => Uint8Array.from([0, 0, 0, 0, ...page]);
  const D_SENSE = [0x0a, 0x0a, 0x04, 0x10, 0, 0x40, 0, 0, 0, 0, 0, 0];
  const select = (options: number, length: number) => cdb(0x15, options, 0, 0, length, 0);

  class Storage implements StateStorage {
    bytes: Uint8Array | undefined;
    load = async () => this.bytes;
    save = async (bytes: Uint8Array) => {
      this.bytes = bytes.slice();
    };
  }

  test('come back after a restart and a reset; what was only set does not', async () => {
    const modePageStorage = new Storage();
    const store = memory();
    const device = await openDevice(store, { modePageStorage });
    const list = control(D_SENSE);
    expect((await run(device, select(0x11, list.length), { out: list })).outcome).toBe('GOOD');
    const plain = control([0x0a, 0x0a, 0x00, ...D_SENSE.slice(3)]);
    expect((await run(device, select(0x10, plain.length), { out: plain })).outcome).toBe('GOOD');
    const values = async (from: typeof device, pc: number) =>
      (await run(from, CDB.modeSense6(0x0a, 255, pc), { in: 255 })).data.subarray(4);
    expect([...(await values(device, 0)).subarray(0, 3)]).toEqual([0x8a, 0x0a, 0x00]);
    expect([...(await values(device, 3)).subarray(0, 3)]).toEqual([0x8a, 0x0a, 0x04]);
    device.taskManagement({ type: 'lun-reset', commands: [] });
    expect((await values(device, 0))[2]).toBe(0x04);
    const again = await openDevice(store, { modePageStorage });
    expect((await values(again, 0))[2]).toBe(0x04);
    expect((await values(again, 2))[2]).toBe(0x00);
  });

  test('what a damaged storage holds is refused, and what can’t be changed is passed over', async () => {
    const modePageStorage = new Storage();
    for (const broken of [[0x0a], [0x0a, 5, 1], [0x4a, 1, 0], [0x4a, 1, 0, 9, 0]]) {
      modePageStorage.bytes = Uint8Array.from(broken);
      await expect(openDevice(memory(), { modePageStorage })).rejects.toThrow(/saved mode pages/);
    }
    modePageStorage.bytes = Uint8Array.from([0x3e, 1, 7, 0x0a, 0x0a, ...new Array(10).fill(0xff)]);
    const device = await openDevice(memory(), { modePageStorage });
    const { data } = await run(device, CDB.modeSense6(0x0a), { in: 255 });
    expect([...data.subarray(4, 10)]).toEqual([0x8a, 0x0a, 0x04, 0x10, 0x08, 0x40]);
  });

  test('a failing storage fails the command', async () => {
    const modePageStorage = new Storage();
    const device = await openDevice(memory(), { modePageStorage });
    modePageStorage.save = async () => {
      throw new Error('full');
    };
    const list = control(D_SENSE);
    const command = await run(device, select(0x11, list.length), { out: list });
    expect(command.outcome).toBe('4/44/0');
  });

  test('others hear of changed parameters where there is more than one nexus', async () => {
    let nexuses = new Set(['one']);
    const device = await openDevice(memory(), { nexuses: async () => ({ names: nexuses }) });
    const list = control(D_SENSE);
    await run(device, select(0x10, list.length), { out: list });
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('GOOD');
    nexuses = new Set(['one', 'two']);
    await run(device, select(0x10, list.length), { out: list });
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('6/2a/1');
  });
});
