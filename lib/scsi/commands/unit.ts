// SPDX-License-Identifier: Apache-2.0
/** Commands about the logical unit as such: readiness, start and stop, sense, reported LUNs. */
import { chain } from '../../store/maybe.js';
import { readU32, writeU32 } from '../bytes.js';
import { bits, bytes, type CommandSpec } from '../command-spec.js';
import { StoreRequest } from '../logical-unit.js';
import { isPowerCondition, needsFlush, powerReport, START_VALID } from '../power.js';
import { encodeSense, SenseKey, sense } from '../sense.js';
import { respond } from './respond.js';

export const unitCommands: readonly CommandSpec[] = [
  {
    name: 'TEST UNIT READY',
    standard: 'SPC-5',
    opcode: 0x00,
    length: 6,
    fields: [],
    medium: 'read',
    run() {},
  },
  {
    name: 'REQUEST SENSE',
    standard: 'SPC-5',
    opcode: 0x03,
    length: 6,
    fields: [bits('DESC', 1, 0), bytes('ALLOCATION LENGTH', 4, 1)],
    medium: 'none',
    ignoresAttention: true,
    whileHindered: true,
    run(unit, command) {
      const { cdb } = command;
      // SPC-5, REQUEST SENSE: a pending unit attention is reported here, as parameter data with
      // GOOD status; then what keeps the medium from being used, with its progress; then the power
      // condition.
      const pending = unit.attentions.shift() ??
        unit.hindrance?.report ??
        unit.power ?? { key: SenseKey.NO_SENSE, asc: 0, ascq: 0 };
      const format = (cdb[1] as number) & 0x01 ? 'descriptor' : 'fixed';
      respond(command, encodeSense(pending, format), cdb[4] as number);
    },
  },
  {
    name: 'START STOP UNIT',
    standard: 'SBC-4',
    opcode: 0x1b,
    length: 6,
    fields: [
      bits('IMMED', 1, 0),
      bits('POWER CONDITION MODIFIER', 3, 3, 0),
      bits('POWER CONDITION', 4, 7, 4),
      bits('NO_FLUSH', 4, 2),
      bits('LOEJ', 4, 1),
      bits('START', 4, 0),
    ],
    medium: 'none',
    timeout: 60,
    /**
     * A virtual disk has no spindle: stopping, or standing by, writes the cache out and keeps nobody from the
     * medium; only a removable one can leave. IMMED is answered when the work is done.
     */
    run(unit, command) {
      const { cdb } = command;
      const options = cdb[4] as number;
      const condition = options >>> 4;
      if (!isPowerCondition(condition)) return;
      const power = powerReport(condition, (cdb[3] as number) & 0x0f);
      if (condition !== START_VALID) {
        const flush = needsFlush(condition) && (options & 0x04) === 0 && !unit.writeProtected;
        return chain(flush ? unit.flush(new StoreRequest(command)) : undefined, () => {
          unit.power = power;
        });
      }
      unit.power = undefined;
      const moves = unit.removable && (options & 0x02) !== 0;
      return chain(moves && unit.removal.holds(), (prevented) => {
        // The medium is locked where it is, in or out.
        if (prevented) throw sense.mediumRemovalPrevented();
        if ((options & 0x01) !== 0) {
          // No unit attention: it is the medium that was there before, and the loader knows of it.
          if (moves && unit.ejected) {
            unit.ejected = false;
            unit.loads++;
          }
          return;
        }
        const flush = (options & 0x04) === 0 && !unit.writeProtected;
        return chain(flush ? unit.flush(new StoreRequest(command)) : undefined, () => {
          if (moves) unit.ejected = true;
        });
      });
    },
  },
  {
    name: 'PREVENT ALLOW MEDIUM REMOVAL',
    standard: 'SBC-4',
    opcode: 0x1e,
    length: 6,
    fields: [bits('PREVENT', 4, 1, 0)],
    medium: 'none',
    available: (unit) => unit.removable,
    needs: 'removable',
    run(unit, command) {
      if (((command.cdb[4] as number) & 0x01) !== 0) return unit.removal.prevent();
      unit.removal.allow();
    },
  },
  {
    name: 'REPORT LUNS',
    standard: 'SPC-5',
    opcode: 0xa0,
    length: 12,
    fields: [bytes('SELECT REPORT', 2, 1), bytes('ALLOCATION LENGTH', 6, 4)],
    medium: 'none',
    ignoresAttention: true,
    whileHindered: true,
    /** LIO answers this one itself; here for other transports: LUN 0 and no well known ones. */
    run(_unit, command) {
      const { cdb } = command;
      const select = cdb[2] as number;
      if (select > 0x02) throw sense.invalidFieldInCdb({ byte: 2 });
      const luns = select === 0x01 ? 0 : 1;
      const data = new Uint8Array(8 + 8 * luns);
      writeU32(data, 0, 8 * luns);
      respond(command, data, readU32(cdb, 6));
    },
  },
];
