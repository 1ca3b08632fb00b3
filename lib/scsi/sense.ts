// SPDX-License-Identifier: Apache-2.0
/**
 * What an initiator sees when a command fails. A `SenseError` is thrown by command code and by
 * stores and travels to the initiator as status and sense data; every other error is translated by
 * `toSense`. Encoding and decoding follow SPC-5 4.4 (fixed and descriptor format); nothing here
 * keeps state.
 */
import { Status } from '../device/handler.js';
import { errnoOf, TcmuError } from '../errors.js';
import { readU16, readU32, readU64, writeU16, writeU32, writeU64 } from './bytes.js';

/** Sense keys (SPC-5 4.4). */
export const SenseKey = {
  /** Nothing to report, or only progress. */
  NO_SENSE: 0x0,
  /** Done, after the device had to help itself. */
  RECOVERED_ERROR: 0x1,
  /** The logical unit can't be reached now. */
  NOT_READY: 0x2,
  /** The data is bad, or could not be written. */
  MEDIUM_ERROR: 0x3,
  /** The device itself failed. */
  HARDWARE_ERROR: 0x4,
  /** The CDB or its parameters are wrong; sending it again won't help. */
  ILLEGAL_REQUEST: 0x5,
  /** Something changed since the last command; send it again. */
  UNIT_ATTENTION: 0x6,
  /** The medium is protected against this. */
  DATA_PROTECT: 0x7,
  /** Blank medium, or the end of the data (tape, write-once). */
  BLANK_CHECK: 0x8,
  /** Up to the vendor. */
  VENDOR_SPECIFIC: 0x9,
  /** EXTENDED COPY failed at its source or destination. */
  COPY_ABORTED: 0xa,
  /** The device gave the command up; sending it again may help. */
  ABORTED_COMMAND: 0xb,
  /** The end of the medium was reached with data left (tape). */
  VOLUME_OVERFLOW: 0xd,
  /** The data differs from the medium's. */
  MISCOMPARE: 0xe,
  /** Done, with information that is not an error. */
  COMPLETED: 0xf,
} as const;

const KEY_NAMES = new Map<number, string>(
  Object.entries(SenseKey).map(([name, key]) => [key, name.replaceAll('_', ' ')]),
);

/**
 * Which byte, and where known which bit, of the CDB or parameter list is wrong (SPC-5, field
 * pointer sense key specific data).
 */
export interface FieldPointer {
  /** Byte of the CDB or parameter list, from 0. */
  readonly byte: number;
  /** Most significant bit of the field, 7 to 0; left out when the whole byte is meant. */
  readonly bit?: number | undefined;
}

/** The parts of sense data behind key and additional sense code. */
export interface SenseDetails {
  /** INFORMATION: for most block commands an LBA, for MISCOMPARE an offset. At most 2^53 - 1. */
  readonly information?: number | undefined;
  /** COMMAND-SPECIFIC INFORMATION. At most 2^53 - 1. */
  readonly commandSpecific?: number | undefined;
  /** The wrong field of an ILLEGAL REQUEST. */
  readonly field?:
    | (FieldPointer & {
        /** Which of the two has the wrong field. */ readonly in: 'cdb' | 'parameters';
      })
    | undefined;
  /** PROGRESS INDICATION of a NOT READY or NO SENSE, 0 to 65535 of 65536. */
  readonly progress?: number | undefined;
  /** About an earlier command that was answered GOOD already (SPC-5, deferred errors). */
  readonly deferred?: boolean | undefined;
}

/** Sense data, taken apart. */
export interface Sense extends SenseDetails {
  /** SENSE KEY, one of `SenseKey`. */
  readonly key: number;
  /** ADDITIONAL SENSE CODE, 0 to 255. */
  readonly asc: number;
  /** ADDITIONAL SENSE CODE QUALIFIER, 0 to 255. */
  readonly ascq: number;
}

/** Fixed format fits everywhere; descriptor format also carries 64-bit INFORMATION. */
export type SenseFormat = 'fixed' | 'descriptor';

/** Also takes the `cause` that only this side sees. */
export interface SenseErrorOptions extends SenseDetails {
  /** SAM-5 5.3.1 status; default CHECK CONDITION. Any other status goes without sense data. */
  readonly status?: number | undefined;
  /** The failure behind it. It stays on this side, and makes the device emit `error`. */
  readonly cause?: unknown;
}

