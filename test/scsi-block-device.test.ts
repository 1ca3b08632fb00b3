// SPDX-License-Identifier: Apache-2.0
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import { describe, expect, test } from 'vitest';
import { ArgumentError } from '../lib/errors.js';
import { BlockDevice, type StoreFailure, sense } from '../lib/scsi/index.js';
import { type BlockStore, faults, MemoryStore, readOnly } from '../lib/store/index.js';
import {
  asynchronous,
  CDB,
  cdb,
  FakeCommand,
  openDevice,
  run,
  unmapList,
} from './scsi-fake-command.js';

const memory = () => new MemoryStore({ size: 1 << 20 });

describe('decoding', () => {
  test('every unknown operation code is INVALID COMMAND OPERATION CODE, in all eight groups', async () => {
    const device = await openDevice(memory());
    const listing = await run(device, cdb(0xa3, 0x0c, 0, 0, 0, 0, [65535, 4], 0, 0), { in: 65535 });
    const known = new Set<number>();
    for (let at = 4; at < listing.data.length; at += 8) known.add(listing.data[at] as number);
    const lengths = [6, 10, 10, 12, 16, 12, 10, 10];
    let unknown = 0;
    for (let opcode = 0; opcode < 256; opcode++) {
      if (known.has(opcode)) continue;
      unknown++;
      const bytes = new Uint8Array(lengths[opcode >> 5] as number).fill(0xff);
      bytes[0] = opcode;
      const command = await run(device, bytes, { in: 512 });
      expect(command.outcome, opcode.toString(16)).toBe('5/20/0');
      expect(command.sense?.field).toEqual({ in: 'cdb', byte: 0, bit: undefined });
    }
    // Groups 3, 6 and 7, which have no standard length, among them: 7Eh, C0h to FFh.
    expect(unknown).toBeGreaterThan(190);
    for (const opcode of [0x60, 0x7e, 0xc0, 0xdf, 0xe0, 0xff]) {
      expect(known.has(opcode)).toBe(false);
    }
  });

  test('an unknown service action points at its field', async () => {
    const command = await run(await openDevice(memory()), [0x9e, 0x1f, ...new Array(14).fill(0)]);
    expect(command.outcome).toBe('5/24/0');
    expect(command.sense?.field).toEqual({ in: 'cdb', byte: 1, bit: 4 });
  });

  test('NACA is refused everywhere', async () => {
    const device = await openDevice(memory());
    for (const bytes of [CDB.testUnitReady(), CDB.read10(0, 1), CDB.read16(0, 1)]) {
      bytes[bytes.length - 1] = 0x04;
      const command = await run(device, bytes, { in: 512 });
      expect(command.sense?.field).toEqual({ in: 'cdb', byte: bytes.length - 1, bit: 2 });
    }
  });

  test('a CDB that is cut, or empty, is refused', async () => {
    const device = await openDevice(memory());
    for (let length = 1; length < 10; length++) {
      const command = await run(device, CDB.read10(0, 1).slice(0, length), { in: 512 });
      expect(command.outcome).toBe('5/24/0');
    }
    expect((await run(device, [])).outcome).toBe('5/20/0');
  });

  test('reserved bits are ignored', async () => {
    const bytes = CDB.read10(0, 1, 0x01);
    bytes[6] = 0xc0;
    expect((await run(await openDevice(memory()), bytes, { in: 512 })).outcome).toBe('GOOD');
  });
});

describe('write protection', () => {
  test('every command that writes is refused; reading works', async () => {
    const store = Object.assign(memory(), { readOnly: true });
    const device = await openDevice(store);
    const out = new Uint8Array(512);
    for (const [bytes, data] of [
      [cdb(0x0a, 0, 0, 0, 1, 0), out],
      [CDB.write10(0, 1), out],
      [cdb(0xaa, 0, [0, 4], [1, 4], 0, 0), out],
      [CDB.write16(0, 1), out],
      [cdb(0x2e, 0, [0, 4], 0, [1, 2], 0), out],
      [cdb(0xae, 0, [0, 4], [1, 4], 0, 0), out],
      [cdb(0x8e, 0, [0, 8], [1, 4], 0, 0), out],
      [cdb(0x8b, 0, [0, 8], [1, 4], 0, 0), out],
      [CDB.writeSame10(0, 1), out],
      [CDB.writeSame16(0, 1, 0x08), out],
      [CDB.compareAndWrite(0, 1), new Uint8Array(1024)],
      [CDB.unmap(24), unmapList([0, 1])],
    ] as const) {
      expect((await run(device, bytes, { out: data })).outcome).toBe('7/27/0');
    }
    expect((await run(device, CDB.read10(0, 1), { in: 512 })).outcome).toBe('GOOD');
  });

  test('the read-only middleware makes a disk that advertises nothing it cannot do', async () => {
    const device = await openDevice(readOnly(memory()));
    expect((await run(device, CDB.write10(0, 1), { out: new Uint8Array(512) })).outcome).toBe(
      '7/27/0',
    );
    expect((await run(device, CDB.inquiry(0xb2), { in: 64 })).outcome).toBe('5/24/0');
  });
});

