// SPDX-License-Identifier: Apache-2.0
/**
 * What the fabrics have in common in configfs: `<fabric>/<wwn>/tpgt_<tag>/lun/lun_<n>/<link to the
 * backstore>`. Each function records how to take back what it made.
 */
import { dirname, resolve } from 'node:path';
import type { Advice } from './explain.js';
import { isProblem, type TargetHost } from './host.js';
import { checkInteger } from './names.js';
import { Undo } from './undo.js';

export type Fabric = 'loopback' | 'iscsi' | 'vhost';

const MODULES: Record<Fabric, string> = {
  loopback: 'tcm_loop',
  iscsi: 'iscsi_target_mod',
  vhost: 'vhost_scsi',
};

/** Largest LUN that fits into flat space addressing (SAM-5 4.7.7.5). */
const MAX_LUN = 0x3fff;

/** A LUN of any fabric that leads to a backstore. */
export interface LunLink {
  /** `loopback`, `iscsi`, `vhost`, or another fabric's folder. */
  fabric: string;
  /** Name of the target port: `naa.…`, `iqn.…`. */
  wwn: string;
  /** The N of `tpgt_N`. */
  tag: number;
  /** Logical unit number. */
  lun: number;
  /** The folder `lun_N`. */
  path: string;
  /** The link in it. */
  link: string;
  /** The backstore's folder, `…/core/user_0/disk0`. */
  backstore: string;
}

/** All LUNs of all fabrics. */
export async function allLuns(host: TargetHost): Promise<LunLink[]> {
  const fabrics = (await host.list(host.target())).filter((name) => name !== 'core');
  const found = await Promise.all(fabrics.map((fabric) => lunsOfFabric(host, fabric)));
  return found.flat();
}

/** The LUNs that lead to one backstore. */
export async function lunsOf(host: TargetHost, backstore: string): Promise<LunLink[]> {
  return (await allLuns(host)).filter((lun) => lun.backstore === backstore);
}

async function lunsOfFabric(host: TargetHost, fabric: string): Promise<LunLink[]> {
  const luns: LunLink[] = [];
  for (const wwn of await host.list(host.target(fabric))) {
    for (const [tag, tpg] of await numbered(host, host.target(fabric, wwn), 'tpgt_')) {
      for (const [lun, path] of await numbered(host, `${tpg}/lun`, 'lun_')) {
        for (const [link, backstore] of await linksIn(host, path)) {
          luns.push({ fabric, wwn, tag, lun, path, link, backstore });
        }
      }
    }
  }
  return luns;
}

/** The symbolic links in a folder, with what they lead to. */
async function linksIn(host: TargetHost, path: string): Promise<Array<[string, string]>> {
  const links: Array<[string, string]> = [];
  for (const name of await host.list(path)) {
    const target = await host.linkTarget(`${path}/${name}`);
    if (target !== undefined) links.push([`${path}/${name}`, resolve(path, target)]);
  }
  return links;
}

/** The folders `<prefix>N` below `path`. */
async function numbered(
  host: TargetHost,
  path: string,
  prefix: string,
): Promise<Array<[number, string]>> {
  return (await host.list(path))
    .filter((name) => name.startsWith(prefix) && /^\d+$/.test(name.slice(prefix.length)))
    .map((name): [number, string] => [Number(name.slice(prefix.length)), `${path}/${name}`])
    .sort(([a], [b]) => a - b);
}

/**
 * Makes `<fabric>/<wwn>/tpgt_<tag>`; answers its path.
 *
 * @param advice what the kernel's refusal of the name means
 * @throws TargetError `_NO_MODULE`, `_NAME_TAKEN` when there is a target of that name
 */
export async function makeTpg(
  undo: Undo,
  host: TargetHost,
  fabric: Fabric,
  wwn: string,
  tag: number,
  advice?: Advice,
): Promise<string> {
  const port = host.target(fabric, wwn);
  for (;;) {
    await makeFabric(undo, host, fabric);
    try {
      await host.mkdir(port, advice);
      break;
    } catch (error) {
      // The fabric's folder went with the last target of another process.
      if (!isProblem(error, 'NOT_FOUND')) throw error;
    }
  }
  recordFolder(undo, host, port);
  const tpg = `${port}/tpgt_${tag}`;
  await host.mkdir(tpg);
  recordFolder(undo, host, tpg);
  return tpg;
}

/** The fabric's folder; making it loads the module where modprobe can. */
async function makeFabric(undo: Undo, host: TargetHost, fabric: Fabric): Promise<void> {
  const path = host.target(fabric);
  if (await host.exists(path)) return;
  try {
    await host.mkdir(path, {
      EINVAL: [
        'NO_MODULE',
        `the kernel has no ${fabric} fabric: modprobe ${MODULES[fabric]} (the kernel may be built without it)`,
      ],
    });
  } catch (error) {
    if (isProblem(error, 'NAME_TAKEN')) return;
    throw error;
  }
  undo.add(`remove ${path} when it is empty`, () => removeIfEmpty(host, path));
}

