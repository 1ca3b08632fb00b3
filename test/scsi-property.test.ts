/**
 * Whatever bytes an initiator sends: an answer from the standard, never an exception, never a byte
 * beyond what the CDB and the buffer allow. Runs under a fixed seed; a failure prints its CDB.
 */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import type { CommandSpec } from '../lib/scsi/command-spec.js';
import { blockCommands } from '../lib/scsi/commands/index.js';
import { BlockDevice, decodeSense, sense } from '../lib/scsi/index.js';
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
        candidate.serviceAction === ((cdb[1] as number) & 0x1f)),
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
    if (spec.serviceAction !== undefined) cdb[1] = ((cdb[1] as number) & 0xe0) | spec.serviceAction;
    // CONTROL is zero nearly always.
    if (below(40) !== 0) cdb[cdb.length - 1] = 0;
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

const cases = fc.noShrink(fc.integer({ min: 0, max: 0xffff_ffff })).map(makeCase);

/** A share of the cases each: the sum is what one run covers. */
const SYNCHRONOUS_RUNS = 90_000;
const ASYNCHRONOUS_RUNS = 48_000;

describe('any command', () => {
  const stores: [string, () => BlockStore][] = [
    ['a full store', memory],
    ['a bare store', () => new BareStore(memory())],
    ['a store that fails', () => faults(memory(), { probability: 0.3 }, { seed: 7 })],
  ];

  test.each(stores)(
    'over %s',
    async (_, make) => {
      const store = make();
      let device = await openDevice(store, { removable: true });
      let count = 0;
      const succeeded = new Set<number>();
      fc.assert(
        fc.property(cases, ({ cdb, options }) => {
          if (++count % 100 === 0) {
            // As after a restart: an ejected medium or a write protection would stay for good.
            device = new BlockDevice(store, {
              serial: 'x',
              removable: true,
              powerOnAttention: false,
            });
            device.open();
          }
          const command = new FakeCommand(cdb, options);
          must(device.handle(command) === undefined, 'took a microtask');
          check(command);
          if (command.status === 0) succeeded.add(cdb[0] as number);
        }),
        { numRuns: SYNCHRONOUS_RUNS / stores.length, seed: 20261122 },
      );
      // The cases reach into every command.
      const possible = blockCommands.filter((spec) => spec.opcode !== 0x42 || store.unmap);
      const missed = possible.filter((spec) => !succeeded.has(spec.opcode));
      expect(missed.map((spec) => spec.name)).toEqual([]);
    },
    60_000,
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

  test.each(asyncStores)(
    'over %s, eight at a time',
    async (_, make) => {
      const device = await openDevice(make(), { removable: true });
      await fc.assert(
        fc.asyncProperty(fc.array(cases, { minLength: 8, maxLength: 8 }), async (batch) => {
          const commands = batch.map(({ cdb, options }) => new FakeCommand(cdb, options));
          await Promise.all(commands.map((command) => device.handle(command)));
          for (const command of commands) check(command);
        }),
        { numRuns: ASYNCHRONOUS_RUNS / 8 / asyncStores.length, seed: 20261122 },
      );
      // Nothing is left locked: a write to the whole disk goes through once the medium is in.
      expect(await writeEverything(device)).toBe('GOOD');
    },
    60_000,
  );
});

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
