// SPDX-License-Identifier: Apache-2.0
/**
 * A sequence on the kernel that a scenario runs on, compared with its fixture. The line `fixture NAME JSON` that the
 * program prints is what npm run record:fidelity makes the fixture of.
 */
import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import type { Kit } from '../kernel/harness/kit.js';
import { sequences } from './sequences.js';

/** @throws AssertionError where the kernel does something else */
export async function compareWithFixture(k: Kit, name: string): Promise<void> {
  const file = `test/fidelity/fixtures/${name}.json`;
  const output = await k.run('fidelity', [name]);
  const recorded = new RegExp(`^fixture ${name} (.*)$`, 'm').exec(output)?.[1] ?? 'null';
  if (!sequences[name]?.removes) await k.configfs.remove(k.configfs.find(name));
  const expected = existsSync(file) ? JSON.parse(readFileSync(file, 'utf8')) : undefined;
  assert.deepEqual(JSON.parse(recorded), expected, name);
}
