// SPDX-License-Identifier: Apache-2.0
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { BufferError } from '../lib/errors.js';
import type { BackingFile } from '../lib/io/backing-file.js';
import { MemoryDataIn, MemoryDataOut } from '../lib/store/index.js';
import { firstDifference, isZero } from '../lib/store/memory-data.js';
import { cases } from './cases.js';

const bytes = (...values: number[]) => Uint8Array.from(values);
const outOfRange = { code: 'ERR_TCMU_BUFFER_RANGE' };

/** Stands for a file: records the calls, and answers at once or later. */
function fakeFile(contents: Uint8Array, asynchronous: boolean) {
  const written: [number, number[]][] = [];
  const answer = <T>(value: T) => (asynchronous ? Promise.resolve(value) : value);
  const file = {
    readInto(target: Uint8Array, position: number) {
      const part = contents.subarray(position, position + target.length);
      target.fill(0).set(part);
      return answer(part.length);
    },
    writeFrom(source: Uint8Array, position: number) {
      written.push([position, [...source]]);
      return answer(undefined);
    },
  };
  return { file: file as unknown as BackingFile, written };
}

describe('MemoryDataOut', () => {
  test('slices are windows on the same memory', () => {
    const memory = bytes(1, 2, 3, 4);
    const slice = new MemoryDataOut(memory).slice(1).slice(0, 2);
    memory[1] = 9;
    expect([...slice.toBytes()]).toEqual([9, 3]);
    expect(slice.length).toBe(2);
    expect(slice.segments()[0]?.buffer).toBe(memory.buffer);
  });

  test('toBytes is a copy', () => {
    const memory = bytes(1, 2);
    const copy = new MemoryDataOut(memory).toBytes();
    memory[0] = 9;
    expect([...copy]).toEqual([1, 2]);
  });

  test('copyTo places all bytes, or throws', () => {
    const target = new Uint8Array(4);
    const data = new MemoryDataOut(bytes(1, 2));
    data.copyTo(target, 2);
    expect([...target]).toEqual([0, 0, 1, 2]);
    for (const start of [3, -1, 5]) {
      expect(() => data.copyTo(target, start)).toThrow(expect.objectContaining(outOfRange));
    }
  });

  test.each([
    [3, 5],
    [-1, 2],
    [3, 2],
    [5, 5],
  ])('slice(%i, %i) of 4 bytes throws', (start, end) => {
    const memory = new Uint8Array(4);
    expect(() => new MemoryDataOut(memory).slice(start, end)).toThrow(BufferError);
    expect(() => new MemoryDataIn(memory).slice(start, end)).toThrow(BufferError);
  });

  test('mismatch compares with bytes and with segments', () => {
    const data = new MemoryDataOut(bytes(1, 2, 3, 4));
    expect(data.mismatch(bytes(1, 2, 3, 4))).toBe(-1);
    expect(data.mismatch(bytes(1, 2, 9, 4))).toBe(2);
    expect(data.mismatch(new MemoryDataIn(bytes(0, 2, 3, 4)))).toBe(0);
    const inPieces = new MemoryDataOut(bytes(1, 2, 3, 9));
    inPieces.segments = () => [bytes(1), bytes(2, 3), bytes(9)];
    expect(data.mismatch(inPieces)).toBe(3);
    inPieces.segments = () => [bytes(1), bytes(), bytes(2, 3, 4)];
    expect(data.mismatch(inPieces)).toBe(-1);
  });

  test.each([[false], [true]])(
    'writeTo hands the memory to the file (asynchronous: %s)',
    async (later) => {
      const { file, written } = fakeFile(bytes(), later);
      const answer = new MemoryDataOut(bytes(1, 2, 3)).slice(1).writeTo(file, 512);
      expect(answer instanceof Promise).toBe(later);
      await answer;
      expect(written).toEqual([[512, [2, 3]]]);
    },
  );
});

describe('MemoryDataIn', () => {
  test('copyFrom and fill write inside, or throw', () => {
    const data = new MemoryDataIn(new Uint8Array(5).fill(7));
    data.copyFrom(bytes(1, 2), 1);
    data.fill(0, 3, 4);
    expect([...data.bytes]).toEqual([7, 1, 2, 0, 7]);
    data.slice(3).fill(5);
    expect([...data.bytes]).toEqual([7, 1, 2, 5, 5]);
    expect(() => data.copyFrom(bytes(1, 2), 4)).toThrow(expect.objectContaining(outOfRange));
    expect(() => data.copyFrom(bytes(1), -1)).toThrow(expect.objectContaining(outOfRange));
    expect(() => data.fill(0, 2, 6)).toThrow(expect.objectContaining(outOfRange));
  });

  test.each([[false], [true]])(
    'readFrom has the file fill the window (asynchronous: %s)',
    async (later) => {
      const { file } = fakeFile(bytes(1, 2, 3), later);
      const data = new MemoryDataIn(new Uint8Array(4).fill(7));
      const answer = data.readFrom(file, 1);
      expect(answer instanceof Promise).toBe(later);
      expect(await answer).toBe(2);
      expect([...data.bytes]).toEqual([2, 3, 0, 0]);
    },
  );
});

test('isZero and firstDifference agree with a loop', () => {
  const sparse = fc.uint8Array({ maxLength: 40, max: 1 });
  fc.assert(
    fc.property(sparse, (value) => {
      expect(isZero(value)).toBe(value.every((byte) => byte === 0));
      expect(new MemoryDataOut(value).isZero()).toBe(value.every((byte) => byte === 0));
    }),
    cases(100),
  );
  fc.assert(
    fc.property(sparse, fc.nat(10), fc.nat(50), (value, at, flipped) => {
      const start = Math.min(at, value.length);
      const part = value.slice(start);
      if (flipped < part.length) (part[flipped] as number) ^= 1;
      expect(firstDifference(value, start, part)).toBe(flipped < part.length ? flipped : -1);
    }),
    cases(100),
  );
});
