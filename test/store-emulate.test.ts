// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import type { MaybePromise } from '../lib/device/data.js';
import { compare, SCRATCH_BYTES, unmap, writeSame, writeZeroes } from '../lib/store/emulate.js';
import {
  type BlockStore,
  MemoryDataOut,
  MemoryStore,
  StoreMiddleware,
  type StoreOperation,
} from '../lib/store/index.js';
import { asynchronous, BareStore } from './scsi-fake-command.js';

const SIZE = 4 * 1024 * 1024;
const context = { signal: new AbortController().signal };
const memory = () => new MemoryStore({ size: SIZE });

class Recorder extends StoreMiddleware {
  readonly log: StoreOperation[] = [];
  protected override intercept<T>(
    operation: StoreOperation,
    run: () => MaybePromise<T>,
  ): MaybePromise<T> {
    this.log.push(operation);
    return run();
  }
}

const bare = () => new Recorder(new BareStore(memory()));
const names = (store: Recorder) => store.log.map((operation) => operation.name);

describe('writeZeroes', () => {
  test('uses the best method there is', async () => {
    for (const [kept, expected] of [
      [['writeZeroes', 'writeSame'], 'writeZeroes'],
      [['writeSame'], 'writeSame'],
      [[], 'write'],
    ] as const) {
      const store = new Recorder(new BareStore(memory(), ...kept));
      await writeZeroes(store, 4096, 8192, false, context);
      expect(names(store)).toEqual([expected]);
      expect(store.log[0]).toMatchObject({ position: 4096, length: 8192 });
    }
  });

  test('passes on whether blocks may be deallocated', () => {
    const seen: boolean[] = [];
    const store: BlockStore = {
      size: SIZE,
      read() {},
      write() {},
      writeZeroes: (_position, _length, { mayUnmap }) => seen.push(mayUnmap),
    };
    void writeZeroes(store, 0, 512, true, context);
    void writeZeroes(store, 0, 512, false, context);
    expect(seen).toEqual([true, false]);
  });

  test('writes a large range in bounded pieces that cover it exactly', async () => {
    const store = bare();
    await writeZeroes(store, 512, SIZE - 1024, false, context);
    let at = 512;
    for (const { position, length } of store.log) {
      expect(position).toBe(at);
      expect(length).toBeLessThanOrEqual(SCRATCH_BYTES);
      at += length;
    }
    expect(at).toBe(SIZE - 512);
  });

  test('nothing asks nothing of the store', () => {
    const store = bare();
    expect(writeZeroes(store, 0, 0, false, context)).toBeUndefined();
    expect(store.log).toEqual([]);
  });
});

test('unmap without unmap is zeroing that may deallocate', () => {
  const seen: boolean[] = [];
  const store: BlockStore = {
    size: SIZE,
    read() {},
    write() {},
    writeZeroes: (_position, _length, { mayUnmap }) => seen.push(mayUnmap),
  };
  void unmap(store, 0, 512, context);
  expect(seen).toEqual([true]);
});

test('writeSame repeats the block in bounded pieces', async () => {
  const store = bare();
  const block = Uint8Array.from({ length: 512 }, (_, i) => i & 0xff);
  await writeSame(store, 1024, SCRATCH_BYTES + 1536, block, context);
  expect(store.log.map(({ position, length }) => [position, length])).toEqual([
    [1024, SCRATCH_BYTES],
    [1024 + SCRATCH_BYTES, 1536],
  ]);
});

describe('compare', () => {
  test('reads no further than the first difference', async () => {
    for (const make of [bare, () => new Recorder(asynchronous(memory()))]) {
      const store = make();
      const expected = new Uint8Array(3 * SCRATCH_BYTES);
      expected[SCRATCH_BYTES + 5] = 1;
      const answer = await compare(store, 0, new MemoryDataOut(expected), context);
      expect(answer).toBe(SCRATCH_BYTES + 5);
      expect(store.log).toHaveLength(2);
      expect(store.log.every(({ length }) => length <= SCRATCH_BYTES)).toBe(true);
    }
  });

  test('reads whole blocks for data that ends inside one', async () => {
    const store = bare();
    const data = new MemoryDataOut(new Uint8Array(SCRATCH_BYTES + 100));
    expect(await compare(store, 512, data, context)).toBe(-1);
    expect(store.log.map(({ length }) => length)).toEqual([SCRATCH_BYTES, 512]);
  });
});
