// SPDX-License-Identifier: Apache-2.0
/** The simulated kernel is compared with fixtures; here these are compared with the kernel. */
import assert from 'node:assert/strict';
import { compareWithFixture } from '../../fidelity/compare.js';
import { sequences } from '../../fidelity/sequences.js';
import { scenario } from '../harness/scenario.js';

export default [
  scenario({
    name: 'fidelity.fixtures',
    about:
      'test/fidelity/fixtures are what this kernel does (npm run record:fidelity makes them anew)',
    timeoutSeconds: 400,
    async run(k) {
      const different: string[] = [];
      for (const [name, { settings }] of Object.entries(sequences)) {
        // No fabric takes one to the target core; test/zero-copy has a module that does.
        if (settings.bidirectional) continue;
        try {
          await compareWithFixture(k, name);
        } catch (error) {
          different.push(name);
          k.log((error as Error).message);
        }
      }
      assert.deepEqual(different, [], 'the fixtures of these are not what the kernel does');
    },
  }),
];