/** The number for a new LUN: the wanted one, or the lowest that is free. */
export async function chooseLun(
  host: TargetHost,
  tpg: string,
  wanted: number | undefined,
): Promise<number> {
  if (wanted !== undefined) {
    checkInteger('lun', wanted, 0, MAX_LUN);
    return wanted;
  }
  const taken = (await numbered(host, `${tpg}/lun`, 'lun_')).map(([lun]) => lun);
  let free = 0;
  while (taken.includes(free)) free += 1;
  return free;
}

/**
 * Makes `lun/lun_<lun>` and links the backstore into it; answers the folder. Over loopback the link
 * returns when the new disk has been probed: the handler must be serving by then.
 */
export async function linkLun(
  undo: Undo,
  host: TargetHost,
  tpg: string,
  lun: number,
  backstore: { path: string; name: string },
): Promise<string> {
  const path = `${tpg}/lun/lun_${lun}`;
  await host.mkdir(path, {
    EEXIST: ['NAME_TAKEN', `LUN ${lun} of this target is taken: choose another`],
  });
  recordFolder(undo, host, path);
  const link = `${path}/${backstore.name}`;
  await host.symlink(backstore.path, link, {
    ENODEV: ['NO_DEVICE', 'the backstore is not enabled: call enable() first'],
  });
  recordLink(undo, host, link);
  return path;
}

/** Records the removal of a LUN that exists already. */
export function recordLun(undo: Undo, host: TargetHost, found: LunLink): void {
  recordFolder(undo, host, found.path);
  recordLink(undo, host, found.link);
}

/** Records the removal of a target that exists already. */
export function recordTpg(undo: Undo, host: TargetHost, tpg: string): void {
  // Another portal group of the same target, made by somebody else, may stay.
  undo.add(`remove ${dirname(tpg)} when it is empty`, () => removeIfEmpty(host, dirname(tpg)));
  recordFolder(undo, host, tpg);
}

/** Records the removal of all that a target that exists already has beside its LUNs. */
export async function recordTarget(undo: Undo, host: TargetHost, tpg: string): Promise<void> {
  recordTpg(undo, host, tpg);
  for (const folder of ['acls', 'np']) {
    for (const name of await host.list(`${tpg}/${folder}`)) {
      recordFolder(undo, host, `${tpg}/${folder}/${name}`);
    }
  }
}

/** Records the removal of what the access lists of a target make of its LUNs, or of one LUN. */
export async function recordMapped(
  undo: Undo,
  host: TargetHost,
  tpg: string,
  lun?: string,
): Promise<void> {
  for (const acl of await host.list(`${tpg}/acls`)) {
    for (const [, mapped] of await numbered(host, `${tpg}/acls/${acl}`, 'lun_')) {
      const links = await linksIn(host, mapped);
      if (lun !== undefined && !links.some(([, target]) => target === lun)) continue;
      recordFolder(undo, host, mapped);
      for (const [link] of links) recordLink(undo, host, link);
    }
  }
}

/**
 * Removes what an attach of this backstore that was cut short (by SIGKILL, say) left of a target: one that
 * no initiator can use yet and that holds nothing else. Anything else stays, and its name is taken.
 */
export async function clearLeftover(
  host: TargetHost,
  fabric: Fabric,
  wwn: string,
  backstore: string,
): Promise<void> {
  const port = host.target(fabric, wwn);
  const links = (await lunsOfFabric(host, fabric)).filter((link) => link.wwn === wwn);
  if (links.some((link) => link.backstore !== backstore)) return;
  // An iSCSI target is enabled when it is complete; for the others the LUN's link is the last step.
  if (fabric !== 'iscsi' && links.length > 0) return;
  const tpgs = (await numbered(host, port, 'tpgt_')).map(([, tpg]) => tpg);
  const enabled = tpgs.map((tpg) => host.readOptional(`${tpg}/enable`));
  if ((await Promise.all(enabled)).includes('1')) return;
  const undo = new Undo();
  if (await host.exists(port)) recordFolder(undo, host, port);
  for (const tpg of tpgs) {
    await recordTarget(undo, host, tpg);
    for (const [, lun] of await numbered(host, `${tpg}/lun`, 'lun_')) {
      recordFolder(undo, host, lun);
      for (const [link] of await linksIn(host, lun)) recordLink(undo, host, link);
    }
    await recordMapped(undo, host, tpg);
  }
  await undo.run();
}

/** Runs `remove` when there is no LUN in a target any more. */
export async function whenEmpty(
  host: TargetHost,
  tpg: string,
  remove: () => Promise<void>,
): Promise<void> {
  if ((await numbered(host, `${tpg}/lun`, 'lun_')).length === 0) await remove();
}

export function recordFolder(undo: Undo, host: TargetHost, path: string): void {
  undo.add(`remove ${path}`, () => host.rmdir(path));
}

export function recordLink(undo: Undo, host: TargetHost, link: string): void {
  undo.add(`unlink ${link}`, () => host.unlink(link));
}

/** Removes a folder unless somebody else has put something into it. */
export async function removeIfEmpty(host: TargetHost, path: string): Promise<void> {
  try {
    await host.rmdir(path);
  } catch (error) {
    if (!isProblem(error, 'BUSY')) throw error;
  }
}
