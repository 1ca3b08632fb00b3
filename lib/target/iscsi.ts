// SPDX-License-Identifier: Apache-2.0
/**
 * The iSCSI fabric (iscsi_target_mod): a target with one portal group, its portals, and who may log in.
 *
 * Contract: nobody gets in who was not named, or let in by `anyone`. The portal group is enabled last and
 * disabled first, so no initiator ever sees a half-made target. CHAP secrets go to the kernel and nowhere
 * else: into no message, no property, no cause. Discovery authentication, one for the whole machine, is
 * left alone.
 */
import { ArgumentError } from '../errors.js';
import type { Backstore } from './backstore.js';
import { type Advice, targetError } from './explain.js';
import { localHost, type TargetHost } from './host.js';
import {
  chooseLun,
  clearLeftover,
  linkLun,
  lunsOf,
  makeTpg,
  recordFolder,
  recordLink,
  recordLun,
  recordMapped,
  recordTarget,
  whenEmpty,
} from './luns.js';
import { checkChap, checkInteger, checkIscsiName, portalName } from './names.js';
import { Undo, undoOnFailure } from './undo.js';

/** A CHAP name and secret; RFC 7143 12.1.3 asks for secrets of at least 96 random bits. */
export interface ChapCredentials {
  /** Name. */
  user: string;
  /** Secret. */
  password: string;
}

/** What an initiator proves itself by, and may ask the target for. */
export interface Chap extends ChapCredentials {
  /** What the target proves itself by (mutual CHAP). Its password must be another one. */
  mutual?: ChapCredentials;
}

/** An initiator that may log in. */
export interface IscsiInitiator {
  /** Its name, in lower case, as `/etc/iscsi/initiatorname.iscsi` has it. */
  name: string;
  /** Default: no authentication. */
  chap?: Chap;
  /** Its writes are refused with WRITE PROTECTED. */
  readOnly?: boolean;
}

/** A target and who may use it, for `createIscsiTarget`. */
export interface IscsiOptions {
  /** Name of the target: `iqn.2026-01.org.example:disk0`. */
  iqn: string;
  /** Where it listens: `address`, `address:port` or `[address]:port`. Default `127.0.0.1:3260`. */
  portals?: readonly string[];
  /** Who may log in. Either this or `anyone`. */
  initiators?: readonly IscsiInitiator[];
  /** Lets every initiator in that reaches a portal (LIO's demo mode), with CHAP if it is given. */
  anyone?: {
    /** What every initiator proves itself by. Default: no authentication. */
    chap?: Chap;
    /** Everybody's writes are refused. Default false. */
    readOnly?: boolean;
  };
  /** Target portal group tag, 1 to 65535. Default 1. */
  tag?: number;
  /** Default: this machine. */
  host?: TargetHost;
}

/** A backstore as a LUN of an iSCSI target. */
export class IscsiLun {
  /** The target it belongs to. */
  readonly target: IscsiTarget;
  /** Logical unit number. */
  readonly lun: number;
  readonly #undo: Undo;
  readonly #forget: (lun: IscsiLun) => Promise<void>;

  /** @internal */
  constructor(
    target: IscsiTarget,
    lun: number,
    undo: Undo,
    forget: (lun: IscsiLun) => Promise<void>,
  ) {
    this.target = target;
    this.lun = lun;
    this.#undo = undo;
    this.#forget = forget;
  }

  /** `iscsi://127.0.0.1:3260/iqn…/0`, as libiscsi and QEMU take it, without credentials. */
  get url(): string {
    return `iscsi://${this.target.portals[0]}/${this.target.iqn}/${this.lun}`;
  }

