// SPDX-License-Identifier: Apache-2.0
/**
 * The whole of a handler's life in one call: create the backstore, serve it, export it; and undo all of
 * it in reverse when asked, or when the process is asked to end.
 *
 * Contract: when `serve` rejects, nothing it made is left. When the process is killed, everything stays
 * in the kernel and the initiator's I/O waits: the next `serve` of the same name takes it back
 * (`recover`), exports included, and nothing acknowledged is lost, since the kernel hands every
 * unanswered command to the initiator for a retry.
 */
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { hostname } from 'node:os';
import type { Command } from './device/command.js';
import { Device, type DeviceOptions } from './device/device.js';
import type { CommandHandler } from './device/handler.js';
import { openUio } from './device/ring-source.js';
import { ArgumentError, TargetError } from './errors.js';
import { BlockDevice, type BlockDeviceOptions } from './scsi/block-device.js';
import { soon } from './scsi/nexuses.js';
import { type PortGroup, SINGLE_PORT_GROUP } from './scsi/port-groups.js';
import type { BlockStore } from './store/block-store.js';
import {
  type Backstore,
  type BackstoreOptions,
  createBackstore,
  openBackstore,
} from './target/backstore.js';
import { type Exports, exportsOf } from './target/exports.js';
import { attachIscsi, type IscsiLun, type IscsiOptions } from './target/iscsi.js';
import { attachLoopback, type LoopbackDisk, type LoopbackOptions } from './target/loopback.js';
import { nexusesOf } from './target/nexuses.js';
import { portGroupsOf } from './target/port-groups.js';
import { recoverBackstore } from './target/recover.js';
import { attachVhost, type VhostLun, type VhostOptions } from './target/vhost.js';

/** How the disk reaches its users. */
export type ExportOptions =
  | ({
      /** A disk of this machine. */
      type: 'loopback';
    } & LoopbackOptions)
  | ({
      /** A LUN of an iSCSI target. */
      type: 'iscsi';
      /** LUN, 0 to 16383. Default: the lowest that is free. */
      lun?: number;
    } & IscsiOptions)
  | ({
      /** A LUN for QEMU's vhost-scsi. */
      type: 'vhost';
    } & VhostOptions);

/** Something that can be taken away again. */
interface Detachable {
  detach(options?: { force?: boolean }): Promise<void>;
}

/**
 * How a disk is made and served, for `serve`: besides these, all of `BackstoreOptions` that the
 * store doesn't say itself.
 */
export interface ServeOptions
  extends Omit<BackstoreOptions, 'size' | 'blockSize' | 'config' | 'serial'>,
    Pick<DeviceOptions, 'concurrency' | 'express'> {
  /** `'loopback'` makes it a disk of this machine, `/dev/sdX`. Default `'none'`: attach it yourself. */
  export?: 'none' | 'loopback' | 'vhost' | ExportOptions;
  /** First part of the backstore's configuration string: the kind of handler. Default `tcmu`. */
  subtype?: string;
  /** The rest of it, for people who look into sysfs: a path, say. */
  configuration?: string;
  /**
   * What to do with a backstore of that name that exists already. `'auto'` (default) and `true`: take it
   * back from a handler that has died, with its exports, by the recovery sequence (block, reset the ring,
   * open, unblock); `true` also fails when there is none. `false`: fail with NAME_TAKEN.
   */
  recover?: boolean | 'auto';
  /** On SIGINT and SIGTERM undo everything, then end by the same signal. Default true. */
  signals?: boolean;
  /**
   * How the disk presents itself in INQUIRY. Its `serial` is also given to the kernel; default: made from
   * this machine's id and the backstore's name, so that it is the same at every start. Give your own
   * where a disk moves between machines.
   */
  scsi?: Partial<BlockDeviceOptions>;
}

/** What a raw handler must say of itself, since there is no store to ask. */
export interface ServeHandlerOptions extends Omit<ServeOptions, 'scsi'> {
  /** Bytes; the kernel wants one also for handlers that aren't disks. */
  size: number;
  /** Bytes; default 512. */
  blockSize?: number;
  /**
   * As `BackstoreOptions.serial`; the answer to INQUIRY is the handler's own business. Default
   * none.
   */
  serial?: string;
}