describe('unit attentions', () => {
  test('POWER ON once after open, but not for INQUIRY, REPORT LUNS and REQUEST SENSE', async () => {
    const device = await openDevice(memory(), { powerOnAttention: true });
    expect((await run(device, CDB.inquiry(), { in: 96 })).outcome).toBe('GOOD');
    expect((await run(device, cdb(0xa0, 0, 0, 0, 0, 0, [16, 4], 0, 0), { in: 16 })).outcome).toBe(
      'GOOD',
    );
    expect((await run(device, CDB.read10(0, 1), { in: 512 })).outcome).toBe('6/29/0');
    expect((await run(device, CDB.read10(0, 1), { in: 512 })).outcome).toBe('GOOD');
  });

  test('is the default for fixed disks and not for removable ones', async () => {
    for (const [removable, outcome] of [
      [false, '6/29/0'],
      [true, 'GOOD'],
    ] as const) {
      const device = new BlockDevice(memory(), { serial: 'x', removable });
      await device.open();
      expect((await run(device, CDB.testUnitReady())).outcome).toBe(outcome);
    }
  });

  test('a changed capacity is reported once, and in force at once', async () => {
    const store = memory();
    const device = await openDevice(store);
    store.resize(1 << 21);
    expect((await run(device, CDB.read10(2048, 1), { in: 512 })).outcome).toBe('5/21/0');
    device.capacityChanged();
    device.capacityChanged();
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('6/2a/9');
    expect((await run(device, CDB.read10(4095, 1), { in: 512 })).outcome).toBe('GOOD');
    const capacity = await run(device, cdb(0x25, 0, [0, 8], 0), { in: 8 });
    expect(Buffer.from(capacity.data).readUInt32BE(0)).toBe(4095);
    store.resize(1 << 19);
    device.capacityChanged();
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('6/2a/9');
    expect((await run(device, CDB.read10(1024, 1), { in: 512 })).outcome).toBe('5/21/0');
  });

  test('a capacity that is none is thrown back, and the old one stays', async () => {
    const store = { size: 1 << 20, read() {}, write() {} };
    const device = await openDevice(store);
    store.size = 1000;
    expect(() => device.capacityChanged()).toThrow(ArgumentError);
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('GOOD');
    expect((await run(device, CDB.read10(2047, 1), { in: 512 })).outcome).toBe('GOOD');
  });
});

describe('opening and closing', () => {
  test('opens and closes the store, waiting for it', async () => {
    const log: string[] = [];
    const store: BlockStore = {
      size: 512,
      read() {},
      write() {},
      open: async () => void log.push('open'),
      close: async () => void log.push('close'),
    };
    const device = new BlockDevice(store, { serial: 'x', powerOnAttention: false });
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('2/4/1');
    const opening = device.open();
    expect((await run(device, CDB.inquiry(), { in: 96 })).outcome).toBe('2/4/1');
    await opening;
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('GOOD');
    await device.close();
    await device.close();
    expect(log).toEqual(['open', 'close']);
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('2/4/1');
  });

  test('a store that opens at once is open at once', () => {
    const device = new BlockDevice(memory(), { serial: 'x' });
    expect(device.open()).toBeUndefined();
    expect(device.close()).toBeUndefined();
  });

  test('size and capabilities are read when the store is open', async () => {
    const store = {
      size: 0,
      read() {},
      write() {},
      flush() {},
      writeCache: true,
      open() {
        store.size = 1 << 20;
        store.writeCache = false;
      },
    };
    const device = await openDevice(store);
    const mode = await run(device, CDB.modeSense6(0x08), { in: 64 });
    expect(mode.data[6]).toBe(0);
  });

  test.each([
    [{ size: 0 }, /size is 0/],
    [{ size: 1000 }, /size is 1000/],
    [{ size: 2 ** 53 }, /size is/],
    [{ size: Number.NaN }, /size is NaN/],
    [{ blockSize: 520 }, /blockSize is 520/],
    [{ physicalBlockSize: 256 }, /physicalBlockSize is 256/],
    [{ physicalBlockSize: 1536 }, /physicalBlockSize is 1536/],
    [{ unmapGranularity: 700 }, /unmapGranularity is 700/],
    [{ writeCache: true }, /no flush/],
  ])('%j is no disk; the store is closed again', async (properties, message) => {
    let closed = 0;
    const store = { size: 1 << 20, read() {}, write() {}, close: () => void closed++ };
    const opening = openDevice({ ...store, ...properties });
    await expect(opening).rejects.toThrow(ArgumentError);
    await expect(opening).rejects.toThrow(message);
    expect(closed).toBe(1);
  });
});

describe('failures of the store', () => {
  test('become sense data; the unexpected ones are published with what the initiator saw', async () => {
    const seen: StoreFailure[] = [];
    const listen = (message: unknown) => void seen.push(message as StoreFailure);
    subscribe('tcmu:scsi:error', listen);
    try {
      const bug = new RangeError('offset is out of bounds');
      for (const wrap of [(store: BlockStore) => store, asynchronous]) {
        const device = await openDevice(
          wrap(faults(memory(), { operations: ['read'], error: () => bug })),
        );
        const command = await run(device, CDB.read10(0, 1), { in: 512 });
        expect(command.outcome).toBe('4/44/0');
        expect(seen.pop()).toMatchObject({ device, command, error: bug });
        const own = await openDevice(
          wrap(faults(memory(), { error: () => sense.notReadyBecomingReady() })),
        );
        expect((await run(own, CDB.read10(0, 1), { in: 512 })).outcome).toBe('2/4/1');
        expect(seen).toEqual([]);
      }
    } finally {
      unsubscribe('tcmu:scsi:error', listen);
    }
  });

  test('BUSY goes out without sense data', async () => {
    const device = await openDevice(faults(memory(), { error: 'EAGAIN' }));
    const command = await run(device, CDB.read10(0, 1), { in: 512 });
    expect(command.status).toBe(0x08);
    expect(command.senseBytes).toBeUndefined();
  });

  test('an error of complete() is not taken for one of the store', async () => {
    const device = await openDevice(memory());
    const command = new FakeCommand(CDB.testUnitReady());
    command.complete();
    expect(() => device.handle(command)).toThrow('completed twice');
    expect(command.completions).toBe(2);
  });
});
