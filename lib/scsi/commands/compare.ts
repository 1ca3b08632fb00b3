// SPDX-License-Identifier: Apache-2.0
/**
 * Commands that compare or combine data with the medium: COMPARE AND WRITE, VERIFY, WRITE AND
 * VERIFY, ORWRITE (SBC-4). What must be atomic holds the range alone.
 */
import type { DataOut, MaybePromise } from '../../device/data.js';
import type { ScsiCommand } from '../../device/handler.js';
import { compare, SCRATCH_BYTES } from '../../store/emulate.js';
import { chain, eachPiece } from '../../store/maybe.js';
import { MemoryDataIn, MemoryDataOut } from '../../store/memory-data.js';
import { readU16, readU32, readU64 } from '../bytes.js';
import {
  bits,
  bytes,
  type CdbField,
  type CommandSpec,
  rangeFields,
  refused,
} from '../command-spec.js';
import { type LogicalUnit, StoreRequest } from '../logical-unit.js';
import { sense } from '../sense.js';
import { parameterList } from './respond.js';

const FUA = 0x08;

/** A walk over a large range lets other commands in after this many bytes. */
const BREATHER_BYTES = 16 * 1024 * 1024;

function failOnMiscompare(offset: number): void {
  if (offset >= 0) throw sense.miscompare(offset);
}

/** Compares, and only when all is equal writes; nobody's write comes in between. */
function compareAndWrite(unit: LogicalUnit, command: ScsiCommand): MaybePromise<unknown> {
  const { cdb } = command;
  const { store } = unit;
  const lba = readU64(cdb, 2);
  const blocks = cdb[13] as number;
  if (blocks > unit.limits.compareAndWriteBlocks) throw sense.invalidFieldInCdb({ byte: 13 });
  unit.checkRange(lba, blocks);
  const length = blocks * unit.blockSize;
  // Both halves must be there in full: neither can be cut. A larger buffer means another number of
  // blocks than the field can hold, 256 turned into 0 for one.
  if (command.dataLength !== 2 * length) throw sense.invalidFieldInCdb({ byte: 13 });
  if (length === 0) return;
  const position = lba * unit.blockSize;
  const request = new StoreRequest(command);
  const data = command.dataOut;
  const native = store.compareAndWrite !== undefined;
  const done = unit.apart(position, length, !native, () =>
    native
      ? chain(
          (store.compareAndWrite as NonNullable<typeof store.compareAndWrite>)(
            position,
            data.slice(0, length).toBytes(),
            data.slice(length).toBytes(),
            request,
          ),
          failOnMiscompare,
        )
      : chain(compare(store, position, data.slice(0, length), request), (offset) => {
          failOnMiscompare(offset);
          return store.write(position, data.slice(length), request) as MaybePromise<void>;
        }),
  );
  return chain(done, () => unit.makeDurable(request, ((cdb[1] as number) & FUA) !== 0));
}

/** Reads a range only to see that it can be read. */
function readThrough(
  unit: LogicalUnit,
  command: ScsiCommand,
  position: number,
  length: number,
): MaybePromise<unknown> {
  const request = new StoreRequest(command);
  const scratch = new MemoryDataIn(new Uint8Array(Math.min(length, SCRATCH_BYTES)));
  return eachPiece(length, SCRATCH_BYTES, (offset, piece) => {
    const window = piece === scratch.length ? scratch : scratch.slice(0, piece);
    const step = () => chain(unit.store.read(position + offset, window, request), () => true);
    if (offset === 0 || offset % BREATHER_BYTES !== 0) return step();
    return new Promise((resolve) => setImmediate(resolve)).then(() => {
      if (command.signal.aborted) throw sense.abortedCommand();
      return step();
    });
  });
}

/** @param byteCheck BYTCHK: 0 read only, 1 compare all, 3 compare each block with the one sent. */
export function verify(
  unit: LogicalUnit,
  command: ScsiCommand,
  lba: number,
  blocks: number,
): MaybePromise<unknown> {
  const optionsAt = command.cdb[0] === 0x7f ? 10 : 1;
  const byteCheck = ((command.cdb[optionsAt] as number) >>> 1) & 0x03;
  if (byteCheck === 2) throw sense.invalidFieldInCdb({ byte: optionsAt, bit: 2 });
  unit.checkRange(lba, blocks);
  const position = lba * unit.blockSize;
  const length = blocks * unit.blockSize;
  if (length === 0) return;
  if (byteCheck === 0) return readThrough(unit, command, position, length);
  const request = new StoreRequest(command);
  if (byteCheck === 1) {
    unit.checkTransfer(length);
    const data = command.dataOut;
    const expected = data.length > length ? data.slice(0, length) : data;
    return chain(compare(unit.store, position, expected, request), failOnMiscompare);
  }
  if (command.dataLength < unit.blockSize) throw sense.invalidFieldInInformationUnit();
  const block = new MemoryDataOut(parameterList(command, unit.blockSize));
  return eachPiece(length, unit.blockSize, (offset) =>
    chain(compare(unit.store, position + offset, block, request), (difference) => {
      failOnMiscompare(difference);
      return true;
    }),
  );
}

