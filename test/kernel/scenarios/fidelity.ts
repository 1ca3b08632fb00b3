/** The simulated kernel is compared with fixtures; here these are compared with the kernel. */
import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import { sequences } from '../../fidelity/sequences.js';
import { scenario } from '../harness/scenario.js';

export default [
  scenario({
    name: 'fidelity.fixtures',
    about:
      'test/fidelity/fixtures are what this kernel does (npm run record:fidelity makes them anew)',
    timeoutSeconds: 300,
    async run(k) {
      const different: string[] = [];
      for (const name of Object.keys(sequences)) {
        const file = `test/fidelity/fixtures/${name}.json`;
        try {
          const output = await k.run('fidelity', [name]);
          const recorded = new RegExp(`^fixture ${name} (.*)$`, 'm').exec(output)?.[1] ?? 'null';
          await k.configfs.remove(k.configfs.find(name));
          const expected = existsSync(file) ? JSON.parse(readFileSync(file, 'utf8')) : undefined;
          assert.deepEqual(JSON.parse(recorded), expected, name);
        } catch (error) {
          different.push(name);
          k.log((error as Error).message);
        }
      }
      assert.deepEqual(different, [], 'the fixtures of these are not what the kernel does');
    },
  }),
];