/**
 * A failure as the initiator sees it. Code: `ERR_TCMU_SENSE`. Make one with the factories in
 * `sense`.
 */
export class SenseError extends TcmuError implements Sense {
  /** SAM-5 5.3.1 status. */
  readonly status: number;
  /** SENSE KEY, one of `SenseKey`. */
  readonly key: number;
  /** ADDITIONAL SENSE CODE, 0 to 255. */
  readonly asc: number;
  /** ADDITIONAL SENSE CODE QUALIFIER, 0 to 255. */
  readonly ascq: number;
  readonly information: number | undefined;
  readonly commandSpecific: number | undefined;
  readonly field: SenseDetails['field'];
  readonly progress: number | undefined;
  readonly deferred: boolean | undefined;

  /**
   * @param key sense key, see `SenseKey`.
   * @param asc ADDITIONAL SENSE CODE, 0 to 255 (SPC-5, ASC and ASCQ assignments).
   * @param ascq its qualifier, 0 to 255.
   * @param text the code's name in the standard.
   */
  constructor(
    key: number,
    asc: number,
    ascq: number,
    text: string,
    options: SenseErrorOptions = {},
  ) {
    const code = `${hex(key, 1)}/${hex(asc, 2)}/${hex(ascq, 2)}`;
    super(
      'ERR_TCMU_SENSE',
      `${KEY_NAMES.get(key) ?? 'SENSE'}: ${text} (${code})`,
      options.cause === undefined ? {} : { cause: options.cause },
    );
    this.status = options.status ?? Status.CHECK_CONDITION;
    this.key = key;
    this.asc = asc;
    this.ascq = ascq;
    this.information = options.information;
    this.commandSpecific = options.commandSpecific;
    this.field = options.field;
    this.progress = options.progress;
    this.deferred = options.deferred;
  }

  /** The sense data; for a status other than CHECK CONDITION nothing. */
  encode(format: SenseFormat = 'fixed'): Uint8Array | undefined {
    return this.status === Status.CHECK_CONDITION ? encodeSense(this, format) : undefined;
  }

  /** Whether `error` is one, also from another copy of this package. */
  static override is(error: unknown): error is SenseError {
    return TcmuError.is(error) && error.code === 'ERR_TCMU_SENSE';
  }
}

function hex(value: number, digits: number): string {
  return value.toString(16).padStart(digits, '0');
}

/** SENSE KEY SPECIFIC, 3 bytes at `at`; false when there is nothing to say. */
function putKeySpecific(bytes: Uint8Array, at: number, sense: Sense): boolean {
  if (sense.field !== undefined) {
    const { byte, bit } = sense.field;
    bytes[at] =
      0x80 | (sense.field.in === 'cdb' ? 0x40 : 0) | (bit === undefined ? 0 : 0x08 | (bit & 7));
    writeU16(bytes, at + 1, byte);
    return true;
  }
  if (sense.progress !== undefined) {
    bytes[at] = 0x80;
    writeU16(bytes, at + 1, sense.progress);
    return true;
  }
  return false;
}

/** Sense data for the initiator (SPC-5 4.4, descriptor and fixed format). */
export function encodeSense(sense: Sense, format: SenseFormat = 'fixed'): Uint8Array {
  return format === 'fixed' ? encodeFixed(sense) : encodeDescriptors(sense);
}

function encodeFixed(sense: Sense): Uint8Array {
  const bytes = new Uint8Array(18);
  bytes[0] = sense.deferred ? 0x71 : 0x70;
  bytes[2] = sense.key;
  if (sense.information !== undefined && sense.information <= 0xffff_ffff) {
    bytes[0] |= 0x80;
    writeU32(bytes, 3, sense.information);
  }
  bytes[7] = bytes.length - 8;
  // SPC-5, fixed format: a value that takes more than four bytes is not reported in this format.
  if (sense.commandSpecific !== undefined && sense.commandSpecific <= 0xffff_ffff) {
    writeU32(bytes, 8, sense.commandSpecific);
  }
  bytes[12] = sense.asc;
  bytes[13] = sense.ascq;
  putKeySpecific(bytes, 15, sense);
  return bytes;
}

