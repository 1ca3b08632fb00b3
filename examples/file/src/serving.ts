// SPDX-License-Identifier: Apache-2.0
/**
 * From a store to a disk that somebody can use: either the whole way (backstore, export, recovery) by
 * `serve`, or on a uio device that another process made, with no privilege but access to it.
 */
import {
  type BlockStore,
  Device,
  openUio,
  type ServeOptions,
  StateFile,
  serve,
  TcmuError,
} from 'tcmu';
import { BlockDevice, type BlockDeviceOptions } from 'tcmu/scsi';
import { rateLimit } from 'tcmu/store';
import { followSize, openBackstore } from 'tcmu/target';
import type { FileStore } from './file-store.js';
import { type ExportChoice, type Options, UsageError } from './options.js';

/** A disk that is served. */
export interface Serving {
  name: string;
  uio: string;
  /** `/dev/sda`, over loopback. */
  disk: string | undefined;
  /** How to reach it, for people. */
  reach: string;
  device: Device;
  /** Store, kernel and initiators take a new size over. */
  resize(size: number): Promise<void>;
  /** Undoes everything; the store is closed then. May fail because the disk is mounted, and be tried again. */
  close(): Promise<void>;
}

/** Owns the store from here on: it is closed when this fails. */
export async function startServing(
  store: FileStore,
  options: Options,
  warn: (message: string) => void,
): Promise<Serving> {
  return options.uio === undefined
    ? serveAnew(store, options, warn)
    : serveExisting(store, options, options.uio);
}

async function serveAnew(
  store: FileStore,
  options: Options,
  warn: (message: string) => void,
): Promise<Serving> {
  const { name, maxSectors, dataAreaMb, ringMb, timeout, concurrency, serial } = options;
  const served = await serve(limited(store, options), {
    name,
    subtype: 'file',
    configuration: options.path,
    export: exportOptions(options.export),
    recover: options.recover ? 'auto' : false,
    signals: false,
    scsi: {
      product: 'File',
      removable: options.removable,
      ...memoryOf(store, options),
      ...(serial === undefined ? {} : { serial }),
    },
    ...(maxSectors === undefined ? {} : { maxSectors }),
    ...(dataAreaMb === undefined ? {} : { dataAreaMiB: dataAreaMb }),
    ...(ringMb === undefined ? {} : { ringMiB: ringMb }),
    ...(timeout === undefined ? {} : { commandTimeout: timeout }),
    zeroCopy: options.zeroCopy !== 'never' && {
      optional: options.zeroCopy === 'auto',
      scrub: options.zeroCopyScrub,
    },
    express: options.express,
    ...(concurrency === undefined ? {} : { concurrency }),
  });
  const netlink = await followSize(served.backstore, served, ({ message }) => warn(message));
  const reach =
    served.disk ??
    served.iscsi?.url ??
    served.vhost?.qemuArguments.join(' ') ??
    `${served.uioPath}, exported to nobody`;
  return {
    name,
    uio: served.uioPath,
    disk: served.disk,
    reach: served.recovered ? `${reach}, taken back` : reach,
    device: served.device,
    resize: (size) => served.resize(size),
    close: async () => {
      await served.close();
      await netlink?.close();
    },
  };
}

/** Where the disk keeps what it remembers over restarts. A read-only server only looks. */
export function memoryOf(
  store: Pick<FileStore, 'path' | 'kind' | 'readOnly'>,
  options: Pick<Options, 'state'>,
): Pick<BlockDeviceOptions, 'modePageStorage' | 'operationStorage'> {
  const path = options.state ?? (store.kind === 'file' ? `${store.path}.state` : undefined);
  if (path === undefined) return {};
  const file = new StateFile(path, { readOnly: store.readOnly });
  return {
    operationStorage: file.storage('operation'),
    ...(store.readOnly ? {} : { modePageStorage: file.storage('modePages') }),
  };
}

function limited(store: FileStore, { bandwidth }: Options): BlockStore {
  return bandwidth === undefined ? store : rateLimit(store, { bytesPerSecond: bandwidth });
}

function exportOptions(choice: ExportChoice): ServeOptions['export'] {
  if (choice.type !== 'iscsi') return choice.type;
  const { iqn, portals, initiators, anyone, chap } = choice;
  const login = chap === undefined ? {} : { chap };
  return {
    type: 'iscsi',
    iqn,
    ...(portals.length === 0 ? {} : { portals }),
    ...(anyone ? { anyone: login } : {}),
    ...(initiators.length === 0
      ? {}
      : { initiators: initiators.map((initiator) => ({ name: initiator, ...login })) }),
  };
}

async function serveExisting(store: FileStore, options: Options, uio: string): Promise<Serving> {
  try {
    const source = openUio(uio);
    const name = source.name.replace(/^[^/]*\//, '');
    const disk = new BlockDevice(limited(store, options), {
      product: 'File',
      removable: options.removable,
      ...memoryOf(store, options),
      serial: options.serial ?? (await serialOf(name)),
    });
    const { concurrency } = options;
    const device = await Device.open(source, {
      handler: disk,
      express: options.express,
      ...(concurrency === undefined ? {} : { concurrency }),
    });
    return {
      name,
      uio,
      disk: undefined,
      reach: uio,
      device,
      resize: async (size) => {
        await store.resize(size);
        disk.capacityChanged();
      },
      close: () => device.close(),
    };
  } catch (error) {
    await store.close();
    throw error;
  }
}

/** The serial number that the device was created with: another one would be another disk to initiators. */
async function serialOf(name: string): Promise<string> {
  let serial = '';
  try {
    serial = (await (await openBackstore(name)).settings()).serial;
  } catch (error) {
    if (!TcmuError.is(error)) throw error;
    // No configfs here, or it may not be read.
  }
  if (serial === '') {
    throw new UsageError(
      `--serial is missing: ${name} has none in configfs (wwn/vpd_unit_serial), or it can't be read; initiators know the disk by it`,
    );
  }
  return serial;
}
