// SPDX-License-Identifier: Apache-2.0
/**
 * Generic netlink as bytes: messages, attributes, the family TCM-USER. Pure functions.
 *
 * Contract: decoding never throws, never reads past its input, and takes what is well formed up to the
 * first thing that is not; nothing it returns aliases more than the datagram given to it. Numbers are in
 * the host's byte order (netlink(7)): little endian on both architectures this package supports.
 */

/** linux/netlink.h */
export const NLMSG_NOOP = 1;
export const NLMSG_ERROR = 2;
export const NLMSG_DONE = 3;
export const NLMSG_OVERRUN = 4;
export const NLM_F_REQUEST = 1;
export const NLM_F_ACK = 4;
/** linux/genetlink.h: the id of the family that knows the others. */
export const GENL_ID_CTRL = 16;
const CTRL_CMD_GETFAMILY = 3;
const CTRL_ATTR_FAMILY_ID = 1;
const CTRL_ATTR_FAMILY_NAME = 2;
const CTRL_ATTR_MCAST_GROUPS = 7;
const CTRL_ATTR_MCAST_GRP_NAME = 1;
const CTRL_ATTR_MCAST_GRP_ID = 2;

/** linux/target_core_user.h */
export const TCMU_FAMILY = 'TCM-USER';
export const TCMU_GROUP = 'config';
const TCMU_VERSION = 2;
const TCMU_CMD = { added: 1, removed: 2, reconfigured: 3 } as const;
const TCMU_CMD_DONE = { added: 4, removed: 5, reconfigured: 6 } as const;
const TCMU_CMD_SET_FEATURES = 7;
const TCMU_ATTR_DEVICE = 1;
const TCMU_ATTR_MINOR = 2;
const TCMU_ATTR_DEV_CFG = 4;
const TCMU_ATTR_DEV_SIZE = 5;
const TCMU_ATTR_WRITECACHE = 6;
const TCMU_ATTR_CMD_STATUS = 7;
const TCMU_ATTR_DEVICE_ID = 8;
const TCMU_ATTR_SUPP_KERN_CMD_REPLY = 9;

const MESSAGE_HEADER = 16;
const GENL_HEADER = 4;
const ATTRIBUTE_HEADER = 4;
/** NLA_F_NESTED and NLA_F_NET_BYTEORDER are no part of the type. */
const ATTRIBUTE_TYPE_MASK = 0x3fff;

export interface NetlinkMessage {
  type: number;
  flags: number;
  sequence: number;
  port: number;
  payload: Uint8Array;
}

export type EventKind = keyof typeof TCMU_CMD;

/** A TCM-USER event as it came. */
export interface TcmuEvent {
  kind: EventKind;
  /** Name of the uio device: `tcm-user/<hba>/<name>[/<config>]`. */
  uioName: string;
  /** The N of uioN. */
  minor: number;
  /** What a reply refers to. */
  deviceId: number;
  /** RECONFIG: new capacity in bytes (a u64, rounded above 2^53). */
  size?: number;
  /** RECONFIG: write cache on or off. */
  writeCache?: boolean;
  /** RECONFIG: new configuration string. */
  config?: string;
}

