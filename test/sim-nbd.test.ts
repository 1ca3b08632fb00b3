// SPDX-License-Identifier: Apache-2.0
/** The NBD server in front of a simulated device, by the package's own client. */
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { DataIn, DataOut } from '../lib/device/data.js';
import { Device } from '../lib/device/device.js';
import { Status } from '../lib/device/handler.js';
import { TcmuError } from '../lib/errors.js';
import { BlockDevice, SenseError } from '../lib/scsi/index.js';
import {
  NbdClient,
  type NbdConnectOptions,
  type NbdServer,
  type ServeNbdOptions,
  SimulatedDevice,
  SimulatedDisk,
  serveNbd,
  simulate,
} from '../lib/sim/index.js';
import { type BlockStore, MemoryStore } from '../lib/store/index.js';
import { numbers, OPTION, Wire } from './nbd-wire.js';

const MiB = 1 << 20;
const SERIAL = { serial: 'NBD' };

let directory: string;
const ends: (() => Promise<unknown>)[] = [];

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'tcmu-nbd-'));
});

afterEach(async () => {
  for (const end of ends.splice(0).reverse()) await end();
  rmSync(directory, { recursive: true });
});

async function serve(
  target: Parameters<typeof serveNbd>[0],
  options: Partial<ServeNbdOptions> = {},
): Promise<NbdServer> {
  const place = options.port === undefined ? { path: join(directory, 'nbd.sock') } : {};
  const server = await serveNbd(target, { ...place, ...options });
  ends.push(() => server.close());
  return server;
}

async function connect(server: NbdServer, options: NbdConnectOptions = {}): Promise<NbdClient> {
  const { path, port } = server;
  const client = await NbdClient.connect({
    ...(path === undefined ? { port: port as number } : { path }),
    ...options,
  });
  ends.push(() => client.close());
  return client;
}

function wire(server: NbdServer): Wire {
  const raw = new Wire(server.path as string);
  ends.push(async () => raw.socket.destroy());
  return raw;
}

async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 2));
}

/** Notes what reaches the store. */
class Recorder implements BlockStore {
  readonly calls: string[] = [];
  readonly size: number;
  readonly #memory: MemoryStore;
  constructor({ size }: { size: number }) {
    this.size = size;
    this.#memory = new MemoryStore({ size });
  }
  read(position: number, data: DataIn): void {
    this.#memory.read(position, data);
  }
  write(position: number, data: DataOut): void {
    this.calls.push(`write ${position} ${data.length}`);
    this.#memory.write(position, data);
  }
  flush(): void {
    this.calls.push('flush');
  }
  unmap(position: number, length: number): void {
    this.calls.push(`unmap ${position} ${length}`);
    this.#memory.unmap(position, length);
  }
  writeZeroes(
    ...[position, length, context]: Parameters<NonNullable<BlockStore['writeZeroes']>>
  ): void {
    this.calls.push(`zeroes ${position} ${length}${context.mayUnmap ? ' may unmap' : ''}`);
    this.#memory.unmap(position, length);
  }
}

/** Answers when it is told to. */
class Held implements BlockStore {
  readonly size = MiB;
  readonly waiting: (() => void)[] = [];
  read(_position: number, data: DataIn): Promise<void> {
    return new Promise<void>((resolve) => this.waiting.push(resolve)).then(() => data.fill(7));
  }
  write(): Promise<void> {
    return new Promise<void>((resolve) => this.waiting.push(resolve));
  }
}

function pattern(length: number, seed = 1): Buffer {
  const bytes = Buffer.alloc(length);
  for (let i = 0; i < length; i++) bytes[i] = (i * 31 + seed * 17 + (i >> 9)) & 0xff;
  return bytes;
}

