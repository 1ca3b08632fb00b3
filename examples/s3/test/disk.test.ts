// SPDX-License-Identifier: Apache-2.0
/** The whole of the BlockStore interface against a model of it, and what a disk costs. */
import { crc32 } from 'node:zlib';
import fc from 'fast-check';
import { BlockDevice } from 'tcmu/scsi';
import { MemoryDataOut } from 'tcmu/store';
import { describe, expect, it } from 'vitest';
import { checkDisk, createDisk, readingParts } from '../src/engine/admin.js';
import { BlobCodec, canCompress } from '../src/engine/blob.js';
import { rotateKeys } from '../src/engine/records.js';
import { type OpenOptions, S3Disk } from '../src/s3-disk.js';
import {
  causeOf,
  create,
  failure,
  homeIn,
  KiB,
  MiB,
  open,
  PREFIX,
  quickClock,
  readAll,
  request,
  requestsOf,
  SMALL,
  write,
} from './support/disk.js';
import { MemoryBucket } from './support/memory-objects.js';

const BLOCKS = 2048;
const range = fc
  .tuple(fc.nat(BLOCKS - 1), fc.integer({ min: 1, max: 200 }))
  .map(([first, count]) => ({ first, count: Math.min(count, BLOCKS - first) }));
const value = fc.integer({ min: 1, max: 255 });
const step = fc.oneof(
  { weight: 6, arbitrary: fc.record({ do: fc.constant('write' as const), range, value }) },
  fc.record({ do: fc.constant('fua' as const), range, value }),
  fc.record({ do: fc.constant('unmap' as const), range }),
  fc.record({ do: fc.constant('same' as const), range, value: fc.nat(255) }),
  fc.record({ do: fc.constant('compare' as const), range, value, equal: fc.boolean() }),
  fc.record({ do: fc.constant('flush' as const) }),
  fc.record({ do: fc.constant('checkpoint' as const) }),
  fc.record({ do: fc.constant('reopen' as const) }),
  fc.record({ do: fc.constant('resize' as const), blocks: fc.integer({ min: 1500, max: 2600 }) }),
);

const hasZstd = canCompress('zstd');
const compressions = ['none', 'deflate', ...(hasZstd ? (['zstd'] as const) : [])] as const;

describe.each([512, 4096])('a disk with blocks of %i bytes', (blockSize) => {
  it('holds what was written, whatever came before', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(step, { maxLength: 40 }),
        fc.record({ compression: fc.constantFrom(...compressions), readAhead: fc.boolean() }),
        fc.boolean(),
        async (steps, { compression, readAhead }, secret) => {
          const bucket = new MemoryBucket();
          const key = secret ? () => Buffer.alloc(32, 3) : undefined;
          const size = BLOCKS * blockSize;
          await create(bucket.connect(), { size, blockSize, compression, key });
          let model = Buffer.alloc(size);
          let disk = await open(bucket.connect(), { key, readAhead });
          for (const one of steps) {
            if ('range' in one) {
              const first = Math.min(one.range.first, model.length / blockSize - 1);
              const count = Math.min(one.range.count, model.length / blockSize - first);
              const [position, length] = [first * blockSize, count * blockSize];
              if (one.do === 'unmap') {
                await disk.unmap(position, length);
                model.fill(0, position, position + length);
              } else if (one.do === 'same') {
                await disk.writeSame(position, length, Buffer.alloc(blockSize, one.value));
                model.fill(one.value, position, position + length);
              } else if (one.do === 'compare') {
                const now = Buffer.from(model.subarray(position, position + blockSize));
                if (!one.equal) now.writeUInt8((now[7] as number) ^ 1, 7);
                const bytes = Buffer.alloc(blockSize, one.value);
                const at = await disk.compareAndWrite(position, now, bytes);
                expect(at).toBe(one.equal ? -1 : 7);
                if (one.equal) bytes.copy(model, position);
              } else {
                const bytes = Buffer.alloc(length, one.value);
                await write(disk, position, bytes, one.do === 'fua');
                bytes.copy(model, position);
              }
            } else if (one.do === 'flush') await disk.flush();
            else if (one.do === 'checkpoint') await disk.checkpoint();
            else if (one.do === 'resize') {
              await disk.resize(one.blocks * blockSize);
              const next = Buffer.alloc(one.blocks * blockSize);
              model.copy(next);
              model = next;
            } else {
              await disk.close();
              disk = await open(bucket.connect(), { key, readAhead });
            }
          }
          expect(disk.size).toBe(model.length);
          expect((await readAll(disk)).equals(model)).toBe(true);
          let at = 0;
          while (at < model.length) {
            for (const { length, status } of await disk.blockStatus(at, model.length - at)) {
              expect(length % blockSize).toBe(0);
              const bytes = model.subarray(at, at + length);
              if (status === 'hole' && bytes.some((byte) => byte !== 0)) expect.fail(`at ${at}`);
              at += length;
            }
          }
          expect(at).toBe(model.length);
          await disk.close();
        },
      ),
      { numRuns: 40 },
    );
  }, 120_000);
});

