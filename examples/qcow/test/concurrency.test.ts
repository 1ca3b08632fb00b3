// SPDX-License-Identifier: Apache-2.0
/**
 * Many requests at once. Each worker owns every n-th sector, so that clusters are shared by all and yet
 * each sector has one right value at any time: an allocation that loses a neighbour's data, or data that
 * lands in a cluster given to another, shows.
 */
import { join } from 'node:path';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import { describe, expect, test } from 'vitest';
import { type CreateOptions, checkImage, createImage, QcowStore } from '../src/index.js';
import { KiB, MiB, qemuImg, scratch } from './util.js';

const dir = scratch();
const context = { signal: new AbortController().signal, fua: false, mayUnmap: true };
const SECTOR = 512;
const WORKERS = 24;

/** A small generator, so that a failing seed is one number. */
function random(seed: number): (below: number) => number {
  let state = seed >>> 0;
  return (below) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
}

function stamp(sector: number, round: number): Uint8Array {
  const bytes = new Uint8Array(SECTOR).fill(round & 0xff);
  new DataView(bytes.buffer).setFloat64(0, sector);
  new DataView(bytes.buffer).setUint32(8, round);
  return bytes;
}

describe.each<[string, CreateOptions, number]>([
  ['64 KiB', {}, 32 * MiB],
  ['512 bytes, tables that do not fit the cache', { clusterSize: 512 }, 8 * MiB],
  ['subclusters', { clusterSize: 16 * KiB, extendedL2: true }, 32 * MiB],
  ['version 2', { version: 2, clusterSize: 4 * KiB }, 16 * MiB],
])('clusters of %s', (name, options, size) => {
  test.each(['pool', 'auto'] as const)('shared by all workers, file I/O %s', async (io) => {
    const path = join(dir, `${name}-${io}.qcow2`);
    await createImage(path, { size, ...options });
    const store = await QcowStore.open(path, {
      io,
      l2CacheBytes: 4 * KiB,
      refcountCacheBytes: 4 * KiB,
    });
    const sectors = size / SECTOR;
    const rounds = new Uint32Array(sectors);
    const read = async (sector: number): Promise<Uint8Array> => {
      const data = new MemoryDataIn(new Uint8Array(SECTOR).fill(0xee));
      await store.read(sector * SECTOR, data);
      return data.bytes;
    };
    const expected = (sector: number): Uint8Array =>
      rounds[sector] === 0 ? new Uint8Array(SECTOR) : stamp(sector, rounds[sector] as number);
    const work = async (worker: number): Promise<void> => {
      const next = random(worker + 1);
      for (let step = 1; step <= 120; step++) {
        // Few places, so that workers meet.
        const place = next(8) * Math.floor(sectors / 8 / WORKERS) + next(20);
        const sector = place * WORKERS + worker;
        const kind = next(10);
        if (kind < 5) {
          await store.write(sector * SECTOR, new MemoryDataOut(stamp(sector, step)));
          rounds[sector] = step;
        } else if (kind < 6) {
          await store.writeZeroes(sector * SECTOR, SECTOR, context);
          rounds[sector] = 0;
        } else if (kind < 9) {
          expect(Buffer.compare(await read(sector), expected(sector)), `sector ${sector}`).toBe(0);
        } else {
          await store.flush();
        }
      }
    };
    let done = false;
    const snapshots = (async () => {
      for (let i = 0; !done && i < 20; i++) {
        await store.snapshots.create(`s${i}`);
        if (i > 1) await store.snapshots.delete(`s${i - 1}`);
      }
    })();
    await Promise.all(Array.from({ length: WORKERS }, (_, worker) => work(worker)));
    done = true;
    await snapshots;
    await store.close();

    qemuImg('check', path);
    expect(await checkImage(path)).toMatchObject({ errors: 0, leaks: 0 });
    const again = await QcowStore.open(path, { readOnly: true });
    const all = new MemoryDataIn(new Uint8Array(size));
    await again.read(0, all);
    await again.close();
    for (let sector = 0; sector < sectors; sector++) {
      const found = all.bytes.subarray(sector * SECTOR, (sector + 1) * SECTOR);
      if (Buffer.compare(found, expected(sector)) !== 0) throw new Error(`sector ${sector}`);
    }
  });
});
