// SPDX-License-Identifier: Apache-2.0
/**
 * From a store to a disk that somebody can use: either the whole way (backstore, export, recovery) by
 * `serve`, or on a uio device that another process made, with no privilege but access to it.
 */
import { type BlockStore, Device, openUio, StateFile, serve, TcmuError } from 'tcmu';
import { type ServedDisk, UsageError } from 'tcmu/program';
import { BlockDevice, type BlockDeviceOptions } from 'tcmu/scsi';
import { rateLimit } from 'tcmu/store';
import { followSize, openBackstore } from 'tcmu/target';
import type { FileStore } from './file-store.js';
import type { Options } from './options.js';

/** A disk that is served. Closing closes the store. */
export interface ServedFile extends ServedDisk {
  /** Store, kernel and initiators take a new size over. */
  resize(size: number): Promise<void>;
}

/** Owns the store from here on: it is closed when this fails. */
export async function startServing(
  store: FileStore,
  options: Options,
  warn: (message: string) => void,
): Promise<ServedFile> {
  return options.uio === undefined
    ? serveAnew(store, options, warn)
    : serveExisting(store, options, options.uio);
}

async function serveAnew(
  store: FileStore,
  options: Options,
  warn: (message: string) => void,
): Promise<ServedFile> {
  const { name, serial } = options;
  const served = await serve(limited(store, options), {
    name,
    subtype: 'file',
    configuration: options.path,
    signals: false,
    scsi: {
      product: 'File',
      removable: options.removable,
      ...memoryOf(store, options),
      ...(serial === undefined ? {} : { serial }),
    },
    zeroCopy: options.zeroCopy !== 'never' && {
      optional: options.zeroCopy === 'auto',
      scrub: options.zeroCopyScrub,
    },
    express: options.express,
    ...options.device,
  });
  const netlink = await followSize(served.backstore, served, ({ message }) => warn(message));
  const { uioPath, disk, reach, device } = served;
  return {
    name,
    uioPath,
    disk,
    reach,
    device,
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

async function serveExisting(store: FileStore, options: Options, uio: string): Promise<ServedFile> {
  try {
    const source = openUio(uio);
    const name = source.name.replace(/^[^/]*\//, '');
    const disk = new BlockDevice(limited(store, options), {
      product: 'File',
      removable: options.removable,
      ...memoryOf(store, options),
      serial: options.serial ?? (await serialOf(name)),
    });
    const { concurrency } = options.device;
    const device = await Device.open(source, {
      handler: disk,
      express: options.express,
      ...(concurrency === undefined ? {} : { concurrency }),
    });
    return {
      name,
      uioPath: uio,
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