describe('COMPARE AND WRITE', () => {
  it('counts up without losing a step while others write and flush', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const disk = await open(bucket.connect(), { cacheSize: 8 * KiB });
    const count = async (times: number): Promise<void> => {
      for (let done = 0; done < times; ) {
        const now = await readAll(disk, 4096, 4096);
        const next = Buffer.from(now);
        next.writeUInt32LE(now.readUInt32LE() + 1);
        if ((await disk.compareAndWrite(4096, now, next)) === -1) done++;
      }
    };
    const noise = async (): Promise<void> => {
      for (let i = 0; i < 60; i++) {
        await write(disk, (2 + (i % 200)) * 4096, Buffer.alloc(4096, i + 1), i % 5 === 0);
        if (i % 20 === 19) await disk.checkpoint();
      }
    };
    await Promise.all([count(25), count(25), count(25), noise(), noise()]);
    expect((await readAll(disk, 4096, 4096)).readUInt32LE()).toBe(75);
    await disk.close();
  });

  it('reads what it compares once, also when the cache can’t keep it', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const old = Buffer.alloc(64 * KiB, 1);
    const first = await open(bucket.connect());
    await write(first, 0, old);
    await first.checkpoint();
    await first.close();
    const disk = await open(bucket.connect(), { cacheSize: 0, readAhead: false });
    const { gets } = disk.statistics();
    // More than a segment.
    expect(await disk.compareAndWrite(0, old, Buffer.alloc(64 * KiB, 2))).toBe(-1);
    // The leaf, and each of four chunks.
    expect(disk.statistics().gets - gets).toBeLessThanOrEqual(5);
    expect(await disk.compareAndWrite(0, old, old)).toBe(0);
    expect((await readAll(disk, 0, 64 * KiB)).every((byte) => byte === 2)).toBe(true);
    await disk.close();
  });
});

