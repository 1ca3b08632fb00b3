// SPDX-License-Identifier: Apache-2.0
/**
 * Random sequences of reads, writes, unmaps, WRITE SAMEs and atomic commands against a plain buffer
 * that does the same: over stores of every shape, the disk and the model never differ.
 */
import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import type { BlockDevice } from '../lib/scsi/index.js';
import {
  type BlockStore,
  delay,
  MemoryStore,
  overlay,
  StoreMiddleware,
  statistics,
} from '../lib/store/index.js';
import { cases } from './cases.js';
import {
  asynchronous,
  BareStore,
  CDB,
  cdb,
  expectBytes,
  openDevice,
  run,
  unmapList,
} from './scsi-fake-command.js';

const BLOCKS = 64;

class Granular extends StoreMiddleware {
  override get unmapGranularity(): number {
    return 4 * this.blockSize;
  }
}

const shapes: [string, number, () => BlockStore][] = [
  ['memory', 512, () => memory(512)],
  ['memory with 4 KiB blocks', 4096, () => memory(4096)],
  ['asynchronous memory', 512, () => asynchronous(memory(512))],
  ['only read and write', 512, () => new BareStore(memory(512))],
  ['only read and write, asynchronous', 512, () => asynchronous(new BareStore(memory(512)))],
  ['unmap in granules of four blocks', 512, () => new Granular(memory(512))],
  [
    'unmap in granules, asynchronous, no writeZeroes',
    512,
    () => asynchronous(new Granular(new BareStore(memory(512), 'unmap'))),
  ],
  ['an overlay', 512, () => overlay(memory(512), memory(512))],
  [
    'an overlay over asynchronous stores',
    512,
    () => overlay(asynchronous(memory(512)), asynchronous(new BareStore(memory(512)))),
  ],
  ['layers of middleware', 512, () => statistics(delay(asynchronous(memory(512)), 0))],
];

function memory(blockSize: number): MemoryStore {
  return new MemoryStore({
    size: BLOCKS * blockSize,
    blockSize,
    pageSize: Math.max(2048, blockSize),
  });
}

const range = fc
  .tuple(fc.nat(BLOCKS - 1), fc.integer({ min: 1, max: 12 }))
  .map(([lba, blocks]) => ({ lba, blocks: Math.min(blocks, BLOCKS - lba) }));
const fill = fc.nat(255);
const step = fc.oneof(
  fc.record({ kind: fc.constant('read' as const), range }),
  fc.record({ kind: fc.constant('write' as const), range, fill }),
  fc.record({ kind: fc.constant('part' as const), range, fill }),
  fc.record({ kind: fc.constant('unmap' as const), ranges: fc.array(range, { maxLength: 4 }) }),
  fc.record({ kind: fc.constant('same' as const), range, fill, unmap: fc.boolean() }),
  fc.record({ kind: fc.constant('zero' as const), range, unmap: fc.boolean() }),
  fc.record({ kind: fc.constant('compare' as const), range, fill, equal: fc.boolean() }),
  fc.record({ kind: fc.constant('or' as const), range, fill }),
  fc.record({ kind: fc.constant('verify' as const), range, equal: fc.boolean() }),
);
type Step = typeof step extends fc.Arbitrary<infer T> ? T : never;

/** Bytes that tell apart what a wrong offset would mix up. */
function pattern(length: number, seed: number): Uint8Array {
  return Uint8Array.from({ length }, (_, i) => (seed + i + (i >> 8)) & 0xff);
}

class Model {
  readonly bytes: Uint8Array;

  constructor(
    readonly device: BlockDevice,
    readonly blockSize: number,
    readonly thin: boolean,
  ) {
    this.bytes = new Uint8Array(BLOCKS * blockSize);
  }

