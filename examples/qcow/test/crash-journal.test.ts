// SPDX-License-Identifier: Apache-2.0
import { MemoryDataOut } from 'tcmu/store';
import { expect, test } from 'vitest';
import { MemoryFile } from '../src/host/memory-file.js';
import { type Change, CrashJournal, GuestHistory, stamped } from '../src/testing/index.js';

const SECTOR = 512;

function start(length = 4 * SECTOR) {
  const journal = new CrashJournal();
  const file = new MemoryFile(new Uint8Array(length), { path: 'f' });
  return { journal, file, recording: journal.record(file, file.toBytes()) };
}

/** The first byte of each sector. */
function sectors(state: Map<string, Uint8Array>): number[] {
  const bytes = state.get('f') as Uint8Array;
  return Array.from(
    { length: Math.ceil(bytes.length / SECTOR) },
    (_, i) => bytes[i * SECTOR] ?? -1,
  );
}

const none = () => false;

test('what was flushed stays, what was not may be lost, piece by piece', async () => {
  const { journal, file, recording } = start();
  await recording.write(new Uint8Array(2 * SECTOR).fill(1), 0);
  const beforeFlush = journal.now;
  await recording.flush();
  const flushed = journal.now;
  await recording.writeData(new MemoryDataOut(new Uint8Array(2 * SECTOR).fill(2)), SECTOR);
  expect(sectors(journal.crash(beforeFlush, none))).toEqual([0, 0, 0, 0]);
  expect(sectors(journal.crash(flushed, none))).toEqual([1, 1, 0, 0]);
  expect(sectors(journal.crash(journal.now, none))).toEqual([1, 1, 0, 0]);
  expect(sectors(journal.crash(journal.now))).toEqual([1, 2, 2, 0]);
  const second = (_change: Change, piece: number) => piece === 1;
  expect(sectors(journal.crash(journal.now, second))).toEqual([1, 1, 2, 0]);
  expect(journal.crash(journal.now).get('f')).toEqual(file.toBytes());
  expect(journal.crash(0).get('f')).toEqual(new Uint8Array(4 * SECTOR));
});

test('a flush covers only what had settled when it began', async () => {
  const { journal, recording } = start();
  const slow = journal.record(
    new MemoryFile(new Uint8Array(SECTOR), { path: 's' }),
    new Uint8Array(SECTOR),
    {
      turns: () => 2,
    },
  );
  const writing = slow.write(new Uint8Array(SECTOR).fill(7), 0);
  await slow.flush();
  await writing;
  const byte = () => journal.crash(journal.now, none).get('s')?.[0];
  expect(byte()).toBe(0);
  await slow.flush();
  expect(byte()).toBe(7);
  // Files of one journal share the clock, and nothing else.
  await recording.write(new Uint8Array(SECTOR).fill(3), 0);
  await slow.flush();
  expect(sectors(journal.crash(journal.now, none))).toEqual([0, 0, 0, 0]);
});

test('length, zeroes and discards; unaligned changes are cut at sectors', async () => {
  const { journal, file, recording } = start();
  await recording.write(new Uint8Array(1000).fill(5), 300);
  await recording.truncate(6 * SECTOR);
  await recording.writeZeroes(SECTOR, SECTOR);
  await recording.write(new Uint8Array(SECTOR).fill(6), 7 * SECTOR);
  await recording.discard(0, SECTOR);
  expect(journal.crash(journal.now).get('f')).toEqual(file.toBytes());
  const pieces: [string, number][] = [];
  journal.crash(journal.now, (change, piece) => pieces.push([change.type, piece]) > 0);
  expect(pieces).toEqual([
    ['write', 0],
    ['write', 1],
    ['write', 2],
    ['truncate', 0],
    ['zero', 0],
    ['write', 0],
    ['discard', 0],
  ]);
  const onlyTruncate = journal.crash(journal.now, ({ type }) => type === 'truncate');
  expect(onlyTruncate.get('f')).toEqual(new Uint8Array(6 * SECTOR));
  expect(journal.cuts()).toEqual([0, 1, 3, 5, 7, 9]);
});

test('operations under way at once settle in another order', async () => {
  const { journal } = start();
  const turns = [9, 5, 1];
  const file = journal.record(new MemoryFile(), new Uint8Array(0), {
    turns: () => turns.shift() ?? 0,
  });
  const order: number[] = [];
  await Promise.all(
    [0, 1, 2].map(async (i) => {
      await file.write(new Uint8Array(SECTOR), i * SECTOR);
      order.push(i);
    }),
  );
  expect(order).toEqual([2, 1, 0]);
});

test('a history allows flushed or newer stamps, nothing else', async () => {
  const { journal, file, recording } = start();
  const history = new GuestHistory(() => journal.mark());
  const write = async (position: number, length: number, stamp: number) => {
    const done = history.write(position, length, stamp);
    await recording.write(stamped(length, stamp), position);
    done();
  };
  const look = (stamps: number[], cut = journal.now) => {
    const disk = new Uint8Array(stamps.length * SECTOR);
    for (const [i, stamp] of stamps.entries()) disk.set(stamped(SECTOR, stamp), i * SECTOR);
    return history.violation(disk, cut);
  };
  await write(0, 2 * SECTOR, 1);
  const unflushed = journal.now;
  const done = history.flush();
  await recording.flush();
  done();
  const flushed = journal.now;
  await write(SECTOR, SECTOR, 2);
  expect(look([0, 0, 0, 0], unflushed)).toBeUndefined();
  expect(look([0, 0, 0, 0], flushed)).toBe('sector 0 holds stamp 0, not one of 1');
  expect(look([1, 2, 0, 0])).toBeUndefined();
  expect(look([1, 1, 0, 0])).toBeUndefined();
  expect(look([1, 2, 0, 0], flushed)).toBe('sector 1 holds stamp 2, not one of 1');
  expect(look([2, 2, 0, 0])).toBe('sector 0 holds stamp 2, not one of 1');
  const acknowledged = new Uint8Array(4 * SECTOR);
  acknowledged.set(stamped(2 * SECTOR, 1));
  expect(history.violation(acknowledged, journal.now)).toBeUndefined();
  expect(history.violation(acknowledged, journal.now, 'process')).toBe(
    'sector 1 holds stamp 1, not one of 2',
  );
  const torn = file.toBytes();
  torn[5] = 99;
  expect(history.violation(torn, journal.now)).toBe('sector 0 holds a mixture, not one of 1');
});
