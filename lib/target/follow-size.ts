// SPDX-License-Identifier: Apache-2.0
/**
 * Lets an administrator resize a disk where the kernel keeps its size: attrib/dev_size of the backstore in
 * configfs, written by hand or by targetcli. The kernel announces the new size on netlink and does not wait for
 * an answer; when the disk can't follow, the size in configfs is put back.
 */
import { TcmuError } from '../errors.js';
import type { Backstore } from './backstore.js';
import { TcmuNetlink } from './netlink.js';

/** A disk that is served, as far as its size goes. */
export interface FollowingDisk {
  /** Bytes it has now. */
  readonly size: number;
  /** Changes the size of the store, and tells the kernel and the initiators: `Served.resize`. */
  resize(size: number): Promise<unknown>;
}

/**
 * From now on the disk takes over what is written to its backstore's attrib/dev_size.
 *
 * @param problem told of each size that was not taken over, and of what the listener meets; the error
 *   underneath is its `cause`. Must not throw
 * @returns the listener, to be closed when serving ends; undefined where there is no netlink to listen to,
 *   which `problem` is told
 */
export async function followSize(
  backstore: Backstore,
  disk: FollowingDisk,
  problem: (error: Error) => void,
): Promise<TcmuNetlink | undefined> {
  const { hba, name, host } = backstore;
  const tell = (what: string, cause: unknown) =>
    problem(new Error(`${name} ${what} through configfs: ${(cause as Error).message}`, { cause }));
  try {
    return await TcmuNetlink.open(
      {
        async reconfigured(device, { size }) {
          if (device.hba !== hba || device.name !== name) return;
          // Our own resizing is announced too.
          if (size === undefined || size === disk.size) return;
          try {
            await disk.resize(size);
          } catch (error) {
            tell('was not resized', error);
            await backstore.resize(disk.size);
          }
        },
        error: problem,
      },
      { host },
    );
  } catch (error) {
    if (!TcmuError.is(error)) throw error;
    tell('can not be resized', error);
    return undefined;
  }
}
