// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { decodeRing, describeRing, readRingOf } from '../lib/cli/ring-dump.js';
import { Device } from '../lib/index.js';
import { SimulatedDevice } from '../lib/sim/index.js';

const RING = 64 * 1024;

test('shows the commands in flight of a live ring, by the memory and by the process', async () => {
  using kernel = new SimulatedDevice({ ringBytes: RING, dataAreaBytes: 1 << 20 });
  const held: (() => void)[] = [];
  const device = await Device.open(kernel.open(), {
    handler: { handle: (command) => void held.push(() => command.complete()) },
  });
  const write = kernel.submit({
    cdb: [0x2a, 0, 0, 0, 0, 5, 0, 0, 8, 0],
    dataOut: new Uint8Array(4096).fill(1),
  });
  const test = kernel.submit({ cdb: [0x00, 0, 0, 0, 0, 0] });
  while (held.length < 2) await new Promise((resolve) => setImmediate(resolve));

  for (const memory of [kernel.peek(0, RING), readRingOf(process.pid)]) {
    const dump = decodeRing(memory);
    expect(dump).toMatchObject({ version: 2, problems: [] });
    expect(dump.flags).toEqual(['OUT_OF_ORDER', 'READ_LEN', 'TMR', 'KEEP_BUF']);
    const commands = dump.entries.filter((entry) => entry.op === 'command');
    expect(commands.map(({ cdb }) => cdb[0])).toEqual([0x2a, 0x00]);
    expect(commands[0]?.segments.reduce((sum, { length }) => sum + length, 0)).toBe(4096);
    expect(describeRing(dump)).toMatch(
      /command \d+ {2}cdb 2a 00 00 00 00 05 00 00 08 00.* data \d+\+/,
    );
  }

  for (const complete of held) complete();
  expect(await Promise.all([write, test])).toMatchObject([{ status: 0 }, { status: 0 }]);
  await device.close();
});

test('what no kernel writes is said, not followed', () => {
  expect(() => decodeRing(new Uint8Array(100))).toThrow(/no ring/);
  const memory = new Uint8Array(4096);
  expect(decodeRing(memory).problems[0]).toBe('mailbox version 0, not 2');
  const view = new DataView(memory.buffer);
  view.setUint16(0, 2, true);
  view.setUint32(4, 128, true);
  view.setUint32(8, 4096, true);
  expect(decodeRing(memory).problems[0]).toMatch(/^ring at 128, 4096 bytes/);
  view.setUint32(8, 2048, true);
  view.setUint32(12, 4001, true);
  expect(decodeRing(memory).problems[0]).toMatch(/^head 4001/);
  // An entry of 64 iovecs in 48 bytes.
  view.setUint32(12, 48, true);
  view.setUint32(128, 48 | 1, true);
  view.setUint32(136, 64, true);
  const dump = decodeRing(memory);
  expect(dump.problems[0]).toMatch(/reaches past its end/);
  expect(describeRing(dump)).toContain('PROBLEM: ');
});

test('a process that serves nothing', () => {
  expect(() => readRingOf(process.ppid)).toThrow(/has no uio device mapped/);
});

test('a process that is not there', () => {
  // Above any kernel's limit for process ids (PID_MAX_LIMIT, 2^22).
  expect(() => readRingOf(2 ** 22 + 1)).toThrow(/ENOENT; there is no such process/);
});
