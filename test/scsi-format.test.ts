// SPDX-License-Identifier: Apache-2.0
/** FORMAT UNIT and SANITIZE: what the medium holds afterwards, what is told meanwhile, what failure does. */
import { describe, expect, test } from 'vitest';
import type { MaybePromise } from '../lib/device/data.js';
import type { BlockDevice, StateStorage } from '../lib/scsi/index.js';
import {
  type BlockStore,
  MemoryDataIn,
  MemoryDataOut,
  MemoryStore,
  readOnly,
  StoreMiddleware,
  type StoreOperation,
} from '../lib/store/index.js';
import {
  BareStore,
  CDB,
  cdb,
  expectBytes,
  FakeCommand,
  openDevice,
  run,
} from './scsi-fake-command.js';

const SIZE = 1 << 20;
const context = { signal: new AbortController().signal, fua: false };

function filled(size = SIZE, pageSize = 4096): MemoryStore {
  const store = new MemoryStore({ size, pageSize });
  store.write(0, new MemoryDataOut(new Uint8Array(size).fill(0xa5)));
  return store;
}

function contents(store: BlockStore): Uint8Array {
  const bytes = new Uint8Array(store.size);
  store.read(0, new MemoryDataIn(bytes), context);
  return bytes;
}

const format = (options = 0) => cdb(0x04, options, 0, 0, 0, 0);
const FMTDATA = 0x10;
const LONGLIST = 0x20;
const SANITIZE = { overwrite: 1, blockErase: 2, cryptoErase: 3, exitFailure: 0x1f } as const;
const sanitize = (action: keyof typeof SANITIZE, length = 0, options = 0) =>
  cdb(0x48, options | SANITIZE[action], 0, 0, 0, 0, 0, [length, 2], 0);
const IMMED = 0x80;
const AUSE = 0x20;

/** An OVERWRITE parameter list. */
function overwrite(count: number, pattern: readonly number[], options = 0): Uint8Array {
  return Uint8Array.from([
    options | count,
    0,
    pattern.length >> 8,
    pattern.length & 255,
    ...pattern,
  ]);
}

/** Holds every write until it is let go. */
class GatedStore extends StoreMiddleware {
  readonly waiting: (() => void)[] = [];
  failure: Error | undefined;

  protected override intercept<T>(
    operation: StoreOperation,
    act: () => MaybePromise<T>,
  ): MaybePromise<T> {
    if (operation.name === 'read') return act();
    return new Promise<void>((resolve) => this.waiting.push(resolve)).then(() => {
      if (this.failure !== undefined) throw this.failure;
      return act();
    });
  }

  /** Lets what waits now go on; answers how many there were. */
  async release(): Promise<number> {
    const released = this.waiting.splice(0);
    for (const go of released) go();
    for (let i = 0; i < 20; i++) await new Promise((resolve) => setImmediate(resolve));
    return released.length;
  }

  async releaseAll(): Promise<void> {
    while ((await this.release()) > 0);
  }
}

async function requestSense(device: BlockDevice): Promise<string> {
  const { data } = await run(device, cdb(0x03, 0, 0, 0, 252, 0), { in: 252 });
  const progress = (data[15] as number) & 0x80 ? Buffer.from(data).readUInt16BE(16) : undefined;
  return `${data[2]}/${data[12]?.toString(16)}/${data[13]?.toString(16)} ${progress}`;
}

