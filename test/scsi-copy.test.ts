// SPDX-License-Identifier: Apache-2.0
/** EXTENDED COPY between the units of this process, and what RECEIVE COPY RESULTS tells of it. */
import { afterEach, describe, expect, test } from 'vitest';
import { decodeCopyRequest } from '../lib/scsi/copy/parameter-list.js';
import { type BlockDevice, SenseError } from '../lib/scsi/index.js';
import {
  type BlockStore,
  MemoryDataIn,
  MemoryDataOut,
  MemoryStore,
  readOnly,
} from '../lib/store/index.js';
import { e4, list1, list4, segment, xcopy } from './scsi-copy-lists.js';
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

const MiB = 1024 * 1024;
const context = { signal: new AbortController().signal, fua: false };
const opened: BlockDevice[] = [];
afterEach(async () => {
  for (const device of opened.splice(0)) await device.close();
});

interface Unit {
  device: BlockDevice;
  store: BlockStore;
  naa: Buffer;
}

let serial = 0;
async function unit(
  store: BlockStore,
  options: Parameters<typeof openDevice>[1] = {},
): Promise<Unit> {
  const device = await openDevice(store, {
    serial: `copy-${serial++}`,
    copyGroup: 'all',
    ...options,
  });
  opened.push(device);
  const { data } = await run(device, CDB.inquiry(0x83), { in: 255 });
  return { device, store, naa: Buffer.from(data.subarray(8, 24)) };
}

function noise(size: number, seed = 1): MemoryStore {
  const store = new MemoryStore({ size, pageSize: 4096 });
  const bytes = new Uint8Array(size);
  for (let i = 0; i < size; i++) bytes[i] = i * 7 + (i >>> 9) * 13 + seed;
  store.write(0, new MemoryDataOut(bytes));
  return store;
}

function contents(store: BlockStore, position = 0, length = store.size - position): Uint8Array {
  const bytes = new Uint8Array(length);
  store.read(position, new MemoryDataIn(bytes), context);
  return bytes;
}

const receive = (action: number, id: number, width: 1 | 4 = 1) =>
  cdb(0x84, action, [id, width], [0, 8 - width], [1024, 4], 0, 0);

async function copy(at: Unit, out: Uint8Array, action = 0): Promise<FakeCommand> {
  return run(at.device, xcopy(out, action), { out });
}

async function results(at: Unit, action: number, id: number, width: 1 | 4 = 1): Promise<string> {
  const command = await run(at.device, receive(action, id, width), { in: 1024 });
  return command.outcome === 'GOOD' ? Buffer.from(command.data).toString('hex') : command.outcome;
}