  /**
   * Takes the LUN away from its initiators; and the target, when it was made for this LUN alone.
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async detach(): Promise<void> {
    await this.#undo.run();
    await this.#forget(this);
  }

  /** As `detach`, for `await using`; rejects as that does. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.detach();
  }
}

/** An iSCSI target portal group in configfs. Made by `createIscsiTarget`. */
export class IscsiTarget {
  /** The kernel it is in. */
  readonly host: TargetHost;
  /** Its name. */
  readonly iqn: string;
  /** `address:port`, in the order given. */
  readonly portals: readonly string[];
  /** Its `tpgt_<tag>` folder. */
  readonly path: string;
  readonly #initiators: readonly IscsiInitiator[];
  readonly #undo: Undo;
  readonly #luns = new Set<IscsiLun>();

  /** @internal Use `createIscsiTarget`. */
  constructor(
    host: TargetHost,
    options: { iqn: string; portals: readonly string[]; initiators: readonly IscsiInitiator[] },
    path: string,
    undo: Undo,
  ) {
    this.host = host;
    this.iqn = options.iqn;
    this.portals = options.portals;
    this.path = path;
    this.#initiators = options.initiators.map(({ name, readOnly }) => ({
      name,
      ...(readOnly === undefined ? {} : { readOnly }),
    }));
    this.#undo = undo;
  }

  /** What was attached through this object and not detached yet. */
  get luns(): IscsiLun[] {
    return [...this.#luns];
  }

  /**
   * Offers a backstore as a LUN to all initiators of this target.
   *
   * @param lun default: the lowest that is free
   * @throws TargetError `ERR_TCMU_TARGET_NAME_TAKEN` when the LUN is, …
   */
  async attach(backstore: Backstore, lun?: number): Promise<IscsiLun> {
    return this.attachFor(backstore, lun, async () => {});
  }

  /** @internal `forget` runs after the LUN's own removal. */
  async attachFor(
    backstore: Backstore,
    lun: number | undefined,
    forget: () => Promise<void>,
  ): Promise<IscsiLun> {
    return undoOnFailure(new Undo(), async (undo) => {
      const { host } = this;
      const number = await chooseLun(host, this.path, lun);
      const path = await linkLun(undo, host, this.path, number, backstore);
      for (const initiator of this.#initiators) {
        const mapped = `${this.path}/acls/${initiator.name}/lun_${number}`;
        await host.mkdir(mapped);
        recordFolder(undo, host, mapped);
        await host.symlink(path, `${mapped}/lun`);
        recordLink(undo, host, `${mapped}/lun`);
        await host.write(`${mapped}/write_protect`, initiator.readOnly === true ? '1' : '0');
      }
      return this.adopt(number, undo, forget);
    });
  }

  /** @internal */
  adopt(lun: number, undo: Undo, forget: () => Promise<void>): IscsiLun {
    const adopted = new IscsiLun(this, lun, undo, async (gone) => {
      this.#luns.delete(gone);
      await forget();
    });
    this.#luns.add(adopted);
    return adopted;
  }

  /**
   * Ends all sessions, detaches all that was attached through this object, and removes the target.
   * Initiators see their connections close.
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async remove(): Promise<void> {
    if (this.#undo.pending.length === 0) return;
    // First of all: no command of an initiator may hold up what follows.
    await disable(this.host, this.path);
    await this.detachAll();
    await this.#undo.run();
  }

  /** @internal */
  async detachAll(): Promise<void> {
    for (const lun of this.luns) await lun.detach();
  }

  /** As `remove`, for `await using`; rejects as that does. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.remove();
  }
}

/**
 * Makes a target with its portals and access rules, and enables it; LUNs come by `attach`.
 *
 * @throws ArgumentError for names, portals and credentials that iSCSI or LIO can't carry
 * @throws TargetError `ERR_TCMU_TARGET_NO_MODULE` (iscsi_target_mod), `_NAME_TAKEN`, `_REJECTED` (a port
 *   that another program listens on), …
 */
export async function createIscsiTarget(options: IscsiOptions): Promise<IscsiTarget> {
  return undoOnFailure(new Undo(), async (undo) => {
    const target = await build(undo, options, options.host ?? localHost);
    await enable(undo, target);
    return target;
  });
}

/**
 * Offers a backstore over iSCSI, on a target of its own that goes with it.
 *
 * @throws as `createIscsiTarget` and `IscsiTarget.attach`
 */
export async function attachIscsi(
  backstore: Backstore,
  options: IscsiOptions & { lun?: number },
): Promise<IscsiLun> {
  const { host } = backstore;
  check(options);
  await clearLeftover(host, 'iscsi', options.iqn, backstore.path);
  return undoOnFailure(new Undo(), async (undo) => {
    const target = await build(undo, options, host);
    const lun = await target.attachFor(backstore, options.lun ?? 0, () => target.remove());
    undo.add(`detach LUN ${lun.lun}`, () => target.detachAll());
    await enable(undo, target);
    return lun;
  });
}

/** Everything but the last step, `enable`. */
async function build(undo: Undo, options: IscsiOptions, host: TargetHost): Promise<IscsiTarget> {
  const portals = check(options);
  const { iqn, tag = 1, initiators = [], anyone } = options;
  const tpg = await makeTpg(undo, host, 'iscsi', iqn, tag);
  const attributes = {
    authentication: anyone?.chap === undefined ? '0' : '1',
    generate_node_acls: anyone === undefined ? '0' : '1',
    // A session that comes back finds its node, with what was negotiated and reserved, again.
    cache_dynamic_acls: anyone === undefined ? '0' : '1',
    demo_mode_write_protect: anyone?.readOnly === true ? '1' : '0',
  };
  for (const [name, value] of Object.entries(attributes)) {
    await host.write(`${tpg}/attrib/${name}`, value);
  }
  if (anyone?.chap !== undefined) await writeChap(host, `${tpg}/auth`, anyone.chap);
  for (const initiator of initiators) await makeAcl(undo, host, tpg, initiator);
  for (const portal of portals) {
    const path = `${tpg}/np/${portal}`;
    await host.mkdir(path, PORTAL_ADVICE);
    recordFolder(undo, host, path);
  }
  return new IscsiTarget(host, { iqn, portals, initiators }, tpg, undo);
}

async function enable(undo: Undo, target: IscsiTarget): Promise<void> {
  await target.host.write(`${target.path}/enable`, '1');
  undo.add(`disable ${target.path}`, () => disable(target.host, target.path));
}

/**
 * The LUNs of iSCSI targets that a backstore already is, as after a restart of its handler. Detaching the
 * last LUN of a target removes that too.
 */
export async function iscsiLuns(backstore: Backstore): Promise<IscsiLun[]> {
  const { host } = backstore;
  const links = (await lunsOf(host, backstore.path)).filter((link) => link.fabric === 'iscsi');
  const luns = await Promise.all(
    links.map(async (link) => {
      const tpg = host.target('iscsi', link.wwn, `tpgt_${link.tag}`);
      // Not enabled: left half-made by an attach that was cut short; attachIscsi clears it away.
      if ((await host.readOptional(`${tpg}/enable`)) !== '1') return undefined;
      const target = await openTarget(host, link.wwn, tpg);
      const undo = new Undo();
      recordLun(undo, host, link);
      await recordMapped(undo, host, tpg, link.path);
      return target.adopt(link.lun, undo, () => whenEmpty(host, tpg, () => target.remove()));
    }),
  );
  return luns.filter((lun) => lun !== undefined);
}

async function openTarget(host: TargetHost, iqn: string, tpg: string): Promise<IscsiTarget> {
  const undo = new Undo();
  await recordTarget(undo, host, tpg);
  undo.add(`disable ${tpg}`, () => disable(host, tpg));
  const [acls, portals] = await Promise.all([host.list(`${tpg}/acls`), host.list(`${tpg}/np`)]);
  const initiators = acls.map((name) => ({ name }));
  return new IscsiTarget(host, { iqn, portals, initiators }, tpg, undo);
}

const PORTAL_ADVICE: Advice = {
  // Whatever the reason, LIO says EINVAL (target_fabric_configfs.c).
  EINVAL: [
    'REJECTED',
    'the kernel cannot listen there: another program may have this port, or IPv6 is switched off',
  ],
};

/** Refuses what can't be made; answers the portals' names. */
function check(options: IscsiOptions): string[] {
  const { iqn, tag = 1, initiators = [], anyone } = options;
  checkIscsiName('iqn', iqn);
  checkInteger('tag', tag, 1, 0xffff);
  const portals = (options.portals ?? ['127.0.0.1:3260']).map(portalName);
  if (portals.length === 0) throw new ArgumentError('tcmu: portals: at least one is needed');
  refuseDoubles('portals', portals);
  refuseDoubles(
    'initiators',
    initiators.map((initiator) => initiator.name),
  );
  if ((anyone === undefined) === (initiators.length === 0)) {
    throw new ArgumentError(
      'tcmu: say who may log in: either `initiators: [{ name: "iqn.…" }]`, or `anyone: {}`',
    );
  }
  for (const initiator of initiators) {
    checkIscsiName('initiator name', initiator.name);
    if (initiator.chap !== undefined) checkCredentials(initiator.chap);
  }
  if (anyone?.chap !== undefined) checkCredentials(anyone.chap);
  return portals;
}

function refuseDoubles(what: string, list: readonly string[]): void {
  const twice = list.find((entry, index) => list.indexOf(entry) !== index);
  if (twice !== undefined) throw new ArgumentError(`tcmu: ${what}: ${twice} is there twice`);
}

function checkCredentials(chap: Chap): void {
  checkChap('chap.user', chap.user);
  checkChap('chap.password', chap.password);
  if (chap.mutual === undefined) return;
  checkChap('chap.mutual.user', chap.mutual.user);
  checkChap('chap.mutual.password', chap.mutual.password);
  if (chap.mutual.password === chap.password) {
    // RFC 7143 12.1.3: otherwise a peer could answer a challenge with the other side's own answer.
    throw new ArgumentError('tcmu: chap.mutual.password: must be another one than chap.password');
  }
}

async function makeAcl(
  undo: Undo,
  host: TargetHost,
  tpg: string,
  initiator: IscsiInitiator,
): Promise<void> {
  const path = `${tpg}/acls/${initiator.name}`;
  await host.mkdir(path);
  recordFolder(undo, host, path);
  if (initiator.chap !== undefined) await writeChap(host, `${path}/auth`, initiator.chap);
  // By initiator, since the portal group's own switch counts for all. Missing before Linux 6.1.
  const own = `${path}/attrib/authentication`;
  const wanted = initiator.chap === undefined ? '0' : '1';
  if (await host.exists(own)) await host.write(own, wanted);
  else if (wanted === '1') await host.write(`${tpg}/attrib/authentication`, '1');
}

async function writeChap(host: TargetHost, folder: string, chap: Chap): Promise<void> {
  const secret = { secret: true };
  await host.write(`${folder}/userid`, chap.user);
  await host.write(`${folder}/password`, chap.password, secret);
  if (chap.mutual === undefined) return;
  await host.write(`${folder}/userid_mutual`, chap.mutual.user);
  await host.write(`${folder}/password_mutual`, chap.mutual.password, secret);
  const path = `${folder}/authenticate_target`;
  if ((await host.read(path)) !== '1') {
    throw targetError('NO_EFFECT', 'switch on mutual CHAP by', path, 'the kernel left it off');
  }
}

/** A target that is gone already is no failure. */
async function disable(host: TargetHost, tpg: string): Promise<void> {
  const path = `${tpg}/enable`;
  if (await host.exists(path)) await host.write(path, '0');
}
