// SPDX-License-Identifier: Apache-2.0
/** Random histories of one disk against a model of it: a plain buffer. */
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { FileStore } from '../src/file-store.js';
import { cases, folders, readAll, request, scratch, write } from './util.js';

const BLOCK = 512;
const BLOCKS = 256;

const range = fc
  .tuple(fc.nat(BLOCKS - 1), fc.integer({ min: 1, max: 64 }))
  .map(([first, count]) => ({
    position: first * BLOCK,
    length: Math.min(count, BLOCKS - first) * BLOCK,
  }));
const value = fc.integer({ min: 1, max: 255 });
const step = fc.oneof(
  fc.record({ do: fc.constant('write' as const), range, value, fua: fc.boolean() }),
  fc.record({ do: fc.constant('unmap' as const), range }),
  fc.record({ do: fc.constant('zero' as const), range, mayUnmap: fc.boolean() }),
  fc.record({ do: fc.constant('same' as const), range, value: fc.nat(255) }),
  fc.record({ do: fc.constant('flush' as const) }),
  fc.record({ do: fc.constant('reopen' as const) }),
  fc.record({ do: fc.constant('grow' as const), blocks: fc.integer({ min: 1, max: 64 }) }),
);

describe.each(folders)('a disk in %s', (folder) => {
  const dir = scratch(folder);
  let count = 0;

  it('holds what was written, whatever came before', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(step, { maxLength: 40 }),
        fc.record({ writeCache: fc.boolean(), io: fc.constantFrom('auto', 'inline', 'pool') }),
        async (steps, options) => {
          const path = join(dir, `model-${count++}`);
          let model = Buffer.alloc(BLOCKS * BLOCK);
          let store = await FileStore.open(path, { ...options, size: model.length });
          for (const one of steps) {
            if (one.do === 'write') {
              const bytes = Buffer.alloc(one.range.length, one.value);
              await write(store, one.range.position, bytes, one.fua);
              bytes.copy(model, one.range.position);
            } else if (one.do === 'same') {
              const { position, length } = one.range;
              await store.writeSame(position, length, Buffer.alloc(BLOCK, one.value), request());
              model.fill(one.value, position, position + length);
            } else if (one.do === 'unmap' || one.do === 'zero') {
              const { position, length } = one.range;
              if (one.do === 'unmap') await store.unmap?.(position, length, request());
              else await store.writeZeroes(position, length, request(one));
              model.fill(0, position, position + length);
            } else if (one.do === 'flush') {
              await store.flush();
            } else if (one.do === 'grow') {
              model = Buffer.concat([model, Buffer.alloc(one.blocks * BLOCK)]);
              await store.resize(model.length);
            } else {
              await store.close();
              store = await FileStore.open(path, options);
            }
          }
          expect(store.size).toBe(model.length);
          expect((await readAll(store)).equals(model)).toBe(true);
          let at = 0;
          while (at < model.length) {
            const left = model.length - at;
            for (const { length, status } of (await store.blockStatus?.(at, left, request())) ??
              []) {
              expect(length % BLOCK).toBe(0);
              const bytes = model.subarray(at, at + length);
              if (status === 'hole' && bytes.some((byte) => byte !== 0))
                expect.fail(`data at ${at}`);
              at += length;
            }
          }
          expect(at).toBe(model.length);
          await store.close();
        },
      ),
      cases(100),
    );
  });
});
