// SPDX-License-Identifier: Apache-2.0
/**
 * `tcmu/sim`: a simulated kernel, to write, run and test a handler anywhere.
 * @packageDocumentation
 */
export { type NbdServer, type NbdTlsOptions, type ServeNbdOptions, serveNbd } from './nbd.js';
export {
  NbdClient,
  type NbdConnectOptions,
  type NbdExtent,
  type NbdWriteOptions,
  type NbdZeroOptions,
} from './nbd-client.js';
export type { RingEntry, Segment } from './ring-entries.js';
export {
  type CommandRequest,
  type CommandResult,
  type LoadOptions,
  type LoadReport,
  type Reconfiguration,
  SimulatedDevice,
  type SimulatedDeviceOptions,
  type SimulatedDeviceState,
  type SimulatedFaults,
  type ZeroCopyOptions,
} from './simulated-device.js';
export {
  type BlockRange,
  type Capacity,
  type InquiryData,
  type RequestOptions,
  SimulatedDisk,
  type SimulateOptions,
  simulate,
} from './simulated-disk.js';
