// SPDX-License-Identifier: Apache-2.0
/**
 * Turns an errno of configfs or sysfs into a `TargetError` that says what was being done where and what
 * to do. One place, so that every failure of `tcmu/target` reads the same.
 *
 * Codes:
 * - `ERR_TCMU_TARGET_NO_CONFIGFS`: configfs is not mounted, or the target core is not loaded.
 * - `ERR_TCMU_TARGET_NO_MODULE`: a kernel module is missing; the message names it.
 * - `ERR_TCMU_TARGET_PERMISSION`: not root, or a container that may not.
 * - `ERR_TCMU_TARGET_NAME_TAKEN`: there is one of that name.
 * - `ERR_TCMU_TARGET_BUSY`: still in use; the message names the user where it can be found.
 * - `ERR_TCMU_TARGET_NOT_FOUND`: the backstore, target or disk is not there (any more).
 * - `ERR_TCMU_TARGET_UNSUPPORTED`: the kernel has no such attribute: too old.
 * - `ERR_TCMU_TARGET_REJECTED`: the kernel refused the value.
 * - `ERR_TCMU_TARGET_NO_EFFECT`: the kernel took the value and does something else.
 * - `ERR_TCMU_TARGET_NO_MEMORY`: the kernel has no memory for it.
 * - `ERR_TCMU_TARGET_NO_DEVICE`: the device node or the disk did not appear in time.
 * - `ERR_TCMU_TARGET_STUCK`: the kernel did not come back in time; see `rescueNetlink`.
 * - `ERR_TCMU_TARGET_NETLINK`: the netlink channel failed.
 * - `ERR_TCMU_TARGET_FAILED`: any other errno.
 */
import { statfsSync, statSync } from 'node:fs';
import { dirname } from 'node:path';
import { errnoOf, TargetError } from '../errors.js';

/** Last part of an `ERR_TCMU_TARGET_*` code. */
export type TargetProblem =
  | 'NO_CONFIGFS'
  | 'NO_MODULE'
  | 'PERMISSION'
  | 'NAME_TAKEN'
  | 'BUSY'
  | 'NOT_FOUND'
  | 'UNSUPPORTED'
  | 'REJECTED'
  | 'NO_EFFECT'
  | 'NO_MEMORY'
  | 'NO_DEVICE'
  | 'STUCK'
  | 'NETLINK'
  | 'FAILED';

/** What an errno means at one particular place, `*` for all others: overrides the general meaning. */
export type Advice = Readonly<Record<string, readonly [problem: TargetProblem, advice: string]>>;

/** f_type of configfs (CONFIGFS_MAGIC, fs/configfs/configfs_internal.h). */
const CONFIGFS_MAGIC = 0x62656570;

const GENERAL: Advice = {
  EEXIST: ['NAME_TAKEN', 'there is one already: choose another name, or open the existing one'],
  EBUSY: ['BUSY', 'it is still in use: detach it first'],
  ENOTEMPTY: ['BUSY', 'something is still below it: remove that first'],
  EINVAL: ['REJECTED', 'the kernel refused it: its log (dmesg) says why'],
  ENAMETOOLONG: ['REJECTED', 'the name is too long for the kernel'],
  EROFS: ['PERMISSION', 'it is mounted read-only here, as in an unprivileged container'],
  ENOMEM: ['NO_MEMORY', 'the kernel has no memory left for it'],
  ENOSPC: ['NO_MEMORY', 'the kernel has no room left for it'],
  ENODEV: ['NOT_FOUND', 'it has no device behind it (any more)'],
};

/** Builds a `TargetError` of our own, without an errno to explain. */
export function targetError(
  problem: TargetProblem,
  operation: string,
  path: string,
  advice: string,
  cause?: unknown,
): TargetError {
  const errno = errnoOf(cause);
  return new TargetError(
    `ERR_TCMU_TARGET_${problem}`,
    `tcmu: ${operation} ${path}: ${errno === undefined ? '' : `${errno}; `}${advice}`,
    { operation, path, errno, cause },
  );
}

/**
 * @param operation as it reads before the path: `create`, `write "1" to`
 * @param root configfs' target folder
 */
export function explain(
  root: string,
  operation: string,
  path: string,
  error: unknown,
  advice: Advice = {},
): TargetError {
  const errno = errnoOf(error) ?? 'failed';
  const [problem, text] =
    advice[errno] ?? advice['*'] ?? GENERAL[errno] ?? other(root, operation, path, errno);
  return targetError(problem, operation, path, text, error);
}

function other(
  root: string,
  operation: string,
  path: string,
  errno: string,
): readonly [TargetProblem, string] {
  if (errno === 'EACCES' || errno === 'EPERM') {
    return process.geteuid?.() === 0
      ? ['PERMISSION', 'root is not enough here: a container or a security policy forbids it']
      : ['PERMISSION', 'run this as root'];
  }
  if (errno !== 'ENOENT') return ['FAILED', "the kernel's log (dmesg) may say why"];
  if (path.startsWith(`${root}/`) && !exists(root)) return noConfigfs(root);
  // Only attributes are read and written, and they come with their folder.
  return /^(read|write) /.test(`${operation} `) && exists(dirname(path))
    ? ['UNSUPPORTED', 'this kernel has no such attribute: it is too old for this option']
    : ['NOT_FOUND', `${nearestMissing(path)} does not exist (any more)`];
}

function noConfigfs(root: string): readonly [TargetProblem, string] {
  const mount = dirname(root);
  return exists(mount) && statfsSync(mount).type === CONFIGFS_MAGIC
    ? ['NO_CONFIGFS', 'the target core is not loaded: modprobe target_core_mod']
    : ['NO_CONFIGFS', `configfs is not mounted: mount -t configfs none ${mount}`];
}

function nearestMissing(path: string): string {
  let missing = path;
  while (missing !== dirname(missing) && !exists(dirname(missing))) missing = dirname(missing);
  return missing;
}

function exists(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false }) !== undefined;
}
