// SPDX-License-Identifier: Apache-2.0
/**
 * Write Linux block devices in TypeScript: user-space backstores for the kernel's SCSI target.
 *
 * Two levels: implement a {@link BlockStore} and hand it to {@link serve}; or take the raw CDBs with a
 * {@link CommandHandler} on a {@link Device}.
 *
 * @packageDocumentation
 */
export { Command, KeptData } from './device/command.js';
export type { DataIn, DataOut, MaybePromise } from './device/data.js';
export {
  type CloseOptions,
  Device,
  type DeviceEvents,
  type DeviceOptions,
} from './device/device.js';
export {
  type CommandHandler,
  type ScsiCommand,
  Status,
  type TaskManagement,
} from './device/handler.js';
export { type OpenUioOptions, openUio, type RingSource } from './device/ring-source.js';
export {
  AddonError,
  ArgumentError,
  BufferError,
  CommandError,
  DeviceError,
  FileError,
  RingError,
  TargetError,
  TcmuError,
  type TcmuErrorDetails,
} from './errors.js';
export { BackingFile, type BackingFileOptions } from './io/backing-file.js';
export { FileMap, type FileMapOptions } from './io/file-map.js';
export { StateFile, type StateFileOptions } from './io/state-file.js';
export type { NativeFileFacts } from './native.js';
export {
  type ExportOptions,
  Served,
  type ServeHandlerOptions,
  type ServeOptions,
  serve,
  serveHandler,
} from './serve.js';
export type {
  BlockExtent,
  BlockStore,
  RequestContext,
  StoreSpace,
  UnmapContext,
  WriteContext,
} from './store/block-store.js';