describe('serveNbd', () => {
  test('reads and writes over a Unix socket', async () => {
    const server = await serve(new MemoryStore({ size: 8 * MiB }));
    const client = await connect(server);
    expect(client.size).toBe(8 * MiB);
    expect(client.blockSizes).toEqual({ minimum: 512, preferred: 4096, maximum: 32 * MiB });
    const data = pattern(3 * MiB);
    await client.write(512, data);
    expect(Buffer.compare(await client.read(512, data.length), data)).toBe(0);
    expect(await client.read(0, 512)).toEqual(Buffer.alloc(512));
    await client.flush();
  });

  test('removes its socket when it closes', async () => {
    const server = await serve(new MemoryStore({ size: MiB }));
    const path = server.path as string;
    expect(existsSync(path)).toBe(true);
    await server.close();
    expect(existsSync(path)).toBe(false);
  });

  test('reads and writes over a loopback port', async () => {
    const server = await serve(new MemoryStore({ size: MiB }), { port: 0 });
    expect(server.uri).toBe(`nbd://127.0.0.1:${server.port}/`);
    const client = await connect(server);
    await client.write(4096, pattern(4096));
    expect(await client.read(4096, 4096)).toEqual(pattern(4096));
  });

  test('leaves a disk that is not its own open', async () => {
    const disk = await simulate(new MemoryStore({ size: MiB }));
    ends.push(() => disk.close());
    expect(disk).toBeInstanceOf(SimulatedDisk);
    const server = await serve(disk);
    const client = await connect(server);
    await client.write(0, pattern(512));
    await server.close();
    expect(await disk.read(0, 1)).toEqual(new Uint8Array(pattern(512)));
  });
});

