// SPDX-License-Identifier: Apache-2.0
/** What is on this host: the journal, which makes flushes cheap, and the cache file, which may lose anything. */
import {
  closeSync,
  existsSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { crc32 } from 'node:zlib';
import { afterAll, describe, expect, it } from 'vitest';
import { FileCache } from '../src/engine/file-cache.js';
import type { OpenOptions, S3Disk } from '../src/s3-disk.js';
import {
  causeOf,
  create,
  KiB,
  MiB,
  Model,
  open,
  quickClock,
  readAll,
  write,
} from './support/disk.js';
import { type Fate, MemoryBucket, type MemoryClient } from './support/memory-objects.js';
import { randomNumbers } from './support/random.js';

const dir = mkdtempSync(join(tmpdir(), 'tcmu-s3-local-'));
afterAll(() => rmSync(dir, { recursive: true, force: true }));
const block = (value: number): Buffer => Buffer.alloc(4 * KiB, value);

type Kind = 'journal' | 'restartFile';

/** Opens until it works, by clients that may be killed over it. */
async function openAfterCrashes(
  bucket: MemoryBucket,
  options: OpenOptions,
  random: () => number,
): Promise<{ client: MemoryClient; disk: S3Disk }> {
  for (;;) {
    const client = bucket.connect(Math.floor(random() * 1e6));
    let left = random() < 0.5 ? Number.POSITIVE_INFINITY : 5 + Math.floor(random() * 40);
    let hasDied = (): void => {};
    const death = new Promise<undefined>((resolve) => {
      hasDied = () => resolve(undefined);
    });
    client.onRequest = () => {
      if (--left > 0) return;
      client.kill(random());
      hasDied();
    };
    const disk = await Promise.race([open(client, options), death]);
    if (disk === undefined) continue;
    client.onRequest = undefined;
    return { client, disk };
  }
}

describe.each<Kind>(['journal', 'restartFile'])('the local file (%s)', (kind) => {
  it.each([
    [1, undefined],
    [4, () => Buffer.alloc(32, 1)],
  ])(
    'keeps what was acknowledged through every crash of the process (seed %i)',
    async (seed, key) => {
      const random = randomNumbers(seed);
      const path = join(dir, `${kind}-${seed}`);
      const options = { key, [kind]: path, dirtyLimit: seed % 2 === 0 ? 64 * KiB : 32 * KiB };
      const bucket = new MemoryBucket();
      await create(bucket.connect(), { key });
      const model = new Model(MiB);
      let turned = false;
      for (let life = 0; life < 12; life++) {
        const { client, disk } = await openAfterCrashes(bucket, options, random);
        const survived = model.recover(await readAll(disk));
        if (survived === undefined) expect.fail(`life ${life}: no state that it may be in`);
        let left = 5 + Math.floor(random() * 60);
        client.onRequest = () => {
          if (--left === 0) client.kill(random());
        };
        for (let i = 0; i < 60; i++) {
          const position = Math.floor(random() * 256) * 4096;
          let change: Promise<void>;
          if (random() < 0.15) {
            model.note({ kind: 'zero', position, length: 4096 });
            change = disk.unmap(position, 4096);
          } else {
            const bytes = block(1 + Math.floor(random() * 255));
            model.note({ kind: 'data', position, bytes });
            change = write(disk, position, bytes);
          }
          // Without the bucket the buffer fills up, and then nothing goes on.
          const full = new Promise((resolve) => setTimeout(resolve, 200, 'full'));
          if ((await Promise.race([change, full])) === 'full') break;
          // Acknowledged is enough for a process that dies; neither waits for the bucket.
          model.certain(model.changes);
          if (kind === 'journal' && random() < 0.3) await disk.flush();
          turned ||= statSync(`${path}.2`).size > 0;
        }
        client.kill(random());
        for (let i = 0; i < 8; i++) await new Promise((resolve) => setImmediate(resolve));
        for (const file of [path, `${path}.2`]) {
          expect(statSync(file).mode & 0o077).toBe(0);
          if (key !== undefined) expect(readFileSync(file).includes(block(7))).toBe(false);
        }
      }
      expect(turned).toBe(true);
    },
    60_000,
  );

  it.each([
    [
      'more notes than it takes data',
      64 * KiB,
      async (disk: S3Disk, model: Buffer) => {
        for (const place of [0, 1]) {
          await write(disk, place * 4096, block(7));
          block(7).copy(model, place * 4096);
        }
        // A note is three times as long here as in the log: both files have their turn, and there is no third.
        for (let i = 0; i < 2600; i++) await disk.unmap((2 + 2 * (i % 100)) * 4096, 4096);
      },
    ],
    [
      'a write in pieces, some of which arrive before the last one is noted',
      80 * KiB,
      async (disk: S3Disk, model: Buffer, goOn: () => void) => {
        const bytes = Buffer.alloc(160 * KiB, 9);
        const writing = write(disk, 64 * KiB, bytes);
        goOn();
        await writing;
        bytes.copy(model, 64 * KiB);
      },
    ],
  ])('has all of %s', async (what, dirtyLimit, change) => {
    const path = join(dir, `${kind}-${what.slice(0, 8)}`);
    const options = { [kind]: path, dirtyLimit, assumeDead: true };
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const client = bucket.connect();
    const disk = await open(client, options);
    const model = Buffer.alloc(MiB);
    let arriving = 0;
    bucket.fate = async (operation): Promise<Fate> => {
      while (operation === 'put' && arriving-- <= 0) {
        arriving = 0;
        await new Promise((resolve) => setTimeout(resolve, 5));
        if (client.dead) break;
      }
      return 'good';
    };
    await change(disk, model, () => {
      arriving = 3;
    });
    client.kill(0);
    const again = await open(bucket.connect(2), options);
    expect((await readAll(again)).equals(model)).toBe(true);
    await again.close();
  });

  it('is not touched any more by a process that was replaced and lives on', async () => {
    const path = join(dir, `${kind}-replaced`);
    const options = { [kind]: path };
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const first = await open(bucket.connect(1), options);
    await write(first, 0, block(1));
    const client = bucket.connect(2);
    const second = await open(client, options);
    client.kill(0);
    await write(second, 4096, block(2));
    for (let i = 0; i < 20; i++) await write(first, i * 4096, block(99));
    await write(second, 8192, block(3));
    const third = await open(bucket.connect(3), options);
    const seen = await readAll(third, 0, 12288);
    expect([seen[0], seen[4096], seen[8192]]).toEqual([1, 2, 3]);
    await first.close({ discard: true });
    expect(statSync(path).size).toBeGreaterThan(0);
    await third.close();
    expect(readdirSync(dir).filter((name) => name.startsWith(basename(path)))).toEqual([]);
  });
});

describe('a restart file', () => {
  it('leaves a flush to the bucket', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const disk = await open(bucket.connect(1), { restartFile: join(dir, 'flush') });
    await write(disk, 0, block(1));
    await disk.flush();
    // Without that file.
    const other = await open(bucket.connect(2));
    expect((await readAll(other, 0, 4096)).equals(block(1))).toBe(true);
    await other.close();
    await disk.close();
  });

  it('is applied also by a server without a write cache, which keeps none', async () => {
    const restartFile = join(dir, 'without');
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const client = bucket.connect(1);
    const disk = await open(client, { restartFile });
    client.kill(0);
    await write(disk, 0, block(1));
    const other = await open(bucket.connect(2), { restartFile, writeCache: false });
    expect((await readAll(other, 0, 4096)).equals(block(1))).toBe(true);
    expect(existsSync(restartFile)).toBe(false);
    await other.close();
  });

  it('that can’t be written makes every write wait for the bucket', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const messages: string[] = [];
    const restartFile = join(dir, 'full');
    const disk = await open(bucket.connect(1), {
      restartFile,
      onLog: (_, message) => messages.push(message),
    });
    const journalFd = Number(
      readdirSync('/proc/self/fd').find((fd) => {
        try {
          return readlinkSync(`/proc/self/fd/${fd}`) === restartFile;
        } catch {
          return false;
        }
      }),
    );
    closeSync(journalFd);
    // It gets the lowest number that is free: no space left on device, from now on.
    expect(openSync('/dev/full', 'r+')).toBe(journalFd);
    await write(disk, 0, block(1));
    expect(messages.join()).toContain('everything waits for the bucket');
    const other = await open(bucket.connect(2));
    expect((await readAll(other, 0, 4096)).equals(block(1))).toBe(true);
    await other.close();
    await disk.close();
  });
});

