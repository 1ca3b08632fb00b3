// SPDX-License-Identifier: Apache-2.0
/**
 * Every error the package throws: one class a family, a stable `code`, and a message that names the
 * operation, the path or device, the errno and what to do next. An error never travels to the
 * initiator by itself; see `SenseError` in `tcmu/scsi` for what an initiator sees.
 */

/** Facts about a failure, kept as properties so that programs need not parse the message. */
export interface TcmuErrorDetails {
  /** What was being done, in the words of the interface: `open`, `write configfs`, `fetch`. */
  operation?: string | undefined;
  /** File, configfs attribute or device the operation was on. */
  path?: string | undefined;
  /** errno name as Node spells it: `ENOENT`, `EBUSY`. */
  errno?: string | undefined;
  /** The error underneath. */
  cause?: unknown;
}

const BRAND = Symbol.for('tcmu.error');

/**
 * Base of all errors of this package. Test with `TcmuError.is(error)`, which also holds when two
 * copies of the package (ESM and CJS, two versions) live in one process.
 */
export class TcmuError extends Error {
  /** `ERR_TCMU_*`; stable, documented on the class that uses it. */
  readonly code: string;
  /** What was being done, in the words of the interface: `open`, `write configfs`, `fetch`. */
  readonly operation: string | undefined;
  /** File, configfs attribute or device the operation was on. */
  readonly path: string | undefined;
  /** errno name as Node spells it (`ENOENT`, `EBUSY`), also where only the cause carried it. */
  readonly errno: string | undefined;

  constructor(code: string, message: string, details: TcmuErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.name = new.target.name;
    this.code = code;
    this.operation = details.operation;
    this.path = details.path;
    this.errno = details.errno ?? errnoOf(details.cause);
    Object.defineProperty(this, BRAND, { value: true });
  }

  /** Whether `value` is an error of this package, also of another copy of it. */
  static is(value: unknown): value is TcmuError {
    return typeof value === 'object' && value !== null && BRAND in value;
  }
}

/** A wrong argument or option. Codes: `ERR_TCMU_INVALID_ARGUMENT`. */
export class ArgumentError extends TcmuError {
  constructor(message: string, details?: TcmuErrorDetails) {
    super('ERR_TCMU_INVALID_ARGUMENT', message, details);
  }
}

/** The native addon is missing or does not load. Code: `ERR_TCMU_ADDON`. */
export class AddonError extends TcmuError {
  constructor(message: string, details?: TcmuErrorDetails) {
    super('ERR_TCMU_ADDON', message, details);
  }
}

/**
 * A device could not be opened, or was lost. Codes: `ERR_TCMU_DEVICE_OPEN`, `ERR_TCMU_DEVICE_BUSY`
 * (another process has it), `ERR_TCMU_DEVICE_GONE` (removed in the kernel), `ERR_TCMU_DEVICE_CLOSED`
 * (used after close), `ERR_TCMU_MAPPING_LEAKED` (closed while memory was still pinned).
 */
export class DeviceError extends TcmuError {}

/**
 * The shared ring holds something no kernel writes; nothing more is taken from it.
 * Code: `ERR_TCMU_RING_CORRUPT`, or `ERR_TCMU_RING_VERSION` for a mailbox of another version.
 */
export class RingError extends TcmuError {}

/**
 * A command was used wrongly. Codes: `ERR_TCMU_COMMAND_COMPLETED` (completed twice),
 * `ERR_TCMU_COMMAND_UNCOMPLETED` (the handler's promise resolved without a completion),
 * `ERR_TCMU_COMMAND_ABORTED` (the reason of an aborted `command.signal`),
 * `ERR_TCMU_KEEP_BUF` (its buffer can't be kept).
 */
export class CommandError extends TcmuError {}

/**
 * A command's memory was used wrongly. Codes: `ERR_TCMU_BUFFER_REVOKED` (used after completion),
 * `ERR_TCMU_BUFFER_ESCAPED` (its ArrayBuffer was transferred or detached by somebody else),
 * `ERR_TCMU_BUFFER_RANGE` (outside the buffer),
 * `ERR_TCMU_BUFFER_READ_ONLY` (a store through `dataIn` into Data-Out, with zero copy).
 */
export class BufferError extends TcmuError {}

/**
 * File I/O of the package's own methods failed.
 * Codes: `ERR_TCMU_IO`, `ERR_TCMU_IO_SHORT` (end of file where data was expected),
 * `ERR_TCMU_IO_NO_SPACE` (ENOSPC, EDQUOT), `ERR_TCMU_FILE_LOCKED`, `ERR_TCMU_FILE_CLOSED`,
 * `ERR_TCMU_STATE` (a `StateFile` that is none).
 */
export class FileError extends TcmuError {}

/**
 * configfs, sysfs or netlink refused. Codes: `ERR_TCMU_TARGET_*`; each is described where it is
 * thrown, in `tcmu/target`.
 */
export class TargetError extends TcmuError {}

/** errno name carried by a system error or by one of ours. */
export function errnoOf(error: unknown): string | undefined {
  if (typeof error !== 'object' || error === null) return undefined;
  const { code, errno } = error as { code?: unknown; errno?: unknown };
  if (typeof errno === 'string') return errno;
  return typeof code === 'string' && /^E[A-Z0-9]+$/.test(code) ? code : undefined;
}