describe('a copy', () => {
  const stores: [string, (store: BlockStore) => BlockStore][] = [
    ['synchronous', (store) => store],
    ['asynchronous', asynchronous],
    ['bare', (store) => new BareStore(store)],
  ];

  test.each(stores)('moves blocks between two units; %s stores', async (_, wrap) => {
    const source = noise(8 * MiB);
    const target = noise(8 * MiB, 99);
    const before = contents(target);
    const a = await unit(wrap(source));
    const b = await unit(wrap(target));
    const out = list1(
      [e4(a.naa), e4(b.naa)],
      [
        segment({ blocks: 5000, source: 3, target: 7 }),
        segment({ blocks: 1, source: 16383, target: 16000 }),
        segment({ blocks: 0, source: 0, target: 0 }),
      ],
    );
    expect((await copy(a, out)).outcome).toBe('GOOD');
    before.set(contents(source, 3 * 512, 5000 * 512), 7 * 512);
    before.set(contents(source, 16383 * 512, 512), 16000 * 512);
    expectBytes(contents(target), before);
    expect(await results(a, 0x00, 1)).toBe(`00000008${'01'}${'0003'}${'00'}${hex4(5001 * 512)}`);
  });

  test('between different block sizes counts the blocks that DC says', async () => {
    const source = noise(MiB);
    const target = new MemoryStore({ size: MiB, blockSize: 4096 });
    const a = await unit(source);
    const b = await unit(target);
    const units = [e4(a.naa), e4(b.naa, 4096)];
    const one = segment({ blocks: 2, source: 8, target: 1, dc: true });
    expect((await copy(b, list1(units, [one]))).outcome).toBe('GOOD');
    expectBytes(contents(target, 4096, 8192), contents(source, 4096, 8192));
    // Half a block of the target would be left over.
    const bad = segment({ blocks: 4, source: 0, target: 0 });
    expect((await copy(b, list1(units, [bad]))).outcome).toBe('a/0/0');
  });

  test.each([
    ['forwards', 100, 40],
    ['backwards', 40, 100],
    ['far apart', 0, 8000],
  ])('within one unit, %s, as if all had been read first', async (_, source, target) => {
    const store = noise(8 * MiB);
    const wanted = contents(store);
    wanted.set(wanted.slice(source * 512, (source + 6000) * 512), target * 512);
    const a = await unit(store);
    const out = list1([e4(a.naa)], [segment({ to: 0, blocks: 6000, source, target })]);
    expect((await copy(a, out)).outcome).toBe('GOOD');
    expectBytes(contents(store), wanted);
  });

  test('holes stay holes', async () => {
    const source = new MemoryStore({ size: 4 * MiB, pageSize: 4096 });
    source.write(MiB, new MemoryDataOut(new Uint8Array(8192).fill(5)));
    const target = noise(4 * MiB);
    const a = await unit(source);
    const b = await unit(target);
    const out = list1([e4(a.naa), e4(b.naa)], [segment({ blocks: 8192, source: 0, target: 0 })]);
    expect((await copy(a, out)).outcome).toBe('GOOD');
    expectBytes(contents(target), contents(source));
    expect(target.allocated).toBe(8192);
  });

  test('what the target’s store can copy by itself is left to it; the rest is copied', async () => {
    const source = noise(2 * MiB);
    const target = new MemoryStore({ size: 2 * MiB });
    const asked: number[][] = [];
    const own = Object.assign(target, {
      copyFrom(from: BlockStore, sourcePosition: number, position: number, length: number) {
        expect(from).toBe(source);
        asked.push([sourcePosition, position, length]);
        const half = Math.floor(length / 1024) * 512;
        target.write(position, new MemoryDataOut(contents(source, sourcePosition, half)));
        return half;
      },
    });
    const a = await unit(source);
    const b = await unit(own);
    const out = list1([e4(a.naa), e4(b.naa)], [segment({ blocks: 3001, source: 1, target: 2 })]);
    expect((await copy(a, out)).outcome).toBe('GOOD');
    expectBytes(contents(target, 1024, 3001 * 512), contents(source, 512, 3001 * 512));
    expect(asked).toEqual([
      [512, 1024, MiB],
      [512 + MiB, 1024 + MiB, 3001 * 512 - MiB],
    ]);
  });

  test('is durable when the target has no write cache', async () => {
    let flushes = 0;
    const store = Object.assign(noise(MiB), { flush: () => flushes++ });
    const a = await unit(store);
    const out = list1([e4(a.naa)], [segment({ to: 0, blocks: 8, source: 0, target: 8 })]);
    await copy(a, out);
    expect(flushes).toBe(0);
    const control = [0, 0, 0, 0, 0x08, 0x12, ...new Array(18).fill(0)];
    await run(a.device, cdb(0x15, 0x10, 0, 0, 24, 0), { out: Uint8Array.from(control) });
    flushes = 0;
    await copy(a, out);
    expect(flushes).toBe(1);
  });

  test('by the identifier of the unit itself, FFFFh', async () => {
    const store = noise(MiB);
    const a = await unit(store);
    const out = list1(
      [],
      [segment({ from: 0xffff, to: 0xffff, blocks: 8, source: 0, target: 64 })],
    );
    expect((await copy(a, out)).outcome).toBe('GOOD');
    expectBytes(contents(store, 64 * 512, 4096), contents(store, 0, 4096));
  });
});