describe('the journal', () => {
  it('is refused when another writer has been there, and thrown away by order only', async () => {
    const journal = join(dir, 'stale');
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const client = bucket.connect();
    const disk = await open(client, { journal });
    client.kill(0);
    await write(disk, 0, block(1));
    await disk.flush();
    const other = await open(bucket.connect());
    await write(other, 0, block(2), true);
    await other.close();
    const epochs = (): number => bucket.keys().filter((key) => key.includes('/s/')).length;
    const before = epochs();
    expect(await causeOf(() => open(bucket.connect(), { journal }))).toBe('ERR_TCMU_S3_JOURNAL');
    expect(epochs()).toBe(before);
    const again = await open(bucket.connect(), { journal, discardJournal: true });
    expect((await readAll(again, 0, 4096)).equals(block(2))).toBe(true);
    await again.close();
  });

  it('is refused, and nobody is ended, while another writer is faster than it can be read', async () => {
    const journal = join(dir, 'busy');
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const client = bucket.connect(1);
    const first = await open(client, { journal });
    await write(first, 0, Buffer.alloc(4096, 1));
    client.kill(0);
    first.close({ discard: true }).catch(() => {});
    const other = await open(bucket.connect(2), { logLimit: 1e9 });
    let working = false;
    let value = 0;
    bucket.fate = async (operation, key): Promise<Fate> => {
      if (working || operation !== 'list' || !key.includes('/m/')) return 'good';
      working = true;
      await write(other, 4096, Buffer.alloc(4096, ++value));
      await other.checkpoint();
      working = false;
      return 'good';
    };
    const again = open(bucket.connect(3), { journal });
    expect(await causeOf(() => again)).toBe('ERR_TCMU_S3_JOURNAL');
    expect(value).toBeGreaterThan(10);
    const look = open(bucket.connect(4), { mode: 'follow' });
    expect(await causeOf(() => look)).toBe('ERR_TCMU_S3_IN_USE');
    bucket.fate = () => 'good';
    await write(other, 0, Buffer.alloc(4096, 9), true);
    await other.close();
  });

  it('ends at an entry that is cut, and is no place for other files', async () => {
    const journal = join(dir, 'cut');
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const client = bucket.connect();
    const disk = await open(client, { journal });
    client.kill(0);
    for (let i = 0; i < 3; i++) {
      await write(disk, i * 4096, block(i + 1));
      await disk.flush();
    }
    truncateSync(journal, statSync(journal).size - 1);
    const again = await open(bucket.connect(), { journal });
    const seen = await readAll(again, 0, 12288);
    expect([seen[0], seen[4096], seen[8192]]).toEqual([1, 2, 0]);
    await again.close();
    writeFileSync(join(dir, 'letter'), 'Dear Sir,\n');
    const wrong = { journal: join(dir, 'letter') };
    expect(await causeOf(() => open(bucket.connect(), wrong))).toBe('ERR_TCMU_S3_JOURNAL');
    expect(readFileSync(join(dir, 'letter'), 'utf8')).toBe('Dear Sir,\n');
  });
});

