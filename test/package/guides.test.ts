// SPDX-License-Identifier: Apache-2.0
/**
 * Every ```ts block of the guides is a whole program: it compiles, and it runs, on the simulated kernel. What a
 * ```text block right below it says is what it prints. `<!-- before … -->` above a block holds what a reader
 * knows already. What creates or opens
 * a kernel's device is answered by a stand-in: there is no kernel with TCMU here.
 */
import { spawn } from 'node:child_process';
import {
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { build } from 'esbuild';
import { beforeAll, describe, expect, test } from 'vitest';
import { root } from './tarball.js';

/** As a reader's project has it: the blocks are tests beside `src`. */
const folder = join(root, 'build/guides/test');
const guides = [
  ...readdirSync(join(root, 'docs'))
    .filter((name) => name.endsWith('.md'))
    .map((name) => `docs/${name}`),
  ...['README.md', 'CONTRIBUTING.md', 'SECURITY.md'],
];
const source = (guide: string): string => readFileSync(join(root, guide), 'utf8');

interface Block {
  name: string;
  file: string;
  code: string;
  prints: string | undefined;
}

function blocksOf(guide: string): Block[] {
  const pattern =
    /(?:^<!-- before\n([\s\S]*?)\n-->\n+)?^```ts\n([\s\S]*?)^```\n(?:\n```text\n([\s\S]*?)^```)?/gm;
  return [...source(guide).matchAll(pattern)].map(([, before, code = '', prints], index) => {
    const file = `${guide.replaceAll(/[/.]/g, '-')}-${index + 1}.ts`;
    return {
      name: `${guide}, block ${index + 1}`,
      file,
      code: [before, code].filter(Boolean).join('\n'),
      prints,
    };
  });
}

const blocks = guides.flatMap(blocksOf);

beforeAll(async () => {
  rmSync(dirname(folder), { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  for (const { file, code } of blocks) writeFileSync(join(folder, file), `${code}\nexport {};\n`);
  const guideShims = join(import.meta.dirname, 'guide-shims');
  cpSync(join(guideShims, 'my-store.ts'), join(folder, '../src/my-store.ts'));
  await build({
    entryPoints: blocks.map(({ file }) => join(folder, file)),
    outdir: join(folder, 'out'),
    bundle: true,
    platform: 'node',
    format: 'esm',
    target: 'node20',
    outExtension: { '.js': '.mjs' },
    logLevel: 'warning',
    plugins: [
      {
        name: 'guides',
        setup(build) {
          const dist = (name: string) => ({ path: join(root, 'dist', name), external: true });
          build.onResolve({ filter: /^tcmu(\/|$)/ }, ({ path, importer }) => {
            if (/^tcmu(\/target)?$/.test(path) && importer.startsWith(folder))
              return { path: join(guideShims, `${path.split('/').at(-1)}.ts`) };
            return dist(`${path === 'tcmu' ? 'index' : path.slice('tcmu/'.length)}.js`);
          });
          build.onResolve({ filter: /^vitest$/ }, () => ({ path: join(guideShims, 'vitest.ts') }));
        },
      },
    ],
  });
});

test('the guides have blocks', () => {
  // The pattern must not lose them silently.
  const fences = guides.flatMap(
    (guide) => source(guide).match(/^```(ts|typescript|js|javascript)\b.*$/gm) ?? [],
  );
  expect(fences.filter((fence) => fence !== '```ts')).toEqual([]);
  expect(blocks.length).toBe(fences.length);
  expect(blocks.length).toBeGreaterThan(15);
});

test('every block compiles', async () => {
  const paths: Record<string, string[]> = {
    tcmu: [join(root, 'lib/index.ts')],
  };
  for (const entry of ['scsi', 'store', 'target', 'sim', 'program'])
    paths[`tcmu/${entry}`] = [join(root, `lib/${entry}/index.ts`)];
  const config = {
    extends: join(root, 'tsconfig.json'),
    compilerOptions: {
      paths,
      noPropertyAccessFromIndexSignature: false,
      typeRoots: [join(root, 'node_modules/@types')],
    },
    include: [],
    files: blocks.map(({ file }) => join(folder, file)),
  };
  writeFileSync(join(folder, 'package.json'), '{ "type": "module" }');
  writeFileSync(join(folder, 'tsconfig.json'), JSON.stringify(config));
  const { code, output } = await run(
    'node_modules/typescript/bin/tsc',
    '-p',
    join(folder, 'tsconfig.json'),
  );
  expect({ code, output }).toEqual({ code: 0, output: '' });
});

test.concurrent.each(blocks)('$name runs', async ({ file, prints }) => {
  const { code, output } = await run(join(folder, 'out', file.replace(/ts$/, 'mjs')));
  expect({ code, output: prints === undefined ? undefined : output }).toEqual({
    code: 0,
    output: prints,
  });
});

describe.each(guides)('%s', (guide) => {
  test('its links lead somewhere', () => {
    const text = source(guide).replaceAll(/^```[\s\S]*?^```/gm, '');
    const broken = [...text.matchAll(/\]\(([^)\s]+)\)/g)]
      .map(([, target = '']) => target)
      .filter((target) => !/^[a-z]+:/.test(target))
      .filter((target) => {
        const [path = '', anchor] = target.split('#');
        const file = path === '' ? join(root, guide) : resolve(root, dirname(guide), path);
        if (!existsSync(file)) return true;
        return anchor !== undefined && !headings(readFileSync(file, 'utf8')).includes(anchor);
      });
    expect(broken).toEqual([]);
  });
});

test('every guide is reached from docs/README.md', () => {
  const index = source('docs/README.md');
  const lost = guides.filter((guide) => guide.startsWith('docs/') && !guide.endsWith('/README.md'));
  expect(lost.filter((guide) => !index.includes(`(${relative('docs', guide)})`))).toEqual([]);
});

test('errors.md has every code, and no other', () => {
  const used = new Set<string>();
  const problems = /'([A-Z_]+)'/g;
  const explain = readFileSync(join(root, 'lib/target/explain.ts'), 'utf8');
  const union = explain.slice(
    explain.indexOf('type TargetProblem'),
    explain.indexOf('/** What an errno'),
  );
  for (const [, name] of union.matchAll(problems)) used.add(`ERR_TCMU_TARGET_${name}`);
  for (const top of ['lib', 'addon']) {
    for (const path of readdirSync(join(root, top), { recursive: true, encoding: 'utf8' })) {
      if (!/\.(ts|cc|h)$/.test(path) || path.includes('test/')) continue;
      const text = readFileSync(join(root, top, path), 'utf8');
      for (const [code] of text.matchAll(/ERR_TCMU_[A-Z_]*[A-Z]/g)) used.add(code);
    }
  }
  // Families, as comments name them.
  for (const prefix of ['ERR_TCMU_TARGET', 'ERR_TCMU_RING', 'ERR_TCMU_NBD']) {
    if (!source('docs/errors.md').includes(`\`${prefix}\``)) used.delete(prefix);
  }
  const listed = [...source('docs/errors.md').matchAll(/^\| `(ERR_TCMU_\w+)`/gm)].map(
    ([, code]) => code,
  );
  expect(listed.toSorted()).toEqual([...used].toSorted());
});

function headings(markdown: string): string[] {
  return [...markdown.matchAll(/^#+ (.+)$/gm)].map(([, title = '']) =>
    title
      .toLowerCase()
      .replaceAll(/[^\w\- ]/g, '')
      .replaceAll(' ', '-'),
  );
}

function run(...args: string[]): Promise<{ code: number | null; output: string }> {
  return new Promise((resolve) => {
    const { NOTIFY_SOCKET: _, ...rest } = process.env;
    const child = spawn(process.execPath, args, {
      cwd: root,
      env: { ...rest, STATE_DIRECTORY: folder },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    let output = '';
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', (text: string) => {
        output += text;
      });
    }
    child.once('close', (code) => resolve({ code, output }));
  });
}
