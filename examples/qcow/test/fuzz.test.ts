// SPDX-License-Identifier: Apache-2.0
/** A bounded run of the fuzzer, the same cases every time. A longer one with others: `npm run fuzz`. */
import { expect, test } from 'vitest';
import { describeCase, makeCase, makeSeeds, mutate, type Random, runCase } from './fuzz-image.js';
import { scratch } from './util.js';

const CASES = Number(process.env['TCMU_FUZZ_CASES'] ?? 1500);
const SEED = Number(process.env['TCMU_FUZZ_SEED'] ?? 1);
const dir = scratch();

function generator(seed: number): Random {
  let state = (seed * 2654435761) >>> 0;
  return () => {
    state = (Math.imul(state ^ (state >>> 15), 2246822519) + 3266489917) >>> 0;
    return ((state ^ (state >>> 13)) >>> 0) / 2 ** 32;
  };
}

test('mutated images give errors of ours or work', { timeout: 60_000 + CASES * 200 }, async () => {
  const seeds = makeSeeds(dir);
  for (const image of seeds.values()) await runCase(image);
  const before = process.memoryUsage().rss;
  for (let i = 0; i < CASES; i++) {
    const random = generator(SEED * 1_000_003 + i);
    const wanted = makeCase(seeds, random);
    await runCase(mutate(seeds, wanted)).catch((cause: unknown) => {
      throw new Error(`case ${i} of seed ${SEED}: ${describeCase(wanted)}: ${cause}`, { cause });
    });
  }
  expect(process.memoryUsage().rss - before).toBeLessThan(512 * 2 ** 20);
});
