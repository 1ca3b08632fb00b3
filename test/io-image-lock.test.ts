// SPDX-License-Identifier: Apache-2.0
/** QEMU's image locks on BackingFile: who may open beside whom, and which bytes carry that. */
import { mkdtempSync, rmSync, truncateSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { BackingFile } from '../lib/io/backing-file.js';
import { native } from '../lib/native.js';

let folder: string;
const files: BackingFile[] = [];

async function open(readOnly: boolean): Promise<BackingFile> {
  const file = await BackingFile.open(join(folder, 'image'), { readOnly, create: !readOnly });
  files.push(file);
  return file;
}

/** The bytes another open file description sees locked. */
function lockedBytes(seenBy: BackingFile): number[] {
  return Array.from({ length: 300 }, (_, byte) => byte).filter((byte) =>
    native.lockedByOthers(seenBy.fd, byte, 1),
  );
}

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'tcmu-lock-'));
  await (await open(false)).close();
  truncateSync(join(folder, 'image'), 4096);
});

afterEach(async () => {
  for (const file of files.splice(0)) await file.close();
  rmSync(folder, { recursive: true });
});

test.each([
  { first: 'w', second: 'w', together: false },
  { first: 'w', second: 'r', together: false },
  { first: 'r', second: 'w', together: false },
  { first: 'r', second: 'r', together: true },
])('$second beside $first: $together', async ({ first, second, together }) => {
  (await open(first === 'r')).lockImage();
  const other = await open(second === 'r');
  if (together) return other.lockImage();
  expect(() => other.lockImage()).toThrowError(
    expect.objectContaining({
      code: 'ERR_TCMU_FILE_LOCKED',
      errno: 'EAGAIN',
      message: expect.stringContaining(`lock ${join(folder, 'image')}`),
    }),
  );
  // Nothing is left of a lock that was refused: the first goes, a third gets all.
  await files.at(-2)?.close();
  (await open(false)).lockImage();
});

test('the bytes are those QEMU locks', async () => {
  const look = await open(true);
  const writer = await open(false);
  writer.lockImage();
  expect(lockedBytes(look)).toEqual([100, 101, 103, 201, 203]);
  await writer.close();
  const reader = await open(true);
  reader.lockImage();
  expect(lockedBytes(look)).toEqual([100, 201, 203]);
  await reader.close();
  expect(lockedBytes(look)).toEqual([]);
  // A writable description may be locked for reading alone.
  (await open(false)).lockImage(false);
  expect(lockedBytes(look)).toEqual([100, 201, 203]);
});

test('shared locks of several descriptions on one byte; an own lock is no obstacle', async () => {
  const [a, b] = [await open(true), await open(true)];
  expect(native.lockFile(a.fd, false, 7, 1)).toBe(true);
  expect(native.lockFile(b.fd, false, 7, 1)).toBe(true);
  native.unlockFile(b.fd, 0, 0);
  expect(native.lockedByOthers(a.fd, 7, 1)).toBe(false);
  expect(native.lockedByOthers(b.fd, 7, 1)).toBe(true);
  expect(native.lockedByOthers(b.fd, 0, 7)).toBe(false);
  expect(() => native.lockedByOthers(9999, 0, 1)).toThrow('EBADF');
  expect(() => native.unlockFile(9999, 0, 1)).toThrow('EBADF');
});
