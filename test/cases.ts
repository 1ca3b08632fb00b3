// SPDX-License-Identifier: Apache-2.0
/**
 * How a property of fast-check is run: the same cases every time, so that a change answers for what it
 * breaks and for nothing else. `npm run test:random` looks for new ones: other cases each time, ten times
 * as many; a failure prints its seed.
 */
import type { Parameters } from 'fast-check';

const random = process.env['TCMU_TEST_RANDOM'] === '1';

/** Parameters for `fc.assert`. */
export function cases(numRuns: number): Pick<Parameters, 'numRuns' | 'seed'> {
  return random ? { numRuns: 10 * numRuns } : { numRuns, seed: 20261123 };
}