function encodeDescriptors(sense: Sense): Uint8Array {
  const bytes = new Uint8Array(8 + 12 + 12 + 8);
  bytes[0] = sense.deferred ? 0x73 : 0x72;
  bytes[1] = sense.key;
  bytes[2] = sense.asc;
  bytes[3] = sense.ascq;
  let at = 8;
  if (sense.information !== undefined) {
    bytes.set([0x00, 0x0a, 0x80], at);
    writeU64(bytes, at + 4, sense.information);
    at += 12;
  }
  if (sense.commandSpecific !== undefined) {
    bytes.set([0x01, 0x0a], at);
    writeU64(bytes, at + 4, sense.commandSpecific);
    at += 12;
  }
  if (putKeySpecific(bytes, at + 4, sense)) {
    bytes.set([0x02, 0x06], at);
    at += 8;
  }
  bytes[7] = at - 8;
  return bytes.subarray(0, at);
}

/** Takes sense data apart; undefined when it is too short or of no known format. */
export function decodeSense(bytes: Uint8Array): Sense | undefined {
  const code = (bytes[0] ?? 0) & 0x7f;
  const deferred = code === 0x71 || code === 0x73 ? true : undefined;
  if (code === 0x70 || code === 0x71)
    return bytes.length < 8 ? undefined : decodeFixed(bytes, deferred);
  if (code === 0x72 || code === 0x73) {
    return bytes.length < 8 ? undefined : decodeDescriptors(bytes, deferred);
  }
  return undefined;
}

function keySpecific(bytes: Uint8Array, at: number, key: number): SenseDetails {
  const first = bytes[at] ?? 0;
  if (!(first & 0x80) || at + 3 > bytes.length) return {};
  const value = readU16(bytes, at + 1);
  if (key === SenseKey.ILLEGAL_REQUEST) {
    const bit = first & 0x08 ? first & 0x07 : undefined;
    return { field: { in: first & 0x40 ? 'cdb' : 'parameters', byte: value, bit } };
  }
  return key === SenseKey.NOT_READY || key === SenseKey.NO_SENSE ? { progress: value } : {};
}

function decodeFixed(bytes: Uint8Array, deferred: true | undefined): Sense {
  const key = (bytes[2] as number) & 0x0f;
  // Bytes behind ADDITIONAL SENSE LENGTH are not sense data.
  const sense = bytes.subarray(0, Math.min(bytes.length, 8 + (bytes[7] as number)));
  return {
    key,
    asc: sense[12] ?? 0,
    ascq: sense[13] ?? 0,
    deferred,
    information: (bytes[0] as number) & 0x80 ? readU32(bytes, 3) : undefined,
    commandSpecific: sense.length >= 12 && readU32(sense, 8) !== 0 ? readU32(sense, 8) : undefined,
    ...keySpecific(sense, 15, key),
  };
}

function decodeDescriptors(bytes: Uint8Array, deferred: true | undefined): Sense {
  const key = (bytes[1] as number) & 0x0f;
  const sense = bytes.subarray(0, Math.min(bytes.length, 8 + (bytes[7] as number)));
  let details: SenseDetails = {};
  for (let at = 8; at + 2 <= sense.length; at += 2 + (sense[at + 1] as number)) {
    const end = at + 2 + (sense[at + 1] as number);
    if (end > sense.length) break;
    const type = sense[at];
    if (type === 0x00 && end - at === 12 && (sense[at + 2] as number) & 0x80) {
      details = { ...details, information: readU64(sense, at + 4) };
    } else if (type === 0x01 && end - at === 12) {
      details = { ...details, commandSpecific: readU64(sense, at + 4) };
    } else if (type === 0x02 && end - at === 8) {
      details = { ...details, ...keySpecific(sense, at + 4, key) };
    }
  }
  return { key, asc: bytes[2] as number, ascq: bytes[3] as number, deferred, ...details };
}

const K = SenseKey;

/** A parameterless factory of one code. */
function code(key: number, asc: number, ascq: number, text: string) {
  return (options?: SenseErrorOptions): SenseError => new SenseError(key, asc, ascq, text, options);
}

