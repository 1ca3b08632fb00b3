// SPDX-License-Identifier: Apache-2.0
/** A device's commands over the simulated kernel: one completion each, whatever the handler does. */
import { afterEach, describe, expect, it } from 'vitest';
import type { Command } from '../lib/device/command.js';
import { Device, type DeviceOptions } from '../lib/device/device.js';
import { type CommandHandler, Status } from '../lib/device/handler.js';
import { CommandError, type TcmuError } from '../lib/errors.js';
import { SenseError, sense } from '../lib/scsi/sense.js';
import { SimulatedDevice, type SimulatedDeviceOptions } from '../lib/sim/index.js';

const TEST_UNIT_READY = [0, 0, 0, 0, 0, 0];
const read10 = (blocks: number) => [0x28, 0, 0, 0, 0, 0, 0, blocks >> 8, blocks & 0xff, 0];
const write10 = (blocks: number) => [0x2a, 0, 0, 0, 0, 0, 0, blocks >> 8, blocks & 0xff, 0];
const POISON = 0xdb;

const opened: (() => Promise<unknown> | void)[] = [];
afterEach(async () => {
  for (const end of opened.splice(0).reverse()) await end();
});

async function serve(
  handle: CommandHandler<Command>['handle'] | undefined,
  options: SimulatedDeviceOptions = {},
  deviceOptions: DeviceOptions = {},
) {
  const sim = new SimulatedDevice({ poison: POISON, dataAreaBytes: 16 << 20, ...options });
  const device = await Device.open(sim.open(), {
    ...(handle === undefined ? {} : { handler: { handle } }),
    ...deviceOptions,
  });
  const errors: Error[] = [];
  device.on('error', (error) => errors.push(error));
  opened.push(() => sim.close());
  opened.push(() => device.close({ deadline: 100 }).catch(() => {}));
  return { sim, device, errors };
}

const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

