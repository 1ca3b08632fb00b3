// SPDX-License-Identifier: Apache-2.0
import { afterEach, describe, expect, test, vi } from 'vitest';
import { CommandEntry } from '../lib/scsi/command-spec.js';
import { blockCommands } from '../lib/scsi/commands/index.js';
import type { PortGroup, PortGroups } from '../lib/scsi/index.js';
import { MemoryStore } from '../lib/store/index.js';
import { BareStore, CDB, cdb, openDevice, run } from './scsi-fake-command.js';

const memory = () => new MemoryStore({ size: 1 << 20 });
const report = (option: number, opcode = 0, action = 0, allocation = 65535) =>
  cdb(0xa3, 0x0c, option, opcode, [action, 2], [allocation, 4], 0, 0);
const RCTD = 0x80;
type Device = Awaited<ReturnType<typeof openDevice>>;

interface Described {
  opcode: number;
  action: number | undefined;
  length: number;
}

async function all(device: Device, rctd = 0): Promise<Described[]> {
  const command = await run(device, report(rctd), { in: 65535 });
  expect(command.outcome).toBe('GOOD');
  const data = Buffer.from(command.data);
  const size = rctd ? 20 : 8;
  expect(data.readUInt32BE(0)).toBe(data.length - 4);
  expect((data.length - 4) % size).toBe(0);
  const found = [];
  for (let at = 4; at < data.length; at += size) {
    const flags = data[at + 5] as number;
    expect(flags & 2).toBe(rctd ? 2 : 0);
    if (rctd) expect(data.readUInt16BE(at + 8)).toBe(10);
    if (!(flags & 1)) expect(data.readUInt16BE(at + 2)).toBe(0);
    found.push({
      opcode: data[at] as number,
      action: flags & 1 ? data.readUInt16BE(at + 2) : undefined,
      length: data.readUInt16BE(at + 6),
    });
  }
  return found;
}

describe('REPORT SUPPORTED OPERATION CODES', () => {
  test('lists every command once, in order', async () => {
    const found = await all(await openDevice(memory(), { longCommands: true }));
    const codes = found.map((entry) => entry.opcode * 65536 + (entry.action ?? 0));
    expect(codes).toEqual([...new Set(codes)].sort((a, b) => a - b));
    const opcodes = new Set(found.map((entry) => entry.opcode));
    for (const opcode of [
      ...[0x00, 0x03, 0x08, 0x0a, 0x12, 0x15, 0x1a, 0x1b, 0x25, 0x28, 0x2a, 0x2e, 0x2f, 0x34],
      ...[0x35, 0x41, 0x42, 0x55, 0x5a, 0x88, 0x89, 0x8a, 0x8b, 0x8e, 0x8f, 0x90, 0x91, 0x93],
      ...[0x9e, 0xa0, 0xa3, 0xa8, 0xaa, 0xae, 0xaf, 0x04, 0x37, 0x48, 0x4d, 0x7f, 0x83, 0x84],
      ...[0x9c, 0xa4, 0xb7],
    ]) {
      expect(opcodes, `opcode ${opcode.toString(16)}`).toContain(opcode);
    }
    expect(found.filter((entry) => entry.opcode === 0xa3)).toEqual(
      [0x0a, 0x0c, 0x0d, 0x0f].map((action) => ({ opcode: 0xa3, action, length: 12 })),
    );
  });

  test('leaves out what this device does not have', async () => {
    const found = await all(await openDevice(new BareStore(memory())));
    expect(found.map((entry) => entry.opcode)).not.toContain(0x42);
    expect(found.map((entry) => entry.opcode)).not.toContain(0x1e);
    expect(found.filter((entry) => entry.opcode === 0x93)).toHaveLength(1);
    const removable = await all(await openDevice(memory(), { removable: true }));
    expect(removable.map((entry) => entry.opcode)).toContain(0x1e);
  });

  test('with timeouts on request', async () => {
    const device = await openDevice(memory());
    expect(await all(device, RCTD)).toEqual(await all(device));
    const one = await run(device, report(RCTD | 1, 0x35), { in: 100 });
    expect(Buffer.from(one.data).toString('hex')).toBe(
      '0083000a' + '3502ffffffff3fffff00' + '000a0000' + '00000000' + '0000003c',
    );
  });

  test('usage maps tell the bits that are evaluated', async () => {
    const usage = async (device: Device, opcode: number, action?: number) => {
      const option = action === undefined ? 1 : 2;
      const command = await run(device, report(option, opcode, action ?? 0), { in: 100 });
      expect(command.data[1]).toBe(3);
      return Buffer.from(command.data.subarray(4)).toString('hex');
    };
    const device = await openDevice(memory());
    expect(await usage(device, 0x28)).toBe('2818ffffffff3fffff00');
    expect(await usage(device, 0x08)).toBe('081fffffff00');
    expect(await usage(device, 0x12)).toBe('1201ffffff00');
    expect(await usage(device, 0x93)).toBe('9309ffffffffffffffffffffffff3f00');
    expect(await usage(device, 0x9e, 0x10)).toBe('9e100000000000000000ffffffff0000');
    expect(await usage(device, 0xa3, 0x0c)).toBe('a30c87ffffffffffffff0000');
    const thick = await openDevice(new BareStore(memory()));
    expect(await usage(thick, 0x93)).toBe('9301ffffffffffffffffffffffff3f00');
  });

  test('reporting options fit codes with and without service actions', async () => {
    const device = await openDevice(memory());
    const support = async (option: number, opcode: number, action = 0) => {
      const command = await run(device, report(option, opcode, action), { in: 100 });
      return command.outcome === 'GOOD' ? command.data[1] : command.outcome;
    };
    for (const { opcode, action } of await all(device)) {
      expect(await support(1, opcode)).toBe(action === undefined ? 3 : '5/24/0');
      expect(await support(2, opcode, action)).toBe(action === undefined ? '5/24/0' : 3);
      expect(await support(3, opcode, action)).toBe(3);
    }
    for (const option of [1, 2, 3]) expect(await support(option, 0xc0)).toBe(1);
    expect(await support(2, 0x9e, 0x1f)).toBe(1);
    expect(await support(3, 0x28, 1)).toBe(1);
    for (const option of [4, 5, 6, 7]) expect(await support(option, 0x28)).toBe('5/24/0');
  });

  test('the allocation length cuts', async () => {
    const device = await openDevice(memory());
    for (const allocation of [0, 1, 4, 30]) {
      const command = await run(device, report(0, 0, 0, allocation), { in: 65535 });
      expect(command.written).toBe(allocation);
    }
  });
});