describe('a disk', () => {
  it('is presented as thin, with a write cache, in the sizes it has', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const disk = await open(bucket.connect());
    const device = new BlockDevice(disk, { serial: '1', product: 'S3' });
    await device.open();
    expect(disk).toMatchObject({ writeCache: true, supportsFua: true, unmapGranularity: 4096 });
    await device.close();
  });

  it.each([
    [{ size: 1000 }, /size/],
    [{ size: 64 * KiB }, /1 MiB/],
    [{ blockSize: 1024 }, /block size/],
    [{ chunkSize: 3 * MiB, frameSize: 64 * KiB }, /chunk size/],
    [{ frameSize: 1000 }, /frame size/],
  ])('of %j is refused', async (options, message) => {
    const error = await failure(() => create(new MemoryBucket().connect(), options));
    expect(error['code']).toBe('ERR_TCMU_INVALID_ARGUMENT');
    expect(error.message).toMatch(message);
  });

  it('is created once, and not found elsewhere', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    expect(await causeOf(() => create(bucket.connect()))).toBe('ERR_TCMU_S3_EXISTS');
    const other = S3Disk.open(bucket.connect(), 'other', SMALL);
    expect(await causeOf(() => other)).toBe('ERR_TCMU_S3_NOT_A_DISK');
  });

  it('of 16 TiB takes objects and memory by what was written', async () => {
    const TiB = 1024 ** 4;
    const bucket = new MemoryBucket();
    await createDisk(requestsOf(bucket.connect()), PREFIX, { size: 16 * TiB });
    const options: OpenOptions = { ...SMALL, segmentSize: 4 * MiB, dirtyLimit: 16 * MiB };
    const disk = await S3Disk.open(bucket.connect(), PREFIX, { ...options, logLimit: 64 * MiB });
    for (let i = 0; i < 64; i++) {
      await write(disk, i * (TiB / 4) + 4096 * i, Buffer.alloc(4096, i + 1));
    }
    await disk.checkpoint();
    // A chunk and a leaf for each place; unmapping all of it costs nothing but what was there.
    expect(bucket.keys(`${homeIn(bucket)}/c/`)).toHaveLength(64);
    await disk.unmap(0, 16 * TiB);
    expect(disk.statistics().logRuns).toBeLessThanOrEqual(64 * 256);
    expect((await readAll(disk, TiB, 8192)).every((byte) => byte === 0)).toBe(true);
    await disk.checkpoint();
    expect(bucket.keys(`${homeIn(bucket)}/c/`)).toEqual([]);
    expect(bucket.keys(`${homeIn(bucket)}/l/`)).toEqual([]);
    await disk.close();
  }, 120_000);

  it('of 64 TiB is written at both ends, asked what it holds, kept, checked, and shrunk', async () => {
    const size = 64 * 1024 ** 4;
    const bucket = new MemoryBucket();
    await createDisk(requestsOf(bucket.connect()), PREFIX, { size });
    const options: OpenOptions = { ...SMALL, segmentSize: 4 * MiB, dirtyLimit: 16 * MiB };
    const disk = await S3Disk.open(bucket.connect(), PREFIX, options);
    const places = [0, size / 2 + 4096, size - 4096];
    for (const place of places) await write(disk, place, Buffer.alloc(4096, 7));
    const data = async (): Promise<[number, number][]> => {
      const found: [number, number][] = [];
      for (let at = 0; at < size; ) {
        const extents = await disk.blockStatus(at, size - at);
        expect(extents.length).toBeGreaterThan(0);
        for (const { status, length } of extents) {
          if (status === 'data') found.push([at, length]);
          at += length;
        }
      }
      return found;
    };
    // In the log, and, by the frame, in chunks.
    expect(await data()).toEqual(places.map((place) => [place, 4096]));
    await disk.snapshot('kept');
    await disk.checkpoint();
    const frame = (at: number): number => at - (at % (64 * KiB));
    expect(await data()).toEqual(places.map((place) => [frame(place), 64 * KiB]));
    for (const place of places) expect((await readAll(disk, place, 4096))[0]).toBe(7);
    await disk.resize(MiB);
    await disk.resize(size);
    expect((await readAll(disk, size - 4096, 4096))[0]).toBe(0);
    await disk.checkpoint();
    const { mapBytes, logRuns, cacheBytes } = disk.statistics();
    expect(mapBytes + cacheBytes + logRuns * 200).toBeLessThan(2 * MiB);
    await disk.close();
    const parts = await readingParts(requestsOf(bucket.connect()), PREFIX, undefined);
    const seen: number[] = [];
    expect((await checkDisk(parts, (done) => seen.push(done))).problems).toEqual([]);
    expect(seen.length).toBeGreaterThan(0);
    const kept = await S3Disk.open(bucket.connect(), PREFIX, { ...options, snapshot: 'kept' });
    expect((await readAll(kept, size - 4096, 4096))[0]).toBe(7);
    await kept.close();
  });

  describe('discarded as a whole', () => {
    const size = 24 * MiB;
    const indexLimit = 64 * KiB;
    // What a segment may add.
    const bound = 2 * indexLimit + indexLimit / 4;

    /** A disk full of data, in chunks; `most` of the index's bytes is looked at with every request. */
    async function full() {
      const bucket = new MemoryBucket();
      await create(bucket.connect(), { size });
      const objects = bucket.connect(1, 1);
      const disk = await open(objects, { indexLimit, logLimit: 64 * MiB });
      const data = Buffer.alloc(32 * KiB, 0xa5);
      for (let at = 0; at < size; at += data.length) await write(disk, at, data);
      await disk.checkpoint();
      const seen = { most: 0 };
      const look = (): void => {
        seen.most = Math.max(seen.most, disk.statistics().indexBytes);
      };
      objects.onRequest = look;
      return { bucket, disk, seen, look };
    }

    it.each([
      ['by one command', (disk: S3Disk) => disk.unmap(0, size)],
      [
        'by many',
        async (disk: S3Disk) => {
          for (let at = 0; at < size; at += 128 * KiB) await disk.unmap(at, 128 * KiB);
        },
      ],
      [
        'by zeros that are written',
        async (disk: S3Disk) => {
          for (let at = 0; at < size; at += MiB) await write(disk, at, Buffer.alloc(MiB));
        },
      ],
      ['by shrinking', (disk: S3Disk) => disk.resize(MiB).then(() => disk.unmap(0, MiB))],
    ])('%s, it keeps its memory within bounds and rewrites nothing', async (_, discard) => {
      const { bucket, disk, seen, look } = await full();
      expect(bucket.keys(`${homeIn(bucket)}/c/`).length).toBe(size / (16 * KiB));
      bucket.puts = [];
      await discard(disk);
      look();
      expect(seen.most).toBeGreaterThan(indexLimit);
      expect(seen.most).toBeLessThan(bound);
      const { gets } = disk.statistics();
      await disk.checkpoint();
      expect((await readAll(disk)).every((byte) => byte === 0)).toBe(true);
      expect(bucket.puts.filter((key) => key.startsWith(`${homeIn(bucket)}/c/`))).toEqual([]);
      expect(bucket.keys(`${homeIn(bucket)}/c/`)).toEqual([]);
      expect(disk.statistics().gets - gets).toBeLessThan(20);
      await disk.close();
    });

    it('while the bucket doesn’t answer, it waits rather than grow', async () => {
      const { bucket, disk, seen, look } = await full();
      bucket.fate = (operation) => (operation === 'put' ? 'hang' : 'good');
      let done = 0;
      const discarding = (async () => {
        for (; done < size; done += 128 * KiB) await disk.unmap(done, 128 * KiB);
      })();
      for (let turn = 0; turn < 3000; turn++) await new Promise((resolve) => setImmediate(resolve));
      look();
      expect(done).toBeLessThan(size);
      expect(seen.most).toBeLessThan(bound);
      const closing = disk.close({ discard: true });
      await expect(discarding).rejects.toThrow();
      await closing;
    });
  });

  it('writes little for little: one small object a flush, however random the writes', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect(), { size: 64 * MiB, chunkSize: MiB, frameSize: 64 * KiB });
    const disk = await open(bucket.connect(), {
      logLimit: 512 * MiB,
      segmentSize: 4 * MiB,
      dirtyLimit: 8 * MiB,
    });
    const before = disk.statistics();
    for (let i = 0; i < 100; i++)
      await write(disk, ((i * 37) % 4096) * 4096 * 4, Buffer.alloc(4096, i + 1));
    await disk.flush();
    const after = disk.statistics();
    expect(after.puts - before.puts).toBe(1);
    expect(after.bytesWritten - before.bytesWritten).toBeLessThan(100 * 4096 * 1.01);
    await disk.close();
  });

  it('copies thin data to the end of the log rather than rewrite chunks for it', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect(), { size: 64 * MiB, chunkSize: 128 * KiB, frameSize: 16 * KiB });
    const disk = await open(bucket.connect());
    const model = Buffer.alloc(64 * MiB);
    for (let i = 0; i < 300; i++) {
      // Much in a few chunks, a little in many.
      const place = i % 10 === 0 ? 32 * MiB + i * 128 * KiB * 0.5 : (i % 64) * 4096;
      const bytes = Buffer.alloc(4096, 1 + (i % 250));
      await write(disk, place, bytes);
      bytes.copy(model, place);
    }
    await disk.flush();
    await expect.poll(() => disk.statistics().bytesRelocated).toBeGreaterThan(0);
    expect((await readAll(disk)).equals(model)).toBe(true);
    await disk.close();
    const again = await open(bucket.connect());
    expect((await readAll(again)).equals(model)).toBe(true);
    await again.close();
  });

  it('keeps memory within its bounds', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect(), { size: 32 * MiB });
    const disk = await open(bucket.connect());
    for (let i = 0; i < 32 * 64; i++)
      await write(disk, i * 16 * KiB, Buffer.alloc(4096, 1 + (i % 255)));
    await disk.flush();
    await readAll(disk);
    const { cacheBytes, mapBytes, logBytesInMemory, logBytes } = disk.statistics();
    expect(cacheBytes).toBeLessThanOrEqual(32 * KiB);
    // The one leaf in use may be larger than the bound.
    expect(mapBytes).toBeLessThanOrEqual(4 * KiB + 256 * 64 + 1024);
    expect(logBytesInMemory).toBeLessThanOrEqual(64 * KiB);
    expect(logBytes).toBeLessThanOrEqual(2 * 128 * KiB + 64 * KiB);
    await disk.close();
  });

  it('without a write cache answers writes when they are in the bucket', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const client = bucket.connect();
    const disk = await open(client, { writeCache: false });
    await write(disk, 0, Buffer.alloc(4096, 1));
    await disk.writeSame(4096, 8192, Buffer.alloc(4096, 2));
    await disk.unmap(4096, 4096);
    client.kill(0);
    const again = await open(bucket.connect());
    const seen = await readAll(again, 0, 12288);
    expect([seen[0], seen[4096], seen[8192]]).toEqual([1, 0, 2]);
    await again.close();
  });

  it('sends what is written without being asked, after a while', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const client = bucket.connect();
    const disk = await open(client, { writeBackMs: 2000 });
    await write(disk, 0, Buffer.alloc(4096, 1));
    await expect.poll(() => disk.statistics().dirtyBytes).toBe(0);
    client.kill(0);
    const again = await open(bucket.connect());
    expect((await readAll(again, 0, 4096))[0]).toBe(1);
    await again.close();
  });

  it('sends it also when there is always something new', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    let time = 0;
    const clock = { ...quickClock, now: () => time };
    const options = { writeBackMs: 2000, clock, dirtyLimit: 16 * MiB, segmentSize: 8 * MiB };
    const disk = await open(bucket.connect(), options);
    const sent = () => bucket.keys(`${homeIn(bucket)}/s/`).length;
    const before = sent();
    // One block a second, in the time of the disk; its own looks come as often as they like.
    await expect
      .poll(
        async () => {
          time += 1000;
          await write(disk, 0, Buffer.alloc(4096, 1));
          return sent();
        },
        { interval: 5 },
      )
      .toBeGreaterThan(before + 2);
    await disk.close();
  });

  it('shares its memory between what was read and what was written', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const cacheSize = 256 * KiB;
    const options = { cacheSize, logLimit: 8 * MiB, readAhead: false };
    const disk = await open(bucket.connect(), options);
    for (let at = 0; at < MiB; at += 32 * KiB) await write(disk, at, Buffer.alloc(32 * KiB, 1));
    await disk.flush();
    const { logBytesInMemory } = disk.statistics();
    expect(logBytesInMemory).toBeGreaterThan(cacheSize / 4);
    await disk.checkpoint();
    for (let at = 0; at < MiB; at += 16 * KiB) await readAll(disk, at, 16 * KiB);
    // Nothing written is needed any more: all of it is for reading, what is on its way from the bucket included, and stays
    // until something is written.
    expect(disk.statistics().cacheBytes).toBeLessThanOrEqual(cacheSize - 4 * KiB);
    expect(disk.statistics().cacheBytes).toBeGreaterThanOrEqual(cacheSize - 32 * KiB);
    for (let at = 0; at < MiB; at += 32 * KiB) {
      await write(disk, at, Buffer.alloc(32 * KiB, 2), true);
      const { cacheBytes, logBytesInMemory, dirtyBytes } = disk.statistics();
      expect(cacheBytes + logBytesInMemory - dirtyBytes).toBeLessThanOrEqual(cacheSize);
    }
    await disk.close();
  });

  it('reads ahead for sequential readers, a chunk a request', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect(), { size: 8 * MiB, chunkSize: MiB, frameSize: 64 * KiB });
    const disk = await open(bucket.connect(), { segmentSize: MiB, dirtyLimit: 4 * MiB });
    for (let at = 0; at < 8 * MiB; at += MiB)
      await write(disk, at, Buffer.alloc(MiB, 1 + at / MiB));
    await disk.checkpoint();
    await disk.close();
    const reader = await open(bucket.connect(), {
      mode: 'follow',
      cacheSize: 4 * MiB,
      segmentSize: MiB,
      dirtyLimit: MiB,
    });
    const before = reader.statistics().gets;
    for (let at = 0; at < 8 * MiB; at += 16 * KiB) {
      expect((await readAll(reader, at, 16 * KiB))[0]).toBe(1 + Math.floor(at / MiB));
    }
    expect(reader.statistics().gets - before).toBeLessThanOrEqual(8 * 3);
    await reader.close();
  });
});

