// SPDX-License-Identifier: Apache-2.0
/**
 * FORMAT UNIT and SANITIZE (SBC-4): they go over the whole medium, and report progress by REQUEST SENSE
 * and by the sense data of what they refuse meanwhile.
 *
 * Neither is undone by a reset or by the abort of its command; both end with the process, in which case the
 * contents of the medium are undefined: they have failed at the next start where an `operationStorage` keeps
 * that they had begun. What they wrote is durable when they have ended.
 */
import type { MaybePromise } from '../../device/data.js';
import type { ScsiCommand } from '../../device/handler.js';
import type { RequestContext } from '../../store/block-store.js';
import { unmap, writeSame, writeZeroes } from '../../store/emulate.js';
import { chain, isPromise } from '../../store/maybe.js';
import { isZero } from '../../store/memory-data.js';
import { readU16, readU32 } from '../bytes.js';
import { bits, bytes, type CommandSpec, refused } from '../command-spec.js';
import { encodeOperation, FailedOperation, MediumOperation } from '../hindrance.js';
import type { LogicalUnit } from '../logical-unit.js';
import { sense } from '../sense.js';
import { parameterList } from './respond.js';

/** An operation's own context: it outlives the command. */
class OperationRequest implements RequestContext {
  readonly signal: AbortSignal;

  constructor(operation: MediumOperation) {
    this.signal = operation.signal;
  }
}

type Pass = (position: number, length: number, request: RequestContext) => MaybePromise<unknown>;

/** Runs the passes one after the other, each durable before the next. */
function start(
  unit: LogicalUnit,
  command: ScsiCommand,
  kind: 'format' | 'sanitize',
  options: { immediate: boolean; mayExit: boolean },
  passes: readonly Pass[],
): MaybePromise<unknown> {
  const size = unit.blocks * unit.blockSize;
  const before = unit.hindrance;
  const operation = new MediumOperation(kind, size * passes.length);
  const request = new OperationRequest(operation);
  unit.hindrance = operation;
  const runPass = (index: number): MaybePromise<unknown> => {
    const pass = passes[index];
    if (pass === undefined) return undefined;
    return chain(
      operation.pass(size, (position, length) => pass(position, length, request)),
      () => chain(unit.flush(request), () => runPass(index + 1)),
    );
  };
  const failed = (error: unknown): never => {
    unit.hindrance = new FailedOperation(kind, options.mayExit);
    throw error;
  };
  const storage = unit.options.operationStorage;
  const begin = (): MaybePromise<unknown> => {
    let result: MaybePromise<void>;
    try {
      // Writes that are under way end first.
      result = chain(
        unit.apart(0, size, true, () => runPass(0)),
        () =>
          chain(storage?.save(NOTHING), () => {
            unit.hindrance = undefined;
          }),
      );
    } catch (error) {
      return failed(error);
    }
    if (!isPromise(result)) return;
    const ended = (result as Promise<void>).catch(failed);
    operation.finished = ended.catch(() => {});
    return options.immediate ? undefined : answered(command, ended);
  };
  // Nothing is touched, and nobody is told of a beginning, before a restart would know of it.
  const unbegun = (error: unknown): never => {
    unit.hindrance = before;
    throw error;
  };
  let noted: MaybePromise<unknown>;
  try {
    noted = storage?.save(encodeOperation(kind, options.mayExit));
  } catch (error) {
    return unbegun(error);
  }
  return isPromise(noted) ? Promise.resolve(noted).then(begin, unbegun) : begin();
}

const NOTHING = new Uint8Array(0);

/** The end of an operation, or of its command: an operation goes on when its command is aborted. */
function answered(command: ScsiCommand, ended: Promise<void>): Promise<void> {
  const { signal } = command;
  return new Promise((resolve, reject) => {
    const aborted = () => reject(sense.abortedCommand());
    if (signal.aborted) aborted();
    else signal.addEventListener('abort', aborted, { once: true });
    ended.then(resolve, reject).finally(() => signal.removeEventListener('abort', aborted));
  });
}

