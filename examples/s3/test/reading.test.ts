// SPDX-License-Identifier: Apache-2.0
/** How much one read asks the bucket for. */
import { describe, expect, it } from 'vitest';
import { AnswerBuffers } from '../src/engine/buffers.js';
import { create, KiB, MiB, open, readAll, write } from './support/disk.js';
import { MemoryBucket } from './support/memory-objects.js';

describe('a read that is not in memory', () => {
  const frameSize = 4 * KiB;

  async function disk(cacheSize: number, kind: 'chunks' | 'log') {
    const bucket = new MemoryBucket();
    await create(bucket.connect(), { size: MiB, chunkSize: 64 * KiB, frameSize });
    const writer = await open(bucket.connect(), { logLimit: 8 * MiB });
    for (let at = 0; at < MiB; at += 32 * KiB)
      await write(writer, at, Buffer.alloc(32 * KiB, 1 + at / (32 * KiB)));
    if (kind === 'chunks') await writer.checkpoint();
    await writer.close();
    return open(bucket.connect(), { mode: 'follow', readAhead: false, cacheSize });
  }

  it.each(['chunks', 'log'] as const)('brings its neighbours along (%s)', async (kind) => {
    const reader = await disk(512 * KiB, kind);
    const asked = async (position: number) => {
      const before = reader.statistics();
      expect((await readAll(reader, position, 512))[0]).toBe(1 + Math.floor(position / 32 / KiB));
      const { gets, bytesRead } = reader.statistics();
      return { gets: gets - before.gets, bytes: bytesRead - before.bytesRead };
    };
    await asked(512 * KiB);
    expect(await asked(8 * KiB)).toEqual({ gets: 1, bytes: 8 * frameSize });
    for (const at of [512, 4 * KiB, 28 * KiB + 512]) {
      expect(await asked(at)).toEqual({ gets: 0, bytes: 0 });
    }
    // From the other end too, and no further.
    expect(await asked(60 * KiB)).toEqual({ gets: 1, bytes: 8 * frameSize });
    expect(await asked(32 * KiB)).toEqual({ gets: 0, bytes: 0 });
    expect(await asked(64 * KiB)).toEqual({ gets: 1, bytes: 8 * frameSize });
    await reader.close();
  });

  it.each(['chunks', 'log'] as const)('gets what it needs by a full cache (%s)', async (kind) => {
    const reader = await disk(256 * KiB, kind);
    // One of each group: what comes then was a neighbour only while there was room, and is gone.
    for (let at = 0; at < MiB; at += 8 * frameSize) await readAll(reader, at, 512);
    const before = reader.statistics();
    await readAll(reader, 2 * frameSize + 512, 512);
    const { gets, bytesRead } = reader.statistics();
    expect(gets - before.gets).toBe(1);
    expect(bytesRead - before.bytesRead).toBe(frameSize);
    await reader.close();
  });
});

it('buffers for answers are counted, and used again as far as they may be kept', () => {
  const answers = new AnswerBuffers(16 * KiB);
  const first = answers.take(5000);
  expect(first.length).toBe(8 * KiB);
  const more = [answers.take(8 * KiB), answers.take(8 * KiB)];
  expect(answers.bytes).toBe(24 * KiB);
  for (const buffer of [first, ...more]) answers.give(buffer);
  expect(answers.bytes).toBe(16 * KiB);
  expect([first, ...more]).toContain(answers.take(6000));
  expect(answers.take(64 * KiB).length).toBe(64 * KiB);
  expect(answers.bytes).toBe(16 * KiB + 64 * KiB);
});