describe('encryption', () => {
  it('leaves nothing readable in the bucket, and needs the right key', async () => {
    const bucket = new MemoryBucket();
    const key = (): Buffer => Buffer.alloc(32, 9);
    await create(bucket.connect(), { key });
    const disk = await open(bucket.connect(), { key });
    for (let i = 0; i < 32; i++) await write(disk, i * 4096, Buffer.alloc(4096, 'plain text'));
    await disk.checkpoint();
    await write(disk, 0, Buffer.alloc(4096, 'plain text'), true);
    await disk.close();
    for (const { body } of bucket.objects.values()) expect(body.includes('plain text')).toBe(false);
    expect(await causeOf(() => open(bucket.connect()))).toBe('ERR_TCMU_S3_KEY');
    const wrong = { key: () => Buffer.alloc(32, 8) };
    expect(await causeOf(() => open(bucket.connect(), wrong))).toBe('ERR_TCMU_S3_KEY');
  });

  it('goes on under a new key, old data included', async () => {
    const bucket = new MemoryBucket();
    const [old, fresh] = [9, 10].map((fill) => () => Buffer.alloc(32, fill));
    const record = await create(bucket.connect(), { key: old });
    const disk = await open(bucket.connect(), { key: old });
    await write(disk, 0, Buffer.alloc(4096, 1));
    await disk.checkpoint();
    await write(disk, 8192, Buffer.alloc(4096, 2));
    await disk.close();
    const requests = requestsOf(bucket.connect());
    await rotateKeys(requests, PREFIX, record, old as () => Buffer, fresh as () => Buffer);
    expect(await causeOf(() => open(bucket.connect(), { key: old }))).toBe('ERR_TCMU_S3_KEY');
    const again = await open(bucket.connect(), { key: fresh });
    await write(again, 4096, Buffer.alloc(4096, 3));
    await again.checkpoint();
    const seen = await readAll(again, 0, 12288);
    expect([seen[0], seen[4096], seen[8192]]).toEqual([1, 3, 2]);
    await again.close();
  });
});

