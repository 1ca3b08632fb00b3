/** MAINTENANCE IN: what this device can do, told from the command table itself (SPC-5). */
import { readU16, readU32, writeU16, writeU32 } from '../bytes.js';
import { bits, bytes, CommandEntry, type CommandSpec } from '../command-spec.js';
import type { LogicalUnit } from '../logical-unit.js';
import { sense } from '../sense.js';
import { respond } from './respond.js';

const TIMEOUTS_LENGTH = 12;

/** Command timeouts descriptor (SPC-5); zero: no value given. */
function writeTimeouts(data: Uint8Array, at: number, entry: CommandEntry): void {
  writeU16(data, at, TIMEOUTS_LENGTH - 2);
  writeU32(data, at + 8, entry.spec.timeout ?? 0);
}

function allCommands(unit: LogicalUnit, timeouts: boolean): Uint8Array {
  const entries = [...unit.commands.entries()];
  const size = 8 + (timeouts ? TIMEOUTS_LENGTH : 0);
  const data = new Uint8Array(4 + size * entries.length);
  writeU32(data, 0, data.length - 4);
  for (const [i, entry] of entries.entries()) {
    const at = 4 + size * i;
    const action = entry.spec.serviceAction;
    data[at] = entry.spec.opcode;
    writeU16(data, at + 2, action ?? 0);
    // CTDP and SERVACTV.
    data[at + 5] = (timeouts ? 0x02 : 0) | (action === undefined ? 0 : 0x01);
    writeU16(data, at + 6, entry.length);
    if (timeouts) writeTimeouts(data, at + 8, entry);
  }
  return data;
}

function oneCommand(entry: CommandEntry | undefined, timeouts: boolean): Uint8Array {
  // SUPPORT 001b: not supported; nothing follows.
  if (entry === undefined) return Uint8Array.of(0, 0x01, 0, 0);
  const data = new Uint8Array(4 + entry.length + (timeouts ? TIMEOUTS_LENGTH : 0));
  // SUPPORT 011b: as the standard says; CTDP.
  data[1] = 0x03 | (timeouts ? 0x80 : 0);
  writeU16(data, 2, entry.length);
  data.set(entry.usage, 4);
  if (timeouts) writeTimeouts(data, 4 + entry.length, entry);
  return data;
}

/** The command meant by REPORTING OPTIONS 001b to 011b (SPC-5). */
function requested(
  unit: LogicalUnit,
  option: number,
  opcode: number,
  action: number,
): CommandEntry | undefined {
  const found = unit.commands.at(opcode);
  if (found === undefined) return undefined;
  if (found instanceof CommandEntry) {
    // 010b is for codes with service actions; 011b takes both, without one the action must be 0.
    if (option === 2) throw sense.invalidFieldInCdb({ byte: 2, bit: 2 });
    return option === 3 && action !== 0 ? undefined : found;
  }
  if (option === 1) throw sense.invalidFieldInCdb({ byte: 2, bit: 2 });
  return found.get(action);
}

export const maintenanceCommands: readonly CommandSpec[] = [
  {
    name: 'REPORT SUPPORTED OPERATION CODES',
    standard: 'SPC-5',
    opcode: 0xa3,
    serviceAction: 0x0c,
    length: 12,
    fields: [
      bits('RCTD', 2, 7),
      bits('REPORTING OPTIONS', 2, 2, 0),
      bytes('REQUESTED OPERATION CODE', 3, 1),
      bytes('REQUESTED SERVICE ACTION', 4, 2),
      bytes('ALLOCATION LENGTH', 6, 4),
    ],
    medium: 'none',
    run(unit, command) {
      const { cdb } = command;
      const option = (cdb[2] as number) & 0x07;
      const timeouts = ((cdb[2] as number) & 0x80) !== 0;
      if (option > 3) throw sense.invalidFieldInCdb({ byte: 2, bit: 2 });
      const data =
        option === 0
          ? allCommands(unit, timeouts)
          : oneCommand(requested(unit, option, cdb[3] as number, readU16(cdb, 4)), timeouts);
      respond(command, data, readU32(cdb, 6));
    },
  },
];
