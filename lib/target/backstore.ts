// SPDX-License-Identifier: Apache-2.0
/**
 * A user backstore: `core/user_<hba>/<name>` in configfs, made, read back, resized and removed.
 *
 * Contract: `createBackstore` leaves either an enabled device whose settings were read back, or nothing.
 * It does not open the uio device: serving is another module's, and can be another process's, business.
 * A backstore outlives this process; `remove()` is explicit (or by `await using`).
 */
import { ArgumentError, errnoOf, TargetError } from '../errors.js';
import { type Advice, targetError } from './explain.js';
import { isProblem, localHost, type TargetHost } from './host.js';
import { lunsOf, removeIfEmpty } from './luns.js';
import {
  checkBlockSize,
  checkConfig,
  checkInteger,
  checkName,
  checkSerial,
  checkSize,
  quoted,
} from './names.js';
import { whileListening } from './netlink.js';
import { findUio, parseConfig, type UioDevice, waitForUio } from './uio.js';
import { Undo, undoOnFailure } from './undo.js';

/** Bytes of the largest I/O that initiators are told to send, unless `maxSectors` says otherwise. */
const MAX_TRANSFER = 1 << 20;
/** The kernel silently takes less when asked for a larger ring (MB_CMDR_SIZE_DEF, target_core_user.c). */
const MAX_RING_MIB = 8;
const S32_MAX = 0x7fffffff;
const U32_MAX = 0xffffffff;
/** TCMU_ZC_AREA_MB_MAX of the zero-copy patches. */
const MAX_WINDOW_MIB = 65536;
/** The kernel keeps these two as 32-bit milliseconds (val * MSEC_PER_SEC, target_core_user.c). */
const MAX_COMMAND_SECONDS = 4_294_967;
const MAX_QUEUE_SECONDS = 2_147_483;

/** What a backstore is like, for `createBackstore`: names in parentheses are those of configfs. */
export interface BackstoreOptions {
  /** Unique among all user backstores; at most 255 bytes, no `/`, no control characters. */
  name: string;
  /** Capacity in bytes, a multiple of `blockSize`. */
  size: number;
  /** Logical block size in bytes: 512 (default), 1024, 2048 or 4096. */
  blockSize?: number;
  /**
   * Configuration string `<subtype>/<rest>`, at most 255 bytes: shown in the uio device's name, so that a
   * handler knows what to serve. Commas are fine.
   */
  config?: string;
  /**
   * The N of `user_N`. Default: the first that is free, so that a folder that is blocked by one device
   * (removing waits for the handler's netlink reply, say) never blocks another.
   */
  hba?: number;
  /**
   * Largest I/O in blocks (hw_max_sectors), rounded down by the kernel to whole pages. Default 1 MiB's
   * worth (2048 blocks of 512); the kernel's own default of 128 cuts every I/O at 64 KiB.
   */
  maxSectors?: number;
  /**
   * Lets `enable`, `resize` and `remove` wait for a reply of the process that listens on netlink, if one
   * has switched replies on. Default false: whoever creates the device opens it himself, and a dead
   * listener would block these for ever (nl_reply_supported = -1).
   */
  waitForListener?: boolean;
  /** Data area in MiB, shared by all commands in flight. Kernel's default 1024, cut at the module's limit. */
  dataAreaMiB?: number;
  /**
   * Pages the data area is handed out in (data_pages_per_blk, Linux 5.15): what a command holds at least.
   * More make fewer pieces of memory and less work a command. Default: 16 where the kernel can, but 1 in
   * a data area of less than 64 MiB, which fewer than 1024 commands would fill.
   */
  pagesPerBlock?: number;
  /** Mailbox and command ring in MiB, 1 to 8. Kernel's default 8. Linux 5.16. */
  ringMiB?: number;
  /**
   * Unit serial number (wwn/vpd_unit_serial), printable ASCII. The kernel needs it to keep persistent
   * reservations; the VPD page itself is the handler's to answer.
   */
  serial?: string;
  /** Seconds after which the kernel answers a command in the handler's place. Default 30; 0: never. */
  commandTimeout?: number;
  /**
   * Seconds a command may wait for room in a full ring: -1 (default): as `commandTimeout`; 0: not at all.
   */
  queueFullTimeout?: number;
  /**
   * Whether aborts and resets are passed to the handler (tmr_notification). Default: where the kernel can
   * (Linux 5.10); asking for it explicitly makes an older kernel an error.
   */
  taskManagement?: boolean;
  /** What attrib/emulate_write_cache says. Kernel's default false; the handler's mode pages decide. */
  writeCache?: boolean;
  /**
   * Shows page-aligned commands' own pages to the handler instead of copying them: needs the kernel module
   * of this project's `kernel/` folder, and has rules of its own (docs/zero-copy.md). `'auto'`: where the
   * module has it. Default false. With it the command time-out is 0 and stays so.
   */
  zeroCopy?: boolean | 'auto' | ZeroCopySettings;
  /** Default: this machine. */
  host?: TargetHost;
}

