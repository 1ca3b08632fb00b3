// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import type { MaybePromise } from '../lib/device/data.js';
import {
  type BlockStore,
  faults,
  MemoryStore,
  StoreMiddleware,
  type StoreOperation,
} from '../lib/store/index.js';
import {
  asynchronous,
  BareStore,
  CDB,
  cdb,
  expectBytes,
  FakeCommand,
  openDevice,
  run,
} from './scsi-fake-command.js';

const BLOCKS = 4096;
const memory = () => new MemoryStore({ size: BLOCKS * 512 });
const bytes = (blocks: number, value: number) => new Uint8Array(blocks * 512).fill(value);
const join = (...parts: Uint8Array[]) => Uint8Array.from(Buffer.concat(parts));
type Device = Awaited<ReturnType<typeof openDevice>>;

/** Has its own compareAndWrite, as a store over a server would. */
class NativeCompare extends MemoryStore {
  calls = 0;

  compareAndWrite(position: number, expected: Uint8Array, replacement: Uint8Array): number {
    this.calls++;
    const now = new FakeCommand([], { in: expected.length });
    this.read(position, now.dataIn);
    const difference = now.data.findIndex((byte, i) => byte !== expected[i]);
    if (difference >= 0) return difference;
    this.write(position, new FakeCommand([], { out: replacement }).dataOut);
    return -1;
  }
}

const native = () => new NativeCompare({ size: BLOCKS * 512 });

const stores: [string, () => BlockStore][] = [
  ['synchronous', memory],
  ['asynchronous', () => asynchronous(memory())],
  ['bare', () => asynchronous(new BareStore(memory()))],
  ['native', native],
  ['native, asynchronous', () => asynchronous(native())],
];

async function content(device: Device, lba: number, blocks: number): Promise<Uint8Array> {
  return (await run(device, CDB.read16(lba, blocks), { in: blocks * 512 })).data;
}

