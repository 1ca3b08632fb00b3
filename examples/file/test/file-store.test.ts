// SPDX-License-Identifier: Apache-2.0
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  chmodSync,
  closeSync,
  existsSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  statSync,
  truncateSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { BackingFile, FileError, TcmuError } from 'tcmu';
import { SenseError } from 'tcmu/scsi';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { FileStore } from '../src/file-store.js';
import { failure, folders, MiB, open, readAll, request, scratch, write } from './util.js';

const WRITE_ERROR = { key: 3, asc: 0x0c, ascq: 0 };
const READ_ERROR = { key: 3, asc: 0x11, ascq: 0 };

const allocated = (path: string) => statSync(path).blocks * 512;
const eio = (operation: string) =>
  new FileError('ERR_TCMU_IO', `${operation}: EIO`, { operation, errno: 'EIO' });
const unsupported = new FileError('ERR_TCMU_IO', 'EOPNOTSUPP', { errno: 'EOPNOTSUPP' });

afterEach(() => {
  vi.restoreAllMocks();
});

describe('space', () => {
  it('is what the file takes, and what is left for it', async () => {
    const { store } = await open(join(scratch(), 'space'), { size: 8 * MiB });
    const before = await store.space?.();
    expect(before?.used).toBe(0);
    expect(before?.available).toBeGreaterThan(0);
    expect(before?.available).toBeLessThanOrEqual(8 * MiB);
    await write(store, 0, Buffer.alloc(MiB, 1));
    await store.flush();
    expect((await store.space?.())?.used).toBe(MiB);
    await store.close();
  });

  it('is not told of a disk that gives nothing back', async () => {
    const { store } = await open(join(scratch(), 'thick'), { size: MiB, thick: true });
    expect([store.unmap, store.space]).toEqual([undefined, undefined]);
    await store.close();
  });
});

