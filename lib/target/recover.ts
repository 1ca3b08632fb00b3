// SPDX-License-Identifier: Apache-2.0
/**
 * Taking devices back after their handler has died, without losing what the initiator wrote.
 *
 * Contract: while a device is recovered the kernel holds its initiators off with BUSY, and it is let go
 * again whether that worked or not. Nothing is taken from a handler that is alive.
 */
import { open as openFile } from 'node:fs/promises';
import { errnoOf, TargetError } from '../errors.js';
import type { Backstore } from './backstore.js';
import { discover } from './discover.js';
import { explain, targetError } from './explain.js';
import { localHost, type TargetHost } from './host.js';
import { parseConfig } from './uio.js';
import { Undo, undoOnFailure } from './undo.js';

/** How a device is taken back, for `recoverBackstore`. */
export interface RecoverOptions {
  /**
   * What becomes of the commands that the dead handler had: `retry` (default) answers them with BUSY, so
   * that the initiator sends them again; `fail` with CHECK CONDITION. Commands are never run again from the
   * ring: after a completion out of order that could undo later writes.
   */
  inFlight?: 'retry' | 'fail';
}

/**
 * Takes over an existing device: holds back new commands, empties the ring, lets `open` start the new
 * handler, lets commands in again.
 *
 * @param open opens the uio device and begins to serve
 * @returns what `open` returned
 * @throws TargetError `ERR_TCMU_TARGET_BUSY` when a handler is alive, before anything was changed
 */
export async function recoverBackstore<T>(
  backstore: Backstore,
  open: (backstore: Backstore) => T | Promise<T>,
  options: RecoverOptions = {},
): Promise<T> {
  const { host } = backstore;
  await refuseServed(host, backstore.uioPath);
  await backstore.block();
  const blocked = new Undo();
  blocked.add(`let commands into ${backstore.path} again`, () => backstore.unblock());
  const value = await undoOnFailure(blocked, async () => {
    const level = options.inFlight === 'fail' ? '2' : '1';
    await host.write(`${backstore.path}/action/reset_ring`, level);
    return open(backstore);
  });
  await blocked.run();
  return value;
}

/** A reset under a living handler would make it complete commands that are no more. */
async function refuseServed(host: TargetHost, path: string): Promise<void> {
  try {
    await (await openFile(path, 'r+')).close();
  } catch (error) {
    if (errnoOf(error) !== 'EBUSY') throw explain(host.configfs, 'open', path, error);
    const advice = 'a process serves it: stop that one first (fuser finds it)';
    throw targetError('BUSY', 'recover', path, advice, error);
  }
}

/** Which devices are taken back, for `takeOver`. */
export interface TakeOverOptions extends RecoverOptions {
  /** Only backstores whose configuration string begins with it. Default: all. */
  subtype?: string;
  /** Default: this machine. */
  host?: TargetHost;
}

/** One device of `takeOver`: what `open` returned for it, or why it could not be taken. */
export type TakenOver<T> =
  | {
      /** The device. */
      backstore: Backstore;
      /** What `open` returned. */
      value: T;
      /** Absent where it was taken. */
      error?: undefined;
    }
  | {
      /** The device. */
      backstore: Backstore;
      /** Absent where it was not taken. */
      value?: undefined;
      /** Why not. */
      error: TargetError;
    };

/**
 * Takes back every device at once, as a daemon does when it starts: unblocks what a recovery cut short
 * left blocked, enables what was made and not enabled. Devices don't wait for one another, and one that
 * fails doesn't keep another from coming back.
 *
 * @param open opens the uio device and begins to serve
 * @throws TargetError only when nothing at all can be read; what fails for one device is in its entry
 */
export async function takeOver<T>(
  open: (backstore: Backstore) => T | Promise<T>,
  options: TakeOverOptions = {},
): Promise<TakenOver<T>[]> {
  const { backstores } = await discover(options.host ?? localHost);
  const wanted = backstores.filter(
    ({ settings }) =>
      settings.size > 0 &&
      (options.subtype === undefined || parseConfig(settings.config).subtype === options.subtype),
  );
  return Promise.all(
    wanted.map(async ({ backstore, settings }): Promise<TakenOver<T>> => {
      try {
        if (!settings.enabled) await backstore.enable();
        return { backstore, value: await recoverBackstore(backstore, open, options) };
      } catch (error) {
        const known = error instanceof TargetError ? error : undefined;
        return {
          backstore,
          error: known ?? targetError('FAILED', 'take over', backstore.path, String(error), error),
        };
      }
    }),
  );
}
