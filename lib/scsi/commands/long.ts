// SPDX-License-Identifier: Apache-2.0
/**
 * The 32-byte forms: READ, VERIFY, WRITE, WRITE AND VERIFY, WRITE SAME (SBC-4). Their reference and
 * application tags belong to protection information, which this device does not have: they are ignored, and the
 * fields that ask for checking are refused.
 */
import { readU32, readU64 } from '../bytes.js';
import { bits, bytes, type CdbField, type CommandSpec, refused } from '../command-spec.js';
import type { LogicalUnit } from '../logical-unit.js';
import { verify, writeAndVerify } from './compare.js';
import { runWriteSame } from './provisioning.js';
import { read } from './read.js';
import { write } from './write.js';

function longForm(
  name: string,
  serviceAction: number,
  lengthName: string,
  options: readonly CdbField[],
  rest: Pick<CommandSpec, 'medium' | 'run' | 'available' | 'timeout'>,
): CommandSpec {
  const { available, ...more } = rest;
  return {
    name: `${name} (32)`,
    standard: 'SBC-4',
    opcode: 0x7f,
    serviceAction,
    length: 32,
    fields: [
      bits('GROUP NUMBER', 6, 5, 0),
      ...options,
      bytes('LOGICAL BLOCK ADDRESS', 12, 8),
      bytes(lengthName, 28, 4),
    ],
    needs: 'longCommands',
    available: (unit) => unit.options.longCommands && (available?.(unit) ?? true),
    ...more,
  };
}

const lbaOf = (cdb: Uint8Array) => readU64(cdb, 12);
const blocksOf = (cdb: Uint8Array) => readU32(cdb, 28);

const DPO_FUA = [bits('DPO', 10, 4), bits('FUA', 10, 3)];
const DPO_BYTCHK = [bits('DPO', 10, 4), bits('BYTCHK', 10, 2, 1)];

/** With UNMAP where the store can, without it elsewhere. */
function writeSame(thin: boolean): CommandSpec {
  return longForm(
    'WRITE SAME',
    0x000d,
    'NUMBER OF LOGICAL BLOCKS',
    [
      refused('WRPROTECT', 10, 7, 5),
      refused('ANCHOR', 10, 4),
      thin ? bits('UNMAP', 10, 3) : refused('UNMAP', 10, 3),
      bits('NDOB', 10, 0),
    ],
    {
      medium: 'write',
      available: (unit: LogicalUnit) => unit.thin === thin,
      timeout: 60,
      run: (unit, command) =>
        runWriteSame(unit, command, lbaOf(command.cdb), blocksOf(command.cdb), 28),
    },
  );
}

export const longCommands: readonly CommandSpec[] = [
  longForm('READ', 0x0009, 'TRANSFER LENGTH', [refused('RDPROTECT', 10, 7, 5), ...DPO_FUA], {
    medium: 'read',
    run: (unit, command) => {
      const { cdb } = command;
      return read(unit, command, lbaOf(cdb), blocksOf(cdb), cdb[10] as number);
    },
  }),
  longForm(
    'VERIFY',
    0x000a,
    'VERIFICATION LENGTH',
    [refused('VRPROTECT', 10, 7, 5), ...DPO_BYTCHK],
    {
      medium: 'read',
      run: (unit, command) => verify(unit, command, lbaOf(command.cdb), blocksOf(command.cdb)),
    },
  ),
  longForm('WRITE', 0x000b, 'TRANSFER LENGTH', [refused('WRPROTECT', 10, 7, 5), ...DPO_FUA], {
    medium: 'write',
    run: (unit, command) => {
      const { cdb } = command;
      return write(unit, command, lbaOf(cdb), blocksOf(cdb), cdb[10] as number);
    },
  }),
  longForm(
    'WRITE AND VERIFY',
    0x000c,
    'TRANSFER LENGTH',
    [refused('WRPROTECT', 10, 7, 5), ...DPO_BYTCHK],
    {
      medium: 'write',
      run: (unit, command) =>
        writeAndVerify(unit, command, lbaOf(command.cdb), blocksOf(command.cdb)),
    },
  ),
  writeSame(true),
  writeSame(false),
];