describe('completion', () => {
  it('takes the status a synchronous handler gives', async () => {
    const { sim } = await serve((command) => command.complete(Status.CONDITION_MET));
    expect((await sim.submit({ cdb: TEST_UNIT_READY })).status).toBe(Status.CONDITION_MET);
  });

  it('carries data both ways and the CDB exactly as long as its operation code says', async () => {
    const cdbs: Uint8Array[] = [];
    let memory: Uint8Array = new Uint8Array();
    const { sim } = await serve((command) => {
      cdbs.push(command.cdb.slice());
      if (command.cdb[0] === 0x2a) memory = command.dataOut.toBytes();
      else if (command.cdb[0] === 0x28) command.dataIn.copyFrom(memory);
      command.complete();
    });
    const dataOut = new Uint8Array(100_000).map((_, i) => i * 7);
    await sim.submit({ cdb: write10(8), dataOut });
    const { data } = await sim.submit({ cdb: read10(8), dataInLength: dataOut.length });
    expect(Buffer.compare(data, dataOut)).toBe(0);
    const long = [0x7f, 0, 0, 0, 0, 0, 0, 0x38, ...new Array(56).fill(3)];
    await sim.submit({ cdb: long });
    await sim.submit({ cdb: [0x88, ...new Array(15).fill(9)] });
    expect(cdbs.map((cdb) => cdb.length)).toEqual([10, 10, 64, 16]);
    expect([...(cdbs[2] as Uint8Array)]).toEqual(long);
  });

  it('completes out of order, each command with its own data', async () => {
    const waiting: Command[] = [];
    const { sim } = await serve((command) => {
      waiting.push(command);
      if (waiting.length < 20) return;
      for (const one of waiting.sort(() => Math.random() - 0.5)) {
        one.dataIn.fill(one.cdb[5] as number);
        one.complete();
      }
    });
    const answers = await Promise.all(
      Array.from({ length: 20 }, (_, i) =>
        sim.submit({ cdb: [0x28, 0, 0, 0, 0, i, 0, 0, 1, 0], dataInLength: 512 }),
      ),
    );
    answers.forEach(({ status, data }, i) => {
      expect(status).toBe(Status.GOOD);
      expect(data.every((byte) => byte === i)).toBe(true);
    });
  });

  it('answers HARDWARE ERROR for a handler that throws, and goes on', async () => {
    const { sim, errors } = await serve((command) => {
      if (command.cdb[0] === 0x28) throw new Error('handler bug');
      command.complete();
    });
    const { status, sense: data } = await sim.submit({ cdb: read10(1), dataInLength: 512 });
    expect(status).toBe(Status.CHECK_CONDITION);
    expect((data as Uint8Array)[2]).toBe(0x04);
    expect(errors.map((error) => error.message)).toEqual(['handler bug']);
    expect((await sim.submit({ cdb: TEST_UNIT_READY })).status).toBe(Status.GOOD);
  });

  it('answers what a SenseError says, without calling it an error', async () => {
    const { sim, errors } = await serve(async () => {
      throw sense.lbaOutOfRange();
    });
    const { sense: data } = await sim.submit({ cdb: read10(1), dataInLength: 512 });
    expect([(data as Uint8Array)[2], (data as Uint8Array)[12]]).toEqual([0x05, 0x21]);
    expect(errors).toEqual([]);
    expect(SenseError.is(sense.lbaOutOfRange())).toBe(true);
  });

  it('answers HARDWARE ERROR for a promise that resolves without complete()', async () => {
    const { sim, errors } = await serve(async () => {});
    const { status } = await sim.submit({ cdb: TEST_UNIT_READY });
    expect(status).toBe(Status.CHECK_CONDITION);
    expect((errors[0] as TcmuError).code).toBe('ERR_TCMU_COMMAND_UNCOMPLETED');
  });

  it('makes a second completion an error and not a completion', async () => {
    const thrown: unknown[] = [];
    const { sim } = await serve((command) => {
      command.complete(Status.BUSY);
      try {
        command.complete(Status.GOOD);
      } catch (error) {
        thrown.push(error);
      }
    });
    expect((await sim.submit({ cdb: TEST_UNIT_READY })).status).toBe(Status.BUSY);
    expect(thrown[0]).toBeInstanceOf(CommandError);
    expect((thrown[0] as TcmuError).code).toBe('ERR_TCMU_COMMAND_COMPLETED');
    expect(sim.state()).toMatchObject({ completions: 1, broken: null });
  });

  it('waits for an async handler that has completed but not settled', async () => {
    let finish = () => {};
    const { sim } = await serve((command) => {
      command.complete();
      return new Promise<void>((resolve) => {
        finish = resolve;
      });
    });
    let answered = false;
    const result = sim.submit({ cdb: TEST_UNIT_READY }).then(() => {
      answered = true;
    });
    await sleep(50);
    expect(answered).toBe(false);
    finish();
    await result;
  });

  it('keeps at most `concurrency` commands running, in order of arrival', async () => {
    let running = 0;
    let most = 0;
    const order: number[] = [];
    const { sim } = await serve(
      async (command) => {
        most = Math.max(most, ++running);
        order.push(command.cdb[5] as number);
        await sleep(2);
        running--;
        command.complete();
      },
      {},
      { concurrency: 3 },
    );
    await Promise.all(
      Array.from({ length: 30 }, (_, i) => sim.submit({ cdb: [0x28, 0, 0, 0, 0, i, 0, 0, 0, 0] })),
    );
    expect(most).toBe(3);
    expect(order).toEqual(Array.from({ length: 30 }, (_, i) => i));
  });

  it('gives the commands to a loop when there is no handler', async () => {
    const { sim, device } = await serve(undefined, {}, { concurrency: 4 });
    let seen = 0;
    const loop = (async () => {
      for await (const command of device) {
        seen++;
        setTimeout(() => command.complete(), 1);
      }
    })();
    await Promise.all(Array.from({ length: 25 }, () => sim.submit({ cdb: TEST_UNIT_READY })));
    await device.close();
    await loop;
    expect(seen).toBe(25);
  });

  it('rings the doorbell once for a batch', async () => {
    const held: Command[] = [];
    const { sim, device } = await serve((command) => {
      held.push(command);
    });
    const all = Promise.all(Array.from({ length: 32 }, () => sim.submit({ cdb: TEST_UNIT_READY })));
    while (held.length < 32) await sleep(1);
    for (const command of held) command.complete();
    await all;
    expect(device.stats().doorbells).toBe(1);
  });
});