/** A block full of `pattern` from its start, repeated. */
function patternBlock(unit: LogicalUnit, pattern: Uint8Array): Uint8Array {
  const block = new Uint8Array(unit.blockSize);
  for (let i = 0; i < block.length; i++) block[i] = pattern[i % pattern.length] as number;
  return block;
}

/** FORMAT UNIT parameter list (SBC-4): the header and an initialization pattern; no defect list. */
function formatPattern(
  unit: LogicalUnit,
  list: Uint8Array,
  long: boolean,
): { immediate: boolean; pattern: Uint8Array | undefined } {
  const headerLength = long ? 8 : 4;
  if (list.length < headerLength) throw sense.parameterListLengthError();
  // PROTECTION FIELD USAGE, P_I_INFORMATION and PROTECTION INTERVAL EXPONENT: no protection here.
  if (((list[0] as number) & 0x07) !== 0) {
    throw sense.invalidFieldInParameterList({ byte: 0, bit: 2 });
  }
  if (long && list[3] !== 0) throw sense.invalidFieldInParameterList({ byte: 3 });
  const options = list[1] as number;
  const defectsAt = long ? 4 : 2;
  const defects = long ? readU32(list, defectsAt) : readU16(list, defectsAt);
  if (defects !== 0) throw sense.invalidFieldInParameterList({ byte: defectsAt });
  const immediate = (options & 0x02) !== 0;
  if ((options & 0x08) === 0) return { immediate, pattern: undefined };
  // Initialization pattern descriptor: SI wants the pattern also where blocks are reassigned: none are.
  if (list.length < headerLength + 4) throw sense.parameterListLengthError();
  const type = list[headerLength + 1] as number;
  const length = readU16(list, headerLength + 2);
  if (type > 1) throw sense.invalidFieldInParameterList({ byte: headerLength + 1 });
  const wrong = type === 0 ? length !== 0 : length === 0 || length > unit.blockSize;
  if (wrong) throw sense.invalidFieldInParameterList({ byte: headerLength + 2 });
  if (list.length < headerLength + 4 + length) throw sense.parameterListLengthError();
  if (type === 0) return { immediate, pattern: undefined };
  const pattern = list.subarray(headerLength + 4, headerLength + 4 + length);
  return { immediate, pattern: patternBlock(unit, pattern) };
}

/** A SANITIZE of one service action; none of its reserved bits may be set. */
function sanitize(
  name: string,
  serviceAction: number,
  rest: Pick<CommandSpec, 'run' | 'available' | 'needs'> & { listed?: boolean },
): CommandSpec {
  const { listed = false, ...more } = rest;
  return {
    name: `SANITIZE: ${name}`,
    standard: 'SBC-4',
    opcode: 0x48,
    serviceAction,
    length: 10,
    fields: [
      bits('IMMED', 1, 7),
      refused('ZNR', 1, 6),
      bits('AUSE', 1, 5),
      ...[2, 3, 4, 5, 6].map((byte) => refused('RESERVED', byte, 7, 0)),
      ...(listed
        ? [bytes('PARAMETER LIST LENGTH', 7, 2)]
        : [refused('PARAMETER LIST LENGTH', 7, 7, 0), refused('PARAMETER LIST LENGTH', 8, 7, 0)]),
    ],
    medium: 'write',
    mendsMedium: 'sanitize',
    timeout: 24 * 3600,
    ...more,
  };
}

function sanitizeOptions(
  { hindrance }: LogicalUnit,
  command: ScsiCommand,
): { immediate: boolean; mayExit: boolean } {
  const options = command.cdb[1] as number;
  const mayExit = (options & 0x20) !== 0;
  // SBC-4, completing a sanitize operation: one that failed in the restricted completion mode (AUSE zero) is
  // not left by way of the unrestricted one.
  if (mayExit && hindrance instanceof FailedOperation && hindrance.kind === 'sanitize') {
    if (!hindrance.mayExit) throw sense.invalidFieldInCdb({ byte: 1, bit: 5 });
  }
  return { immediate: (options & 0x80) !== 0, mayExit };
}

