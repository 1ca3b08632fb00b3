// SPDX-License-Identifier: Apache-2.0
/**
 * The kernel to configure: where its interfaces are mounted, and the few calls made on them.
 *
 * Contract: whatever changes something goes through the addon's `blockingCall`, on a thread of its own,
 * because the kernel may wait inside such a call for a netlink reply or for a SCSI command that this very
 * process is to answer. Every call, reads included, has a deadline; one that passes it is reported as
 * `ERR_TCMU_TARGET_STUCK` and goes on in the kernel, which has no way to take it back.
 */
import { constants } from 'node:fs';
import { access, open, readdir, readFile, readlink, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { errnoOf, TargetError } from '../errors.js';
import type { NativeAddon } from '../native.js';
import { type Advice, explain, targetError } from './explain.js';
import { quoted } from './names.js';

/** The part of the addon that `tcmu/target` needs. */
export type KernelCalls = Pick<NativeAddon, 'blockingCall' | 'NetlinkSocket'>;

/** Where the kernel's interfaces are; a container that manages its host mounts them elsewhere. */
export interface TargetHostOptions {
  /** configfs' target folder. Default `/sys/kernel/config/target`. */
  configfs?: string;
  /** Default `/sys`. */
  sysfs?: string;
  /** Default `/dev`. */
  dev?: string;
  /**
   * Milliseconds a single call may stay in the kernel before it is given up as stuck. Default 60,000:
   * unlinking a LUN whose handler is dead takes the SCSI error handler some 20 s.
   */
  callTimeout?: number;
  /** Milliseconds for a device node or a disk to appear. Default 10,000. */
  deviceTimeout?: number;
  /** Loads the system calls; for tests. Default: the addon. */
  calls?: () => Promise<KernelCalls>;
}

/** For `TargetHost.write`. */
export interface WriteOptions {
  /** What to tell for an errno, in place of the general advice. */
  advice?: Advice;
  /** Keeps the value out of messages. */
  secret?: boolean;
}

/**
 * The kernel that is configured: where its interfaces are mounted, and the calls made on them.
 * Every call has a deadline. Its methods throw TargetError (`ERR_TCMU_TARGET_*`) with the path, the
 * errno and what to do.
 */
export class TargetHost {
  /** configfs' target folder. */
  readonly configfs: string;
  /** Where sysfs is mounted. */
  readonly sysfs: string;
  /** Where device nodes are. */
  readonly dev: string;
  /** Milliseconds a single call may stay in the kernel. */
  readonly callTimeout: number;
  /** Milliseconds for a device node or a disk to appear. */
  readonly deviceTimeout: number;
  /** Loads the system calls, when the first is made. */
  readonly calls: () => Promise<KernelCalls>;

  constructor(options: TargetHostOptions = {}) {
    this.configfs = options.configfs ?? '/sys/kernel/config/target';
    this.sysfs = options.sysfs ?? '/sys';
    this.dev = options.dev ?? '/dev';
    this.callTimeout = options.callTimeout ?? 60_000;
    this.deviceTimeout = options.deviceTimeout ?? 10_000;
    // Loaded when first needed: reading and discovering work without the addon.
    this.calls = options.calls ?? (async () => (await import('../native.js')).native);
  }

  /** A path below configfs' target folder. */
  target(...parts: string[]): string {
    return join(this.configfs, ...parts);
  }

  /**
   * The text of an attribute without its final newline.
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async read(path: string, advice?: Advice): Promise<string> {
    const text = await this.#within('read', path, readFile(path, 'utf8'), advice);
    return text.replace(/\n$/, '');
  }

  /**
   * As `read`; undefined where the attribute is missing or can't be read.
   * @throws TargetError `ERR_TCMU_TARGET_STUCK` alone
   */
  async readOptional(path: string): Promise<string | undefined> {
    try {
      return await this.read(path);
    } catch (error) {
      if (isProblem(error, 'STUCK')) throw error;
      return undefined;
    }
  }

  /**
   * Names in a folder; empty when it doesn't exist.
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async list(path: string): Promise<string[]> {
    return this.#within('list', path, orIfMissing(readdir(path), []));
  }

  /**
   * Whether there is something at `path`.
   * @throws TargetError
   */
  async exists(path: string): Promise<boolean> {
    const found = access(path, constants.F_OK).then(() => true);
    return this.#within('look for', path, orIfMissing(found, false));
  }

  /**
   * Where a symbolic link leads, as it is written; undefined when this is none.
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async linkTarget(path: string): Promise<string | undefined> {
    const link = orIfMissing(readlink(path), undefined, 'EINVAL');
    return this.#within('read the link', path, link);
  }

  /**
   * Whether somebody claims a block device for himself: mounted, swap, LVM, md. Undefined when the
   * device doesn't answer in time.
   * @throws TargetError `ERR_TCMU_TARGET_PERMISSION` when this process may not look
   */
  async claimed(path: string): Promise<boolean | undefined> {
    // O_EXCL without O_CREAT on a block device: EBUSY when it is claimed (open(2)).
    const probe = open(path, constants.O_RDONLY | constants.O_EXCL).then(
      async (file) => {
        await file.close();
        return false;
      },
      (error: unknown) => {
        const errno = errnoOf(error);
        // Not knowing must not pass for unclaimed: a device cgroup refuses root too.
        if (errno === 'EPERM' || errno === 'EACCES')
          throw explain(this.configfs, 'open', path, error);
        return errno === 'EBUSY';
      },
    );
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<undefined>((resolve) => {
      timer = setTimeout(() => resolve(undefined), Math.min(this.deviceTimeout, 5_000));
    });
    return Promise.race([probe, late]).finally(() => clearTimeout(timer));
  }

  /**
   * `major:minor` of a device node; undefined when it is missing or no device.
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async deviceNumber(path: string): Promise<string | undefined> {
    const found = await this.#within('look at', path, orIfMissing(stat(path), undefined));
    if (found === undefined || !(found.isCharacterDevice() || found.isBlockDevice())) {
      return undefined;
    }
    // The encoding of a 64-bit dev_t (glibc's gnu_dev_major and gnu_dev_minor).
    const number = BigInt(found.rdev);
    const major = ((number >> 8n) & 0xfffn) | ((number >> 32n) & 0xfffff000n);
    const minor = (number & 0xffn) | ((number >> 12n) & 0xffffff00n);
    return `${major}:${minor}`;
  }

  /**
   * Writes an attribute in one write(2), without a newline.
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async write(path: string, value: string, options: WriteOptions = {}): Promise<void> {
    const operation = options.secret === true ? 'write a secret to' : `write ${quoted(value)} to`;
    await this.#call(operation, path, 'open-write', value, options.advice);
  }

  /**
   * mkdir(2): in configfs it makes the object of that name.
   * @throws TargetError
   */
  async mkdir(path: string, advice?: Advice): Promise<void> {
    await this.#call('create', path, 'mkdir', undefined, advice);
  }

  /**
   * rmdir(2); a folder that is gone already is no failure.
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async rmdir(path: string, advice?: Advice): Promise<void> {
    await this.#gone(this.#call('remove', path, 'rmdir', undefined, advice));
  }

  /**
   * symlink(2): in configfs it joins two objects.
   * @throws TargetError
   */
  async symlink(target: string, path: string, advice?: Advice): Promise<void> {
    await this.#call(`link ${target} as`, path, 'symlink', target, advice);
  }

  /**
   * unlink(2); a link that is gone already is no failure.
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async unlink(path: string, advice?: Advice): Promise<void> {
    await this.#gone(this.#call('unlink', path, 'unlink', undefined, advice));
  }

  /**
   * Polls `probe` until it has an answer; undefined after `timeout` milliseconds (default:
   * `deviceTimeout`).
   * @throws what `probe` throws
   */
  async poll<T>(
    probe: () => Promise<T | undefined>,
    timeout = this.deviceTimeout,
  ): Promise<T | undefined> {
    const deadline = performance.now() + timeout;
    for (let pause = 2; ; pause = Math.min(pause * 2, 50)) {
      const answer = await probe();
      if (answer !== undefined || performance.now() >= deadline) return answer;
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }

  async #call(
    operation: string,
    path: string,
    call: Parameters<KernelCalls['blockingCall']>[0],
    data: string | undefined,
    advice: Advice | undefined,
  ): Promise<void> {
    const calls = await this.calls();
    await this.#within(operation, path, calls.blockingCall(call, path, data), advice);
  }

  async #gone(call: Promise<void>): Promise<void> {
    try {
      await call;
    } catch (error) {
      if (!(error instanceof TargetError && error.errno === 'ENOENT')) throw error;
    }
  }

  async #within<T>(operation: string, path: string, call: Promise<T>, advice?: Advice): Promise<T> {
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<never>((_resolve, reject) => {
      timer = setTimeout(() => reject(stuck(operation, path, this.callTimeout)), this.callTimeout);
    });
    try {
      return await Promise.race([call, late]);
    } catch (error) {
      if (error instanceof TargetError) throw error;
      throw explain(this.configfs, operation, path, error, advice);
    } finally {
      clearTimeout(timer);
    }
  }
}

/** The machine this process runs on, with everything mounted where it usually is. */
export const localHost = new TargetHost();

export function isProblem(error: unknown, problem: string): error is TargetError {
  return error instanceof TargetError && error.code === `ERR_TCMU_TARGET_${problem}`;
}

function stuck(operation: string, path: string, timeout: number): TargetError {
  return targetError(
    'STUCK',
    operation,
    path,
    `the kernel has not come back for ${timeout / 1000} s and still holds this thread. If a program that ` +
      'answered TCMU netlink events has died, call rescueNetlink() (block_netlink=1, reset_netlink=1, ' +
      'block_netlink=0 in /sys/module/target_core_user/parameters, in that order); do not remove the ' +
      'backstore before. If a handler is dead, start it again',
  );
}

async function orIfMissing<T>(call: Promise<T>, otherwise: T, also?: string): Promise<T> {
  try {
    return await call;
  } catch (error) {
    const errno = errnoOf(error);
    if (errno === 'ENOENT' || errno === 'ENOTDIR' || errno === also) return otherwise;
    throw error;
  }
}
