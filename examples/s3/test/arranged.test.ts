// SPDX-License-Identifier: Apache-2.0
/** What is written here and there lies in its segment in the order of the disk, and means the same. */
import { describe, expect, it } from 'vitest';
import { LogIndex, RUN } from '../src/engine/log-index.js';
import { decodeRecords, OpenSegment, RecordType } from '../src/engine/segment.js';
import { create, KiB, MiB, open, readAll, write } from './support/disk.js';
import { MemoryBucket } from './support/memory-objects.js';
import { randomNumbers } from './support/random.js';

const BLOCK = 512;
const PER_CHUNK = 8;
const BLOCKS = 12 * PER_CHUNK;

/** What a segment makes of a disk. */
function replay(segment: OpenSegment): Buffer {
  const disk = Buffer.alloc(BLOCKS * BLOCK);
  const data = segment.payload();
  let at = 0;
  for (const { type, block, blocks } of decodeRecords('test', segment.encodeRecords())) {
    const [start, end] = [block * BLOCK, (block + blocks) * BLOCK];
    if (type === RecordType.zero) disk.fill(0, start, end);
    if (type !== RecordType.data) continue;
    at += data.copy(disk, start, at, at + end - start);
  }
  expect(at).toBe(data.length);
  return disk;
}

/** Writes of one to twenty blocks, which overlap; @param zeros before which of them something is discarded */
function fill(seed: number, zeros: (i: number) => boolean): OpenSegment {
  const random = randomNumbers(seed);
  const segment = new OpenSegment(7, BLOCK, Buffer.alloc(64 * KiB));
  for (let i = 0; i < 12; i++) {
    const blocks = 1 + Math.floor(random() * (i % 4 === 0 ? 20 : 3));
    const block = Math.floor(random() * (BLOCKS - blocks));
    if (zeros(i)) segment.note(RecordType.zero, block, blocks + 1);
    else segment.append(block, Buffer.alloc(blocks * BLOCK, 1 + i));
  }
  return segment;
}

const chunksOf = (segment: OpenSegment): number[] =>
  decodeRecords('test', segment.encodeRecords()).map(({ block }) => Math.floor(block / PER_CHUNK));

describe('a segment', () => {
  it('goes by chunks, and what is newer stays so', () => {
    let moved = 0;
    for (let seed = 1; seed <= 200; seed++) {
      const segment = fill(seed, () => false);
      const before = replay(segment);
      const placed = segment.arrange(PER_CHUNK, () => Buffer.alloc(64 * KiB));
      expect(replay(segment).equals(before)).toBe(true);
      const chunks = chunksOf(segment);
      expect(chunks).toEqual([...chunks].sort((a, b) => a - b));
      moved += placed.length;
      expect(segment.arrange(PER_CHUNK, () => expect.unreachable('it is in order'))).toEqual([]);
    }
    expect(moved).toBeGreaterThan(2000);
  });

  it('is found where it is by an index that was told', () => {
    let split = 0;
    for (let seed = 1; seed <= 400; seed++) {
      const random = randomNumbers(seed);
      const segment = new OpenSegment(7, BLOCK, Buffer.alloc(64 * KiB));
      const index = new LogIndex(BLOCK, PER_CHUNK * BLOCK);
      let next = 0;
      for (let i = 0; i < 20; i++) {
        const blocks = 1 + Math.floor(random() * 5);
        // Often behind the one before, also where something was discarded between the two.
        const isNext = random() < 0.4 && next + blocks <= BLOCKS;
        const block = isNext ? next : Math.floor(random() * (BLOCKS - blocks));
        if (random() < 0.15) {
          segment.note(RecordType.zero, block, blocks);
          index.put(block, blocks, 7, -1);
          continue;
        }
        index.put(block, blocks, 7, segment.append(block, Buffer.alloc(blocks * BLOCK, 1 + i)));
        next = block + blocks;
      }
      const before = replay(segment);
      const { runs } = index;
      index.moved(
        7,
        segment.arrange(PER_CHUNK, () => Buffer.alloc(64 * KiB)),
      );
      if (index.runs > runs) split++;
      const disk = Buffer.alloc(before.length);
      let count = 0;
      for (const chunk of index.indexes()) {
        const list = index.of(chunk) ?? [];
        for (let at = 0; at < list.length; at += RUN) {
          const [first, length, , offset] = list.slice(at, at + RUN) as number[] as [
            number,
            number,
            number,
            number,
          ];
          count++;
          if (offset < 0) continue;
          const to = (chunk * PER_CHUNK + first) * BLOCK;
          segment.payload().copy(disk, to, offset, offset + length * BLOCK);
        }
      }
      expect(disk.equals(before)).toBe(true);
      expect(index.runs).toBe(count);
    }
    expect(split).toBeGreaterThan(5);
  });

  it('stays as it is up to the last change of another kind', () => {
    for (let seed = 1; seed <= 200; seed++) {
      const segment = fill(seed, (i) => i === 2 || i === 5);
      const before = replay(segment);
      const list = decodeRecords('test', segment.encodeRecords());
      const behind = list.findLastIndex(({ type }) => type === RecordType.zero) + 1;
      segment.arrange(PER_CHUNK, () => Buffer.alloc(64 * KiB));
      expect(replay(segment).equals(before)).toBe(true);
      const after = decodeRecords('test', segment.encodeRecords());
      expect(after.slice(0, behind)).toEqual(list.slice(0, behind));
    }
  });
});

it('a checkpoint fetches little more of a scattered log than what is in it', async () => {
  const bucket = new MemoryBucket();
  const size = 48 * MiB;
  const piece = 4 * KiB;
  const logLimit = 40 * MiB;
  await create(bucket.connect(), { size, chunkSize: MiB, frameSize: 16 * KiB });
  const limits = { segmentSize: 4 * MiB, dirtyLimit: 8 * MiB, cacheSize: MiB, logLimit };
  const disk = await open(bucket.connect(), limits);
  const random = randomNumbers(9);
  const expected = new Uint8Array(size / piece);
  for (let i = 0; disk.statistics().checkpoints === 0; i++) {
    const at = Math.floor(random() * expected.length);
    expected[at] = 1 + (i % 255);
    await write(disk, at * piece, Buffer.alloc(piece, 1 + (i % 255)));
    if (i % 100 === 0) expect((await readAll(disk, at * piece, 1))[0]).toBe(1 + (i % 255));
  }
  // It had to go through the log three times: as much as that is loaded at a time.
  expect(disk.statistics().bytesRead).toBeGreaterThan(logLimit / 2);
  expect(disk.statistics().bytesRead).toBeLessThan(logLimit * 1.5);
  const check = async () => {
    const all = await readAll(disk);
    expect(expected.every((value, at) => all[at * piece] === value)).toBe(true);
  };
  await check();
  await disk.flush();
  expect(disk.statistics().dirtyBytes).toBe(0);
  await disk.checkpoint();
  await check();
  await disk.close();
});