describe('the cache file', () => {
  it.each([undefined, () => Buffer.alloc(32, 1)])(
    'spares requests after a restart, and is not believed when it is wrong (key: %s)',
    async (key) => {
      const cacheFile = join(dir, `cache-${key === undefined}`);
      const bucket = new MemoryBucket();
      await create(bucket.connect(), { key });
      const disk = await open(bucket.connect(), { key });
      for (let i = 0; i < 256; i++) await write(disk, i * 4096, Buffer.alloc(4096, `block ${i} `));
      await disk.checkpoint();
      const expected = await readAll(disk);
      await disk.close();
      const options = { mode: 'follow', key, cacheFile, cacheFileSize: 4 * MiB } as const;
      /** With a restart after each `part` bytes. */
      const read = async (part: number): Promise<{ gets: number; hits: number }> => {
        const sum = { gets: 0, hits: 0 };
        for (let begin = 0; begin < MiB; begin += part) {
          const reader = await open(bucket.connect(), { ...options, readAhead: false });
          const before = reader.statistics().gets;
          for (let at = begin; at < begin + part; at += 64 * KiB) {
            const bytes = await readAll(reader, at, 64 * KiB);
            expect(bytes.equals(expected.subarray(at, at + 64 * KiB))).toBe(true);
          }
          const { gets, cacheFileHits } = reader.statistics();
          await reader.close();
          sum.gets += gets - before;
          sum.hits += cacheFileHits;
        }
        return sum;
      };
      // What comes faster than the file takes it is left out: no more at a time than it takes, and its end waits for them.
      const cold = await read(32 * 4 * KiB);
      const warm = await read(MiB);
      expect(cold.hits).toBe(0);
      expect(warm.hits).toBeGreaterThan(128);
      expect(warm.gets).toBeLessThan(cold.gets / 4);
      const file = readFileSync(cacheFile);
      if (key !== undefined) expect(file.includes('block 7 ')).toBe(false);
      for (let at = 100; at < file.length; at += 3000) file[at] = (file[at] as number) ^ 1;
      writeFileSync(cacheFile, file);
      await read(MiB);
      truncateSync(cacheFile, 1000);
      await read(MiB);
    },
  );

  it('leaves out what comes faster than the file takes it, and nothing else', async () => {
    const file = join(dir, 'cache-slow');
    const frames = Array.from({ length: 100 }, (_, i) => Buffer.alloc(4096, i + 1));
    const cache = FileCache.open(file, 4096, 16 * MiB);
    // At once: no write is done before the last one is asked for.
    for (const [i, frame] of frames.entries()) cache.put('object', i, frame, crc32(frame));
    await cache.close();
    const again = FileCache.open(file, 4096, 16 * MiB);
    const kept: number[] = [];
    for (const [i, frame] of frames.entries()) {
      const stored = await again.get('object', i, frame.length, crc32(frame));
      if (stored !== undefined && stored.equals(frame)) kept.push(i);
    }
    await again.close();
    expect(kept).toEqual(Array.from({ length: 32 }, (_, i) => i));
  });
});

