// SPDX-License-Identifier: Apache-2.0
/**
 * The proof against QEMU: the same random operations on our store and on qemu-io, on images that either
 * of them made, first each on its own image, then each on the other's. After every step both images are
 * clean for `qemu-img check` and for our check, identical for `qemu-img compare`, and read by our store
 * they are what the model says.
 *
 * Here a choice of combinations in which every pair of options meets; all of them: `npm run proof`. TCMU_PROOF=300
 * takes 300 of them by chance, TCMU_PROOF_SEED says which and with what operations.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import * as fc from 'fast-check';
import { test } from 'vitest';
import { allCombinations, describeCombination, pairwise } from './proof-combinations.js';
import { operations, prove } from './proof-peers.js';
import { scratch } from './util.js';

const extent = process.env['TCMU_PROOF'];
const thorough = extent === 'all';
const seed = Number(process.env['TCMU_PROOF_SEED'] ?? 1);
const all = allCombinations();
const chosen = thorough ? all : extent === undefined ? pairwise(all) : some(Number(extent));
const dir = scratch();

function some(count: number) {
  return fc.sample(fc.shuffledSubarray(all, { minLength: count, maxLength: count }), {
    seed,
    numRuns: 1,
  })[0] as typeof all;
}

const limit = { timeout: thorough ? 600_000 : 120_000 };

test.each(chosen.map((c) => [describeCombination(c), c] as const))(
  '%s',
  limit,
  async (_name, c) => {
    await fc.assert(
      fc.asyncProperty(operations(c), operations(c), async (first, second) => {
        const home = mkdtempSync(join(dir, 'proof-'));
        await prove(home, c, first, second);
        rmSync(home, { recursive: true });
      }),
      { seed, numRuns: thorough ? 3 : 1, endOnFailure: extent !== undefined },
    );
  },
);
