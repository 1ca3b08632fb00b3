// SPDX-License-Identifier: Apache-2.0
/**
 * EXTENDED COPY parameter lists (SPC-4, EXTENDED COPY(LID1) and EXTENDED COPY(LID4)), taken apart and checked
 * as far as they speak for themselves: which logical units they name, and whether the blocks exist, is the
 * copy manager's to find out. Pure.
 */
import { readU16, readU24, readU32, readU64 } from '../bytes.js';
import { sense } from '../sense.js';

/** What RECEIVE COPY OPERATING PARAMETERS and the Third-party Copy VPD page tell, and decoding enforces. */
export const COPY_LIMITS = {
  cscdDescriptors: 16,
  segmentDescriptors: 256,
  /** Bytes of both descriptor lists together. */
  descriptorList: 16 * 32 + 256 * 28,
  /** Bytes of one segment: 65535 blocks of 4096 bytes, what a segment descriptor can say. */
  segment: 0xffff * 4096,
  /** Copies of a logical unit at a time. */
  concurrent: 32,
} as const;

/** Descriptor type codes that are implemented, ascending. */
export const BLOCK_TO_BLOCK = 0x02;
export const IDENTIFICATION = 0xe4;

/** CSCD descriptor ID of the logical unit that received the command. */
export const OWN_UNIT = 0xffff;

const HEADER_LENGTH = { 1: 16, 4: 48 } as const;
const CSCD_LENGTH = 32;
const SEGMENT_LENGTH = 28;

/** A copy source or copy destination, by the designator of its Device Identification VPD page. */
export interface CopyUnit {
  /** DESIGNATOR TYPE: 3 for NAA. */
  readonly type: number;
  readonly designator: Uint8Array;
  /** DISK BLOCK LENGTH. */
  readonly blockSize: number;
}

/** Copy `blocks` blocks from one unit to another. */
export interface CopySegment {
  /** Indexes into `units`, or `OWN_UNIT`. */
  readonly source: number;
  readonly destination: number;
  readonly blocks: number;
  /** DC: `blocks` are the destination's, not the source's. */
  readonly countsDestination: boolean;
  readonly sourceLba: number;
  readonly destinationLba: number;
}

export interface CopyRequest {
  /** LIST IDENTIFIER, one byte or four. */
  readonly listId: number;
  /** LIST ID USAGE 11b: none, and no status is kept. */
  readonly anonymous: boolean;
  /** IMMED: answered before the copy is done. LID4 only. */
  readonly immediate: boolean;
  readonly units: readonly CopyUnit[];
  readonly segments: readonly CopySegment[];
}

/**
 * @param form of the command's list identifier: one byte (LID1) or four (LID4).
 * @throws SenseError ILLEGAL REQUEST
 */
export function decodeCopyRequest(list: Uint8Array, form: 1 | 4): CopyRequest {
  const headerLength = HEADER_LENGTH[form];
  if (list.length < headerLength) throw sense.parameterListLengthError();
  const lid4 = form === 4;
  if (lid4) {
    // PARAMETER LIST FORMAT 01h; a header CSCD descriptor of 32 bytes, type FFh, which tells nothing else.
    if (list[0] !== 0x01) throw sense.invalidFieldInParameterList({ byte: 0 });
    if (readU16(list, 2) !== 0x20) throw sense.invalidFieldInParameterList({ byte: 2 });
    if (list[16] !== 0xff) throw sense.invalidFieldInParameterList({ byte: 16 });
  }
  const usage = ((list[1] as number) >>> 3) & 0x03;
  const listId = lid4 ? readU32(list, 20) : (list[0] as number);
  if (usage === 3 && listId !== 0) throw sense.invalidFieldInParameterList({ byte: lid4 ? 20 : 0 });
  if (usage === 1) throw sense.invalidFieldInParameterList({ byte: 1, bit: 4 });
  const unitsLength = readU16(list, lid4 ? 42 : 2);
  const segmentsLength = lid4 ? readU16(list, 44) : readU32(list, 8);
  const inlineLength = lid4 ? readU16(list, 46) : readU32(list, 12);

  if (unitsLength + segmentsLength > COPY_LIMITS.descriptorList) {
    throw sense.parameterListLengthError();
  }
  if (inlineLength !== 0) throw sense.inlineDataLengthExceeded();
  if (headerLength + unitsLength + segmentsLength > list.length) {
    throw sense.parameterListLengthError();
  }
  const segmentsAt = headerLength + unitsLength;
  const units = decodeUnits(list, headerLength, segmentsAt);
  const segments = decodeSegments(list, segmentsAt, segmentsAt + segmentsLength);
  const immediate = lid4 && ((list[15] as number) & 0x01) !== 0;
  return { listId, anonymous: usage === 3, immediate, units, segments };
}

function decodeUnits(list: Uint8Array, start: number, end: number): CopyUnit[] {
  const units: CopyUnit[] = [];
  for (let at = start; at < end; at += CSCD_LENGTH) {
    if (list[at] !== IDENTIFICATION) throw sense.unsupportedCscdDescriptor();
    if (at + CSCD_LENGTH > end) throw sense.parameterListLengthError();
    if (units.length === COPY_LIMITS.cscdDescriptors) throw sense.tooManyCscdDescriptors();
    // Direct access block devices only. LU ID TYPE and NUL are obsolete or ignored for this type.
    if (((list[at + 1] as number) & 0x1f) !== 0) {
      throw sense.invalidFieldInParameterList({ byte: at + 1, bit: 4 });
    }
    const length = list[at + 7] as number;
    if (length > 20) throw sense.invalidFieldInParameterList({ byte: at + 7 });
    units.push({
      type: (list[at + 5] as number) & 0x0f,
      designator: list.slice(at + 8, at + 8 + length),
      blockSize: readU24(list, at + 29),
    });
  }
  return units;
}

function decodeSegments(list: Uint8Array, start: number, end: number): CopySegment[] {
  const segments: CopySegment[] = [];
  for (let at = start; at < end; at += SEGMENT_LENGTH) {
    if (list[at] !== BLOCK_TO_BLOCK) throw sense.unsupportedSegmentDescriptor();
    if (at + SEGMENT_LENGTH > end) throw sense.parameterListLengthError();
    if (segments.length === COPY_LIMITS.segmentDescriptors) throw sense.tooManySegmentDescriptors();
    if (readU16(list, at + 2) !== SEGMENT_LENGTH - 4) {
      throw sense.invalidFieldInParameterList({ byte: at + 2 });
    }
    segments.push({
      source: readU16(list, at + 4),
      destination: readU16(list, at + 6),
      blocks: readU16(list, at + 10),
      countsDestination: ((list[at + 1] as number) & 0x02) !== 0,
      sourceLba: readU64(list, at + 12),
      destinationLba: readU64(list, at + 20),
    });
  }
  return segments;
}
