// SPDX-License-Identifier: Apache-2.0
/** READ DEFECT DATA (10) and (12) (SBC-4): a virtual disk has no defects, in whatever format. */
import { readU16, readU32 } from '../bytes.js';
import { bits, bytes, type CommandSpec } from '../command-spec.js';
import { respond } from './respond.js';

/** REQ_PLIST and REQ_GLIST become PLISTV and GLISTV: both lists are there, and empty. */
function header(options: number, length: number): Uint8Array {
  const data = new Uint8Array(length);
  data[1] = options & 0x1f;
  return data;
}

export const defectCommands: readonly CommandSpec[] = [
  {
    name: 'READ DEFECT DATA (10)',
    standard: 'SBC-4',
    opcode: 0x37,
    length: 10,
    fields: [
      bits('REQ_PLIST', 2, 4),
      bits('REQ_GLIST', 2, 3),
      bits('DEFECT LIST FORMAT', 2, 2, 0),
      bytes('ALLOCATION LENGTH', 7, 2),
    ],
    medium: 'read',
    run(_unit, command) {
      const { cdb } = command;
      respond(command, header(cdb[2] as number, 4), readU16(cdb, 7));
    },
  },
  {
    name: 'READ DEFECT DATA (12)',
    standard: 'SBC-4',
    opcode: 0xb7,
    length: 12,
    fields: [
      bits('REQ_PLIST', 1, 4),
      bits('REQ_GLIST', 1, 3),
      bits('DEFECT LIST FORMAT', 1, 2, 0),
      bytes('ADDRESS DESCRIPTOR INDEX', 2, 4),
      bytes('ALLOCATION LENGTH', 6, 4),
    ],
    medium: 'read',
    run(_unit, command) {
      const { cdb } = command;
      respond(command, header(cdb[1] as number, 8), readU32(cdb, 6));
    },
  },
];
