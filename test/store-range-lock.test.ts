// SPDX-License-Identifier: Apache-2.0
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { type HeldRange, RangeLock } from '../lib/store/range-lock.js';
import { cases } from './cases.js';

/** What `acquire` answered: the range when it was granted at once. */
function attempt(lock: RangeLock, start: number, end: number, exclusive: boolean) {
  const state: { range?: HeldRange } = {};
  const answer = lock.acquire(start, end, exclusive);
  if (answer instanceof Promise) void answer.then((range) => Object.assign(state, { range }));
  else state.range = answer;
  return state;
}

const turn = () => new Promise((resolve) => setImmediate(resolve));

describe('RangeLock', () => {
  test('shared holders overlap; an exclusive one waits for all in its way', async () => {
    const lock = new RangeLock();
    const a = attempt(lock, 0, 10, false);
    const b = attempt(lock, 5, 15, false);
    const elsewhere = attempt(lock, 100, 110, false);
    const exclusive = attempt(lock, 8, 12, true);
    expect([a.range, b.range, elsewhere.range].every(Boolean)).toBe(true);
    expect(lock.contended).toBe(true);
    lock.release(a.range as HeldRange);
    await turn();
    expect(exclusive.range).toBeUndefined();
    lock.release(b.range as HeldRange);
    await turn();
    expect(exclusive.range).toBeDefined();
    lock.release(exclusive.range as HeldRange);
    expect(lock.contended).toBe(false);
  });

  test('grants in order of arrival: later writes do not overtake a waiting exclusive', async () => {
    const lock = new RangeLock();
    const first = attempt(lock, 0, 10, false);
    const exclusive = attempt(lock, 0, 10, true);
    const later = attempt(lock, 9, 20, false);
    const apart = attempt(lock, 10, 20, false);
    await turn();
    expect([exclusive.range, later.range]).toEqual([undefined, undefined]);
    expect(apart.range).toBeDefined();
    lock.release(first.range as HeldRange);
    await turn();
    expect(exclusive.range).toBeDefined();
    expect(later.range).toBeUndefined();
    lock.release(exclusive.range as HeldRange);
    await turn();
    expect(later.range).toBeDefined();
  });

  test('a noted write is waited for as an acquired one', async () => {
    const lock = new RangeLock();
    const noted = lock.note(0, 10);
    const exclusive = attempt(lock, 9, 11, true);
    await turn();
    expect(exclusive.range).toBeUndefined();
    lock.release(noted);
    await turn();
    expect(exclusive.range).toBeDefined();
  });

  test('exclusion holds, and everybody gets in, in any sequence', async () => {
    const request = fc.record({
      start: fc.nat(20),
      length: fc.integer({ min: 1, max: 8 }),
      exclusive: fc.boolean(),
      hold: fc.nat(3),
    });
    await fc.assert(
      fc.asyncProperty(fc.array(request, { maxLength: 20 }), async (requests) => {
        const lock = new RangeLock();
        const held = new Set<HeldRange>();
        await Promise.all(
          requests.map(async ({ start, length, exclusive, hold }) => {
            const range = await lock.acquire(start, start + length, exclusive);
            for (const other of held) {
              const overlap = other.start < range.end && range.start < other.end;
              expect(overlap && (other.exclusive || exclusive)).toBe(false);
            }
            held.add(range);
            for (let i = 0; i < hold; i++) await turn();
            held.delete(range);
            lock.release(range);
          }),
        );
        expect(lock.contended).toBe(false);
      }),
      cases(100),
    );
  });
});
