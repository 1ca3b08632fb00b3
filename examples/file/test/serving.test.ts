// SPDX-License-Identifier: Apache-2.0
/** Where a disk keeps what it remembers over restarts. */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { memoryOf } from '../src/serving.js';
import { scratch } from './util.js';

const dir = scratch();
const path = join(dir, 'disk.img');
const file = { path, kind: 'file', readOnly: false } as const;

describe('memoryOf', () => {
  it('is a file beside the disk, or the one that was named', async () => {
    const named = join(dir, 'elsewhere');
    for (const [state, place] of [
      [undefined, `${path}.state`],
      [named, named],
    ] as const) {
      const { modePageStorage, operationStorage } = memoryOf(file, { state });
      await modePageStorage?.save(Uint8Array.of(1));
      await operationStorage?.save(Uint8Array.of(2));
      expect(existsSync(place)).toBe(true);
      const again = memoryOf(file, { state });
      expect(await again.modePageStorage?.load()).toEqual(Buffer.of(1));
      expect(await again.operationStorage?.load()).toEqual(Buffer.of(2));
    }
  });

  it('is nowhere for a block device, unless it is named', () => {
    const device = { path: '/dev/vg0/lv1', kind: 'block device', readOnly: false } as const;
    expect(memoryOf(device, { state: undefined })).toEqual({});
    expect(memoryOf(device, { state: join(dir, 'lv1') }).operationStorage).toBeDefined();
  });

  it('a read-only server knows of an operation that did not end, and saves nothing', async () => {
    await memoryOf(file, { state: undefined }).operationStorage?.save(Uint8Array.of(2, 0));
    const looking = memoryOf({ ...file, readOnly: true }, { state: undefined });
    expect(looking.modePageStorage).toBeUndefined();
    expect(await looking.operationStorage?.load()).toEqual(Buffer.of(2, 0));
    await expect(looking.operationStorage?.save(Uint8Array.of(1, 0))).rejects.toThrow(/EROFS/);
  });
});
