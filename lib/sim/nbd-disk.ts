// SPDX-License-Identifier: Apache-2.0
/**
 * What an NBD server has to know of the SCSI disk behind it, asked of the disk itself with the
 * commands any initiator would use. A device that knows few commands is offered with few features,
 * never refused for them.
 */
import { Status } from '../device/handler.js';
import type { NativeNbdDisk } from '../native-sim.js';
import { readU16, readU32, readU64 } from '../scsi/bytes.js';
import { SenseKey } from '../scsi/sense.js';
import type { SimulatedDevice } from './simulated-device.js';

/** Transmission flags of the NBD protocol. */
const NBD = {
  hasFlags: 1 << 0,
  readOnly: 1 << 1,
  flush: 1 << 2,
  fua: 1 << 3,
  rotational: 1 << 4,
  trim: 1 << 5,
  writeZeroes: 1 << 6,
  multiConnection: 1 << 8,
  cache: 1 << 10,
  fastZero: 1 << 11,
} as const;

/** Most bytes of one NBD read or write. */
const MAX_PAYLOAD = 32 << 20;
const MOST_BLOCKS = 0xffff_ffff;
const SYNCHRONIZE_CACHE_16 = 0x91;

/** @returns undefined when the disk does not answer what every block device answers */
export async function describeDisk(kernel: SimulatedDevice): Promise<NativeNbdDisk | undefined> {
  const data = async (cdb: readonly number[], length: number): Promise<Uint8Array | undefined> => {
    const result = await ask(kernel, cdb, length);
    return result.status === Status.GOOD ? result.data : undefined;
  };
  const capacity = await data([0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 32);
  if (capacity === undefined || capacity.length < 16) return undefined;
  const blockSize = readU32(capacity, 8);
  const size = (readU64(capacity, 0) + 1) * blockSize;
  const thin = ((capacity[14] as number) & 0x80) !== 0;
  const unmapsToZero = thin && ((capacity[14] as number) & 0x40) !== 0;

  // MODE SENSE (6), caching page: WP and DPOFUA in its header, WCE in the page.
  const mode = (await data([0x1a, 0x08, 0x08, 0, 64, 0], 64)) ?? new Uint8Array(4);
  const deviceSpecific = mode[2] ?? 0;
  const writeCache = mode.length > 6 && ((mode[6] as number) & 0x04) !== 0;
  const limits = await vpdPage(data, 0xb0, 0x3c);
  const characteristics = await vpdPage(data, 0xb1, 0x3c);
  const has = await supportedCommands(data);
  const flush =
    has?.(SYNCHRONIZE_CACHE_16) ??
    (await ask(kernel, [SYNCHRONIZE_CACHE_16, ...new Array(15).fill(0)], 0)).status === Status.GOOD;
  const readOnly = (deviceSpecific & 0x80) !== 0;

  let flags: number = NBD.hasFlags;
  if (readOnly) flags |= NBD.readOnly;
  if (flush) flags |= NBD.flush | NBD.fua;
  if (readU16(characteristics, 4) > 1) flags |= NBD.rotational;
  if (thin && has?.(0x42)) flags |= NBD.trim;
  if (has?.(0x93)) flags |= NBD.writeZeroes | NBD.fastZero;
  if (has?.(0x90)) flags |= NBD.cache;
  // One logical unit behind all connections: what one flushes was written by any of them.
  if (flush || readOnly || !writeCache) flags |= NBD.multiConnection;

  const transfer = readU32(limits, 8) * blockSize || MAX_PAYLOAD;
  const piece = Math.min(transfer, kernel.largestTransfer, MAX_PAYLOAD);
  const optimal = readU32(limits, 12) * blockSize;
  const physical = blockSize << ((capacity[13] as number) & 0x0f);
  return {
    size,
    blockSize,
    preferredSize: preferredSize(Math.max(physical, optimal, 4096)),
    flags,
    pieceBytes: Math.max(Math.floor(piece / blockSize), 1) * blockSize,
    fuaInWrite: (deviceSpecific & 0x10) !== 0,
    tellsStatus: has?.(0x9e, 0x12) ?? false,
    unmapsToZero,
    unmapBlocks: readU32(limits, 20) || MOST_BLOCKS,
    writeSameBlocks: Math.min(readU64(limits, 36) || MOST_BLOCKS, MOST_BLOCKS),
  };
}

/** A power of two, as the protocol demands, not above the maximum payload. */
function preferredSize(bytes: number): number {
  return Math.min(2 ** Math.ceil(Math.log2(bytes)), MAX_PAYLOAD);
}

/** Sends a command, again when all it met was a unit attention. */
async function ask(kernel: SimulatedDevice, cdb: readonly number[], dataInLength: number) {
  for (let attempts = 8; ; attempts--) {
    const result = await kernel.submit({ cdb, dataInLength });
    const { sense } = result;
    const attention = sense !== undefined && ((sense[2] ?? 0) & 0x0f) === SenseKey.UNIT_ATTENTION;
    if (!attention || attempts === 0) return result;
  }
}

type Ask = (cdb: readonly number[], length: number) => Promise<Uint8Array | undefined>;

/** The page with its header; zeros where the disk has less. */
async function vpdPage(data: Ask, code: number, bytes: number): Promise<Uint8Array> {
  const page = new Uint8Array(4 + bytes);
  const found = await data([0x12, 0x01, code, 0, page.length, 0], page.length);
  if (found?.[1] === code) page.set(found);
  return page;
}

/** REPORT SUPPORTED OPERATION CODES (SPC-5), all of them; undefined where the disk can't say. */
async function supportedCommands(
  data: Ask,
): Promise<((opcode: number, serviceAction?: number) => boolean) | undefined> {
  const list = await data([0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0], 8192);
  if (list === undefined || list.length < 4) return undefined;
  const found = new Set<number>();
  const end = Math.min(4 + readU32(list, 0), list.length);
  for (let at = 4; at + 8 <= end; at += 8) {
    const flags = list[at + 5] as number;
    const hasAction = (flags & 1) !== 0;
    found.add((list[at] as number) * 0x1_0000 + (hasAction ? readU16(list, at + 2) + 1 : 0));
    if ((flags & 2) !== 0) at += 12; // a command timeouts descriptor follows
  }
  return (opcode, serviceAction) =>
    found.has(opcode * 0x1_0000 + (serviceAction === undefined ? 0 : serviceAction + 1));
}
