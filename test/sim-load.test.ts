// SPDX-License-Identifier: Apache-2.0
/** The load generator over a real handler. */
import { afterEach, expect, test } from 'vitest';
import { SimulatedDevice, type SimulatedDisk, simulate } from '../lib/sim/index.js';
import { MemoryStore } from '../lib/store/index.js';

const MiB = 2 ** 20;
let disk: SimulatedDisk | undefined;

afterEach(async () => {
  await disk?.close();
  disk = undefined;
});

test('a verified load over a memory store', async () => {
  disk = await simulate(new MemoryStore({ size: 4 * MiB }), { dataAreaBytes: MiB });
  for (const [depth, bytes] of [
    [1, 512],
    [32, 4096],
    [4, 128 << 10],
  ] as const) {
    const report = await disk.kernel.load({
      depth,
      bytes,
      blocks: 8192,
      readShare: 0.5,
      verify: true,
      count: 1000,
    });
    expect(report).toMatchObject({ commands: 1000, failed: 0, corrupt: 0 });
    expect(report.firstFailure).toBe(undefined);
    expect(report.commandsPerSecond).toBeGreaterThan(0);
    const { p50, p99, max } = report.latency;
    expect(p50).toBeLessThanOrEqual(p99);
    expect(p99).toBeLessThanOrEqual(max);
    expect(max).toBeLessThan(10);
  }
});

test('wrong bytes are found', async () => {
  const store = new MemoryStore({ size: MiB });
  const read = store.read.bind(store);
  let reads = 0;
  store.read = (position, data) => {
    read(position, data);
    if (++reads % 10 === 0) data.fill(0xff, 100, 101);
  };
  disk = await simulate(store);
  const { corrupt } = await disk.kernel.load({
    depth: 4,
    blocks: 2048,
    readShare: 0.5,
    verify: true,
    count: 4000,
  });
  expect(corrupt).toBeGreaterThan(50);
});

test('failures are counted and the first is shown', async () => {
  disk = await simulate(new MemoryStore({ size: MiB }));
  const report = await disk.kernel.load({ blocks: 4096, sequential: true, count: 512 });
  expect(report.failed).toBe(256);
  expect(report.firstFailure?.status).toBe(2);
  expect(report.firstFailure?.sense?.[12]).toBe(0x21);
});

test('by time, and ended by a signal', async () => {
  disk = await simulate(new MemoryStore({ size: MiB }));
  const timed = await disk.kernel.load({ blocks: 2048, depth: 8, duration: 50 });
  expect(timed.seconds).toBeGreaterThan(0.045);
  const controller = new AbortController();
  setTimeout(() => controller.abort(), 20);
  const stopped = await disk.kernel.load({
    blocks: 2048,
    duration: 60_000,
    signal: controller.signal,
  });
  expect(stopped.seconds).toBeLessThan(10);
  const already = await disk.kernel.load({
    blocks: 2048,
    duration: 60_000,
    signal: AbortSignal.abort(),
  });
  expect(already.seconds).toBeLessThan(10);
});

test('what can not be is refused; one at a time', async () => {
  disk = await simulate(new MemoryStore({ size: MiB }));
  const { kernel } = disk;
  await expect(kernel.load({ blocks: 2048 })).rejects.toThrow(/give count or duration/);
  await expect(kernel.load({ blocks: 4, count: 1 })).rejects.toMatchObject({
    code: 'ERR_TCMU_INVALID_ARGUMENT',
  });
  const running = kernel.load({ blocks: 2048, count: 2000 });
  await expect(kernel.load({ blocks: 2048, count: 1 })).rejects.toMatchObject({ errno: 'EBUSY' });
  expect((await running).commands).toBe(2000);
});

test('a device closed as soon as its load has ended', async () => {
  for (const zeroCopy of [false, true]) {
    const kernel = new SimulatedDevice({ zeroCopy, queueFullTimeout: 0, dataAreaBytes: 4096 });
    kernel.block();
    const ended = kernel
      .load({ blocks: 2048, depth: 16, count: 100 })
      .finally(() => kernel.close());
    expect((await ended).failed).toBe(100);
  }
});

test('a device closed under load ends it', async () => {
  const kernel = new SimulatedDevice();
  const running = kernel.load({ blocks: 2048, depth: 4, count: 1e9 });
  await new Promise((resolve) => setTimeout(resolve, 10));
  kernel.close();
  expect((await running).failed).toBe(4);
});
