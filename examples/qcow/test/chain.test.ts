// SPDX-License-Identifier: Apache-2.0
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import { describe, expect, test } from 'vitest';
import { checkImage, commitImage, createImage, QcowStore, rebaseImage } from '../src/index.js';
import { failure, KiB, MiB, qemuImg, scratch } from './util.js';

const dir = scratch();
const context = { signal: new AbortController().signal, fua: false, mayUnmap: true };

function shows(path: string): Buffer {
  qemuImg('convert', '-O', 'raw', path, `${path}.raw`);
  return readFileSync(`${path}.raw`);
}

async function fill(path: string, at: number, length: number, value: number): Promise<void> {
  const store = await QcowStore.open(path);
  await store.write(at, new MemoryDataOut(new Uint8Array(length).fill(value)));
  await store.close();
}

async function reads(path: string): Promise<Buffer> {
  const store = await QcowStore.open(path, { readOnly: true });
  const data = new MemoryDataIn(new Uint8Array(store.size));
  await store.read(0, data);
  await store.close();
  return Buffer.from(data.bytes);
}

/** A raw file, an image of 1 MiB over it, one of 2 MiB over that; relative names. */
async function makeChain(
  name: string,
  version: 2 | 3,
): Promise<{ base: string; mid: string; top: string }> {
  const base = join(dir, `${name}.raw`);
  const mid = join(dir, `${name}-mid.qcow2`);
  const top = join(dir, `${name}-top.qcow2`);
  writeFileSync(base, Buffer.alloc(1536 * KiB, 1));
  await createImage(mid, { size: MiB, version, backingFile: `${name}.raw`, backingFormat: 'raw' });
  await createImage(top, {
    size: 2 * MiB,
    version,
    clusterSize: 4 * KiB,
    backingFile: `${name}-mid.qcow2`,
    backingFormat: 'qcow2',
  });
  await fill(mid, 100 * KiB, 512, 2);
  await fill(top, 200 * KiB, 1024, 3);
  await fill(top, MiB - 512, 1024, 4);
  const store = await QcowStore.open(top);
  await store.writeZeroes(300 * KiB, 20 * KiB + 512, context);
  await store.close();
  return { base, mid, top };
}

describe.each([2, 3] as const)('a chain of version %i', (version) => {
  test('reads as QEMU reads it', async () => {
    const { top } = await makeChain(`read${version}`, version);
    expect((await reads(top)).equals(shows(top))).toBe(true);
  });

  test('keeps what it shows when the top is committed, which is empty then', async () => {
    const { mid, top } = await makeChain(`commit${version}`, version);
    const before = shows(top);
    await commitImage(top);
    expect(shows(mid).equals(before)).toBe(true);
    expect(shows(top).equals(before)).toBe(true);
    for (const path of [mid, top]) {
      qemuImg('check', path);
      expect(await checkImage(path)).toMatchObject({ errors: 0, leaks: 0 });
    }
    expect((await checkImage(top)).allocatedClusters).toBe(0);
  });

  test('keeps what it shows over another file, and over none', async () => {
    const { base, mid, top } = await makeChain(`rebase${version}`, version);
    const before = shows(top);
    await rebaseImage(top, base, { backingFormat: 'raw' });
    await fill(mid, 0, MiB, 9);
    expect(shows(top).equals(before)).toBe(true);
    expect((await reads(top)).equals(before)).toBe(true);
    await rebaseImage(top, undefined);
    writeFileSync(base, '');
    expect(shows(top).equals(before)).toBe(true);
    qemuImg('check', top);
    expect(qemuImg('info', top)).not.toContain('backing file');
  });
});

test('a commit to a raw file makes that as long as the disk', async () => {
  const { base, mid } = await makeChain('raw', 3);
  const store = await QcowStore.open(mid);
  await store.resize(3 * MiB);
  await store.close();
  await fill(mid, 2 * MiB, 512, 7);
  const before = shows(mid);
  await commitImage(mid);
  expect(readFileSync(base).equals(before)).toBe(true);
});

test('rebase refuses a backing file that leads back to the image', async () => {
  const { base, mid, top } = await makeChain('loop', 3);
  expect(await failure(() => rebaseImage(mid, top, { backingFormat: 'qcow2' }))).toMatchObject({
    code: 'ERR_TCMU_QCOW_LOCKED',
  });
  await rebaseImage(mid, top, { backingFormat: 'qcow2', unsafe: true });
  for (const path of [mid, top]) {
    expect(await failure(() => QcowStore.open(path, { lock: false }))).toMatchObject({
      code: 'ERR_TCMU_QCOW_BACKING',
      message: expect.stringContaining('comes back to it'),
    });
  }
  await rebaseImage(mid, base, { backingFormat: 'raw', unsafe: true });
  expect((await reads(top)).equals(shows(top))).toBe(true);
});

test('files outside an allowed directory are not opened', async () => {
  const { top } = await makeChain('allowed', 3);
  const inside = await QcowStore.open(top, { allowedDirectory: dir, readOnly: true });
  await inside.close();
  await rebaseImage(top, '/dev/null', { backingFormat: 'raw', unsafe: true });
  for (const name of ['/dev/null', '../../etc/passwd', 'nbd://127.0.0.1/x', 'json:{}']) {
    await rebaseImage(top, name, { backingFormat: 'raw', unsafe: true });
    expect(
      await failure(() => QcowStore.open(top, { allowedDirectory: dir, readOnly: true })),
    ).toMatchObject({ code: 'ERR_TCMU_QCOW_BACKING' });
  }
});

test.each([2, 3] as const)(
  'shrinking version %i over a backing file gives up what is cut',
  async (version) => {
    const base = join(dir, `shrink${version}.raw`);
    const top = join(dir, `shrink${version}.qcow2`);
    writeFileSync(base, Buffer.alloc(2 * MiB, 1));
    await createImage(top, {
      size: 2 * MiB,
      version,
      clusterSize: 4 * KiB,
      backingFile: `shrink${version}.raw`,
      backingFormat: 'raw',
    });
    await fill(top, 0, 1536 * KiB, 2);
    const store = await QcowStore.open(top, { allowShrink: true });
    await store.resize(64 * KiB);
    await store.close();
    const check = JSON.parse(qemuImg('check', '--output=json', top)) as Record<string, number>;
    expect(check['allocated-clusters']).toBe(16);
    const again = await QcowStore.open(top);
    await again.resize(2 * MiB);
    await again.close();
    const disk = await reads(top);
    expect(disk.subarray(0, 64 * KiB).every((byte) => byte === 2)).toBe(true);
    expect(disk.subarray(64 * KiB).every((byte) => byte === 0)).toBe(true);
    expect(disk.equals(shows(top))).toBe(true);
  },
);