describe('COMPARE AND WRITE', () => {
  test.each(stores)('writes when all is equal (%s store)', async (_, make) => {
    const device = await openDevice(make());
    for (const blocks of [1, 3, 255]) {
      await run(device, CDB.write16(9, blocks), { out: bytes(blocks, 1) });
      const command = await run(device, CDB.compareAndWrite(9, blocks), {
        out: join(bytes(blocks, 1), bytes(blocks, 2)),
      });
      expect(command.outcome).toBe('GOOD');
      expectBytes(await content(device, 9, blocks), bytes(blocks, 2));
    }
  });

  test.each(stores)(
    'tells the offset of a miscompare and writes nothing (%s store)',
    async (_, make) => {
      const device = await openDevice(make());
      await run(device, CDB.write16(9, 3), { out: bytes(3, 1) });
      for (const offset of [0, 511, 512, 1200, 1535]) {
        const expected = bytes(3, 1);
        expected[offset] = 0x77;
        const command = await run(device, CDB.compareAndWrite(9, 3), {
          out: join(expected, bytes(3, 2)),
        });
        expect(command.outcome).toBe('e/1d/0');
        expect(command.sense?.information).toBe(offset);
        expectBytes(await content(device, 9, 3), bytes(3, 1));
      }
    },
  );

  test('native compareAndWrite is used where it is', async () => {
    const store = native();
    const device = await openDevice(store);
    await run(device, CDB.compareAndWrite(0, 1), { out: bytes(2, 0) });
    expect(store.calls).toBe(1);
  });

  test('both halves must be there', async () => {
    const device = await openDevice(memory());
    for (const blocks of [0, 1, 3, 5, 8]) {
      const command = await run(device, CDB.compareAndWrite(0, 2), { out: bytes(blocks, 0) });
      expect(command.outcome).toBe('5/24/0');
    }
  });

  test('no blocks, blocks past the end, protection', async () => {
    const device = await openDevice(memory());
    expect((await run(device, CDB.compareAndWrite(0, 0))).outcome).toBe('GOOD');
    const wrapped = await run(device, CDB.compareAndWrite(0, 256 & 0xff), { out: bytes(512, 0) });
    expect(wrapped.sense?.field).toEqual({ in: 'cdb', byte: 13, bit: undefined });
    const out = bytes(4, 0);
    expect((await run(device, CDB.compareAndWrite(BLOCKS - 1, 2), { out })).outcome).toBe('5/21/0');
    expect((await run(device, CDB.compareAndWrite(0, 2, 0x20), { out })).outcome).toBe('5/24/0');
  });

  test.each([
    ['emulated', () => asynchronous(memory())],
    ['emulated, bare', () => asynchronous(new BareStore(memory()))],
  ])('is atomic: concurrent increments lose none (%s)', async (_, make) => {
    const device = await openDevice(make());
    const counter = (value: number) => {
      const block = new Uint8Array(512);
      new DataView(block.buffer).setUint32(0, value);
      return block;
    };
    let retries = 0;
    await Promise.all(
      Array.from({ length: 16 }, async () => {
        for (let done = 0; done < 10; ) {
          const now = new DataView((await content(device, 5, 1)).slice().buffer).getUint32(0);
          const command = await run(device, CDB.compareAndWrite(5, 1), {
            out: join(counter(now), counter(now + 1)),
          });
          if (command.outcome === 'GOOD') done++;
          else retries++;
        }
      }),
    );
    expectBytes(await content(device, 5, 1), counter(160));
    expect(retries).toBeGreaterThan(0);
  });

  /** A store whose writes wait for the test. */
  function gated() {
    const gates: { name: string; open: () => void }[] = [];
    class Gated extends StoreMiddleware {
      protected override intercept<T>(
        { name }: StoreOperation,
        run: () => MaybePromise<T>,
      ): MaybePromise<T> {
        return new Promise<void>((open) => gates.push({ name, open })).then(run);
      }
    }
    const open = async (name: string) => {
      const at = gates.findIndex((gate) => gate.name === name);
      expect(at, `a ${name} is waiting`).toBeGreaterThanOrEqual(0);
      gates.splice(at, 1)[0]?.open();
      await new Promise((resolve) => setImmediate(resolve));
    };
    return { store: new Gated(memory()), gates, open };
  }

  test('a write under way to the same blocks is waited for, one elsewhere is not', async () => {
    const { store, gates, open } = gated();
    const device = await openDevice(store);
    const write = new FakeCommand(CDB.write10(0, 2), { out: bytes(2, 5) });
    const elsewhere = new FakeCommand(CDB.write10(100, 1), { out: bytes(1, 5) });
    const compare = new FakeCommand(CDB.compareAndWrite(1, 1), {
      out: join(bytes(1, 5), bytes(1, 6)),
    });
    for (const command of [write, elsewhere, compare]) void device.handle(command);
    expect(gates.map((gate) => gate.name)).toEqual(['write', 'write']);
    await open('write');
    expect(write.outcome).toBe('GOOD');
    await open('read');
    await open('write');
    await open('write');
    expect(elsewhere.outcome).toBe('GOOD');
    expect(compare.outcome).toBe('GOOD');
  });

  test('writes to its blocks wait for it, others do not; also when it fails', async () => {
    const { store, gates, open } = gated();
    const device = await openDevice(store);
    const compare = new FakeCommand(CDB.compareAndWrite(1, 1), {
      out: join(bytes(1, 9), bytes(1, 6)),
    });
    const same = new FakeCommand(CDB.write10(0, 3), { out: bytes(3, 5) });
    const zeros = new FakeCommand(CDB.writeSame16(1, 1, 1));
    const elsewhere = new FakeCommand(CDB.write10(100, 1), { out: bytes(1, 5) });
    for (const command of [compare, same, zeros, elsewhere]) void device.handle(command);
    expect(gates.map((gate) => gate.name)).toEqual(['read', 'write']);
    await open('write');
    expect(elsewhere.outcome).toBe('GOOD');
    await open('read');
    expect(compare.outcome).toBe('e/1d/0');
    await open('write');
    await open('writeZeroes');
    expect(same.outcome).toBe('GOOD');
    expect(zeros.outcome).toBe('GOOD');
  });

  test('a failing store fails it and frees the blocks', async () => {
    const store = asynchronous(faults(memory(), { operations: ['read'], times: 1 }));
    const device = await openDevice(store);
    const out = bytes(2, 0);
    expect((await run(device, CDB.compareAndWrite(0, 1), { out })).outcome).toBe('3/c/0');
    expect((await run(device, CDB.compareAndWrite(0, 1), { out })).outcome).toBe('GOOD');
    expect((await run(device, CDB.write10(0, 1), { out: bytes(1, 1) })).outcome).toBe('GOOD');
  });

  test('FUA flushes after the write, not after a miscompare', async () => {
    let flushes = 0;
    const device = await openDevice(Object.assign(memory(), { flush: () => void flushes++ }));
    await run(device, CDB.compareAndWrite(0, 1, 0x08), { out: join(bytes(1, 0), bytes(1, 1)) });
    expect(flushes).toBe(1);
    await run(device, CDB.compareAndWrite(0, 1, 0x08), { out: join(bytes(1, 0), bytes(1, 1)) });
    expect(flushes).toBe(1);
  });
});

