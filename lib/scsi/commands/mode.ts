// SPDX-License-Identifier: Apache-2.0
/** MODE SENSE and MODE SELECT, (6) and (10) (SPC-5; SBC-4, mode parameters). */
import type { MaybePromise } from '../../device/data.js';
import type { ScsiCommand } from '../../device/handler.js';
import { chain } from '../../store/maybe.js';
import {
  readU16,
  readU24,
  readU32,
  readU64,
  writeU16,
  writeU24,
  writeU32,
  writeU64,
} from '../bytes.js';
import { bits, bytes, type CommandSpec, refused } from '../command-spec.js';
import { type LogicalUnit, StoreRequest } from '../logical-unit.js';
import { type ModePage, ModePageCode } from '../mode-pages.js';
import { askNexuses, soon } from '../nexuses.js';
import { sense } from '../sense.js';
import { parameterList, respond } from './respond.js';

/** DEVICE-SPECIFIC PARAMETER (SBC-4): WP, and DPOFUA since both bits are always honoured. */
function deviceSpecific(unit: LogicalUnit): number {
  return 0x10 | (unit.writeProtected ? 0x80 : 0);
}

/** The one block descriptor, short or long form (SBC-4, mode parameter block descriptors). */
function blockDescriptor(unit: LogicalUnit, long: boolean): Uint8Array {
  const descriptor = new Uint8Array(long ? 16 : 8);
  if (long) {
    writeU64(descriptor, 0, unit.blocks);
    writeU32(descriptor, 12, unit.blockSize);
  } else {
    writeU32(descriptor, 0, Math.min(unit.blocks, 0xffff_ffff));
    writeU24(descriptor, 5, unit.blockSize);
  }
  return descriptor;
}

function modeSense(unit: LogicalUnit, command: ScsiCommand, ten: boolean): void {
  const { cdb } = command;
  const flags = cdb[1] as number;
  const code = (cdb[2] as number) & 0x3f;
  const subpage = cdb[3] as number;
  const control = (cdb[2] as number) >>> 6;
  if (control === 3 && !unit.modePages.savable) throw sense.savingParametersNotSupported();
  if (code === ModePageCode.ALL && subpage !== 0 && subpage !== 0xff) {
    throw sense.invalidFieldInCdb({ byte: 3 });
  }
  const pages = unit.modePages.select(code, subpage);
  if (pages.length === 0) throw sense.invalidFieldInCdb({ byte: 2, bit: 5 });
  const long = ten && (flags & 0x10) !== 0;
  const descriptor = flags & 0x08 ? new Uint8Array(0) : blockDescriptor(unit, long);
  const header = new Uint8Array(ten ? 8 : 4);
  const data = Buffer.concat([header, descriptor, ...pages.map((page) => values(page, control))]);
  if (ten) {
    writeU16(data, 0, data.length - 2);
    data[3] = deviceSpecific(unit);
    data[4] = long ? 1 : 0;
    writeU16(data, 6, descriptor.length);
  } else {
    data[0] = data.length - 1;
    data[2] = deviceSpecific(unit);
    data[3] = descriptor.length;
  }
  respond(command, data, ten ? readU16(cdb, 7) : (cdb[4] as number));
}

/** The page as PAGE CONTROL wants it: 0 current, 1 changeable, 2 default, 3 saved values. */
function values(page: ModePage, control: number): Uint8Array {
  if (control === 0) return page.current;
  if (control === 2) return page.defaults;
  if (control === 3) return page.saved;
  const mask = page.changeable.slice();
  mask.set(page.defaults.subarray(0, page.headerLength));
  return mask;
}

function modeSelect(unit: LogicalUnit, command: ScsiCommand, ten: boolean): MaybePromise<unknown> {
  const { cdb } = command;
  const save = ((cdb[1] as number) & 0x01) !== 0;
  const list = parameterList(command, ten ? readU16(cdb, 7) : (cdb[4] as number));
  if (list.length === 0) return;
  const headerLength = ten ? 8 : 4;
  if (list.length < headerLength) throw sense.parameterListLengthError();
  const long = ten && ((list[4] as number) & 1) !== 0;
  const descriptorLength = ten ? readU16(list, 6) : (list[3] as number);
  checkDescriptor(unit, list, headerLength, descriptorLength, long);

  // Every page is checked before any is changed.
  const changes: { page: ModePage; at: number }[] = [];
  for (let at = headerLength + descriptorLength; at < list.length; ) {
    const page = findPage(unit, list, at);
    for (let i = page.headerLength; i < page.current.length; i++) {
      const wanted = list[at + i] as number;
      const fixed = ~(page.changeable[i] as number) & 0xff;
      const wrong = (wanted ^ (page.current[i] as number)) & fixed;
      if (wrong !== 0) {
        throw sense.invalidFieldInParameterList({ byte: at + i, bit: 31 - Math.clz32(wrong) });
      }
    }
    changes.push({ page, at });
    at += page.current.length;
  }
  for (const { page, at } of changes) {
    const end = at + page.current.length;
    page.current.set(list.subarray(at + page.headerLength, end), page.headerLength);
  }
  const { modePages } = unit;
  modePages.changed();
  unit.space.look();
  const written = unit.cacheModeChanged() ? unit.flush(new StoreRequest(command)) : undefined;
  return chain(written, () => chain(saved(unit, save), () => tellOthers(unit, changes.length > 0)));
}