describe('what a client asks reaches the store', () => {
  test('flush, FUA, trim, write zeroes', async () => {
    const store = new Recorder({ size: 8 * MiB });
    const client = await connect(await serve(store));
    const calls = async (run: Promise<void>): Promise<string[]> => {
      await run;
      return store.calls.splice(0);
    };
    expect(await calls(client.write(0, pattern(512)))).toEqual(['write 0 512']);
    expect(await calls(client.write(0, pattern(512), { fua: true }))).toEqual([
      'write 0 512',
      'flush',
    ]);
    expect(await calls(client.flush())).toEqual(['flush']);
    expect(await calls(client.trim(4096, 8192))).toEqual(['unmap 4096 8192']);
    expect(await calls(client.trim(4096, 8192, { fua: true }))).toEqual([
      'unmap 4096 8192',
      'flush',
    ]);
    expect(await calls(client.writeZeroes(0, MiB))).toEqual([`unmap 0 ${MiB}`]);
    expect(await calls(client.writeZeroes(0, MiB, { fastZero: true }))).toEqual([`unmap 0 ${MiB}`]);
    expect(await calls(client.writeZeroes(0, MiB, { noHole: true }))).toEqual([`zeroes 0 ${MiB}`]);
    await expect(client.writeZeroes(0, MiB, { noHole: true, fastZero: true })).rejects.toThrow(
      /ENOTSUP/,
    );
    expect(await calls(client.cache(0, MiB))).toEqual([]);
  });

  test('a range beyond the limits of one SCSI command goes in several', async () => {
    const store = new Recorder({ size: 4096 * MiB });
    const client = await connect(await serve(store));
    await client.trim(0, 1536 * MiB);
    expect(store.calls).toEqual([0, 512, 1024].map((at) => `unmap ${at * MiB} ${512 * MiB}`));
  });

  test('a transfer beyond the data area of a small ring goes in pieces', async () => {
    const store = new MemoryStore({ size: 32 * MiB });
    const server = await serve(store, {
      simulate: { ringBytes: 8192, dataAreaBytes: 256 << 10 },
    });
    const client = await connect(server);
    const data = pattern(16 * MiB);
    await Promise.all([client.write(0, data), client.write(16 * MiB, data)]);
    const [low, high] = await Promise.all([
      client.read(0, data.length),
      client.read(16 * MiB, data.length),
    ]);
    expect(Buffer.compare(low, data) + Buffer.compare(high, data)).toBe(0);
  });

  test('block status tells holes from data', async () => {
    const client = await connect(await serve(new MemoryStore({ size: 8 * MiB, pageSize: 65536 })));
    await client.write(65536, pattern(65536));
    expect(await client.blockStatus(0, 8 * MiB)).toEqual([
      { length: 65536, hole: true, zero: true },
      { length: 65536, hole: false, zero: false },
      { length: 8 * MiB - 131072, hole: true, zero: true },
    ]);
    expect(await client.blockStatus(98304, 65536)).toEqual([
      { length: 32768, hole: false, zero: false },
      { length: 32768, hole: true, zero: true },
    ]);
  });

  test('without unmap there is nothing to trim, and zeroes are not fast', async () => {
    const memory = new Uint8Array(MiB).fill(1);
    const store: BlockStore = {
      size: MiB,
      read: (position, data) =>
        void data.copyFrom(memory.subarray(position, position + data.length)),
      write: (position, data) => void data.copyTo(memory, position),
    };
    const client = await connect(await serve(store));
    await expect(client.trim(0, 4096)).rejects.toThrow(/EINVAL/);
    await expect(client.writeZeroes(0, 4096, { fastZero: true })).rejects.toThrow(/ENOTSUP/);
    await client.writeZeroes(4096, 8192);
    expect(memory.indexOf(0)).toBe(4096);
    expect(memory.lastIndexOf(0)).toBe(12287);
    expect(await client.blockStatus(0, MiB)).toEqual([{ length: MiB, hole: false, zero: false }]);
  });

  test('a read-only store refuses writes', async () => {
    const store = Object.assign(new MemoryStore({ size: MiB }), { readOnly: true });
    const client = await connect(await serve(store));
    for (const run of [
      client.write(0, pattern(512)),
      client.trim(0, 512),
      client.writeZeroes(0, 512),
    ]) {
      await expect(run).rejects.toThrow(/EPERM/);
    }
    expect((await client.read(0, 512)).length).toBe(512);
  });

  test('sense data becomes an errno with a reason', async () => {
    const store = new MemoryStore({ size: MiB });
    const fail = (error: Error) => {
      store.read = () => {
        throw error;
      };
    };
    const client = await connect(await serve(store));
    fail(new SenseError(3, 0x11, 0, 'medium'));
    await expect(client.read(0, 512)).rejects.toMatchObject({
      errno: 'EIO',
      message: expect.stringContaining('sense key 0x3, additional sense 0x1100'),
    });
    fail(new Error('a bug in the store'));
    await expect(client.read(0, 512)).rejects.toMatchObject({ errno: 'EIO' });
  });

  test('what one connection wrote another one flushes', async () => {
    const store = new Recorder({ size: MiB });
    const server = await serve(store);
    const [one, other] = [await connect(server), await connect(server)];
    expect(one.flags & 0x100).toBe(0x100);
    await one.write(0, pattern(512));
    expect(await other.read(0, 512)).toEqual(pattern(512));
    await other.flush();
    expect(store.calls).toEqual(['write 0 512', 'flush']);
  });

  test('a client that comes after a resize sees the new size', async () => {
    const disk = await simulate(new MemoryStore({ size: MiB }));
    ends.push(() => disk.close());
    const server = await serve(disk);
    const before = await connect(server);
    await disk.resize(2 * MiB);
    expect((await connect(server)).size).toBe(2 * MiB);
    // The unit attention of the resize is no error to a client that was there before.
    expect((await before.read(0, 512)).length).toBe(512);
  });

  test('blocks of 4096 bytes', async () => {
    const server = await serve(new MemoryStore({ size: MiB, blockSize: 4096 }));
    const client = await connect(server);
    expect(client.blockSizes.minimum).toBe(4096);
    await client.write(8192, pattern(4096));
    await expect(client.read(512, 512)).rejects.toThrow(/EINVAL.*minimum block size/);
    // Who asks for no block sizes counts on 512.
    const raw = wire(server);
    await raw.greet();
    expect((await raw.option(OPTION.go, numbers([4, 0], [2, 0]))).at(-1)?.[0]).toBe(2 ** 31 + 8);
  });

  test("zero copy: the pages the handler sees are the request's own", async () => {
    const disk = await simulate(new MemoryStore({ size: 8 * MiB }), { zeroCopy: true });
    ends.push(() => disk.close());
    const client = await connect(await serve(disk));
    const before = disk.kernel.state().zeroCopied;
    await client.write(0, pattern(MiB));
    expect(Buffer.compare(await client.read(0, MiB), pattern(MiB))).toBe(0);
    expect(disk.kernel.state().zeroCopied - before).toBe(2);
  });
});

