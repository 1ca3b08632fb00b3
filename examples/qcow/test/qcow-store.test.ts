// SPDX-License-Identifier: Apache-2.0
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import { describe, expect, test } from 'vitest';
import {
  type CreateOptions,
  checkImage,
  createImage,
  imageInfo,
  MemoryFile,
  QcowStore,
} from '../src/index.js';
import { dirtyParts, failure, KiB, MiB, qemuImg, scratch } from './util.js';

const dir = scratch();
const context = { signal: new AbortController().signal, fua: false, mayUnmap: true };

async function write(store: QcowStore, shadow: Uint8Array, at: number, n: number, value: number) {
  await store.write(at, new MemoryDataOut(new Uint8Array(n).fill(value)));
  shadow.fill(value, at, at + n);
}

async function readAll(path: string, length: number): Promise<Uint8Array> {
  const store = await QcowStore.open(path, { readOnly: true });
  const data = new MemoryDataIn(new Uint8Array(length).fill(0xee));
  await store.read(0, data);
  await store.close();
  return data.bytes;
}

function sameBytes(a: Uint8Array, b: Uint8Array): boolean {
  return Buffer.compare(a, b) === 0;
}

describe.each<[string, CreateOptions]>([
  ['defaults', {}],
  ['512 bytes', { clusterSize: 512 }],
  ['2 MiB', { clusterSize: 2 * MiB }],
  ['version 2', { version: 2 }],
  ['extended L2', { extendedL2: true, clusterSize: 16 * KiB }],
  ['refcounts of 2 bits', { refcountBits: 2 }],
  ['refcounts of 64 bits', { refcountBits: 64, clusterSize: 512 }],
  ['lazy refcounts', { lazyRefcounts: true }],
])('an image with %s', (name, options) => {
  test('shows what was written, to us and to QEMU, through snapshots and a resize', async () => {
    const path = join(dir, `${name}.qcow2`);
    await createImage(path, { size: 8 * MiB, ...options });
    qemuImg('check', path);
    const store = await QcowStore.open(path, { allowShrink: true });
    const shadow = new Uint8Array(12 * MiB);
    await write(store, shadow, 0, 512, 1);
    await write(store, shadow, 100 * KiB, 300 * KiB, 2);
    await write(store, shadow, 4 * MiB - 512, 1024, 3);
    await store.writeZeroes(150 * KiB, 100 * KiB, context);
    shadow.fill(0, 150 * KiB, 250 * KiB);
    await store.flush();
    await store.snapshots.create('one');
    await write(store, shadow, 120 * KiB, 4096, 5);
    await write(store, shadow, 7 * MiB, 4096, 6);
    await store.snapshots.create('two');
    const atTwo = shadow.slice(0, 8 * MiB);
    await store.snapshots.delete('one');
    await store.unmap?.(0, 2 * MiB, context);
    shadow.fill(0, 0, 2 * MiB);
    await write(store, shadow, MiB, 1536, 9);
    await store.resize(12 * MiB);
    await write(store, shadow, 9 * MiB, MiB, 7);
    await store.resize(9 * MiB + 512);
    shadow.fill(0, 9 * MiB + 512);
    await store.resize(12 * MiB);
    await store.close();

    qemuImg('check', path);
    expect(await checkImage(path)).toMatchObject({ errors: 0, leaks: 0 });
    expect(sameBytes(await readAll(path, 12 * MiB), shadow)).toBe(true);
    qemuImg('convert', '-O', 'raw', path, `${path}.raw`);
    expect(sameBytes(readFileSync(`${path}.raw`), shadow)).toBe(true);
    const info = await imageInfo(path);
    expect(info.snapshots).toMatchObject([{ id: '2', name: 'two', diskSize: 8 * MiB }]);

    const again = await QcowStore.open(path);
    await again.snapshots.revert('two');
    expect(again.size).toBe(8 * MiB);
    await again.close();
    qemuImg('check', path);
    expect(sameBytes(await readAll(path, 8 * MiB), atTwo)).toBe(true);
  });
});

test('a dirty bitmap follows writes and sizes', async () => {
  const path = join(dir, 'bitmap.qcow2');
  await createImage(path, { size: 64 * MiB, clusterSize: 512 });
  qemuImg('bitmap', '--add', '-g', '512', path, 'b0');
  qemuImg('bitmap', '--add', '--disable', path, 'b1');
  const store = await QcowStore.open(path, { allowShrink: true });
  await store.write(MiB, new MemoryDataOut(new Uint8Array(4096).fill(1)));
  await store.resize(96 * MiB);
  await store.write(80 * MiB, new MemoryDataOut(new Uint8Array(512).fill(1)));
  await store.resize(72 * MiB);
  await store.write(71 * MiB, new MemoryDataOut(new Uint8Array(512).fill(1)));
  await store.close();
  qemuImg('check', path);
  expect(dirtyParts(path, 'b0')).toEqual([
    [MiB, 4096],
    [71 * MiB, 512],
  ]);
  const { bitmaps } = await imageInfo(path);
  expect(bitmaps).toEqual([
    { name: 'b0', granularity: 512, auto: true, inUse: false },
    { name: 'b1', granularity: 4096, auto: false, inUse: false },
  ]);
});