function hex4(value: number): string {
  return value.toString(16).padStart(8, '0');
}

describe('what cannot be copied', () => {
  test.each([
    ['a unit nobody knows', [e4(Buffer.alloc(16, 0x61))], 'a/d/2'],
    ['another designator type', 'type', 'a/d/2'],
    ['another block size', 'size', 'a/d/2'],
  ] as const)('%s is not reachable', async (_, what, outcome) => {
    const a = await unit(noise(MiB));
    const named = e4(a.naa, what === 'size' ? 4096 : 512);
    if (what === 'type') named[5] = 0x02;
    const units = typeof what === 'string' ? [named] : what.map((one) => [...one]);
    const out = list1(units, [segment({ to: 0, blocks: 1, source: 0, target: 1 })]);
    expect((await copy(a, out)).outcome).toBe(outcome);
  });

  test('a unit of another group, or of none, is not reachable; the unit itself always is', async () => {
    const a = await unit(noise(MiB));
    for (const copyGroup of ['others', undefined]) {
      const b = await unit(noise(MiB), { copyGroup });
      for (const at of [a, b]) {
        const out = list1([e4(a.naa), e4(b.naa)], [segment({ blocks: 1, source: 0, target: 1 })]);
        expect((await copy(at, out)).outcome).toBe('a/d/2');
      }
      const own = list1([e4(b.naa)], [segment({ to: 0, blocks: 1, source: 0, target: 1 })]);
      expect((await copy(b, own)).outcome).toBe('GOOD');
    }
  });

  test('a closed unit is not reachable any more', async () => {
    const a = await unit(noise(MiB));
    const b = await unit(noise(MiB));
    await b.device.close();
    const out = list1([e4(a.naa), e4(b.naa)], [segment({ blocks: 1, source: 0, target: 1 })]);
    expect((await copy(a, out)).outcome).toBe('a/d/2');
  });

  test.each([
    ['an index without descriptor', { to: 1, blocks: 1, source: 0, target: 1 }],
    ['blocks behind the source’s end', { to: 0, blocks: 2, source: 2047, target: 1 }],
    ['blocks behind the target’s end', { to: 0, blocks: 2, source: 1, target: 2047 }],
  ])('%s aborts the copy, and tells the segment', async (_, bad) => {
    const a = await unit(noise(MiB));
    const good = segment({ to: 0, blocks: 1, source: 0, target: 1 });
    const command = await copy(a, list1([e4(a.naa)], [good, segment(bad)], { id: 9 }));
    expect(command.outcome).toBe('a/0/0');
    expect(command.sense?.commandSpecific).toBe(1);
    expect(await results(a, 0x00, 9)).toBe(`00000008${'02'}${'0001'}${'00'}${hex4(512)}`);
    const details = await results(a, 0x04, 9);
    // The sense data itself behind 60 bytes; told once.
    expect(details.slice(112, 120)).toBe('02000012');
    expect(details.slice(120, 124)).toBe('7000');
    expect(await results(a, 0x04, 9)).toBe('5/24/0');
  });

  test('a write-protected target, and a store that fails', async () => {
    const a = await unit(noise(MiB));
    const b = await unit(readOnly(noise(MiB)));
    const c = await unit(
      Object.assign(noise(MiB), {
        write: () => {
          throw new Error('broken');
        },
      }),
    );
    for (const target of [b, c]) {
      const out = list1(
        [e4(a.naa), e4(target.naa)],
        [segment({ blocks: 1, source: 0, target: 1 })],
      );
      const command = await copy(a, out);
      expect(command.outcome).toBe('a/0/0');
    }
    // Nothing stays locked.
    expect((await run(c.device, CDB.read10(0, 1), { in: 512 })).outcome).toBe('GOOD');
  });

  const unitBytes = e4(Buffer.alloc(16, 0x60));
  const one = segment({ to: 0, blocks: 1, source: 0, target: 1 });
  test.each([
    ['a cut header', list1([], []).subarray(0, 15), '5/1a/0'],
    ['a cut unit descriptor', list1([unitBytes], [one]).subarray(0, 47), '5/1a/0'],
    ['a cut segment descriptor', list1([unitBytes], [one]).subarray(0, 75), '5/1a/0'],
    ['another unit descriptor type', list1([[0xe0, ...unitBytes.slice(1)]], [one]), '5/26/7'],
    ['another segment descriptor type', list1([unitBytes], [[3, ...one.slice(1)]]), '5/26/9'],
    ['17 units', list1(new Array(17).fill(unitBytes), [one]), '5/26/6'],
    ['257 segments', list1([unitBytes], new Array(257).fill(one)), '5/26/8'],
    [
      'lists beyond the limit',
      list1(new Array(17).fill(unitBytes), new Array(257).fill(one)),
      '5/1a/0',
    ],
    ['inline data', Uint8Array.from(list1([unitBytes], [one])).fill(1, 15, 16), '5/26/b'],
    ['list identifier usage 01b', list1([unitBytes], [one], { usage: 1 }), '5/26/0'],
    ['an identifier where there is none', list1([unitBytes], [one], { usage: 3 }), '5/26/0'],
    ['a tape', list1([[0xe4, 1, ...unitBytes.slice(2)]], [one]), '5/26/0'],
  ])('%s is refused', async (_, out, outcome) => {
    expect((await copy(await unit(noise(MiB)), out)).outcome).toBe(outcome);
  });

  test('no parameter list is no error', async () => {
    expect((await copy(await unit(noise(MiB)), new Uint8Array(0))).outcome).toBe('GOOD');
  });
});

