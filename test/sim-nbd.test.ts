/** The NBD server in front of a simulated device, by the package's own client. */
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import {
  NbdClient,
  type NbdConnectOptions,
  type NbdServer,
  type ServeNbdOptions,
  SimulatedDisk,
  serveNbd,
  simulate,
} from '../lib/sim/index.js';
import { MemoryStore } from '../lib/store/index.js';

const MiB = 1 << 20;

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
