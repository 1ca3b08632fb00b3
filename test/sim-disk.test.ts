// SPDX-License-Identifier: Apache-2.0
/** Stores behind the simulated kernel: the whole way from an initiator's command to a store and back. */
import { afterEach, describe, expect, test, vi } from 'vitest';
import { Device } from '../lib/device/device.js';
import { SenseError } from '../lib/scsi/sense.js';
import { SimulatedDevice, type SimulatedDisk, simulate } from '../lib/sim/index.js';
import { MemoryStore } from '../lib/store/index.js';

const MiB = 2 ** 20;
let disk: SimulatedDisk | undefined;

afterEach(async () => {
  await disk?.close();
  disk = undefined;
});

function pattern(length: number, seed = 1): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => i * 31 + seed + (i >> 8));
}

describe('a store behind the simulated kernel', () => {
  test('is found, written, read back', async () => {
    disk = await simulate(new MemoryStore({ size: MiB, blockSize: 4096 }), {
      scsi: { serial: 'S1', vendor: 'Acme', product: 'Disk' },
    });
    expect(await disk.inquiry()).toMatchObject({ deviceType: 0, vendor: 'Acme', product: 'Disk' });
    expect(await disk.readCapacity()).toMatchObject({ blocks: 256, blockSize: 4096 });
    expect(disk.blockSize).toBe(4096);
    const serial = await disk.vpdPage(0x80);
    expect(Buffer.from(serial.subarray(4)).toString()).toBe('S1');
    const data = pattern(3 * 4096);
    await disk.write(5, data);
    expect(await disk.read(5, 3)).toEqual(data);
    await disk.flush();
  });

  test('unmap, write same, compare and write', async () => {
    disk = await simulate(new MemoryStore({ size: MiB }));
    await disk.write(0, pattern(64 * 512));
    await disk.unmap({ lba: 8, blocks: 8 }, { lba: 32, blocks: 1 });
    expect(await disk.read(8, 8)).toEqual(new Uint8Array(8 * 512));
    await disk.writeSame(100, 10, new Uint8Array(512).fill(7));
    expect(await disk.read(100, 10)).toEqual(new Uint8Array(5120).fill(7));
    await disk.writeSame(100, 10, undefined, { unmap: true });
    expect(await disk.read(100, 10)).toEqual(new Uint8Array(5120));
    const block = new Uint8Array(512);
    expect(await disk.compareAndWrite(100, block, pattern(512))).toBe(-1);
    expect(await disk.read(100, 1)).toEqual(pattern(512));
    expect(await disk.compareAndWrite(100, block, block)).toBe(0);
  });

  test("a store's failure is the initiator's sense data and the device's error", async () => {
    const store = new MemoryStore({ size: MiB });
    const failure = new Error('the shelf fell down');
    vi.spyOn(store, 'read').mockRejectedValue(failure);
    disk = await simulate(store);
    const errors: Error[] = [];
    disk.device.on('error', (error) => errors.push(error));
    await expect(disk.read(0, 1)).rejects.toMatchObject({ key: 4 });
    // The initiator's own mistakes are none of the device's.
    await expect(disk.read(2048, 1)).rejects.toMatchObject({ key: 5 });
    expect(errors).toEqual([failure]);
  });

  test('failures are sense errors', async () => {
    disk = await simulate(new MemoryStore({ size: MiB }));
    await expect(disk.read(2048, 1)).rejects.toMatchObject({ key: 5, asc: 0x21, ascq: 0 });
    await expect(disk.write(0, new Uint8Array(100))).rejects.toThrow(/whole number of blocks/);
    const failed = disk.read(2 ** 40, 1);
    await expect(failed).rejects.toThrow(
      /READ of 1 blocks at 1099511627776 ended with CHECK CONDITION/,
    );
    expect(SenseError.is(await failed.catch((error: unknown) => error))).toBe(true);
  });

  test('resize raises the unit attention', async () => {
    disk = await simulate(new MemoryStore({ size: MiB }));
    await disk.resize(2 * MiB);
    await expect(disk.read(0, 1)).rejects.toMatchObject({ key: 6, asc: 0x2a, ascq: 9 });
    expect((await disk.readCapacity()).blocks).toBe(4096);
    expect(await disk.read(4095, 1)).toEqual(new Uint8Array(512));
  });

  test('a data area of one block, a ring of one page: everything has to wait, nothing is lost', async () => {
    disk = await simulate(new MemoryStore({ size: MiB }), {
      ringBytes: 4096,
      dataAreaBytes: 4096,
    });
    const data = Array.from({ length: 100 }, (_, i) => pattern(4096, i));
    const { kernel } = disk;
    await Promise.all(data.map((bytes, i) => disk?.write(8 * i, bytes)));
    const read = await Promise.all(data.map((_, i) => disk?.read(8 * i, 8)));
    expect(
      read.map((bytes, i) => Buffer.compare(bytes as Uint8Array, data[i] as Uint8Array)),
    ).toEqual(data.map(() => 0));
    expect(kernel.state()).toMatchObject({ broken: null, idsInUse: 0, blocksInUse: 0 });
    expect(kernel.state().waited).toBeGreaterThan(100);
  });

  test('a store that can not be opened leaves nothing', async () => {
    const store = new MemoryStore({ size: MiB });
    Object.defineProperty(store, 'open', {
      value: () => {
        throw new Error('no medium');
      },
    });
    await expect(simulate(store)).rejects.toThrow('no medium');
  });

  test('close waits for what is in flight', async () => {
    const store = new MemoryStore({ size: MiB });
    let release: (() => void) | undefined;
    store.read = () =>
      new Promise<void>((resolve) => {
        release = resolve;
      });
    const slow = await simulate(store);
    const reading = slow.read(0, 1);
    await expect.poll(() => release).toBeDefined();
    const closing = slow.close();
    await expect(slow.read(0, 1)).rejects.toMatchObject({ key: 5, asc: 0x25 });
    release?.();
    expect(await reading).toEqual(new Uint8Array(512));
    await closing;
    expect(slow.device.closed).toBe(true);
  });
});