type Form = (lba: number, blocks: number, options?: number) => number[];
const verifies: [string, Form][] = [
  ['(10)', (lba, n, options = 0) => cdb(0x2f, options, [lba, 4], 0, [n, 2], 0)],
  ['(12)', (lba, n, options = 0) => cdb(0xaf, options, [lba, 4], [n, 4], 0, 0)],
  ['(16)', (lba, n, options = 0) => cdb(0x8f, options, [lba, 8], [n, 4], 0, 0)],
];
const BYTCHK = 2;

describe.each(verifies)('VERIFY %s', (_name, verify) => {
  test.each(stores)('compares with the data sent (%s store)', async (_, make) => {
    const device = await openDevice(make());
    const data = bytes(600, 3);
    await run(device, CDB.write16(1, 600), { out: data });
    expect((await run(device, verify(1, 600, BYTCHK), { out: data })).outcome).toBe('GOOD');
    data[599 * 512 + 17] = 4;
    const command = await run(device, verify(1, 600, BYTCHK), { out: data });
    expect(command.outcome).toBe('e/1d/0');
    expect(command.sense?.information).toBe(599 * 512 + 17);
  });

  test('compares every block with one (BYTCHK 11b)', async () => {
    const device = await openDevice(memory());
    await run(device, CDB.write16(1, 4), { out: bytes(4, 3) });
    expect((await run(device, verify(1, 4, 6), { out: bytes(1, 3) })).outcome).toBe('GOOD');
    const command = await run(device, verify(1, 5, 6), { out: bytes(1, 3) });
    expect(command.outcome).toBe('e/1d/0');
    expect((await run(device, verify(1, 4, 6), { out: new Uint8Array(511) })).outcome).toBe(
      '5/e/3',
    );
  });

  test('without BYTCHK reads, and ignores data', async () => {
    const device = await openDevice(memory());
    expect((await run(device, verify(0, BLOCKS))).outcome).toBe('GOOD');
    expect((await run(device, verify(0, 2), { out: bytes(2, 9) })).outcome).toBe('GOOD');
    const broken = faults(memory(), { range: [1000 * 512, 1001 * 512] });
    const damaged = await openDevice(asynchronous(broken));
    expect((await run(damaged, verify(0, 512))).outcome).toBe('GOOD');
    expect((await run(damaged, verify(0, BLOCKS))).outcome).toBe('3/11/0');
  });

  test('compares what was sent when that is less', async () => {
    const device = await openDevice(memory());
    const command = await run(device, verify(0, 2, BYTCHK), { out: new Uint8Array(700) });
    expect(command.outcome).toBe('GOOD');
    const wrong = new Uint8Array(700);
    wrong[699] = 1;
    const miscompare = await run(device, verify(0, 2, BYTCHK), { out: wrong });
    expect(miscompare.sense?.information).toBe(699);
  });

  test('BYTCHK 10b, protection and the end of the disk', async () => {
    const device = await openDevice(memory());
    expect((await run(device, verify(0, 1, 4))).sense?.field).toEqual({
      in: 'cdb',
      byte: 1,
      bit: 2,
    });
    expect((await run(device, verify(0, 1, 0x20))).outcome).toBe('5/24/0');
    expect((await run(device, verify(0, 1, 0x10))).outcome).toBe('GOOD');
    expect((await run(device, verify(BLOCKS, 1))).outcome).toBe('5/21/0');
    expect((await run(device, verify(BLOCKS + 1, 0))).outcome).toBe('5/21/0');
  });
});

test('VERIFY of a large range lets others in, and ends when it is aborted', async () => {
  const device = await openDevice({ size: 2 ** 42, read() {}, write() {} });
  const command = new FakeCommand(cdb(0x8f, 0, [0, 8], [0xffff_ffff, 4], 0, 0));
  const pending = device.handle(command);
  await new Promise((resolve) => setTimeout(resolve, 5));
  expect(command.outcome).toBe('pending');
  command.controller.abort();
  await pending;
  expect(command.outcome).toBe('b/0/0');
});

