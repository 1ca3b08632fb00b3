// SPDX-License-Identifier: Apache-2.0
/** A header replaced: at every cut, and whatever the device reordered, the image has the old one or the new one. */
import { expect, test } from 'vitest';
import { ExtensionType, encodeHeader, type Header } from '../src/format/header.js';
import { readHeader } from '../src/image.js';
import { createImage, MemoryFile, rebaseImage } from '../src/index.js';
import { replaceHeader } from '../src/replace-header.js';
import { CrashJournal } from '../src/testing/index.js';
import { failure, KiB } from './util.js';

/** An image with so many extensions that they reach behind the first sector. */
async function imageWith(clusterSize: number, name: string, extra: number): Promise<Uint8Array> {
  const file = new MemoryFile();
  await createImage('image', {
    size: 64 * KiB,
    clusterSize,
    backingFile: name,
    backingFormat: 'qcow2',
    openFile: async () => file,
  });
  const header = await readHeader(file);
  for (let i = 1; i <= extra; i++) {
    header.extensions.push({ type: 0x1000 + i, data: new Uint8Array(40).fill(i) });
  }
  await file.write(encodeHeader(header, 'image'), 0);
  return file.toBytes();
}

const meaning = ({ backingFile, extensions }: Header) =>
  JSON.stringify({
    backingFile,
    extensions: extensions
      .filter(({ type }) => type !== ExtensionType.PADDING && type !== ExtensionType.FEATURE_NAMES)
      .map(({ type, data }) => [type, [...data]])
      .sort(),
  });

test.each([
  ['extensions that shift', 4 * KiB, 'old-base.qcow2', 10],
  ['a long name behind the first sector', 4 * KiB, 'o'.repeat(700), 2],
  ['large clusters', 64 * KiB, 'old-base.qcow2', 30],
  ['no room but for the names of features', KiB, 'old-base.qcow2', 2],
])('%s', async (_name, clusterSize, oldName, extra) => {
  const before = await imageWith(clusterSize, oldName, extra);
  for (const [newName, format] of [
    ['x'.repeat(200), 'raw'],
    [undefined, undefined],
  ] as const) {
    const journal = new CrashJournal();
    const file = journal.record(new MemoryFile(before, { path: 'image' }), before);
    const old = meaning(await readHeader(file));
    await rebaseImage('image', newName, {
      unsafe: true,
      backingFormat: format,
      lock: false,
      openFile: async () => file,
    });
    const done = await readHeader(file);
    expect(done.backingFile).toBe(newName);
    expect(done.extensions.some(({ type }) => type === ExtensionType.PADDING)).toBe(false);
    const found = new Set<string>();
    let seed = 1;
    const chance = () => {
      seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
      return seed / 2 ** 32;
    };
    for (const cut of journal.cuts()) {
      for (const keep of [() => true, () => false, ...Array(20).fill(() => chance() < 0.5)]) {
        const bytes = journal.crash(cut, keep).get('image') as Uint8Array;
        found.add(meaning(await readHeader(new MemoryFile(bytes, { path: 'image' }))));
      }
    }
    expect([...found].sort()).toEqual([old, meaning(done)].sort());
  }
});

test('a header that can only be replaced through a moment without one is refused, and stays', async () => {
  const before = await imageWith(KiB, 'o'.repeat(300), 2);
  const file = new MemoryFile(before, { path: 'image' });
  const current = await readHeader(file);
  const next = { ...current, backingFile: 'n'.repeat(330) };
  next.extensions = [{ type: 1, data: new Uint8Array(16) }, ...current.extensions];
  const error = await failure(() => replaceHeader(file, current, next));
  expect(error).toMatchObject({ code: 'ERR_TCMU_QCOW_STATE' });
  expect(file.toBytes()).toEqual(before);
});
