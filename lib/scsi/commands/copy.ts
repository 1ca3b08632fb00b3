// SPDX-License-Identifier: Apache-2.0
/** EXTENDED COPY and RECEIVE COPY RESULTS, with list identifiers of one byte and of four (SPC-4). */
import type { MaybePromise } from '../../device/data.js';
import type { ScsiCommand } from '../../device/handler.js';
import { chain, isPromise } from '../../store/maybe.js';
import { readU32, writeU16, writeU32, writeU64 } from '../bytes.js';
import { bytes, type CommandSpec } from '../command-spec.js';
import type { CopyOperation } from '../copy/copy-manager.js';
import {
  BLOCK_TO_BLOCK,
  COPY_LIMITS,
  type CopyRequest,
  decodeCopyRequest,
  IDENTIFICATION,
} from '../copy/parameter-list.js';
import type { LogicalUnit } from '../logical-unit.js';
import { askNexuses, soon } from '../nexuses.js';
import { sense } from '../sense.js';
import { parameterList, respond } from './respond.js';

function extendedCopy(unit: LogicalUnit, command: ScsiCommand, form: 1 | 4): MaybePromise<unknown> {
  const length = readU32(command.cdb, 10);
  if (length === 0) return;
  const list = parameterList(command, Math.min(length, 0x1_0000));
  const request = decodeCopyRequest(list, form);
  return chain(soon(askNexuses(unit.options.nexuses)), (nexuses) =>
    run(unit, command, request, form, nexuses?.incomplete ? undefined : nexuses?.names),
  );
}

function run(
  unit: LogicalUnit,
  command: ScsiCommand,
  request: CopyRequest,
  form: 1 | 4,
  nexuses: ReadonlySet<string> | undefined,
): MaybePromise<unknown> {
  const operation = unit.copies.start(request, form, nexuses);
  const { finished } = operation;
  if (!isPromise(finished)) return;
  if (request.immediate) {
    // The failure stays in the operation, for RECEIVE COPY STATUS.
    (finished as Promise<unknown>).catch(() => {});
    return;
  }
  const stop = () => operation.abort();
  command.signal.addEventListener('abort', stop, { once: true });
  return (finished as Promise<unknown>).finally(() =>
    command.signal.removeEventListener('abort', stop),
  );
}

/** COPY COMMAND STATUS. */
const STATUS_LID1 = { running: 0x00, done: 0x01, failed: 0x02, aborted: 0x02 } as const;
const STATUS_LID4 = { running: 0x10, done: 0x01, failed: 0x02, aborted: 0x60 } as const;

function findCopy(unit: LogicalUnit, listId: number, form: 1 | 4): CopyOperation {
  const operation = unit.copies.find(listId, form);
  if (operation === undefined) throw sense.invalidFieldInCdb({ byte: 2 });
  return operation;
}

/** RECEIVE COPY RESULTS: COPY STATUS. */
function copyStatus(operation: CopyOperation): Uint8Array {
  const data = new Uint8Array(12);
  writeU32(data, 0, data.length - 4);
  data[4] = STATUS_LID1[operation.state];
  writeU16(data, 5, operation.segmentsProcessed);
  // TRANSFER COUNT UNITS: bytes, or kibibytes where those no longer fit.
  const large = operation.bytes > 0xffff_ffff;
  data[7] = large ? 0x01 : 0x00;
  writeU32(data, 8, large ? Math.floor(operation.bytes / 1024) : operation.bytes);
  return data;
}

/** RECEIVE COPY RESULTS: FAILED SEGMENT DETAILS; the header alone where nothing failed. */
function failedSegmentDetails(operation: CopyOperation): Uint8Array {
  const told = operation.failure?.encode('fixed') ?? new Uint8Array(0);
  if (told.length === 0) return new Uint8Array(4);
  const data = new Uint8Array(60 + told.length);
  writeU32(data, 0, data.length - 4);
  data[56] = STATUS_LID1[operation.state];
  writeU16(data, 58, told.length);
  data.set(told, 60);
  return data;
}

/** RECEIVE COPY STATUS(LID4). */
function copyStatusLid4(operation: CopyOperation): Uint8Array {
  const told = operation.failure?.encode('fixed') ?? new Uint8Array(0);
  const data = new Uint8Array(32 + told.length);
  writeU32(data, 0, data.length - 4);
  data[4] = 0x01; // RESPONSE TO SERVICE ACTION: EXTENDED COPY(LID4)
  data[5] = STATUS_LID4[operation.state];
  writeU32(data, 8, 0xffff_fffe); // ESTIMATED STATUS UPDATE DELAY: cannot be told
  data[12] = operation.failure === undefined ? 0x00 : operation.failure.status;
  data[13] = told.length;
  data[14] = told.length;
  writeU64(data, 16, operation.bytes);
  writeU16(data, 24, operation.segmentsProcessed);
  data.set(told, 32);
  return data;
}

