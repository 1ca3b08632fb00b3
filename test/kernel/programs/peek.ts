// SPDX-License-Identifier: Apache-2.0
/**
 * Reads past the page cache into memory that it knows, and says what is there afterwards, also when the
 * read failed: the device writes into these very pages.
 *
 *     peek.js <disk> <position> <length> <text to look for>
 *
 * Prints `peek error=CODE|none bytes=N found=true|false untouched=true|false`.
 */
import assert from 'node:assert/strict';
import { constants, open } from 'node:fs/promises';
import { alignedMemory } from './aligned-memory.js';

const [disk, position, length, text] = process.argv.slice(2);
assert(disk !== undefined && text !== undefined, 'usage: peek <disk> <position> <length> <text>');

const memory = Buffer.from(alignedMemory(Number(length)));
memory.fill(0xee);
const file = await open(disk, constants.O_RDONLY | constants.O_DIRECT);
let error = 'none';
let bytes = 0;
try {
  ({ bytesRead: bytes } = await file.read(memory, 0, Number(length), Number(position)));
} catch (problem) {
  error = (problem as NodeJS.ErrnoException).code ?? 'unknown';
}
const untouched = memory.every((byte) => byte === 0xee);
console.log(
  `peek error=${error} bytes=${bytes} found=${memory.includes(text)} untouched=${untouched}`,
);
