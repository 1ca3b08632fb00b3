// SPDX-License-Identifier: Apache-2.0
/**
 * package-lock.json is whole: every dependency that a package in it names has an entry, also the optional ones
 * for other systems and processors, which npm leaves out when it writes the file anew where node_modules is there
 * already. And it names no registry but the public one, for which npm takes the one that is set.
 *
 *     node scripts/lock.mjs      part of `npm run check`
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { projectRoot } from './setup.mjs';

const { packages } = JSON.parse(readFileSync(join(projectRoot, 'package-lock.json'), 'utf8'));

/** As Node resolves it: beside the package, then in each folder above. */
function entryOf(path, name) {
  for (let folder = path; ; folder = folder.slice(0, Math.max(0, folder.lastIndexOf('/')))) {
    const found = packages[`${folder === '' ? '' : `${folder}/`}node_modules/${name}`];
    if (found !== undefined || folder === '') return found;
  }
}

const problems = [];
for (const [path, entry] of Object.entries(packages)) {
  if (/:\/\/(?!registry\.npmjs\.org\/)/.test(entry.resolved ?? ''))
    problems.push(`${path} comes from another registry: ${entry.resolved}`);
  const { dependencies, optionalDependencies } = entry;
  for (const [name, wanted] of Object.entries({ ...dependencies, ...optionalDependencies })) {
    const found = entryOf(path, name);
    if (found === undefined) problems.push(`${path} wants ${name}@${wanted}: no entry`);
    else if (/^\d+\.\d+\.\d+$/.test(wanted) && found.version !== wanted)
      problems.push(`${path} wants ${name}@${wanted}: the entry is ${found.version}`);
  }
}
for (const problem of problems) console.error(`package-lock.json: ${problem}`);
process.exitCode = problems.length > 0 ? 1 : 0;
