// SPDX-License-Identifier: Apache-2.0
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ArgumentError, FileError } from '../lib/errors.js';
import {
  decodeSense,
  encodeSense,
  type Sense,
  SenseError,
  SenseKey,
  sense,
  toSense,
} from '../lib/scsi/index.js';
import { cases } from './cases.js';

const codeOf = (error: SenseError) => [error.key, error.asc, error.ascq];
const system = (code: string) => Object.assign(new Error(code), { code, errno: -1 });

describe('encoding', () => {
  test('fixed format puts each field where SPC-5 has it', () => {
    const bytes = encodeSense(
      {
        key: SenseKey.ILLEGAL_REQUEST,
        asc: 0x24,
        ascq: 0x01,
        information: 0x01020304,
        commandSpecific: 0x0a0b0c0d,
        field: { in: 'cdb', byte: 0x0102, bit: 6 },
      },
      'fixed',
    );
    expect([...bytes]).toEqual([
      0xf0, 0, 0x05, 1, 2, 3, 4, 10, 0x0a, 0x0b, 0x0c, 0x0d, 0x24, 0x01, 0, 0xce, 0x01, 0x02,
    ]);
  });

  test('descriptor format carries 64-bit information and a field pointer of a parameter list', () => {
    const bytes = encodeSense(
      {
        key: SenseKey.ILLEGAL_REQUEST,
        asc: 0x26,
        ascq: 0,
        information: 2 ** 40 + 5,
        field: { in: 'parameters', byte: 9 },
      },
      'descriptor',
    );
    expect([...bytes]).toEqual([
      ...[0x72, 0x05, 0x26, 0x00, 0, 0, 0, 20],
      ...[0x00, 0x0a, 0x80, 0, 0, 0, 1, 0, 0, 0, 0, 5],
      ...[0x02, 0x06, 0, 0, 0x80, 0, 9, 0],
    ]);
  });

  test('fixed format leaves out information that takes more than 32 bits', () => {
    const bytes = encodeSense({ key: 3, asc: 0x11, ascq: 0, information: 2 ** 32 });
    expect((bytes[0] as number) & 0x80).toBe(0);
    expect([...bytes.subarray(3, 7)]).toEqual([0, 0, 0, 0]);
  });

  test('progress and deferred errors', () => {
    const progress: Sense = { key: SenseKey.NOT_READY, asc: 0x04, ascq: 0x04, progress: 0x8000 };
    expect([...encodeSense(progress).subarray(15)]).toEqual([0x80, 0x80, 0x00]);
    expect(encodeSense({ ...progress, deferred: true }, 'fixed')[0]).toBe(0x71);
    expect(encodeSense({ ...progress, deferred: true }, 'descriptor')[0]).toBe(0x73);
  });

  test('decoding is the inverse of encoding, in both formats', () => {
    const details = fc.record(
      {
        information: fc.integer({ min: 0, max: 0xffff_ffff }),
        commandSpecific: fc.integer({ min: 1, max: 0xffff_ffff }),
        deferred: fc.constant(true as const),
      },
      { requiredKeys: [] },
    );
    const keySpecific = fc.oneof(
      fc.record({
        key: fc.constant(SenseKey.ILLEGAL_REQUEST),
        field: fc.record(
          {
            in: fc.constantFrom('cdb' as const, 'parameters' as const),
            byte: fc.integer({ min: 0, max: 0xffff }),
            bit: fc.integer({ min: 0, max: 7 }),
          },
          { requiredKeys: ['in', 'byte'] },
        ),
      }),
      fc.record({
        key: fc.constantFrom(SenseKey.NOT_READY, SenseKey.NO_SENSE),
        progress: fc.integer({ min: 0, max: 0xffff }),
      }),
      fc.record({ key: fc.integer({ min: 0, max: 15 }) }),
    );
    fc.assert(
      fc.property(
        details,
        keySpecific,
        fc.nat(255),
        fc.nat(255),
        fc.constantFrom('fixed' as const, 'descriptor' as const),
        (rest, specific, asc, ascq, format) => {
          const value = { asc, ascq, ...rest, ...specific };
          expect(defined(decodeSense(encodeSense(value, format)))).toEqual(defined(value));
        },
      ),
      cases(2000),
    );
  });

  test('decoding takes any bytes', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 96 }), (bytes) => {
        const value = decodeSense(bytes);
        expect(value === undefined || value.key <= 15).toBe(true);
      }),
      cases(20_000),
    );
    expect(decodeSense(new Uint8Array(0))).toBeUndefined();
    expect(decodeSense(Uint8Array.of(0x70))).toBeUndefined();
  });
});

