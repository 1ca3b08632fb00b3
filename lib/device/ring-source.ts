// SPDX-License-Identifier: Apache-2.0
/**
 * Where a ring comes from. A `Device` runs unchanged over the kernel's uio device and over the
 * simulated kernel: only the source differs.
 */
import { closeSync, constants, openSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { ArgumentError, DeviceError, errnoOf } from '../errors.js';

/** What `Device.open` needs; the device owns the descriptors from then on. */
export interface RingSource {
  /** For messages: `user_0/disk0`. */
  readonly name: string;
  /** The configuration string behind the name (`<subtype>/<rest>`), empty when there is none. */
  readonly config: string;
  /** Descriptor that is mapped: the uio device's. `Device.open` takes it over and closes it. */
  readonly memoryFd: number;
  /** Descriptor that is polled and read, 4 bytes an event; may be the same as `memoryFd`. */
  readonly eventFd: number;
  /** Descriptor that 4 bytes are written to after completions; may be the same as `memoryFd`. */
  readonly doorbellFd: number;
  /** Bytes to map. */
  readonly mapSize: number;
  /** The kernel's attrib/cmd_time_out in milliseconds; 0 or absent: commands don't expire. */
  readonly commandTimeout?: number;
  /** Writes action/free_kept_buf. Absent: KEEP_BUF can't be used. */
  readonly freeKeptBuffer?: (id: number) => Promise<void>;
}

/** Where `openUio` finds what the kernel says of the device. */
export interface OpenUioOptions {
  /** Where sysfs is mounted. Default `/sys`. */
  sysfs?: string;
  /** Where configfs' target folder is. Default `/sys/kernel/config/target`. */
  configfs?: string;
}

function readLine(path: string): string {
  return readFileSync(path, 'utf8').replace(/\n$/, '');
}

/**
 * Opens a TCMU uio device. Needs read and write access to the device node, nothing else; the command
 * time-out is read from configfs where that is readable.
 *
 * @param device `uio0`, `/dev/uio0`, or the number.
 * @throws DeviceError `ERR_TCMU_DEVICE_BUSY` when a process has it open, `ERR_TCMU_DEVICE_OPEN` when
 *   it doesn't exist, isn't TCMU's, or may not be opened.
 */
export function openUio(device: string | number, options: OpenUioOptions = {}): RingSource {
  const match = /^(?:\/dev\/)?(?:uio)?(\d{1,7})$/.exec(String(device));
  if (match === null) {
    throw new ArgumentError(
      `tcmu: ${JSON.stringify(device)} is no uio device: give uio0 or /dev/uio0`,
    );
  }
  const uio = `uio${match[1]}`;
  const path = `/dev/${uio}`;
  const sys = join(options.sysfs ?? '/sys', 'class/uio', uio);
  let label: string;
  let mapSize: number;
  try {
    label = readLine(join(sys, 'name'));
    mapSize = Number(readLine(join(sys, 'maps/map0/size')));
  } catch (error) {
    throw new DeviceError(
      'ERR_TCMU_DEVICE_OPEN',
      `tcmu: open ${path}: the kernel has no such device (${sys}); create and enable the backstore first`,
      { operation: 'open', path, cause: error },
    );
  }
  const parts = /^tcm-user\/(\d+)\/([^/]+)(?:\/(.*))?$/s.exec(label);
  if (parts === null) {
    throw new DeviceError(
      'ERR_TCMU_DEVICE_OPEN',
      `tcmu: open ${path}: it belongs to ${JSON.stringify(label)}, not to TCMU`,
      { operation: 'open', path },
    );
  }
  const [, hba, name, config = ''] = parts as unknown as [string, string, string, string?];
  let fd: number;
  try {
    fd = openSync(path, constants.O_RDWR | constants.O_NONBLOCK);
  } catch (error) {
    const errno = errnoOf(error);
    const hint: Record<string, string> = {
      EBUSY: 'another process serves it: stop that one first (fuser finds it)',
      EACCES: 'no permission: run as root, or give this user the device by a udev rule',
      ENOENT: 'the node is missing: wait for udev, or create it with mknod in a container',
    };
    throw new DeviceError(
      errno === 'EBUSY' ? 'ERR_TCMU_DEVICE_BUSY' : 'ERR_TCMU_DEVICE_OPEN',
      `tcmu: open ${path}: ${errno ?? 'failed'}; ${hint[errno ?? ''] ?? 'see the cause'}`,
      { operation: 'open', path, cause: error },
    );
  }
  if (!(mapSize > 0)) {
    closeSync(fd);
    throw new DeviceError(
      'ERR_TCMU_DEVICE_OPEN',
      `tcmu: open ${path}: sysfs gives no size for its memory (${sys}/maps/map0/size)`,
      { operation: 'open', path },
    );
  }
  const core = join(options.configfs ?? '/sys/kernel/config/target', 'core', `user_${hba}`, name);
  return {
    name: `user_${hba}/${name}`,
    config,
    memoryFd: fd,
    eventFd: fd,
    doorbellFd: fd,
    mapSize,
    ...commandTimeout(core),
  };
}

/** The time-out is advice for `command.signal`, so a configfs that can't be read is no failure. */
function commandTimeout(core: string): { commandTimeout?: number } {
  try {
    return { commandTimeout: Number(readLine(join(core, 'attrib/cmd_time_out'))) * 1000 };
  } catch {
    return {};
  }
}