describe('negotiation', () => {
  test('lists the export with its description', async () => {
    const server = await serve(new MemoryStore({ size: MiB }), {
      exportName: 'disk',
      description: 'a test',
    });
    const raw = wire(server);
    await raw.greet();
    const [entry, last] = await raw.option(OPTION.list);
    expect(entry).toEqual([2, Buffer.concat([numbers([4, 4]), Buffer.from('diska test')])]);
    expect(last?.[0]).toBe(1);
    expect(server.uri).toContain('nbd+unix:///disk?socket=');
    expect((await connect(server, { exportName: 'disk' })).size).toBe(MiB);
    await expect(connect(server, { exportName: 'other' })).rejects.toMatchObject({
      code: 'ERR_TCMU_NBD',
    });
  });

  test('an old client names the export and is in', async () => {
    const raw = wire(await serve(new MemoryStore({ size: MiB })));
    await raw.greet(1);
    raw.send(Buffer.from('IHAVEOPT'), numbers([4, OPTION.exportName], [4, 0]));
    const head = await raw.take(10 + 124);
    expect(head.readBigUInt64BE(0)).toBe(BigInt(MiB));
    raw.request(0, 5, 0, 512);
    expect(await raw.reply()).toEqual({ error: 0, cookie: 5 });
    expect(await raw.take(512)).toEqual(Buffer.alloc(512));
  });

  test('unknown options and malformed data are refused, and the talk goes on', async () => {
    const raw = wire(await serve(new MemoryStore({ size: MiB })));
    await raw.greet();
    const refusal = async (option: number, data?: Uint8Array) =>
      ((await raw.option(option, data)).at(-1)?.[0] ?? 0) - 2 ** 31;
    expect(await refusal(4711, Buffer.alloc(100))).toBe(1);
    expect(await refusal(OPTION.startTls)).toBe(2);
    expect(await refusal(OPTION.list, Buffer.alloc(1))).toBe(3);
    expect(await refusal(OPTION.go, numbers([4, 4000]))).toBe(3);
    expect(await refusal(OPTION.go, numbers([4, 0], [2, 9]))).toBe(3);
    expect(await refusal(OPTION.go, Buffer.alloc(0))).toBe(3);
    expect(await refusal(10, numbers([4, 0], [4, 0]))).toBe(3); // structured replies come first
    expect((await raw.option(OPTION.structured)).at(-1)?.[0]).toBe(1);
    expect(await refusal(10, numbers([4, 0], [4, 2 ** 32 - 1]))).toBe(3);
    expect((await raw.option(10, numbers([4, 0], [4, 1], [4, 0]))).length).toBe(1);
    expect((await raw.option(OPTION.abort)).at(-1)?.[0]).toBe(1);
    await raw.ended();
  });

  test.each([
    ['unknown client flags', [numbers([4, 0x80000003])]],
    ['a client that is not fixed newstyle', [numbers([4, 0])]],
    ['garbage', [Buffer.alloc(4096, 0xa5)]],
    [
      'an option of 4 GiB',
      [numbers([4, 3]), Buffer.from('IHAVEOPT'), numbers([4, 7], [4, 2 ** 32 - 1])],
    ],
    [
      'an unknown export of an old client',
      [numbers([4, 3]), Buffer.from('IHAVEOPT'), numbers([4, 1], [4, 1]), Buffer.from('x')],
    ],
  ])('hangs up on %s', async (_, bytes) => {
    const server = await serve(new MemoryStore({ size: MiB }));
    const raw = wire(server);
    await raw.take(18);
    raw.send(...bytes);
    await raw.ended();
    expect((await connect(server)).size).toBe(MiB);
  });

  test('a disk that does not answer is no export', async () => {
    using kernel = new SimulatedDevice();
    const device = await Device.open(kernel.open(), {
      handler: { handle: (command) => command.complete(Status.BUSY) },
    });
    const server = await serve(kernel);
    await expect(connect(server)).rejects.toThrow(/does not answer/);
    await server.close();
    await device.close();
  });

  test('turns away more clients than it may have', async () => {
    const server = await serve(new MemoryStore({ size: MiB }), { maxConnections: 2 });
    await connect(server);
    const second = await connect(server);
    await expect(connect(server)).rejects.toMatchObject({ code: 'ERR_TCMU_NBD' });
    await second.close();
    await until(() => server.counts().connections === 1);
    await connect(server);
  });
});

