// SPDX-License-Identifier: Apache-2.0
/**
 * Whatever bytes an initiator sends: an answer from the standard, never an exception, never a byte
 * beyond what the CDB and the buffer allow. A million cases, the same in every run; a failure prints its CDB.
 */
import { describe, expect, test } from 'vitest';
import { type CommandSpec, CommandTable } from '../lib/scsi/command-spec.js';
import { blockCommands } from '../lib/scsi/commands/index.js';
import { BlockDevice, decodeSense, sense } from '../lib/scsi/index.js';
import { ModePages } from '../lib/scsi/mode-pages.js';
import { randomNumbers } from '../lib/store/faults.js';
import { type BlockStore, faults, MemoryStore } from '../lib/store/index.js';
import {
  asynchronous,
  BareStore,
  FakeCommand,
  type FakeCommandOptions,
  openDevice,
  STALE,
} from './scsi-fake-command.js';

const SIZE = 64 * 512;
const memory = () => new MemoryStore({ size: SIZE, pageSize: 4096 });

/** Every code this device may answer with, by `key/asc/ascq`. */
const KNOWN_CODES = new Set(
  [
    sense.invalidOperationCode(),
    sense.invalidFieldInCdb(),
    sense.invalidFieldInParameterList(),
    sense.parameterListLengthError(),
    sense.invalidFieldInInformationUnit(),
    sense.lbaOutOfRange(),
    sense.savingParametersNotSupported(),
    sense.mediumRemovalPrevented(),
    sense.writeProtected(),
    sense.softwareWriteProtected(),
    sense.spaceAllocationFailedWriteProtect(),
    sense.unrecoveredReadError(),
    sense.writeError(),
    sense.hardwareError(),
    sense.miscompare(0),
    sense.mediumNotPresent(),
    sense.capacityDataHasChanged(),
    sense.formatInProgress(),
    sense.sanitizeInProgress(),
    sense.mediumFormatCorrupted(),
    sense.sanitizeCommandFailed(),
    sense.softThresholdReached(),
    sense.tooManyCscdDescriptors(),
    sense.unsupportedCscdDescriptor(),
    sense.tooManySegmentDescriptors(),
    sense.unsupportedSegmentDescriptor(),
    sense.inlineDataLengthExceeded(),
    sense.copyTargetNotReachable(),
    sense.copyAborted(0),
    sense.abortedCommand(),
  ].map(({ key, asc, ascq }) => `${key}/${asc}/${ascq}`),
);

/** Bytes of a whole-byte field of a CDB, as a number. */
function field(spec: CommandSpec, name: string, cdb: Uint8Array): number | undefined {
  const found = spec.fields.find((candidate) => candidate.name === name);
  if (found === undefined || cdb.length < spec.length) return undefined;
  let value = 0;
  for (let i = 0; i < found.bytes; i++) {
    value = value * 256 + ((cdb[found.byte + i] as number) & (i === 0 ? found.mask : 0xff));
  }
  return value;
}

/** Most bytes of Data-In that a CDB allows. */
function allowance(cdb: Uint8Array): number {
  const spec = blockCommands.find(
    (candidate) =>
      candidate.opcode === cdb[0] &&
      (candidate.serviceAction === undefined ||
        candidate.serviceAction ===
          (cdb[0] === 0x7f
            ? ((cdb[8] as number) << 8) | (cdb[9] as number)
            : (cdb[1] as number) & 0x1f)),
  );
  if (spec === undefined) return 0;
  const allocation = field(spec, 'ALLOCATION LENGTH', cdb);
  if (allocation !== undefined) return allocation;
  if (spec.name === 'READ CAPACITY (10)') return 8;
  if (!spec.name.startsWith('READ (')) return 0;
  const blocks = field(spec, 'TRANSFER LENGTH', cdb) ?? 0;
  return 512 * (spec.name === 'READ (6)' && blocks === 0 ? 256 : blocks);
}

const STALE_BYTES = new Uint8Array(40_000).fill(STALE);

/** Plain comparisons, since `expect` would take most of the time of a case. */
function must(holds: boolean, what: string): void {
  if (!holds) throw new Error(what);
}