describe('opening', () => {
  const dir = scratch();
  let count = 0;
  const fresh = () => join(dir, `open-${count++}`);

  it('creates a file without taking space', async () => {
    const path = fresh();
    const { store } = await open(path, { size: 64 * MiB });
    expect(store.size).toBe(64 * MiB);
    await store.close();
    expect(statSync(path).size).toBe(64 * MiB);
    expect(allocated(path)).toBe(0);
    expect(statSync(path).mode & 0o777).toBe(0o600);
  });

  it('serves a file as it is, and makes it longer when asked', async () => {
    const path = fresh();
    writeFileSync(path, Buffer.alloc(8192, 7));
    const first = await open(path);
    expect(first.store.size).toBe(8192);
    await first.store.close();
    const second = await open(path, { size: 16384 });
    expect(await readAll(second.store)).toEqual(
      Buffer.concat([Buffer.alloc(8192, 7), Buffer.alloc(8192)]),
    );
    await second.store.close();
  });

  it('cuts a file only when shrinking is allowed by name', async () => {
    const path = fresh();
    writeFileSync(path, Buffer.alloc(8192, 7));
    const error = await failure(() => open(path, { size: 4096 }));
    expect(error).toMatchObject({ code: 'ERR_TCMU_INVALID_ARGUMENT' });
    expect(error.message).toMatch(/8192 bytes into 4096 would cut data off/);
    expect(statSync(path).size).toBe(8192);
    const { store } = await open(path, { size: 4096, allowShrink: true });
    expect(store.size).toBe(4096);
    await store.close();
    expect(statSync(path).size).toBe(4096);
  });

  it('says what is missing when there is no file', async () => {
    const path = fresh();
    expect(await failure(() => open(path))).toMatchObject({ errno: 'ENOENT', path });
    // A read-only disk of zeros helps nobody.
    expect(await failure(() => open(path, { size: 4096, readOnly: true }))).toMatchObject({
      errno: 'ENOENT',
    });
    expect(await failure(() => open(join(path, 'x', 'y'), { size: 4096 }))).toMatchObject({
      code: 'ERR_TCMU_IO',
      errno: 'ENOENT',
    });
    expect(existsSync(path)).toBe(false);
  });

  it('refuses what is neither file nor block device, and does not hang on it', async () => {
    const fifo = fresh();
    execFileSync('mkfifo', [fifo]);
    for (const path of [fifo, dir, '/dev/null']) {
      for (const readOnly of [true, false]) {
        const error = await failure(() => open(path, { readOnly }));
        expect(TcmuError.is(error)).toBe(true);
        expect(error.message).toMatch(/neither a file nor a block device|EISDIR/);
      }
    }
  });

  it('refuses sizes that make no disk, before anything is created', async () => {
    const path = fresh();
    for (const [options, message] of [
      [{ size: 0 }, /empty disk/],
      [{ size: 1000 }, /no whole number of blocks of 512/],
      [{ size: 4096 + 512, blockSize: 4096 }, /blocks of 4096/],
      [{ size: 2 ** 53 }, /no whole number/],
      [{ size: 4096, blockSize: 1000 }, /use 512, 1024, 2048 or 4096/],
    ] as const) {
      const error = await failure(() => open(path, options));
      expect(error).toMatchObject({ code: 'ERR_TCMU_INVALID_ARGUMENT' });
      expect(error.message).toMatch(message);
      expect(existsSync(path)).toBe(false);
    }
  });

  it('refuses a file of a size that makes no disk, and says how to mend it', async () => {
    const path = fresh();
    writeFileSync(path, '');
    expect((await failure(() => open(path))).message).toMatch(/empty disk: give it a size/);
    writeFileSync(path, Buffer.alloc(1000));
    expect((await failure(() => open(path))).message).toMatch(/truncate -s %512/);
    execFileSync('truncate', ['-s', '%512', path]);
    const { store } = await open(path);
    expect(store.size).toBe(1024);
    await store.close();
  });

  it('refuses control characters, which would end up in configfs and logs', async () => {
    for (const path of [`${fresh()}\n`, `${fresh()}\x1b[2J`, `${fresh()}\0`]) {
      const error = await failure(() => open(path, { size: 4096 }));
      expect(error).toMatchObject({ code: 'ERR_TCMU_INVALID_ARGUMENT' });
      expect(error.message).not.toMatch(/[\x00-\x1f]/);
    }
  });

  it('says so when permission is missing', async () => {
    const path = fresh();
    writeFileSync(path, Buffer.alloc(4096));
    chmodSync(path, 0);
    chmodSync(dir, 0o755);
    const root = process.geteuid?.() === 0;
    if (root) process.seteuid?.(65534);
    try {
      const error = await failure(() => open(path));
      expect(error).toMatchObject({ code: 'ERR_TCMU_IO', errno: 'EACCES', path });
      expect(error.message).toMatch(/no permission: check owner and mode/);
    } finally {
      if (root) process.seteuid?.(0);
    }
  });

  it('locks out other servers of the file, in this process and others', async () => {
    const path = fresh();
    const { store } = await open(path, { size: 4096 });
    const error = await failure(() => open(path));
    expect(error).toMatchObject({ code: 'ERR_TCMU_FILE_LOCKED', path });
    expect(await failure(() => open(path, { readOnly: true }))).toMatchObject({
      code: 'ERR_TCMU_FILE_LOCKED',
    });
    const code = `
      import { BackingFile } from 'tcmu';
      const file = await BackingFile.open(${JSON.stringify(path)});
      try { file.lock(); console.log('taken'); } catch (error) { console.log(error.code); }
    `;
    const other = () =>
      execFileSync(process.execPath, ['--input-type=module', '-e', code], { encoding: 'utf8' });
    expect(other().trim()).toBe('ERR_TCMU_FILE_LOCKED');
    await store.close();
    expect(other().trim()).toBe('taken');
  });

  it('is unlocked when its process is killed', async () => {
    const path = fresh();
    writeFileSync(path, Buffer.alloc(4096));
    const code = `
      import { BackingFile } from 'tcmu';
      const file = await BackingFile.open(${JSON.stringify(path)});
      file.lock();
      console.log('locked');
      setInterval(() => {}, 1000);
    `;
    const child = spawn(process.execPath, ['--input-type=module', '-e', code], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    await once(child.stdout, 'data');
    expect(await failure(() => open(path))).toMatchObject({ code: 'ERR_TCMU_FILE_LOCKED' });
    child.kill('SIGKILL');
    await once(child, 'exit');
    const { store } = await open(path);
    await store.close();
  });

  it('lets several read-only servers share a file, but no writer beside them', async () => {
    const path = fresh();
    writeFileSync(path, Buffer.alloc(4096));
    const one = await open(path, { readOnly: true });
    const two = await open(path, { readOnly: true });
    expect(await failure(() => open(path))).toMatchObject({ code: 'ERR_TCMU_FILE_LOCKED' });
    await one.store.close();
    await two.store.close();
  });

  it('leaves nothing behind when it fails half-way', async () => {
    const path = fresh();
    vi.spyOn(BackingFile.prototype, 'truncate').mockRejectedValue(eio('truncate'));
    expect(await failure(() => open(path, { size: 4096 }))).toMatchObject({ errno: 'EIO' });
    expect(existsSync(path)).toBe(false);
    expect(openFiles(path)).toEqual([]);
    // A file that was there before stays.
    writeFileSync(path, 'x');
    expect(await failure(() => open(path, { size: 4096 }))).toMatchObject({ errno: 'EIO' });
    expect(readFileSync(path, 'utf8')).toBe('x');
  });
});

/** This process's descriptors of files in a directory, deleted ones included. */
function openFiles(dir: string): string[] {
  const links: string[] = [];
  for (const fd of readdirSync('/proc/self/fd')) {
    try {
      links.push(readlinkSync(`/proc/self/fd/${fd}`));
    } catch {
      // The one that listed them.
    }
  }
  return links.filter((link) => link.startsWith(dir));
}

it('nothing is copied where the kernel can not, or between other kinds of store', async () => {
  const [one, two] = await Promise.all(
    folders.map((folder) => open(join(scratch(folder), 'file'), { size: MiB })),
  );
  // On different file systems.
  expect(await one?.store.copyFrom?.(two?.store as FileStore, 0, 0, 4096, request())).toBe(0);
  expect(await one?.store.copyFrom?.({ size: MiB } as FileStore, 0, 0, 4096, request())).toBe(0);
  await one?.store.close();
  await two?.store.close();
});

describe.each(folders)('data in %s', (folder) => {
  const dir = scratch(folder);
  let count = 0;
  const fresh = () => join(dir, `data-${count++}`);

  it('is copied from another file, and within one, by the kernel', async () => {
    const { store } = await open(fresh(), { size: 8 * MiB });
    const { store: other } = await open(fresh(), { size: 4 * MiB });
    const bytes = Buffer.from(Array.from({ length: MiB }, (_, i) => (i * 31) & 0xff));
    await write(other, 512, bytes);
    const reads = vi.spyOn(other, 'read');
    expect(await store.copyFrom?.(other, 512, 3 * MiB, MiB, request())).toBe(MiB);
    expect(reads).not.toHaveBeenCalled();
    // Compared by itself: `toEqual` would look at each of a million elements.
    expect(bytes.compare(await readAll(store, 3 * MiB, MiB))).toBe(0);
    expect(await store.copyFrom?.(store, 3 * MiB, 6 * MiB, MiB, request())).toBe(MiB);
    expect(bytes.compare(await readAll(store, 6 * MiB, MiB))).toBe(0);
    // A source that was cut: what is there, in whole blocks.
    truncateSync(other.path, MiB + 100);
    expect(await store.copyFrom?.(other, 0, 0, 2 * MiB, request())).toBe(MiB);
    await store.flush();
    await store.close();
    await other.close();
  });

  it('is not copied past the end of a disk, nor to one for reading', async () => {
    const path = fresh();
    const { store } = await open(path, { size: MiB });
    await expect(
      failure(async () => store.copyFrom?.(store, 0, MiB, 4096, request())),
    ).resolves.toMatchObject(WRITE_ERROR);
    await store.close();
  });

  it('is where the file has it', async () => {
    const path = fresh();
    const { store } = await open(path, { size: 8 * MiB });
    const bytes = Buffer.from(Array.from({ length: 12_288 }, (_, i) => (i * 7) & 0xff));
    await write(store, 3 * MiB + 512, bytes);
    expect(await readAll(store, 3 * MiB + 512, bytes.length)).toEqual(bytes);
    expect((await readAll(store, 0, 3 * MiB + 512)).every((byte) => byte === 0)).toBe(true);
    await store.flush();
    await store.close();
    expect(readFileSync(path).subarray(3 * MiB + 512, 3 * MiB + 512 + bytes.length)).toEqual(bytes);
  });

  it('answers cached reads at once, without a promise', async () => {
    const { store } = await open(fresh(), { size: MiB });
    await write(store, 0, Buffer.alloc(4096, 1));
    expect(store.read(0, new MemoryDataIn(new Uint8Array(4096)))).toBeUndefined();
    await store.close();
  });

  it('gives unmapped ranges back to the file system', async () => {
    const path = fresh();
    const { store } = await open(path, { size: 8 * MiB });
    await write(store, 0, Buffer.alloc(8 * MiB, 5));
    await store.flush();
    expect(allocated(path)).toBeGreaterThanOrEqual(8 * MiB);
    await store.unmap?.(MiB, 4 * MiB, request());
    await store.flush();
    expect(allocated(path)).toBeLessThanOrEqual(4 * MiB + 65536);
    const bytes = await readAll(store);
    expect(bytes.subarray(0, MiB).every((byte) => byte === 5)).toBe(true);
    expect(bytes.subarray(MiB, 5 * MiB).every((byte) => byte === 0)).toBe(true);
    expect(bytes.subarray(5 * MiB).every((byte) => byte === 5)).toBe(true);
    expect(store.size).toBe(8 * MiB);
    await store.close();
  });

  it('zeroes, and keeps the space unless it may unmap', async () => {
    const path = fresh();
    const { store } = await open(path, { size: 4 * MiB });
    await write(store, 0, Buffer.alloc(4 * MiB, 5));
    await store.flush();
    await store.writeZeroes(512, 2 * MiB, request({ mayUnmap: false }));
    await store.flush();
    expect(allocated(path)).toBeGreaterThanOrEqual(4 * MiB);
    await store.writeZeroes(2 * MiB, 2 * MiB, request({ mayUnmap: true }));
    await store.flush();
    expect(allocated(path)).toBeLessThanOrEqual(2 * MiB + 65536);
    const bytes = await readAll(store);
    expect(bytes.subarray(0, 512).every((byte) => byte === 5)).toBe(true);
    expect(bytes.subarray(512).every((byte) => byte === 0)).toBe(true);
    await store.close();
  });

  it('zeroes by writing where the file system can do nothing else, in bounded pieces', async () => {
    vi.spyOn(BackingFile.prototype, 'punchHole').mockRejectedValue(unsupported);
    const zeroRange = vi.spyOn(BackingFile.prototype, 'zeroRange').mockRejectedValue(unsupported);
    const writes = vi.spyOn(BackingFile.prototype, 'writeFrom');
    const { store } = await open(fresh(), { size: 8 * MiB });
    // The disk is not thin then.
    expect(store.unmap).toBeUndefined();
    await write(store, 0, Buffer.alloc(8 * MiB, 5));
    writes.mockClear();
    await store.writeZeroes(512, 4 * MiB, request({ mayUnmap: true }));
    await store.writeZeroes(5 * MiB, 512, request());
    expect(Math.max(...writes.mock.calls.map(([bytes]) => bytes.length))).toBe(MiB);
    // It is not asked again and again.
    expect(zeroRange).toHaveBeenCalledTimes(1);
    const bytes = await readAll(store);
    const expected = Buffer.alloc(8 * MiB, 5).fill(0, 512, 512 + 4 * MiB);
    expected.fill(0, 5 * MiB, 5 * MiB + 512);
    expect(bytes.equals(expected)).toBe(true);
    await store.close();
  });

  it('passes on what is wrong with zeroing, rather than writing zeros', async () => {
    const { store } = await open(fresh(), { size: MiB });
    vi.spyOn(BackingFile.prototype, 'punchHole').mockRejectedValue(eio('punch'));
    expect(await failure(() => store.unmap?.(0, 4096, request()))).toMatchObject({ errno: 'EIO' });
    await store.close();
  });

  it('repeats a block over a range in large pieces', async () => {
    const { store } = await open(fresh(), { size: 8 * MiB });
    const block = Buffer.from(Array.from({ length: 512 }, (_, i) => i & 0xff));
    const writes = vi.spyOn(BackingFile.prototype, 'writeFrom');
    await store.writeSame(1024, 3 * MiB + 512, block, request());
    expect(writes.mock.calls.map(([bytes]) => bytes.length)).toEqual([MiB, MiB, MiB, 512]);
    const bytes = await readAll(store);
    for (let at = 1024; at < 1024 + 3 * MiB + 512; at += 512) {
      if (!bytes.subarray(at, at + 512).equals(block)) expect.fail(`wrong at ${at}`);
    }
    expect(bytes.subarray(0, 1024).every((byte) => byte === 0)).toBe(true);
    expect(bytes.subarray(1024 + 3 * MiB + 512).every((byte) => byte === 0)).toBe(true);
    // A block of zeros needs no writing; whether it may be unmapped, nobody said.
    writes.mockClear();
    vi.spyOn(BackingFile.prototype, 'zeroRange').mockReturnValue(undefined);
    const punch = vi.spyOn(BackingFile.prototype, 'punchHole');
    await store.writeSame(0, MiB, new Uint8Array(512), request());
    expect(writes).not.toHaveBeenCalled();
    expect(punch).not.toHaveBeenCalled();
    await store.close();
  });

  it('stops repeating when the initiator gave up', async () => {
    const { store } = await open(fresh(), { size: 64 * MiB });
    const abort = new AbortController();
    const writes = vi.spyOn(BackingFile.prototype, 'writeFrom');
    const running = store.writeSame(
      0,
      64 * MiB,
      new Uint8Array(512).fill(1),
      request({ signal: abort.signal }),
    );
    abort.abort();
    expect(await failure(() => running)).toMatchObject({ name: 'AbortError' });
    expect(writes.mock.calls.length).toBeLessThan(3);
    await store.close();
  });

  it('tells data from holes, and counts a block with any data as data', async () => {
    const path = fresh();
    const { store } = await open(path, { size: 8 * MiB, blockSize: 4096 });
    await write(store, MiB, Buffer.alloc(4096, 1));
    await write(store, 6 * MiB, Buffer.alloc(MiB, 1));
    const extents = await store.blockStatus?.(0, store.size, request());
    expect(extents).toEqual([
      { length: MiB, status: 'hole' },
      { length: 4096, status: 'data' },
      { length: 5 * MiB - 4096, status: 'hole' },
      { length: MiB, status: 'data' },
      { length: MiB, status: 'hole' },
    ]);
    expect(await store.blockStatus?.(MiB, 4096, request())).toEqual([
      { length: 4096, status: 'data' },
    ]);
    expect(await store.blockStatus?.(7 * MiB, MiB, request())).toEqual([
      { length: MiB, status: 'hole' },
    ]);
    // The missing end of a cut file does not read as zeros, so it is no hole.
    truncateSync(path, 7 * MiB);
    expect(await store.blockStatus?.(7 * MiB, MiB, request())).toEqual([
      { length: MiB, status: 'data' },
    ]);
    truncateSync(path, 8 * MiB);
    await store.close();
  });

  it('rounds what the file system tells to whole blocks, and gets on when it changes meanwhile', async () => {
    const { store } = await open(fresh(), { size: 64 * 1024, blockSize: 4096 });
    const data = vi.spyOn(BackingFile.prototype, 'nextData');
    const hole = vi.spyOn(BackingFile.prototype, 'nextHole');
    data.mockResolvedValueOnce(8192 + 512).mockResolvedValueOnce(undefined);
    hole.mockResolvedValueOnce(8192 + 1024);
    expect(await store.blockStatus?.(0, 16384, request())).toEqual([
      { length: 8192, status: 'hole' },
      { length: 4096, status: 'data' },
      { length: 4096, status: 'hole' },
    ]);
    // Punched between the two questions.
    data.mockResolvedValueOnce(0).mockResolvedValueOnce(undefined);
    hole.mockResolvedValueOnce(0);
    expect(await store.blockStatus?.(0, 8192, request())).toEqual([
      { length: 4096, status: 'data' },
      { length: 4096, status: 'hole' },
    ]);
    await store.close();
  });

  it('bounds the work of one look at a file in shreds', async () => {
    const { store } = await open(fresh(), { size: 8 * MiB, blockSize: 4096 });
    for (let at = 0; at < 8 * MiB; at += 8192) await write(store, at, Buffer.alloc(4096, 1));
    const extents = (await store.blockStatus?.(0, store.size, request())) ?? [];
    expect(extents.length).toBeGreaterThan(100);
    expect(extents.length).toBeLessThan(300);
    expect(extents.slice(0, 100)).toEqual(
      Array.from({ length: 100 }, (_, i) => ({ length: 4096, status: i % 2 ? 'hole' : 'data' })),
    );
    await store.close();
  });

  it('is direct on request, also for memory that does not suit O_DIRECT', async () => {
    const path = fresh();
    const { store } = await open(path, { size: 4 * MiB, direct: true, blockSize: 4096 });
    // Odd addresses: the kernel refuses them.
    const odd = Buffer.alloc(8192 + 1, 3).subarray(1);
    await write(store, 4096, odd);
    expect((await readAll(store, 4096, 8192)).equals(odd)).toBe(true);
    await store.writeSame(MiB, MiB, new Uint8Array(4096).fill(9), request());
    expect((await readAll(store, MiB, MiB)).every((byte) => byte === 9)).toBe(true);
    await store.flush();
    await store.close();
  });

  it('is only read when read-only', async () => {
    const path = fresh();
    writeFileSync(path, Buffer.alloc(8192, 4));
    const { store } = await open(path, { readOnly: true, writeCache: true });
    expect(store).toMatchObject({ readOnly: true, writeCache: false, supportsFua: false });
    expect(store.unmap).toBeUndefined();
    expect((await readAll(store)).equals(Buffer.alloc(8192, 4))).toBe(true);
    expect(store.flush()).toBeUndefined();
    expect(await failure(() => write(store, 0, Buffer.alloc(512)))).toMatchObject({
      errno: 'EBADF',
    });
    await store.close();
  });
});

describe('durability', () => {
  const dir = scratch();
  let count = 0;
  const fresh = () => join(dir, `sync-${count++}`);

  it('a flush is answered after fdatasync, not before', async () => {
    const { store } = await open(fresh(), { size: MiB });
    const gate = withResolvers();
    const sync = vi.spyOn(BackingFile.prototype, 'datasync').mockReturnValue(gate.promise);
    let answered = false;
    const flush = Promise.resolve(store.flush()).then(() => {
      answered = true;
    });
    await new Promise((resolve) => setTimeout(resolve, 20));
    expect(answered).toBe(false);
    gate.resolve();
    await flush;
    expect(sync).toHaveBeenCalledTimes(1);
    await store.close();
  });

  it('without a write cache, every change is synced before it is answered, many by one sync', async () => {
    const { store } = await open(fresh(), { size: 4 * MiB, writeCache: false });
    expect(store.writeCache).toBe(false);
    const sync = vi.spyOn(BackingFile.prototype, 'datasync');
    await Promise.all(
      Array.from({ length: 32 }, (_, i) => write(store, i * 4096, Buffer.alloc(4096, i))),
    );
    expect(sync.mock.calls.length).toBeGreaterThanOrEqual(1);
    expect(sync.mock.calls.length).toBeLessThan(20);
    for (const change of [
      () => write(store, 0, Buffer.alloc(512)),
      () => store.unmap?.(0, 4096, request()),
      () => store.writeZeroes(0, 4096, request()),
      () => store.writeSame(0, 4096, new Uint8Array(512).fill(1), request()),
    ]) {
      sync.mockClear();
      await change();
      expect(sync).toHaveBeenCalledTimes(1);
    }
    await store.close();
  });

  it('with a write cache, only FUA writes are synced', async () => {
    const { store } = await open(fresh(), { size: MiB });
    const sync = vi.spyOn(BackingFile.prototype, 'datasync');
    await write(store, 0, Buffer.alloc(512));
    expect(sync).not.toHaveBeenCalled();
    await write(store, 0, Buffer.alloc(512), true);
    expect(sync).toHaveBeenCalledTimes(1);
    await store.close();
  });

  it('never acknowledges anything after a failed fdatasync, but goes on reading', async () => {
    const path = fresh();
    const { store, warnings } = await open(path, { size: MiB });
    await write(store, 0, Buffer.alloc(512, 1));
    // As the kernel does it: the failure is told once, later syncs succeed.
    const sync = vi
      .spyOn(BackingFile.prototype, 'datasync')
      .mockRejectedValueOnce(eio('fdatasync'));
    expect(store.fileMap?.writable).toBe(MiB);
    const first = await failure(() => store.flush());
    expect(SenseError.is(first)).toBe(true);
    expect(first).toMatchObject(WRITE_ERROR);
    expect((first.cause as FileError).errno).toBe('EIO');
    // Nor past the store.
    expect(store.fileMap).toMatchObject({ readable: MiB, writable: 0 });
    for (const change of [
      () => store.flush(),
      () => write(store, 0, Buffer.alloc(512)),
      () => write(store, 0, Buffer.alloc(512), true),
      () => store.unmap?.(0, 4096, request()),
      () => store.writeZeroes(0, 4096, request()),
      () => store.writeSame(0, 4096, new Uint8Array(512).fill(1), request()),
      () => store.resize(2 * MiB),
    ]) {
      expect(await failure(change)).toMatchObject(WRITE_ERROR);
    }
    expect(sync).toHaveBeenCalledTimes(1);
    expect((await readAll(store, 0, 512)).every((byte) => byte === 1)).toBe(true);
    expect(warnings).toEqual([expect.stringMatching(/fdatasync of .* failed \(EIO\)/)]);
    // Whoever closes it learns of it too; the lock is gone all the same.
    expect(await failure(() => store.close())).toMatchObject(WRITE_ERROR);
    await store.close();
    const again = await open(path);
    await again.store.close();
  });

  it('fails writes whose own sync failed, those that shared it included', async () => {
    const { store } = await open(fresh(), { size: MiB, writeCache: false });
    vi.spyOn(BackingFile.prototype, 'datasync').mockRejectedValueOnce(eio('fdatasync'));
    const answers = await Promise.allSettled(
      Array.from({ length: 8 }, (_, i) => write(store, i * 512, Buffer.alloc(512, 1))),
    );
    expect(answers.map((answer) => answer.status)).toEqual(Array(8).fill('rejected'));
    await failure(() => store.close());
  });

  it('is written past the store only with a write cache, and never read so with O_DIRECT', async () => {
    const ends: unknown[] = [];
    for (const options of [{}, { writeCache: false }, { direct: true }]) {
      const { store } = await open(fresh(), { size: MiB, ...options });
      ends.push([store.fileMap?.readable, store.fileMap?.writable]);
      await store.close();
    }
    const { store } = await open(fresh(), { size: MiB });
    await store.close();
    const reader = await open(store.path, { readOnly: true });
    ends.push([reader.store.fileMap?.readable, reader.store.fileMap?.writable]);
    await reader.store.close();
    expect(ends).toEqual([
      [MiB, MiB],
      [MiB, 0],
      [undefined, undefined],
      [MiB, 0],
    ]);
  });

  it('a write that finds no space fails alone', async () => {
    const { store } = await open(fresh(), { size: MiB });
    const full = new FileError('ERR_TCMU_IO_NO_SPACE', 'full', { errno: 'ENOSPC' });
    const refused = new (class extends MemoryDataOut {
      override writeTo(): Promise<void> {
        return Promise.reject(full);
      }
    })(Buffer.alloc(512));
    // Untouched, so that the SCSI layer makes SPACE ALLOCATION FAILED of it.
    expect(await failure(() => store.write(0, refused, request()))).toBe(full);
    await write(store, 512, Buffer.alloc(512, 1));
    await store.flush();
    await store.close();
  });

  it('makes everything durable when it is closed', async () => {
    const { store } = await open(fresh(), { size: MiB });
    await write(store, 0, Buffer.alloc(512));
    const sync = vi.spyOn(BackingFile.prototype, 'datasync');
    await store.close();
    await store.close();
    expect(sync).toHaveBeenCalledTimes(1);
    expect(await failure(() => readAll(store, 0, 512))).toMatchObject({
      code: 'ERR_TCMU_FILE_CLOSED',
    });
  });
});

function withResolvers() {
  let resolve = (): void => {};
  const promise = new Promise<void>((done) => {
    resolve = done;
  });
  return { promise, resolve };
}

describe('a file that others change', () => {
  const dir = scratch();
  let count = 0;
  const fresh = () => join(dir, `cut-${count++}`);

  it.each(['auto', 'inline', 'pool'] as const)(
    'is not served as zeros where it was cut (I/O %s)',
    async (io) => {
      const path = fresh();
      const { store, warnings } = await open(path, { size: 64 * 1024, io });
      await write(store, 0, Buffer.alloc(64 * 1024, 1));
      truncateSync(path, 32 * 1024);
      for (const [position, length] of [
        [32 * 1024, 4096],
        [32 * 1024 - 512, 1024],
        [60 * 1024, 4096],
      ] as const) {
        const error = await failure(() => readAll(store, position, length));
        expect(SenseError.is(error)).toBe(true);
        expect(error).toMatchObject(READ_ERROR);
        expect(error.cause).toMatchObject({ code: 'ERR_TCMU_IO_SHORT', path });
        expect((error.cause as Error).message).toMatch(/the file ends before; somebody cut it/);
      }
      // What is left is served.
      expect((await readAll(store, 0, 32 * 1024)).every((byte) => byte === 1)).toBe(true);
      await write(store, 0, Buffer.alloc(512, 2));
      // Writing behind the end would make the gap a hole that reads as zeros.
      for (const change of [
        () => write(store, 60 * 1024, Buffer.alloc(512)),
        () => store.writeZeroes(60 * 1024, 4096, request()),
        () => store.unmap?.(60 * 1024, 4096, request()),
        () => store.writeSame(60 * 1024, 4096, new Uint8Array(512).fill(1), request()),
        () => store.flush(),
      ]) {
        expect(await failure(change)).toMatchObject(WRITE_ERROR);
      }
      expect(statSync(path).size).toBe(32 * 1024);
      expect(warnings).toHaveLength(1);
      expect(warnings[0]).toMatch(/was cut to 32 KiB: the disk has 64 KiB/);
      // The administrator decides that the rest is zeros.
      truncateSync(path, 64 * 1024);
      await store.flush();
      await write(store, 60 * 1024, Buffer.alloc(512, 3));
      expect(warnings[1]).toMatch(/made longer again/);
      await store.close();
    },
  );

  it('is watched, so that a write after a while is refused without any read before', async () => {
    const path = fresh();
    const { store, warnings } = await open(path, { size: 64 * 1024 });
    truncateSync(path, 4096);
    await expect.poll(() => warnings).toHaveLength(1);
    expect(store.fileMap).toMatchObject({ readable: 4096, writable: 4096 });
    expect(await failure(() => write(store, 8192, Buffer.alloc(512)))).toMatchObject(WRITE_ERROR);
    truncateSync(path, 64 * 1024);
    await store.close();
  });

  it('is served on when it was deleted, with a warning that says how to save it', async () => {
    const path = fresh();
    const { store, warnings } = await open(path, { size: 64 * 1024 });
    await write(store, 0, Buffer.alloc(512, 1));
    unlinkSync(path);
    await expect.poll(() => warnings).toHaveLength(1);
    await store.flush();
    expect(warnings).toEqual([expect.stringMatching(/was deleted.*copy \/proc\/\d+\/fd\/\d+/)]);
    const rescued = /\/proc\/\d+\/fd\/\d+/.exec(warnings[0] as string)?.[0] as string;
    expect(
      readFileSync(rescued)
        .subarray(0, 512)
        .every((byte) => byte === 1),
    ).toBe(true);
    expect((await readAll(store, 0, 512)).every((byte) => byte === 1)).toBe(true);
    await store.close();
  });
});

describe('resizing', () => {
  const dir = scratch();
  let count = 0;
  const fresh = () => join(dir, `size-${count++}`);

  it('makes disk and file longer without taking space', async () => {
    const path = fresh();
    const { store } = await open(path, { size: MiB });
    await store.resize(64 * MiB);
    expect(store.size).toBe(64 * MiB);
    expect(store.fileMap).toMatchObject({ readable: 64 * MiB, writable: 64 * MiB });
    expect(statSync(path).size).toBe(64 * MiB);
    expect(allocated(path)).toBe(0);
    await write(store, 64 * MiB - 512, Buffer.alloc(512, 1));
    await store.close();
  });

  it('takes over what an administrator did with truncate', async () => {
    const path = fresh();
    const { store } = await open(path, { size: MiB });
    truncateSync(path, 2 * MiB);
    expect(store.fileSize).toBe(2 * MiB);
    await store.resize(store.fileSize);
    expect(store.size).toBe(2 * MiB);
    await store.close();
  });

  it('refuses to make it shorter, whoever cut the file, and changes nothing', async () => {
    const path = fresh();
    const { store } = await open(path, { size: MiB });
    await write(store, 0, Buffer.alloc(MiB, 1));
    expect((await failure(() => store.resize(MiB / 2))).message).toMatch(/would cut data off/);
    expect(statSync(path).size).toBe(MiB);
    truncateSync(path, MiB / 2);
    expect((await failure(() => store.resize(MiB / 2))).message).toMatch(/would cut data off/);
    expect(store.size).toBe(MiB);
    truncateSync(path, MiB);
    await store.close();
  });

  it('makes it shorter when that is allowed by name', async () => {
    const path = fresh();
    const { store } = await open(path, { size: MiB, allowShrink: true });
    await store.resize(MiB / 2);
    expect(statSync(path).size).toBe(MiB / 2);
    expect(store.size).toBe(MiB / 2);
    expect(await failure(() => write(store, MiB / 2, Buffer.alloc(512)))).toMatchObject(
      WRITE_ERROR,
    );
    // A cut by others is a new size too.
    truncateSync(path, MiB / 4);
    await store.resize(store.fileSize);
    await store.flush();
    expect(store.size).toBe(MiB / 4);
    await store.close();
  });

  it('keeps its size when the file can not be resized', async () => {
    const { store } = await open(fresh(), { size: MiB, allowShrink: true });
    const truncate = vi.spyOn(BackingFile.prototype, 'truncate').mockRejectedValue(eio('truncate'));
    expect(await failure(() => store.resize(2 * MiB))).toMatchObject({ errno: 'EIO' });
    expect(await failure(() => store.resize(MiB / 2))).toMatchObject({ errno: 'EIO' });
    expect(store.size).toBe(MiB);
    truncate.mockRestore();
    await write(store, MiB - 512, Buffer.alloc(512));
    await store.close();
  });

  it('refuses sizes that make no disk', async () => {
    const { store } = await open(fresh(), { size: MiB });
    for (const size of [0, -512, 1000, 2 * MiB + 1, Number.NaN, 2 ** 53]) {
      expect(await failure(() => store.resize(size))).toMatchObject({
        code: 'ERR_TCMU_INVALID_ARGUMENT',
      });
    }
    expect(store.size).toBe(MiB);
    await store.close();
  });

  it('follows a file it may only read, and never changes it', async () => {
    const path = fresh();
    writeFileSync(path, Buffer.alloc(4096));
    const { store } = await open(path, { readOnly: true });
    expect((await failure(() => store.resize(8192))).message).toMatch(/read-only/);
    truncateSync(path, 8192);
    await store.resize(store.fileSize);
    expect(store.size).toBe(8192);
    await store.close();
  });
});

describe('what a disk is told of', () => {
  const dir = scratch();

  it('reports the sizes that suit the file system', async () => {
    const { store } = await open(join(dir, 'limits'), { size: MiB });
    expect(store.blockSize).toBe(512);
    expect(store.physicalBlockSize % 512).toBe(0);
    expect(store.physicalBlockSize).toBeLessThanOrEqual(4096);
    expect(store.unmapGranularity % 512).toBe(0);
    expect(store.supportsFua).toBe(true);
    expect(store.kind).toBe('file');
    await store.close();
  });

  it('opens the file that the path leads to', async () => {
    const path = join(dir, 'target');
    closeSync(openSync(path, 'w'));
    truncateSync(path, 4096);
    execFileSync('ln', ['-s', path, join(dir, 'link')]);
    const { store } = await open(join(dir, 'link'));
    expect(store.path).toBe(path);
    await store.close();
    expect(FileStore).toBeTypeOf('function');
  });
});
