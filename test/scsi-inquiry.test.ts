// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { ArgumentError } from '../lib/errors.js';
import { BlockDevice } from '../lib/scsi/index.js';
import { MemoryStore } from '../lib/store/index.js';
import { BareStore, CDB, cdb, openDevice, run, STALE } from './scsi-fake-command.js';

const MiB = 1024 * 1024;
const store = () => new MemoryStore({ size: 16 * MiB });
const text = (bytes: Uint8Array) => Buffer.from(bytes).toString('latin1');
const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');

async function page(code: number, device?: BlockDevice): Promise<Uint8Array> {
  const command = await run(device ?? (await openDevice(store())), CDB.inquiry(code), { in: 255 });
  expect(command.outcome).toBe('GOOD');
  expect(command.data[1]).toBe(code);
  expect(command.data.length).toBe(
    4 + ((command.data[2] as number) << 8) + (command.data[3] as number),
  );
  return command.data.subarray(4);
}

describe('standard INQUIRY data', () => {
  test('says who the device is, and every other byte is zero', async () => {
    const device = await openDevice(store(), {
      vendor: 'ACME',
      product: 'Rocket disk',
      revision: '7',
    });
    const { data } = await run(device, CDB.inquiry(), { in: 255 });
    expect(data).toHaveLength(96);
    expect(data[2]).toBe(6);
    expect(data[3]).toBe(2);
    expect(data[4]).toBe(91);
    expect(data[7]).toBe(2);
    expect(text(data.subarray(8, 36))).toBe('ACME    Rocket disk     7   ');
    expect(hex(data.subarray(58, 64))).toBe('00a0046004c0');
    // TPGS 01b (implicit), 3PC.
    expect(data[5]).toBe(0x18);
    const rest = [0, 1, 6, ...range(36, 58), ...range(64, 96)];
    expect(rest.map((at) => data[at])).toEqual(rest.map(() => 0));
  });

  test('a removable device says so', async () => {
    const device = await openDevice(store(), { removable: true });
    const { data } = await run(device, CDB.inquiry(), { in: 96 });
    expect(data[1]).toBe(0x80);
  });

  test.each([0, 1, 5, 35, 36, 95, 96, 97, 255, 511, 512, 65535])(
    'allocation length %i cuts exactly; nothing behind it is touched',
    async (allocation) => {
      const command = await run(await openDevice(store()), CDB.inquiry(undefined, allocation), {
        in: 1000,
      });
      expect(command.written).toBe(Math.min(96, allocation));
      expect(command.dataIn.bytes.subarray(command.written).every((byte) => byte === STALE)).toBe(
        true,
      );
    },
  );

  test('the buffer cuts too', async () => {
    const command = await run(await openDevice(store()), CDB.inquiry(), { in: 10 });
    expect(command.outcome).toBe('GOOD');
    expect(command.written).toBe(10);
  });

  test('a page code without EVPD, and CMDDT, are refused', async () => {
    const device = await openDevice(store());
    const bad = await run(device, cdb(0x12, 0, 0x80, [255, 2], 0), { in: 255 });
    expect(bad.outcome).toBe('5/24/0');
    expect(bad.sense?.field).toEqual({ in: 'cdb', byte: 2, bit: undefined });
    const cmddt = await run(device, cdb(0x12, 2, 0, [255, 2], 0), { in: 255 });
    expect(cmddt.sense?.field).toEqual({ in: 'cdb', byte: 1, bit: 1 });
  });
});

