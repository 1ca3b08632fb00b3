// SPDX-License-Identifier: Apache-2.0
/**
 * Writes stamped blocks to a disk and remembers each acknowledged one, across whatever happens to the handler.
 *
 *     writer.js <disk> <backing file> [workers]
 *
 * Prints `ready`, then `progress acknowledged=N` twice a second. On SIGTERM it lets the writes in flight
 * finish, then reads every block it wrote from the disk and from the backing file: both must hold exactly
 * the last acknowledged stamp. Exit code 0 after `checked`; 1 on the first lost, torn or failed write.
 *
 * All I/O is direct and every block has one writer at a time, so nothing but the device can make it right.
 */
import assert from 'node:assert/strict';
import { constants, type FileHandle, open } from 'node:fs/promises';
import process from 'node:process';
import { alignedMemory } from './aligned-memory.js';

const blockBytes = 4096;

const [disk, image, workerCount = '16'] = process.argv.slice(2);
assert(disk !== undefined && image !== undefined, 'usage: writer <disk> <backing file> [workers]');

/** One block; direct I/O wants it aligned. */
function alignedBuffer(): Uint32Array {
  return new Uint32Array(alignedMemory(blockBytes), 0, blockBytes / 4);
}

/** Every word depends on block, sequence number and place: no mixture of two blocks looks right. */
function stamp(words: Uint32Array, block: number, sequence: number): void {
  for (let i = 0; i < words.length; i++) {
    words[i] = Math.imul(block + 1, 0x9e3779b1) ^ Math.imul(sequence, 0x85ebca6b) ^ (i << 20) ^ i;
  }
  words[0] = sequence;
}

const device = await open(disk, constants.O_RDWR | constants.O_DIRECT);
const backing = await open(image, constants.O_RDONLY);
const { size } = await backing.stat();
const blocks = Math.floor(size / blockBytes);
const workers = Number(workerCount);
const acknowledged = new Uint32Array(blocks);
let total = 0;
let stopping = false;

async function work(worker: number): Promise<void> {
  const words = alignedBuffer();
  const mine = Math.floor((blocks - worker + workers - 1) / workers);
  for (let sequence = 1; !stopping; sequence++) {
    const block = worker + workers * Math.floor(Math.random() * mine);
    stamp(words, block, sequence);
    const { bytesWritten } = await device.write(words, 0, blockBytes, block * blockBytes);
    assert.equal(bytesWritten, blockBytes, `short write of block ${block}`);
    acknowledged[block] = sequence;
    total++;
  }
}

async function check(path: string, file: FileHandle): Promise<number> {
  const words = alignedBuffer();
  const expected = new Uint32Array(words.length);
  let checked = 0;
  for (let block = 0; block < blocks; block++) {
    const sequence = acknowledged[block] as number;
    if (sequence === 0) continue;
    await file.read(words, 0, blockBytes, block * blockBytes);
    stamp(expected, block, sequence);
    const wrong = words.findIndex((word, i) => word !== expected[i]);
    assert.equal(
      wrong,
      -1,
      `${path}: block ${block}: write ${sequence} was acknowledged, write ${words[0]} is there, first wrong word ${wrong}`,
    );
    checked++;
  }
  return checked;
}

process.once('SIGTERM', () => {
  stopping = true;
});
const progress = setInterval(() => console.log(`progress acknowledged=${total}`), 500);
console.log('ready');
try {
  await Promise.all(Array.from({ length: workers }, (_, worker) => work(worker)));
  clearInterval(progress);
  const onDisk = await check(disk, device);
  assert.equal(await check(image, backing), onDisk);
  console.log(`checked blocks=${onDisk} acknowledged=${total}`);
} catch (error) {
  console.log(`failed: ${(error as Error).message}`);
  process.exit(1);
}
process.exit(0);
