// SPDX-License-Identifier: Apache-2.0
/** What an image says of itself, and what follows from it. */
import { execFileSync, spawnSync } from 'node:child_process';
import { readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import { describe, expect, test } from 'vitest';
import { checkImage, createImage, imageInfo, openLayer, QcowStore } from '../src/index.js';
import { failure, KiB, MiB, qemuImg, qemuIo, scratch } from './util.js';

const dir = scratch();

/** A new image of 8 MiB, its bytes changed by `change`. */
async function image(name: string, change: (bytes: Buffer) => void): Promise<string> {
  const path = join(dir, `${name}.qcow2`);
  await createImage(path, { size: 8 * MiB });
  const bytes = readFileSync(path);
  change(bytes);
  writeFileSync(path, bytes);
  return path;
}

const bit = (bytes: Buffer, field: number, value: bigint) =>
  bytes.writeBigUInt64BE(bytes.readBigUInt64BE(field) | value, field);

describe('features', () => {
  test('an unknown incompatible bit refuses the image, by its name in the image', async () => {
    const path = await image('unknown', (bytes) => {
      bit(bytes, 72, 1n << 40n);
      bit(bytes, 72, 1n << 41n);
      // The first entry of the feature name table, behind the header and the extension's head.
      const entry = 112 + 8;
      bytes[entry + 1] = 40;
      bytes.fill(0, entry + 2, entry + 48);
      bytes.write('time travel', entry + 2);
    });
    for (const open of [
      () => QcowStore.open(path),
      () => imageInfo(path),
      () => checkImage(path),
    ]) {
      expect(await failure(open)).toMatchObject({
        code: 'ERR_TCMU_QCOW_UNSUPPORTED',
        message: expect.stringContaining('time travel (bit 40), bit 41'),
        offset: 72,
      });
    }
  });

  test('unknown autoclear bits go, unknown compatible bits, fields and extensions stay', async () => {
    const path = await image('keep', (bytes) => {
      bit(bytes, 80, 1n << 50n);
      bit(bytes, 88, 1n << 51n);
      // A longer header, and an extension that nobody knows, in the place of the feature names.
      bytes.copyWithin(120, 112, 600);
      bytes.writeUInt32BE(120, 100);
      bytes.writeUInt32BE(0xabcdef, 112);
      bytes.writeUInt32BE(0x12345678, 120);
    });
    const before = readFileSync(path);
    const reader = await QcowStore.open(path, { readOnly: true });
    await reader.close();
    expect(readFileSync(path).equals(before)).toBe(true);
    const store = await QcowStore.open(path);
    await store.snapshots.create('s');
    await store.write(0, new MemoryDataOut(new Uint8Array(512).fill(1)));
    await store.close();
    const after = readFileSync(path);
    expect(after.readBigUInt64BE(80)).toBe(1n << 50n);
    expect(after.readBigUInt64BE(88)).toBe(0n);
    expect(after.subarray(96, 600).equals(before.subarray(96, 600))).toBe(true);
    qemuImg('check', path);
  });

  test('an image marked as damaged is read, and written only after a repair', async () => {
    const path = await image('corrupt', (bytes) => bit(bytes, 72, 2n));
    expect(await failure(() => QcowStore.open(path))).toMatchObject({
      code: 'ERR_TCMU_QCOW_CORRUPT',
    });
    const reader = await QcowStore.open(path, { readOnly: true });
    await reader.close();
    expect(await checkImage(path, { repair: 'all' })).toMatchObject({ errors: 0, corrupt: false });
    const store = await QcowStore.open(path);
    await store.close();
    qemuImg('check', path);
  });

  test('damage found while writing ends writing, and is noted for the next one', async () => {
    const path = await image('damage', () => {});
    qemuIo(path, ['write -q 0 128k']);
    const bytes = readFileSync(path);
    const l2 = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(40))) & 0xfffffffffffe00n);
    // The second cluster lies where the refcount table is.
    bytes.writeBigUInt64BE((1n << 63n) | 65536n, l2 + 8);
    writeFileSync(path, bytes);
    const warnings: string[] = [];
    const store = await QcowStore.open(path, { onWarning: (text) => warnings.push(text) });
    const write = (at: number) => store.write(at, new MemoryDataOut(new Uint8Array(512)));
    await write(0);
    expect(await failure(() => write(65536))).toMatchObject({ code: 'ERR_TCMU_QCOW_CORRUPT' });
    expect(await failure(() => write(0))).toMatchObject({ code: 'ERR_TCMU_QCOW_CORRUPT' });
    expect(await failure(() => store.flush())).toMatchObject({ code: 'ERR_TCMU_QCOW_CORRUPT' });
    await store.read(0, new MemoryDataIn(new Uint8Array(512)));
    await failure(() => store.close());
    expect(warnings).toHaveLength(1);
    expect((await imageInfo(path)).corrupt).toBe(true);
    expect(readFileSync(path).subarray(65536, 3 * 65536)).toEqual(bytes.subarray(65536, 3 * 65536));
  });

  test('lazy refcounts: what a killed server leaves is repaired when it is opened for writing', async () => {
    const path = join(dir, 'lazy.qcow2');
    await createImage(path, { size: 8 * MiB, lazyRefcounts: true });
    const store = await QcowStore.open(path);
    await store.write(MiB, new MemoryDataOut(new Uint8Array(200 * KiB).fill(3)));
    await store.flush();
    const left = join(dir, 'left.qcow2');
    writeFileSync(left, readFileSync(path));
    await store.close();
    qemuImg('check', path);

    expect(await checkImage(left)).toMatchObject({ dirty: true });
    expect((await checkImage(left)).errors).toBeGreaterThan(0);
    const warnings: string[] = [];
    const again = await QcowStore.open(left, { onWarning: (text) => warnings.push(text) });
    const data = new MemoryDataIn(new Uint8Array(200 * KiB));
    await again.read(MiB, data);
    await again.close();
    expect(data.bytes.every((byte) => byte === 3)).toBe(true);
    expect(warnings.join()).toContain('was not closed');
    qemuImg('check', left);
    expect(await checkImage(left)).toMatchObject({ errors: 0, leaks: 0, dirty: false });
  });
});

