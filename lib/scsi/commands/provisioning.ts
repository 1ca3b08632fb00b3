// SPDX-License-Identifier: Apache-2.0
/** UNMAP, WRITE SAME (10) and (16) (SBC-4, logical block provisioning). */
import type { MaybePromise } from '../../device/data.js';
import type { ScsiCommand } from '../../device/handler.js';
import { unmap, writeSame, writeZeroes } from '../../store/emulate.js';
import { chain, eachPiece } from '../../store/maybe.js';
import { isZero } from '../../store/memory-data.js';
import { readU16, readU32, readU64 } from '../bytes.js';
import { bits, bytes, type CommandSpec, rangeFields, refused } from '../command-spec.js';
import { type LogicalUnit, StoreRequest } from '../logical-unit.js';
import { sense } from '../sense.js';
import { parameterList } from './respond.js';

const UNMAP_HEADER = 8;
const UNMAP_DESCRIPTOR = 16;

/** The ranges of an UNMAP parameter list (SBC-4), all checked before any is unmapped. */
function unmapRanges(unit: LogicalUnit, list: Uint8Array): { lba: number; blocks: number }[] {
  if (list.length < UNMAP_HEADER) throw sense.parameterListLengthError();
  const length = readU16(list, 2);
  if (length > list.length - UNMAP_HEADER) throw sense.parameterListLengthError();
  // An incomplete last descriptor is ignored.
  const count = Math.floor(length / UNMAP_DESCRIPTOR);
  if (count > unit.limits.unmapDescriptors) throw sense.invalidFieldInParameterList({ byte: 2 });
  const ranges = [];
  let total = 0;
  for (let i = 0; i < count; i++) {
    const at = UNMAP_HEADER + UNMAP_DESCRIPTOR * i;
    const lba = readU64(list, at);
    const blocks = readU32(list, at + 8);
    unit.checkRange(lba, blocks);
    total += blocks;
    if (total > unit.limits.unmapBlocks) {
      throw sense.invalidFieldInParameterList({ byte: at + 8 });
    }
    if (blocks > 0) ranges.push({ lba, blocks });
  }
  return ranges;
}

/** The block to write, or undefined for zeros without data. */
function patternBlock(
  unit: LogicalUnit,
  command: ScsiCommand,
  mayUnmap: boolean,
): Uint8Array | undefined {
  const { cdb } = command;
  const options = (cdb[0] === 0x7f ? cdb[10] : cdb[0] === 0x93 ? cdb[1] : 0) as number;
  const noData = (options & 0x01) !== 0;
  // Initiators of SBC-3 drafts unmap by WRITE SAME without any data, though NDOB is zero.
  if (noData || (mayUnmap && command.dataLength === 0)) return undefined;
  if (command.dataLength !== unit.blockSize) throw sense.invalidFieldInInformationUnit();
  const block = parameterList(command, unit.blockSize);
  return isZero(block) ? undefined : block;
}

export function runWriteSame(
  unit: LogicalUnit,
  command: ScsiCommand,
  lba: number,
  blocks: number,
  lengthField: number,
): MaybePromise<unknown> {
  unit.checkRange(lba, blocks);
  const length = blocks * unit.blockSize;
  // WSNZ: zero does not mean "up to the end" here (SBC-4, Block Limits VPD page).
  if (length === 0 || length > unit.limits.writeSame) {
    throw sense.invalidFieldInCdb({ byte: lengthField });
  }
  const { cdb } = command;
  const mayUnmap = (((cdb[0] === 0x7f ? cdb[10] : cdb[1]) as number) & 0x08) !== 0;
  const block = patternBlock(unit, command, mayUnmap);
  const request = new StoreRequest(command);
  const position = lba * unit.blockSize;
  const { store } = unit;
  return chain(
    unit.apart(position, length, false, () => {
      if (block !== undefined) return writeSame(store, position, length, block, request);
      if (mayUnmap) return unmap(store, position, length, request);
      return writeZeroes(store, position, length, false, request);
    }),
    () => {
      if (unit.modePages.thresholdsEnabled) unit.space.changed();
      return unit.makeDurable(request);
    },
  );
}

/**
 * WRITE SAME with UNMAP where the store can, without it elsewhere: an option not there is refused.
 */
function writeSameCommands(thin: boolean): readonly CommandSpec[] {
  const common = [
    refused('WRPROTECT', 1, 7, 5),
    refused('ANCHOR', 1, 4),
    thin ? bits('UNMAP', 1, 3) : refused('UNMAP', 1, 3),
  ];
  const available = (unit: LogicalUnit) => unit.thin === thin;
  return [
    {
      name: 'WRITE SAME (10)',
      standard: 'SBC-4',
      opcode: 0x41,
      length: 10,
      fields: rangeFields(10, common, 'NUMBER OF LOGICAL BLOCKS'),
      medium: 'write',
      available,
      timeout: 60,
      run(unit, command) {
        const { cdb } = command;
        return runWriteSame(unit, command, readU32(cdb, 2), readU16(cdb, 7), 7);
      },
    },
    {
      name: 'WRITE SAME (16)',
      standard: 'SBC-4',
      opcode: 0x93,
      length: 16,
      fields: rangeFields(16, [...common, bits('NDOB', 1, 0)], 'NUMBER OF LOGICAL BLOCKS'),
      medium: 'write',
      available,
      timeout: 60,
      run(unit, command) {
        const { cdb } = command;
        return runWriteSame(unit, command, readU64(cdb, 2), readU32(cdb, 10), 10);
      },
    },
  ];
}

export const provisioningCommands: readonly CommandSpec[] = [
  {
    name: 'UNMAP',
    standard: 'SBC-4',
    opcode: 0x42,
    length: 10,
    fields: [
      refused('ANCHOR', 1, 0),
      bits('GROUP NUMBER', 6, 5, 0),
      bytes('PARAMETER LIST LENGTH', 7, 2),
    ],
    medium: 'write',
    available: (unit) => unit.thin,
    needs: 'unmap',
    timeout: 60,
    /** One range after the other; the first failure ends it and is what the initiator sees. */
    run(unit, command) {
      const length = readU16(command.cdb, 7);
      if (length === 0) return;
      const ranges = unmapRanges(unit, parameterList(command, length));
      const request = new StoreRequest(command);
      const walk = eachPiece(ranges.length, 1, (i) => {
        const { lba, blocks } = ranges[i] as (typeof ranges)[number];
        const position = lba * unit.blockSize;
        const size = blocks * unit.blockSize;
        return unit.apart(position, size, false, () =>
          chain(unmap(unit.store, position, size, request), () => true),
        );
      });
      return chain(walk, () => {
        if (unit.modePages.thresholdsEnabled) unit.space.changed();
        return unit.makeDurable(request);
      });
    },
  },
  ...writeSameCommands(true),
  ...writeSameCommands(false),
];
