// SPDX-License-Identifier: Apache-2.0
/**
 * READ (6), (10), (12), (16) and PRE-FETCH (SBC-4). The read path runs for most commands of a busy
 * disk: with a synchronous store it makes one small object and takes no microtask.
 */
import type { MaybePromise } from '../../device/data.js';
import type { ScsiCommand } from '../../device/handler.js';
import { chain } from '../../store/maybe.js';
import { MemoryDataIn } from '../../store/memory-data.js';
import { readU16, readU32, readU64 } from '../bytes.js';
import { bits, type CommandSpec, rangeFields, refused } from '../command-spec.js';
import { Counter, type LogicalUnit, StoreRequest } from '../logical-unit.js';
import { sense } from '../sense.js';

const FUA = 0x08;

/** @param options byte 1 of the CDB: DPO is a hint that needs nothing, FUA is not. */
export function read(
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
  (counters[Counter.READS] as number)++;
  (counters[Counter.BLOCKS_READ] as number) += blocks;
  const request = new StoreRequest(command);
  if ((options & FUA) !== 0 && unit.volatile) {
    // SBC-4, caches: data newer than the medium's must be on the medium before it is read.
    return chain(unit.flush(request), () => transfer(unit, command, lba, length, request));
  }
  return transfer(unit, command, lba, length, request);
}

function transfer(
  unit: LogicalUnit,
  command: ScsiCommand,
  lba: number,
  length: number,
  request: StoreRequest,
): MaybePromise<unknown> {
  const position = lba * unit.blockSize;
  const { dataLength } = command;
  if (dataLength < length) return readPart(unit, command, position, dataLength, request);
  const data = command.dataIn;
  return unit.store.read(position, data.length === length ? data : data.slice(0, length), request);
}

/** The initiator's buffer is shorter than the CDB says: it gets as much as fits. */
function readPart(
  unit: LogicalUnit,
  command: ScsiCommand,
  position: number,
  length: number,
  request: StoreRequest,
): MaybePromise<unknown> {
  const tail = length % unit.blockSize;
  const whole = length - tail;
  const done =
    whole === 0 ? undefined : unit.store.read(position, command.dataIn.slice(0, whole), request);
  if (tail === 0) return done;
  return chain(done, () => {
    const block = new MemoryDataIn(new Uint8Array(unit.blockSize));
    return chain(unit.store.read(position + whole, block, request), () =>
      command.dataIn.copyFrom(block.bytes.subarray(0, tail), whole),
    );
  });
}

const READ_FIELDS = [refused('RDPROTECT', 1, 7, 5), bits('DPO', 1, 4), bits('FUA', 1, 3)] as const;

export const readCommands: readonly CommandSpec[] = [
  {
    name: 'READ (6)',
    standard: 'SBC-2',
    opcode: 0x08,
    length: 6,
    fields: rangeFields(6, []),
    medium: 'read',
    run(unit, command) {
      const { cdb } = command;
      // A TRANSFER LENGTH of zero means 256 blocks in the 6-byte commands only.
      return read(unit, command, readU32(cdb, 0) & 0x1f_ffff, cdb[4] || 256, 0);
    },
  },
  {
    name: 'READ (10)',
    standard: 'SBC-4',
    opcode: 0x28,
    length: 10,
    fields: rangeFields(10, READ_FIELDS),
    medium: 'read',
    plain: true,
    run(unit, command) {
      const { cdb } = command;
      return read(unit, command, readU32(cdb, 2), readU16(cdb, 7), cdb[1] as number);
    },
  },
  {
    name: 'READ (12)',
    standard: 'SBC-4',
    opcode: 0xa8,
    length: 12,
    fields: rangeFields(12, READ_FIELDS),
    medium: 'read',
    run(unit, command) {
      const { cdb } = command;
      return read(unit, command, readU32(cdb, 2), readU32(cdb, 6), cdb[1] as number);
    },
  },
  {
    name: 'READ (16)',
    standard: 'SBC-4',
    opcode: 0x88,
    length: 16,
    fields: rangeFields(16, READ_FIELDS),
    medium: 'read',
    plain: true,
    run(unit, command) {
      const { cdb } = command;
      return read(unit, command, readU64(cdb, 2), readU32(cdb, 10), cdb[1] as number);
    },
  },
  // Prefetching is the store's affair; GOOD says that not all blocks may be cached.
  {
    name: 'PRE-FETCH (10)',
    standard: 'SBC-4',
    opcode: 0x34,
    length: 10,
    fields: rangeFields(10, [bits('IMMED', 1, 1)], 'PREFETCH LENGTH'),
    medium: 'read',
    run(unit, { cdb }) {
      unit.checkRange(readU32(cdb, 2), readU16(cdb, 7));
    },
  },
  {
    name: 'PRE-FETCH (16)',
    standard: 'SBC-4',
    opcode: 0x90,
    length: 16,
    fields: rangeFields(16, [bits('IMMED', 1, 1)], 'PREFETCH LENGTH'),
    medium: 'read',
    run(unit, { cdb }) {
      unit.checkRange(readU64(cdb, 2), readU32(cdb, 10));
    },
  },
];
