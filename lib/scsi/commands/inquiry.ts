// SPDX-License-Identifier: Apache-2.0
/** INQUIRY and the vital product data pages (SPC-5, SBC-4). */
import type { MaybePromise } from '../../device/data.js';
import { chain } from '../../store/maybe.js';
import { readU16, writeAscii, writeU16, writeU32, writeU64 } from '../bytes.js';
import { bits, bytes, type CommandSpec, refused } from '../command-spec.js';
import { BLOCK_TO_BLOCK, COPY_LIMITS, IDENTIFICATION, OWN_UNIT } from '../copy/parameter-list.js';
import type { LogicalUnit } from '../logical-unit.js';
import { powerConditions } from '../power.js';
import { sense } from '../sense.js';
import { respond } from './respond.js';

/** SAM-5, SPC-4 and SBC-3, no version claimed (SPC-5, VERSION DESCRIPTOR values). */
const VERSION_DESCRIPTORS = [0x00a0, 0x0460, 0x04c0];

function standardInquiry(unit: LogicalUnit): Uint8Array {
  const data = new Uint8Array(96);
  data[1] = unit.removable ? 0x80 : 0;
  data[2] = 0x06; // VERSION: SPC-4
  data[3] = 0x02; // RESPONSE DATA FORMAT
  data[4] = data.length - 5;
  // TPGS: implicit, and explicit where states can be set; 3PC: EXTENDED COPY.
  data[5] = (unit.options.portGroups.set === undefined ? 0x10 : 0x30) | 0x08;
  data[7] = 0x02; // CMDQUE
  writeAscii(data, 8, 8, unit.identity.vendor);
  writeAscii(data, 16, 16, unit.identity.product);
  writeAscii(data, 32, 4, unit.identity.revision);
  for (const [i, version] of VERSION_DESCRIPTORS.entries()) writeU16(data, 58 + 2 * i, version);
  return data;
}

/** A page's contents behind the four header bytes. */
type VpdPage = (unit: LogicalUnit) => MaybePromise<Uint8Array>;

/**
 * Device Identification VPD page (SPC-5): designators by which the disk is recognised on every
 * path.
 */
function deviceIdentification(unit: LogicalUnit): MaybePromise<Uint8Array> {
  const { vendor, product, serial, naa } = unit.identity;
  const t10 = new Uint8Array(24 + serial.length);
  writeAscii(t10, 0, 8, vendor);
  writeAscii(t10, 8, 16, product);
  writeAscii(t10, 24, serial.length, serial);
  // SCSI name strings end in at least one NUL and are a multiple of four long (SPC-5, SCSI name
  // string).
  const name = new Uint8Array(40);
  writeAscii(name, 0, 36, `naa.${naa.toUpperCase()}`);
  return chain(unit.options.portGroups.list(), ([group]) =>
    concat([
      designator(0x1, 0x3, Buffer.from(naa, 'hex')),
      designator(0x2, 0x1, t10),
      designator(0x3, 0x8, name),
      // By which port the command came is not known: the first one stands for all.
      ...(group === undefined
        ? []
        : [
            ...group.ports
              .slice(0, 1)
              .map((port) => designator(0x1, TARGET_PORT | 0x4, word(port))),
            designator(0x1, TARGET_PORT | 0x5, word(group.id)),
          ]),
    ]),
  );
}

/** ASSOCIATION 01b. */
const TARGET_PORT = 0x10;

/** Relative target port identifier and target port group designators: two reserved bytes, two of number. */
function word(value: number): Uint8Array {
  return Uint8Array.of(0, 0, value >>> 8, value & 0xff);
}

/** One designation descriptor (SPC-5). */
function designator(codeSet: number, type: number, value: Uint8Array): Uint8Array {
  return concat([Uint8Array.of(codeSet, type, 0, value.length), value]);
}

/**
 * Extended INQUIRY Data VPD page (SPC-5). Offsets here and below are four less than the standard's.
 */
function extendedInquiry(unit: LogicalUnit): Uint8Array {
  const page = new Uint8Array(0x3c);
  page[1] = 0x01; // SIMPSUP
  page[2] = unit.volatile ? 0x01 : 0; // V_SUP
  return page;
}

/** Mode Page Policy VPD page (SPC-5): every page is shared by all I_T nexuses. */
function modePagePolicy(): Uint8Array {
  return Uint8Array.of(0x3f, 0xff, 0x00, 0x00);
}

/** Block Limits VPD page (SBC-4). */
function blockLimits(unit: LogicalUnit): Uint8Array {
  const page = new Uint8Array(0x3c);
  const { limits, blockSize, store } = unit;
  const inBlocks = (length: number) => Math.min(Math.floor(length / blockSize), 0xffff_ffff);
  page[0] = 0x01; // WSNZ
  page[1] = limits.compareAndWriteBlocks;
  writeU16(page, 2, unit.physicalExponent === 0 ? 0 : 1 << unit.physicalExponent);
  writeU32(page, 4, inBlocks(limits.transfer));
  writeU32(page, 8, inBlocks(store.optimalTransferLength ?? 0));
  if (unit.thin) {
    writeU32(page, 16, limits.unmapBlocks);
    writeU32(page, 20, limits.unmapDescriptors);
    writeU32(page, 24, Math.max(1, inBlocks(store.unmapGranularity ?? blockSize)));
    page[28] = 0x80; // UGAVALID, alignment 0
  }
  writeU64(page, 32, inBlocks(limits.writeSame));
  // Atomic writes: any alignment and any granularity, no boundaries.
  writeU32(page, 40, limits.atomicBlocks);
  return page;
}