describe('VPD pages', () => {
  test('00h lists them all, in ascending order; each is there', async () => {
    const codes = [...(await page(0x00))];
    expect(codes).toEqual([0x00, 0x80, 0x83, 0x86, 0x87, 0x8a, 0x8f, 0xb0, 0xb1, 0xb2]);
    for (const code of codes) await page(code);
  });

  test('b2h only where blocks can be unmapped', async () => {
    const device = await openDevice(new BareStore(store()));
    expect([...(await page(0x00, device))]).not.toContain(0xb2);
    const command = await run(device, CDB.inquiry(0xb2), { in: 255 });
    expect(command.outcome).toBe('5/24/0');
    expect(command.sense?.field).toEqual({ in: 'cdb', byte: 2, bit: undefined });
  });

  test('80h is the serial', async () => {
    const device = await openDevice(store(), { serial: 'XYZ-42' });
    expect(text(await page(0x80, device))).toBe('XYZ-42');
  });

  test('83h names the disk three ways, stable and by the serial, and its port', async () => {
    const data = await page(0x83, await openDevice(store(), { serial: 'XYZ-42' }));
    expect(hex(data.subarray(0, 4))).toBe('01030010');
    const naa = hex(data.subarray(4, 20));
    expect(naa).toMatch(/^6001405[0-9a-f]{25}$/);
    expect(hex(data.subarray(20, 24))).toBe('0201001e');
    expect(text(data.subarray(24, 54))).toBe('TCMU-JS Block device    XYZ-42');
    expect(hex(data.subarray(54, 58))).toBe('03080028');
    expect(text(data.subarray(58, 98))).toBe(`naa.${naa.toUpperCase()}\0\0\0\0`);
    // Relative target port 1, target port group 0.
    expect(hex(data.subarray(98))).toBe('01140004' + '00000001' + '01150004' + '00000000');
    const again = await page(0x83, await openDevice(store(), { serial: 'XYZ-42' }));
    expect(again).toEqual(data);
    const other = await page(0x83, await openDevice(store(), { serial: 'XYZ-43' }));
    expect(hex(other.subarray(4, 20))).not.toBe(naa);
  });

  test('83h with a given world wide name', async () => {
    const wwn = 'naa.60014051234567890ABCDEF012345678';
    const data = await page(0x83, await openDevice(store(), { wwn }));
    expect(hex(data.subarray(4, 20))).toBe('60014051234567890abcdef012345678');
  });

  test('86h tells a volatile cache; 87h that mode pages are shared', async () => {
    expect((await page(0x86))[2]).toBe(0);
    const cached = await openDevice(Object.assign(store(), { flush: () => {} }));
    expect((await page(0x86, cached))[2]).toBe(1);
    expect(hex(await page(0x87))).toBe('3fff0000');
  });

  test('b0h tells the limits in blocks', async () => {
    const device = await openDevice(
      Object.assign(new MemoryStore({ size: 16 * MiB, blockSize: 4096 }), {
        optimalTransferLength: MiB,
        physicalBlockSize: 16384,
        unmapGranularity: 65536,
      }),
      { maxTransferLength: 4 * MiB },
    );
    const data = Buffer.from(await page(0xb0, device));
    expect(data).toHaveLength(0x3c);
    expect(data[0]).toBe(1); // WSNZ
    expect(data[1]).toBe(255);
    expect(data.readUInt16BE(2)).toBe(4);
    expect(data.readUInt32BE(4)).toBe(1024);
    expect(data.readUInt32BE(8)).toBe(256);
    expect(data.readUInt32BE(16)).toBe(MiB);
    expect(data.readUInt32BE(20)).toBe(256);
    expect(data.readUInt32BE(24)).toBe(16);
    expect(data.readUInt32BE(28)).toBe(0x8000_0000);
    expect(data.readBigUInt64BE(32)).toBe(262144n);
    expect(data.readUInt32BE(40)).toBe(256);
    expect(data.subarray(44).every((byte) => byte === 0)).toBe(true);
  });

  test('8fh tells the copy commands, limits and descriptors', async () => {
    const data = await page(0x8f);
    expect(hex(data)).toBe(
      '0001000c' +
        '0b' +
        '830300011c' +
        '840400030405' +
        '0004001c' +
        '00000000' +
        '0010' +
        '0100' +
        '00001e00' +
        '00000000' +
        '00'.repeat(12) +
        '00080004' +
        '0202e400' +
        '000c0004' +
        '0002ffff' +
        '80010020' +
        '00000020' +
        '00000020' +
        '0ffff000' +
        '09' +
        '00'.repeat(19),
    );
  });

  test('b0h of a store without unmap has no unmap limits', async () => {
    const data = await page(0xb0, await openDevice(new BareStore(store())));
    expect(data.subarray(16, 32).every((byte) => byte === 0)).toBe(true);
  });

  test('b1h tells a disk without seeks from another', async () => {
    expect(hex((await page(0xb1)).subarray(0, 2))).toBe('0001');
    // WABEREQ 01b: a block erase is there, and reads succeed after it.
    expect(hex((await page(0xb1)).subarray(2, 8))).toBe('004000000000');
    const spinning = await openDevice(Object.assign(store(), { nonRotational: false }));
    expect(hex((await page(0xb1, spinning)).subarray(0, 2))).toBe('0000');
  });

  test('b2h: UNMAP, both WRITE SAMEs, zeros afterwards, thin', async () => {
    // THRESHOLD EXPONENT 1: space is counted in pairs of blocks.
    expect(hex(await page(0xb2))).toBe('01e40200');
  });
});

describe('names', () => {
  test.each([
    [{ vendor: 'NINE CHAR' }],
    [{ product: 'seventeen letters' }],
    [{ revision: '12345' }],
    [{ vendor: 'Ümläut' }],
    [{ serial: '' }],
    [{ serial: '  ' }],
    [{ serial: 'x'.repeat(65) }],
    [{ serial: 'new\nline' }],
    [{ wwn: '5001405000000001' }],
    [{ wwn: `6${'g'.repeat(31)}` }],
    [{ maxTransferLength: -1 }],
    [{ maxTransferLength: 1.5 }],
  ])('%j is refused', (options) => {
    expect(() => new BlockDevice(store(), { serial: 'ok', ...options })).toThrow(ArgumentError);
  });
});

function range(start: number, end: number): number[] {
  return Array.from({ length: end - start }, (_, i) => start + i);
}
