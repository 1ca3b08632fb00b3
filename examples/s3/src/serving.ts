// SPDX-License-Identifier: Apache-2.0
/**
 * From a disk to something that somebody can use: either the whole way (backstore, export, recovery) by
 * `serve`, or on a uio device that another process made.
 */
import { Device, openUio, serve } from 'tcmu';
import type { ServedDisk } from 'tcmu/program';
import { BlockDevice } from 'tcmu/scsi';
import { followSize } from 'tcmu/target';
import type { Options } from './options.js';
import type { S3Disk } from './s3-disk.js';

/** Owns the disk from here on: it is closed when this fails. */
export async function startServing(
  disk: S3Disk,
  options: Options,
  warn: (message: string) => void,
): Promise<ServedDisk> {
  // The disk is the same wherever it is served.
  const scsi = { product: 'S3', serial: options.serial ?? disk.record.id };
  if (options.uio !== undefined) return serveExisting(disk, options, options.uio, scsi);
  const { name } = options;
  const served = await serve(disk, {
    name,
    subtype: 's3',
    configuration: options.place.replace('s3://', ''),
    signals: false,
    scsi,
    ...options.device,
  });
  const netlink = disk.readOnly
    ? undefined
    : await followSize(served.backstore, served, ({ message }) => warn(message));
  const { uioPath, disk: path, reach, device } = served;
  return {
    name,
    uioPath,
    disk: path,
    reach,
    device,
    close: async () => {
      await served.close();
      await netlink?.close();
    },
  };
}

async function serveExisting(
  disk: S3Disk,
  { device: { concurrency } }: Options,
  uio: string,
  scsi: { product: string; serial: string },
): Promise<ServedDisk> {
  try {
    const source = openUio(uio);
    const name = source.name.replace(/^[^/]*\//, '');
    const device = await Device.open(source, {
      handler: new BlockDevice(disk, scsi),
      ...(concurrency === undefined ? {} : { concurrency }),
    });
    return { name, uioPath: uio, reach: uio, device, close: () => device.close() };
  } catch (error) {
    await disk.close();
    throw error;
  }
}