/** A served device. */
export class Served {
  /** Its commands, events and counters. */
  readonly device: Device;
  /** Its side in configfs. */
  readonly backstore: Backstore;
  /** The loopback disk, for `export: 'loopback'`. */
  readonly loopback: LoopbackDisk | undefined;
  /** The iSCSI LUN, for `export: { type: 'iscsi' }`. */
  readonly iscsi: IscsiLun | undefined;
  /** The vhost-scsi LUN, for `export: 'vhost'`. */
  readonly vhost: VhostLun | undefined;
  /** Whether an existing backstore was taken back. */
  readonly recovered: boolean;
  readonly #attached: readonly Detachable[];
  readonly #disk: BlockDevice | undefined;
  readonly #size: number;
  #closing: Promise<void> | undefined;
  #unlisten: (() => void) | undefined;

  /** @internal */
  constructor(parts: ServedParts) {
    this.device = parts.device;
    this.backstore = parts.backstore;
    this.loopback = parts.loopback;
    this.iscsi = parts.iscsi;
    this.vhost = parts.vhost;
    this.recovered = parts.recovered;
    this.#attached = parts.attached;
    this.#disk = parts.disk;
    this.#size = parts.size;
    if (parts.signals) this.#listen();
  }

  /** The backstore's name. */
  get name(): string {
    return this.backstore.name;
  }

  /** `/dev/sda`, when it is exported over loopback and is a disk. */
  get disk(): string | undefined {
    return this.loopback?.blockPath;
  }

  /**
   * How to reach it, for people: the disk's path, the iSCSI URL, QEMU's arguments; and that it was taken back,
   * if it was.
   */
  get reach(): string {
    const place =
      this.disk ??
      this.iscsi?.url ??
      this.vhost?.qemuArguments.join(' ') ??
      `${this.uioPath}, exported to nobody`;
    return this.recovered ? `${place}, taken back` : place;
  }

  /** Capacity in bytes: the store's, now; of a raw handler what it was served with. */
  get size(): number {
    return this.#disk?.store.size ?? this.#size;
  }

  /** `/dev/uio0`. */
  get uioPath(): string {
    return this.backstore.uioPath;
  }

  /**
   * Changes the capacity while in use: the store first, then the kernel, then the initiator is told by
   * the unit attention CAPACITY DATA HAS CHANGED (and a loopback disk is rescanned).
   *
   * @param size bytes, a multiple of the block size
   * @throws ArgumentError when the store has no `resize`; what the store throws; TargetError
   */
  async resize(size: number): Promise<void> {
    const disk = this.#disk;
    if (disk?.store.resize === undefined) {
      throw new ArgumentError(
        `tcmu: resize ${this.device.name}: its store has no resize method; add one that changes \`size\``,
      );
    }
    await disk.store.resize(size);
    disk.capacityChanged();
    await this.backstore.resize(disk.store.size);
    await this.loopback?.rescan();
    this.device.emit('resize', disk.store.size);
  }

  /**
   * Detaches, stops serving, removes the backstore. Idempotent.
   *
   * @param options.force detach also a disk that is mounted: its I/O fails
   * @param options.deadline milliseconds for commands in flight, see `Device.close`
   * @throws TargetError `ERR_TCMU_TARGET_BUSY` when the disk is mounted: everything is served on, and
   *   closing can be tried again
   */
  close(options: { force?: boolean; deadline?: number } = {}): Promise<void> {
    this.#closing ??= this.#close(options).catch((error: unknown) => {
      if (!this.device.closed) this.#closing = undefined;
      throw error;
    });
    return this.#closing;
  }

  async #close(options: { force?: boolean; deadline?: number }): Promise<void> {
    const { force = false, deadline } = options;
    for (const attached of this.#attached) await attached.detach({ force });
    this.#unlisten?.();
    try {
      await this.device.close(deadline === undefined ? {} : { deadline });
    } finally {
      await this.backstore.remove();
    }
  }

  /**
   * Stops serving and leaves everything in the kernel, for a successor to take back: the
   * initiator's I/O waits meanwhile.
   * @param options.deadline milliseconds for commands in flight, see `Device.close`
   * @throws TargetError; then it is served on
   */
  async handOver(options: { deadline?: number } = {}): Promise<void> {
    this.#unlisten?.();
    await this.backstore.block();
    await this.device.close(options);
  }

  /** As `close()`, for `await using`; rejects as that does. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #listen(): void {
    const end = (signal: NodeJS.Signals): void => {
      this.close().then(
        () => process.kill(process.pid, signal),
        (error: Error) => {
          process.emitWarning(`${error.message}`, { code: 'TCMU_CLOSE' });
          // Still served: the next signal tries again.
          if (!this.device.closed) this.#listen();
          else process.kill(process.pid, signal);
        },
      );
    };
    process.once('SIGINT', end).once('SIGTERM', end);
    this.#unlisten = () => process.off('SIGINT', end).off('SIGTERM', end);
  }
}

interface ServedParts {
  device: Device;
  backstore: Backstore;
  disk: BlockDevice | undefined;
  attached: readonly Detachable[];
  loopback: LoopbackDisk | undefined;
  iscsi: IscsiLun | undefined;
  vhost: VhostLun | undefined;
  recovered: boolean;
  size: number;
  signals: boolean;
}

/**
 * Serves a store as a disk.
 *
 * @throws ArgumentError, TargetError (`ERR_TCMU_TARGET_NO_MODULE`, `_PERMISSION`, `_NAME_TAKEN` …),
 *   DeviceError, or what the store's `open` throws. Nothing that it made is left then.
 */
