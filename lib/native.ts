// SPDX-License-Identifier: Apache-2.0
/**
 * Everything native, typed: the one contract between `lib/` and `addon/`. Nothing else in `lib/`
 * knows the addon, and no user of the package sees these types.
 *
 * Threads: every function here is called on, and calls back on, the JavaScript thread of the
 * environment that loaded the addon. All state is per environment (worker threads get their own).
 *
 * Errors: system failures are thrown as `Error & { code: 'EBUSY', errno: -16, syscall: 'mmap' }`;
 * a mailbox or entry no kernel writes as `Error & { code: 'ERR_TCMU_RING_VERSION' |
 * 'ERR_TCMU_RING_CORRUPT' }`. `lib/` wraps them with what was being done to which device.
 */
import { loadAddon } from './addon-loader.js';

/**
 * One mapped ring: mailbox, command ring, data area. Owns the three fds once constructed; when the
 * constructor throws they are still the caller's. Never collected between `start` and `close`.
 */
export interface NativeRing {
  /** Commands that can be in flight: min(65535, ring bytes / 112). Slots are 0..capacity-1, reused LIFO. */
  readonly capacity: number;
  /** Mailbox capability flags (kernel header: TCMU_MAILBOX_FLAG_CAP_*). */
  readonly mailboxFlags: number;

  /**
   * Written by fetch before each `dispatch()`: `events[0]` is the count, what follows is each the slot
   * of a new command, or EVENT_TMR: the next `takeTmr()` describes a task management function, or EVENT_RESET: the kernel
   * has reset the ring, and every slot fetched before is answered to nobody. In ring order.
   */
  readonly events: Int32Array;
  /** INFO_STRIDE words a slot: see INFO_*. Valid from dispatch until the slot's completion is published. */
  readonly info: Uint32Array;
  /** CDB_STRIDE bytes a slot: the first bytes of the CDB, zero-padded. Longer ones: `longCdb`. */
  readonly cdbs: Uint8Array;
  /**
   * Completions on their way to the kernel, written by `lib/`: word 0 is the count, record `i` starts
   * at word `4 + 4 * i` (flush before there is no room for one more): slot, `status | flags << 8` (COMPLETE_*), READ_LEN in bytes, first byte of the
   * data (offset in the slot's data) from which everything is to be zeroed, or NO_ZERO.
   */
  readonly completions: Uint32Array;
  /** SENSE_STRIDE bytes a completion record, used where COMPLETE_SENSE is set. */
  readonly sense: Uint8Array;

  /**
   * Starts polling; `dispatch` is called from the event loop from then on, for what is on the ring
   * already too.
   */
  start(): void;
  /** Stops polling: no further dispatch. What is in flight can still be completed. */
  stop(): void;
  /**
   * Publishes what `completions` holds (and sets word 0 to 0): for each record whose slot has no pin,
   * zeroes, detaches the slot's ArrayBuffers, writes the response into the oldest uncompleted entry;
   * then moves the tail and rings the doorbell once. A slot with pins is published when the last pin
   * goes. Called by the addon itself after each `dispatch` and each I/O callback; by `lib/` otherwise.
   * Throws `ERR_TCMU_RING_COMPLETION` when a slot awaits no completion; the others are published.
   */
  flush(): void;
  /** The whole CDB of a slot whose INFO_CDB_BYTES exceeds CDB_STRIDE (a copy). */
  longCdb(slot: number): Uint8Array;
  takeTmr(): { type: number; slots: number[] };
  /** Slots fetched and not yet published. */
  inFlight(): number;
  /** KEEP_BUF: the kernel's command id of a slot is INFO_ID; a kept buffer's memory stays usable until this. */
  releaseKept(slot: number): void;

