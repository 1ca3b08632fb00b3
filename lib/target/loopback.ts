// SPDX-License-Identifier: Apache-2.0
/**
 * The loopback fabric (tcm_loop): a backstore as a SCSI disk of this machine, `/dev/sdX`.
 *
 * Contract: which disk it became is read from sysfs at the address the kernel gave the target, never
 * guessed. Detaching unlinks the LUN, and the kernel removes the disk with it: removing the disk by hand
 * first makes tcm_loop lose count of its ports and leak the nexus (seen on Linux 6.1).
 */
import { createHash } from 'node:crypto';
import type { Backstore } from './backstore.js';
import { targetError } from './explain.js';
import { isProblem, localHost, type TargetHost } from './host.js';
import {
  chooseLun,
  clearLeftover,
  linkLun,
  lunsOf,
  makeTpg,
  recordLun,
  recordTpg,
  whenEmpty,
} from './luns.js';
import { checkWwn } from './names.js';
import { Undo, undoOnFailure } from './undo.js';

/** tcm_loop's SCSI host has the target ids 0 and 1, and the tag is the id (tcm_loop.c). */
const TAG = 1;
/** Peripheral device types that get a block device: disk, CD/DVD, optical, RBC, zoned. */
const BLOCK_TYPES: readonly number[] = [0x00, 0x05, 0x07, 0x0e, 0x14];
/** How long a disk may stay invisible after the kernel said it had added it. */
const ADDED_TIMEOUT = 1_000;

/** How a backstore becomes a disk of this machine, for `attachLoopback`. */
export interface LoopbackOptions {
  /** Name of the target port, `naa.` and 16 hexadecimal digits. Default: made from the backstore's name. */
  wwn?: string;
  /** LUN, 0 to 16383. Default 0, or the lowest that is free. */
  lun?: number;
}

/** How a disk is taken away. */
export interface DetachOptions {
  /**
   * Detach also while the disk is mounted or its handler is dead: its I/O fails at once, and what was not
   * written back yet is lost.
   */
  force?: boolean;
}

/** A SCSI device that a backstore has become. */
export class LoopbackDisk {
  /** The target it belongs to. */
  readonly target: LoopbackTarget;
  /** Logical unit number. */
  readonly lun: number;
  /** host:channel:target:lun, as `lsscsi` shows it. */
  readonly address: string;
  /** `/dev/sda`; undefined for a device type without a block device (a tape, say). */
  readonly blockPath: string | undefined;
  /** `/dev/sg0`; undefined when the module `sg` isn't there. */
  readonly genericPath: string | undefined;
  readonly #undo: Undo;
  readonly #forget: () => Promise<void>;

  /** @internal */
  constructor(
    target: LoopbackTarget,
    lun: number,
    device: ScsiDevice,
    undo: Undo,
    forget: () => Promise<void>,
  ) {
    this.target = target;
    this.lun = lun;
    this.address = device.address;
    this.blockPath = device.blockPath;
    this.genericPath = device.genericPath;
    this.#undo = undo;
    this.#forget = forget;
  }

  /**
   * `/dev/sda`.
   *
   * @throws TargetError `ERR_TCMU_TARGET_NO_DEVICE` for a device that isn't a disk
   */
  get path(): string {
    if (this.blockPath === undefined) {
      throw targetError('NO_DEVICE', 'find the disk', this.address, 'it has no block device');
    }
    return this.blockPath;
  }

  /**
   * Bytes the initiator believes in.
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async size(): Promise<number> {
    const { host } = this.target;
    const name = this.path.slice(this.path.lastIndexOf('/') + 1);
    // In units of 512 bytes whatever the block size (Documentation/ABI/stable/sysfs-block).
    return Number(await host.read(`${host.sysfs}/class/block/${name}/size`)) * 512;
  }

  /**
   * Lets the initiator look again at capacity and pages, as after a resize.
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async rescan(): Promise<void> {
    const { host } = this.target;
    await host.write(`${scsiDevice(host, this.address)}/rescan`, '1');
  }

  /**
   * Removes the disk; and the target, when it was made for this disk alone.
   *
   * @throws TargetError `ERR_TCMU_TARGET_BUSY` while it is mounted (or otherwise claimed), unless forced
   */
  async detach(options: DetachOptions = {}): Promise<void> {
    // The node may be another disk's once this one is gone.
    if (this.#undo.pending.length > 0) {
      if (options.force === true) await this.#offline();
      else await this.#refuseClaimed();
    }
    await this.#undo.run();
    await this.#forget();
  }

