// SPDX-License-Identifier: Apache-2.0
/** A snapshot from outside, taken while a manifest that is there already begins to count. */
import { expect, it } from 'vitest';
import { create, homeIn, KiB, MiB, open, readAll, write } from './support/disk.js';
import { type Fate, MemoryBucket } from './support/memory-objects.js';

it('is of a manifest whose objects nobody has deleted before the pin was there', async () => {
  const bucket = new MemoryBucket();
  await create(bucket.connect());
  const writer = await open(bucket.connect(), { logLimit: MiB });
  const putAll = async (value: number) => {
    for (let at = 0; at < MiB; at += 16 * KiB) {
      await write(writer, at, Buffer.alloc(4 * KiB, value));
    }
  };
  await putAll(1);
  await writer.checkpoint();
  await putAll(2);
  await writer.flush();
  const outside = await open(bucket.connect(), { mode: 'follow' });

  const home = homeIn(bucket);
  const keys = (kind: string) => bucket.keys(`${home}/${kind}/`).length;
  const manifests = keys('m');
  let goOn = () => {};
  const gate = new Promise<void>((resolve) => (goOn = resolve));
  let pins = 0;
  bucket.fate = async (operation, key): Promise<Fate> => {
    // What declares the manifest valid is late.
    if (operation === 'put' && key.startsWith(`${home}/s/`)) await gate;
    if (operation === 'put' && key.startsWith(`${home}/p/`) && pins++ === 0) {
      // The log was looked at before, the pin comes after all that was replaced is gone.
      goOn();
      await expect.poll(() => keys('m')).toBe(manifests);
      await expect.poll(() => keys('c')).toBe(MiB / (16 * KiB));
    }
    return 'good';
  };
  const checkpoint = writer.checkpoint();
  await expect.poll(() => keys('m')).toBe(manifests + 1);
  await outside.snapshot('late');
  await checkpoint;
  const pinned = await open(bucket.connect(), { snapshot: 'late' });
  const bytes = await readAll(pinned);
  for (let at = 0; at < MiB; at += 16 * KiB) expect(bytes[at]).toBe(2);
  await Promise.all([pinned.close(), outside.close(), writer.close()]);
});