  /**
   * Memory of a slot. Offsets count through all iovecs: Data-Out first, then (bidi) Data-In. Throws
   * `ERR_TCMU_BUFFER_REVOKED` when the slot holds no command, `ERR_TCMU_BUFFER_RANGE`,
   * `ERR_TCMU_RING_CLOSED`, and `ERR_TCMU_RING_MEMORY` when the pages are gone (device removed).
   */
  copyIn(slot: number, offset: number, source: Uint8Array): void;
  copyOut(
    slot: number,
    offset: number,
    length: number,
    target: Uint8Array,
    targetStart: number,
  ): void;
  fill(slot: number, offset: number, length: number, value: number): void;
  isZero(slot: number, offset: number, length: number): boolean;
  /** Offset of the first difference to `other` (same length), or -1. */
  mismatch(slot: number, offset: number, other: Uint8Array): number;
  /** One external-ArrayBuffer view an iovec segment of `[offset, offset + length)`; cached per slot; detached at publish. */
  segments(slot: number, offset: number, length: number): Uint8Array[];
  /** A pin keeps the slot's completion from being published and its memory from being revoked. */
  pin(slot: number): void;
  unpin(slot: number): void;

  /**
   * Arguments and result of `readFile` and `writeFile`: TRANSFER_* (use `moveFile`).
   * In a table, since arguments of a native call cost more than the call.
   */
  readonly transfer: Float64Array;
  /** Terms and counters of the express lane; its words are in device/express-lane.ts. */
  readonly express: Float64Array;
  /**
   * Where the express lane finds a disk's bytes from now on: the words of a `FileMap` (io/file-map.ts), read at each
   * command and never written; kept alive by the ring. Its memory must not be transferred. A unit has 2^`unitBits` bytes.
   */
  useFileMap(words: Float64Array, unitBits: number): void;
  /**
   * Scatter-gather read of `[offset, offset + length)` of a slot's memory from a file. The result is the
   * bytes read (>= 0; the rest is zeroed) when it could be done at once under `mode`, else -id: queued,
   * the slot is pinned, and `io` reports the result under that id. A failure at once is thrown. Position
   * -1 is the descriptor's own, for pipes.
   */
  readFile(): void;
  /** The same for writing; a short write that makes no progress is ENOSPC. */
  writeFile(): void;

  /**
   * Stops polling, publishes what `completions` holds, revokes every buffer without a pin, unmaps and
   * closes the fds. With commands pinned or I/O running it answers false: mapping and fds stay (nobody
   * else is handed the same pages) until the last pin goes, for good if it never does; what is
   * completed meanwhile is still published. Called again: whether it is over.
   */
  close(): boolean;
  /** Counters since construction. */
  stats(): {
    /** Times that the kernel woke us. */
    wakeups: number;
    /** Commands carried out on the express lane, without JavaScript. */
    express: number;
    /** Calls into JavaScript with new commands. */
    batches: number;
    /** Commands fetched. */
    commands: number;
    /** Commands answered. */
    completions: number;
    /** System calls that told the kernel of completions, one a batch. */
    doorbells: number;
    /** Ring entries of an unknown kind, answered with UNKNOWN_OP. */
    unknownOps: number;
    /** Task management notices. */
    tmrs: number;
    /** ArrayBuffers made over a command's memory (`segments()`). */
    externalBuffers: number;
  };
}

export interface NativeRingOptions {
  /** The uio device: one fd for all three. The simulated kernel: a memfd and two others. */
  memoryFd: number;
  /** Polled; 4 bytes are read at each wake-up. */
  eventFd: number;
  /** 4 bytes are written after each batch of completions. */
  doorbellFd: number;
  /** Bytes to map (sysfs maps/map0/size). */
  mapSize: number;
  /** Most events one `dispatch` gets. */
  batchSize: number;
  /** Takes this ring's queued file operations and reports their ids. */
  io: NativeIo;
  /** New events, in `events`. Must not throw. */
  dispatch(): void;
  /**
   * Polling has ended for good: the device is gone (`EIO`), the ring is corrupt
   * (`ERR_TCMU_RING_CORRUPT`), or pages of the mapping are gone (`ERR_TCMU_RING_MEMORY`: nothing more
   * is published, since JavaScript that touched them saw zeros). Called once.
   */
  lost(code: string, message: string): void;
  /** At publish a buffer of this slot was found detached by somebody else: it escaped revocation. */
  escaped(slot: number): void;
}