  /** As `detach()`, for `await using`; rejects as that does. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.detach();
  }

  async #refuseClaimed(): Promise<void> {
    const { host } = this.target;
    if (this.blockPath === undefined || !(await host.exists(this.blockPath))) return;
    const claimed = await host.claimed(this.blockPath);
    if (claimed === false) return;
    throw targetError(
      'BUSY',
      'detach',
      this.blockPath,
      claimed === true
        ? 'it is mounted, or used by swap, LVM or md: end that first, or pass `force`'
        : 'it does not answer: start its handler again, or pass `force`',
    );
  }

  /** Lets what is queued, and the flush of the removal, fail at once instead of waiting for a handler. */
  async #offline(): Promise<void> {
    const { host } = this.target;
    const state = `${scsiDevice(host, this.address)}/state`;
    if (!(await host.exists(state))) return;
    try {
      await host.write(state, 'offline');
    } catch (error) {
      // Refused for a device in a state of its own, such as one that is being deleted.
      if (!isProblem(error, 'REJECTED') && !isProblem(error, 'NOT_FOUND')) throw error;
    }
  }
}

/** A target port of the loopback fabric with its own SCSI host; holds any number of LUNs. */
export class LoopbackTarget {
  /** The kernel it is in. */
  readonly host: TargetHost;
  /** Its name: `naa.…`. */
  readonly wwn: string;
  /** Its `tpgt_N` folder. */
  readonly path: string;
  readonly #undo: Undo;
  readonly #disks = new Set<LoopbackDisk>();

  /** @internal Use `createLoopbackTarget`. */
  constructor(host: TargetHost, wwn: string, path: string, undo: Undo) {
    this.host = host;
    this.wwn = wwn;
    this.path = path;
    this.#undo = undo;
  }

