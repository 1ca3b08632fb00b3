// SPDX-License-Identifier: Apache-2.0
/** The 32-byte commands, and WRITE ATOMIC (16): the same work in other clothes. */
import { describe, expect, test } from 'vitest';
import { ArgumentError } from '../lib/errors.js';
import { BlockDevice } from '../lib/scsi/index.js';
import { type BlockStore, MemoryStore } from '../lib/store/index.js';
import {
  asynchronous,
  BareStore,
  CDB,
  cdb,
  FakeCommand,
  openDevice,
  run,
} from './scsi-fake-command.js';

const SIZE = 1 << 20;
const memory = () => new MemoryStore({ size: SIZE, pageSize: 4096 });
const long = { longCommands: true };

function cdb32(action: number, lba: number | bigint, blocks: number, options = 0, length = 0x18) {
  return cdb(0x7f, 0, [0, 5], length, [action, 2], options, 0, [lba, 8], [0, 8], [blocks, 4]);
}

const ACTION = {
  read: 0x09,
  verify: 0x0a,
  write: 0x0b,
  writeVerify: 0x0c,
  writeSame: 0x0d,
} as const;

describe('32-byte commands', () => {
  test('write, read and verify', async () => {
    const device = await openDevice(memory(), long);
    const out = Uint8Array.from({ length: 1024 }, (_, i) => i & 0xff);
    expect((await run(device, cdb32(ACTION.write, 5, 2), { out })).outcome).toBe('GOOD');
    const read = await run(device, cdb32(ACTION.read, 5, 2), { in: 1024 });
    expect(read.data).toEqual(out);
    const BYTCHK = 0x02;
    const verify = (data: Uint8Array) =>
      run(device, cdb32(ACTION.verify, 5, 2, BYTCHK), { out: data });
    expect((await verify(out)).outcome).toBe('GOOD');
    const wrong = await verify(out.map((byte, i) => (i === 700 ? byte + 1 : byte)));
    expect([wrong.outcome, wrong.sense?.information]).toEqual(['e/1d/0', 700]);
    const block = out.subarray(0, 512);
    const written = await run(device, cdb32(ACTION.writeVerify, 9, 1, BYTCHK), { out: block });
    expect(written.outcome).toBe('GOOD');
    expect((await run(device, CDB.read10(9, 1), { in: 512 })).data).toEqual(block);
  });

  test('WRITE SAME with a block, without one, and by unmapping', async () => {
    const store = memory();
    const device = await openDevice(store, long);
    const out = new Uint8Array(512).fill(7);
    expect((await run(device, cdb32(ACTION.writeSame, 0, 16), { out })).outcome).toBe('GOOD');
    expect((await run(device, CDB.read10(15, 1), { in: 512 })).data).toEqual(out);
    const NDOB = 0x01;
    expect((await run(device, cdb32(ACTION.writeSame, 15, 1, NDOB))).outcome).toBe('GOOD');
    expect((await run(device, CDB.read10(15, 1), { in: 512 })).data[0]).toBe(0);
    const UNMAP = 0x08;
    expect((await run(device, cdb32(ACTION.writeSame, 0, 16, UNMAP | NDOB))).outcome).toBe('GOOD');
    expect(store.allocated).toBe(0);
    const thick = await openDevice(new BareStore(memory()), long);
    expect((await run(thick, cdb32(ACTION.writeSame, 0, 16, UNMAP | NDOB))).outcome).toBe('5/24/0');
    const none = await run(device, cdb32(ACTION.writeSame, 0, 0), { out });
    expect(none.sense?.field).toMatchObject({ byte: 28 });
  });

  test('refuses what the short forms refuse', async () => {
    const device = await openDevice(memory(), long);
    const beyond = await run(device, cdb32(ACTION.read, 1n << 60n, 1), { in: 512 });
    expect(beyond.outcome).toBe('5/21/0');
    const protect = await run(device, cdb32(ACTION.read, 0, 1, 0x20), { in: 512 });
    expect(protect.sense?.field).toEqual({ in: 'cdb', byte: 10, bit: 7 });
    const length = await run(device, cdb32(ACTION.read, 0, 1, 0, 0x10), { in: 512 });
    expect(length.sense?.field).toMatchObject({ byte: 7 });
    const action = await run(device, cdb32(0x99, 0, 1), { in: 512 });
    expect(action.sense?.field).toMatchObject({ byte: 8 });
    const check = await run(device, cdb32(ACTION.verify, 0, 1, 0x04), { in: 512 });
    expect(check.sense?.field).toEqual({ in: 'cdb', byte: 10, bit: 2 });
    const cut = await run(device, cdb32(ACTION.read, 0, 1).slice(0, 9), { in: 512 });
    expect(cut.outcome).toBe('5/24/0');
  });

  test('are not there unless asked for', async () => {
    const device = await openDevice(memory());
    expect((await run(device, cdb32(ACTION.read, 0, 1), { in: 512 })).outcome).toBe('5/20/0');
  });
});