/**
 * A queue of file operations, drained by a few jobs in libuv's pool: operations queued during one
 * dispatch are handed over together when it ends. One instance per loaded copy of `lib/`.
 */
export interface NativeIo {
  /**
   * Pairs (id, result): result >= 0, or -errno. Filled before each `done` callback. Ids are small
   * integers, used again only after that callback has returned.
   */
  readonly results: Float64Array;
  /** As `readFile` of a ring, into ordinary memory (kept alive by the addon until done). */
  read(target: Uint8Array, fd: number, position: number, mode: number): number;
  write(source: Uint8Array, fd: number, position: number, mode: number): number;
  /** fdatasync (IO_INLINE in `mode`: at once). Returns 0 or -id. */
  datasync(fd: number, mode: number): number;
  /** fallocate(2) with FALLOC_FL_* `flags`; allocating (0) on a block device does nothing. */
  allocate(fd: number, flags: number, position: number, length: number, mode: number): number;
  /** lseek(2) with `whence` SEEK_DATA (3) or SEEK_HOLE (4), without moving anybody's offset visibly; -id. Result: offset, or -ENXIO. */
  seek(fd: number, position: number, whence: number, mode: number): number;
  /** ftruncate(2). */
  truncate(fd: number, length: number, mode: number): number;
  /** copy_file_range(2), again until done or the source ends. Result: bytes copied. */
  copy(
    source: number,
    sourcePosition: number,
    fd: number,
    position: number,
    length: number,
    mode: number,
  ): number;
}

/** What the system says of an open file. */
export interface NativeFileFacts {
  /** A regular file, a block device, or anything else. */
  kind: 'file' | 'block' | 'other';
  /** Bytes; of a block device by BLKGETSIZE64. */
  size: number;
  /** st_blksize, or the block device's logical / physical block size. */
  blockSize: number;
  /** Bytes of the medium's own block; of a file, `st_blksize`. */
  physicalBlockSize: number;
  /** preadv2(RWF_NOWAIT) is understood by this file. */
  nowaitRead: boolean;
  /** pwritev2(RWF_NOWAIT) is understood by this file. */
  nowaitWrite: boolean;
  /** The file lives in memory (tmpfs, memfd): blocking calls don't wait for a device. */
  memory: boolean;
  /** O_DIRECT is set. */
  direct: boolean;
}

/** A netlink socket: datagrams in, datagrams out. The codec is in `lib/target`. */
export interface NativeNetlinkSocket {
  /** Bytes of one or more netlink messages. */
  send(message: Uint8Array): void;
  /** NETLINK_ADD_MEMBERSHIP. */
  join(group: number): void;
  /** Local port id. */
  readonly port: number;
  close(): void;
}

export interface NativeNetlinkOptions {
  /** SO_RCVBUF(FORCE) in bytes. */
  receiveBuffer: number;
  message(datagram: Uint8Array): void;
  /** The kernel dropped messages (ENOBUFS): the caller must resync. */
  overrun(): void;
  failed(code: string, message: string): void;
}

export interface NativeAddon {
  Ring: new (options: NativeRingOptions) => NativeRing;
  NetlinkSocket: new (options: NativeNetlinkOptions) => NativeNetlinkSocket;
  /** `done(count)` takes the pairs in `results`; must not throw. Rings used with this queue are flushed after it. */
  IoQueue: new (
    done: (count: number) => void,
  ) => NativeIo;
  fileFacts(fd: number): NativeFileFacts;
  /**
   * Open file description lock (fcntl F_OFD_SETLK) on bytes `[start, start+length)` (0: to the end).
   * False: another holds it.
   */
  lockFile(fd: number, exclusive: boolean, start: number, length: number): boolean;
  /** Gives up what this open file description holds on the range. */
  unlockFile(fd: number, start: number, length: number): void;
  /** Whether any lock of another open file description lies on the range (fcntl F_OFD_GETLK). */
  lockedByOthers(fd: number, start: number, length: number): boolean;
  /**
   * A system call that may block for long without being interruptible (configfs `enable`, removing a
   * LUN), on a thread of its own so that it never takes a place in libuv's pool.
   * `open-write`: opens for writing, writes `data` in one write(2), closes. `symlink`: `path` is the
   * link, `data` what it points to.
   */
  blockingCall(
    call: 'mkdir' | 'rmdir' | 'symlink' | 'unlink' | 'open-write',
    path: string,
    data?: string,
  ): Promise<void>;
  /** Version of the contract in this file; the loader refuses another. */
  contract: number;
}

