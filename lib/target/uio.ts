// SPDX-License-Identifier: Apache-2.0
/**
 * What sysfs says about TCMU's uio devices. Reads only, needs no privilege: what a process may see here
 * is all that one serving a device needs.
 */
import { targetError } from './explain.js';
import { localHost, type TargetHost } from './host.js';

/** Which backstore a uio device belongs to, as its name in sysfs and in netlink events says. */
export interface UioName {
  /** Number, the N of `core/user_N`. */
  hba: number;
  /** The backstore. */
  name: string;
  /** Configuration string, `<subtype>/<rest>`; empty when none was set. */
  config: string;
}

/** An enabled backstore as sysfs shows it. */
export interface UioDevice extends UioName {
  /** `/dev/uio0`; the node may still be missing, see `waitForUio`. */
  uioPath: string;
  /** Number, the N of uioN. */
  minor: number;
  /** `major:minor` of the node. */
  deviceNumber: string;
  /** Bytes to map: mailbox, command ring and data area. */
  mapSize: number;
}

/** Takes `tcm-user/<hba>/<name>[/<config>]` apart; undefined when it is another driver's. */
export function parseUioName(text: string): UioName | undefined {
  const match = /^tcm-user\/(\d{1,10})\/([^/]+)(?:\/(.*))?$/s.exec(text);
  if (match === null) return undefined;
  const [, hba, name, config] = match;
  return { hba: Number(hba), name: name ?? '', config: config ?? '' };
}

/** The part of a configuration string that says which kind of handler it is for, and the rest. */
export function parseConfig(config: string): {
  /** The first part: who is to serve it. */
  subtype: string;
  /** What follows the first `/`. */
  rest: string;
} {
  const slash = config.indexOf('/');
  return slash < 0
    ? { subtype: config, rest: '' }
    : { subtype: config.slice(0, slash), rest: config.slice(slash + 1) };
}

/**
 * All enabled user backstores, by their uio devices.
 * @throws TargetError (`ERR_TCMU_TARGET_*`)
 */
export async function listUio(host: TargetHost = localHost): Promise<UioDevice[]> {
  const folder = `${host.sysfs}/class/uio`;
  const devices = await Promise.all(
    (await host.list(folder)).map((uio) => readUio(host, folder, uio)),
  );
  return devices.filter((device) => device !== undefined).sort((a, b) => a.minor - b.minor);
}

/** Undefined for another driver's device, and for one that goes away while it is looked at. */
async function readUio(
  host: TargetHost,
  folder: string,
  uio: string,
): Promise<UioDevice | undefined> {
  const minor = /^uio(\d+)$/.exec(uio)?.[1];
  if (minor === undefined) return undefined;
  const [label, size, deviceNumber] = await Promise.all([
    host.readOptional(`${folder}/${uio}/name`),
    host.readOptional(`${folder}/${uio}/maps/map0/size`),
    host.readOptional(`${folder}/${uio}/dev`),
  ]);
  const name = label === undefined ? undefined : parseUioName(label);
  if (name === undefined || size === undefined || deviceNumber === undefined) return undefined;
  return {
    ...name,
    uioPath: `${host.dev}/${uio}`,
    minor: Number(minor),
    deviceNumber,
    mapSize: Number(size),
  };
}

export async function findUio(
  host: TargetHost,
  hba: number,
  name: string,
): Promise<UioDevice | undefined> {
  return (await listUio(host)).find((device) => device.hba === hba && device.name === name);
}

/**
 * Waits until a backstore has its uio device and the device its node: the kernel makes the node at once
 * where /dev is a devtmpfs, udev renames and permits it a little later.
 *
 * @throws TargetError `ERR_TCMU_TARGET_NO_DEVICE`
 */
export async function waitForUio(host: TargetHost, hba: number, name: string): Promise<UioDevice> {
  let seen: UioDevice | undefined;
  const ready = await host.poll(async () => {
    seen = await findUio(host, hba, name);
    if (seen === undefined) return undefined;
    const number = await host.deviceNumber(seen.uioPath);
    return number === seen.deviceNumber ? seen : undefined;
  });
  if (ready !== undefined) return ready;
  if (seen === undefined) {
    const label = `tcm-user/${hba}/${name}`;
    throw targetError(
      'NO_DEVICE',
      'wait for',
      `${host.sysfs}/class/uio`,
      `no device is named ${label}: is the backstore enabled?`,
    );
  }
  const [major, minor] = seen.deviceNumber.split(':');
  throw targetError(
    'NO_DEVICE',
    'wait for',
    seen.uioPath,
    `the kernel has the device ${seen.deviceNumber}, but this node is missing or another's. Is udev running? ` +
      `In a container, make it by hand: mknod ${seen.uioPath} c ${major} ${minor}`,
  );
}
