// SPDX-License-Identifier: Apache-2.0
/** Zero copy through a whole stack: initiator's pages, ring, Device, handler. */
import { closeSync, openSync, readSync } from 'node:fs';
import { afterEach, describe, expect, test } from 'vitest';
import type { Command, KeptData } from '../lib/device/command.js';
import { Device } from '../lib/device/device.js';
import type { ScsiCommand } from '../lib/device/handler.js';
import { BackingFile } from '../lib/io/backing-file.js';
import {
  SimulatedDevice,
  type SimulatedDeviceOptions,
  type SimulatedDisk,
  simulate,
} from '../lib/sim/index.js';
import { MemoryStore } from '../lib/store/index.js';

const MiB = 2 ** 20;
const ZERO_COPY = 1;
const DIRECT_IO = 4;
const DATA_IN = 8;
let disk: SimulatedDisk | undefined;
let kernel: SimulatedDevice | undefined;
let device: Device | undefined;

afterEach(async () => {
  await disk?.close();
  await device?.close();
  kernel?.close();
  disk = kernel = device = undefined;
});

async function start(
  handle: (command: ScsiCommand) => void,
  options: SimulatedDeviceOptions = {},
): Promise<SimulatedDevice> {
  kernel = new SimulatedDevice({ zeroCopy: { minBytes: 0 }, ...options });
  device = await Device.open(kernel.open(), { handler: { handle } });
  return kernel;
}

const READ = { cdb: [0x28, 0, 0, 0, 0, 0, 0, 0, 16, 0], dataInLength: 8192 };

