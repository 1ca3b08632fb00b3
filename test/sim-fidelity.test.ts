// SPDX-License-Identifier: Apache-2.0
/**
 * The simulated kernel does what a real one did: the sequences of test/fidelity, entry by entry. Recorded
 * from user-mode Linux 6.1; `npm run record:fidelity` records anew.
 */
import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { sequences } from './fidelity/sequences.js';
import { SimulatedWorld } from './fidelity/simulated.js';

test.each(Object.entries(sequences))('%s', async (name, { settings, run }) => {
  const file = new URL(`./fidelity/fixtures/${name}.json`, import.meta.url);
  const recorded = JSON.parse(readFileSync(file, 'utf8')) as object[];
  const world = new SimulatedWorld(settings);
  try {
    await run(world);
  } finally {
    world.close();
  }
  expect(world.notes).toEqual(recorded);
});
