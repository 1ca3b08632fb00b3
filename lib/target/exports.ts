/** Every export that a backstore has in the kernel, whoever made it: for taking a device back. */
import type { Backstore } from './backstore.js';
import { type IscsiLun, iscsiLuns } from './iscsi.js';
import { type LoopbackDisk, loopbackDisks } from './loopback.js';
import { type VhostLun, vhostLuns } from './vhost.js';

export interface Exports {
  loopback: LoopbackDisk[];
  iscsi: IscsiLun[];
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