describe('bad requests', () => {
  test.each([
    ['a read beyond the end', 0, MiB - 512, 1024, 22],
    ['a read of 4 GiB', 0, 0, 2 ** 32 - 512, 22],
    ['a read at the end of 64 bits', 0, 2n ** 64n - 512n, 512, 22],
    ['a read off the block bounds', 0, 1, 512, 22],
    ['zeroes beyond the end', 6, MiB, 512, 28],
    ['a trim of 4 GiB', 4, 0, 2 ** 32 - 512, 28],
    ['block status without a context', 7, 0, 512, 22],
    ['an unknown command', 99, 0, 0, 22],
  ])('%s', async (_, type, offset, length, error) => {
    const raw = wire(await serve(new MemoryStore({ size: MiB })));
    await raw.start();
    raw.request(type, 9, offset, length);
    expect(await raw.reply()).toEqual({ error, cookie: 9 });
    raw.request(3, 10, 0, 0, 0x20);
    expect(await raw.reply()).toEqual({ error: 22, cookie: 10 });
  });

  test('the data of a refused write is skipped', async () => {
    const raw = wire(await serve(new MemoryStore({ size: 64 * MiB })));
    await raw.start();
    raw.request(1, 1, 64 * MiB, 4096);
    raw.send(Buffer.alloc(4096, 0x25));
    raw.request(1, 2, 0, 33 * MiB);
    raw.send(Buffer.alloc(33 * MiB, 0x25));
    raw.request(0, 3, 0, 512);
    expect(await raw.reply()).toEqual({ error: 28, cookie: 1 });
    expect(await raw.reply()).toEqual({ error: 22, cookie: 2 });
    expect(await raw.reply()).toEqual({ error: 0, cookie: 3 });
    expect(await raw.take(512)).toEqual(Buffer.alloc(512));
  });

  test('hangs up where no request begins', async () => {
    const raw = wire(await serve(new MemoryStore({ size: MiB })));
    await raw.start();
    raw.send(Buffer.alloc(28, 0xff));
    await raw.ended();
  });

  test('requests byte by byte', async () => {
    const raw = wire(await serve(new MemoryStore({ size: MiB })));
    await raw.start();
    const bytes = Buffer.concat([
      numbers([4, 0x25609513], [2, 0], [2, 1], [8, 1], [8, 512], [4, 512]),
      pattern(512),
      numbers([4, 0x25609513], [2, 0], [2, 0], [8, 2], [8, 512], [4, 512]),
    ]);
    for (let at = 0; at < bytes.length; at += 7) {
      raw.send(bytes.subarray(at, at + 7));
      await new Promise(setImmediate);
    }
    expect(await raw.reply()).toEqual({ error: 0, cookie: 1 });
    expect(await raw.reply()).toEqual({ error: 0, cookie: 2 });
    expect(await raw.take(512)).toEqual(pattern(512));
  });

  test('more requests at once than a client may have under way', async () => {
    const raw = wire(await serve(new MemoryStore({ size: MiB })));
    await raw.start();
    const count = 5000;
    for (let i = 0; i < count; i++) raw.request(i % 3 === 0 ? 99 : 3, i, 0, 0);
    const seen = new Set<number>();
    for (let i = 0; i < count; i++) seen.add((await raw.reply()).cookie);
    expect(seen.size).toBe(count);
  });
});