export async function serve(store: BlockStore, options: ServeOptions): Promise<Served> {
  const serial = options.scsi?.serial ?? defaultSerial(options.name);
  // What a handler can know of initiators and ports is in configfs, beside the backstore.
  let backstore: Backstore | undefined;
  let device: Device | undefined;
  let groups = SINGLE_PORT_GROUP.list() as readonly PortGroup[];
  const portGroups = async (of: Backstore) => {
    const told = portGroupsOf(of).then((now) => {
      if (now.length > 0) groups = now;
    });
    // Attaching a disk holds configfs' locks while the kernel waits for the answers to its first commands:
    // waiting for those locks here would be for ever. What was told last is told again then.
    await soon(told.catch(() => {}));
    return groups;
  };
  const disk = new BlockDevice(store, {
    onStoreFailure: ({ error }) => device?.report(error),
    nexuses: () => backstore && nexusesOf(backstore),
    portGroups: { list: async () => (backstore ? portGroups(backstore) : groups) },
    ...options.scsi,
    serial,
  });
  // The store knows its size once it is open, and the kernel wants it before there is a device.
  await disk.open();
  const opened: CommandHandler<Command> = {
    handle: (command) => disk.handle(command),
    taskManagement: (tmr) => disk.taskManagement(tmr),
    close: () => disk.close(),
    express: (lane) => disk.express(lane),
  };
  try {
    const { scsi: _, ...rest } = options;
    const { size, blockSize = 512 } = store;
    return await run(opened, disk, { ...rest, size, blockSize, serial }, (...made) => {
      [backstore, device] = made;
      // What there is before anything is attached is known when the first question comes.
      return portGroups(backstore);
    });
  } catch (error) {
    await disk.close();
    throw error;
  }
}

/** Two disks with one serial number are two paths to one disk to an initiator. */
function defaultSerial(name: string): string {
  let machine: string;
  try {
    machine = readFileSync('/etc/machine-id', 'utf8').trim();
  } catch {
    machine = hostname();
  }
  return createHash('sha256').update(`${machine}\0${name}`).digest('hex').slice(0, 32);
}

/**
 * Serves raw commands: for what is no block device, or answers everything itself.
 * @throws as `serve`; nothing that it made is left then
 */
export function serveHandler(
  handler: CommandHandler<Command>,
  options: ServeHandlerOptions,
): Promise<Served> {
  return run(handler, undefined, options);
}

