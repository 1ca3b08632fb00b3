// SPDX-License-Identifier: Apache-2.0
/** How much one read asks the bucket for. */

import { SenseKey } from 'tcmu/scsi';
import { describe, expect, it } from 'vitest';
import { AnswerBuffers } from '../src/engine/buffers.js';
import type { S3Disk } from '../src/s3-disk.js';
import { create, KiB, MiB, open, PREFIX, readAll, write } from './support/disk.js';
import { type Fate, MemoryBucket } from './support/memory-objects.js';

const damaged = (path: string) => ({
  key: SenseKey.MEDIUM_ERROR,
  asc: 0x11,
  cause: { failure: 'damaged', path },
});

/** Until nothing is on its way from the bucket any more. */
async function drained(disk: S3Disk): Promise<void> {
  let { bytesRead } = disk.statistics();
  for (let still = 0; still < 10; still++) {
    await new Promise((resolve) => setImmediate(resolve));
    if (disk.statistics().bytesRead === bytesRead) continue;
    ({ bytesRead } = disk.statistics());
    still = 0;
  }
}

describe('a read that is not in memory', () => {
  const frameSize = 4 * KiB;

  async function heldDisk(kind: 'chunks' | 'log', cacheSize = 512 * KiB) {
    const bucket = new MemoryBucket();
    await create(bucket.connect(), { size: MiB, chunkSize: 64 * KiB, frameSize });
    const writer = await open(bucket.connect(), { logLimit: 8 * MiB });
    for (let at = 0; at < MiB; at += 32 * KiB)
      await write(writer, at, Buffer.alloc(32 * KiB, 1 + at / (32 * KiB)));
    if (kind === 'chunks') await writer.checkpoint();
    await writer.close();
    const options = { mode: 'follow', readAhead: false, cacheSize } as const;
    return { bucket, reader: await open(bucket.connect(), options) };
  }

  async function disk(cacheSize: number, kind: 'chunks' | 'log') {
    return (await heldDisk(kind, cacheSize)).reader;
  }

  async function asked(reader: S3Disk, position: number) {
    const before = reader.statistics();
    expect((await readAll(reader, position, 512))[0]).toBe(1 + Math.floor(position / 32 / KiB));
    // What comes along may come later.
    await drained(reader);
    const { gets, bytesRead } = reader.statistics();
    return { gets: gets - before.gets, frames: (bytesRead - before.bytesRead) / frameSize };
  }

  it.each([
    // A segment ends where a chunk goes on.
    { kind: 'chunks', here: [0, 9], later: 6 },
    { kind: 'log', here: [0, 7], later: 8 },
  ] as const)('brings what is around it along (%j)', async ({ kind, here, later }) => {
    const reader = await disk(512 * KiB, kind);
    await asked(reader, 512 * KiB);
    expect(await asked(reader, 8 * KiB)).toEqual({ gets: 2, frames: here[1] + 1 });
    for (const frame of [...here, 1, 2, 3]) {
      expect(await asked(reader, frame * frameSize + 512)).toEqual({ gets: 0, frames: 0 });
    }
    // No further than its object, and nothing that is there.
    expect(await asked(reader, 56 * KiB)).toEqual({ gets: 2, frames: later });
    await reader.close();
  });

  it('asks for little at a time that nobody wants', async () => {
    const { bucket, reader } = await heldDisk('chunks');
    await asked(reader, 512 * KiB);
    let release = () => {};
    const gate = new Promise<void>((resolve) => {
      release = resolve;
    });
    bucket.after = () => gate;
    const { gets } = reader.statistics();
    const chunks = Array.from({ length: 5 }, (_, chunk) => chunk * 64 * KiB + 32 * KiB);
    for (const at of chunks) await readAll(reader, at, 512);
    await drained(reader);
    expect(reader.statistics().gets - gets).toBe(5 + 2);
    release();
    await drained(reader);
    let brought = 0;
    for (const at of chunks) if ((await asked(reader, at - frameSize)).gets === 0) brought++;
    expect(brought).toBe(2);
    await reader.close();
  });

  it.each(['chunks', 'log'] as const)('is answered before what comes along (%s)', async (kind) => {
    const { bucket, reader } = await heldDisk(kind);
    await readAll(reader, 512 * KiB, 512);
    let release = () => {};
    const gate = new Promise<void>((resolve) => {
      release = resolve;
    });
    bucket.after = () => gate;
    const { gets } = reader.statistics();
    expect((await readAll(reader, 32 * KiB, 512))[0]).toBe(2);
    // What is on its way is not asked for again.
    let isThere = false;
    const last = readAll(reader, 60 * KiB, 512).then((bytes) => {
      isThere = true;
      return bytes;
    });
    await new Promise((resolve) => setTimeout(resolve, 20));
    expect(isThere).toBe(false);
    release();
    expect((await last)[0]).toBe(2);
    // The other request is for what is before it in the chunk; a segment begins here.
    expect(reader.statistics().gets - gets).toBe(kind === 'chunks' ? 2 : 1);
    await reader.close();
  });

  it('is good when what comes along is not, which is told to its reader', async () => {
    const { bucket, reader } = await heldDisk('chunks');
    await readAll(reader, 512 * KiB, 512);
    const chunk = bucket.keys(PREFIX).filter((key) => key.includes('/c/'))[0] as string;
    const stored = bucket.objects.get(chunk) as { body: Buffer };
    // In the last frame but one: the read below is of the first half, and brings it along.
    // And in the fourth, which comes by a request of its own.
    const broken = Buffer.from(stored.body);
    for (const at of [14, 3].map((frame) => broken.length - (16 - frame) * frameSize + 5)) {
      broken[at] = (broken[at] as number) ^ 1;
    }
    stored.body = broken;
    const [first, last] = [readAll(reader, 32 * KiB, 512), readAll(reader, 56 * KiB, 512)];
    expect((await first)[0]).toBe(2);
    await expect(last).rejects.toMatchObject(damaged(chunk));
    expect((await readAll(reader, 52 * KiB, 512))[0]).toBe(2);
    await expect(readAll(reader, 56 * KiB, 512)).rejects.toMatchObject(damaged(chunk));
    expect((await readAll(reader, 60 * KiB, 512))[0]).toBe(2);
    await drained(reader);
    await expect(readAll(reader, 12 * KiB, 512)).rejects.toMatchObject(damaged(chunk));
    expect((await readAll(reader, 8 * KiB, 512))[0]).toBe(1);
    await reader.close();
  });

  it('makes way for those who wait', async () => {
    const { bucket, reader } = await heldDisk('chunks');
    await asked(reader, 512 * KiB);
    // Two wait for what never comes.
    const never = new Promise<void>(() => {});
    bucket.after = (_, key) => (/0000000000[34]\./.test(key) ? never : Promise.resolve());
    const { gets } = reader.statistics();
    for (const chunk of [3, 4]) readAll(reader, chunk * 64 * KiB + 60 * KiB, 512).catch(() => {});
    await drained(reader);
    expect(reader.statistics().gets - gets).toBe(2);
    expect((await asked(reader, 32 * KiB)).gets).toBe(1);
    bucket.after = undefined;
    await reader.close();
  });

  it('brings nothing along of a version that was replaced meanwhile', async () => {
    const { bucket, reader } = await heldDisk('chunks');
    await asked(reader, 512 * KiB);
    const writer = await open(bucket.connect(), { logLimit: 8 * MiB });
    // So that the version stays.
    await writer.snapshot('before');
    const chunk = bucket.keys(PREFIX).find((key) => key.includes('/c/')) as string;
    let release = () => {};
    const gate = new Promise<void>((resolve) => {
      release = resolve;
    });
    const seen: string[] = [];
    bucket.fate = async (operation, key): Promise<Fate> => {
      if (operation !== 'get' || key !== chunk) return 'good';
      seen.push(key);
      if (seen.length === 1) await gate;
      return 'good';
    };
    const reading = readAll(reader, 32 * KiB, 512);
    await expect.poll(() => seen.length).toBe(1);
    await write(writer, 0, Buffer.alloc(64 * KiB, 77));
    await writer.checkpoint();
    await expect.poll(() => reader.refresh().then(() => reader.manifest.n)).toBe(writer.manifest.n);
    expect(seen.length).toBe(1);
    release();
    expect((await reading)[0]).toBe(2);
    await drained(reader);
    expect(seen.length).toBe(1);
    expect((await readAll(reader, 32 * KiB, 512))[0]).toBe(77);
    await reader.close();
    await writer.close();
  });

  it('brings nothing along when it is on its way already', async () => {
    const { reader } = await heldDisk('chunks');
    await asked(reader, 512 * KiB);
    const before = reader.statistics();
    const reads = [readAll(reader, 28 * KiB, 512), readAll(reader, 28 * KiB + 512, 512)];
    for (const bytes of await Promise.all(reads)) expect(bytes[0]).toBe(1);
    await drained(reader);
    const { gets, bytesRead } = reader.statistics();
    expect(gets - before.gets).toBe(1);
    expect(bytesRead - before.bytesRead).toBe(8 * frameSize);
    await reader.close();
  });

  it('goes on where an answer broke off', async () => {
    const { bucket, reader } = await heldDisk('chunks');
    await readAll(reader, 512 * KiB, 512);
    const fates: Fate[] = [{ after: 'outage' }, { before: 'throttled' }, 'good'];
    bucket.fate = () => fates.shift() ?? 'good';
    const [first, last] = [readAll(reader, 32 * KiB, 512), readAll(reader, 60 * KiB, 512)];
    expect((await first)[0]).toBe(2);
    expect((await last)[0]).toBe(2);
    expect(fates).toEqual([]);
    for (let at = 32 * KiB; at < 64 * KiB; at += 512) {
      expect((await readAll(reader, at, 512)).every((byte) => byte === 2)).toBe(true);
    }
    await reader.close();
  });

  it('that is cut short is damage', async () => {
    const { bucket, reader } = await heldDisk('chunks');
    await readAll(reader, 512 * KiB, 512);
    const chunk = bucket.keys(PREFIX).filter((key) => key.includes('/c/'))[0] as string;
    const stored = bucket.objects.get(chunk) as { body: Buffer };
    stored.body = stored.body.subarray(0, -frameSize - 1);
    await expect(readAll(reader, 60 * KiB, 512)).rejects.toMatchObject(damaged(chunk));
    await expect(readAll(reader, 56 * KiB, 512)).rejects.toMatchObject(damaged(chunk));
    await reader.close();
  });

  it.each(['chunks', 'log'] as const)('gets what it needs by a full cache (%s)', async (kind) => {
    const reader = await disk(256 * KiB, kind);
    // One of each group: what comes then was a neighbour only while there was room, and is gone.
    for (let at = 0; at < MiB; at += 8 * frameSize) await asked(reader, at);
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
