// SPDX-License-Identifier: Apache-2.0
/**
 * `tcmu/program`: what a handler's program needs around `serve`: its command line, what it tells and whom, exit
 * codes, and serving until a signal.
 *
 * @packageDocumentation
 */
export {
  CommandLine,
  FLAG,
  LIST,
  type NumberRule,
  type OptionKind,
  secretFile,
  sizeOf,
  TEXT,
  UsageError,
} from './command-line.js';
export {
  DEVICE_OPTIONS,
  type DeviceOption,
  deviceOptions,
  type IscsiOption,
} from './device-options.js';
export {
  type EndReason,
  Program,
  type ProgramOptions,
  type ServedDisk,
  type Serving,
  type TellLevel,
} from './program.js';
