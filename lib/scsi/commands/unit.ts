/** Commands about the logical unit as such: readiness, start and stop, sense, reported LUNs. */
import type { MaybePromise } from '../../device/data.js';
import { chain } from '../../store/maybe.js';
import { readU32, writeU32 } from '../bytes.js';
import { bits, bytes, type CommandSpec } from '../command-spec.js';
import { type LogicalUnit, StoreRequest } from '../logical-unit.js';
import { encodeSense, SenseKey, sense } from '../sense.js';
import { respond } from './respond.js';

/**
 * Whether the medium may not be moved. SPC-5, PREVENT ALLOW MEDIUM REMOVAL: prevention ends with the nexus
 * that asked for it, which here means when none is left of those there were then.
 */
function removalPrevented(unit: LogicalUnit): MaybePromise<boolean> {
  const { preventers } = unit;
  if (!unit.removalPrevented || preventers === undefined) return unit.removalPrevented;
  return chain(unit.options.nexuses?.(), (nexuses) => {
    if (nexuses !== undefined && ![...preventers].some((nexus) => nexuses.has(nexus))) {
      unit.removalPrevented = false;
    }
    return unit.removalPrevented;
  });
}

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
      // GOOD status; then what keeps the medium from being used, with its progress.
      const pending = unit.attentions.shift() ??
        unit.hindrance?.report ?? { key: SenseKey.NO_SENSE, asc: 0, ascq: 0 };
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
     * A virtual disk has no spindle: stopping writes the cache out and changes nothing else; only a
     * removable medium can leave. IMMED is answered when the work is done.
     */
    run(unit, command) {
      const options = command.cdb[4] as number;
      const moves = unit.removable && (options & 0xf2) === 0x02;
      return chain(moves ? removalPrevented(unit) : false, (prevented) => {
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
      const prevent = ((command.cdb[4] as number) & 0x01) !== 0;
      return chain(prevent ? unit.options.nexuses?.() : undefined, (nexuses) => {
        unit.removalPrevented = prevent;
        unit.preventers = nexuses;
      });
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