test('version 1 is read, compressed clusters and backing file included', async () => {
  const base = join(dir, 'one.raw');
  const path = join(dir, 'one.qcow');
  const compressed = join(dir, 'one-compressed.qcow');
  writeFileSync(base, Buffer.alloc(3 * MiB, 7));
  qemuImg('create', '-q', '-f', 'qcow', '-b', base, '-F', 'raw', path, '4M');
  execFileSync('qemu-io', ['-f', 'qcow', '-c', 'write -q -P 9 1000k 300k', path]);
  qemuImg('create', '-q', '-f', 'qcow', `${path}.plain`, '4M');
  execFileSync('qemu-io', ['-f', 'qcow', '-c', 'write -q -P 5 1000k 300k', `${path}.plain`]);
  // QEMU 7.2 ends with 1 after this, and without a word; what the image holds, it is asked for below.
  spawnSync('qemu-img', ['convert', '-c', '-f', 'qcow', '-O', 'qcow', `${path}.plain`, compressed]);
  expect(statSync(compressed).size).toBeLessThan(100 * KiB);
  for (const one of [path, compressed]) {
    qemuImg('convert', '-f', 'qcow', '-O', 'raw', one, `${one}.raw`);
    const expected = readFileSync(`${one}.raw`);
    const layer = await openLayer(one, 'qcow');
    const data = new MemoryDataIn(new Uint8Array(4 * MiB).fill(0xee));
    await layer.read(0, data);
    await layer.close();
    expect(layer.size).toBe(4 * MiB);
    expect(expected.equals(data.bytes), one).toBe(true);
  }
  const over = join(dir, 'over.qcow2');
  await createImage(over, { backingFile: path, backingFormat: 'qcow' });
  qemuImg('compare', over, path);
});

test('an image in use keeps QEMU out, and the other way round', async () => {
  const base = join(dir, 'shared.qcow2');
  const path = join(dir, 'locked.qcow2');
  await createImage(base, { size: MiB });
  await createImage(path, { backingFile: 'shared.qcow2', backingFormat: 'qcow2' });
  const store = await QcowStore.open(path);
  expect(() => qemuImg('check', path)).toThrow(/lock/);
  expect(() => qemuIo(base, ['write -q 0 512'])).toThrow(/lock/);
  for (const locked of [path, base]) {
    expect(await failure(() => QcowStore.open(locked))).toMatchObject({
      code: 'ERR_TCMU_QCOW_LOCKED',
    });
  }
  await (await QcowStore.open(base, { readOnly: true })).close();
  await store.close();
  qemuImg('check', path);

  const nbd = execFileSync('qemu-nbd', [
    ...['--fork', '--persistent', '-f', 'qcow2', '-k', `${path}.socket`],
    ...['--pid-file', `${path}.pid`, path],
  ]);
  expect(nbd.length).toBe(0);
  try {
    expect(await failure(() => QcowStore.open(path, { readOnly: true }))).toMatchObject({
      code: 'ERR_TCMU_QCOW_LOCKED',
    });
  } finally {
    process.kill(Number(readFileSync(`${path}.pid`, 'utf8')));
  }
});

test('what is allocated is told as QEMU tells it', async () => {
  const base = join(dir, 'map.raw');
  const path = join(dir, 'map.qcow2');
  writeFileSync(base, Buffer.alloc(2 * MiB, 1));
  await createImage(path, { size: 8 * MiB, backingFile: 'map.raw', backingFormat: 'raw' });
  qemuIo(path, [
    'write -q 4M 200k',
    'write -q -z 1M 128k',
    'write -q -z -u 4M 64k',
    'write -q 6M 64k',
  ]);
  const store = await QcowStore.open(path, { readOnly: true });
  const found: { start: number; length: number; zero: boolean }[] = [];
  for (let at = 0; at < store.size; ) {
    for (const { length, status } of await store.blockStatus(at, store.size - at)) {
      const zero = status !== 'data';
      const last = found.at(-1);
      if (last?.zero === zero) last.length += length;
      else found.push({ start: at, length, zero });
      at += length;
    }
  }
  await store.close();
  const map = JSON.parse(qemuImg('map', '--output=json', path)) as typeof found;
  const merged: typeof found = [];
  for (const { start, length, zero } of map) {
    const last = merged.at(-1);
    if (last?.zero === zero) last.length += length;
    else merged.push({ start, length, zero });
  }
  expect(found).toEqual(merged);
});