export const CONTRACT = 5;
export const EVENT_TMR = -1;
export const EVENT_RESET = -2;
export const CDB_STRIDE = 32;
export const INFO_STRIDE = 8;
/** Kernel's command id. */
export const INFO_ID = 0;
/** Bytes between cdb_off and the end of the entry: at least the CDB's length. */
export const INFO_CDB_BYTES = 1;
/** Bytes of the (only, or Data-Out) buffer. */
export const INFO_DATA_BYTES = 2;
/** Bytes of Data-In of a bidirectional command, else 0. */
export const INFO_BIDI_BYTES = 3;
export const INFO_SEGMENTS = 4;
export const INFO_BIDI_SEGMENTS = 5;
/** Kernel flags of the entry. */
export const INFO_KFLAGS = 6;
/** Bytes of the CDB: what its operation code says (SPC-5 4.2.5.1), at most INFO_CDB_BYTES. */
export const INFO_CDB_LENGTH = 7;
/** The segments are the initiator's own memory; Data-Out can't be written. Only a zero-copy kernel sets it. */
export const KFLAG_ZERO_COPY = 1;
/** The command can be completed with KEEP_BUF, on a ring that says MAILBOX_KEEP_BUF_CMD. */
export const KFLAG_KEEP_BUF = 2;
/** With KFLAG_ZERO_COPY: the buffer that INFO_DATA_BYTES counts is Data-In; without it, Data-Out. */
export const KFLAG_ZERO_COPY_DATA_IN = 8;
export const TRANSFER_SLOT = 0;
export const TRANSFER_OFFSET = 1;
export const TRANSFER_LENGTH = 2;
export const TRANSFER_FD = 3;
export const TRANSFER_POSITION = 4;
export const TRANSFER_MODE = 5;
export const TRANSFER_RESULT = 6;
export const SENSE_STRIDE = 96;
export const COMPLETE_SENSE = 1;
export const COMPLETE_READ_LEN = 2;
export const COMPLETE_KEEP_BUF = 4;
export const NO_ZERO = 0xffffffff;
export const IO_NOWAIT = 1;
export const IO_INLINE = 2;
export const MAILBOX_OOOC = 1;
export const MAILBOX_READ_LEN = 2;
export const MAILBOX_TMR = 4;
export const MAILBOX_KEEP_BUF = 8;
/** A ring with a zero-copy window; only a kernel with the patches of `kernel/` sets these two. */
export const MAILBOX_ZERO_COPY = 16;
export const MAILBOX_KEEP_BUF_CMD = 32;

/** `NativeRing.readFile` or `writeFile` with its arguments; answers its result. */
export function moveFile(
  ring: NativeRing,
  write: boolean,
  slot: number,
  offset: number,
  length: number,
  fd: number,
  position: number,
  mode: number,
): number {
  const { transfer } = ring;
  transfer[TRANSFER_SLOT] = slot;
  transfer[TRANSFER_OFFSET] = offset;
  transfer[TRANSFER_LENGTH] = length;
  transfer[TRANSFER_FD] = fd;
  transfer[TRANSFER_POSITION] = position;
  transfer[TRANSFER_MODE] = mode;
  if (write) ring.writeFile();
  else ring.readFile();
  return transfer[TRANSFER_RESULT] as number;
}

/** The addon of this environment. */
export const native: NativeAddon = loadAddon(CONTRACT);
