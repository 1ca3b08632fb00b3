// SPDX-License-Identifier: Apache-2.0
/**
 * The vhost-scsi fabric: a backstore as a virtio-scsi disk of a virtual machine, without a copy through
 * the VMM. QEMU takes it as `-device vhost-scsi-pci,wwpn=<wwn>`.
 */
import { TargetError } from '../errors.js';
import type { Backstore } from './backstore.js';
import { targetError } from './explain.js';
import { isProblem, type TargetHost } from './host.js';
import { wwnFrom } from './loopback.js';
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

const TAG = 1;

/** How a backstore becomes a LUN for QEMU, for `attachVhost`. */
export interface VhostOptions {
  /** Name of the target port, `naa.` and 16 hexadecimal digits. Default: made from the backstore's name. */
  wwn?: string;
  /** Logical unit number. Default 0. */
  lun?: number;
}

/** A backstore as a LUN of a vhost-scsi target. Made by `attachVhost`. */
export class VhostLun {
  /** What the VMM is told: QEMU's `wwpn`. */
  readonly wwn: string;
  /** Logical unit number. */
  readonly lun: number;
  readonly #host: TargetHost;
  readonly #tpg: string;
  readonly #undo: Undo;
  readonly #port: Undo;

  /** @internal Use `attachVhost`. */
  constructor(
    host: TargetHost,
    wwn: string,
    tpg: string,
    lun: number,
    undo: { lun: Undo; port: Undo },
  ) {
    this.wwn = wwn;
    this.lun = lun;
    this.#host = host;
    this.#tpg = tpg;
    this.#undo = undo.lun;
    this.#port = undo.port;
  }

  /** QEMU's arguments for it. */
  get qemuArguments(): string[] {
    return ['-device', `vhost-scsi-pci,wwpn=${this.wwn}`];
  }

  /**
   * Removes the LUN; and the target, when it was the last in it.
   *
   * @throws TargetError `ERR_TCMU_TARGET_BUSY` while a virtual machine uses it; nothing has changed then
   */
  async detach(): Promise<void> {
    if (this.#undo.pending.length > 0) await this.#refuseUsed();
    await this.#undo.run();
    if (this.#port.pending.length === 0) return;
    await whenEmpty(this.#host, this.#tpg, () => this.#port.run());
  }

  /** As `detach`, for `await using`; rejects as that does. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.detach();
  }

  /**
   * Nothing can be read that tells of a virtual machine, so the kernel is asked to remove the target with
   * its LUN still in it: that always fails, with EBUSY while a machine holds it, else with ENOTEMPTY.
   */
  async #refuseUsed(): Promise<void> {
    try {
      await this.#host.rmdir(this.#tpg);
    } catch (error) {
      if (!(error instanceof TargetError)) throw error;
      if (error.errno === 'ENOTEMPTY') return;
      if (error.errno !== 'EBUSY') throw error;
      throw targetError('BUSY', 'detach', this.#tpg, USED, error);
    }
  }
}

const USED = 'a virtual machine uses it: stop that, or unplug the device there';

/**
 * Offers a backstore to virtual machines of this host.
 *
 * @throws TargetError `ERR_TCMU_TARGET_NO_MODULE` (vhost_scsi), `_NAME_TAKEN`, `_PERMISSION`, …
 */
export async function attachVhost(
  backstore: Backstore,
  options: VhostOptions = {},
): Promise<VhostLun> {
  const { host } = backstore;
  const wwn = options.wwn ?? wwnFrom(`vhost ${backstore.hba}/${backstore.name}`);
  checkWwn(wwn);
  await clearLeftover(host, 'vhost', wwn, backstore.path);
  return undoOnFailure(new Undo(), async (port) => {
    const tpg = await makeTpg(port, host, 'vhost', wwn, TAG);
    await host.write(`${tpg}/nexus`, wwnFrom(`${wwn} initiator`));
    recordNexus(port, host, tpg);
    return undoOnFailure(new Undo(), async (undo) => {
      const lun = await chooseLun(host, tpg, options.lun ?? 0);
      await linkLun(undo, host, tpg, lun, backstore);
      return new VhostLun(host, wwn, tpg, lun, { lun: undo, port });
    });
  });
}

/** The LUNs of vhost targets that a backstore already is, as after a restart of its handler. */
export async function vhostLuns(backstore: Backstore): Promise<VhostLun[]> {
  const { host } = backstore;
  const links = (await lunsOf(host, backstore.path)).filter((link) => link.fabric === 'vhost');
  return links.map((link) => {
    const tpg = host.target('vhost', link.wwn, `tpgt_${link.tag}`);
    const port = new Undo();
    recordTpg(port, host, tpg);
    recordNexus(port, host, tpg);
    const undo = new Undo();
    recordLun(undo, host, link);
    return new VhostLun(host, link.wwn, tpg, link.lun, { lun: undo, port });
  });
}

function recordNexus(undo: Undo, host: TargetHost, tpg: string): void {
  undo.add(`drop the nexus of ${tpg}`, async () => {
    try {
      await host.write(`${tpg}/nexus`, 'NULL', { advice: { EBUSY: ['BUSY', USED] } });
    } catch (error) {
      // ENODEV: it has none.
      if (!isProblem(error, 'NOT_FOUND')) throw error;
    }
  });
}