/**
 * The failures of a block device by the standard's names (SPC-5, ASC and ASCQ assignments). Each
 * call makes a `SenseError`; the argument, where there is one, adds details or the `cause`.
 */
export const sense = {
  /** 5/20/00: the device has no such command. */
  invalidOperationCode: () =>
    new SenseError(K.ILLEGAL_REQUEST, 0x20, 0x00, 'INVALID COMMAND OPERATION CODE', {
      field: { in: 'cdb', byte: 0 },
    }),
  /** 5/24/00: a field of the CDB is wrong; the pointer says which. */
  invalidFieldInCdb: (pointer?: FieldPointer) =>
    new SenseError(K.ILLEGAL_REQUEST, 0x24, 0x00, 'INVALID FIELD IN CDB', {
      field: pointer && { in: 'cdb', ...pointer },
    }),
  /** 5/26/00: a field of the data sent is wrong; the pointer says which. */
  invalidFieldInParameterList: (pointer?: FieldPointer) =>
    new SenseError(K.ILLEGAL_REQUEST, 0x26, 0x00, 'INVALID FIELD IN PARAMETER LIST', {
      field: pointer && { in: 'parameters', ...pointer },
    }),
  /** 5/1a/00: the data sent is shorter than it says. */
  parameterListLengthError: code(K.ILLEGAL_REQUEST, 0x1a, 0x00, 'PARAMETER LIST LENGTH ERROR'),
  /**
   * The Data-Out Buffer is not as long as the CDB needs it (0Eh/03h; FCP-4 and libiscsi's suite use
   * it so).
   */
  invalidFieldInInformationUnit: code(
    K.ILLEGAL_REQUEST,
    0x0e,
    0x03,
    'INVALID FIELD IN COMMAND INFORMATION UNIT',
  ),
  /** 5/21/00: beyond the last block. */
  lbaOutOfRange: code(K.ILLEGAL_REQUEST, 0x21, 0x00, 'LOGICAL BLOCK ADDRESS OUT OF RANGE'),
  /** 5/39/00: mode parameters can't be saved. */
  savingParametersNotSupported: code(
    K.ILLEGAL_REQUEST,
    0x39,
    0x00,
    'SAVING PARAMETERS NOT SUPPORTED',
  ),
  /** 5/53/02: PREVENT ALLOW MEDIUM REMOVAL holds the medium. */
  mediumRemovalPrevented: code(K.ILLEGAL_REQUEST, 0x53, 0x02, 'MEDIUM REMOVAL PREVENTED'),
  /** 7/27/00: a read-only disk. */
  writeProtected: code(K.DATA_PROTECT, 0x27, 0x00, 'WRITE PROTECTED'),
  /** 7/27/02: read-only by the SWP bit of the control mode page. */
  softwareWriteProtected: code(K.DATA_PROTECT, 0x27, 0x02, 'LOGICAL UNIT SOFTWARE WRITE PROTECTED'),
  /** Thin provisioning ran out of space (SBC-4, resource exhaustion). */
  spaceAllocationFailedWriteProtect: code(
    K.DATA_PROTECT,
    0x27,
    0x07,
    'SPACE ALLOCATION FAILED WRITE PROTECT',
  ),
  /** 3/11/00: what was stored can't be read. */
  unrecoveredReadError: code(K.MEDIUM_ERROR, 0x11, 0x00, 'UNRECOVERED READ ERROR'),
  /** 3/0c/00: it could not be stored. */
  writeError: code(K.MEDIUM_ERROR, 0x0c, 0x00, 'WRITE ERROR'),
  /** MEDIUM ERROR with the code that fits the direction. */
  mediumError: (operation: 'read' | 'write', options?: SenseErrorOptions) =>
    operation === 'read' ? sense.unrecoveredReadError(options) : sense.writeError(options),
  /** 4/44/00: the handler or what is behind it failed; what an unknown error becomes. */
  hardwareError: code(K.HARDWARE_ERROR, 0x44, 0x00, 'INTERNAL TARGET FAILURE'),
  /**
   * e/1d/00: the data differs.
   * @param offset bytes from the start of the Data-Out Buffer to the first that differs (SBC-4,
   *   COMPARE AND WRITE).
   */
  miscompare: (offset: number) =>
    new SenseError(K.MISCOMPARE, 0x1d, 0x00, 'MISCOMPARE DURING VERIFY OPERATION', {
      information: offset,
    }),
  /** b/00/00: given up; the initiator may send it again. */
  abortedCommand: code(K.ABORTED_COMMAND, 0x00, 0x00, 'NO ADDITIONAL SENSE INFORMATION'),
  /** 2/04/01: try again later. */
  notReadyBecomingReady: code(
    K.NOT_READY,
    0x04,
    0x01,
    'LOGICAL UNIT IS IN PROCESS OF BECOMING READY',
  ),
  /** 2/04/04: FORMAT UNIT is running; `progress` says how far. */
  formatInProgress: code(K.NOT_READY, 0x04, 0x04, 'LOGICAL UNIT NOT READY, FORMAT IN PROGRESS'),
  /** 2/04/1b: SANITIZE is running; `progress` says how far. */
  sanitizeInProgress: code(K.NOT_READY, 0x04, 0x1b, 'LOGICAL UNIT NOT READY, SANITIZE IN PROGRESS'),
  /** A FORMAT UNIT failed; the medium must be formatted again. */
  mediumFormatCorrupted: code(K.MEDIUM_ERROR, 0x31, 0x00, 'MEDIUM FORMAT CORRUPTED'),
  /** 3/31/03: SANITIZE failed; until it is repeated nothing can be read. */
  sanitizeCommandFailed: code(K.MEDIUM_ERROR, 0x31, 0x03, 'SANITIZE COMMAND FAILED'),
  /** 2/08/00: what is behind the device can't be reached. */
  notReadyCommunicationFailure: code(K.NOT_READY, 0x08, 0x00, 'LOGICAL UNIT COMMUNICATION FAILURE'),
  /** 2/08/01: what is behind the device did not answer in time. */
  notReadyCommunicationTimeout: code(
    K.NOT_READY,
    0x08,
    0x01,
    'LOGICAL UNIT COMMUNICATION TIME-OUT',
  ),
  /** 2/3a/00: nothing is inserted. */
  mediumNotPresent: code(K.NOT_READY, 0x3a, 0x00, 'MEDIUM NOT PRESENT'),
  /** 6/29/00: the first command after power on or a reset. */
  powerOnOccurred: code(
    K.UNIT_ATTENTION,
    0x29,
    0x00,
    'POWER ON, RESET, OR BUS DEVICE RESET OCCURRED',
  ),
  /** 6/2a/09: READ CAPACITY has a new answer. */
  capacityDataHasChanged: code(K.UNIT_ATTENTION, 0x2a, 0x09, 'CAPACITY DATA HAS CHANGED'),
  /** 6/2a/01: another initiator changed mode parameters. */
  modeParametersChanged: code(K.UNIT_ATTENTION, 0x2a, 0x01, 'MODE PARAMETERS CHANGED'),
  /** 6/2a/06: REPORT TARGET PORT GROUPS has a new answer. */
  asymmetricAccessStateChanged: code(
    K.UNIT_ATTENTION,
    0x2a,
    0x06,
    'ASYMMETRIC ACCESS STATE CHANGED',
  ),
  /** 6/38/07: a thin disk is running out of space. */
  softThresholdReached: code(
    K.UNIT_ATTENTION,
    0x38,
    0x07,
    'THIN PROVISIONING SOFT THRESHOLD REACHED',
  ),
  /** A copy (EXTENDED COPY) can't be processed as its parameter list says. */
  tooManyCscdDescriptors: code(K.ILLEGAL_REQUEST, 0x26, 0x06, 'TOO MANY TARGET DESCRIPTORS'),
  /** 5/26/07: EXTENDED COPY names a source or destination in a way that is not supported. */
  unsupportedCscdDescriptor: code(
    K.ILLEGAL_REQUEST,
    0x26,
    0x07,
    'UNSUPPORTED TARGET DESCRIPTOR TYPE CODE',
  ),
  /** 5/26/08: EXTENDED COPY has more segments than are taken. */
  tooManySegmentDescriptors: code(K.ILLEGAL_REQUEST, 0x26, 0x08, 'TOO MANY SEGMENT DESCRIPTORS'),
  /** 5/26/09: EXTENDED COPY has a segment of an unsupported kind. */
  unsupportedSegmentDescriptor: code(
    K.ILLEGAL_REQUEST,
    0x26,
    0x09,
    'UNSUPPORTED SEGMENT DESCRIPTOR TYPE CODE',
  ),
  /** 5/26/0b: EXTENDED COPY carries data of its own, which is not supported. */
  inlineDataLengthExceeded: code(K.ILLEGAL_REQUEST, 0x26, 0x0b, 'INLINE DATA LENGTH EXCEEDED'),
  /** 5/00/16: a copy of that identifier is still running. */
  operationInProgress: code(K.ILLEGAL_REQUEST, 0x00, 0x16, 'OPERATION IN PROGRESS'),
  /** a/0d/02: the other disk of a copy is not served here, or not to this initiator. */
  copyTargetNotReachable: code(K.COPY_ABORTED, 0x0d, 0x02, 'COPY TARGET DEVICE NOT REACHABLE'),
  /**
   * a/00/00: EXTENDED COPY failed.
   * @param segment index of the segment descriptor that failed (SPC-5, COMMAND-SPECIFIC INFORMATION).
   * @param cause why; it stays on this side.
   */
  copyAborted: (segment: number, cause?: unknown) =>
    new SenseError(K.COPY_ABORTED, 0x00, 0x00, 'NO ADDITIONAL SENSE INFORMATION', {
      commandSpecific: segment,
      cause,
    }),
  /** BUSY status: try again later. No sense data. */
  busy: (options?: SenseErrorOptions) =>
    new SenseError(K.NO_SENSE, 0, 0, 'BUSY', { ...options, status: Status.BUSY }),
} as const;

