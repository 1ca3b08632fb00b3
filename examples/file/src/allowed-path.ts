// SPDX-License-Identifier: Apache-2.0
/**
 * Keeps a path given by somebody less trusted inside one directory. The check is made twice: on the
 * resolved path before opening, so that nothing outside is touched, and on what the descriptor really
 * refers to afterwards, so that a folder or link swapped in between gains nothing. Hard links are the
 * kernel's affair (fs.protected_hardlinks).
 */
import { readlink, realpath } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { ArgumentError, FileError } from 'tcmu';

const CONTROL = /[\x00-\x1f\x7f]/;

/** @throws ArgumentError when `text` has control characters: it goes into configfs, sysfs and logs. */
export function checkText(what: string, text: string): void {
  if (CONTROL.test(text)) {
    throw new ArgumentError(
      `tcmu: ${what} ${JSON.stringify(text)} has control characters; choose another one`,
    );
  }
}

/**
 * The real path of `path`, which need not exist itself (its folder must).
 * @throws ArgumentError when `directory` is given and the path leads out of it; FileError
 *   `ERR_TCMU_IO` (ENOENT, ELOOP, EACCES) when a folder on the way can't be resolved.
 */
export async function resolvePath(path: string, directory: string | undefined): Promise<string> {
  checkText('path', path);
  const real = await resolveLinks(resolve(path));
  if (directory !== undefined) assertInside(real, await folder(directory), path);
  return real;
}

/** To be called with a fresh descriptor before anything is done with it. @throws ArgumentError */
export async function checkOpened(fd: number, path: string, directory: string): Promise<void> {
  assertInside(await readlink(`/proc/self/fd/${fd}`), await folder(directory), path);
}

async function resolveLinks(path: string): Promise<string> {
  try {
    return await realpath(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw unresolved(path, error);
    return join(await folder(dirname(path)), basename(path));
  }
}

function folder(path: string): Promise<string> {
  return realpath(path).catch((error: unknown) => {
    throw unresolved(path, error);
  });
}

function unresolved(path: string, cause: unknown): FileError {
  const errno = (cause as NodeJS.ErrnoException).code;
  return new FileError(
    'ERR_TCMU_IO',
    `tcmu: resolve ${path}: ${errno}; check that the folder exists, may be entered, and that links lead somewhere`,
    { operation: 'resolve', path, errno, cause },
  );
}

function assertInside(real: string, directory: string, asked: string): void {
  if (real.startsWith(directory === '/' ? '/' : `${directory}/`)) return;
  throw new ArgumentError(
    `tcmu: open ${asked}: it leads to ${real}, outside the allowed directory ${directory}`,
    { operation: 'open', path: asked },
  );
}