describe('zero copy', () => {
  test('whole pages go without copying, the rest is copied', async () => {
    disk = await simulate(new MemoryStore({ size: MiB }), { zeroCopy: { minBytes: 0 } });
    const data = Uint8Array.from({ length: 64 * 512 }, (_, i) => i * 7 + (i >> 9));
    await disk.write(8, data);
    expect(Buffer.compare(await disk.read(8, 64), data)).toBe(0);
    expect(disk.kernel.state()).toMatchObject({ zeroCopied: 2, blocksInUse: 0 });
    const { copied } = disk.kernel.state();
    await disk.write(8, data.subarray(0, 512));
    expect(Buffer.compare(await disk.read(8, 1), data.subarray(0, 512))).toBe(0);
    expect(disk.kernel.state()).toMatchObject({ zeroCopied: 2, copied: copied + 2 });
  });

  test('a verified load', async () => {
    disk = await simulate(new MemoryStore({ size: 8 * MiB }), {
      zeroCopy: { windowBytes: MiB, minBytes: 0 },
    });
    const report = await disk.kernel.load({
      depth: 16,
      bytes: 64 << 10,
      blocks: 16384,
      readShare: 0.5,
      verify: true,
      count: 2000,
    });
    expect(report).toMatchObject({ failed: 0, corrupt: 0, commands: 2000 });
    const { zeroCopied, zaps } = disk.kernel.state();
    expect(zeroCopied).toBe(2000);
    expect(zaps).toBeLessThanOrEqual(2000);
  });

  test('the entry says so, and where', async () => {
    kernel = new SimulatedDevice({
      zeroCopy: { windowBytes: MiB, minBytes: 0 },
      dataAreaBytes: MiB,
    });
    device = await Device.open(kernel.open(), { handler: { handle: () => {} } });
    const pending = kernel.submit(READ);
    const [entry] = kernel.entries();
    expect(entry).toMatchObject({
      kernelFlags: ZERO_COPY | DIRECT_IO | DATA_IN,
      segments: [{ offset: (8 << 20) + MiB, length: 8192 }],
    });
    await device.close({ deadline: 0 });
    kernel.close();
    expect((await pending).status).toBe(2);
  });

  test('what a handler writes is in the initiator at once; what it leaves is zero', async () => {
    const sim = await start((command) => {
      command.dataIn.copyFrom(new Uint8Array(100).fill(5));
      command.complete();
    });
    const { data } = await sim.submit(READ);
    expect(data.subarray(0, 100)).toEqual(new Uint8Array(100).fill(5));
    expect(data.subarray(100).every((byte) => byte === 0)).toBe(true);
  });

  test('a failed read has changed the memory', async () => {
    const sim = await start((command) => {
      command.dataIn.copyFrom(new Uint8Array(100).fill(5));
      command.complete(
        2,
        Uint8Array.of(0x70, 0, 3, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0),
      );
    });
    const { data, buffer } = await sim.submit(READ);
    expect(data).toHaveLength(0);
    expect(buffer[0]).toBe(5);
  });

  test('a system call that comes after completion fails, and the memory is safe', async () => {
    let address: Uint8Array | undefined;
    const sim = await start((command) => {
      [address] = command.dataIn.segments();
      command.complete();
    });
    await sim.submit(READ);
    expect(address?.length).toBe(0); // revoked
    const fd = openSync('/dev/zero', 'r');
    expect(readSync(fd, address as Uint8Array)).toBe(0);
    closeSync(fd);
  });

  test('Data-Out that the handler never looks at is left alone', async () => {
    const sim = await start((command) => command.complete(8));
    const dataOut = new Uint8Array(4096).fill(1);
    expect((await sim.submit({ cdb: [0x2a], dataOut })).status).toBe(8);
    expect((await sim.submit(READ)).buffer.every((byte) => byte === 0)).toBe(true);
    expect(device?.lost).toBe(undefined);
  });

  test('a handler may take both buffers of a WRITE, and use one', async () => {
    const seen: number[] = [];
    const sim = await start((command) => {
      const { dataIn, dataOut } = command;
      expect(dataIn.length).toBe(dataOut.length);
      seen.push(dataOut.toBytes()[0] as number);
      command.complete();
    });
    const dataOut = new Uint8Array(4096).fill(7);
    expect((await sim.submit({ cdb: [0x2a], dataOut })).status).toBe(0);
    expect((await sim.submit({ cdb: [0x2a], dataOut })).status).toBe(0);
    expect(seen).toEqual([7, 7]);
    expect(dataOut.every((byte) => byte === 7)).toBe(true);
    expect(device?.lost).toBe(undefined);
  });

  test('a WRITE whose handler asks for dataIn alone is left alone', async () => {
    const sim = await start((command) => {
      expect(command.dataIn.length).toBe(8192);
      command.complete();
    });
    const dataOut = new Uint8Array(8192).fill(7);
    for (let n = 0; n < 2; n++) {
      expect((await sim.submit({ cdb: [0x2a], dataOut })).status).toBe(0);
    }
    expect(dataOut.every((byte) => byte === 7)).toBe(true);
    expect(device?.lost).toBe(undefined);
  });

  test("the library's own stores into a WRITE's data are refused before they happen", async () => {
    const refused: unknown[] = [];
    const file = await BackingFile.open(import.meta.filename, { readOnly: true });
    const sim = await start((command) => {
      const { dataIn } = command;
      for (const store of [
        () => dataIn.copyFrom(new Uint8Array(1)),
        () => dataIn.fill(0),
        () => dataIn.slice(4096).fill(1),
        () => dataIn.readFrom(file, 0),
        () => dataIn.segments(),
      ]) {
        try {
          store();
          refused.push(undefined);
        } catch (error) {
          refused.push((error as { code?: unknown }).code);
        }
      }
      command.complete();
    });
    const dataOut = new Uint8Array(8192).fill(7);
    expect((await sim.submit({ cdb: [0x2a], dataOut })).status).toBe(0);
    expect(refused).toEqual(Array(5).fill('ERR_TCMU_BUFFER_READ_ONLY'));
    expect(dataOut.every((byte) => byte === 7)).toBe(true);
    expect(device?.lost).toBe(undefined);
    await file.close();
  });

  test('a READ that comes with Data-Out fails, and nothing else does', async () => {
    disk = await simulate(new MemoryStore({ size: MiB }), { zeroCopy: { minBytes: 0 } });
    const errors: unknown[] = [];
    disk.device.on('error', (error) => errors.push((error as { code?: unknown }).code));
    const dataOut = new Uint8Array(8192).fill(7);
    expect((await disk.kernel.submit({ cdb: READ.cdb, dataOut })).status).toBe(2);
    expect(dataOut.every((byte) => byte === 7)).toBe(true);
    expect(errors).toEqual(['ERR_TCMU_BUFFER_READ_ONLY']);
    expect((await disk.read(0, 16)).length).toBe(8192);
  });

  test('a store into Data-Out costs the device, not the process', async () => {
    const sim = await start((command) => {
      const [segment] = command.dataOut.segments();
      (segment as Uint8Array)[0] = 9;
      command.complete();
    });
    const lost = new Promise<Error>((resolve) => device?.once('error', resolve));
    const pending = sim.submit({ cdb: [0x2a], dataOut: new Uint8Array(4096).fill(1) });
    expect(await lost).toMatchObject({
      code: 'ERR_TCMU_RING_MEMORY',
      message: expect.stringMatching(
        /byte 0 of the data of command id 1 \(operation code 0x2a\), the initiator's own memory/,
      ),
    });
    sim.close();
    expect((await pending).status).toBe(2);
  });

  test('only what was copied can be kept', async () => {
    const kept: KeptData[] = [];
    const refusals: unknown[] = [];
    kernel = new SimulatedDevice({ zeroCopy: { minBytes: 0 } });
    const sim = kernel;
    device = await Device.open(
      { ...sim.open(), freeKeptBuffer: async (id) => void sim.freeKeptBuffer(id) },
      {
        handler: {
          handle(command) {
            try {
              kept.push((command as Command).completeKeeping());
            } catch (error) {
              refusals.push((error as Error).message);
              command.complete();
            }
          },
        },
      },
    );
    expect((await sim.submit({ cdb: [0x2a], dataOut: new Uint8Array(512) })).status).toBe(0);
    expect((await sim.submit({ cdb: [0x2a], dataOut: new Uint8Array(4096) })).status).toBe(0);
    expect(refusals).toEqual([expect.stringMatching(/initiator's own memory/)]);
    expect(kept.map(({ dataOut }) => dataOut.toBytes())).toEqual([new Uint8Array(512)]);
    await kept[0]?.release();
    expect(sim.state()).toMatchObject({ broken: null, blocksInUse: 0 });
  });

  test('the command time-out is 0 and fixed', () => {
    using sim = new SimulatedDevice({ zeroCopy: { minBytes: 0 } });
    expect(() => sim.setAttributes({ commandTimeout: 1000 })).toThrow(
      expect.objectContaining({ errno: 'EINVAL' }),
    );
    sim.setAttributes({ tmrNotification: false });
    expect(() => new SimulatedDevice({ zeroCopy: { minBytes: 0 }, commandTimeout: 5 })).toThrow(
      /time-out is 0 and fixed/,
    );
    const pending = sim.submit(READ);
    expect(sim.expire(pending)).toBe(false);
  });

  test('off by default', async () => {
    disk = await simulate(new MemoryStore({ size: MiB }));
    await disk.read(0, 8);
    expect(disk.kernel.state()).toMatchObject({ zeroCopied: 0, copied: 0 });
  });
});