function check(command: FakeCommand): void {
  must(command.completions === 1, `completed ${command.completions} times`);
  const limit = Math.min(allowance(command.cdb), command.dataLength);
  must(command.written <= limit, `${command.written} bytes, ${limit} are allowed`);
  const beyond = command.dataIn.bytes.subarray(command.written);
  must(Buffer.compare(beyond, STALE_BYTES.subarray(0, beyond.length)) === 0, 'a stray byte');
  if (command.status !== 0x02) {
    must(command.status === 0x00 || command.status === 0x08, `status ${command.status}`);
    must(command.senseBytes === undefined, 'sense data without CHECK CONDITION');
    return;
  }
  const bytes = command.senseBytes as Uint8Array;
  must(bytes.length <= 96, `${bytes.length} bytes of sense data`);
  const decoded = decodeSense(bytes);
  if (decoded === undefined) throw new Error('sense data of no format');
  const code = `${decoded.key}/${decoded.asc}/${decoded.ascq}`;
  must(KNOWN_CODES.has(code), `unknown code ${code}`);
  const pointed = decoded.field;
  must(pointed?.in !== 'cdb' || pointed.byte <= command.cdb.length, 'a pointer out of the CDB');
}

/**
 * A case from one number, since drawing each byte from fast-check would take most of the time. Small
 * bytes are likelier than large ones: they reach further into a command.
 */
function makeCase(seed: number): { cdb: Uint8Array; options: FakeCommandOptions } {
  const random = randomNumbers(seed);
  const below = (limit: number) => Math.floor(random() * limit);
  const byte = () => {
    const kind = below(11);
    return kind < 6 ? 0 : below(kind < 9 ? 70 : 256);
  };
  const bytes = (length: number) => Uint8Array.from({ length }, byte);

  let cdb: Uint8Array;
  if (below(10) === 0) {
    cdb = Uint8Array.from({ length: below(40) }, () => below(256));
  } else {
    const spec = blockCommands[below(blockCommands.length)] as CommandSpec;
    cdb = bytes(spec.length);
    // Addresses and lengths are mostly ones that such a small disk has.
    for (const field of spec.fields) {
      if (below(4) !== 0) cdb.fill(0, field.byte, field.byte + field.bytes - 1);
    }
    cdb[0] = spec.opcode;
    if (spec.opcode === 0x7f) cdb.set([spec.length - 8, 0, spec.serviceAction as number], 7);
    else if (spec.serviceAction !== undefined) {
      cdb[1] = ((cdb[1] as number) & 0xe0) | spec.serviceAction;
    }
    // CONTROL is zero nearly always.
    if (below(40) !== 0) cdb[spec.opcode === 0x7f ? 1 : cdb.length - 1] = 0;
    if (below(40) === 0) cdb = cdb.subarray(0, below(spec.length));
  }
  switch (below(8)) {
    case 0:
    case 1:
      return { cdb, options: { out: bytes(below(80)) } };
    case 2:
      return { cdb, options: { out: Uint8Array.from({ length: below(80) }, () => below(256)) } };
    case 3:
    case 4:
      return { cdb, options: { out: new Uint8Array(below(5) * 512).fill(byte()) } };
    case 5:
      return { cdb, options: { in: below(20) === 0 ? 40_000 : 2048 } };
    default:
      return { cdb, options: { in: below(600) } };
  }
}

/** Cases of all tests of this file together: a million commands. */
const RUNS = 1_000_000;
/** Commands to synchronous stores; the rest go to asynchronous ones. */
const SYNCHRONOUS_SHARE = 0.88;

/** Seeds, the same in every run: what fails once fails again. */
function seedOf(test: number, index: number): number {
  return (Math.imul(index + 1, 0x9e37_79b1) ^ Math.imul(test + 1, 0x85eb_ca6b)) >>> 0;
}

/** Adds to a failure what it takes to repeat it. */
function explain(error: unknown, seed: number, command: FakeCommand): Error {
  const cdb = Buffer.from(command.cdb).toString('hex');
  return new Error(`case ${seed}, CDB ${cdb}, ${command.dataLength} bytes`, { cause: error });
}

