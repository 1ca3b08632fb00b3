// SPDX-License-Identifier: Apache-2.0
/**
 * Promises over the addon's queue of file operations. One per environment: the queue's worker jobs
 * are shared by all files and devices of a thread. An operation queued for a command pins that
 * command's memory inside the addon until its result is taken here.
 */
import { getSystemErrorName } from 'node:util';
import { FileError } from '../errors.js';
import { type NativeIo, native } from '../native.js';

interface Waiter {
  operation: string;
  path: string;
  settled(): void;
  resolve(result: number): void;
  reject(error: Error): void;
}

const waiters = new Map<number, Waiter>();

/** The environment's queue. */
export const io: NativeIo = new native.IoQueue(settle);

function settle(count: number): void {
  const { results } = io;
  for (let i = 0; i < count; i++) {
    const id = results[2 * i] as number;
    const result = results[2 * i + 1] as number;
    const waiter = waiters.get(id);
    if (waiter === undefined) continue;
    waiters.delete(id);
    waiter.settled();
    if (result >= 0) waiter.resolve(result);
    else waiter.reject(fileError(waiter.operation, waiter.path, getSystemErrorName(result)));
  }
}

/** The result of the queued operation `id`; `settled` is called when it is known. */
export function queued(
  id: number,
  operation: string,
  path: string,
  settled: () => void,
): Promise<number> {
  return new Promise((resolve, reject) => {
    waiters.set(id, { operation, path, settled, resolve, reject });
  });
}

const HINTS: Record<string, string> = {
  ENOSPC: 'the file system is full: free space, then the initiator may retry',
  EDQUOT: 'the quota is used up: raise it or free space, then the initiator may retry',
  EROFS: 'the file system is read-only: remount it, or serve read-only',
  EACCES: 'no permission: check owner and mode of the file and its folders',
  EPERM: 'not permitted: check file attributes (chattr) and capabilities',
  EIO: 'the device under the file reported an error: see the kernel log',
  ENOENT: 'it does not exist: check the path, or ask for it to be created',
  EISDIR: 'it is a folder: name a file or a block device',
  EBUSY: 'somebody else uses it exclusively: stop that first',
  ENOTSUP: 'the file system has no such operation',
  EINVAL:
    'the kernel refuses these values: with O_DIRECT, position and length must be multiples of the block size',
  EFAULT: 'the memory of the command is gone: the device was removed or its ring reset',
  EFBIG: 'larger than the file system or ulimit -f allows',
};

/** One shape for every failed file operation: what, where, errno, what to do. */
export function fileError(
  operation: string,
  path: string,
  errno: string | undefined,
  cause?: unknown,
): FileError {
  const code = errno === 'ENOSPC' || errno === 'EDQUOT' ? 'ERR_TCMU_IO_NO_SPACE' : 'ERR_TCMU_IO';
  const hint = (errno !== undefined && HINTS[errno]) || 'see the cause';
  return new FileError(code, `tcmu: ${operation} ${path}: ${errno ?? 'failed'}; ${hint}`, {
    operation,
    path,
    errno,
    cause,
  });
}

/** Wraps an error thrown by the addon or by node:fs. */
export function wrapFileError(operation: string, path: string, error: unknown): FileError {
  if (error instanceof FileError) return error;
  const code = (error as { code?: unknown } | null)?.code;
  return fileError(operation, path, typeof code === 'string' ? code : undefined, error);
}
