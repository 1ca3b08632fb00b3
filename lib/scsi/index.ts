// SPDX-License-Identifier: Apache-2.0
/**
 * `tcmu/scsi`: the block device command set over a `BlockStore`, and sense data.
 * @packageDocumentation
 */
export { BlockDevice, type BlockDeviceOptions, type StoreFailure } from './block-device.js';
export type { IdentityOptions } from './identity.js';
export type { AskNexuses, Nexuses } from './nexuses.js';
export type { AccessState, PortGroup, PortGroupChange, PortGroups } from './port-groups.js';
export {
  decodeSense,
  encodeSense,
  type FieldPointer,
  type Sense,
  type SenseDetails,
  SenseError,
  type SenseErrorOptions,
  type SenseFormat,
  SenseKey,
  sense,
  toSense,
} from './sense.js';
export type { StateStorage } from './state-storage.js';