/** How zero copy works on a device, for `BackstoreOptions.zeroCopy`. */
export interface ZeroCopySettings {
  /** Size of the window in MiB; a command that finds no room is copied. Kernel's default 256 (zc_area_mb). */
  windowMiB?: number;
  /**
   * Whether Data-In memory is zeroed before the handler sees it. Kernel's default true; false is for handlers
   * trusted with the initiators' memory that fill every buffer they answer GOOD for (zc_scrub).
   */
  scrub?: boolean;
  /** Shorter commands are copied, in bytes. Kernel's default 0 (zc_min_bytes). */
  minBytes?: number;
  /** Do without where the kernel module has no zero copy, instead of failing. `'auto'` is this alone. */
  optional?: boolean;
}

/** attrib/zc_stats, since the device was enabled. */
export interface ZeroCopyStatistics {
  /** Commands whose pages were shown. */
  commands: number;
  /** Commands with data that were copied. */
  copied: number;
  /** How often one of them found no room in the window. */
  noSpace: number;
  /** Page faults in the window. */
  faults: number;
  /** Those of them that were answered with SIGBUS or EFAULT. */
  denied: number;
  /** How often a range of the window was taken away at completion. */
  zaps: number;
  /** Bytes zeroed. */
  scrubbed: number;
}

/** What the kernel holds, read back. A setting that this kernel doesn't have is undefined. */
export interface BackstoreSettings {
  /** Whether its uio device exists. */
  enabled: boolean;
  /** Commands are held back (action/block_dev), as during a recovery. */
  blocked: boolean;
  /** Bytes. */
  size: number;
  /** Logical block size in bytes (hw_block_size). */
  blockSize: number;
  /** Largest I/O in blocks (hw_max_sectors). */
  maxSectors: number;
  /** `<subtype>/<rest>`; empty when none was set. */
  config: string;
  /** Unit serial number (wwn/vpd_unit_serial); empty when none was set. */
  serial: string;
  /** Seconds; 0: never (cmd_time_out). */
  commandTimeout: number;
  /** Seconds; -1: as `commandTimeout` (qfull_time_out). Undefined on kernels that don't tell. */
  queueFullTimeout: number | undefined;
  /** MiB (max_data_area_mb). Undefined on kernels that don't tell. */
  dataAreaMiB: number | undefined;
  /** Pages the data area is handed out in (data_pages_per_blk). Undefined before Linux 5.15. */
  pagesPerBlock: number | undefined;
  /** Mailbox and command ring in MiB (cmd_ring_size_mb). Undefined before Linux 5.16. */
  ringMiB: number | undefined;
  /** nl_reply_supported: -1 never waits for a netlink reply, 1 does, 0 when the module's switch was off. */
  netlinkReply: number | undefined;
  /** Whether aborts and resets are passed on (tmr_notification). Undefined before Linux 5.10. */
  taskManagement: boolean | undefined;
  /** attrib/emulate_write_cache. */
  writeCache: boolean;
  /** False without zero copy, or where the kernel module lacks it. */
  zeroCopy: false | Required<Omit<ZeroCopySettings, 'optional'>>;
}

