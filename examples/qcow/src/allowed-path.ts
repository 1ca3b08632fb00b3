// SPDX-License-Identifier: Apache-2.0
/**
 * Where the files that an image names are, and whether they may be opened. Names come from the image,
 * that is, from whoever made it: with an allowed directory, links are resolved and whatever leads out of
 * it is refused, before opening and once more on what the descriptor refers to.
 */
import { readlink, realpath } from 'node:fs/promises';
import { basename, dirname, isAbsolute, join, resolve } from 'node:path';
import { QcowError } from './errors.js';

/** The path of a file named in the image at `image`: relative names start from the image's folder. */
export function pathFrom(image: string, name: string): string {
  const path = name.startsWith('file:') ? name.slice('file:'.length) : name;
  // As QEMU reads names: a colon before any slash makes it a protocol.
  if (/^[^/]*:/.test(path)) {
    throw new QcowError(
      'ERR_TCMU_QCOW_BACKING',
      `${name} is no file name, but a protocol's address`,
      {
        path: image,
        structure: 'file name',
      },
    );
  }
  return isAbsolute(path) ? path : join(dirname(image), path);
}

/** The real path of `path`, whose folder must exist. @throws QcowError `ERR_TCMU_QCOW_BACKING` */
export async function resolveInside(path: string, directory: string | undefined): Promise<string> {
  let real: string;
  try {
    real = await realpath(path).catch(async (error: NodeJS.ErrnoException) => {
      if (error.code !== 'ENOENT') throw error;
      return join(await realpath(dirname(resolve(path))), basename(path));
    });
  } catch (cause) {
    throw new QcowError(
      'ERR_TCMU_QCOW_BACKING',
      `it can't be found (${(cause as NodeJS.ErrnoException).code})`,
      { path, operation: 'resolve', cause },
    );
  }
  if (directory !== undefined) await assertInside(real, directory, path);
  return real;
}

/** What a fresh descriptor refers to must lie inside, too. */
export async function checkOpened(fd: number, path: string, directory: string): Promise<void> {
  await assertInside(await readlink(`/proc/self/fd/${fd}`), directory, path);
}

async function assertInside(real: string, directory: string, asked: string): Promise<void> {
  const folder = await realpath(directory);
  if (real.startsWith(folder === '/' ? '/' : `${folder}/`)) return;
  throw new QcowError(
    'ERR_TCMU_QCOW_BACKING',
    `it leads to ${real}, outside the allowed directory ${folder}`,
    { path: asked, operation: 'open' },
  );
}