describe('compression', () => {
  it('saves where it pays and leaves the rest as it is', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect(), { compression: 'deflate' });
    const disk = await open(bucket.connect());
    const before = disk.statistics().bytesWritten;
    await write(disk, 0, Buffer.alloc(32 * KiB, 'again and again '), true);
    const dense = disk.statistics().bytesWritten;
    expect(dense - before).toBeLessThan(4 * KiB);
    const noise = Buffer.alloc(32 * KiB);
    for (let i = 0, x = 1; i < noise.length; i++) {
      x = (x * 48271) % 2147483647;
      noise[i] = x >> 8;
    }
    await write(disk, 0, noise, true);
    expect(disk.statistics().bytesWritten - dense).toBeGreaterThan(32 * KiB);
    expect((await readAll(disk, 0, 32 * KiB)).equals(noise)).toBe(true);
    await disk.close();
  });
});

it('a write of many segments goes through', async () => {
  const bucket = new MemoryBucket();
  await create(bucket.connect());
  const disk = await open(bucket.connect());
  const bytes = Buffer.alloc(MiB);
  for (let i = 0; i < bytes.length; i += 4) bytes.writeUInt32LE(i + 1, i);
  await disk.write(0, new MemoryDataOut(bytes), request(true));
  expect((await readAll(disk)).equals(bytes)).toBe(true);
  await disk.close();
});

