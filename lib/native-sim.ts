// SPDX-License-Identifier: Apache-2.0
/**
 * The simulated kernel in the addon, typed; the part of the contract of `native.ts` that only
 * `lib/sim` uses. Functions are called on, and call back on, the environment's JavaScript thread; the
 * device behind them has a thread of its own.
 *
 * Errors: system failures as in `native.ts`; a geometry that can't be as RangeError.
 */
import { native } from './native.js';

export interface NativeSimAttributes {
  /** Milliseconds; 0: none. */
  commandTimeout: number;
  /** Milliseconds; 0: a command without room is refused at once; -1: the command time-out. */
  queueFullTimeout: number;
  tmrNotification: boolean;
  /** zc_scrub. */
  scrub: boolean;
  /** zc_min_bytes. */
  zeroCopyBytes: number;
}

export interface NativeSimFaults {
  /** Integer. */
  seed: number;
  /** Probabilities, 0 to 1. */
  holdCommand: number;
  lateWakeup: number;
  lostWakeup: number;
  spuriousWakeup: number;
  /** Milliseconds. */
  maxDelay: number;
}

export interface NativeSimOptions extends NativeSimAttributes {
  /** Mailbox and ring; a multiple of 4096. */
  ringBytes: number;
  /** A multiple of 4096. */
  dataBytes: number;
  pagesPerBlock: number;
  /** Mailbox flags. */
  capabilities: number;
  zeroCopy: boolean;
  /** zc_area_mb; a multiple of 4096. */
  windowBytes: number;
  /** Byte that freed data blocks are filled with, or -1. */
  poison: number;
  /** `count` rows of `results` and `sense` are filled. Must not throw. */
  finished(count: number): void;
}

export interface NativeSimState {
  commands: number;
  completions: number;
  pads: number;
  taskManagements: number;
  waited: number;
  expired: number;
  unknownOps: number;
  resets: number;
  zeroCopied: number;
  copied: number;
  scrubbedBytes: number;
  zaps: number;
  inFlight: number;
  waiting: number;
  idsInUse: number;
  blocksInUse: number;
  head: number;
  tail: number;
  ringSize: number;
  dataOffset: number;
  memoryBytes: number;
  blocked: boolean;
  broken: string | null;
  wakeups: number;
  doorbells: number;
}

export interface NativeLoadOptions {
  depth: number;
  /** Bytes of one command, a multiple of blockSize. */
  bytes: number;
  blockSize: number;
  firstBlock: number;
  blocks: number;
  /** 0 to 1. */
  readShare: number;
  sequential: boolean;
  verify: boolean;
  /** Integer. */
  count: number;
  /** Milliseconds; 0: no limit. */
  duration: number;
  /** Integer. */
  seed: number;
}

export interface NativeLoadReport {
  commands: number;
  reads: number;
  failed: number;
  corrupt: number;
  seconds: number;
  firstFailedStatus: number;
  firstSense?: Uint8Array;
  /** Seconds. */
  meanLatency: number;
  maxLatency: number;
  /** Percentiles 50, 90, 99, 99.9, in seconds. */
  latency: [number, number, number, number];
}

export interface NativeSimDevice {
  readonly mapSize: number;
  /** SIM_RESULT_WORDS a result: tag; `status | SIM_HAS_SENSE`; valid bytes of Data-In; residual. */
  readonly results: Uint32Array;
  /** 96 bytes a result. */
  readonly sense: Uint8Array;
  /**
   * `dataOut` is read during the call, `dataIn` written until the result is delivered: by another
   * thread, so nobody else may have it meanwhile. The tag is a u32 that no pending command has.
   */
  submit(
    tag: number,
    cdb: Uint8Array,
    dataOut: Uint8Array | undefined,
    dataIn: Uint8Array | undefined,
    /** 0 or 1. */
    bidirectional: number,
  ): void;
  /** The fds are the caller's. EBUSY while open, ENODEV when unregistered. */
  open(): { memoryFd: number; eventFd: number; doorbellFd: number };
  /** On one command, or on all; returns how many it affects. */
  taskManagement(type: number, tag?: number): number;
  /** False: not pending, or answered already. */
  expire(tag: number): boolean;
  setBlocked(blocked: boolean): void;
  resetRing(level: number): void;
  /** False: no such id, or it isn't kept. */
  freeKeptBuffer(id: number): boolean;
  /** Bytes freed. */
  reclaim(): number;
  /** EINVAL for a time-out with zero copy. */
  setAttributes(attributes: NativeSimAttributes): void;
  setFaults(faults: NativeSimFaults): void;
  kick(): void;
  /** New commands get LOGICAL UNIT NOT SUPPORTED. */
  refuseAll(): void;
  /** The opener reads end of file from now on. */
  unregister(): void;
  /** A copy of `[offset, offset + length)` of the mapping. RangeError where no memory is. */
  peek(offset: number, length: number): Uint8Array;
  poke(offset: number, bytes: Uint8Array): void;
  /** The ring's bytes from `from`, where the kernel has taken completions, to the head. */
  entries(): { from: number; bytes: Uint8Array };
  state(): NativeSimState;
  /** One at a time: EBUSY. RangeError for options that can't be. `ended` must not throw. */
  startLoad(options: NativeLoadOptions, ended: (report: NativeLoadReport) => void): void;
  /** No new commands. */
  stopLoad(): void;
  /** Finishes what is pending with NOT READY, within the call; ends the thread. Idempotent. */
  close(): void;
}

/** What a client is told of the disk, and the addon has to know of it. Sizes in bytes where not said. */
export interface NativeNbdDisk {
  size: number;
  blockSize: number;
  preferredSize: number;
  /** NBD transmission flags. */
  flags: number;
  /** Most of one SCSI command; a multiple of blockSize. */
  pieceBytes: number;
  /** FUA is a bit of WRITE; otherwise SYNCHRONIZE CACHE follows. */
  fuaInWrite: boolean;
  /** GET LBA STATUS is there. */
  tellsStatus: boolean;
  /** WRITE SAME may unmap, and what is unmapped reads as zeros. */
  unmapsToZero: boolean;
  /** Blocks of one UNMAP, and of one WRITE SAME. */
  unmapBlocks: number;
  writeSameBlocks: number;
}

export interface NativeNbdOptions {
  /** Either a Unix socket or a numeric host and a port, 0 for any. */
  path?: string;
  host?: string;
  port?: number;
  name: string;
  description: string;
  /** 0 none, 1 offered, 2 required. */
  tls: number;
  maxConnections: number;
  /**
   * Kind 0: `described` is awaited for the connection. 1: the client wants TLS on `socket`, the
   * decrypted stream goes through `plain`; both fds are the callee's. 2: closed, nothing more comes.
   * Must not throw.
   */
  event(kind: number, connection: number, socket: number, plain: number): void;
}

/** Keeps itself and the event loop alive until it is closed. System failures as in `native.ts`. */
export interface NativeNbdServer {
  readonly port?: number;
  /** Without a disk the client is told that the export can't be had. */
  described(connection: number, disk: NativeNbdDisk | undefined): void;
  close(atOnce: boolean): void;
  counts(): { connections: number; accepted: number; commands: number };
}

export const SIM_RESULT_WORDS = 4;
export const SIM_HAS_SENSE = 0x100;
export const SIM_SENSE_BYTES = 96;

export const { SimDevice: NativeSimDevice, NbdServer: NativeNbdServer } = native as unknown as {
  SimDevice: new (options: NativeSimOptions) => NativeSimDevice;
  NbdServer: new (device: NativeSimDevice, options: NativeNbdOptions) => NativeNbdServer;
};
