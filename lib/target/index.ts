// SPDX-License-Identifier: Apache-2.0
/**
 * The kernel's side of a device: making backstores, attaching them, finding and taking them back.
 *
 * Everything here configures and needs root; serving does not. A process that only serves needs the uio
 * device and nothing of this module.
 *
 * @packageDocumentation
 */
export { TargetError } from '../errors.js';
export {
  Backstore,
  type BackstoreOptions,
  type BackstoreSettings,
  createBackstore,
  openBackstore,
  type ZeroCopySettings,
  type ZeroCopyStatistics,
} from './backstore.js';
export { type Discovery, discover, type FoundBackstore } from './discover.js';
export type { Advice, TargetProblem } from './explain.js';
export { type Exports, exportsOf } from './exports.js';
export { type FollowingDisk, followSize } from './follow-size.js';
export {
  type KernelCalls,
  localHost,
  TargetHost,
  type TargetHostOptions,
  type WriteOptions,
} from './host.js';
export {
  attachIscsi,
  type Chap,
  type ChapCredentials,
  createIscsiTarget,
  type IscsiInitiator,
  IscsiLun,
  type IscsiOptions,
  IscsiTarget,
} from './iscsi.js';
export {
  attachLoopback,
  createLoopbackTarget,
  type DetachOptions,
  LoopbackDisk,
  type LoopbackOptions,
  LoopbackTarget,
} from './loopback.js';
export type { LunLink } from './luns.js';
export {
  type NetlinkDevice,
  type NetlinkHandlers,
  type NetlinkOptions,
  type Reconfiguration,
  TcmuNetlink,
} from './netlink.js';
export { nexusesOf } from './nexuses.js';
export { portGroupsOf } from './port-groups.js';
export {
  type RecoverOptions,
  recoverBackstore,
  type TakenOver,
  type TakeOverOptions,
  takeOver,
} from './recover.js';
export { rescueNetlink } from './rescue.js';
export { listUio, parseConfig, type UioDevice, type UioName } from './uio.js';
export { attachVhost, VhostLun, type VhostOptions } from './vhost.js';
