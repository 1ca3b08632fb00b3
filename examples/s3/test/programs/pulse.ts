// SPDX-License-Identifier: Apache-2.0
/**
 * Opens a disk in a process of its own and writes to its cache, a block every few milliseconds, without ever flushing.
 *
 *     pulse.mjs '{"location": …, "connect": {…}, "disk": {…}}'
 *
 * Prints `open`, then `a TIME` for each write that was acknowledged, with the host's monotonic clock right after it, and
 * `failed CODE` for each that wasn't; it goes on after that.
 */
import { MemoryDataOut } from 'tcmu/store';
import { connect } from '../../src/client/index.js';
import { S3Disk } from '../../src/index.js';
import { request } from '../support/drive.js';
import type { WriterPlan } from './writer.js';

const plan = JSON.parse(process.argv[2] ?? '') as WriterPlan;
const { store, prefix } = await connect(plan.location, plan.connect);
const disk = await S3Disk.open(store, prefix, plan.disk);
process.stdout.write('open\n');
const block = Buffer.alloc(4096, 0xaa);
for (;;) {
  let line: string;
  try {
    const writing = disk.write(0, new MemoryDataOut(block), { ...request, fua: false });
    if (writing !== undefined) await writing;
    line = `a ${process.hrtime.bigint()}\n`;
  } catch (error) {
    line = `failed ${(error as { cause?: { code?: unknown } }).cause?.code}\n`;
  }
  process.stdout.write(line);
  await new Promise((resolve) => setTimeout(resolve, 5));
}