describe('ends', () => {
  async function heldDisk() {
    const store = new Held();
    const disk = await simulate(store);
    ends.push(() => disk.close());
    return { store, disk, server: await serve(disk) };
  }

  test('a client that vanishes leaves nothing behind', async () => {
    const { store, disk, server } = await heldDisk();
    const raw = wire(server);
    await raw.start();
    for (let i = 0; i < 40; i++) raw.request(0, i, 0, 65536);
    raw.request(1, 40, 0, 65536);
    raw.send(Buffer.alloc(100));
    await until(() => store.waiting.length === 40);
    raw.socket.destroy();
    await until(() => server.counts().connections === 1 && disk.kernel.pending === 0);
    for (const answer of store.waiting) answer();
    await until(() => server.counts().connections === 0);
    expect(disk.kernel.state()).toMatchObject({ idsInUse: 0, blocksInUse: 0, inFlight: 0 });
  });

  test.each([
    ['half a request', numbers([4, 0x25609513], [2, 0], [2, 0], [2, 0], [4, 0])],
    [
      'a write of 4 GiB',
      numbers([4, 0x25609513], [2, 0], [2, 1], [8, 1], [8, 0], [4, 2 ** 32 - 512]),
    ],
    [
      'zeroes for 4 GiB',
      numbers([4, 0x25609513], [2, 0], [2, 6], [8, 1], [8, 0], [4, 2 ** 32 - 512]),
    ],
  ])('%s, and no more comes: the others are served', async (_, bytes) => {
    const disk = await simulate(new MemoryStore({ size: MiB }));
    ends.push(() => disk.close());
    const server = await serve(disk);
    const raw = wire(server);
    await raw.start();
    raw.send(bytes);
    const other = await connect(server);
    await other.write(0, pattern(512));
    expect(await other.read(0, 512)).toEqual(pattern(512));
    raw.socket.destroy();
    await until(() => server.counts().connections === 1);
    expect(disk.kernel.state()).toMatchObject({ idsInUse: 0, blocksInUse: 0, inFlight: 0 });
  });

  test('a client that takes no replies is not read on', async () => {
    const disk = await simulate(new MemoryStore({ size: 64 * MiB }));
    ends.push(() => disk.close());
    const server = await serve(disk);
    const raw = wire(server);
    await raw.start();
    raw.socket.pause();
    for (let i = 0; i < 200; i++) raw.request(0, i, 0, 8 * MiB);
    await until(() => server.counts().commands >= 8);
    await new Promise((resolve) => setTimeout(resolve, 50));
    // 64 MiB of replies may wait, and the one that passes the limit.
    expect(server.counts().commands).toBeLessThanOrEqual(9 + 2);
    raw.socket.destroy();
    await until(() => server.counts().connections === 0);
  });

  test('replies follow a client that has closed its sending half', async () => {
    const { store, server } = await heldDisk();
    const raw = wire(server);
    await raw.start();
    raw.request(0, 1, 0, 512);
    raw.socket.end();
    await until(() => store.waiting.length === 1);
    store.waiting[0]?.();
    expect(await raw.reply()).toEqual({ error: 0, cookie: 1 });
    expect(await raw.take(512)).toEqual(Buffer.alloc(512, 7));
    await raw.ended();
  });

  test('a handler that never answers: the command time-out does', async () => {
    const { server, store, disk } = await heldDisk();
    const client = await connect(server);
    // Not before: a slow machine must not fail what connecting asks.
    disk.kernel.setAttributes({ commandTimeout: 50 });
    await expect(client.read(0, 512)).rejects.toMatchObject({ errno: 'EIO' });
    await until(() => store.waiting.length === 1);
    for (const answer of store.waiting) answer();
  });

  test('a handler that goes and one that takes over: the client just waits', async () => {
    const store = new MemoryStore({ size: MiB });
    using kernel = new SimulatedDevice();
    const first = await Device.open(kernel.open(), { handler: new BlockDevice(store, SERIAL) });
    const server = await serve(kernel);
    const client = await connect(server);
    await client.write(0, pattern(512));
    kernel.block();
    const read = client.read(0, 512);
    await first.close();
    const second = await Device.open(kernel.open(), { handler: new BlockDevice(store, SERIAL) });
    kernel.unblock();
    expect(await read).toEqual(pattern(512));
    await server.close();
    await second.close();
  });

  test('BUSY is asked again', async () => {
    const disk = await simulate(new MemoryStore({ size: MiB }));
    ends.push(() => disk.close());
    const client = await connect(await serve(disk));
    disk.kernel.block();
    const read = client.read(0, 512);
    let answered = false;
    void read.then(() => {
      answered = true;
    });
    await new Promise((resolve) => setTimeout(resolve, 60));
    expect(answered).toBe(false);
    disk.kernel.unblock();
    expect((await read).length).toBe(512);
  });

  test('closing lets the requests under way finish', async () => {
    const { store, server } = await heldDisk();
    const client = await connect(server);
    const read = client.read(0, 512);
    await until(() => store.waiting.length === 1);
    const closing = server.close();
    await expect(connect(server)).rejects.toMatchObject({ code: 'ERR_TCMU_NBD' });
    store.waiting[0]?.();
    expect(await read).toEqual(Buffer.alloc(512, 7));
    await closing;
  });

  test('closing does not wait for ever', async () => {
    const { store, server } = await heldDisk();
    const client = await connect(server);
    const read = client.read(0, 512);
    await until(() => store.waiting.length === 1);
    const refused = expect(read).rejects.toMatchObject({ code: 'ERR_TCMU_NBD' });
    await server.close({ deadline: 20 });
    await refused;
    store.waiting[0]?.();
  });

  test('the simulated kernel stops with requests under way', async () => {
    const { store, server, disk } = await heldDisk();
    const client = await connect(server);
    const reads = [client.read(0, 512), client.read(512, 512)];
    await until(() => store.waiting.length === 2);
    const refused = Promise.all(
      reads.map((read) => expect(read).rejects.toMatchObject({ code: 'ERR_TCMU_NBD' })),
    );
    disk.kernel.close();
    await refused;
    await server.closed;
    for (const answer of store.waiting) answer();
  });

  test('many servers, one after the other, and two at a time on one device', async () => {
    const disk = await simulate(new MemoryStore({ size: MiB }));
    ends.push(() => disk.close());
    const first = await serve(disk, { port: 0 });
    const client = await connect(first);
    for (let i = 0; i < 20; i++) {
      const server = await serve(disk);
      const other = await connect(server);
      await Promise.all([client.write(0, pattern(4096, i)), other.read(0, 512)]);
      expect(await other.read(0, 4096)).toEqual(pattern(4096, i));
      await other.close();
      await server.close();
    }
  });
});

