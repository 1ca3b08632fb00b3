// SPDX-License-Identifier: Apache-2.0
/**
 * From a disk to something that somebody can use: either the whole way (backstore, export, recovery) by
 * `serve`, or on a uio device that another process made.
 */
import { Device, openUio, type ServeOptions, serve } from 'tcmu';
import { BlockDevice } from 'tcmu/scsi';
import { followSize } from 'tcmu/target';
import type { ExportChoice, Options } from './options.js';
import type { S3Disk } from './s3-disk.js';

export interface Serving {
  name: string;
  uio: string;
  /** `/dev/sda`, over loopback. */
  disk: string | undefined;
  /** How to reach it, for people. */
  reach: string;
  device: Device;
  /** Undoes everything; the disk is closed then. May fail because it is mounted, and be tried again. */
  close(): Promise<void>;
}

/** Owns the disk from here on: it is closed when this fails. */
export async function startServing(
  disk: S3Disk,
  options: Options,
  warn: (message: string) => void,
): Promise<Serving> {
  // The disk is the same wherever it is served.
  const scsi = { product: 'S3', serial: options.serial ?? disk.record.id };
  if (options.uio !== undefined) return serveExisting(disk, options, options.uio, scsi);
  const { name, maxSectors, dataAreaMb, ringMb, timeout, concurrency } = options;
  const served = await serve(disk, {
    name,
    subtype: 's3',
    configuration: options.place.replace('s3://', ''),
    export: exportOptions(options.export),
    recover: options.recover ? 'auto' : false,
    signals: false,
    scsi,
    ...(maxSectors === undefined ? {} : { maxSectors }),
    ...(dataAreaMb === undefined ? {} : { dataAreaMiB: dataAreaMb }),
    ...(ringMb === undefined ? {} : { ringMiB: ringMb }),
    ...(timeout === undefined ? {} : { commandTimeout: timeout }),
    ...(concurrency === undefined ? {} : { concurrency }),
  });
  const netlink = disk.readOnly
    ? undefined
    : await followSize(served.backstore, served, ({ message }) => warn(message));
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
    close: async () => {
      await served.close();
      await netlink?.close();
    },
  };
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

async function serveExisting(
  disk: S3Disk,
  { concurrency }: Options,
  uio: string,
  scsi: { product: string; serial: string },
): Promise<Serving> {
  try {
    const source = openUio(uio);
    const name = source.name.replace(/^[^/]*\//, '');
    const device = await Device.open(source, {
      handler: new BlockDevice(disk, scsi),
      ...(concurrency === undefined ? {} : { concurrency }),
    });
    return { name, uio, disk: undefined, reach: uio, device, close: () => device.close() };
  } catch (error) {
    await disk.close();
    throw error;
  }
}