/** The passes of SANITIZE's OVERWRITE, from its parameter list. */
function overwritePasses(unit: LogicalUnit, command: ScsiCommand): Pass[] {
  const length = readU16(command.cdb, 7);
  // SBC-4, SANITIZE: longer than the header, at most a block of pattern.
  if (length <= 4 || length > unit.blockSize + 4) throw sense.invalidFieldInCdb({ byte: 7 });
  const list = parameterList(command, length);
  if (list.length < length) throw sense.invalidFieldInInformationUnit();
  const options = list[0] as number;
  if ((options & 0x60) !== 0) throw sense.invalidFieldInParameterList({ byte: 0, bit: 6 });
  const count = options & 0x1f;
  if (count === 0) throw sense.invalidFieldInParameterList({ byte: 0, bit: 4 });
  if (readU16(list, 2) !== length - 4) throw sense.invalidFieldInParameterList({ byte: 2 });
  const plain = patternBlock(unit, list.subarray(4));
  const inverted = plain.map((byte) => ~byte);
  const { store } = unit;
  return Array.from({ length: count }, (_, pass): Pass => {
    // INVERT: every other pass; the last one is as the pattern says.
    const block = (options & 0x80) !== 0 && (count - 1 - pass) % 2 === 1 ? inverted : plain;
    return (position, piece, request) => writeSame(store, position, piece, block, request);
  });
}

export const formatCommands: readonly CommandSpec[] = [
  {
    name: 'FORMAT UNIT',
    standard: 'SBC-4',
    opcode: 0x04,
    length: 6,
    fields: [
      refused('FMTPINFO', 1, 7, 6),
      bits('LONGLIST', 1, 5),
      bits('FMTDATA', 1, 4),
      bits('CMPLST', 1, 3),
      bits('DEFECT LIST FORMAT', 1, 2, 0),
      bits('FFMT', 4, 1, 0),
    ],
    medium: 'write',
    mendsMedium: 'format',
    timeout: 24 * 3600,
    /** Every block reads as zeros, or as the pattern, afterwards; a fast format is the same. */
    run(unit, command) {
      const options = command.cdb[1] as number;
      const withData = (options & 0x10) !== 0;
      const { immediate, pattern } = withData
        ? formatPattern(unit, parameterList(command, command.dataLength), (options & 0x20) !== 0)
        : { immediate: false, pattern: undefined };
      const { store } = unit;
      const pass: Pass = (position, length, request) =>
        pattern === undefined || isZero(pattern)
          ? unit.thin
            ? unmap(store, position, length, request)
            : writeZeroes(store, position, length, false, request)
          : writeSame(store, position, length, pattern, request);
      return start(unit, command, 'format', { immediate, mayExit: false }, [pass]);
    },
  },
  sanitize('OVERWRITE', 0x01, {
    listed: true,
    run: (unit, command) =>
      start(
        unit,
        command,
        'sanitize',
        sanitizeOptions(unit, command),
        overwritePasses(unit, command),
      ),
  }),
  sanitize('BLOCK ERASE', 0x02, {
    available: (unit) => unit.thin,
    needs: 'unmap',
    run: (unit, command) =>
      start(unit, command, 'sanitize', sanitizeOptions(unit, command), [
        (position, length, request) => unmap(unit.store, position, length, request),
      ]),
  }),
  sanitize('CRYPTOGRAPHIC ERASE', 0x03, {
    available: (unit) => unit.store.cryptoErase !== undefined,
    needs: 'cryptoErase',
    run: (unit, command) =>
      start(unit, command, 'sanitize', sanitizeOptions(unit, command), [
        (position, _length, request) =>
          position === 0 ? unit.store.cryptoErase?.(request) : undefined,
      ]),
  }),
  sanitize('EXIT FAILURE MODE', 0x1f, {
    run(unit) {
      const { hindrance } = unit;
      if (!(hindrance instanceof FailedOperation) || hindrance.kind !== 'sanitize') return;
      if (!hindrance.mayExit) throw sense.invalidFieldInCdb({ byte: 1, bit: 4 });
      return chain(unit.options.operationStorage?.save(NOTHING), () => {
        unit.hindrance = undefined;
      });
    },
  }),
];