describe('list identifiers of four bytes', () => {
  test('in the foreground and in the background', async () => {
    const store = asynchronous(noise(4 * MiB));
    const a = await unit(store);
    const units = [e4(a.naa)];
    const out = list4(units, [segment({ to: 0, blocks: 100, source: 0, target: 200 })]);
    expect((await copy(a, out, 1)).outcome).toBe('GOOD');
    const done = await results(a, 0x05, 0x01020304, 4);
    expect(done.slice(0, 12)).toBe('0000001c0101');
    expect(done.slice(32, 52)).toBe('000000000000c8000001');
    expect(await results(a, 0x05, 0x01020304, 4)).toBe('5/24/0');

    const immed = list4(units, [segment({ to: 0, blocks: 4000, source: 0, target: 4000 })], {
      id: 7,
      immed: true,
    });
    expect((await copy(a, immed, 1)).outcome).toBe('GOOD');
    expect((await results(a, 0x05, 7, 4)).slice(8, 12)).toBe('0110');
    // The same identifier again, while it runs.
    expect((await copy(a, immed, 1)).outcome).toBe('5/0/16');
    const abort = await run(a.device, cdb(0x83, 0x1c, [7, 4], [0, 9], 0));
    expect(abort.outcome).toBe('GOOD');
    const aborted = await results(a, 0x05, 7, 4);
    expect(aborted.slice(8, 12)).toBe('0160');
    expect((await run(a.device, cdb(0x83, 0x1c, [7, 4], [0, 9], 0))).outcome).toBe('5/24/0');
  });

  test.each([
    ['another format', [0, 2], '5/26/0'],
    ['another header descriptor length', [3, 0x10], '5/26/0'],
    ['another header descriptor', [16, 0xfe], '5/26/0'],
  ] as const)('%s is refused', async (_, [at, value], outcome) => {
    const a = await unit(noise(MiB));
    const out = list4([e4(a.naa)], [segment({ to: 0, blocks: 1, source: 0, target: 1 })]);
    out[at] = value;
    expect((await copy(a, out, 1)).outcome).toBe(outcome);
  });
});