describe('bytes a handler did not write', () => {
  it('are cut off by READ_LEN', async () => {
    const { sim } = await serve((command) => {
      if (command.cdb[0] === 0x12) command.dataIn.copyFrom(new Uint8Array(10).fill(1));
      else if (command.cdb[0] === 0x28) command.dataIn.fill(0x77);
      command.complete();
    });
    await sim.submit({ cdb: read10(8), dataInLength: 4096 });
    const { data, residual, buffer } = await sim.submit({
      cdb: [0x12, 0, 0, 0, 96, 0],
      dataInLength: 96,
    });
    expect(data.length).toBe(10);
    expect(residual).toBe(86);
    expect(buffer.subarray(10).every((byte) => byte === 0)).toBe(true);
  });

  it.each([
    ['untouched', (_: Command) => {}],
    ['exposed', (command: Command) => void command.dataIn.segments()],
    ['a hole in front', (command: Command) => command.dataIn.copyFrom(new Uint8Array(0), 100)],
    ['written at the end only', (command: Command) => command.dataIn.fill(0, 4000, 4096)],
  ])('are zero: %s', async (_, use) => {
    const { sim } = await serve(
      (command) => {
        use(command);
        command.complete();
      },
      { capabilities: 1 },
    );
    for (let i = 0; i < 4; i++) {
      const { buffer } = await sim.submit({ cdb: read10(8), dataInLength: 4096 });
      expect(buffer.every((byte) => byte === 0)).toBe(true);
    }
  });

  it.each([Status.GOOD, Status.BUSY, Status.TASK_SET_FULL, Status.CHECK_CONDITION])(
    'never show other commands bytes with status %i',
    async (status) => {
      const { sim } = await serve((command) => {
        if (command.cdb[0] === 0x28) command.complete(status);
        else command.complete();
      });
      await sim.submit({ cdb: write10(8), dataOut: new Uint8Array(4096).fill(0x5e) });
      const { buffer } = await sim.submit({ cdb: read10(8), dataInLength: 4096 });
      expect(buffer.every((byte) => byte === 0)).toBe(true);
    },
  );

  it('are zero in the Data-In of a bidirectional command', async () => {
    const { sim } = await serve((command) => {
      expect(command.dataOut.toBytes().every((byte) => byte === 0x42)).toBe(true);
      expect(command.dataIn.length).toBe(3000);
      command.dataIn.copyFrom(new Uint8Array(10).fill(9), 20);
      command.complete();
    });
    const { data, buffer } = await sim.submit({
      cdb: [0x53, 0, 0, 0, 0, 0, 0, 0, 1, 0],
      dataOut: new Uint8Array(5000).fill(0x42),
      dataInLength: 3000,
      bidirectional: true,
    });
    // The kernel looks at READ_LEN only where the data goes one way: all of it arrives.
    expect(data.length).toBe(3000);
    expect([...data.subarray(18, 32)]).toEqual([0, 0, ...new Array(10).fill(9), 0, 0]);
    expect(data.subarray(0, 20).every((byte) => byte === 0)).toBe(true);
    expect(buffer.subarray(30).every((byte) => byte === 0)).toBe(true);
  });
});