/** Block Device Characteristics VPD page (SBC-4). */
function blockDeviceCharacteristics(unit: LogicalUnit): Uint8Array {
  const page = new Uint8Array(0x3c);
  // MEDIUM ROTATION RATE: 1 non-rotating, 0 not reported.
  writeU16(page, 0, unit.store.nonRotational === false ? 0 : 1);
  // WABEREQ and WACEREQ 01b: after a block or cryptographic erase, reads succeed.
  page[3] = (unit.thin ? 0x40 : 0) | (unit.store.cryptoErase === undefined ? 0 : 0x10);
  return page;
}

/** Logical Block Provisioning VPD page (SBC-4). */
function logicalBlockProvisioning(unit: LogicalUnit): Uint8Array {
  // THRESHOLD EXPONENT, where there are thresholds; LBPU, LBPWS, LBPWS10, LBPRZ 001b; PROVISIONING
  // TYPE 2: thin.
  const exponent = unit.store.space === undefined ? 0 : unit.space.exponent;
  return Uint8Array.of(exponent, 0x80 | 0x40 | 0x20 | 0x04, 0x02, 0x00);
}

/** One descriptor of the Third-party Copy VPD page, padded to four bytes. */
function copyDescriptor(type: number, contents: readonly number[]): Uint8Array {
  const length = Math.ceil(contents.length / 4) * 4;
  const descriptor = new Uint8Array(4 + length);
  writeU16(descriptor, 0, type);
  writeU16(descriptor, 2, length);
  descriptor.set(contents, 4);
  return descriptor;
}

/** Third-party Copy VPD page (SPC-5): the commands from the table itself. */
function thirdPartyCopy(unit: LogicalUnit): Uint8Array {
  const commands = [0x83, 0x84].flatMap((opcode) => {
    const actions = unit.commands.at(opcode);
    if (!(actions instanceof Map)) return [];
    const codes = [...actions.keys()].sort((a, b) => a - b);
    return [opcode, codes.length, ...codes];
  });
  const parameters = new Uint8Array(28);
  writeU16(parameters, 4, COPY_LIMITS.cscdDescriptors);
  writeU16(parameters, 6, COPY_LIMITS.segmentDescriptors);
  writeU32(parameters, 8, COPY_LIMITS.descriptorList);
  const general = new Uint8Array(32);
  writeU32(general, 0, COPY_LIMITS.concurrent);
  writeU32(general, 4, COPY_LIMITS.concurrent);
  writeU32(general, 8, COPY_LIMITS.segment);
  general[12] = Math.log2(unit.blockSize);
  return concat([
    copyDescriptor(0x0001, [commands.length, ...commands]),
    copyDescriptor(0x0004, [...parameters]),
    copyDescriptor(0x0008, [2, BLOCK_TO_BLOCK, IDENTIFICATION]),
    copyDescriptor(0x000c, [0, 2, OWN_UNIT >>> 8, OWN_UNIT & 0xff]),
    copyDescriptor(0x8001, [...general]),
  ]);
}

const VPD_PAGES: readonly {
  code: number;
  contents: VpdPage;
  available?: (unit: LogicalUnit) => boolean;
}[] = [
  { code: 0x00, contents: (unit) => Uint8Array.from(availablePages(unit), (page) => page.code) },
  { code: 0x80, contents: (unit) => Buffer.from(unit.identity.serial, 'latin1') },
  { code: 0x83, contents: deviceIdentification },
  { code: 0x86, contents: extendedInquiry },
  { code: 0x87, contents: modePagePolicy },
  { code: 0x8a, contents: powerConditions },
  { code: 0x8f, contents: thirdPartyCopy },
  { code: 0xb0, contents: blockLimits },
  { code: 0xb1, contents: blockDeviceCharacteristics },
  { code: 0xb2, contents: logicalBlockProvisioning, available: (unit) => unit.thin },
];

function availablePages(unit: LogicalUnit) {
  return VPD_PAGES.filter((page) => page.available?.(unit) ?? true);
}

function vpdPage(unit: LogicalUnit, code: number): MaybePromise<Uint8Array> {
  const page = availablePages(unit).find((candidate) => candidate.code === code);
  if (page === undefined) throw sense.invalidFieldInCdb({ byte: 2 });
  return chain(page.contents(unit), (contents) => {
    const data = new Uint8Array(4 + contents.length);
    data[1] = code;
    writeU16(data, 2, contents.length);
    data.set(contents, 4);
    return data;
  });
}

function concat(parts: readonly Uint8Array[]): Uint8Array {
  return Buffer.concat(parts);
}

export const inquiryCommands: readonly CommandSpec[] = [
  {
    name: 'INQUIRY',
    standard: 'SPC-5',
    opcode: 0x12,
    length: 6,
    fields: [
      refused('CMDDT', 1, 1),
      bits('EVPD', 1, 0),
      bytes('PAGE CODE', 2, 1),
      bytes('ALLOCATION LENGTH', 3, 2),
    ],
    medium: 'none',
    ignoresAttention: true,
    whileHindered: true,
    run(unit, command) {
      const { cdb } = command;
      const evpd = ((cdb[1] as number) & 0x01) !== 0;
      const code = cdb[2] as number;
      // SPC-5, INQUIRY: a page code without EVPD is refused.
      if (!evpd && code !== 0) throw sense.invalidFieldInCdb({ byte: 2 });
      return chain(evpd ? vpdPage(unit, code) : standardInquiry(unit), (data) =>
        respond(command, data, readU16(cdb, 3)),
      );
    },
  },
];
