/**
 * Lets an administrator resize the disk where the kernel keeps its size: attrib/dev_size of the
 * backstore in configfs, written by hand or by targetcli. The kernel announces the new size on netlink
 * and does not wait for an answer; when the disk can’t follow, the size in configfs is put back.
 */
import { type Served, TcmuError } from 'tcmu';
import { TcmuNetlink } from 'tcmu/target';
import type { S3Disk } from './s3-disk.js';

/** The listener, to be closed when serving ends; undefined where there is no netlink to listen to. */
export async function followConfigfs(
  served: Served,
  store: S3Disk,
  warn: (message: string) => void,
): Promise<TcmuNetlink | undefined> {
  const { hba, name } = served.backstore;
  try {
    return await TcmuNetlink.open({
      async reconfigured(device, { size }) {
        if (device.hba !== hba || device.name !== name) return;
        // Our own resizing is announced too.
        if (size === undefined || size === store.size) return;
        try {
          await served.resize(size);
        } catch (error) {
          warn(`${name} was not resized through configfs: ${(error as Error).message}`);
          await served.backstore.resize(store.size);
        }
      },
      error: (error) => warn(error.message),
    });
  } catch (error) {
    if (!TcmuError.is(error)) throw error;
    warn(`${name} can not be resized through configfs: ${error.message}`);
    return undefined;
  }
}