function align(length: number): number {
  return (length + 3) & ~3;
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** The messages of a datagram, up to the first malformed one. */
export function decodeMessages(datagram: Uint8Array): NetlinkMessage[] {
  const view = viewOf(datagram);
  const messages: NetlinkMessage[] = [];
  for (let offset = 0; offset + MESSAGE_HEADER <= datagram.length; ) {
    const length = view.getUint32(offset, true);
    if (length < MESSAGE_HEADER || length > datagram.length - offset) break;
    messages.push({
      type: view.getUint16(offset + 4, true),
      flags: view.getUint16(offset + 6, true),
      sequence: view.getUint32(offset + 8, true),
      port: view.getUint32(offset + 12, true),
      payload: datagram.subarray(offset + MESSAGE_HEADER, offset + length),
    });
    offset += align(length);
  }
  return messages;
}

export function encodeMessage(message: NetlinkMessage): Uint8Array {
  const bytes = new Uint8Array(align(MESSAGE_HEADER + message.payload.length));
  const view = viewOf(bytes);
  view.setUint32(0, MESSAGE_HEADER + message.payload.length, true);
  view.setUint16(4, message.type, true);
  view.setUint16(6, message.flags, true);
  view.setUint32(8, message.sequence, true);
  view.setUint32(12, message.port, true);
  bytes.set(message.payload, MESSAGE_HEADER);
  return bytes;
}

/** Attributes by type, up to the first malformed one; of a repeated type the last counts. */
export function decodeAttributes(bytes: Uint8Array): Map<number, Uint8Array> {
  const view = viewOf(bytes);
  const attributes = new Map<number, Uint8Array>();
  for (let offset = 0; offset + ATTRIBUTE_HEADER <= bytes.length; ) {
    const length = view.getUint16(offset, true);
    if (length < ATTRIBUTE_HEADER || length > bytes.length - offset) break;
    const type = view.getUint16(offset + 2, true) & ATTRIBUTE_TYPE_MASK;
    attributes.set(type, bytes.subarray(offset + ATTRIBUTE_HEADER, offset + length));
    offset += align(length);
  }
  return attributes;
}

export function encodeAttributes(
  attributes: ReadonlyArray<readonly [type: number, value: Uint8Array]>,
): Uint8Array {
  const size = attributes.reduce(
    (sum, [, value]) => sum + align(ATTRIBUTE_HEADER + value.length),
    0,
  );
  const bytes = new Uint8Array(size);
  const view = viewOf(bytes);
  let offset = 0;
  for (const [type, value] of attributes) {
    view.setUint16(offset, ATTRIBUTE_HEADER + value.length, true);
    view.setUint16(offset + 2, type, true);
    bytes.set(value, offset + ATTRIBUTE_HEADER);
    offset += align(ATTRIBUTE_HEADER + value.length);
  }
  return bytes;
}

function encodeGeneric(command: number, version: number, attributes: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(GENL_HEADER + attributes.length);
  bytes[0] = command;
  bytes[1] = version;
  bytes.set(attributes, GENL_HEADER);
  return bytes;
}

function text(value: string): Uint8Array {
  return new TextEncoder().encode(`${value}\0`);
}

function u32(value: number): Uint8Array {
  const bytes = new Uint8Array(4);
  viewOf(bytes).setUint32(0, value, true);
  return bytes;
}

function s32(value: number): Uint8Array {
  const bytes = new Uint8Array(4);
  viewOf(bytes).setInt32(0, value, true);
  return bytes;
}

function textOf(value: Uint8Array | undefined): string | undefined {
  if (value === undefined) return undefined;
  const end = value.indexOf(0);
  return new TextDecoder().decode(end < 0 ? value : value.subarray(0, end));
}

function u8Of(value: Uint8Array | undefined): number | undefined {
  return value?.[0];
}

function u16Of(value: Uint8Array | undefined): number | undefined {
  return value === undefined || value.length < 2 ? undefined : viewOf(value).getUint16(0, true);
}

function u32Of(value: Uint8Array | undefined): number | undefined {
  return value === undefined || value.length < 4 ? undefined : viewOf(value).getUint32(0, true);
}

function u64Of(value: Uint8Array | undefined): number | undefined {
  return value === undefined || value.length < 8
    ? undefined
    : Number(viewOf(value).getBigUint64(0, true));
}

/** Payload of an NLMSG_ERROR: 0 (an acknowledgement) or -errno; undefined when malformed. */
export function decodeError(payload: Uint8Array): number | undefined {
  return payload.length < 4 ? undefined : viewOf(payload).getInt32(0, true);
}

/** Asks for a family by name; goes to GENL_ID_CTRL. */
export function encodeFamilyRequest(name: string): Uint8Array {
  return encodeGeneric(
    CTRL_CMD_GETFAMILY,
    1,
    encodeAttributes([[CTRL_ATTR_FAMILY_NAME, text(name)]]),
  );
}

/** Answer to `encodeFamilyRequest`. */
export function decodeFamily(
  payload: Uint8Array,
): { id: number; groups: Map<string, number> } | undefined {
  if (payload.length < GENL_HEADER) return undefined;
  const attributes = decodeAttributes(payload.subarray(GENL_HEADER));
  const id = u16Of(attributes.get(CTRL_ATTR_FAMILY_ID));
  if (id === undefined) return undefined;
  const groups = new Map<string, number>();
  const list = attributes.get(CTRL_ATTR_MCAST_GROUPS) ?? new Uint8Array();
  for (const entry of decodeAttributes(list).values()) {
    const group = decodeAttributes(entry);
    const name = textOf(group.get(CTRL_ATTR_MCAST_GRP_NAME));
    const number = u32Of(group.get(CTRL_ATTR_MCAST_GRP_ID));
    if (name !== undefined && number !== undefined) groups.set(name, number);
  }
  return { id, groups };
}

/** A TCM-USER event; undefined for other commands and for one without the attributes all events have. */
export function decodeEvent(payload: Uint8Array): TcmuEvent | undefined {
  if (payload.length < GENL_HEADER) return undefined;
  const kind = (Object.keys(TCMU_CMD) as EventKind[]).find((key) => TCMU_CMD[key] === payload[0]);
  const attributes = decodeAttributes(payload.subarray(GENL_HEADER));
  const uioName = textOf(attributes.get(TCMU_ATTR_DEVICE));
  const minor = u32Of(attributes.get(TCMU_ATTR_MINOR));
  const deviceId = u32Of(attributes.get(TCMU_ATTR_DEVICE_ID));
  if (
    kind === undefined ||
    uioName === undefined ||
    minor === undefined ||
    deviceId === undefined
  ) {
    return undefined;
  }
  const size = u64Of(attributes.get(TCMU_ATTR_DEV_SIZE));
  const cache = u8Of(attributes.get(TCMU_ATTR_WRITECACHE));
  const config = textOf(attributes.get(TCMU_ATTR_DEV_CFG));
  return {
    kind,
    uioName,
    minor,
    deviceId,
    ...(size === undefined ? {} : { size }),
    ...(cache === undefined ? {} : { writeCache: cache !== 0 }),
    ...(config === undefined ? {} : { config }),
  };
}

/** The reply to an event: 0, or -errno, which `enable` or the attribute's write then fails with. */
export function encodeDone(kind: EventKind, deviceId: number, status: number): Uint8Array {
  return encodeGeneric(
    TCMU_CMD_DONE[kind],
    TCMU_VERSION,
    encodeAttributes([
      [TCMU_ATTR_CMD_STATUS, s32(status)],
      [TCMU_ATTR_DEVICE_ID, u32(deviceId)],
    ]),
  );
}

/** The module-wide switch: whether the kernel waits for replies at all. */
export function encodeReplySwitch(on: boolean): Uint8Array {
  return encodeGeneric(
    TCMU_CMD_SET_FEATURES,
    TCMU_VERSION,
    encodeAttributes([[TCMU_ATTR_SUPP_KERN_CMD_REPLY, Uint8Array.of(on ? 1 : 0)]]),
  );
}