  async apply(action: Step): Promise<void> {
    const { device, blockSize } = this;
    const window = ({ lba, blocks }: { lba: number; blocks: number }) =>
      this.bytes.subarray(lba * blockSize, (lba + blocks) * blockSize);
    const good = async (
      ...args: Parameters<typeof run> extends [unknown, ...infer R] ? R : never
    ) => {
      const command = await run(device, ...args);
      expect(command.outcome).toBe('GOOD');
      return command;
    };
    switch (action.kind) {
      case 'read': {
        const { lba, blocks } = action.range;
        const command = await good(CDB.read10(lba, blocks), { in: blocks * blockSize });
        expectBytes(command.data, window(action.range));
        break;
      }
      case 'write': {
        const { lba, blocks } = action.range;
        const out = pattern(blocks * blockSize, action.fill);
        await good(CDB.write16(lba, blocks), { out });
        window(action.range).set(out);
        break;
      }
      case 'part': {
        const { lba, blocks } = action.range;
        const out = pattern(blocks * blockSize - 100, action.fill);
        await good(CDB.write10(lba, blocks), { out });
        window(action.range).set(out);
        break;
      }
      case 'unmap': {
        const list = unmapList(...action.ranges.map((r) => [r.lba, r.blocks] as const));
        if (!this.thin) {
          expect((await run(device, CDB.unmap(list.length), { out: list })).outcome).toBe('5/20/0');
          break;
        }
        await good(CDB.unmap(list.length), { out: list });
        for (const r of action.ranges) window(r).fill(0);
        break;
      }
      case 'same': {
        const { lba, blocks } = action.range;
        const out = action.fill < 40 ? new Uint8Array(blockSize) : pattern(blockSize, action.fill);
        await good(CDB.writeSame10(lba, blocks, action.unmap && this.thin ? 8 : 0), { out });
        for (let i = 0; i < blocks; i++) window({ lba: lba + i, blocks: 1 }).set(out);
        break;
      }
      case 'zero': {
        const { lba, blocks } = action.range;
        await good(CDB.writeSame16(lba, blocks, action.unmap && this.thin ? 9 : 1));
        window(action.range).fill(0);
        break;
      }
      case 'compare': {
        const { lba, blocks } = action.range;
        const expected = window(action.range).slice();
        const at = (action.fill * 37) % expected.length;
        if (!action.equal) (expected[at] as number) ^= 1;
        const replacement = pattern(expected.length, action.fill);
        const out = Uint8Array.from([...expected, ...replacement]);
        const command = await run(device, CDB.compareAndWrite(lba, blocks), { out });
        expect(command.outcome).toBe(action.equal ? 'GOOD' : 'e/1d/0');
        if (action.equal) window(action.range).set(replacement);
        else expect(command.sense?.information).toBe(at);
        break;
      }
      case 'or': {
        const { lba, blocks } = action.range;
        const out = pattern(blocks * blockSize, action.fill);
        await good(cdb(0x8b, 0, [lba, 8], [blocks, 4], 0, 0), { out });
        const target = window(action.range);
        for (let i = 0; i < out.length; i++) (target[i] as number) |= out[i] as number;
        break;
      }
      case 'verify': {
        const { lba, blocks } = action.range;
        const out = window(action.range).slice();
        if (!action.equal) (out[out.length - 1] as number) ^= 0x80;
        const command = await run(device, cdb(0x2f, 2, [lba, 4], 0, [blocks, 2], 0), { out });
        expect(command.outcome).toBe(action.equal ? 'GOOD' : 'e/1d/0');
        break;
      }
    }
  }

  async compareAll(): Promise<void> {
    const command = await run(this.device, CDB.read10(0, BLOCKS), { in: this.bytes.length });
    expectBytes(command.data, this.bytes);
  }
}

describe('a disk behaves as a row of bytes', () => {
  test.each(shapes)('%s', async (_, blockSize, make) => {
    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 1, maxLength: 40 }), async (steps) => {
        const store = make();
        const model = new Model(await openDevice(store), blockSize, store.unmap !== undefined);
        for (const action of steps) await model.apply(action);
        await model.compareAll();
      }),
      cases(60),
    );
  });
});
