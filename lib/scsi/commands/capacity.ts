// SPDX-License-Identifier: Apache-2.0
/** Size and provisioning of the medium: READ CAPACITY, GET LBA STATUS. */
import type { BlockExtent } from '../../store/block-store.js';
import { chain } from '../../store/maybe.js';
import { readU32, readU64, writeU16, writeU32, writeU64 } from '../bytes.js';
import { bytes, type CommandSpec, refused } from '../command-spec.js';
import { type LogicalUnit, StoreRequest } from '../logical-unit.js';
import { sense } from '../sense.js';
import { respond } from './respond.js';

/** PROVISIONING STATUS (SBC-4, GET LBA STATUS). */
const PROVISIONING = { data: 0, zero: 0, hole: 1 } as const;

/** Descriptors one GET LBA STATUS answers at most, however long its buffer. */
const MAX_STATUS_DESCRIPTORS = 1024;

function statusDescriptors(
  unit: LogicalUnit,
  lba: number,
  most: number,
  extents: readonly BlockExtent[],
): Uint8Array {
  const runs: { start: number; length: number; status: number }[] = [];
  let at = lba;
  for (const extent of extents) {
    const length = Math.min(Math.floor(extent.length / unit.blockSize), unit.blocks - at);
    if (length <= 0) continue;
    const status = PROVISIONING[extent.status];
    const last = runs.at(-1);
    if (last?.status === status) last.length += length;
    else runs.push({ start: at, length, status });
    at += length;
  }
  const count = Math.min(runs.length, most);
  const data = new Uint8Array(8 + 16 * count);
  writeU32(data, 0, data.length - 4);
  for (const [i, run] of runs.slice(0, count).entries()) {
    writeU64(data, 8 + 16 * i, run.start);
    writeU32(data, 16 + 16 * i, Math.min(run.length, 0xffff_ffff));
    data[20 + 16 * i] = run.status;
    // A run cut at 32 bits must be the last one told: descriptors are contiguous.
    if (run.length > 0xffff_ffff) {
      writeU32(data, 0, 4 + 16 * (i + 1));
      return data.subarray(0, 8 + 16 * (i + 1));
    }
  }
  return data;
}

export const capacityCommands: readonly CommandSpec[] = [
  {
    name: 'READ CAPACITY (10)',
    standard: 'SBC-4',
    opcode: 0x25,
    length: 10,
    fields: [bytes('LOGICAL BLOCK ADDRESS', 2, 4), refused('PMI', 8, 0)],
    medium: 'read',
    run(unit, command) {
      // SBC-2: without PMI the address must be zero.
      if (readU32(command.cdb, 2) !== 0) throw sense.invalidFieldInCdb({ byte: 2 });
      const data = new Uint8Array(8);
      writeU32(data, 0, Math.min(unit.blocks - 1, 0xffff_ffff));
      writeU32(data, 4, unit.blockSize);
      respond(command, data, data.length);
    },
  },
  {
    name: 'READ CAPACITY (16)',
    standard: 'SBC-4',
    opcode: 0x9e,
    serviceAction: 0x10,
    length: 16,
    fields: [bytes('ALLOCATION LENGTH', 10, 4), refused('PMI', 14, 0)],
    medium: 'read',
    run(unit, command) {
      const data = new Uint8Array(32);
      writeU64(data, 0, unit.blocks - 1);
      writeU32(data, 8, unit.blockSize);
      data[13] = unit.physicalExponent;
      // LBPME and LBPRZ; LOWEST ALIGNED LOGICAL BLOCK ADDRESS is 0.
      writeU16(data, 14, unit.thin ? 0xc000 : 0);
      respond(command, data, readU32(command.cdb, 10));
    },
  },
  {
    name: 'GET LBA STATUS (16)',
    standard: 'SBC-4',
    opcode: 0x9e,
    serviceAction: 0x12,
    length: 16,
    fields: [
      bytes('STARTING LOGICAL BLOCK ADDRESS', 2, 8),
      bytes('ALLOCATION LENGTH', 10, 4),
      refused('REPORT TYPE', 14, 7, 0),
    ],
    medium: 'read',
    run(unit, command) {
      const { cdb } = command;
      const lba = readU64(cdb, 2);
      if (lba >= unit.blocks) throw sense.lbaOutOfRange();
      const allocation = readU32(cdb, 10);
      const most = Math.min(Math.max(1, Math.ceil((allocation - 8) / 16)), MAX_STATUS_DESCRIPTORS);
      const length = (unit.blocks - lba) * unit.blockSize;
      // Without blockStatus every block is "mapped or unknown" (status 0h).
      const extents = unit.store.blockStatus?.(
        lba * unit.blockSize,
        length,
        new StoreRequest(command),
      ) ?? [{ length, status: 'data' as const }];
      return chain(extents, (found) =>
        respond(command, statusDescriptors(unit, lba, most, found), allocation),
      );
    },
  },
];