/**
 * A user backstore that exists in configfs. Made by `createBackstore`, `openBackstore` or
 * `discover`; it outlives this object and this process until `remove`.
 */
export class Backstore {
  /** The kernel it is in. */
  readonly host: TargetHost;
  /** The N of `user_N`. */
  readonly hba: number;
  /** Its folder's name in `user_N`. */
  readonly name: string;
  /** Its folder in configfs. */
  readonly path: string;
  #uio: UioDevice | undefined;
  readonly #undo: Undo;

  /** @internal Use `createBackstore` or `openBackstore`. */
  constructor(host: TargetHost, hba: number, name: string, uio?: UioDevice, undo?: Undo) {
    this.host = host;
    this.hba = hba;
    this.name = name;
    this.path = host.target('core', `user_${hba}`, name);
    this.#uio = uio;
    this.#undo = undo ?? new Undo();
    if (undo === undefined) recordRemoval(this.#undo, host, hba, name);
  }

  /** The uio device when it was last looked at; undefined as long as the backstore isn't enabled. */
  get uio(): UioDevice | undefined {
    return this.#uio;
  }

  /**
   * `/dev/uioN`, for the process that serves.
   *
   * @throws TargetError `ERR_TCMU_TARGET_NO_DEVICE` when the backstore is not enabled
   */
  get uioPath(): string {
    if (this.#uio === undefined) {
      throw targetError('NO_DEVICE', 'find the uio device of', this.path, 'it is not enabled');
    }
    return this.#uio.uioPath;
  }

  /**
   * Which kind of handler it is for, and what that is told: the configuration string in two.
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async config(): Promise<{
    /** The first part: who is to serve it. */
    subtype: string;
    /** What follows the first `/`: what is to be served. */
    rest: string;
  }> {
    return parseConfig(await this.#attribute('dev_config'));
  }

  /**
   * Everything read back from the kernel.
   * @throws TargetError (`ERR_TCMU_TARGET_*`) when it has been removed
   */
  async settings(): Promise<BackstoreSettings> {
    const [enable, blocked, info, serial] = await Promise.all([
      this.host.readOptional(`${this.path}/enable`),
      this.host.readOptional(`${this.path}/action/block_dev`),
      this.host.read(`${this.path}/info`),
      this.host.readOptional(`${this.path}/wwn/vpd_unit_serial`),
    ]);
    const text = (name: string): Promise<string> => this.#attribute(name);
    const number = async (name: string): Promise<number> => Number(await text(name));
    const optional = async (name: string): Promise<number | undefined> => {
      const value = await this.host.readOptional(`${this.path}/attrib/${name}`);
      return value === undefined ? undefined : Number(value);
    };
    const taskManagement = await optional('tmr_notification');
    return {
      // Older kernels let `enable` be written only; the status line is as old as LIO.
      enabled: enable === undefined ? info.includes('Status: ACTIVATED') : enable.trim() === '1',
      blocked: blocked?.trim() === 'blocked',
      size: await number('dev_size'),
      blockSize: await number('hw_block_size'),
      maxSectors: await number('hw_max_sectors'),
      config: await text('dev_config'),
      serial: serial?.replace(/^T10 VPD Unit Serial Number: /, '') ?? '',
      commandTimeout: await number('cmd_time_out'),
      queueFullTimeout: await optional('qfull_time_out'),
      dataAreaMiB: await optional('max_data_area_mb'),
      pagesPerBlock: await optional('data_pages_per_blk'),
      ringMiB: await optional('cmd_ring_size_mb'),
      netlinkReply: await optional('nl_reply_supported'),
      taskManagement: taskManagement === undefined ? undefined : taskManagement === 1,
      writeCache: (await number('emulate_write_cache')) === 1,
      zeroCopy: (await optional('zero_copy')) === 1 && {
        windowMiB: await number('zc_area_mb'),
        scrub: (await number('zc_scrub')) === 1,
        minBytes: await number('zc_min_bytes'),
      },
    };
  }

  /**
   * What zero copy has done so far (attrib/zc_stats); undefined for a device without.
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async zeroCopyStatistics(): Promise<ZeroCopyStatistics | undefined> {
    if ((await this.host.readOptional(`${this.path}/attrib/zero_copy`))?.trim() !== '1') return;
    const text = await this.#attribute('zc_stats');
    const counts = new Map(
      text.split('\n').map((line) => line.split(' ') as [string, string | undefined]),
    );
    const count = (name: string): number => Number(counts.get(name) ?? Number.NaN);
    return {
      commands: count('cmds'),
      copied: count('copied'),
      noSpace: count('nospace'),
      faults: count('faults'),
      denied: count('denied'),
      zaps: count('zaps'),
      scrubbed: count('scrubbed'),
    };
  }

  /**
   * Changes `scrub` and `minBytes` while in use, for commands to come.
   *
   * @throws TargetError `ERR_TCMU_TARGET_UNSUPPORTED` when the kernel module has no zero copy
   */
  async setZeroCopy(settings: Pick<ZeroCopySettings, 'scrub' | 'minBytes'>): Promise<void> {
    await requireZeroCopy(this.host, this.path);
    for (const [attribute, value] of Object.entries(zeroCopyAttributes(settings))) {
      if (value === undefined) continue;
      await this.host.write(`${this.path}/${attribute}`, value);
      await verify(this.path, this.host, attribute, value);
    }
  }

  /**
   * Enables a backstore that somebody made and left; waits for its uio device.
   * @throws TargetError `ERR_TCMU_TARGET_BUSY` when it is enabled already or netlink is blocked,
   *   `_NO_MEMORY` when the ring is too large, `_STUCK` when a listener does not answer
   */
  async enable(): Promise<UioDevice> {
    await this.host.write(`${this.path}/enable`, '1', {
      advice: await this.#advice(ENABLE_ADVICE),
    });
    this.#uio = await waitForUio(this.host, this.hba, this.name);
    return this.#uio;
  }

  /**
   * Changes the capacity, also while it is in use. Listeners on netlink are told (RECONFIG); whoever
   * serves the device has to know the new size too and raise the unit attention.
   *
   * @param size bytes, a multiple of the block size
   * @throws ArgumentError; TargetError `_REJECTED` when a listener refused, `_NO_EFFECT`, …
   */
  async resize(size: number): Promise<void> {
    checkSize(size, Number(await this.#attribute('hw_block_size')));
    await this.#reconfigure('dev_size', String(size));
  }

  /**
   * Changes the configuration string (`<subtype>/<rest>`, at most 255 bytes); listeners on netlink
   * are told.
   * @throws ArgumentError; TargetError `ERR_TCMU_TARGET_REJECTED` when a listener refused
   */
  async setConfig(config: string): Promise<void> {
    checkConfig(config);
    await this.#reconfigure('dev_config', config);
    this.#uio = await findUio(this.host, this.hba, this.name);
  }

  /**
   * Changes emulate_write_cache; listeners on netlink are told.
   * @throws TargetError `ERR_TCMU_TARGET_REJECTED` when a listener refused
   */
  async setWriteCache(on: boolean): Promise<void> {
    await this.#reconfigure('emulate_write_cache', on ? '1' : '0');
  }

  /**
   * Changes how long the kernel waits for the handler, in seconds; 0: for ever.
   * @throws ArgumentError; TargetError `ERR_TCMU_TARGET_BUSY` while a LUN is attached
   */
  async setCommandTimeout(seconds: number): Promise<void> {
    checkInteger('commandTimeout', seconds, 0, MAX_COMMAND_SECONDS);
    await this.host.write(`${this.path}/attrib/cmd_time_out`, String(seconds), {
      advice: {
        EINVAL: ['BUSY', 'the kernel changes this only while no LUN leads here: detach it first'],
      },
    });
    await verify(this.path, this.host, 'attrib/cmd_time_out', String(seconds));
  }

  /**
   * Holds back new commands: initiators get BUSY and try again. What is in the ring goes on
   * (action/block_dev).
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async block(): Promise<void> {
    await this.host.write(`${this.path}/action/block_dev`, '1');
  }

  /**
   * Lets commands in again (action/block_dev).
   * @throws TargetError (`ERR_TCMU_TARGET_*`)
   */
  async unblock(): Promise<void> {
    await this.host.write(`${this.path}/action/block_dev`, '0');
  }

  /**
   * Removes the device, and its `user_N` folder when it was the last in it. Without it, nothing happens.
   *
   * @throws TargetError `ERR_TCMU_TARGET_BUSY` as long as a LUN leads here; it can be tried again
   */
  async remove(): Promise<void> {
    try {
      await this.#undo.run();
    } catch (error) {
      if (!isProblem(error, 'BUSY')) throw error;
      const luns = await lunsOf(this.host, this.path);
      if (luns.length === 0) throw error;
      throw targetError(
        'BUSY',
        'remove',
        this.path,
        `still attached as ${luns.map((lun) => lun.path).join(', ')}: detach it there first`,
        error,
      );
    }
    this.#uio = undefined;
  }

  /** As `remove`, for `await using`; rejects as that does. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.remove();
  }

  async #advice(advice: Advice): Promise<Advice> {
    const waits = await this.host.readOptional(`${this.path}/attrib/nl_reply_supported`);
    return Number(waits ?? 0) > 0 ? { ...advice, ...LISTENER_ADVICE } : advice;
  }

  #attribute(name: string): Promise<string> {
    return this.host.read(`${this.path}/attrib/${name}`);
  }

  async #reconfigure(attribute: string, value: string): Promise<void> {
    const path = `${this.path}/attrib/${attribute}`;
    // An enabled device's RECONFIG is a multicast, and the kernel fails the write when nobody hears it.
    const advice = await this.#advice(RECONFIG_ADVICE);
    await whileListening(this.host, () => this.host.write(path, value, { advice }));
    await verify(this.path, this.host, `attrib/${attribute}`, value);
  }
}

const NO_USER_MODULE: Advice = {
  EINVAL: ['NO_MODULE', 'the kernel has no user backstore: modprobe target_core_user'],
};

const ENABLE_ADVICE: Advice = {
  EEXIST: ['BUSY', 'it is enabled already'],
  EAGAIN: [
    'BUSY',
    "TCMU's netlink is blocked, as while a listener recovers: try again. If it stays so, write 0 to " +
      '/sys/module/target_core_user/parameters/block_netlink',
  ],
  EINTR: ['BUSY', "it was cut short by a reset of TCMU's netlink: try again"],
  ENOMEM: ['NO_MEMORY', 'the kernel has no memory for the ring: choose a smaller ringMiB'],
};

/** Where the kernel passes on what a process answered that listens on netlink. */
const LISTENER_ADVICE: Advice = {
  ETIMEDOUT: ['REJECTED', 'the process that listens on netlink did not get it done in time'],
  '*': ['REJECTED', 'the process that listens on netlink refused it'],
};

const RECONFIG_ADVICE: Advice = {
  ...ENABLE_ADVICE,
  ESRCH: ['NETLINK', 'nobody listens for the change on netlink, and the kernel insists on it'],
  EINVAL: ['REJECTED', 'the kernel, or the process that serves the device, refused the change'],
  EOPNOTSUPP: ['REJECTED', 'the process that serves the device does not support the change'],
};

/**
 * Makes and enables a user backstore: mkdir, settings, `enable`, read back, wait for `/dev/uioN`.
 *
 * @throws ArgumentError for anything in `options` that configfs can't carry
 * @throws TargetError `ERR_TCMU_TARGET_NAME_TAKEN`, `_NO_MODULE`, `_PERMISSION`, `_NO_CONFIGFS`,
 *   `_UNSUPPORTED` (the kernel lacks an option that was asked for), `_NO_EFFECT`, `_STUCK`, …
 */
export async function createBackstore(options: BackstoreOptions): Promise<Backstore> {
  const blockSize = options.blockSize ?? 512;
  const maxSectors = options.maxSectors ?? MAX_TRANSFER / blockSize;
  check(options, blockSize, maxSectors);
  const { name, host = localHost } = options;
  await refuseTaken(host, name);

  return undoOnFailure(new Undo(), async (undo) => {
    const hba = await makeFolder(undo, host, name, options.hba);
    const path = host.target('core', `user_${hba}`, name);

    const zeroCopy = await zeroCopySettings(host, path, options.zeroCopy);
    const control: Record<string, number | undefined> = {
      dev_size: options.size,
      hw_block_size: blockSize,
      hw_max_sectors: maxSectors,
      nl_reply_supported: options.waitForListener === true ? 1 : -1,
      // Before data_pages_per_blk, which the kernel checks against it.
      max_data_area_mb: options.dataAreaMiB,
      data_pages_per_blk: await pagesPerBlock(host, path, options),
      cmd_ring_size_mb: options.ringMiB,
      zero_copy: zeroCopy && 1,
      zc_area_mb: zeroCopy?.windowMiB,
    };
    for (const [key, value] of Object.entries(control)) {
      if (value === undefined) continue;
      // One by one, so that a refusal names the key.
      await host.write(`${path}/control`, `${key}=${value}`);
      // It also ignores keys that it doesn't know, and cuts values that are too large.
      await verify(path, host, `attrib/${key}`, String(value));
    }

    const attributes: Record<string, string | undefined> = {
      // Not through `control`, which splits at commas.
      'attrib/dev_config': options.config,
      'attrib/cmd_time_out': options.commandTimeout?.toString(),
      'attrib/qfull_time_out': options.queueFullTimeout?.toString(),
      'attrib/tmr_notification': await taskManagement(host, path, options.taskManagement),
      'attrib/emulate_write_cache':
        options.writeCache === undefined ? undefined : options.writeCache ? '1' : '0',
      'wwn/vpd_unit_serial': options.serial,
      ...zeroCopyAttributes(zeroCopy ?? {}),
    };
    for (const [attribute, value] of Object.entries(attributes)) {
      if (value === undefined) continue;
      await host.write(`${path}/${attribute}`, value);
      await verify(path, host, attribute, value);
    }

    const backstore = new Backstore(host, hba, name, undefined, undo);
    await backstore.enable();
    return backstore;
  });
}

/**
 * A backstore that exists: made by an earlier run, another process, or targetcli.
 *
 * @throws TargetError `ERR_TCMU_TARGET_NOT_FOUND`
 */
export async function openBackstore(
  name: string,
  options: { hba?: number; host?: TargetHost } = {},
): Promise<Backstore> {
  checkName(name);
  const { host = localHost } = options;
  const found = (await backstoreFolders(host, name)).filter(
    (hba) => options.hba === undefined || hba === options.hba,
  );
  const [hba] = found;
  if (hba === undefined) {
    throw targetError(
      'NOT_FOUND',
      'open',
      host.target('core', `user_${options.hba ?? '*'}`, name),
      'there is no such backstore: createBackstore() makes one, discover() lists them',
    );
  }
  if (found.length > 1) {
    throw new ArgumentError(
      `tcmu: open backstore ${quoted(name)}: there are ${found.length} of that name, in ` +
        `${found.map((n) => `user_${n}`).join(', ')}: say which by \`hba\``,
    );
  }
  return new Backstore(host, hba, name, await findUio(host, hba, name));
}

function check(options: BackstoreOptions, blockSize: number, maxSectors: number): void {
  checkName(options.name);
  checkBlockSize(blockSize);
  checkSize(options.size, blockSize);
  if (options.config !== undefined) checkConfig(options.config);
  if (options.serial !== undefined) checkSerial(options.serial);
  // The kernel rounds down to whole pages, and to nothing what is less than one.
  checkInteger('maxSectors', maxSectors, Math.max(1, 4096 / blockSize), S32_MAX);
  const bounds = [
    ['hba', options.hba, 0, S32_MAX],
    ['dataAreaMiB', options.dataAreaMiB, 1, S32_MAX],
    ['pagesPerBlock', options.pagesPerBlock, 1, S32_MAX],
    ['ringMiB', options.ringMiB, 1, MAX_RING_MIB],
    ['commandTimeout', options.commandTimeout, 0, MAX_COMMAND_SECONDS],
    ['queueFullTimeout', options.queueFullTimeout, -1, MAX_QUEUE_SECONDS],
  ] as const;
  for (const [what, value, min, max] of bounds) {
    if (value !== undefined) checkInteger(what, value, min, max);
  }
  if (typeof options.zeroCopy === 'object') {
    const { windowMiB, minBytes } = options.zeroCopy;
    if (windowMiB !== undefined) checkInteger('zeroCopy.windowMiB', windowMiB, 1, MAX_WINDOW_MIB);
    if (minBytes !== undefined) checkInteger('zeroCopy.minBytes', minBytes, 0, U32_MAX);
  }
  if (options.zeroCopy !== undefined && options.zeroCopy !== false && options.commandTimeout) {
    throw new ArgumentError(
      `tcmu: create backstore ${quoted(options.name)}: commandTimeout is ${options.commandTimeout}, but with zero copy it is 0: a command that timed out would take its pages from under the handler`,
    );
  }
}

/** The numbers N of all `user_N`. */
export async function userHbas(host: TargetHost): Promise<number[]> {
  return (await host.list(host.target('core')))
    .map((entry) => /^user_(0|[1-9]\d*)$/.exec(entry)?.[1])
    .filter((number) => number !== undefined)
    .map(Number)
    .sort((a, b) => a - b);
}

/** The HBAs that have a backstore of this name. */
async function backstoreFolders(host: TargetHost, name: string): Promise<number[]> {
  const hbas = await userHbas(host);
  const found = await Promise.all(
    hbas.map((hba) => host.exists(host.target('core', `user_${hba}`, name))),
  );
  return hbas.filter((_hba, index) => found[index]);
}

async function refuseTaken(host: TargetHost, name: string, ours?: number): Promise<void> {
  const other = (await backstoreFolders(host, name)).find((hba) => hba !== ours);
  if (other === undefined) return;
  throw targetError(
    'NAME_TAKEN',
    'create backstore',
    host.target('core', `user_${other}`, name),
    'there is one of that name: openBackstore() takes it over, or choose another name',
  );
}

/** Makes `user_N/<name>`; answers N. */
async function makeFolder(
  undo: Undo,
  host: TargetHost,
  name: string,
  wanted: number | undefined,
): Promise<number> {
  for (;;) {
    const hba = wanted ?? firstFree(await userHbas(host));
    const folder = host.target('core', `user_${hba}`);
    try {
      await host.mkdir(folder, NO_USER_MODULE);
    } catch (error) {
      if (!isProblem(error, 'NAME_TAKEN')) throw error;
      // Somebody was faster: take the next. Where the caller chose the number, share it.
      if (wanted === undefined) continue;
    }
    try {
      await host.mkdir(`${folder}/${name}`);
    } catch (error) {
      await removeIfEmpty(host, folder);
      // A neighbour's removal took the empty folder away between the two calls.
      if (isProblem(error, 'NOT_FOUND')) continue;
      throw error;
    }
    recordRemoval(undo, host, hba, name);
    // Two processes that make the same name at once both see the other: both give up, never both win.
    await refuseTaken(host, name, hba);
    return hba;
  }
}

function firstFree(taken: readonly number[]): number {
  let free = 0;
  while (taken.includes(free)) free += 1;
  return free;
}

function recordRemoval(undo: Undo, host: TargetHost, hba: number, name: string): void {
  const folder = host.target('core', `user_${hba}`);
  undo.add(`remove ${folder} when it is empty`, () => removeIfEmpty(host, folder));
  undo.add(`remove ${folder}/${name}`, () => removeBackstore(host, `${folder}/${name}`));
}

async function taskManagement(
  host: TargetHost,
  path: string,
  wanted: boolean | undefined,
): Promise<string | undefined> {
  if (wanted !== undefined) return wanted ? '1' : '0';
  return (await host.exists(`${path}/attrib/tmr_notification`)) ? '1' : undefined;
}

/** What to set, undefined for none. The kernel ignores unknown keys of `control`, so it is asked first. */
async function zeroCopySettings(
  host: TargetHost,
  path: string,
  wanted: BackstoreOptions['zeroCopy'] = false,
): Promise<ZeroCopySettings | undefined> {
  if (wanted === false) return;
  const settings = typeof wanted === 'object' ? wanted : { optional: wanted === 'auto' };
  if (settings.optional && !(await host.exists(`${path}/attrib/zero_copy`))) return;
  await requireZeroCopy(host, path);
  return settings;
}

async function requireZeroCopy(host: TargetHost, path: string): Promise<void> {
  if (await host.exists(`${path}/attrib/zero_copy`)) return;
  throw targetError(
    'UNSUPPORTED',
    'switch zero copy on for',
    path,
    'the loaded target_core_user has no zero copy: build and load the one of the kernel/ folder ' +
      "(docs/zero-copy.md), or leave zeroCopy out, or say 'auto'",
  );
}

function zeroCopyAttributes(settings: ZeroCopySettings): Record<string, string | undefined> {
  return {
    'attrib/zc_scrub': settings.scrub === undefined ? undefined : settings.scrub ? '1' : '0',
    'attrib/zc_min_bytes': settings.minBytes?.toString(),
  };
}

async function pagesPerBlock(
  host: TargetHost,
  path: string,
  { pagesPerBlock: wanted, dataAreaMiB = 1024 }: BackstoreOptions,
): Promise<number | undefined> {
  if (wanted !== undefined) return wanted;
  if (dataAreaMiB < 64) return undefined;
  return (await host.exists(`${path}/attrib/data_pages_per_blk`)) ? 16 : undefined;
}

/** Reads an attribute back after it was written. */
async function verify(
  path: string,
  host: TargetHost,
  attribute: string,
  value: string,
): Promise<void> {
  const text = await host.read(`${path}/${attribute}`);
  const effective = text.replace(/^T10 VPD Unit Serial Number: /, '');
  if (effective === value) return;
  const limit = `${host.sysfs}/module/target_core_user/parameters/global_max_data_area_mb`;
  const advice =
    attribute === 'attrib/max_data_area_mb'
      ? `the data area is limited to ${effective} MiB by ${limit}: ask for less, or raise that first`
      : `the kernel took ${quoted(value)} and holds ${quoted(effective)}`;
  throw new TargetError('ERR_TCMU_TARGET_NO_EFFECT', `tcmu: set ${path}/${attribute}: ${advice}`, {
    operation: 'set',
    path: `${path}/${attribute}`,
  });
}

/** Target port groups that an administrator made below a backstore go with it; while it is attached nothing does. */
async function removeBackstore(host: TargetHost, path: string): Promise<void> {
  try {
    await host.rmdir(path);
  } catch (error) {
    if (errnoOf(error) !== 'ENOTEMPTY' || (await lunsOf(host, path)).length > 0) throw error;
    for (const group of await host.list(`${path}/alua`)) {
      if (group !== 'default_tg_pt_gp') await host.rmdir(`${path}/alua/${group}`);
    }
    await host.rmdir(path);
  }
}
