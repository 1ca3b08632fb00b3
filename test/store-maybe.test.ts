// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { chain, eachPiece, isPromise, settled } from '../lib/store/maybe.js';

const later = <T>(value: T): Promise<T> => new Promise((resolve) => setImmediate(resolve, value));

test('isPromise takes anything with then', () => {
  expect(isPromise(Promise.resolve())).toBe(true);
  expect(isPromise({ then() {} })).toBe(true);
  for (const value of [undefined, null, 0, 'then', {}, () => {}])
    expect(isPromise(value)).toBe(false);
});

test('chain goes on at once with a value, later with a promise', async () => {
  expect(chain(2, (value) => value + 1)).toBe(3);
  expect(await chain(later(2), (value) => value + 1)).toBe(3);
  expect(() =>
    chain(1, () => {
      throw new Error('now');
    }),
  ).toThrow('now');
});

describe('settled', () => {
  test.each<[string, () => unknown, boolean]>([
    ['a value', () => 1, true],
    [
      'a throw',
      () => {
        throw new Error('x');
      },
      false,
    ],
    ['a promise', () => later(1), true],
    ['a rejection', () => Promise.reject(new Error('x')), false],
  ])('cleans up after %s, once', async (_, run, succeeds) => {
    let cleaned = 0;
    const attempt = async () => settled(run, () => cleaned++);
    if (succeeds) expect(await attempt()).toBe(1);
    else await expect(attempt()).rejects.toThrow('x');
    expect(cleaned).toBe(1);
  });

  test('cleans up only when the promise settles', async () => {
    let cleaned = 0;
    const pending = settled(
      () => later(1),
      () => cleaned++,
    );
    expect(cleaned).toBe(0);
    await pending;
    expect(cleaned).toBe(1);
  });
});

describe('eachPiece', () => {
  /** The pieces walked; those at the given offsets answer by a promise. */
  async function walk(total: number, piece: number, asynchronousAt: number[], stopAt = -1) {
    const pieces: [number, number][] = [];
    const done = eachPiece(total, piece, (offset, length) => {
      pieces.push([offset, length]);
      const answer = offset !== stopAt;
      return asynchronousAt.includes(offset) ? later(answer) : answer;
    });
    expect(isPromise(done)).toBe(asynchronousAt.length > 0);
    await done;
    return pieces;
  }

  test.each([[[]], [[0]], [[4]], [[0, 4, 8]], [[8]]])('promises at %j', async (asynchronousAt) => {
    expect(await walk(10, 4, asynchronousAt)).toEqual([
      [0, 4],
      [4, 4],
      [8, 2],
    ]);
    expect(
      await walk(
        10,
        4,
        asynchronousAt.filter((at) => at < 8),
        4,
      ),
    ).toEqual([
      [0, 4],
      [4, 4],
    ]);
  });

  test('nothing to walk', () => {
    expect(eachPiece(0, 4, () => expect.fail())).toBeUndefined();
  });

  test('a failure ends it', async () => {
    let steps = 0;
    const walk = eachPiece(10, 2, (offset) => {
      steps++;
      return offset === 4 ? Promise.reject(new Error('x')) : later(true);
    });
    await expect(walk).rejects.toThrow('x');
    expect(steps).toBe(3);
  });
});