async function run(
  handler: CommandHandler<Command>,
  disk: BlockDevice | undefined,
  options: ServeHandlerOptions,
  onMade: (backstore: Backstore, device: Device) => unknown = () => {},
): Promise<Served> {
  const wanted = exportOptions(options.export);
  const existing = await find(options);
  const { backstore, device } =
    existing === undefined
      ? await create(handler, options)
      : await takeBack(existing, handler, options);
  const recovered = existing !== undefined;
  try {
    await onMade(backstore, device);
    const none: Exports = { loopback: [], iscsi: [], vhost: [] };
    const found = recovered ? await exportsOf(backstore) : none;
    const attached: Detachable[] = [...found.loopback, ...found.iscsi, ...found.vhost];
    const parts = {
      loopback: found.loopback[0],
      iscsi: found.iscsi[0],
      vhost: found.vhost[0],
    };
    // An export that the dead handler had is kept; one that it had not got to yet is made now.
    if (wanted?.type === 'loopback' && parts.loopback === undefined) {
      parts.loopback = await attachLoopback(backstore, wanted);
      attached.push(parts.loopback);
    } else if (wanted?.type === 'iscsi' && parts.iscsi === undefined) {
      parts.iscsi = await attachIscsi(backstore, wanted);
      attached.push(parts.iscsi);
    } else if (wanted?.type === 'vhost' && parts.vhost === undefined) {
      parts.vhost = await attachVhost(backstore, wanted);
      attached.push(parts.vhost);
    }
    const { size, signals = true } = options;
    return new Served({ ...parts, device, backstore, disk, attached, recovered, size, signals });
  } catch (error) {
    await abandon(device, recovered ? undefined : backstore, error);
    throw error;
  }
}

function exportOptions(wanted: ServeOptions['export']): ExportOptions | undefined {
  if (wanted === undefined || wanted === 'none') return undefined;
  if (typeof wanted !== 'string') return wanted;
  if (wanted === 'loopback' || wanted === 'vhost') return { type: wanted };
  throw new ArgumentError(
    `tcmu: export ${JSON.stringify(wanted)}: one of none, loopback, vhost, or { type: 'iscsi', … }`,
  );
}

async function find(options: ServeHandlerOptions): Promise<Backstore | undefined> {
  const { recover = 'auto', name, hba, host } = options;
  if (recover === false) return undefined;
  try {
    return await openBackstore(name, {
      ...(hba === undefined ? {} : { hba }),
      ...(host === undefined ? {} : { host }),
    });
  } catch (error) {
    const absent = error instanceof TargetError && error.code === 'ERR_TCMU_TARGET_NOT_FOUND';
    if (absent && recover === 'auto') return undefined;
    throw error;
  }
}

async function create(
  handler: CommandHandler<Command>,
  options: ServeHandlerOptions,
): Promise<{ backstore: Backstore; device: Device }> {
  const { subtype = 'tcmu', configuration = options.name } = options;
  const backstore = await createBackstore({ ...options, config: `${subtype}/${configuration}` });
  try {
    return { backstore, device: await open(backstore, handler, options) };
  } catch (error) {
    await abandon(undefined, backstore, error);
    throw error;
  }
}

async function takeBack(
  backstore: Backstore,
  handler: CommandHandler<Command>,
  options: ServeHandlerOptions,
): Promise<{ backstore: Backstore; device: Device }> {
  const settings = await backstore.settings();
  if (settings.blockSize !== (options.blockSize ?? 512)) {
    throw new ArgumentError(
      `tcmu: recover ${backstore.path}: it was created with blocks of ${settings.blockSize} bytes, this handler has ${options.blockSize ?? 512}; serve it with the same block size, or remove it first`,
    );
  }
  if (!settings.enabled) await backstore.enable();
  const device = await recoverBackstore(backstore, () => open(backstore, handler, options));
  if (settings.size !== options.size) await backstore.resize(options.size);
  return { backstore, device };
}

function open(
  backstore: Backstore,
  handler: CommandHandler<Command>,
  options: ServeHandlerOptions,
): Promise<Device> {
  const { host } = backstore;
  const source = {
    ...openUio(backstore.uioPath),
    freeKeptBuffer: (id: number) =>
      host.write(`${backstore.path}/action/free_kept_buf`, String(id)),
  };
  const { concurrency, express = true } = options;
  return Device.open(source, {
    handler,
    express,
    ...(concurrency === undefined ? {} : { concurrency }),
  });
}

/** Undoes after `error`, which stays the error that is told; what can't be undone is added to it. */
async function abandon(
  device: Device | undefined,
  backstore: Backstore | undefined,
  error: unknown,
): Promise<void> {
  for (const undo of [() => device?.close(), () => backstore?.remove()]) {
    try {
      await undo();
    } catch (problem) {
      if (error instanceof Error) error.message += `; and then: ${(problem as Error).message}`;
    }
  }
}
