// SPDX-License-Identifier: Apache-2.0
/**
 * LOG SENSE (SPC-5; SBC-4, log parameters). Counters live as long as the device; none can be set, so LOG
 * SELECT is not there. Where the standard wants a number that a virtual disk does not have, the value that
 * means "not known" is told.
 */
import type { MaybePromise } from '../../device/data.js';
import { chain } from '../../store/maybe.js';
import { readU16, writeAscii, writeU16, writeU32, writeU64 } from '../bytes.js';
import { bits, bytes, type CommandSpec, refused } from '../command-spec.js';
import { Counter, type LogicalUnit } from '../logical-unit.js';
import { sense } from '../sense.js';
import { Resource } from '../space-watch.js';
import { respond } from './respond.js';

/** FORMAT AND LINKING 11b: a binary list parameter, not saved, never compared. */
const BINARY_LIST = 0x03;

function parameter(code: number, value: Uint8Array, control = BINARY_LIST): Uint8Array {
  const bytes = new Uint8Array(4 + value.length);
  writeU16(bytes, 0, code);
  bytes[2] = control;
  bytes[3] = value.length;
  bytes.set(value, 4);
  return bytes;
}

/** Temperature log page: current and reference, FFh: not known. */
function temperature(): Uint8Array[] {
  return [parameter(0x0000, Uint8Array.of(0, 0xff)), parameter(0x0001, Uint8Array.of(0, 0xff))];
}

function asciiBytes(length: number): Uint8Array {
  const bytes = new Uint8Array(length);
  writeAscii(bytes, 0, length, '');
  return bytes;
}

/** Start-Stop Cycle Counter log page: no dates, no limits (all ones), how often the medium was loaded. */
function startStop(unit: LogicalUnit): Uint8Array[] {
  const counter = (value: number) => {
    const bytes = new Uint8Array(4);
    writeU32(bytes, 0, value);
    return bytes;
  };
  return [
    parameter(0x0001, asciiBytes(6), 0x01),
    parameter(0x0002, asciiBytes(6), 0x01),
    parameter(0x0003, counter(0xffff_ffff)),
    parameter(0x0004, counter(unit.loads)),
    parameter(0x0005, counter(0xffff_ffff)),
    parameter(0x0006, counter(unit.loads)),
  ];
}

/** General Statistics and Performance log page; times are not measured and read as zero. */
function statistics(unit: LogicalUnit): Uint8Array[] {
  const general = new Uint8Array(64);
  const { counters } = unit;
  const order = [Counter.READS, Counter.WRITES, Counter.BLOCKS_WRITTEN, Counter.BLOCKS_READ];
  for (const [i, counter] of order.entries()) writeU64(general, 8 * i, counters[counter] as number);
  return [
    parameter(0x0001, general),
    parameter(0x0002, new Uint8Array(8)),
    parameter(0x0003, new Uint8Array(8)),
  ];
}

/** Informational Exceptions log page: none; temperature not known. */
function informationalExceptions(): Uint8Array[] {
  return [parameter(0x0000, Uint8Array.of(0, 0, 0xff, 0))];
}

/** Logical Block Provisioning log page: space in threshold sets, shared with others (SCOPE 00b: not told). */
function provisioning(unit: LogicalUnit): MaybePromise<Uint8Array[]> {
  return chain(unit.store.space?.(), (space) => {
    const resource = (code: number, count: number) => {
      const value = new Uint8Array(8);
      writeU32(value, 0, unit.space.count(count));
      return parameter(code, value);
    };
    return space === undefined
      ? []
      : [resource(Resource.AVAILABLE, space.available), resource(Resource.USED, space.used)];
  });
}

interface LogPage {
  readonly code: number;
  readonly parameters: (unit: LogicalUnit) => MaybePromise<Uint8Array[]>;
  readonly available?: (unit: LogicalUnit) => boolean;
}

/** In ascending order; page 00h, which lists them, is made by itself. */
const LOG_PAGES: readonly LogPage[] = [
  {
    code: 0x0c,
    parameters: provisioning,
    available: (unit) => unit.thin && unit.store.space !== undefined,
  },
  { code: 0x0d, parameters: temperature },
  { code: 0x0e, parameters: startStop },
  { code: 0x19, parameters: statistics },
  { code: 0x2f, parameters: informationalExceptions },
];

const ALL_SUBPAGES = 0xff;

function logPage(
  unit: LogicalUnit,
  code: number,
  subpage: number,
  pointer: number,
): MaybePromise<Uint8Array> {
  const pages = LOG_PAGES.filter((page) => page.available?.(unit) ?? true);
  const header = (contents: Uint8Array) => {
    const page = new Uint8Array(4 + contents.length);
    // SPF: the page has a subpage code.
    page[0] = code | (subpage === 0 ? 0 : 0x40);
    page[1] = subpage;
    writeU16(page, 2, contents.length);
    page.set(contents, 4);
    return page;
  };
  if (code === 0x00 && subpage === 0x00) {
    return header(Uint8Array.of(0x00, ...pages.map((page) => page.code)));
  }
  if (subpage === ALL_SUBPAGES) {
    // Supported subpages: of all pages, or of one.
    const listed = [0x00, ...pages.map((page) => page.code)].filter(
      (listedCode) => code === 0x00 || listedCode === code,
    );
    if (listed.length === 0) throw sense.invalidFieldInCdb({ byte: 2, bit: 5 });
    const pairs = listed.flatMap((listedCode) =>
      listedCode === 0x00 ? [0x00, 0x00, 0x00, ALL_SUBPAGES] : [listedCode, 0x00],
    );
    return header(Uint8Array.from(pairs));
  }
  if (subpage !== 0) throw sense.invalidFieldInCdb({ byte: 3 });
  const page = pages.find((candidate) => candidate.code === code);
  if (page === undefined) throw sense.invalidFieldInCdb({ byte: 2, bit: 5 });
  return chain(page.parameters(unit), (parameters) => {
    // PARAMETER POINTER: from that parameter on; one past the last is refused (SPC-5, LOG SENSE).
    const wanted = parameters.filter((bytes) => readU16(bytes, 0) >= pointer);
    if (wanted.length === 0 && pointer !== 0) throw sense.invalidFieldInCdb({ byte: 5 });
    return header(Buffer.concat(wanted));
  });
}

export const logCommands: readonly CommandSpec[] = [
  {
    name: 'LOG SENSE',
    standard: 'SPC-5',
    opcode: 0x4d,
    length: 10,
    fields: [
      refused('PPC', 1, 1),
      refused('SP', 1, 0),
      bits('PC', 2, 7, 6),
      bits('PAGE CODE', 2, 5, 0),
      bytes('SUBPAGE CODE', 3, 1),
      bytes('PARAMETER POINTER', 5, 2),
      bytes('ALLOCATION LENGTH', 7, 2),
    ],
    medium: 'none',
    run(unit, command) {
      const { cdb } = command;
      const code = (cdb[2] as number) & 0x3f;
      const page = logPage(unit, code, cdb[3] as number, readU16(cdb, 5));
      return chain(page, (data) => respond(command, data, readU16(cdb, 7)));
    },
  },
];
