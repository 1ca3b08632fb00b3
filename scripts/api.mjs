// SPDX-License-Identifier: Apache-2.0
/**
 * The public surface of every entry, written down in etc/*.api.md, so that a change of it shows in a diff.
 *
 *     npm run api                      builds lib and writes the reports
 *     node scripts/api.mjs --check     compares them with dist/ as it is; exit code 1 when they differ
 */
import { copyFileSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { Extractor, ExtractorConfig } from '@microsoft/api-extractor';
import { projectRoot } from './setup.mjs';

const check = process.argv.includes('--check');
const made = join(projectRoot, 'build/api');
const kept = join(projectRoot, 'etc');
rmSync(made, { recursive: true, force: true });
mkdirSync(made, { recursive: true });

const { exports } = JSON.parse(readFileSync(join(projectRoot, 'package.json'), 'utf8'));
const names = [];
for (const [subpath, target] of Object.entries(exports)) {
  if (typeof target === 'string') continue;
  const name = subpath === '.' ? 'tcmu' : `tcmu-${subpath.slice(2)}`;
  names.push(`${name}.api.md`);
  const config = ExtractorConfig.prepare({
    configObjectFullPath: join(projectRoot, 'api-extractor.json'),
    packageJsonFullPath: join(projectRoot, 'package.json'),
    configObject: {
      projectFolder: projectRoot,
      mainEntryPointFilePath: join(projectRoot, target.import.types),
      compiler: {
        overrideTsconfig: {
          compilerOptions: {
            target: 'ES2023',
            lib: ['ES2023', 'ESNext.Disposable'],
            module: 'NodeNext',
            moduleResolution: 'NodeNext',
            strict: true,
            skipLibCheck: true,
            types: ['node'],
          },
          include: ['dist'],
        },
      },
      apiReport: {
        enabled: true,
        reportFileName: `${name}.api.md`,
        reportFolder: made,
        reportTempFolder: join(made, 'temp'),
      },
      docModel: { enabled: false },
      dtsRollup: { enabled: false },
      tsdocMetadata: { enabled: false },
      messages: {
        // What api-extractor has to say about the comments is typedoc's business here.
        extractorMessageReporting: {
          default: { logLevel: 'none' },
        },
        tsdocMessageReporting: { default: { logLevel: 'none' } },
      },
    },
  });
  const result = Extractor.invoke(config, {
    localBuild: true,
    messageCallback: (message) => {
      message.handled = message.logLevel !== 'error';
    },
  });
  if (!result.succeeded) {
    console.error(`api: ${target.import.types} can't be analysed`);
    process.exit(1);
  }
}

const read = (path) => (existsSync(path) ? readFileSync(path, 'utf8') : '');
const stale = existsSync(kept) ? readdirSync(kept).filter((name) => !names.includes(name)) : [];
const changed = names.filter((name) => read(join(made, name)) !== read(join(kept, name)));
if (!check) {
  mkdirSync(kept, { recursive: true });
  for (const name of changed) copyFileSync(join(made, name), join(kept, name));
  for (const name of stale) rmSync(join(kept, name));
  console.log(changed.length === 0 ? 'api: unchanged' : `api: wrote ${changed.join(' ')}`);
} else if (changed.length + stale.length > 0) {
  for (const name of changed) {
    // Lines alone, in both directions: enough to see what is meant without a diff program.
    const [before, after] = [kept, made].map((folder) => read(join(folder, name)).split('\n'));
    console.error(`etc/${name}`);
    for (const line of before) if (!after.includes(line)) console.error(`  - ${line}`);
    for (const line of after) if (!before.includes(line)) console.error(`  + ${line}`);
  }
  for (const name of stale) console.error(`etc/${name}: no such entry any more`);
  console.error(
    'The public surface is not what etc/ says. If that is meant: npm run api, and commit etc/.',
  );
  process.exitCode = 1;
} else console.log(`api: ${names.length} reports hold`);