describe('WRITE ATOMIC (16)', () => {
  const atomic = (lba: number, blocks: number, boundary = 0, options = 0) =>
    cdb(0x9c, options, [lba, 8], [boundary, 2], [blocks, 2], 0, 0);

  test('is one write to the store, and apart from every other', async () => {
    const writes: number[] = [];
    const store = memory();
    const write = store.write.bind(store);
    store.write = (position, data) => {
      writes.push(data.length);
      write(position, data);
    };
    const device = await openDevice(asynchronous(store));
    const first = new FakeCommand(atomic(0, 100), { out: new Uint8Array(51200).fill(1) });
    const second = new FakeCommand(CDB.write10(50, 100), { out: new Uint8Array(51200).fill(2) });
    await Promise.all([device.handle(first), device.handle(second)]);
    expect([first.outcome, second.outcome, writes]).toEqual(['GOOD', 'GOOD', [51200, 51200]]);
    const { data } = await run(device, CDB.read10(0, 150), { in: 76800 });
    expect([data[0], data[25599], data[25600]]).toEqual([1, 1, 2]);
  });

  test('FUA makes it durable', async () => {
    let flushes = 0;
    const device = await openDevice(Object.assign(memory(), { flush: () => flushes++ }));
    const out = new Uint8Array(512);
    await run(device, atomic(0, 1), { out });
    expect(flushes).toBe(0);
    await run(device, atomic(0, 1, 0, 0x08), { out });
    expect(flushes).toBe(1);
  });

  test('refuses a boundary, more than its limit, less data than it says', async () => {
    const store: BlockStore = Object.assign(memory(), { atomicWriteLength: 1024 });
    const device = await openDevice(store);
    const out = new Uint8Array(2048);
    expect((await run(device, atomic(0, 1, 8), { out })).sense?.field).toMatchObject({ byte: 10 });
    expect((await run(device, atomic(0, 3), { out })).sense?.field).toMatchObject({ byte: 12 });
    expect((await run(device, atomic(2048, 1), { out })).outcome).toBe('5/21/0');
    const short = await run(device, atomic(0, 2), { out: new Uint8Array(512) });
    expect(short.outcome).toBe('5/e/3');
    expect((await run(device, atomic(0, 0))).outcome).toBe('GOOD');
    const { data } = await run(device, CDB.inquiry(0xb0), { in: 64 });
    expect(Buffer.from(data).readUInt32BE(44)).toBe(2);
  });

  test('is not there where the store promises nothing; a promise of part of a block is none', async () => {
    const bare: BlockStore = Object.assign(memory(), { atomicWriteLength: 0 });
    const out = new Uint8Array(512);
    expect((await run(await openDevice(bare), atomic(0, 1), { out })).outcome).toBe('5/20/0');
    const odd: BlockStore = Object.assign(memory(), { atomicWriteLength: 100 });
    expect(() => new BlockDevice(odd, { serial: 'x' }).open()).toThrow(ArgumentError);
  });
});

describe('READ DEFECT DATA', () => {
  test('the lists asked for are there, and empty', async () => {
    const device = await openDevice(memory());
    const ten = await run(device, cdb(0x37, 0, 0x1d, [0, 4], [100, 2], 0), { in: 100 });
    expect(Buffer.from(ten.data).toString('hex')).toBe('001d0000');
    const twelve = await run(device, cdb(0xb7, 0x08, [0, 4], [100, 4], 0, 0), { in: 100 });
    expect(Buffer.from(twelve.data).toString('hex')).toBe('0008000000000000');
  });
});