describe('a journal whose writer lives when another one opens the disk with it', () => {
  // Nobody's lease ends by itself.
  const clock = { ...quickClock, now: () => 1e6, wall: () => 2e9 };
  let files = 0;

  /** @param note what the first one does as the second one's claim is on its way, or has arrived */
  async function takenOver(
    begins: boolean,
    when: 'before' | 'after',
    note: (first: S3Disk) => Promise<void>,
  ) {
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const options = { journal: join(dir, `living-${files++}`), leaseMs: 10_000, clock };
    const first = await open(bucket.connect(1), options);
    if (begins) {
      await write(first, 0, block(1));
      await first.flush();
    }
    let isNoted = false;
    const onPut = async (operation: string, key: string): Promise<void> => {
      if (isNoted || operation !== 'put' || !key.includes('/s/')) return;
      isNoted = true;
      await note(first);
    };
    if (when === 'after') bucket.after = onPut;
    else {
      bucket.fate = async (operation, key): Promise<Fate> => {
        await onPut(operation, key);
        return 'good';
      };
    }
    return { bucket, options, first };
  }

  const noteAndFlush = async (first: S3Disk): Promise<void> => {
    await write(first, 4096, block(2));
    await first.flush();
  };

  const all = [
    [true, 'before'],
    [true, 'after'],
    [false, 'before'],
    [false, 'after'],
  ] as const;

  it.each(all)('loses nothing that it flushed (before: %j, %s the claim)', async (begins, when) => {
    const { bucket, options, first } = await takenOver(begins, when, noteAndFlush);
    const second = await open(bucket.connect(2), options);
    expect((await readAll(second, 4096, 4096)).equals(block(2))).toBe(true);
    expect((await readAll(second, 0, 4096)).equals(block(begins ? 1 : 0))).toBe(true);
    await first.close({ discard: true });
    await second.close();
  });

  it.each(all)(
    'nor when that one dies over it (before: %j, %s the claim)',
    async (begins, when) => {
      const dying = { kill: (): void => {} };
      const { bucket, options, first } = await takenOver(begins, when, async (disk) => {
        await noteAndFlush(disk);
        dying.kill();
      });
      const second = bucket.connect(2);
      const died = new Promise<void>((resolve) => {
        dying.kill = () => {
          second.kill(1);
          resolve();
        };
      });
      open(second, options).catch(() => {});
      await died;
      // What it had sent arrives.
      for (let turn = 0; turn < 8; turn++) await new Promise((resolve) => setImmediate(resolve));
      const third = await open(bucket.connect(3), options);
      expect((await readAll(third, 4096, 4096)).equals(block(2))).toBe(true);
      await first.close({ discard: true });
      await third.close();
    },
  );

  it.each([true, false])(
    'is not taken from whoever came last, by one that was slower (notes: %j)',
    async (begins) => {
      const { bucket, options, first } = await takenOver(false, 'before', async () => {});
      let goOn = (): void => {};
      const wait = new Promise<void>((resolve) => {
        goOn = resolve;
      });
      let isWaiting = false;
      // It has claimed the disk, and waits for the first one's lease, for long.
      const slowClock = {
        ...clock,
        sleep: async (ms: number, signal?: AbortSignal): Promise<void> => {
          if (!Number.isFinite(ms) || ms < 5000) return clock.sleep(ms, signal);
          isWaiting = true;
          await wait;
        },
      };
      const slow = causeOf(() => open(bucket.connect(2), { ...options, clock: slowClock }));
      await expect.poll(() => isWaiting).toBe(true);
      const client = bucket.connect(3);
      const last = await open(client, options);
      if (begins) await noteAndFlush(last);
      goOn();
      expect(await slow).toBe('ERR_TCMU_S3_JOURNAL');
      await noteAndFlush(last);
      await write(last, 8192, block(3));
      await last.flush();
      client.kill();
      const again = await open(bucket.connect(4), { ...options, assumeDead: true });
      const found = await readAll(again, 4096, 8192);
      expect(found.equals(Buffer.concat([block(2), block(3)]))).toBe(true);
      await first.close({ discard: true });
      await again.close();
    },
  );
});
