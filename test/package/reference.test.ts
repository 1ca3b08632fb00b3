// SPDX-License-Identifier: Apache-2.0
/** The API reference builds without a warning, says something of every export, and its pages' links lead somewhere. */
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { beforeAll, expect, test } from 'vitest';
import { root } from './tarball.js';

const folder = join(root, 'build/reference');
let built: { status: number | null; output: string };

beforeAll(() => {
  const args = ['node_modules/typedoc/bin/typedoc', '--out', folder];
  const { status, stdout, stderr } = spawnSync(process.execPath, args, {
    cwd: root,
    encoding: 'utf8',
    env: { ...process.env, NO_COLOR: '1' },
  });
  built = { status, output: `${stdout}${stderr}` };
});

test('no warning: every export and member is documented, every link of a comment is known', () => {
  expect(built.output).toMatch(/^\[info\] html generated at \S+\s*$/);
  expect(built.status).toBe(0);
});

test('every link between pages leads to a page, and to a place in it', () => {
  const pages = readdirSync(folder, { recursive: true, encoding: 'utf8' }).filter((path) =>
    path.endsWith('.html'),
  );
  expect(pages.length).toBeGreaterThan(100);
  const places = new Map<string, Set<string>>();
  const placesOf = (file: string): Set<string> => {
    let known = places.get(file);
    if (known === undefined) {
      const ids = readFileSync(file, 'utf8').matchAll(/\bid="([^"]+)"/g);
      known = new Set([...ids].map(([, id = '']) => id));
      places.set(file, known);
    }
    return known;
  };
  const broken: string[] = [];
  for (const page of pages) {
    const text = readFileSync(join(folder, page), 'utf8');
    for (const [, , link = ''] of text.matchAll(/\b(href|src)="([^"]+)"/g)) {
      if (/^(https?|mailto|data):/.test(link)) continue;
      const [path = '', anchor = ''] = decodeURI(link).split('#');
      const file =
        path === '' ? join(folder, page) : resolve(folder, dirname(page), path.split('?')[0] ?? '');
      const found =
        existsSync(file) &&
        (anchor === '' || !file.endsWith('.html') || placesOf(file).has(anchor));
      if (!found) broken.push(`${page}: ${link}`);
    }
  }
  expect(broken).toEqual([]);
});