test('a dirty bitmap is all dirty after a revert, which may change its size', async () => {
  const path = join(dir, 'reverted.qcow2');
  await createImage(path, { size: 64 * MiB, clusterSize: 512 });
  qemuImg('bitmap', '--add', '-g', '4096', path, 'b0');
  const store = await QcowStore.open(path);
  await store.snapshots.create('small');
  await store.resize(256 * MiB);
  await store.snapshots.revert('small');
  await store.close();
  qemuImg('check', path);
  expect(dirtyParts(path, 'b0')).toEqual([[0, 64 * MiB]]);
});

class FailingFile extends MemoryFile {
  /** Writes that still succeed. */
  left = Number.POSITIVE_INFINITY;

  override write(source: Uint8Array, position: number): void {
    if (this.left-- <= 0) throw Object.assign(new Error('no space'), { code: 'ENOSPC' });
    super.write(source, position);
  }
}

test('a snapshot that fails changes nothing, and what it wrote never shows', async () => {
  const file = new FailingFile();
  const options = { lock: false, openFile: async () => file };
  await createImage('image', { size: 8 * MiB, ...options });
  const store = await QcowStore.open('image', options);
  const shadow = new Uint8Array(8 * MiB);
  for (let i = 0; i < 20; i++) await write(store, shadow, i * 128 * KiB, 512, i + 1);
  await store.flush();
  for (let left = 0; left < 4; left++) {
    file.left = left;
    expect(await failure(() => store.snapshots.create('s'))).toMatchObject({ message: 'no space' });
    file.left = Number.POSITIVE_INFINITY;
    expect(store.snapshots.list()).toEqual([]);
    await write(store, shadow, 5 * MiB + left * 64 * KiB, 512, 100 + left);
  }
  const data = new MemoryDataIn(new Uint8Array(8 * MiB).fill(0xee));
  await store.read(0, data);
  expect(sameBytes(data.bytes, shadow)).toBe(true);
  await store.close();
  expect(await checkImage('image', options)).toMatchObject({ errors: 0, leaks: 0 });
});

test('a copy from another image, and within one, takes space for data only', async () => {
  const [from, to] = [join(dir, 'copy-from.qcow2'), join(dir, 'copy-to.qcow2')];
  for (const path of [from, to]) await createImage(path, { size: 16 * MiB });
  const shadow = new Uint8Array(16 * MiB);
  const source = await QcowStore.open(from);
  await write(source, shadow, 100 * KiB + 512, 200 * KiB, 7);
  await write(source, shadow, 12 * MiB, MiB + 1536, 8);
  const target = await QcowStore.open(to);
  await write(target, new Uint8Array(16 * MiB), 0, 16 * MiB, 0xff);
  const before = (await target.space?.()) as { used: number; available: number };
  expect(before.used).toBeGreaterThan(16 * MiB);
  expect(await target.copyFrom(source, 0, 0, 16 * MiB, context)).toBe(16 * MiB);
  await target.flush();
  // Given back to the file system once nothing refers to it.
  await expect.poll(async () => (await target.space?.())?.used).toBeLessThan(4 * MiB);
  // Within one: data behind the end of what is shown to be zeros.
  expect(await target.copyFrom(target, 12 * MiB, 4 * MiB, 2 * MiB, context)).toBe(2 * MiB);
  shadow.copyWithin(4 * MiB, 12 * MiB, 14 * MiB);
  await target.close();
  await source.close();
  expect(sameBytes(await readAll(to, 16 * MiB), shadow)).toBe(true);
  qemuImg('check', to);
});

test('first writes wait for no flush once there is space ready, which is given back at the end', async () => {
  const file = new MemoryFile();
  const openFile = async () => file;
  await createImage('image', { size: 64 * MiB, openFile });
  const before = file.size();
  let flushes = 0;
  const flush = file.flush.bind(file);
  file.flush = () => {
    flushes++;
    return flush();
  };
  const store = await QcowStore.open('image', { openFile });
  for (let i = 0; i < 200; i++) {
    await store.write(i * 64 * KiB, new MemoryDataOut(new Uint8Array(4 * KiB).fill(1)));
  }
  expect(flushes).toBeLessThan(40);
  await store.close();
  // 200 clusters of data, and one L2 table.
  expect(file.size()).toBeLessThanOrEqual(before + 201 * 64 * KiB);
  expect(await checkImage('image', { openFile })).toMatchObject({ errors: 0, leaks: 0 });
});
