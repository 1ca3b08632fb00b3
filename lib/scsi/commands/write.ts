// SPDX-License-Identifier: Apache-2.0
/**
 * WRITE (6), (10), (12), (16) (SBC-4). As lean as reading: with a synchronous store one small
 * object and no microtask. Every write stays apart from atomic operations on the same blocks.
 */
import type { DataOut, MaybePromise } from '../../device/data.js';
import type { ScsiCommand } from '../../device/handler.js';
import { chain, isPromise, settled } from '../../store/maybe.js';
import { MemoryDataIn, MemoryDataOut } from '../../store/memory-data.js';
import { readU16, readU32, readU64 } from '../bytes.js';
import { bits, bytes, type CommandSpec, rangeFields, refused } from '../command-spec.js';
import { Counter, type LogicalUnit, StoreRequest } from '../logical-unit.js';
import { sense } from '../sense.js';

const FUA = 0x08;

/**
 * Writes the Data-Out Buffer, or as much of it as the CDB asks for.
 * @param options byte 1 of the CDB: DPO is a hint that needs nothing, FUA is not.
 */
export function write(
  unit: LogicalUnit,
  command: ScsiCommand,
  lba: number,
  blocks: number,
  options: number,
): MaybePromise<unknown> {
  if (lba + blocks > unit.blocks) throw sense.lbaOutOfRange();
  const length = blocks * unit.blockSize;
  unit.checkTransfer(length);
  if (length === 0) return;
  const { counters } = unit;
  (counters[Counter.WRITES] as number)++;
  (counters[Counter.BLOCKS_WRITTEN] as number) += blocks;
  if (unit.modePages.thresholdsEnabled) unit.space.changed();
  const durable = unit.volatile && ((options & FUA) !== 0 || unit.writeThrough);
  const position = lba * unit.blockSize;
  const { dataLength } = command;
  if (dataLength < length) return writePart(unit, command, position, dataLength, durable);
  const data = command.dataOut;
  return writeData(
    unit,
    command,
    position,
    data.length === length ? data : data.slice(0, length),
    durable,
  );
}

function writeData(
  unit: LogicalUnit,
  command: ScsiCommand,
  position: number,
  data: DataOut,
  durable: boolean,
): MaybePromise<unknown> {
  const { store, lock } = unit;
  const fua = durable && store.supportsFua === true;
  const request = new StoreRequest(command, fua);
  let done: MaybePromise<unknown>;
  if (lock.contended) {
    done = chain(lock.acquire(position, position + data.length, false), (held) =>
      settled(
        () => store.write(position, data, request),
        () => lock.release(held),
      ),
    );
  } else {
    done = store.write(position, data, request);
    if (isPromise(done)) {
      const held = lock.note(position, position + data.length);
      done = Promise.resolve(done).finally(() => lock.release(held));
    }
  }
  return durable && !fua ? chain(done, () => unit.flush(request)) : done;
}

/** The initiator sent less than the CDB says: what came is written, the rest stays. */
function writePart(
  unit: LogicalUnit,
  command: ScsiCommand,
  position: number,
  length: number,
  durable: boolean,
): MaybePromise<unknown> {
  const tail = length % unit.blockSize;
  const whole = length - tail;
  const done =
    whole === 0
      ? undefined
      : writeData(unit, command, position, command.dataOut.slice(0, whole), durable);
  if (tail === 0) return done;
  const request = new StoreRequest(command);
  const at = position + whole;
  const block = new MemoryDataIn(new Uint8Array(unit.blockSize));
  const mixed = () =>
    chain(unit.store.read(at, block, request), () => {
      command.dataOut.slice(whole, length).copyTo(block.bytes);
      return unit.store.write(at, new MemoryDataOut(block.bytes), request);
    });
  return chain(done, () =>
    chain(unit.apart(at, unit.blockSize, true, mixed), () => unit.makeDurable(request, durable)),
  );
}

/**
 * WRITE ATOMIC (16): all of it or nothing, for other commands by the lock, and through a loss of power by the
 * store's promise. So the buffer must be whole, and the store gets it as one write.
 */
function writeAtomic(unit: LogicalUnit, command: ScsiCommand): MaybePromise<unknown> {
  const { cdb } = command;
  const lba = readU64(cdb, 2);
  const blocks = readU16(cdb, 12);
  if (readU16(cdb, 10) !== 0) throw sense.invalidFieldInCdb({ byte: 10 });
  unit.checkRange(lba, blocks);
  if (blocks > unit.limits.atomicBlocks) throw sense.invalidFieldInCdb({ byte: 12 });
  const length = blocks * unit.blockSize;
  unit.checkTransfer(length);
  if (length === 0) return;
  if (command.dataLength < length) throw sense.invalidFieldInInformationUnit();
  const request = new StoreRequest(command);
  const position = lba * unit.blockSize;
  const written = unit.apart(position, length, true, () =>
    unit.store.write(position, command.dataOut.slice(0, length), request),
  );
  return chain(written, () => unit.makeDurable(request, ((cdb[1] as number) & FUA) !== 0));
}

const WRITE_FIELDS = [refused('WRPROTECT', 1, 7, 5), bits('DPO', 1, 4), bits('FUA', 1, 3)] as const;

export const writeCommands: readonly CommandSpec[] = [
  {
    name: 'WRITE (6)',
    standard: 'SBC-2',
    opcode: 0x0a,
    length: 6,
    fields: rangeFields(6, []),
    medium: 'write',
    run(unit, command) {
      const { cdb } = command;
      // A TRANSFER LENGTH of zero means 256 blocks in the 6-byte commands only.
      return write(unit, command, readU32(cdb, 0) & 0x1f_ffff, cdb[4] || 256, 0);
    },
  },
  {
    name: 'WRITE (10)',
    standard: 'SBC-4',
    opcode: 0x2a,
    length: 10,
    fields: rangeFields(10, WRITE_FIELDS),
    medium: 'write',
    plain: true,
    run(unit, command) {
      const { cdb } = command;
      return write(unit, command, readU32(cdb, 2), readU16(cdb, 7), cdb[1] as number);
    },
  },
  {
    name: 'WRITE (12)',
    standard: 'SBC-4',
    opcode: 0xaa,
    length: 12,
    fields: rangeFields(12, WRITE_FIELDS),
    medium: 'write',
    run(unit, command) {
      const { cdb } = command;
      return write(unit, command, readU32(cdb, 2), readU32(cdb, 6), cdb[1] as number);
    },
  },
  {
    name: 'WRITE (16)',
    standard: 'SBC-4',
    opcode: 0x8a,
    length: 16,
    fields: rangeFields(16, WRITE_FIELDS),
    medium: 'write',
    plain: true,
    run(unit, command) {
      const { cdb } = command;
      return write(unit, command, readU64(cdb, 2), readU32(cdb, 10), cdb[1] as number);
    },
  },
  {
    name: 'WRITE ATOMIC (16)',
    standard: 'SBC-4',
    opcode: 0x9c,
    length: 16,
    fields: [
      ...WRITE_FIELDS,
      bytes('LOGICAL BLOCK ADDRESS', 2, 8),
      bytes('ATOMIC BOUNDARY', 10, 2),
      bytes('TRANSFER LENGTH', 12, 2),
      bits('GROUP NUMBER', 14, 5, 0),
    ],
    medium: 'write',
    available: (unit) => unit.limits.atomicBlocks > 0,
    needs: 'atomicWriteLength',
    run: writeAtomic,
  },
];