  /** What was attached through this object and not detached yet. */
  get disks(): LoopbackDisk[] {
    return [...this.#disks];
  }

  /**
   * Attaches a backstore as a LUN and waits for its disk. The handler must be serving: the kernel sends
   * INQUIRY and READ CAPACITY meanwhile.
   *
   * @param lun default: the lowest that is free
   * @throws TargetError `ERR_TCMU_TARGET_NO_DEVICE` when no handler answered, `_NAME_TAKEN`, …
   */
  async attach(backstore: Backstore, lun?: number): Promise<LoopbackDisk> {
    return this.attachFor(backstore, lun, async () => {});
  }

  /** @internal `forget` runs after the disk's own removal. */
  async attachFor(
    backstore: Backstore,
    lun: number | undefined,
    forget: () => Promise<void>,
  ): Promise<LoopbackDisk> {
    return undoOnFailure(new Undo(), async (undo) => {
      const number = await chooseLun(this.host, this.path, lun);
      await linkLun(undo, this.host, this.path, number, backstore);
      return this.adopt(number, undo, forget, backstore);
    });
  }

  /** @internal Waits for the disk of a linked LUN. */
  async adopt(
    lun: number,
    undo: Undo,
    forget: () => Promise<void>,
    backstore: Backstore,
  ): Promise<LoopbackDisk> {
    const address = `${await this.host.read(`${this.path}/address`)}:${lun}`;
    const device = await waitForDevice(this.host, address, backstore);
    const disk = new LoopbackDisk(this, lun, device, undo, async () => {
      this.#disks.delete(disk);
      await forget();
    });
    this.#disks.add(disk);
    return disk;
  }

  /**
   * Detaches all that was attached through this object, and removes the target.
   * @throws TargetError `ERR_TCMU_TARGET_BUSY` while a disk is mounted, unless forced
   */
  async remove(options?: DetachOptions): Promise<void> {
    for (const disk of this.disks) await disk.detach(options);
    await this.#undo.run();
  }

  /** As `remove`, for `await using`; rejects as that does. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.remove();
  }
}

/**
 * Makes a target port without LUNs, for several disks on one SCSI host.
 *
 * @throws TargetError `ERR_TCMU_TARGET_NO_MODULE` (tcm_loop), `_NAME_TAKEN`, `_PERMISSION`, …
 */
export async function createLoopbackTarget(
  wwn: string,
  host: TargetHost = localHost,
): Promise<LoopbackTarget> {
  checkWwn(wwn);
  return undoOnFailure(new Undo(), async (undo) => {
    const tpg = await makeTpg(undo, host, 'loopback', wwn, TAG);
    // The kernel drops the nexus with the target: nothing to undo.
    await host.write(`${tpg}/nexus`, wwnFrom(`${wwn} initiator`));
    return new LoopbackTarget(host, wwn, tpg, undo);
  });
}

/**
 * Attaches a backstore as a disk of this machine, on a target port of its own that goes with it.
 *
 * @throws TargetError `ERR_TCMU_TARGET_NO_MODULE` (tcm_loop), `_NAME_TAKEN`, `_NO_DEVICE` when no handler
 *   serves the backstore yet, …
 */
export async function attachLoopback(
  backstore: Backstore,
  options: LoopbackOptions = {},
): Promise<LoopbackDisk> {
  const wwn = options.wwn ?? wwnFrom(`${backstore.hba}/${backstore.name}`);
  checkWwn(wwn);
  await clearLeftover(backstore.host, 'loopback', wwn, backstore.path);
  const target = await createLoopbackTarget(wwn, backstore.host);
  const undo = new Undo();
  undo.add(`remove target ${wwn}`, () => target.remove());
  return undoOnFailure(undo, () =>
    target.attachFor(backstore, options.lun ?? 0, () => target.remove()),
  );
}

/**
 * The disks that a backstore already is, as after a restart of its handler. Detaching the last one
 * removes its target too.
 */
export async function loopbackDisks(backstore: Backstore): Promise<LoopbackDisk[]> {
  const { host } = backstore;
  const links = (await lunsOf(host, backstore.path)).filter((link) => link.fabric === 'loopback');
  return Promise.all(
    links.map(async (link) => {
      const tpg = host.target('loopback', link.wwn, `tpgt_${link.tag}`);
      const port = new Undo();
      recordTpg(port, host, tpg);
      const target = new LoopbackTarget(host, link.wwn, tpg, port);
      const undo = new Undo();
      recordLun(undo, host, link);
      const forget = (): Promise<void> => whenEmpty(host, tpg, () => target.remove());
      await scanIfMissing(host, tpg, link.lun);
      return target.adopt(link.lun, undo, forget, backstore);
    }),
  );
}

/** A port name that is the same for the same text: NAA 5, LIO's company id, 36 bits of a hash. */
export function wwnFrom(text: string): string {
  return `naa.5001405${createHash('sha256').update(text).digest('hex').slice(0, 9)}`;
}

/** A disk whose handler died while it was probed is linked and not there. */
async function scanIfMissing(host: TargetHost, tpg: string, lun: number): Promise<void> {
  const address = await host.read(`${tpg}/address`);
  if (await host.exists(scsiDevice(host, `${address}:${lun}`))) return;
  const [number, channel, id] = address.split(':');
  // All LUNs: tcm_loop's limit for single ones is 0, which the kernel takes for "none".
  await host.write(`${host.sysfs}/class/scsi_host/host${number}/scan`, `${channel} ${id} -`);
}

interface ScsiDevice {
  address: string;
  blockPath: string | undefined;
  genericPath: string | undefined;
}

function scsiDevice(host: TargetHost, address: string): string {
  return `${host.sysfs}/bus/scsi/devices/${address}`;
}

async function waitForDevice(
  host: TargetHost,
  address: string,
  backstore: Backstore,
): Promise<ScsiDevice> {
  const sys = scsiDevice(host, address);
  const type = await host.poll(() => host.readOptional(`${sys}/type`), ADDED_TIMEOUT);
  if (type === undefined) {
    throw targetError(
      'NO_DEVICE',
      'attach',
      backstore.path,
      `the kernel found nothing at SCSI address ${address}: no handler answered INQUIRY. ` +
        `Serve ${backstore.uioPath} before attaching`,
    );
  }
  const block = BLOCK_TYPES.includes(Number(type))
    ? await nodeOf(host, `${sys}/block`, backstore)
    : undefined;
  const [generic] = await host.list(`${sys}/scsi_generic`);
  return {
    address,
    blockPath: block,
    genericPath: generic === undefined ? undefined : `${host.dev}/${generic}`,
  };
}

/** Waits for the block device below a SCSI device, and for its node. */
async function nodeOf(host: TargetHost, folder: string, backstore: Backstore): Promise<string> {
  let path: string | undefined;
  let number: string | undefined;
  const ready = await host.poll(async () => {
    const [name] = await host.list(folder);
    if (name === undefined) return undefined;
    path = `${host.dev}/${name}`;
    number = await host.readOptional(`${folder}/${name}/dev`);
    return number !== undefined && (await host.deviceNumber(path)) === number ? path : undefined;
  });
  if (ready !== undefined) return ready;
  throw path === undefined
    ? targetError(
        'NO_DEVICE',
        'wait for a block device below',
        folder,
        `the disk of ${backstore.path} did not come up: modprobe sd_mod, and see dmesg for what it did not like`,
      )
    : targetError(
        'NO_DEVICE',
        'wait for',
        path,
        `the kernel has the disk ${number ?? ''}, but this node is missing or another's. Is udev running? In a ` +
          `container, make it by hand: mknod ${path} b ${(number ?? '').replace(':', ' ')}`,
      );
}