describe('giving up', () => {
  it('aborts the signal on ABORT TASK, and completes all the same', async () => {
    const reasons: unknown[] = [];
    const { sim, device } = await serve(async (command) => {
      await new Promise<void>((resolve) =>
        command.signal.addEventListener('abort', () => {
          reasons.push(command.signal.reason);
          resolve();
        }),
      );
      command.complete(Status.TASK_ABORTED);
    });
    const result = sim.submit({ cdb: TEST_UNIT_READY });
    await expect.poll(() => device.inFlight).toBe(1);
    expect(sim.abort(result)).toBe(true);
    expect((await result).status).toBe(Status.TASK_ABORTED);
    expect((reasons[0] as TcmuError).code).toBe('ERR_TCMU_COMMAND_ABORTED');
    expect(sim.state().inFlight).toBe(0);
  });

  it('tells a handler of a LUN reset, once, with the commands it hits', async () => {
    const held: Command[] = [];
    const told: [string, number][] = [];
    const resets: string[] = [];
    const sim = new SimulatedDevice({});
    const device = await Device.open(sim.open(), {
      handler: {
        handle: (command) => {
          held.push(command);
        },
        taskManagement: (tmr) => {
          told.push([tmr.type, tmr.commands.length]);
          for (const command of tmr.commands) command.complete(Status.TASK_ABORTED);
        },
      },
    });
    opened.push(() => sim.close());
    opened.push(() => device.close());
    device.on('reset', (type) => resets.push(type));
    const commands = [1, 2, 3].map(() => sim.submit({ cdb: TEST_UNIT_READY }));
    while (held.length < 3) await sleep(1);
    await sim.lunReset();
    await Promise.all(commands);
    expect(told).toEqual([['lun-reset', 3]]);
    expect(resets).toEqual(['lun-reset']);
    expect(held.every((command) => command.signal.aborted)).toBe(true);
  });

  it('does not start a command that was aborted while it waited for its turn', async () => {
    let started = 0;
    const gate: Command[] = [];
    const { sim, device } = await serve(
      (command) => {
        started++;
        gate.push(command);
      },
      {},
      { concurrency: 1 },
    );
    const first = sim.submit({ cdb: TEST_UNIT_READY });
    const second = sim.submit({ cdb: TEST_UNIT_READY });
    await expect.poll(() => device.inFlight).toBe(2);
    sim.abort(second);
    await expect.poll(() => device.stats().tmrs).toBe(1);
    (gate[0] as Command).complete();
    expect((await first).status).toBe(Status.GOOD);
    expect((await second).status).toBe(Status.TASK_ABORTED);
    expect(started).toBe(1);
  });

  it('aborts the signal when the kernel has timed the command out; a late completion is harmless', async () => {
    const { sim } = await serve(
      async (command) => {
        await new Promise((resolve) => command.signal.addEventListener('abort', resolve));
        await sleep(50);
        command.complete();
      },
      { commandTimeout: 150 },
    );
    const { status, sense: data } = await sim.submit({ cdb: TEST_UNIT_READY });
    expect([status, (data as Uint8Array)[2]]).toEqual([Status.CHECK_CONDITION, 0x02]);
    await expect.poll(() => sim.state().inFlight).toBe(0);
    expect(sim.state().broken).toBe(null);
  });

  it('aborts everything when the ring is reset under load, and serves on', async () => {
    const held: Command[] = [];
    const { sim } = await serve((command) => {
      if (held.length < 5) held.push(command);
      else command.complete();
    });
    const commands = Array.from({ length: 5 }, () =>
      sim.submit({ cdb: read10(8), dataInLength: 4096 }),
    );
    while (held.length < 5) await sleep(1);
    sim.block();
    sim.resetRing(1);
    sim.unblock();
    expect((await Promise.all(commands)).map(({ status }) => status)).toEqual(
      new Array(5).fill(Status.BUSY),
    );
    expect((await sim.submit({ cdb: TEST_UNIT_READY })).status).toBe(Status.GOOD);
    expect(held.every((command) => command.signal.aborted)).toBe(true);
    for (const command of held) command.complete();
    expect((await sim.submit({ cdb: TEST_UNIT_READY })).status).toBe(Status.GOOD);
    expect(sim.state()).toMatchObject({ broken: null, inFlight: 0 });
  });

  it('ends with DEVICE_GONE when the kernel takes the device away', async () => {
    const { sim, device, errors } = await serve((command) => command.complete());
    await sim.submit({ cdb: TEST_UNIT_READY });
    await sim.remove();
    await expect.poll(() => device.closed).toBe(true);
    expect((errors[0] as TcmuError).code).toBe('ERR_TCMU_DEVICE_GONE');
  });
});