const writeAndVerifies: [string, Form][] = [
  ['(10)', (lba, n, options = 0) => cdb(0x2e, options, [lba, 4], 0, [n, 2], 0)],
  ['(12)', (lba, n, options = 0) => cdb(0xae, options, [lba, 4], [n, 4], 0, 0)],
  ['(16)', (lba, n, options = 0) => cdb(0x8e, options, [lba, 8], [n, 4], 0, 0)],
];

describe.each(writeAndVerifies)('WRITE AND VERIFY %s', (_name, writeAndVerify) => {
  test.each(stores)('writes (%s store)', async (_, make) => {
    const device = await openDevice(make());
    for (const check of [0, BYTCHK]) {
      const out = bytes(600, check + 1);
      expect((await run(device, writeAndVerify(7, 600, check), { out })).outcome).toBe('GOOD');
      expectBytes(await content(device, 7, 600), out);
    }
  });

  test('notices a store that does not keep what it was given', async () => {
    const forgetful: BlockStore = { size: 1 << 20, read: (_p, data) => data.fill(0), write() {} };
    const device = await openDevice(forgetful);
    const out = bytes(1, 1);
    expect((await run(device, writeAndVerify(0, 1, BYTCHK), { out })).outcome).toBe('e/1d/0');
  });

  test('is durable', async () => {
    const log: string[] = [];
    const device = await openDevice({
      size: 1 << 20,
      read: () => void log.push('read'),
      write: () => void log.push('write'),
      flush: async () => void log.push('flush'),
    });
    await run(device, writeAndVerify(0, 1), { out: bytes(1, 1) });
    expect(log).toEqual(['write', 'flush', 'read']);
  });

  test('a shorter buffer is written up to its whole blocks, or refused', async () => {
    const device = await openDevice(memory());
    expect((await run(device, writeAndVerify(0, 3), { out: bytes(2, 1) })).outcome).toBe('GOOD');
    expectBytes(await content(device, 0, 3), join(bytes(2, 1), bytes(1, 0)));
    const command = await run(device, writeAndVerify(0, 2), { out: new Uint8Array(700) });
    expect(command.outcome).toBe('5/e/3');
  });

  test('BYTCHK 10b and 11b, protection, the end of the disk', async () => {
    const device = await openDevice(memory());
    const out = bytes(2, 1);
    for (const options of [4, 6, 0x20]) {
      expect((await run(device, writeAndVerify(0, 2, options), { out })).outcome).toBe('5/24/0');
    }
    expect((await run(device, writeAndVerify(BLOCKS - 1, 2), { out })).outcome).toBe('5/21/0');
  });
});

describe('ORWRITE (16)', () => {
  const orWrite = (lba: number, n: number, options = 0) =>
    cdb(0x8b, options, [lba, 8], [n, 4], 0, 0);

  test.each(stores)('ors the data into the medium (%s store)', async (_, make) => {
    const device = await openDevice(make());
    await run(device, CDB.write16(1, 600), { out: bytes(600, 0x0f) });
    const out = bytes(600, 0x35);
    expect((await run(device, orWrite(1, 600), { out })).outcome).toBe('GOOD');
    expectBytes(await content(device, 0, 602), join(bytes(1, 0), bytes(600, 0x3f), bytes(1, 0)));
  });

  test('concurrent ORWRITEs lose no bit', async () => {
    const device = await openDevice(asynchronous(memory()));
    await Promise.all(
      Array.from({ length: 8 }, (_, bit) =>
        run(device, orWrite(3, 1), { out: bytes(1, 1 << bit) }),
      ),
    );
    expectBytes(await content(device, 3, 1), bytes(1, 0xff));
  });

  test('protection, the end of the disk, nothing', async () => {
    const device = await openDevice(memory());
    const out = bytes(2, 1);
    expect((await run(device, orWrite(0, 2, 0x20), { out })).outcome).toBe('5/24/0');
    expect((await run(device, orWrite(BLOCKS - 1, 2), { out })).outcome).toBe('5/21/0');
    expect((await run(device, orWrite(0, 0))).outcome).toBe('GOOD');
  });
});