/** What was written is on the medium, and reads back. */
export function writeAndVerify(
  unit: LogicalUnit,
  command: ScsiCommand,
  lba: number,
  blocks: number,
): MaybePromise<unknown> {
  const optionsAt = command.cdb[0] === 0x7f ? 10 : 1;
  const byteCheck = ((command.cdb[optionsAt] as number) >>> 1) & 0x03;
  if (byteCheck > 1) throw sense.invalidFieldInCdb({ byte: optionsAt, bit: 2 });
  const length = unit.dataOutLength(command, lba, blocks);
  if (length === 0) return;
  const position = lba * unit.blockSize;
  const request = new StoreRequest(command);
  const data: DataOut = command.dataOut.slice(0, length);
  return unit.apart(position, length, true, () =>
    chain(unit.store.write(position, data, request), () =>
      chain(unit.makeDurable(request, true), () =>
        byteCheck === 0
          ? readThrough(unit, command, position, length)
          : chain(compare(unit.store, position, data, request), failOnMiscompare),
      ),
    ),
  );
}

/** Medium OR data, piece by piece. */
function orWrite(unit: LogicalUnit, command: ScsiCommand): MaybePromise<unknown> {
  const { cdb } = command;
  const lba = readU64(cdb, 2);
  const length = unit.dataOutLength(command, lba, readU32(cdb, 10));
  if (length === 0) return;
  const position = lba * unit.blockSize;
  const request = new StoreRequest(command);
  const data = command.dataOut;
  const size = Math.min(length, SCRATCH_BYTES);
  const medium = new Uint8Array(size);
  const other = new Uint8Array(size);
  // Four bytes at a time: a block is always a multiple of that.
  const mediumWords = new Uint32Array(medium.buffer);
  const otherWords = new Uint32Array(other.buffer);
  const combine = () =>
    eachPiece(length, SCRATCH_BYTES, (offset, piece) => {
      const window = piece === size ? medium : medium.subarray(0, piece);
      return chain(unit.store.read(position + offset, new MemoryDataIn(window), request), () => {
        data.slice(offset, offset + piece).copyTo(other);
        for (let i = 0; i < piece / 4; i++) {
          (mediumWords[i] as number) |= otherWords[i] as number;
        }
        return chain(
          unit.store.write(position + offset, new MemoryDataOut(window), request),
          () => true,
        );
      });
    });
  return chain(unit.apart(position, length, true, combine), () =>
    unit.makeDurable(request, ((cdb[1] as number) & FUA) !== 0),
  );
}

type Action = (
  unit: LogicalUnit,
  command: ScsiCommand,
  lba: number,
  blocks: number,
) => MaybePromise<unknown>;

/** The (10), (12) and (16) forms of a command: the same fields in three layouts. */
function threeForms(
  name: string,
  opcodes: readonly [ten: number, twelve: number, sixteen: number],
  lengthName: string,
  options: readonly CdbField[],
  medium: 'read' | 'write',
  action: Action,
): CommandSpec[] {
  return [
    {
      name: `${name} (10)`,
      standard: 'SBC-4',
      opcode: opcodes[0],
      length: 10,
      fields: rangeFields(10, options, lengthName),
      medium,
      run: (unit, command) =>
        action(unit, command, readU32(command.cdb, 2), readU16(command.cdb, 7)),
    },
    {
      name: `${name} (12)`,
      standard: 'SBC-4',
      opcode: opcodes[1],
      length: 12,
      fields: rangeFields(12, options, lengthName),
      medium,
      run: (unit, command) =>
        action(unit, command, readU32(command.cdb, 2), readU32(command.cdb, 6)),
    },
    {
      name: `${name} (16)`,
      standard: 'SBC-4',
      opcode: opcodes[2],
      length: 16,
      fields: rangeFields(16, options, lengthName),
      medium,
      run: (unit, command) =>
        action(unit, command, readU64(command.cdb, 2), readU32(command.cdb, 10)),
    },
  ];
}

export const compareCommands: readonly CommandSpec[] = [
  {
    name: 'COMPARE AND WRITE',
    standard: 'SBC-4',
    opcode: 0x89,
    length: 16,
    fields: [
      refused('WRPROTECT', 1, 7, 5),
      bits('DPO', 1, 4),
      bits('FUA', 1, 3),
      bytes('LOGICAL BLOCK ADDRESS', 2, 8),
      bytes('NUMBER OF LOGICAL BLOCKS', 13, 1),
      bits('GROUP NUMBER', 14, 5, 0),
    ],
    medium: 'write',
    run: compareAndWrite,
  },
  {
    name: 'ORWRITE (16)',
    standard: 'SBC-4',
    opcode: 0x8b,
    length: 16,
    fields: rangeFields(16, [refused('ORPROTECT', 1, 7, 5), bits('DPO', 1, 4), bits('FUA', 1, 3)]),
    medium: 'write',
    run: orWrite,
  },
  ...threeForms(
    'VERIFY',
    [0x2f, 0xaf, 0x8f],
    'VERIFICATION LENGTH',
    [refused('VRPROTECT', 1, 7, 5), bits('DPO', 1, 4), bits('BYTCHK', 1, 2, 1)],
    'read',
    verify,
  ),
  ...threeForms(
    'WRITE AND VERIFY',
    [0x2e, 0xae, 0x8e],
    'TRANSFER LENGTH',
    [refused('WRPROTECT', 1, 7, 5), bits('DPO', 1, 4), bits('BYTCHK', 1, 2, 1)],
    'write',
    writeAndVerify,
  ),
];