describe('a ring no kernel writes', () => {
  it.each([
    ['another mailbox version', 'ERR_TCMU_RING_VERSION', 0, [3, 0]],
    ['a ring outside the mapping', 'ERR_TCMU_RING_CORRUPT', 4, [0, 0, 0, 0xff]],
    ['a tail outside the ring', 'ERR_TCMU_RING_CORRUPT', 64, [0, 0, 0, 0x7f]],
  ])('is refused at open, and let go: %s', async (_, code, offset, bytes) => {
    const sim = new SimulatedDevice({});
    opened.push(() => sim.close());
    const good = sim.peek(offset, bytes.length);
    sim.poke(offset, Uint8Array.from(bytes));
    await expect(Device.open(sim.open(), {})).rejects.toThrow(expect.objectContaining({ code }));
    sim.poke(offset, good);
    // Its descriptors are closed: the next may open.
    const device = await Device.open(sim.open(), {
      handler: { handle: (command) => command.complete() },
    });
    expect((await sim.submit({ cdb: TEST_UNIT_READY })).status).toBe(Status.GOOD);
    await device.close();
  });

  it('ends serving with a clear error when it turns up later', async () => {
    const { sim, device, errors } = await serve((command) => command.complete());
    await sim.submit({ cdb: TEST_UNIT_READY });
    // cmd_head, past the ring's end.
    sim.poke(12, Uint8Array.of(0xff, 0xff, 0xff, 0x7f));
    sim.kick();
    await expect.poll(() => device.closed).toBe(true);
    expect((errors[0] as TcmuError).code).toBe('ERR_TCMU_RING_CORRUPT');
    expect(errors[0]?.message).toContain('sim/disk');
  });
});

describe('close', () => {
  it('drains, answers BUSY after the deadline, and frees the device for the next', async () => {
    const held: Command[] = [];
    const { sim, device } = await serve((command) => {
      held.push(command);
    });
    const late = sim.submit({ cdb: TEST_UNIT_READY });
    while (held.length < 1) await sleep(1);
    const closing = device.close({ deadline: 50 });
    expect(device.close()).toBe(closing);
    await closing;
    expect((await late).status).toBe(Status.BUSY);
    expect(device.closed).toBe(true);
    const next = await Device.open(sim.open(), {
      handler: { handle: (command) => command.complete() },
    });
    opened.push(() => next.close());
    expect((await sim.submit({ cdb: TEST_UNIT_READY })).status).toBe(Status.GOOD);
  });

  it('refuses a second opener meanwhile', async () => {
    const { sim } = await serve((command) => command.complete());
    expect(() => sim.open()).toThrow(/ERR|busy|open already/i);
  });

  it('calls the handler open before the first command and close after the last', async () => {
    const calls: string[] = [];
    let finish = () => {};
    const finished = new Promise<void>((resolve) => {
      finish = resolve;
    });
    const sim = new SimulatedDevice({});
    opened.push(() => sim.close());
    const device = await Device.open(sim.open(), {
      handler: {
        open: async () => void calls.push('open'),
        handle: async (command) => {
          await finished;
          calls.push('handle');
          command.complete();
        },
        close: () => void calls.push('close'),
      },
    });
    const result = sim.submit({ cdb: TEST_UNIT_READY });
    await expect.poll(() => device.inFlight).toBe(1);
    const closing = device.close();
    await sleep(20);
    finish();
    await closing;
    await result;
    expect(calls).toEqual(['open', 'handle', 'close']);
  });
});

describe('KEEP_BUF', () => {
  it('keeps Data-Out readable after the answer, until released', async () => {
    const kept: ReturnType<Command['completeKeeping']>[] = [];
    const { sim } = await serve((command) => {
      if (command.cdb[0] === 0x2a) kept.push(command.completeKeeping());
      else command.complete();
    });
    const dataOut = new Uint8Array(8192).fill(0x31);
    expect((await sim.submit({ cdb: write10(16), dataOut })).status).toBe(Status.GOOD);
    await sim.submit({ cdb: write10(16), dataOut: new Uint8Array(8192).fill(0x32) });
    const [first, second] = kept;
    expect(first?.dataOut.toBytes()).toEqual(dataOut);
    await first?.release();
    expect(() => first?.dataOut.toBytes()).toThrow(
      expect.objectContaining({ code: 'ERR_TCMU_BUFFER_REVOKED' }),
    );
    await second?.release();
    expect(sim.state()).toMatchObject({ blocksInUse: 0, broken: null });
  });

  it('leaves it as it is for a handler that asked for both buffers', async () => {
    const kept: ReturnType<Command['completeKeeping']>[] = [];
    const { sim } = await serve((command) => {
      expect(command.dataIn.length).toBe(command.dataOut.length);
      kept.push(command.completeKeeping());
    });
    const dataOut = new Uint8Array(8192).fill(0x31);
    await sim.submit({ cdb: write10(16), dataOut });
    expect(kept[0]?.dataOut.toBytes()).toEqual(dataOut);
    await kept[0]?.release();
  });
});