describe('any command', () => {
  const stores: [string, () => BlockStore][] = [
    ['a full store', memory],
    ['a bare store', () => new BareStore(memory())],
    ['a store that fails', () => faults(memory(), { probability: 0.3 }, { seed: 7 })],
  ];

  test.each(stores.map((entry, index) => [...entry, index] as const))(
    'over %s',
    (_, make, index) => {
      const store = make();
      let device = restarted(store);
      const succeeded = new Set<number>();
      const runs = (RUNS * SYNCHRONOUS_SHARE) / stores.length;
      for (let i = 0; i < runs; i++) {
        // An ejected medium, a write protection or a failed format would stay for good.
        if (i % 100 === 0) device = restarted(store, device);
        const seed = seedOf(index, i);
        const { cdb, options } = makeCase(seed);
        const command = new FakeCommand(cdb, options);
        try {
          must(device.handle(command) === undefined, 'took a microtask');
          check(command);
        } catch (error) {
          throw explain(error, seed, command);
        }
        if (command.status === 0) succeeded.add(cdb[0] as number);
      }
      // The cases reach into every command.
      const table = new CommandTable(blockCommands);
      const missing = store.unmap === undefined ? [0x42, 0x9c] : [];
      const missed = [...table.entries()].filter(
        ({ spec }) => !succeeded.has(spec.opcode) && !missing.includes(spec.opcode),
      );
      expect(missed.map(({ spec }) => spec.name)).toEqual([]);
    },
    600_000,
  );

  const odd: unknown[] = [undefined, null, 0, 'text', Symbol('odd'), {}, new Error('odd')];
  const asyncStores: [string, () => BlockStore][] = [
    ['an asynchronous store', () => asynchronous(memory())],
    ['an asynchronous bare store', () => asynchronous(new BareStore(memory()))],
    [
      'a store that rejects with anything',
      () => {
        let i = 0;
        const error = () => odd[i++ % odd.length];
        return asynchronous(faults(memory(), { probability: 0.3, error }, { seed: 9 }));
      },
    ],
  ];

  test.each(asyncStores.map((entry, index) => [...entry, index] as const))(
    'over %s, eight at a time',
    async (_, make, index) => {
      const store = make();
      let device = await openDevice(store, OPTIONS);
      const runs = (RUNS * (1 - SYNCHRONOUS_SHARE)) / asyncStores.length;
      for (let i = 0; i < runs; i += 8) {
        if (i % 400 === 0) {
          await device.close();
          device = await openDevice(store, OPTIONS);
        }
        const batch = Array.from({ length: 8 }, (_unused, k) => {
          const seed = seedOf(stores.length + index, i + k);
          const { cdb, options } = makeCase(seed);
          return { seed, command: new FakeCommand(cdb, options) };
        });
        await Promise.all(batch.map(({ command }) => device.handle(command)));
        for (const { seed, command } of batch) {
          try {
            check(command);
          } catch (error) {
            throw explain(error, seed, command);
          }
        }
      }
      // Nothing is left locked: a write to the whole disk goes through once the medium is in.
      await device.close();
      device = await openDevice(store, OPTIONS);
      expect(await writeEverything(device)).toBe('GOOD');
    },
    600_000,
  );
});

/** The CDB that says `values` in the fields of `spec`: what the decoder takes apart, put together. */
function encode(spec: CommandSpec, values: Readonly<Record<string, number | bigint>>): Uint8Array {
  const cdb = new Uint8Array(spec.length);
  cdb[0] = spec.opcode;
  if (spec.opcode === 0x7f) cdb.set([spec.length - 8, 0, spec.serviceAction as number], 7);
  else if (spec.serviceAction !== undefined) cdb[1] = spec.serviceAction;
  for (const { name, byte, bytes, mask } of spec.fields) {
    let rest = BigInt(values[name] ?? 0);
    for (let i = bytes - 1; i > 0; i--) {
      cdb[byte + i] = Number(rest & 0xffn);
      rest >>= 8n;
    }
    // Of the first byte a field may have only some bits.
    (cdb[byte] as number) |= (Number(rest) * (mask & -mask)) & mask;
  }
  return cdb;
}

