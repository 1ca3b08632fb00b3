// SPDX-License-Identifier: Apache-2.0
/** SYNCHRONIZE CACHE (10) and (16) (SBC-4). */
import type { MaybePromise } from '../../device/data.js';
import type { ScsiCommand } from '../../device/handler.js';
import { readU16, readU32, readU64 } from '../bytes.js';
import { bits, type CommandSpec, rangeFields } from '../command-spec.js';
import { type LogicalUnit, StoreRequest } from '../logical-unit.js';

/**
 * Flushes everything, whatever the range, and answers when that is done: also with IMMED, so that a
 * failure is never lost. A length of zero means up to the last block.
 */
function synchronize(
  unit: LogicalUnit,
  command: ScsiCommand,
  lba: number,
  blocks: number,
): MaybePromise<unknown> {
  unit.checkRange(lba, blocks);
  // A read-only store has nothing to flush, and may be unable to.
  return unit.store.readOnly ? undefined : unit.flush(new StoreRequest(command));
}

export const synchronizeCommands: readonly CommandSpec[] = [
  {
    name: 'SYNCHRONIZE CACHE (10)',
    standard: 'SBC-4',
    opcode: 0x35,
    length: 10,
    fields: rangeFields(10, [bits('IMMED', 1, 1)], 'NUMBER OF LOGICAL BLOCKS'),
    medium: 'flush',
    timeout: 60,
    run(unit, command) {
      return synchronize(unit, command, readU32(command.cdb, 2), readU16(command.cdb, 7));
    },
  },
  {
    name: 'SYNCHRONIZE CACHE (16)',
    standard: 'SBC-4',
    opcode: 0x91,
    length: 16,
    fields: rangeFields(16, [bits('IMMED', 1, 1)], 'NUMBER OF LOGICAL BLOCKS'),
    medium: 'flush',
    timeout: 60,
    run(unit, command) {
      return synchronize(unit, command, readU64(command.cdb, 2), readU32(command.cdb, 10));
    },
  },
];
