// SPDX-License-Identifier: Apache-2.0
import {
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { realpath } from 'node:fs/promises';
import { join, relative } from 'node:path';
import { BackingFile } from 'tcmu';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { checkOpened, resolvePath } from '../src/allowed-path.js';
import { FileStore } from '../src/file-store.js';
import { failure, scratch } from './util.js';

const top = await realpath(scratch());
const allowed = join(top, 'allowed');
const outside = join(top, 'outside');
const beside = join(top, 'allowed-not');
for (const dir of [allowed, join(allowed, 'sub'), outside, beside]) mkdirSync(dir);
for (const dir of [allowed, join(allowed, 'sub'), outside, beside]) {
  writeFileSync(join(dir, 'disk'), Buffer.alloc(4096, 1));
}
symlinkSync('../outside/disk', join(allowed, 'out-link'));
symlinkSync('../outside', join(allowed, 'out-dir'));
symlinkSync('sub/disk', join(allowed, 'in-link'));
symlinkSync('../outside/new', join(allowed, 'dangling'));
symlinkSync('loop', join(allowed, 'loop'));
symlinkSync('allowed', join(top, 'alias'));

afterEach(() => {
  vi.restoreAllMocks();
});

describe('an allowed directory', () => {
  it.each([
    ['allowed/disk', 'allowed/disk'],
    ['allowed/sub/../disk', 'allowed/disk'],
    ['allowed/in-link', 'allowed/sub/disk'],
    ['allowed/new', 'allowed/new'],
    ['allowed/sub/new', 'allowed/sub/new'],
    ['alias/disk', 'allowed/disk'],
    ['outside/../allowed/disk', 'allowed/disk'],
  ])('lets %s in', async (path, real) => {
    for (const directory of [allowed, `${allowed}/`, join(top, 'alias'), relative('.', allowed)]) {
      expect(await resolvePath(join(top, path), directory)).toBe(join(top, real));
    }
    expect(await resolvePath(relative('.', join(top, path)), allowed)).toBe(join(top, real));
  });

  it.each([
    'outside/disk',
    'allowed/../outside/disk',
    'allowed/out-link',
    'allowed/out-dir/disk',
    'allowed/out-dir/new',
    'allowed-not/disk',
    'allowed',
    'allowed/sub/..',
    '.',
  ])('keeps %s out', async (path) => {
    const error = await failure(() => resolvePath(join(top, path), allowed));
    expect(error).toMatchObject({ code: 'ERR_TCMU_INVALID_ARGUMENT' });
    expect(error.message).toContain(`outside the allowed directory ${allowed}`);
  });

  it('may be the root', async () => {
    expect(await resolvePath(join(outside, 'disk'), '/')).toBe(join(outside, 'disk'));
  });

  it('fails when the directory or a folder on the way is missing, or links go round', async () => {
    expect(await failure(() => resolvePath(join(allowed, 'disk'), join(top, 'no')))).toMatchObject({
      errno: 'ENOENT',
    });
    expect(await failure(() => resolvePath(join(allowed, 'no/disk'), allowed))).toMatchObject({
      errno: 'ENOENT',
    });
    expect(await failure(() => resolvePath(join(allowed, 'loop'), allowed))).toMatchObject({
      errno: 'ELOOP',
    });
  });

  it('is not left through a link that leads to nothing yet', async () => {
    const error = await failure(() =>
      FileStore.open(join(allowed, 'dangling'), { size: 4096, allowedDirectory: allowed }),
    );
    expect(error).toMatchObject({ errno: 'ELOOP' });
    expect(existsSync(join(outside, 'new'))).toBe(false);
  });

  it('is not left when a folder is swapped between the check and the opening', async () => {
    const real = BackingFile.open.bind(BackingFile);
    const sub = join(allowed, 'sub');
    for (const [name, options] of [
      ['disk', {}],
      ['fresh', { size: 4096 }],
    ] as const) {
      const swapped = vi.spyOn(BackingFile, 'open').mockImplementation(async (...args) => {
        if (!existsSync(join(allowed, 'moved'))) {
          renameSync(sub, join(allowed, 'moved'));
          symlinkSync(outside, sub);
        }
        return real(...args);
      });
      const error = await failure(() =>
        FileStore.open(join(sub, name), { ...options, allowedDirectory: allowed }),
      );
      expect(error.message).toContain(`leads to ${outside}/${name}, outside`);
      swapped.mockRestore();
      renameSync(sub, join(top, 'used-link'));
      renameSync(join(allowed, 'moved'), sub);
    }
    // What was opened, and even made, there by mistake is as it was.
    expect(readFileSync(join(outside, 'disk'))).toEqual(Buffer.alloc(4096, 1));
    expect(existsSync(join(outside, 'fresh'))).toBe(false);
  });

  it('is not left when the file itself is swapped for a link', async () => {
    const real = BackingFile.open.bind(BackingFile);
    const path = join(allowed, 'victim');
    writeFileSync(path, Buffer.alloc(4096));
    vi.spyOn(BackingFile, 'open').mockImplementation(async (...args) => {
      renameSync(path, `${path}.moved`);
      symlinkSync(join(outside, 'disk'), path);
      return real(...args);
    });
    expect(await failure(() => FileStore.open(path, { allowedDirectory: allowed }))).toMatchObject({
      errno: 'ELOOP',
    });
    expect(statSync(join(outside, 'disk')).size).toBe(4096);
  });

  it('is checked against what a descriptor refers to', async () => {
    await using inside = await BackingFile.open(join(allowed, 'disk'));
    await using other = await BackingFile.open(join(outside, 'disk'));
    await checkOpened(inside.fd, 'x', allowed);
    expect(await failure(() => checkOpened(other.fd, 'x', allowed))).toMatchObject({
      code: 'ERR_TCMU_INVALID_ARGUMENT',
    });
  });
});