function operatingParameters(unit: LogicalUnit): Uint8Array {
  const types = [BLOCK_TO_BLOCK, IDENTIFICATION];
  const data = new Uint8Array(44 + types.length);
  writeU32(data, 0, data.length - 4);
  data[4] = 0x01; // SNLID: a copy may have no list identifier
  writeU16(data, 8, COPY_LIMITS.cscdDescriptors);
  writeU16(data, 10, COPY_LIMITS.segmentDescriptors);
  writeU32(data, 12, COPY_LIMITS.descriptorList);
  writeU32(data, 16, COPY_LIMITS.segment);
  writeU16(data, 34, COPY_LIMITS.concurrent);
  data[36] = COPY_LIMITS.concurrent;
  data[37] = Math.log2(unit.blockSize); // DATA SEGMENT GRANULARITY
  data[43] = types.length;
  data.set(types, 44);
  return data;
}

function copyOut(
  name: string,
  serviceAction: number,
  run: CommandSpec['run'],
  fields: CommandSpec['fields'],
): CommandSpec {
  return {
    name,
    standard: 'SPC-5',
    opcode: 0x83,
    serviceAction,
    length: 16,
    fields,
    medium: 'read',
    timeout: 300,
    run,
  };
}

function copyIn(
  name: string,
  serviceAction: number,
  identifierBytes: 0 | 1 | 4,
  answer: (unit: LogicalUnit, listId: number) => Uint8Array,
): CommandSpec {
  const identifier = identifierBytes === 0 ? [] : [bytes('LIST IDENTIFIER', 2, identifierBytes)];
  return {
    name,
    standard: 'SPC-5',
    opcode: 0x84,
    serviceAction,
    length: 16,
    fields: [...identifier, bytes('ALLOCATION LENGTH', 10, 4)],
    medium: 'none',
    run(unit, command) {
      const { cdb } = command;
      const listId = identifierBytes === 4 ? readU32(cdb, 2) : (cdb[2] as number);
      return chain(identifierBytes === 0 ? undefined : unit.copies.forgetLost(), () =>
        respond(command, answer(unit, listId), readU32(cdb, 10)),
      );
    },
  };
}

/** Tells of a copy once it is over; then it is forgotten. */
function told(
  unit: LogicalUnit,
  operation: CopyOperation,
  tell: (operation: CopyOperation) => Uint8Array,
): Uint8Array {
  const data = tell(operation);
  unit.copies.forget(operation);
  return data;
}

const LIST_LENGTH = [bytes('PARAMETER LIST LENGTH', 10, 4)];

export const copyCommands: readonly CommandSpec[] = [
  copyOut(
    'EXTENDED COPY (LID1)',
    0x00,
    (unit, command) => extendedCopy(unit, command, 1),
    LIST_LENGTH,
  ),
  copyOut(
    'EXTENDED COPY (LID4)',
    0x01,
    (unit, command) => extendedCopy(unit, command, 4),
    LIST_LENGTH,
  ),
  copyOut(
    'COPY OPERATION ABORT',
    0x1c,
    (unit, command) => {
      const operation = findCopy(unit, readU32(command.cdb, 2), 4);
      operation.abort();
      // Answered when the copy has ended, however.
      const { finished } = operation;
      return isPromise(finished) ? chain(Promise.allSettled([finished]), () => {}) : undefined;
    },
    [bytes('LIST IDENTIFIER', 2, 4)],
  ),
  copyIn('RECEIVE COPY STATUS (LID1)', 0x00, 1, (unit, listId) => {
    return copyStatus(findCopy(unit, listId, 1));
  }),
  copyIn('RECEIVE COPY OPERATING PARAMETERS', 0x03, 0, operatingParameters),
  copyIn('RECEIVE COPY FAILURE DETAILS (LID1)', 0x04, 1, (unit, listId) => {
    return told(unit, findCopy(unit, listId, 1), failedSegmentDetails);
  }),
  copyIn('RECEIVE COPY STATUS (LID4)', 0x05, 4, (unit, listId) => {
    return told(unit, findCopy(unit, listId, 4), copyStatusLid4);
  }),
];