describe('decoding is the inverse of encoding', () => {
  const moving = blockCommands.filter(({ name }) => /^(READ|WRITE) \(\d+\)$/.test(name));

  test('a READ or WRITE of any form asks the store for what its CDB says', async () => {
    expect(moving).toHaveLength(10);
    const asked: string[] = [];
    // Larger than any address, and without contents.
    const store: BlockStore = {
      size: 2 ** 52,
      read: (position, data) => void asked.push(`read ${position} ${data.length}`),
      write: (position, data) => void asked.push(`write ${position} ${data.length}`),
    };
    const device = restarted(store);
    const random = randomNumbers(4711);
    const below = (limit: number) => Math.floor(random() * limit);
    for (let i = 0; i < 20_000; i++) {
      const spec = moving[i % moving.length] as CommandSpec;
      const address = spec.fields.find(({ name }) => name === 'LOGICAL BLOCK ADDRESS');
      const bits = Math.min(address?.mask === 0x1f ? 21 : 8 * (address?.bytes ?? 0), 42);
      const lba = below(2 ** below(bits + 1));
      const blocks = 1 + below(8);
      const length = 512 * blocks;
      const reads = spec.name.startsWith('READ');
      const cdb = encode(spec, {
        'LOGICAL BLOCK ADDRESS': lba,
        'TRANSFER LENGTH': blocks,
        'GROUP NUMBER': below(64),
        DPO: below(2),
      });
      const command = new FakeCommand(
        cdb,
        reads ? { in: length } : { out: new Uint8Array(length) },
      );
      device.handle(command);
      must(command.outcome === 'GOOD', `${spec.name} ${lba}: ${command.outcome}`);
      const wanted = `${reads ? 'read' : 'write'} ${512 * lba} ${length}`;
      must(asked.pop() === wanted && asked.length === 0, `${spec.name}: not ${wanted}`);
    }
  });

  test('REPORT SUPPORTED OPERATION CODES names every bit that encoding can set', () => {
    for (const entry of new CommandTable(blockCommands).entries()) {
      const { spec, usage } = entry;
      const all = spec.fields.filter(({ refused }) => refused !== true);
      const ones = encode(
        spec,
        Object.fromEntries(all.map(({ name, bytes }) => [name, 256n ** BigInt(bytes) - 1n])),
      );
      expect([spec.name, ...ones]).toEqual([spec.name, ...usage]);
    }
  });

  test('saved mode pages come back as they were', () => {
    const facts = { writeCache: true, thresholds: true, savable: true };
    const random = randomNumbers(815);
    for (let i = 0; i < 2000; i++) {
      const pages = new ModePages(facts);
      for (const { current, changeable } of pages.pages) {
        for (const [at, mask] of changeable.entries()) {
          const value = Math.floor(random() * 256);
          current[at] = ((current[at] as number) & ~mask) | (value & mask);
        }
      }
      const restored = new ModePages(facts);
      restored.load(pages.encode());
      must(Buffer.compare(pages.encode(), restored.encode()) === 0, `pages ${i}`);
    }
  });
});

/** With everything there is to be had. */
const OPTIONS = { serial: 'x', removable: true, powerOnAttention: false, longCommands: true };

function restarted(store: BlockStore, before?: BlockDevice): BlockDevice {
  before?.close();
  const device = new BlockDevice(store, OPTIONS);
  device.open();
  return device;
}

async function writeEverything(device: BlockDevice): Promise<string> {
  const load = [0x1b, 0, 0, 0, 3, 0];
  const unprotect = [0x15, 0x10, 0, 0, 16, 0];
  const control = [0, 0, 0, 0, 0x0a, 0x0a, 0, 0x10, 0, 0x40, 0, 0, 0, 0, 0, 0];
  const attempt = async (cdb: number[], out: Uint8Array) => {
    let command: FakeCommand;
    let tries = 0;
    do {
      command = new FakeCommand(cdb, { out });
      await device.handle(command);
    } while (command.outcome !== 'GOOD' && ++tries < 50);
    return command.outcome;
  };
  await attempt(load, new Uint8Array(0));
  await attempt(unprotect, Uint8Array.from(control));
  return attempt([0x2a, 0, 0, 0, 0, 0, 0, 0, 64, 0], new Uint8Array(SIZE));
}
