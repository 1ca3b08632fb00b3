// SPDX-License-Identifier: Apache-2.0
/**
 * Every source file says its licence in its first line (behind `#!`), as an SPDX tag: GPL-2.0-only below kernel/,
 * Apache-2.0 elsewhere. What has no comments (JSON, images), and prose, is covered by REUSE.toml.
 *
 *     node scripts/licences.mjs [--write]
 *
 * Without `--write` it names the files that have no tag, or another one, and fails.
 */
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { extname, join, relative } from 'node:path';
import { projectRoot } from './setup.mjs';

const comments = { '.ts': '//', '.mjs': '//', '.h': '//', '.cc': '//', '.c': '//', '.sh': '#' };
const notOurs = new Set(['node_modules', 'build', 'dist', '.git']);

function* sources(directory) {
  for (const entry of readdirSync(directory, { withFileTypes: true })) {
    const path = join(directory, entry.name);
    if (entry.isDirectory()) {
      if (!notOurs.has(entry.name)) yield* sources(path);
    } else if (entry.isFile() && extname(path) in comments) yield path;
  }
}

const write = process.argv.includes('--write');
const wrong = [];
for (const path of sources(projectRoot)) {
  const file = relative(projectRoot, path);
  const licence = file.startsWith('kernel/') ? 'GPL-2.0-only' : 'Apache-2.0';
  const tag = `${comments[extname(path)]} SPDX-License-Identifier: ${licence}`;
  const text = readFileSync(path, 'utf8');
  const start = text.startsWith('#!') ? text.indexOf('\n') + 1 : 0;
  if (text.slice(start).split('\n', 1)[0] === tag) continue;
  wrong.push(file);
  if (write) writeFileSync(path, `${text.slice(0, start)}${tag}\n${text.slice(start)}`);
}
if (wrong.length > 0 && !write) {
  console.error(`no licence, or another one, in the first line of:\n  ${wrong.join('\n  ')}`);
  console.error('node scripts/licences.mjs --write adds it');
  process.exitCode = 1;
}
