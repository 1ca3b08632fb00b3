// SPDX-License-Identifier: Apache-2.0
/** The container: what the client is told of the whole. */
import { randomBytes } from 'node:crypto';
import { crc32 } from 'node:zlib';
import { describe, expect, it } from 'vitest';
import { BlobCodec, BlobKind, type Compression } from '../src/engine/blob.js';
import { combineCrc } from '../src/engine/crc-combine.js';

describe('the CRC-32 of pieces', () => {
  it.each([
    [0, 0],
    [1, 0],
    [0, 1],
    [3, 65_536],
    [65_536, 65_536],
    [100_000, 12_345],
    [12, 1_048_577],
  ])('of %i and %i bytes is that of the whole', (first, second) => {
    const [a, b] = [randomBytes(first), randomBytes(second)];
    expect(combineCrc(crc32(a), crc32(b), second)).toBe(crc32(Buffer.concat([a, b])));
  });

  it.each(['none', 'deflate'] as Compression[])('is told with an object (%s)', async (coding) => {
    const codec = new BlobCodec('disk', coding);
    const identity = { kind: BlobKind.segment, number: 5, n: 4, epoch: 1, writer: '00'.repeat(8) };
    const frames = [randomBytes(64), Buffer.alloc(65_536, 7), randomBytes(65_536), Buffer.alloc(0)];
    const { parts, crc, header } = await codec.encode(identity, [...frames, randomBytes(999)]);
    expect(crc).toBe(crc32(Buffer.concat(parts)));
    const empty = await codec.encode(identity, []);
    expect(empty.crc).toBe(crc32(Buffer.concat(empty.parts)));
    expect(header.length).toBe(Buffer.concat(parts).length);
  });
});
