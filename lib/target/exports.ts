// SPDX-License-Identifier: Apache-2.0
/** Every export that a backstore has in the kernel, whoever made it: for taking a device back. */
import type { Backstore } from './backstore.js';
import { type IscsiLun, iscsiLuns } from './iscsi.js';
import { type LoopbackDisk, loopbackDisks } from './loopback.js';
import { type VhostLun, vhostLuns } from './vhost.js';

/** How a backstore is reachable, by fabric. */
export interface Exports {
  /** Disks of this machine. */
  loopback: LoopbackDisk[];
  /** LUNs of iSCSI targets. */
  iscsi: IscsiLun[];
  /** LUNs of vhost-scsi targets. */
  vhost: VhostLun[];
}

/**
 * Finds the exports of a backstore. Its handler must be serving: a loopback disk may still be coming up.
 *
 * @throws TargetError
 */
export async function exportsOf(backstore: Backstore): Promise<Exports> {
  const [loopback, iscsi, vhost] = await Promise.all([
    loopbackDisks(backstore),
    iscsiLuns(backstore),
    vhostLuns(backstore),
  ]);
  return { loopback, iscsi, vhost };
}
