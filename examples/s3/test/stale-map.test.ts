// SPDX-License-Identifier: Apache-2.0
/** Reads whose part of the chunk map comes late, when there is a newer one: they leave nothing older in the cache. */
import { expect, it } from 'vitest';
import { create, homeIn, KiB, MiB, open, readAll, write } from './support/disk.js';
import { type Fate, MemoryBucket } from './support/memory-objects.js';

/** The first chunk of each part of the map. */
const CHUNKS = [0, 256, 512].map((chunk) => chunk * 16 * KiB);

it.each(['follow', 'write'] as const)(
  'what an older map led to is not taken for what is there now (%s)',
  async (mode) => {
    const bucket = new MemoryBucket();
    await create(bucket.connect(), { size: 16 * MiB });
    const options = { logLimit: MiB, mapSize: 0, cacheSize: MiB };
    const writer = await open(bucket.connect(), options);
    const putAll = async (value: number, length: number) => {
      for (const at of CHUNKS) await write(writer, at, Buffer.alloc(length, value));
    };
    await putAll(1, 4 * KiB);
    await writer.checkpoint();
    // Keeps the first versions.
    await writer.snapshot('before');
    await putAll(2, 512);
    await writer.flush();
    const follower = await open(bucket.connect(), { ...options, mode: 'follow' });
    const reader = mode === 'follow' ? follower : writer;

    const home = homeIn(bucket);
    let goOn = () => {};
    const gate = new Promise<void>((resolve) => (goOn = resolve));
    let asked = 0;
    let isHeld = false;
    let late: Promise<Buffer>[] = [];
    bucket.fate = async (operation, key): Promise<Fate> => {
      if (operation === 'get' && key.startsWith(`${home}/l/`) && isHeld) {
        asked++;
        await gate;
      }
      // The writer has looked at its map by then, and holds the least part of it only.
      if (operation === 'put' && key.startsWith(`${home}/m/`)) {
        isHeld = true;
        late = CHUNKS.map((at) => readAll(reader, at + 512, 512));
        await expect.poll(() => asked).toBeGreaterThan(1);
        isHeld = false;
      }
      return 'good';
    };
    await writer.checkpoint();
    await follower.refresh();
    goOn();
    for (const bytes of await Promise.all(late)) {
      expect(bytes.every((byte) => byte === 1)).toBe(true);
    }
    for (const at of CHUNKS) {
      expect((await readAll(reader, at, 512)).every((byte) => byte === 2)).toBe(true);
    }
    await follower.close();
    await writer.close();
  },
);