describe("what can't be served", () => {
  const store = new MemoryStore({ size: MiB });
  test.each([
    ['no place', {}, /either path or port/],
    ['two places', { path: '/tmp/x', port: 1 }, /either path or port/],
    ['a long path', { path: `/tmp/${'x'.repeat(108)}` }, /107 bytes/],
    ['a port that is none', { port: 65536 }, /port 65536/],
    ['a host name', { port: 0, host: 'localhost' }, /numeric/],
    ['other machines in plain text', { port: 0, host: '0.0.0.0' }, /require TLS/],
    ['TLS without keys', { port: 0, tls: {} }, /key and cert, or pskCallback/],
    ['TLS with a bad key', { port: 0, tls: { key: 'x', cert: 'y' } }, /TLS/],
    ['no client', { port: 0, maxConnections: 0 }, /at least one/],
  ])('%s', async (_, options, message) => {
    const serving = serveNbd(store, options);
    await expect(serving).rejects.toThrow(message);
    await expect(serving).rejects.toMatchObject({ code: 'ERR_TCMU_INVALID_ARGUMENT' });
  });

  test('a place that is taken; a dead socket file is not', async () => {
    const server = await serve(store);
    const path = server.path as string;
    const second = serveNbd(new MemoryStore({ size: MiB }), { path });
    await expect(second).rejects.toMatchObject({
      code: 'ERR_TCMU_NBD_LISTEN',
      errno: 'EADDRINUSE',
    });
    await expect(second).rejects.toSatisfy(TcmuError.is);
    await expect(serveNbd(store, { path: `${directory}/no/dir` })).rejects.toMatchObject({
      errno: 'ENOENT',
    });
    expect((await connect(server)).size).toBe(MiB);
  });
});