describe('a Device over the simulated kernel', () => {
  test('goes when the kernel removes it', async () => {
    const kernel = new SimulatedDevice();
    const device = await Device.open(kernel.open(), { handler: { handle: (c) => c.complete() } });
    expect((await kernel.submit({ cdb: [0] })).status).toBe(0);
    const closed = new Promise((resolve) => device.once('close', () => resolve(undefined)));
    await kernel.remove();
    await closed;
    expect(device.lost).toMatchObject({ code: 'ERR_TCMU_DEVICE_GONE' });
    kernel.close();
  });

  test('a second one is refused, a later one finds the ring', async () => {
    const kernel = new SimulatedDevice();
    const stuck = await Device.open(kernel.open(), { handler: { handle: () => {} } });
    await expect(async () => Device.open(kernel.open())).rejects.toMatchObject({
      code: 'ERR_TCMU_DEVICE_BUSY',
    });
    const pending = kernel.submit({ cdb: [0] });
    await expect.poll(() => stuck.inFlight).toBe(1);
    await stuck.close({ deadline: 0 });
    expect((await pending).status).toBe(8);
    const next = await Device.open(kernel.open(), { handler: { handle: (c) => c.complete() } });
    expect((await kernel.submit({ cdb: [0] })).status).toBe(0);
    await next.close();
    kernel.close();
  });

  test('reconfiguration asks the handler first', async () => {
    const seen: unknown[] = [];
    using kernel = new SimulatedDevice({
      config: 'file/a',
      onReconfigure: (change) => {
        seen.push(change);
        if ('writeCache' in change) throw new Error('no');
      },
    });
    await kernel.reconfigure({ config: 'file/b' });
    expect(kernel.config).toBe('file/b');
    await expect(kernel.reconfigure({ writeCache: true })).rejects.toThrow('no');
    await expect(kernel.reconfigure({ config: 'x'.repeat(256) })).rejects.toThrow(/255/);
    await kernel.reconfigure({ size: 4096 });
    expect(seen).toEqual([{ config: 'file/b' }, { writeCache: true }, { size: 4096 }]);
  });
});