const NO_SPACE = new Set(['ENOSPC', 'EDQUOT', 'EFBIG']);
const NOT_PERMITTED = new Set(['EROFS', 'EACCES', 'EPERM']);
const UNREACHABLE = new Set([
  'ECONNREFUSED',
  'ECONNRESET',
  'ECONNABORTED',
  'EHOSTDOWN',
  'EHOSTUNREACH',
  'ENETDOWN',
  'ENETUNREACH',
  'ENETRESET',
  'ENOTCONN',
  'ENOTFOUND',
  'EPIPE',
]);

/**
 * What the initiator is told about an error that a store or handler threw. A `SenseError` is passed
 * on; an errno is translated; anything else is HARDWARE ERROR / INTERNAL TARGET FAILURE. The
 * original stays as `cause`.
 * @param operation what the command was doing to the medium: chooses between the MEDIUM ERRORs, and
 *   only a write can be refused as WRITE PROTECTED or for want of space.
 */
export function toSense(error: unknown, operation: 'read' | 'write' = 'read'): SenseError {
  if (SenseError.is(error)) return error;
  const options = { cause: error };
  const errno = errnoOf(error);
  if (errno !== undefined) {
    if (operation === 'write' && NO_SPACE.has(errno)) {
      return sense.spaceAllocationFailedWriteProtect(options);
    }
    if (operation === 'write' && NOT_PERMITTED.has(errno)) return sense.writeProtected(options);
    if (errno === 'EIO') return sense.mediumError(operation, options);
    if (errno === 'ETIMEDOUT') return sense.notReadyCommunicationTimeout(options);
    if (UNREACHABLE.has(errno)) return sense.notReadyCommunicationFailure(options);
    if (errno === 'EAGAIN' || errno === 'EBUSY') return sense.busy(options);
    if (errno === 'ECANCELED') return sense.abortedCommand(options);
  }
  if (TcmuError.is(error)) {
    if (error.code === 'ERR_TCMU_IO_SHORT') return sense.mediumError(operation, options);
    if (error.code === 'ERR_TCMU_IO_NO_SPACE') {
      return sense.spaceAllocationFailedWriteProtect(options);
    }
  }
  if (error instanceof Error && error.name === 'AbortError') return sense.abortedCommand(options);
  if (error instanceof Error && error.name === 'TimeoutError') {
    return sense.notReadyCommunicationTimeout(options);
  }
  return sense.hardwareError(options);
}
