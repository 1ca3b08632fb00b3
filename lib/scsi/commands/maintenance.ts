// SPDX-License-Identifier: Apache-2.0
/**
 * MAINTENANCE IN and OUT (SPC-5): what this device can do, told from the command table itself; its target port
 * groups; its clock.
 */
import type { MaybePromise } from '../../device/data.js';
import type { ScsiCommand } from '../../device/handler.js';
import { chain } from '../../store/maybe.js';
import { readU16, readU32, readU48, writeU16, writeU32, writeU48 } from '../bytes.js';
import { bits, bytes, CommandEntry, type CommandSpec } from '../command-spec.js';
import type { LogicalUnit } from '../logical-unit.js';
import {
  ACCESS_STATE_CODES,
  type AccessState,
  type PortGroup,
  type PortGroupChange,
} from '../port-groups.js';
import { sense } from '../sense.js';
import { parameterList, respond } from './respond.js';

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

/** Bits of SUPPORTED STATES in a target port group descriptor. */
const SUPPORT_BITS: Readonly<Record<AccessState, number>> = {
  'active-optimized': 0x01,
  'active-non-optimized': 0x02,
  standby: 0x04,
  unavailable: 0x08,
  offline: 0x40,
  transitioning: 0x80,
};

/** Target port group descriptor (SPC-5). STATUS CODE 0: no status to tell. */
function groupDescriptor(group: PortGroup): Uint8Array {
  const descriptor = new Uint8Array(8 + 4 * group.ports.length);
  descriptor[0] = (group.preferred ? 0x80 : 0) | ACCESS_STATE_CODES[group.state];
  for (const state of group.supported ?? [group.state]) {
    (descriptor[1] as number) |= SUPPORT_BITS[state];
  }
  writeU16(descriptor, 2, group.id);
  descriptor[7] = group.ports.length;
  for (const [i, port] of group.ports.entries()) writeU16(descriptor, 8 + 4 * i + 2, port);
  return descriptor;
}

function reportPortGroups(unit: LogicalUnit, command: ScsiCommand): MaybePromise<unknown> {
  const { cdb } = command;
  const format = (cdb[1] as number) >>> 5;
  if (format > 1) throw sense.invalidFieldInCdb({ byte: 1, bit: 7 });
  return chain(unit.options.portGroups.list(), (groups) => {
    const descriptors = Buffer.concat(groups.map(groupDescriptor));
    const headerLength = format === 1 ? 8 : 4;
    const data = new Uint8Array(headerLength + descriptors.length);
    writeU32(data, 0, data.length - 4);
    // Extended header: format type 001b, no implicit transition time told.
    if (format === 1) data[4] = 0x10;
    data.set(descriptors, headerLength);
    respond(command, data, readU32(cdb, 6));
  });
}

/** Every group must exist and be able to have its new state, before any is changed. */
function setPortGroups(unit: LogicalUnit, command: ScsiCommand): MaybePromise<unknown> {
  const length = readU32(command.cdb, 6);
  if (length === 0) return;
  const list = parameterList(command, Math.min(length, 0x1_0000));
  if (list.length < 4 || (list.length - 4) % 4 !== 0) throw sense.parameterListLengthError();
  const { portGroups } = unit.options;
  return chain(portGroups.list(), (groups) => {
    const changes: PortGroupChange[] = [];
    for (let at = 4; at < list.length; at += 4) {
      const code = (list[at] as number) & 0x0f;
      const group = groups.find(({ id }) => id === readU16(list, at + 2));
      if (group === undefined) throw sense.invalidFieldInParameterList({ byte: at + 2 });
      const state = (group.supported ?? [group.state]).find(
        (known) => ACCESS_STATE_CODES[known] === code && known !== 'transitioning',
      );
      if (state === undefined) throw sense.invalidFieldInParameterList({ byte: at, bit: 3 });
      changes.push({ id: group.id, state });
    }
    return portGroups.set?.(changes);
  });
}

/** TIMESTAMP ORIGIN: 000b since power on, 010b set by SET TIMESTAMP, 011b by other means. */
function timestamp(unit: LogicalUnit): Uint8Array {
  const data = new Uint8Array(12);
  writeU16(data, 0, data.length - 2);
  data[2] = unit.timestampOffset === undefined ? 0x03 : 0x02;
  writeU48(data, 4, Date.now() + (unit.timestampOffset ?? 0));
  return data;
}

function setTimestamp(unit: LogicalUnit, command: ScsiCommand): void {
  const length = readU32(command.cdb, 6);
  if (length === 0) return;
  const list = parameterList(command, Math.min(length, 12));
  if (list.length < 12) throw sense.parameterListLengthError();
  unit.timestampOffset = readU48(list, 4) - Date.now();
}

/** Task management functions as LIO has them: ABORT TASK, ABORT TASK SET, LOGICAL UNIT RESET. */
const TASK_MANAGEMENT = 0x80 | 0x40 | 0x08;

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
    whileHindered: true,
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
  {
    name: 'REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS',
    standard: 'SPC-5',
    opcode: 0xa3,
    serviceAction: 0x0d,
    length: 12,
    fields: [bits('REPD', 2, 7), bytes('ALLOCATION LENGTH', 6, 4)],
    medium: 'none',
    whileHindered: true,
    run(_unit, command) {
      const { cdb } = command;
      const allocation = readU32(cdb, 6);
      // SPC-5: an allocation length below four is an error here.
      if (allocation < 4) throw sense.invalidFieldInCdb({ byte: 6 });
      const extended = ((cdb[2] as number) & 0x80) !== 0;
      // Extended data: TMFTMOV 0, no timeouts told.
      const data = new Uint8Array(extended ? 16 : 4);
      data[0] = TASK_MANAGEMENT;
      data[3] = data.length - 4;
      respond(command, data, allocation);
    },
  },
  {
    name: 'REPORT TARGET PORT GROUPS',
    standard: 'SPC-5',
    opcode: 0xa3,
    serviceAction: 0x0a,
    length: 12,
    fields: [
      { name: 'PARAMETER DATA FORMAT', byte: 1, bytes: 1, mask: 0xe0 },
      bytes('ALLOCATION LENGTH', 6, 4),
    ],
    medium: 'none',
    whileHindered: true,
    run: reportPortGroups,
  },
  {
    name: 'REPORT TIMESTAMP',
    standard: 'SPC-5',
    opcode: 0xa3,
    serviceAction: 0x0f,
    length: 12,
    fields: [bytes('ALLOCATION LENGTH', 6, 4)],
    medium: 'none',
    run(unit, command) {
      respond(command, timestamp(unit), readU32(command.cdb, 6));
    },
  },
  {
    name: 'SET TARGET PORT GROUPS',
    standard: 'SPC-5',
    opcode: 0xa4,
    serviceAction: 0x0a,
    length: 12,
    fields: [bytes('PARAMETER LIST LENGTH', 6, 4)],
    medium: 'none',
    available: (unit) => unit.options.portGroups.set !== undefined,
    needs: 'portGroups.set',
    run: setPortGroups,
  },
  {
    name: 'SET TIMESTAMP',
    standard: 'SPC-5',
    opcode: 0xa4,
    serviceAction: 0x0f,
    length: 12,
    fields: [bytes('PARAMETER LIST LENGTH', 6, 4)],
    medium: 'none',
    run: setTimestamp,
  },
];