describe('REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS', () => {
  const tmf = (options: number, allocation: number) =>
    cdb(0xa3, 0x0d, options, 0, 0, 0, [allocation, 4], 0, 0);

  test('tells of those that LIO has; a buffer below four bytes is refused', async () => {
    const device = await openDevice(memory());
    const short = await run(device, tmf(0, 100), { in: 100 });
    expect(Buffer.from(short.data).toString('hex')).toBe('c8000000');
    const long = await run(device, tmf(0x80, 100), { in: 100 });
    expect(Buffer.from(long.data).toString('hex')).toBe(`c800000c${'00'.repeat(12)}`);
    expect((await run(device, tmf(0, 3), { in: 3 })).outcome).toBe('5/24/0');
  });
});

describe('target port groups', () => {
  const rtpg = (format: number, allocation = 255) =>
    cdb(0xa3, (format << 5) | 0x0a, 0, 0, 0, 0, [allocation, 4], 0, 0);
  const stpg = (length: number) => cdb(0xa4, 0x0a, 0, 0, 0, 0, [length, 4], 0, 0);
  const hex = (bytes: Uint8Array) => Buffer.from(bytes).toString('hex');

  test('one group unless told otherwise, in both formats', async () => {
    const device = await openDevice(memory());
    const plain = await run(device, rtpg(0), { in: 255 });
    expect(hex(plain.data)).toBe('0000000c' + '0001000000000001' + '00000001');
    const extended = await run(device, rtpg(1), { in: 255 });
    expect(hex(extended.data)).toBe('00000010' + '10000000' + '0001000000000001' + '00000001');
    expect((await run(device, rtpg(2), { in: 255 })).outcome).toBe('5/24/0');
    expect((await run(device, stpg(8), { out: new Uint8Array(8) })).outcome).toBe('5/24/0');
  });

  test('states are told and set, all or none; the initiator hears of changes', async () => {
    const states: PortGroup['state'][] = ['active-optimized', 'standby'];
    const groups: PortGroups = {
      list: async () =>
        states.map((state, i) => ({
          id: i + 5,
          state,
          preferred: i === 0,
          supported: ['active-optimized', 'standby', 'transitioning'],
          ports: [i + 1, i + 9],
        })),
      set: async (changes) => {
        for (const { id, state } of changes) states[id - 5] = state;
      },
    };
    const device = await openDevice(memory(), { portGroups: groups });
    expect(((await run(device, CDB.inquiry(), { in: 96 })).data[5] as number) & 0x30).toBe(0x30);
    expect(hex((await run(device, rtpg(0), { in: 255 })).data)).toBe(
      '00000020' +
        ('8085000500000002' + '00000001' + '00000009') +
        ('0285000600000002' + '00000002' + '0000000a'),
    );
    const set = async (...changes: [state: number, id: number][]) => {
      const list = Uint8Array.from([0, 0, 0, 0, ...changes.flatMap(([s, id]) => [s, 0, 0, id])]);
      return run(device, stpg(list.length), { out: list });
    };
    expect((await set([2, 5], [0, 6])).outcome).toBe('GOOD');
    expect(states).toEqual(['standby', 'active-optimized']);
    const bad = await set([0, 5], [1, 6]);
    expect(bad.sense?.field).toEqual({ in: 'parameters', byte: 8, bit: 3 });
    expect((await set([0, 7])).sense?.field).toMatchObject({ in: 'parameters', byte: 6 });
    expect((await run(device, stpg(6), { out: new Uint8Array(6) })).outcome).toBe('5/1a/0');
    expect(states).toEqual(['standby', 'active-optimized']);
    device.portGroupsChanged();
    expect((await run(device, CDB.testUnitReady())).outcome).toBe('6/2a/6');
  });
});