describe('RECEIVE COPY RESULTS', () => {
  test('operating parameters are what decoding enforces', async () => {
    const a = await unit(noise(MiB));
    const data = Buffer.from((await run(a.device, receive(3, 0), { in: 1024 })).data);
    expect(data.readUInt32BE(0)).toBe(data.length - 4);
    expect([data.readUInt16BE(8), data.readUInt16BE(10), data.readUInt32BE(12)]).toEqual([
      16, 256, 7680,
    ]);
    expect([...data.subarray(36, 38), ...data.subarray(43)]).toEqual([32, 9, 2, 0x02, 0xe4]);
  });

  test('an unknown identifier, or one that was not to be kept', async () => {
    const a = await unit(noise(MiB));
    expect(await results(a, 0x00, 5)).toBe('5/24/0');
    const one = segment({ to: 0, blocks: 1, source: 0, target: 1 });
    expect((await copy(a, list1([e4(a.naa)], [one], { id: 0, usage: 3 }))).outcome).toBe('GOOD');
    expect(await results(a, 0x00, 0)).toBe('5/24/0');
  });

  test('a result is kept for a nexus as long as there is one that may have asked', async () => {
    let nexuses = new Set(['first']);
    const a = await unit(noise(MiB), { nexuses: () => ({ names: nexuses }) });
    const out = list1([e4(a.naa)], [segment({ to: 0, blocks: 1, source: 0, target: 1 })]);
    await copy(a, out);
    nexuses = new Set(['first', 'second']);
    expect(await results(a, 0x00, 1)).toMatch(/^00000008/);
    nexuses = new Set(['second']);
    expect(await results(a, 0x00, 1)).toBe('5/24/0');
  });

  test('the oldest results are forgotten first', async () => {
    const a = await unit(noise(MiB));
    for (let id = 0; id < 200; id++) {
      const one = segment({ to: 0, blocks: 1, source: 0, target: 1 });
      await copy(a, list1([e4(a.naa)], [one], { id }));
    }
    expect(await results(a, 0x00, 0)).toBe('5/24/0');
    expect(await results(a, 0x00, 199)).toMatch(/^00000008/);
  });
});

test('an aborted command ends its copy', async () => {
  const store = noise(64 * MiB);
  const read = store.read.bind(store);
  let reads = 0;
  store.read = (...args) => {
    if (++reads === 3) command.controller.abort();
    return read(...args);
  };
  const a = await unit(asynchronous(store));
  const out = list1([e4(a.naa)], [segment({ to: 0, blocks: 60000, source: 0, target: 62000 })]);
  const command = new FakeCommand(xcopy(out), { out });
  await a.device.handle(command);
  expect(command.outcome).toBe('a/0/0');
  expect((await results(a, 0x00, 1)).slice(8, 10)).toBe('02');
});

test('closing a device ends its copies', async () => {
  const a = await unit(asynchronous(noise(64 * MiB)));
  const out = list4([e4(a.naa)], [segment({ to: 0, blocks: 60000, source: 0, target: 62000 })], {
    immed: true,
  });
  expect((await copy(a, out, 1)).outcome).toBe('GOOD');
  await a.device.close();
  expect((await run(a.device, CDB.testUnitReady())).outcome).toBe('2/4/1');
});

test('decoding tells what encoding said', () => {
  const decoded = decodeCopyRequest(
    list4(
      [e4(Buffer.alloc(8, 3), 4096)],
      [segment({ from: 5, to: 6, blocks: 7, source: 8, target: 9, dc: true })],
    ),
    4,
  );
  expect(decoded).toEqual({
    listId: 0x01020304,
    anonymous: false,
    immediate: false,
    units: [{ type: 3, designator: new Uint8Array(8).fill(3), blockSize: 4096 }],
    segments: [
      {
        source: 5,
        destination: 6,
        blocks: 7,
        countsDestination: true,
        sourceLba: 8,
        destinationLba: 9,
      },
    ],
  });
  expect(() => decodeCopyRequest(new Uint8Array(3), 1)).toThrow(SenseError);
});
