/**
 * Which initiators are connected to a backstore now, as far as configfs tells. A name stays as long as its
 * nexus does: an iSCSI session has another one after it was lost and came again. Only reads.
 */
import type { Backstore } from './backstore.js';
import { lunsOf } from './luns.js';

/**
 * Names of the I_T nexuses of a backstore. Sessions of initiators without an entry of their own (`anyone`) are
 * known by their initiator alone.
 *
 * @throws TargetError
 */
export async function nexusesOf(backstore: Backstore): Promise<Set<string>> {
  const { host } = backstore;
  const names = new Set<string>();
  for (const { fabric, wwn, tag } of await lunsOf(host, backstore.path)) {
    const tpg = host.target(fabric, wwn, `tpgt_${tag}`);
    if (fabric !== 'iscsi') {
      // One initiator, this machine or its virtual machine, for as long as there is a nexus.
      const nexus = await host.readOptional(`${tpg}/nexus`);
      if (nexus !== undefined && nexus !== '') names.add(`${tpg} ${nexus}`);
      continue;
    }
    for (const initiator of await host.list(`${tpg}/acls`)) {
      const info = (await host.readOptional(`${tpg}/acls/${initiator}/info`)) ?? '';
      for (const [, id] of info.matchAll(/^LIO Session ID: (\d+)/gm)) {
        names.add(`${tpg} ${initiator} ${id}`);
      }
    }
    const dynamic = (await host.readOptional(`${tpg}/dynamic_sessions`)) ?? '';
    for (const initiator of dynamic.split(/[\n\0]+/)) {
      if (initiator !== '') names.add(`${tpg} ${initiator}`);
    }
  }
  return names;
}