/** SP: what is current now is what a restart brings back. */
function saved(unit: LogicalUnit, save: boolean): MaybePromise<unknown> {
  if (!save) return;
  const { modePages, options } = unit;
  return chain(options.modePageStorage?.save(modePages.encode()), () => modePages.saveCurrent());
}

/**
 * SPC-5, MODE SELECT: every other nexus gets the unit attention MODE PARAMETERS CHANGED. Which nexus sent the
 * command is not known; with more than one there is, the next that comes gets it.
 */
function tellOthers(unit: LogicalUnit, changed: boolean): MaybePromise<unknown> {
  if (!changed) return;
  const told = chain(askNexuses(unit.options.nexuses), (nexuses) => {
    if (nexuses !== undefined && (nexuses.incomplete === true || nexuses.names.size > 1)) {
      unit.raiseAttention(sense.modeParametersChanged());
    }
  });
  return soon(told);
}

function checkDescriptor(
  unit: LogicalUnit,
  list: Uint8Array,
  at: number,
  length: number,
  long: boolean,
): void {
  if (length === 0) return;
  const lengthField = { byte: at === 8 ? 6 : 3 };
  if (length !== (long ? 16 : 8)) throw sense.invalidFieldInParameterList(lengthField);
  if (at + length > list.length) throw sense.parameterListLengthError();
  const blocks = long ? readU64(list, at) : readU32(list, at);
  const blockSize = long ? readU32(list, at + 12) : readU24(list, at + 5);
  // 0 keeps the number of blocks, all ones asks for the largest one: neither is a change.
  const most = long ? 2 ** 64 : 0xffff_ffff;
  if (blocks !== 0 && blocks !== unit.blocks && blocks !== most) {
    throw sense.invalidFieldInParameterList({ byte: at });
  }
  if (blockSize !== unit.blockSize) {
    throw sense.invalidFieldInParameterList({ byte: at + (long ? 12 : 5) });
  }
}

function findPage(unit: LogicalUnit, list: Uint8Array, at: number): ModePage {
  const subpageFormat = ((list[at] as number) & 0x40) !== 0;
  if (at + (subpageFormat ? 4 : 2) > list.length) throw sense.parameterListLengthError();
  const code = (list[at] as number) & 0x3f;
  const subpage = subpageFormat ? (list[at + 1] as number) : 0;
  const page = unit.modePages.pages.find(
    (candidate) =>
      candidate.code === code &&
      candidate.subpage === subpage &&
      (candidate.headerLength === 4) === subpageFormat,
  );
  if (page === undefined) throw sense.invalidFieldInParameterList({ byte: at, bit: 5 });
  const length = subpageFormat ? readU16(list, at + 2) : (list[at + 1] as number);
  if (length !== page.current.length - page.headerLength) {
    throw sense.invalidFieldInParameterList({ byte: at + (subpageFormat ? 2 : 1) });
  }
  if (at + page.current.length > list.length) throw sense.parameterListLengthError();
  return page;
}

const PAGE_FIELDS = [
  bits('PC', 2, 7, 6),
  bits('PAGE CODE', 2, 5, 0),
  bytes('SUBPAGE CODE', 3, 1),
] as const;

/** MODE SELECT, where pages can be saved and where not: SP is refused there. */
function modeSelectCommands(savable: boolean): readonly CommandSpec[] {
  const options = [
    bits('PF', 1, 4),
    refused('RTD', 1, 1),
    savable ? bits('SP', 1, 0) : refused('SP', 1, 0),
  ];
  const common = {
    standard: 'SPC-5',
    medium: 'none',
    available: (unit: LogicalUnit) => unit.modePages.savable === savable,
  } as const;
  return [
    {
      ...common,
      name: 'MODE SELECT (6)',
      opcode: 0x15,
      length: 6,
      fields: [...options, bytes('PARAMETER LIST LENGTH', 4, 1)],
      run: (unit, command) => modeSelect(unit, command, false),
    },
    {
      ...common,
      name: 'MODE SELECT (10)',
      opcode: 0x55,
      length: 10,
      fields: [...options, bytes('PARAMETER LIST LENGTH', 7, 2)],
      run: (unit, command) => modeSelect(unit, command, true),
    },
  ];
}

export const modeCommands: readonly CommandSpec[] = [
  ...modeSelectCommands(true),
  ...modeSelectCommands(false),
  {
    name: 'MODE SENSE (6)',
    standard: 'SPC-5',
    opcode: 0x1a,
    length: 6,
    fields: [bits('DBD', 1, 3), ...PAGE_FIELDS, bytes('ALLOCATION LENGTH', 4, 1)],
    medium: 'none',
    run: (unit, command) => modeSense(unit, command, false),
  },
  {
    name: 'MODE SENSE (10)',
    standard: 'SPC-5',
    opcode: 0x5a,
    length: 10,
    fields: [
      bits('LLBAA', 1, 4),
      bits('DBD', 1, 3),
      ...PAGE_FIELDS,
      bytes('ALLOCATION LENGTH', 7, 2),
    ],
    medium: 'none',
    run: (unit, command) => modeSense(unit, command, true),
  },
];