describe('Zstandard', () => {
  it('is used where Node.js has it, and refused by name where not', async () => {
    const bucket = new MemoryBucket();
    const objects = bucket.connect();
    if (hasZstd) {
      await create(objects, { compression: 'zstd' });
      const disk = await open(objects);
      const bytes = Buffer.alloc(64 * KiB, 'easily made smaller ');
      await write(disk, 0, bytes, true);
      await disk.checkpoint();
      await disk.close();
      let stored = 0;
      for (const [key, { body }] of bucket.objects) if (key.includes('/c/')) stored += body.length;
      expect(stored).toBeLessThan(8 * KiB);
      const again = await open(objects);
      expect((await readAll(again, 0, bytes.length)).equals(bytes)).toBe(true);
      await again.close();
      return;
    }
    const refused = await failure(() => create(objects, { compression: 'zstd' }));
    expect(refused.message).toMatch(/22\.15/);
    expect(bucket.keys()).toEqual([]);
    // A disk that another Node.js has written: told at the object, and nothing is served.
    const codec = new BlobCodec('id', 'none');
    const identity = {
      kind: 2,
      number: 0,
      n: 0,
      epoch: 1,
      writer: '0'.repeat(16),
      keyId: 0,
    } as const;
    const stored = Buffer.from('28b52ffd', 'hex');
    const entry = { stored: (stored.length | (2 << 30)) >>> 0, crc: crc32(stored), raw: 4096 };
    const unread = await failure(() => codec.decodeFrame('c/0', identity, 'id', 0, entry, stored));
    expect(unread).toMatchObject({ code: 'ERR_TCMU_S3_FORMAT' });
    expect(unread.message).toMatch(/c\/0.*22\.15/);
  });
});