/** Without the properties that are undefined. */
function defined(value: object | undefined): unknown {
  return JSON.parse(JSON.stringify(value));
}

describe('SenseError', () => {
  test('names key, code and numbers, and knows its kind', () => {
    const error = sense.invalidFieldInCdb({ byte: 2, bit: 5 });
    expect(error.message).toBe('ILLEGAL REQUEST: INVALID FIELD IN CDB (5/24/00)');
    expect(error.code).toBe('ERR_TCMU_SENSE');
    expect(SenseError.is(error)).toBe(true);
    expect(SenseError.is(new ArgumentError('x'))).toBe(false);
    expect(SenseError.is(undefined)).toBe(false);
  });

  test('a status other than CHECK CONDITION has no sense data', () => {
    expect(sense.busy().status).toBe(0x08);
    expect(sense.busy().encode()).toBeUndefined();
    expect(sense.lbaOutOfRange().encode()).toHaveLength(18);
  });

  test('a miscompare tells its offset', () => {
    expect(decodeSense(sense.miscompare(1234).encode() as Uint8Array)).toMatchObject({
      key: SenseKey.MISCOMPARE,
      asc: 0x1d,
      information: 1234,
    });
  });
});

describe('toSense', () => {
  test.each([
    ['ENOSPC', [7, 0x27, 0x07]],
    ['EDQUOT', [7, 0x27, 0x07]],
    ['EFBIG', [7, 0x27, 0x07]],
    ['EROFS', [7, 0x27, 0x00]],
    ['EACCES', [7, 0x27, 0x00]],
    ['EIO', [3, 0x0c, 0x00]],
    ['ETIMEDOUT', [2, 0x08, 0x01]],
    ['ECONNREFUSED', [2, 0x08, 0x00]],
    ['EHOSTUNREACH', [2, 0x08, 0x00]],
    ['ENODEV', [4, 0x44, 0x00]],
  ])('a write that fails with %s', (code, expected) => {
    expect(codeOf(toSense(system(code), 'write'))).toEqual(expected);
  });

  test.each([
    ['EIO', [3, 0x11, 0x00]],
    ['EACCES', [4, 0x44, 0x00]],
    ['ENOSPC', [4, 0x44, 0x00]],
  ])('a read that fails with %s', (code, expected) => {
    expect(codeOf(toSense(system(code), 'read'))).toEqual(expected);
  });

  test('EAGAIN is BUSY, an abort is ABORTED COMMAND', () => {
    expect(toSense(system('EAGAIN')).status).toBe(0x08);
    expect(codeOf(toSense(new DOMException('x', 'AbortError')))).toEqual([0x0b, 0, 0]);
    expect(codeOf(toSense(new DOMException('x', 'TimeoutError')))).toEqual([2, 0x08, 0x01]);
  });

  test("this package's file errors count by errno and by code", () => {
    const noSpace = new FileError('ERR_TCMU_IO_NO_SPACE', 'full', { cause: system('ENOSPC') });
    expect(codeOf(toSense(noSpace, 'write'))).toEqual([7, 0x27, 0x07]);
    expect(codeOf(toSense(new FileError('ERR_TCMU_IO_SHORT', 'short'), 'read'))).toEqual([
      3, 0x11, 0,
    ]);
  });

  test('a SenseError passes through; anything else is HARDWARE ERROR and keeps its cause', () => {
    const error = sense.capacityDataHasChanged();
    expect(toSense(error)).toBe(error);
    const bug = new TypeError('undefined is no function');
    expect(codeOf(toSense(bug))).toEqual([4, 0x44, 0x00]);
    expect(toSense(bug).cause).toBe(bug);
    for (const odd of [undefined, null, 'text', 42, Symbol('x')]) {
      expect(codeOf(toSense(odd))).toEqual([4, 0x44, 0x00]);
    }
  });
});
