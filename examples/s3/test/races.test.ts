// SPDX-License-Identifier: Apache-2.0
/** What happens at the same time: blocks of 512 bytes in one frame of 4 KiB, a disk that shrinks under writes. */
import { describe, expect, it } from 'vitest';
import { create, failure, GEOMETRY, KiB, MiB, open, readAll, write } from './support/disk.js';
import { type Fate, MemoryBucket } from './support/memory-objects.js';
import { randomNumbers } from './support/random.js';

const BLOCK = 512;
/** Two chunks, of four frames each. */
const BLOCKS = (2 * GEOMETRY.chunkSize) / BLOCK;

describe('blocks of 512 bytes that race', () => {
  it.each([1, 2, 3, 4, 5, 6])(
    'each holds what one of its writers wrote (seed %i)',
    async (seed) => {
      const random = randomNumbers(seed);
      const below = (count: number): number => Math.floor(random() * count);
      const bucket = new MemoryBucket();
      await create(bucket.connect(), { blockSize: BLOCK });
      let disk = await open(bucket.connect(seed), { cacheSize: 8 * KiB, dirtyLimit: 64 * KiB });
      // Nobody writes it but by COMPARE AND WRITE; its neighbours in the frame are everybody's.
      const counter = 11;
      let counted = 0;
      let now: number[] = Array(BLOCKS).fill(0);
      for (let round = 0; round < 15; round++) {
        const possible = now.map((value) => new Set([value]));
        const seen: [first: number, bytes: Buffer][] = [];
        const count = async (): Promise<void> => {
          for (;;) {
            const there = await readAll(disk, counter * BLOCK, BLOCK);
            const next = Buffer.from(there);
            next.writeUInt32LE(there.readUInt32LE() + 1);
            if ((await disk.compareAndWrite(counter * BLOCK, there, next)) === -1) break;
          }
          counted++;
        };
        const change = async (): Promise<void> => {
          const value = 1 + below(255);
          let first = below(BLOCKS);
          let blocks = 1 + below(Math.min(20, BLOCKS - first));
          if (first <= counter) blocks = Math.min(blocks, counter - first);
          if (blocks === 0) [first, blocks] = [counter + 1, 1];
          const kind = random();
          for (let i = 0; i < blocks; i++) possible[first + i]?.add(kind < 0.8 ? value : 0);
          const [position, length] = [first * BLOCK, blocks * BLOCK];
          if (kind < 0.7) await write(disk, position, Buffer.alloc(length, value), random() < 0.1);
          else if (kind < 0.8) await disk.writeSame(position, length, Buffer.alloc(BLOCK, value));
          else await disk.unmap(position, length);
        };
        const look = async (): Promise<void> => {
          const first = below(BLOCKS);
          const length = (1 + below(BLOCKS - first)) * BLOCK;
          seen.push([first, await readAll(disk, first * BLOCK, length)]);
        };
        const running: Promise<unknown>[] = [];
        for (let i = 0; i < 12; i++) {
          const kind = random();
          running.push(kind < 0.6 ? change() : kind < 0.8 ? look() : count());
          if (random() < 0.15) running.push(disk.checkpoint());
          if (random() < 0.3) await new Promise((resolve) => setImmediate(resolve));
        }
        await Promise.all(running);
        const valuesOf = (first: number, bytes: Buffer): number[] =>
          Array.from({ length: bytes.length / BLOCK }, (_, i) => {
            if (first + i === counter) return 0;
            const block = bytes.subarray(i * BLOCK, (i + 1) * BLOCK);
            const value = block[0] as number;
            expect(block.equals(Buffer.alloc(BLOCK, value))).toBe(true);
            expect(possible[first + i]).toContain(value);
            return value;
          });
        for (const [first, bytes] of seen) valuesOf(first, bytes);
        const all = await readAll(disk, 0, BLOCKS * BLOCK);
        now = valuesOf(0, all);
        expect(all.readUInt32LE(counter * BLOCK)).toBe(counted);
        if (round % 5 === 4) {
          await disk.close();
          disk = await open(bucket.connect(seed), { cacheSize: 8 * KiB, dirtyLimit: 64 * KiB });
        }
        expect((await readAll(disk, 0, BLOCKS * BLOCK)).equals(all)).toBe(true);
      }
      expect(counted).toBeGreaterThan(10);
      await disk.close();
    },
  );
});

describe('a disk that shrinks', () => {
  it.each([
    ['a write', (disk, at) => write(disk, at, Buffer.alloc(64 * KiB, 7))],
    ['WRITE SAME', (disk, at) => disk.writeSame(at, 64 * KiB, Buffer.alloc(4 * KiB, 7))],
    [
      'COMPARE AND WRITE',
      (disk, at) => disk.compareAndWrite(at, Buffer.alloc(32 * KiB, 1), Buffer.alloc(32 * KiB, 7)),
    ],
  ] as [string, (disk: Awaited<ReturnType<typeof open>>, at: number) => Promise<unknown>][])(
    'under %s that waits for room: nothing of it comes back when it grows again',
    async (_, change) => {
      const bucket = new MemoryBucket();
      await create(bucket.connect());
      const disk = await open(bucket.connect(), { dirtyLimit: 64 * KiB });
      await write(disk, 768 * KiB, Buffer.alloc(128 * KiB, 1), true);
      let goOn = () => {};
      const gate = new Promise<void>((resolve) => (goOn = resolve));
      bucket.fate = async (operation): Promise<Fate> => {
        if (operation === 'put') await gate;
        return 'good';
      };
      await write(disk, 0, Buffer.alloc(32 * KiB, 2));
      await write(disk, 32 * KiB, Buffer.alloc(16 * KiB, 2));
      const waiting = failure(() => change(disk, 768 * KiB));
      for (let i = 0; i < 50; i++) await new Promise((resolve) => setImmediate(resolve));
      const shrinking = disk.resize(512 * KiB);
      goOn();
      await shrinking;
      expect(await waiting).toMatchObject({ key: 5, asc: 0x21 });
      await disk.resize(MiB);
      const end = await readAll(disk, 512 * KiB, 512 * KiB);
      expect(end.equals(Buffer.alloc(512 * KiB))).toBe(true);
      await disk.close();
    },
  );
});