describe('FORMAT UNIT', () => {
  test('makes every block read as zeros; unmapped where the store can', async () => {
    const thin = filled();
    expect((await run(await openDevice(thin), format())).outcome).toBe('GOOD');
    expect(thin.allocated).toBe(0);
    const inner = filled();
    const thick = new BareStore(inner);
    expect((await run(await openDevice(thick), format())).outcome).toBe('GOOD');
    expectBytes(contents(inner), new Uint8Array(SIZE));
    expect(inner.allocated).toBe(SIZE);
  });

  test('an initialization pattern fills every block from its start', async () => {
    const store = filled();
    const device = await openDevice(store);
    // IP in the header; pattern descriptor: type 01h, three bytes.
    const out = Uint8Array.from([0, 0x08, 0, 0, 0, 1, 0, 3, 1, 2, 3]);
    expect((await run(device, format(FMTDATA), { out })).outcome).toBe('GOOD');
    const block = Uint8Array.from({ length: 512 }, (_, i) => (i % 3) + 1);
    expectBytes(contents(store), Buffer.alloc(SIZE, block));
    const long = Uint8Array.from([0, 0x08, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    expect((await run(device, format(FMTDATA | LONGLIST), { out: long })).outcome).toBe('GOOD');
    expectBytes(contents(store), new Uint8Array(SIZE));
  });

  test.each([
    ['a list shorter than its header', FMTDATA, [0, 0], '5/1a/0'],
    ['protection information', FMTDATA, [1, 0, 0, 0], '5/26/0'],
    ['a defect list', FMTDATA, [0, 0, 0, 8], '5/26/0'],
    ['a defect list in a long list', FMTDATA | LONGLIST, [0, 0, 0, 0, 0, 0, 0, 8], '5/26/0'],
    ['protection intervals', FMTDATA | LONGLIST, [0, 0, 0, 1, 0, 0, 0, 0], '5/26/0'],
    ['an unknown pattern type', FMTDATA, [0, 8, 0, 0, 0, 2, 0, 0], '5/26/0'],
    ['a pattern of no length', FMTDATA, [0, 8, 0, 0, 0, 1, 0, 0], '5/26/0'],
    ['a pattern longer than a block', FMTDATA, [0, 8, 0, 0, 0, 1, 2, 1], '5/26/0'],
    ['a pattern that is cut', FMTDATA, [0, 8, 0, 0, 0, 1, 0, 2, 7], '5/1a/0'],
    ['FMTPINFO', 0x80, [], '5/24/0'],
  ])('refuses %s and changes nothing', async (_, options, list, outcome) => {
    const store = filled();
    const command = await run(await openDevice(store), format(options), {
      out: Uint8Array.from(list),
    });
    expect(command.outcome).toBe(outcome);
    expectBytes(contents(store), new Uint8Array(SIZE).fill(0xa5));
  });

  test('a write-protected disk is not formatted', async () => {
    const store = filled();
    expect((await run(await openDevice(readOnly(store)), format())).outcome).toBe('7/27/0');
    expect(store.allocated).toBe(SIZE);
  });

  test('IMMED answers at once; commands are refused with progress until it has ended', async () => {
    const inner = filled(96 << 20, 65536);
    const store = new GatedStore(inner);
    const device = await openDevice(store);
    const out = Uint8Array.from([0, 0x02, 0, 0]);
    expect((await run(device, format(FMTDATA), { out })).outcome).toBe('GOOD');
    const refused = await run(device, CDB.read10(0, 1), { in: 512 });
    expect(refused.outcome).toBe('2/4/4');
    expect(refused.sense?.progress).toBe(0);
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('2/4/4');
    expect((await run(device, format())).outcome).toBe('2/4/4');
    expect((await run(device, CDB.inquiry(), { in: 96 })).outcome).toBe('GOOD');
    expect(await requestSense(device)).toBe('2/4/4 0');
    await store.release();
    expect(await requestSense(device)).toBe(`2/4/4 ${Math.floor(65536 / 3)}`);
    await store.releaseAll();
    expect(await requestSense(device)).toBe('0/0/0 undefined');
    expect((await run(device, CDB.read10(0, 1), { in: 512 })).data[0]).toBe(0);
    expect(inner.allocated).toBe(0);
  });

  test('waits for the writes under way', async () => {
    const inner = filled();
    const store = new GatedStore(inner);
    const device = await openDevice(store);
    const write = new FakeCommand(CDB.write10(0, 1), { out: new Uint8Array(512).fill(1) });
    const written = device.handle(write);
    const command = new FakeCommand(format());
    const formatted = device.handle(command);
    expect(store.waiting).toHaveLength(1);
    await store.releaseAll();
    await written;
    await formatted;
    expect([write.outcome, command.outcome]).toEqual(['GOOD', 'GOOD']);
    expect(inner.allocated).toBe(0);
  });

  test('a failure leaves a medium that must be formatted again', async () => {
    const store = new GatedStore(filled());
    const device = await openDevice(store);
    store.failure = Object.assign(new Error('disk'), { code: 'EIO' });
    const command = new FakeCommand(format());
    const done = device.handle(command);
    await store.releaseAll();
    await done;
    expect(command.outcome).toBe('3/c/0');
    expect((await run(device, CDB.read10(0, 1), { in: 512 })).outcome).toBe('3/31/0');
    expect(await requestSense(device)).toBe('3/31/0 undefined');
    expect((await run(device, CDB.modeSense6(0x3f), { in: 255 })).outcome).toBe('GOOD');
    store.failure = undefined;
    const again = new FakeCommand(format());
    const mended = device.handle(again);
    await store.releaseAll();
    await mended;
    expect(again.outcome).toBe('GOOD');
    expect((await run(device, CDB.read10(0, 1), { in: 512 })).outcome).toBe('GOOD');
  });
});

describe('SANITIZE', () => {
  test('OVERWRITE: the pattern of the last pass, flushed after each', async () => {
    const store = filled();
    const seen: number[] = [];
    const flushed: number[] = [];
    const device = await openDevice(
      Object.assign(store, { flush: () => flushed.push(contents(store)[0] as number) }),
    );
    const writeSame = store.writeSame.bind(store);
    store.writeSame = (position, length, block) => {
      seen.push(block[0] as number);
      writeSame(position, length, block);
    };
    const out = overwrite(3, [0x0f, 0xf0], 0x80);
    expect((await run(device, sanitize('overwrite', out.length), { out })).outcome).toBe('GOOD');
    // INVERT: every other pass, so that the last one is as the pattern says.
    expect(seen).toEqual([0x0f, 0xf0, 0x0f]);
    expect(flushed).toEqual([0x0f, 0xf0, 0x0f]);
    expectBytes(contents(store), Buffer.alloc(SIZE, Uint8Array.of(0x0f, 0xf0)));
  });

  test.each([
    ['no parameter list', 0, new Uint8Array(0), '5/24/0'],
    ['the header alone', 4, overwrite(1, []), '5/24/0'],
    ['more than a block', 517, overwrite(1, new Array(513).fill(1)), '5/24/0'],
    ['a list cut short', 12, overwrite(1, [1, 2]), '5/e/3'],
    ['no pass', 8, overwrite(0, [1, 2, 3, 4]), '5/26/0'],
    ['a vendor’s test', 8, overwrite(1, [1, 2, 3, 4], 0x20), '5/26/0'],
    ['another pattern length', 9, overwrite(1, [1, 2, 3, 4, 5]).fill(4, 3, 4), '5/26/0'],
  ])('OVERWRITE with %s is refused', async (_, length, out, outcome) => {
    const store = filled();
    const command = await run(await openDevice(store), sanitize('overwrite', length), { out });
    expect(command.outcome).toBe(outcome);
    expect(contents(store)[0]).toBe(0xa5);
  });

  test('BLOCK ERASE unmaps everything, and is there only where the store unmaps', async () => {
    const store = filled();
    const device = await openDevice(store);
    expect((await run(device, sanitize('blockErase'))).outcome).toBe('GOOD');
    expect(store.allocated).toBe(0);
    expect((await run(device, sanitize('blockErase', 8), { out: new Uint8Array(8) })).outcome).toBe(
      '5/24/0',
    );
    const thick = await openDevice(new BareStore(filled()));
    expect((await run(thick, sanitize('blockErase'))).outcome).toBe('5/24/0');
  });

  test('CRYPTOGRAPHIC ERASE is the store’s; the VPD page tells that reads work afterwards', async () => {
    const store = filled();
    let erased = 0;
    const device = await openDevice(Object.assign(store, { cryptoErase: () => erased++ }));
    expect((await run(device, sanitize('cryptoErase'))).outcome).toBe('GOOD');
    expect(erased).toBe(1);
    const { data } = await run(device, CDB.inquiry(0xb1), { in: 64 });
    expect(data[7]).toBe(0x50);
    expect((await run(await openDevice(filled()), sanitize('cryptoErase'))).outcome).toBe('5/24/0');
  });

  test('reserved bits and bytes are refused', async () => {
    const device = await openDevice(filled());
    for (const [byte, value] of [[1, 0x40], ...[2, 3, 4, 5, 6].map((at) => [at, at])] as [
      number,
      number,
    ][]) {
      const bytes = sanitize('blockErase');
      (bytes[byte] as number) |= value;
      const command = await run(device, bytes);
      expect(command.sense?.field).toMatchObject({ in: 'cdb', byte });
    }
  });

  test('outlives its command and resets; close ends it', async () => {
    const inner = filled();
    const store = new GatedStore(inner);
    const device = await openDevice(store);
    const command = new FakeCommand(sanitize('blockErase'));
    const done = device.handle(command);
    command.controller.abort();
    await done;
    expect(command.outcome).toBe('b/0/0');
    device.taskManagement({ type: 'lun-reset', commands: [] });
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('2/4/1b');
    await store.releaseAll();
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('GOOD');
    expect(inner.allocated).toBe(0);

    expect((await run(device, sanitize('blockErase', 0, IMMED))).outcome).toBe('GOOD');
    const closed = device.close();
    await store.releaseAll();
    await closed;
  });

  test('a failure is left by another SANITIZE, or by EXIT FAILURE MODE if AUSE allowed it', async () => {
    for (const [options, exit] of [
      [0, '5/24/0'],
      [AUSE, 'GOOD'],
    ] as const) {
      const store = new GatedStore(filled());
      const device = await openDevice(store);
      store.failure = new Error('no');
      expect((await run(device, sanitize('blockErase', 0, IMMED | options))).outcome).toBe('GOOD');
      await store.releaseAll();
      store.failure = undefined;
      expect((await run(device, CDB.write10(0, 1), { out: new Uint8Array(512) })).outcome).toBe(
        '3/31/3',
      );
      expect((await run(device, sanitize('exitFailure'))).outcome).toBe(exit);
      if (exit === 'GOOD') continue;
      const again = new FakeCommand(sanitize('blockErase'));
      const done = device.handle(again);
      await store.releaseAll();
      await done;
      expect(again.outcome).toBe('GOOD');
      expect((await run(device, sanitize('exitFailure'))).outcome).toBe('GOOD');
    }
  });

  test('the restricted way of failing is not left by the unrestricted one, nor by a format', async () => {
    const store = new GatedStore(filled());
    const device = await openDevice(store);
    store.failure = new Error('no');
    await run(device, sanitize('blockErase', 0, IMMED));
    await store.releaseAll();
    expect((await run(device, sanitize('blockErase', 0, IMMED | AUSE))).outcome).toBe('5/24/0');
    expect((await run(device, format())).outcome).toBe('3/31/3');
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('3/31/3');
  });
});

describe('a restart', () => {
  /** Notes what is asked of it, beside the writes of the disk. */
  class Storage implements StateStorage {
    bytes: Uint8Array | undefined;
    failure: Error | undefined;
    readonly saved: string[] = [];
    load = async () => this.bytes;
    save = async (bytes: Uint8Array) => {
      if (this.failure !== undefined) throw this.failure;
      this.saved.push(Buffer.from(bytes).toString('hex'));
      this.bytes = bytes.slice();
    };
  }

  test.each([
    ['format', cdb(0x04, 0x10, 0, 0, 0, 0), Uint8Array.of(0, 2, 0, 0), '3/31/0', '5/24/0'],
    ['sanitize', sanitize('blockErase', 0, IMMED), undefined, '3/31/3', '5/24/0'],
    [
      'sanitize that may be left',
      sanitize('blockErase', 0, IMMED | AUSE),
      undefined,
      '3/31/3',
      'GOOD',
    ],
  ])('finds a %s that was cut short failed', async (name, bytes, out, failed, exit) => {
    const operationStorage = new Storage();
    const store = new GatedStore(filled());
    const device = await openDevice(store, { operationStorage });
    expect((await run(device, bytes, out && { out })).outcome).toBe('GOOD');
    expect(operationStorage.saved).toHaveLength(1);
    // The process ends here: nothing closes the device.
    const again = await openDevice(filled(), { operationStorage });
    expect((await run(again, CDB.read10(0, 1), { in: 512 })).outcome).toBe(failed);
    const left = await run(again, sanitize('exitFailure'));
    if (name === 'format') {
      expect((await run(again, CDB.testUnitReady())).outcome).toBe(failed);
      expect((await run(again, format())).outcome).toBe('GOOD');
    } else {
      expect(left.outcome).toBe(exit);
      if (exit !== 'GOOD') expect((await run(again, sanitize('blockErase'))).outcome).toBe('GOOD');
    }
    expect((await run(again, CDB.read10(0, 1), { in: 512 })).outcome).toBe('GOOD');
    const third = await openDevice(filled(), { operationStorage });
    expect((await run(third, CDB.read10(0, 1), { in: 512 })).outcome).toBe('GOOD');
  });

  test('finds one that failed failed; one that ended is forgotten', async () => {
    const operationStorage = new Storage();
    const store = new GatedStore(filled());
    const device = await openDevice(store, { operationStorage });
    store.failure = new Error('no');
    await run(device, sanitize('blockErase', 0, IMMED));
    const closed = device.close();
    await store.releaseAll();
    await closed;
    const again = await openDevice(filled(), { operationStorage });
    expect((await run(again, CDB.testUnitReady())).outcome).toBe('3/31/3');
    expect((await run(again, sanitize('blockErase'))).outcome).toBe('GOOD');
    expect(operationStorage.saved.map((hex) => hex.length)).toEqual([4, 4, 0]);
  });

  test('nothing begins that could not be noted', async () => {
    const operationStorage = new Storage();
    const store = filled();
    const device = await openDevice(store, { operationStorage });
    operationStorage.failure = new Error('full');
    const before = contents(store);
    expect((await run(device, sanitize('blockErase', 0, IMMED))).outcome).toBe('4/44/0');
    expectBytes(contents(store), before);
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('GOOD');
  });

  test('a damaged note is refused', async () => {
    const operationStorage = new Storage();
    for (const broken of [[1], [3, 0], [1, 2], [1, 0, 0]]) {
      operationStorage.bytes = Uint8Array.from(broken);
      await expect(openDevice(filled(), { operationStorage })).rejects.toThrow(
        /state of the medium/,
      );
    }
  });
});
