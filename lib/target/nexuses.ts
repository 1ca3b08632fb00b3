// SPDX-License-Identifier: Apache-2.0
/**
 * Which initiators are connected to a backstore now, as far as configfs tells. A name stays as long as its
 * nexus does: an iSCSI session has another one after it was lost and came again. Only reads.
 *
 * An access list entry shows the latest session of its initiator alone. LIO also counts the sessions of a
 * target, and frees one that was logged out or lost a moment after its initiator may be back: when it counts
 * more than it shows, the answer says that it is incomplete.
 */
import type { Nexuses } from '../scsi/nexuses.js';
import type { Backstore } from './backstore.js';
import type { TargetHost } from './host.js';
import { type LunLink, lunsOf } from './luns.js';

/** How often sessions may come and go while they are looked at. */
const LOOKS = 5;

/**
 * The I_T nexuses of a backstore. Sessions of initiators without an entry of their own (`anyone`) are known
 * by their initiator alone.
 *
 * @throws TargetError
 */
export async function nexusesOf(backstore: Backstore): Promise<Nexuses> {
  const { host } = backstore;
  const luns = await lunsOf(host, backstore.path);
  const names = new Set<string>();
  let incomplete = false;
  for (const tpg of new Set(luns.filter(isOther).map((lun) => tpgOf(host, lun)))) {
    // One initiator, this machine or its virtual machine, for as long as there is a nexus.
    const nexus = await host.readOptional(`${tpg}/nexus`);
    if (nexus !== undefined && nexus !== '') names.add(`${tpg} ${nexus}`);
  }
  const iscsi = luns.filter((lun) => !isOther(lun));
  for (const wwn of new Set(iscsi.map((lun) => lun.wwn))) {
    const sessions = await sessionsOf(host, wwn);
    incomplete ||= sessions.hidden;
    const own = new Set(iscsi.filter((lun) => lun.wwn === wwn).map((lun) => tpgOf(host, lun)));
    for (const { tpg, name } of sessions.shown) if (own.has(tpg)) names.add(`${tpg} ${name}`);
  }
  return { names, incomplete };
}

const isOther = ({ fabric }: LunLink) => fabric !== 'iscsi';

const tpgOf = (host: TargetHost, { fabric, wwn, tag }: LunLink) =>
  host.target(fabric, wwn, `tpgt_${tag}`);

interface Session {
  readonly tpg: string;
  readonly name: string;
}

/** The sessions of an iSCSI target, in all of its portal groups, and whether there are more than those. */
async function sessionsOf(
  host: TargetHost,
  iqn: string,
): Promise<{ shown: Session[]; hidden: boolean }> {
  const target = host.target('iscsi', iqn);
  const counter = `${target}/fabric_statistics/iscsi_instance/sessions`;
  let shown = await sessionsShown(host, target);
  for (let look = 1; ; look++) {
    const count = Number((await host.readOptional(counter)) ?? 0);
    // One look and the count are told at different times: only between two equal looks do they belong together.
    const again = await sessionsShown(host, target);
    if (same(shown, again)) return { shown, hidden: count > shown.length };
    if (look === LOOKS) return { shown: again, hidden: true };
    shown = again;
  }
}

async function sessionsShown(host: TargetHost, target: string): Promise<Session[]> {
  const shown: Session[] = [];
  for (const folder of await host.list(target)) {
    if (!folder.startsWith('tpgt_')) continue;
    const tpg = `${target}/${folder}`;
    for (const initiator of await host.list(`${tpg}/acls`)) {
      const info = (await host.readOptional(`${tpg}/acls/${initiator}/info`)) ?? '';
      for (const [, id] of info.matchAll(/^LIO Session ID: (\d+)/gm)) {
        shown.push({ tpg, name: `${initiator} ${id}` });
      }
    }
    const dynamic = (await host.readOptional(`${tpg}/dynamic_sessions`)) ?? '';
    for (const name of dynamic.split(/[\n\0]+/)) if (name !== '') shown.push({ tpg, name });
  }
  return shown;
}

function same(one: readonly Session[], other: readonly Session[]): boolean {
  return (
    one.length === other.length &&
    one.every(({ tpg, name }, i) => tpg === other[i]?.tpg && name === other[i]?.name)
  );
}