describe('TLS', () => {
  const key = Buffer.from('00112233445566778899aabbccddeeff', 'hex');
  const psk = {
    pskCallback: (_socket: unknown, identity: string) => (identity === 'alice' ? key : null),
  };
  const clientTls = (identity: string, secret = key) => ({
    pskCallback: () => ({ psk: secret, identity }),
    ciphers: 'PSK',
    maxVersion: 'TLSv1.2' as const,
    checkServerIdentity: () => undefined,
  });

  test('a client with the shared key', async () => {
    const server = await serve(new MemoryStore({ size: 8 * MiB }), { tls: psk });
    expect(server.uri).toMatch(/^nbds\+unix:/);
    const client = await connect(server, { tls: clientTls('alice') });
    const data = pattern(4 * MiB);
    await Promise.all([client.write(0, data), client.write(4 * MiB, data)]);
    expect(Buffer.compare(await client.read(4 * MiB, data.length), data)).toBe(0);
    await client.close();
    await until(() => server.counts().connections === 0);
  });

  test('without the key, or without TLS, nobody gets in', async () => {
    const errors: Error[] = [];
    const server = await serve(new MemoryStore({ size: MiB }), {
      tls: psk,
      onClientError: (error) => errors.push(error),
    });
    await expect(connect(server, { tls: clientTls('mallory') })).rejects.toThrow();
    await expect(connect(server, { tls: clientTls('alice', Buffer.alloc(16)) })).rejects.toThrow();
    await expect(connect(server)).rejects.toThrow(/refuses.*requires TLS/);
    await until(() => server.counts().connections === 0 && errors.length === 2);
    const raw = wire(server);
    await raw.greet();
    expect((await raw.option(OPTION.list)).at(-1)?.[0]).toBe(2 ** 31 + 5);
    raw.send(Buffer.from('IHAVEOPT'), numbers([4, OPTION.exportName], [4, 0]));
    await raw.ended();
  });

  test("what was sent in plain text behind STARTTLS is not taken for the client's", async () => {
    const raw = wire(await serve(new MemoryStore({ size: MiB }), { tls: psk }));
    await raw.greet();
    const option = (code: number) =>
      Buffer.concat([Buffer.from('IHAVEOPT'), numbers([4, code], [4, 0])]);
    raw.send(option(OPTION.startTls), option(OPTION.list));
    await raw.ended();
  });

  test('a client that stops in the handshake, and a server that closes', async () => {
    const server = await serve(new MemoryStore({ size: MiB }), {
      tls: { ...psk, required: false },
    });
    const raw = wire(server);
    await raw.greet();
    expect((await raw.option(OPTION.startTls)).at(-1)?.[0]).toBe(1);
    raw.send(Buffer.from([22, 3, 1]));
    const plain = await connect(server);
    expect(plain.size).toBe(MiB);
    await server.close();
    await raw.ended();
  });
});