describe('the clock', () => {
  afterEach(() => {
    vi.useRealTimers();
  });

  test("is this machine's until it is set", async () => {
    const device = await openDevice(memory());
    const report = async () => {
      const { data } = await run(device, cdb(0xa3, 0x0f, 0, 0, 0, 0, [12, 4], 0, 0), { in: 12 });
      return { origin: data[2], time: Buffer.from(data).readUIntBE(4, 6) };
    };
    vi.useFakeTimers({ toFake: ['Date'], now: 1_234_567_890_123 });
    expect(await report()).toEqual({ origin: 3, time: 1_234_567_890_123 });
    const list = Buffer.alloc(12);
    list.writeUIntBE(1_000_000_000_000, 4, 6);
    const set = (out: Uint8Array) =>
      run(device, cdb(0xa4, 0x0f, 0, 0, 0, 0, [out.length, 4], 0, 0), { out });
    expect((await set(list)).outcome).toBe('GOOD');
    vi.setSystemTime(1_234_567_890_123 + 5000);
    expect(await report()).toEqual({ origin: 2, time: 1_000_000_005_000 });
    expect((await set(list.subarray(0, 11))).outcome).toBe('5/1a/0');
  });
});

describe('the command table', () => {
  test('no field leaves its CDB, overlaps another or the CONTROL byte', () => {
    for (const spec of blockCommands) {
      const taken = new Uint8Array(spec.length);
      taken[0] = 0xff;
      if (spec.opcode === 0x7f) taken.fill(0xff, 7, 10);
      else if (spec.serviceAction !== undefined) taken[1] = 0x1f;
      for (const field of spec.fields) {
        const end = spec.opcode === 0x7f ? spec.length : spec.length - 1;
        expect(field.byte + field.bytes, `${spec.name}: ${field.name}`).toBeLessThanOrEqual(end);
        for (let i = 0; i < field.bytes; i++) {
          const mask = i === 0 ? field.mask : 0xff;
          const at = field.byte + i;
          expect((taken[at] as number) & mask, `${spec.name}: ${field.name}`).toBe(0);
          (taken[at] as number) |= mask;
        }
        if (field.refused) expect(field.bytes).toBe(1);
      }
    }
  });

  test('CDB lengths follow the group of the operation code', () => {
    const lengths: Record<number, number> = { 0: 6, 1: 10, 2: 10, 3: 32, 4: 16, 5: 12 };
    for (const spec of blockCommands) {
      expect(spec.length, spec.name).toBe(lengths[spec.opcode >> 5]);
    }
  });

  test('a variable length CDB carries its length and service action', () => {
    const entry = new CommandEntry({
      name: 'READ (32)',
      standard: 'SBC-4',
      opcode: 0x7f,
      serviceAction: 0x0009,
      length: 32,
      fields: [],
      medium: 'read',
      run() {},
    });
    expect([...entry.usage.subarray(0, 10)]).toEqual([0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, 9]);
    expect(entry.refusals).toMatchObject([{ name: 'NACA', byte: 1, mask: 4 }]);
  });
});
