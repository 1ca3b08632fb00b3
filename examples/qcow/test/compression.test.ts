// SPDX-License-Identifier: Apache-2.0
import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { deflateRawSync } from 'node:zlib';
import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { codecFor } from '../src/compression/index.js';
import { cases, failure, KiB, MiB, qemuImg, qemuIo, scratch } from './util.js';

const dir = scratch();

/** Half text, half noise: neither trivial nor hopeless. */
function sample(length: number): Uint8Array {
  const bytes = Buffer.alloc(length, 'the quick brown fox ');
  randomBytes(length >> 2).copy(bytes, length >> 1);
  return bytes;
}

/** The compressed clusters of an image that QEMU wrote with one L2 table, by guest cluster. */
function compressedClusters(image: Buffer, clusterBits: number): Map<number, Buffer> {
  const l1 = Number(image.readBigUInt64BE(40));
  const l2 = Number(image.readBigUInt64BE(l1) & 0x00fffffffffffe00n);
  const found = new Map<number, Buffer>();
  const x = BigInt(62 - (clusterBits - 8));
  for (let i = 0; i < (1 << clusterBits) / 8; i++) {
    const entry = image.readBigUInt64BE(l2 + 8 * i);
    if (((entry >> 62n) & 1n) === 0n) continue;
    const offset = Number(entry & ((1n << x) - 1n));
    const more = Number((entry & ((1n << 62n) - 1n)) >> x);
    const end = Math.floor(offset / 512) * 512 + (more + 1) * 512;
    // A file need not have all of its last sector.
    const bytes = Buffer.alloc(end - offset);
    image.copy(bytes, 0, offset, Math.min(end, image.length));
    found.set(i, bytes);
  }
  return found;
}

describe.each([
  [0, 'zlib'],
  [1, 'zstd'],
] as const)('compression type %d', (type, name) => {
  const codec = codecFor(type);

  test.each([512, 64 * KiB, 2 * MiB])(
    'round trip of %d bytes, with a tail that is not ours',
    async (size) => {
      const bytes = sample(size);
      const packed = await codec.compress(bytes);
      if (packed === undefined) throw new Error('it was not made shorter');
      expect(packed.length).toBeLessThan(size);
      const tail = Buffer.concat([packed, randomBytes(511)]);
      expect(Buffer.compare(await codec.decompress(packed, size), bytes)).toBe(0);
      expect(Buffer.compare(await codec.decompress(tail, size), bytes)).toBe(0);
    },
  );

  test('what would not get shorter is left alone', async () => {
    expect(await codec.compress(randomBytes(64 * KiB))).toBeUndefined();
  });

  test('reads what QEMU wrote', async () => {
    const image = join(dir, `${name}.qcow2`);
    qemuImg('create', '-q', '-f', 'qcow2', '-o', `compression_type=${name}`, image, '1M');
    const patterns = [1, 2, 3].map((i) => `write -c -P ${i} ${(i - 1) * 64}k 64k`);
    qemuIo(image, patterns);
    const clusters = compressedClusters(readFileSync(image), 16);
    expect([...clusters.keys()]).toEqual([0, 1, 2]);
    for (const [i, bytes] of clusters) {
      const expected = Buffer.alloc(64 * KiB, i + 1);
      expect(Buffer.compare(await codec.decompress(bytes, 64 * KiB), expected)).toBe(0);
    }
  });

  test('too few and too many bytes are refused', async () => {
    const packed = (await codec.compress(sample(32 * KiB))) as Uint8Array;
    for (const size of [16 * KiB, 64 * KiB]) {
      const error = await failure(() => codec.decompress(packed, size));
      expect(error).toMatchObject({
        code: 'ERR_TCMU_QCOW_CORRUPT',
        structure: 'compressed cluster',
      });
    }
  });

  test('any damage gives the bytes of a cluster or the one error', async () => {
    const packed = Buffer.from((await codec.compress(sample(4 * KiB))) as Uint8Array);
    const damage = fc.record({
      flips: fc.array(fc.tuple(fc.nat(packed.length - 1), fc.nat(255)), { maxLength: 4 }),
      cut: fc.nat(packed.length),
    });
    await fc.assert(
      fc.asyncProperty(damage, async ({ flips, cut }) => {
        const bad = Buffer.from(packed);
        for (const [at, value] of flips) bad[at] = value;
        try {
          const bytes = await codec.decompress(bad.subarray(0, cut), 4 * KiB);
          expect(bytes.length).toBe(4 * KiB);
        } catch (error) {
          expect(error).toMatchObject({ code: 'ERR_TCMU_QCOW_CORRUPT' });
        }
      }),
      cases(300),
    );
  });
});

test('deflate: a stream without its end block counts when the cluster is full', async () => {
  const bytes = Buffer.alloc(4 * KiB, 'x');
  const whole = deflateRawSync(bytes, { level: 0 });
  // Stored block of 4 KiB: header of 5 bytes, then the data; nothing more.
  const open = Buffer.concat([Buffer.from([0, 0x00, 0x10, 0xff, 0xef]), bytes]);
  expect(await codecFor(0).decompress(open, 4 * KiB)).toEqual(bytes);
  expect(await codecFor(0).decompress(whole, 4 * KiB)).toEqual(bytes);
});

test('zstd: several frames make a cluster; a frame that claims 2^40 bytes allocates nothing', async () => {
  const codec = codecFor(1);
  const half = sample(2 * KiB);
  const frame = (await codec.compress(half)) as Uint8Array;
  const both = await codec.decompress(Buffer.concat([frame, frame]), 4 * KiB);
  expect(Buffer.compare(both, Buffer.concat([half, half]))).toBe(0);
  const huge = Buffer.alloc(64);
  huge.writeUInt32LE(0xfd2fb528);
  huge[4] = 0xe0;
  huge.writeBigUInt64LE(1n << 40n, 5);
  expect(await failure(() => codec.decompress(huge, 4 * KiB))).toMatchObject({
    message: expect.stringContaining('says it holds 1099511627776 bytes'),
  });
});

test('an unknown type is refused by its number', () => {
  expect(() => codecFor(2)).toThrow(/compression type at 0x68: type 2/);
});
