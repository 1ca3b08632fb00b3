// SPDX-License-Identifier: Apache-2.0
/** The cache in memory: what it keeps, and that it never takes more than it may. */
import { describe, expect, it } from 'vitest';
import { FrameCache } from '../src/engine/frame-cache.js';
import { KiB, MiB } from './support/disk.js';
import { randomNumbers } from './support/random.js';

const frameSize = 4 * KiB;
const frame = (value: number, length = frameSize): Buffer => Buffer.alloc(length, value);

describe('a cache of frames', () => {
  it('keeps as much as it may, the least recently used goes first', () => {
    const cache = new FrameCache(16 * frameSize, frameSize);
    for (let key = 0; key < 16; key++) cache.put(key, frame(key));
    expect(cache.bytes).toBe(16 * frameSize);
    expect(cache.room).toBe(0);
    expect(cache.get(0)?.[0]).toBe(0);
    cache.put(16, frame(16));
    expect(cache.has(0)).toBe(true);
    expect(cache.has(1)).toBe(false);
    expect(cache.get(16)?.equals(frame(16))).toBe(true);
  });

  it('has a copy of what was put', () => {
    const cache = new FrameCache(MiB, frameSize);
    const bytes = frame(1);
    cache.put(1, bytes);
    bytes.fill(2);
    expect(cache.get(1)?.equals(frame(1))).toBe(true);
  });

  it('takes back what is only kept for use again before any frame goes', () => {
    let kept = 8 * frameSize;
    const reclaim = () => {
      kept = 0;
    };
    const cache = new FrameCache(16 * frameSize, frameSize, () => kept, reclaim);
    for (let key = 0; key < 8; key++) cache.put(key, frame(key));
    expect(kept).toBe(8 * frameSize);
    for (let key = 8; key < 16; key++) cache.put(key, frame(key));
    expect(kept).toBe(0);
    expect(cache.bytes).toBe(16 * frameSize);
    kept = frameSize;
    cache.trim();
    expect(cache.bytes).toBe(16 * frameSize);
  });

  it('takes no more memory than is left of its limit, whatever comes and goes', () => {
    const limit = 64 * frameSize;
    const random = randomNumbers(7);
    let taken = 0;
    const cache = new FrameCache(limit, frameSize, () => taken);
    const model = new Map<number, number>();
    let kept = 0;
    for (let i = 0; i < 20_000; i++) {
      const key = Math.floor(random() * 200) - 100;
      const kind = random();
      if (kind < 0.6) {
        const length = random() < 0.8 ? frameSize : 1 + Math.floor(random() * frameSize);
        cache.put(key, frame(i % 251, length));
        model.set(key, i % 251);
      } else if (kind < 0.7) cache.delete(key);
      else if (kind < 0.75) {
        taken = Math.floor(random() * limit);
        cache.trim();
      } else {
        const seen = cache.get(key);
        if (seen === undefined) continue;
        kept++;
        expect(seen.every((byte) => byte === model.get(key))).toBe(true);
      }
      expect(cache.memory).toBeLessThanOrEqual(limit - taken);
      expect(cache.bytes).toBeLessThanOrEqual(cache.memory);
    }
    expect(kept).toBeGreaterThan(500);
  });

  it('gives memory back when others take it, and has it again after', () => {
    let taken = 0;
    const cache = new FrameCache(64 * frameSize, frameSize, () => taken);
    for (let key = 0; key < 64; key++) cache.put(key, frame(1));
    taken = 48 * frameSize;
    cache.trim();
    expect(cache.memory).toBeLessThanOrEqual(16 * frameSize);
    expect(cache.bytes).toBeGreaterThan(8 * frameSize);
    taken = 0;
    for (let key = 0; key < 64; key++) cache.put(key, frame(2));
    expect(cache.bytes).toBe(64 * frameSize);
  });
});
