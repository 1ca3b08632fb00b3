// SPDX-License-Identifier: Apache-2.0
/** Finds the scenarios: every bundled file of `scenarios/` exports an array of them by default. */
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import type { Scenario } from './scenario.js';

/** @param dir where the bundles lie */
export async function loadScenarios(dir: string): Promise<Scenario[]> {
  const scenarios: Scenario[] = [];
  for (const file of readdirSync(dir)
    .filter((name) => name.endsWith('.js'))
    .sort()) {
    const module = (await import(pathToFileURL(join(dir, file)).href)) as { default: Scenario[] };
    scenarios.push(...module.default);
  }
  const names = scenarios.map((scenario) => scenario.name);
  const twice = names.find((name, index) => names.indexOf(name) !== index);
  if (twice !== undefined) throw new Error(`two scenarios are named ${twice}`);
  return scenarios;
}
