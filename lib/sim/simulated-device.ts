// SPDX-License-Identifier: Apache-2.0
/**
 * The kernel's side of one TCMU device, simulated: an initiator for tests, and the knobs an
 * administrator has in configfs.
 *
 * The ring, its memory and the rules are the real kernel's (Linux 6.1); `open()` gives what
 * `Device.open` takes. A command's Data-In belongs to the simulated kernel until its promise settles.
 * Nothing here is freed by the garbage collector: `close()` ends it.
 */

import type { MaybePromise } from '../device/data.js';
import type { RingSource } from '../device/ring-source.js';
import { ArgumentError, DeviceError, errnoOf } from '../errors.js';
import {
  type NativeLoadReport,
  type NativeSimAttributes,
  NativeSimDevice,
  type NativeSimFaults,
  type NativeSimState,
  SIM_HAS_SENSE,
  SIM_RESULT_WORDS,
  SIM_SENSE_BYTES,
} from '../native-sim.js';
import { decodeEntries, type RingEntry } from './ring-entries.js';

/**
 * What the simulated kernel's device is like, for `new SimulatedDevice`: names in parentheses are
 * those of configfs.
 */
export interface SimulatedDeviceOptions {
  /** For messages, as `hba/device`. Default `sim/disk`. */
  name?: string;
  /** dev_config, `<subtype>/<rest>`. Default empty. */
  config?: string;
  /** What to do when the administrator reconfigures the device; see `reconfigure`. */
  onReconfigure?: (change: Reconfiguration) => MaybePromise<void>;
  /** Mailbox and command ring in bytes, a multiple of 4096 (cmd_ring_size_mb). Default 8 MiB. */
  ringBytes?: number;
  /** Data area in bytes, a multiple of 4096 (max_data_area_mb). Default 1 GiB; only what is used takes memory. */
  dataAreaBytes?: number;
  /** data_pages_per_blk. Default 1. */
  dataPagesPerBlock?: number;
  /** attrib/cmd_time_out in milliseconds, 0: none. Default 30,000, with zero copy 0 and fixed. */
  commandTimeout?: number;
  /** attrib/qfull_time_out in milliseconds; 0: refuse at once; -1: as commandTimeout. Default -1. */
  queueFullTimeout?: number;
  /** attrib/tmr_notification. Default true; a kernel's default is false. */
  tmrNotification?: boolean;
  /** Mailbox flags: OOOC 1, READ_LEN 2, TMR 4, KEEP_BUF 8. Default 15. */
  capabilities?: number;
  /**
   * Behaves as a kernel with the zero-copy patch and `zero_copy=1`: commands of whole pages show the
   * initiator's own memory to the handler, for the time of the command; later touches raise SIGBUS.
   * Only a handler in this process can be shown it; for another everything is copied. Default false.
   */
  zeroCopy?: boolean | ZeroCopyOptions;
  /** Fills data blocks with this byte when they are freed, to make stale bytes visible. A kernel leaves them. */
  poison?: number;
}

/**
 * How a simulated kernel with the zero-copy patch behaves, for `SimulatedDeviceOptions.zeroCopy`.
 */
export interface ZeroCopyOptions {
  /** zc_area_mb, in bytes: how much can be shown at a time; what finds no room is copied. Default 256 MiB. */
  windowBytes?: number;
  /** zc_scrub: Data-In memory is zeroed before the handler sees it. Default true. */
  scrub?: boolean;
  /**
   * zc_min_bytes: shorter commands are copied. Default 64 KiB: here showing a command's pages costs two
   * system calls, a kernel's patch does it for less and starts from 0.
   */
  minBytes?: number;
}

/** One of the three attributes whose change the kernel announces (netlink RECONFIG_DEVICE). */
export type Reconfiguration =
  | {
      /** The new capacity in bytes (attrib/dev_size). */
      size: number;
    }
  | {
      /** The new configuration string (attrib/dev_config). */
      config: string;
    }
  | {
      /** The new attrib/emulate_write_cache. */
      writeCache: boolean;
    };

/** Seeded faults between the initiator and the handler. Probabilities are 0 to 1, default 0. */
export interface SimulatedFaults {
  /** Integer; the n-th decision of a kind is the same in every run. Default 1. */
  seed?: number;
  /** Probability that a command reaches the device up to `maxDelay` later: delays and reordering. */
  holdCommand?: number;
  /** Probability that a wake-up comes up to `maxDelay` late. */
  lateWakeup?: number;
  /** Probability that a wake-up never comes; the next one, or `kick()`, makes up for it. */
  lostWakeup?: number;
  /** Probability that a wake-up comes with nothing new on the ring. */
  spuriousWakeup?: number;
  /** Milliseconds. Default 10. */
  maxDelay?: number;
}

/** A SCSI command as an initiator sends it, for `SimulatedDevice.submit`. */
export interface CommandRequest {
  /** Cut or zero-padded to the length that its operation code implies (SPC-5 4.2.5.1). */
  cdb: Uint8Array | readonly number[];
  /** Data-Out. Copied during the call. */
  dataOut?: Uint8Array;
  /** Bytes of Data-In. With `dataOut` only for a `bidirectional` command. */
  dataInLength?: number;
  /** Data goes both ways. Default false. */
  bidirectional?: boolean;
  /** Aborts the command: ABORT TASK. */
  signal?: AbortSignal;
}

/** How a command ended, as the initiator sees it. */
export interface CommandResult {
  /** Status code (SAM-5 5.3.1), see `Status`. */
  status: number;
  /** With CHECK CONDITION: the sense data up to its own length. */
  sense: Uint8Array | undefined;
  /** Data-In that is valid: all of it or what READ_LEN says; empty unless the status lets data through. */
  data: Uint8Array;
  /** The whole Data-In memory, valid or not: what a handler leaks shows up here. */
  buffer: Uint8Array;
  /** Underflow in bytes. */
  residual: number;
}

/** What the load generator sends. */
export interface LoadOptions {
  /** Commands in flight at a time. Default 1. */
  depth?: number;
  /** Bytes of one command, a multiple of the block size. Default 4096. */
  bytes?: number;
  /** Bytes of a logical block. Default 512. */
  blockSize?: number;
  /** Range of logical blocks; must hold `depth` commands. */
  firstBlock?: number;
  /** Length of that range, in blocks. */
  blocks: number;
  /** Share of reads, 0 to 1; the rest are writes. Default 1. */
  readShare?: number;
  /** In order through the range instead of at random. Default false. */
  sequential?: boolean;
  /** Judges every byte read of what it wrote itself. Default false. */
  verify?: boolean;
  /** Commands to send; default no limit but `duration`, which is milliseconds. One of them is needed. */
  count?: number;
  /** Milliseconds after which no more commands are sent. */
  duration?: number;
  /** Integer; the same seed sends the same commands. Default 1. */
  seed?: number;
  /** Ends the load early; the report says how far it came. */
  signal?: AbortSignal;
}

/** What the load generator did and measured. */
export interface LoadReport {
  /** Commands answered. */
  commands: number;
  /** Reads among them. */
  reads: number;
  /** Commands with a status other than GOOD. */
  failed: number;
  /** Reads with wrong bytes (with `verify`). */
  corrupt: number;
  /** Seconds from the first submission to the last answer. */
  seconds: number;
  /** `commands / seconds`. */
  commandsPerSecond: number;
  /** The first failure: its status and sense data. */
  firstFailure:
    | {
        /** Status code (SAM-5 5.3.1), see `Status`. */
        status: number;
        /** Sense data, with CHECK CONDITION. */
        sense: Uint8Array | undefined;
      }
    | undefined;
  /** Seconds from submission to completion, percentiles within 1.6 %. */
  latency: {
    /** Arithmetic mean. */
    mean: number;
    /** Half of the commands took no longer. */
    p50: number;
    /** 90 % took no longer. */
    p90: number;
    /** 99 % took no longer. */
    p99: number;
    /** 99.9 % took no longer. */
    p999: number;
    /** The slowest. */
    max: number;
  };
}

/** Counters and the state right now. */
export type SimulatedDeviceState = NativeSimState;

interface Pending {
  resolve(result: CommandResult): void;
  dataIn: Uint8Array;
  stopListening: (() => void) | undefined;
}

const NO_BYTES = new Uint8Array(0);
const MIN_ZERO_COPY_BYTES = 64 << 10;
const ABORT_TASK = 1;
const LUN_RESET = 5;

/**
 * One TCMU device of a simulated kernel: the initiator's and the administrator's end. `open()`
 * gives the handler's.
 */
export class SimulatedDevice {
  /** `hba/device`, for messages. */
  readonly name: string;
  #config: string;
  readonly #onReconfigure: SimulatedDeviceOptions['onReconfigure'];
  /** @internal */
  readonly native: NativeSimDevice;
  /**
   * Bytes that a command may always move: its data blocks and its ring entry fit, however scattered.
   * @internal
   */
  readonly largestTransfer: number;
  readonly #pending = new Map<number, Pending>();
  readonly #tags = new WeakMap<Promise<CommandResult>, number>();
  #attributes: NativeSimAttributes;
  #nextTag = 1;
  #idle: (() => void)[] = [];
  #closed = false;

  /** @throws ArgumentError when the sizes can't be, DeviceError when the memory can't be had. */
  constructor(options: SimulatedDeviceOptions = {}) {
    this.name = options.name ?? 'sim/disk';
    this.#config = options.config ?? '';
    this.#onReconfigure = options.onReconfigure;
    const zeroCopy = options.zeroCopy === true ? {} : options.zeroCopy || undefined;
    this.#attributes = {
      commandTimeout: options.commandTimeout ?? (zeroCopy === undefined ? 30_000 : 0),
      queueFullTimeout: options.queueFullTimeout ?? -1,
      tmrNotification: options.tmrNotification ?? true,
      scrub: zeroCopy?.scrub ?? true,
      zeroCopyBytes: zeroCopy?.minBytes ?? MIN_ZERO_COPY_BYTES,
    };
    const { ringBytes = 8 << 20, dataAreaBytes = 2 ** 30, dataPagesPerBlock = 1 } = options;
    // The kernel refuses entries over half the ring: a header, a CDB, 16 bytes a segment.
    const segments = Math.floor((ringBytes / 2 - 256) / 16);
    this.largestTransfer = Math.min(dataAreaBytes / 4, segments * dataPagesPerBlock * 4096);
    try {
      this.native = new NativeSimDevice({
        ...this.#attributes,
        ringBytes,
        dataBytes: dataAreaBytes,
        pagesPerBlock: dataPagesPerBlock,
        capabilities: options.capabilities ?? 15,
        zeroCopy: zeroCopy !== undefined,
        windowBytes: zeroCopy?.windowBytes ?? 256 << 20,
        poison: options.poison ?? -1,
        finished: (count) => this.#finished(count),
      });
    } catch (error) {
      if (error instanceof RangeError) {
        throw new ArgumentError(`tcmu: simulate ${this.name}: ${error.message}`, { cause: error });
      }
      throw this.#failure('create', error);
    }
  }

  /** dev_config: what the device was made or last reconfigured with. */
  get config(): string {
    return this.#config;
  }

  /**
   * Opens the device as its handler: hand the result to `Device.open`. One opener at a time; closing
   * it leaves mailbox and ring as they are for the next.
   * @throws DeviceError `ERR_TCMU_DEVICE_BUSY` while open, `ERR_TCMU_DEVICE_GONE` once removed.
   */
  open(): RingSource {
    try {
      return {
        name: this.name,
        config: this.config,
        ...this.native.open(),
        mapSize: this.native.mapSize,
        commandTimeout: this.#attributes.commandTimeout,
        freeKeptBuffer: async (id) => this.freeKeptBuffer(id),
      };
    } catch (error) {
      throw this.#failure('open', error);
    }
  }

  // --- the initiator ---

  /** Sends a command. The promise never rejects: failures are statuses, as for a real initiator. */
  submit(request: CommandRequest): Promise<CommandResult> {
    const { dataOut, signal, bidirectional = false } = request;
    const dataIn = request.dataInLength ? new Uint8Array(request.dataInLength) : undefined;
    if (dataOut !== undefined && dataIn !== undefined && !bidirectional) {
      throw new ArgumentError(
        `tcmu: submit to ${this.name}: dataOut and dataInLength need bidirectional: true`,
      );
    }
    const cdb = request.cdb instanceof Uint8Array ? request.cdb : Uint8Array.from(request.cdb);
    const tag = this.#freeTag();
    const result = new Promise<CommandResult>((resolve) => {
      this.#pending.set(tag, { resolve, dataIn: dataIn ?? NO_BYTES, stopListening: undefined });
    });
    this.#tags.set(result, tag);
    try {
      this.native.submit(tag, cdb, dataOut, dataIn, bidirectional ? 1 : 0);
    } catch (error) {
      this.#pending.delete(tag);
      throw this.#failure('submit', error);
    }
    if (signal !== undefined) this.#listen(tag, result, signal);
    return result;
  }

  /**
   * ABORT TASK for a command that `submit` returned. It ends with TASK ABORTED once the handler has
   * completed it, at once when it waited for room. False: it has ended before.
   */
  abort(command: Promise<CommandResult>): boolean {
    const tag = this.#tags.get(command);
    return (
      tag !== undefined && this.#pending.has(tag) && this.native.taskManagement(ABORT_TASK, tag) > 0
    );
  }

  /**
   * LOGICAL UNIT RESET (SAM-5 7.6): aborts every command. Resolves when all of them have ended;
   * never rejects.
   */
  async lunReset(): Promise<void> {
    const affected = this.#settled();
    this.native.taskManagement(LUN_RESET);
    await affected;
  }

  /** Lets a command's time-out pass now. False: it has ended before. */
  expire(command: Promise<CommandResult>): boolean {
    const tag = this.#tags.get(command);
    return tag !== undefined && this.#pending.has(tag) && this.native.expire(tag);
  }

  /** Commands submitted and not answered. */
  get pending(): number {
    return this.#pending.size;
  }

  // --- the administrator ---

  /** action/block_dev 1: new commands and those that wait for room get BUSY. */
  block(): void {
    this.native.setBlocked(true);
  }

  /** action/block_dev 0. */
  unblock(): void {
    this.native.setBlocked(false);
  }

  /** action/reset_ring: empties the ring; what is in flight gets BUSY (1) or CHECK CONDITION (2). */
  resetRing(level: 1 | 2): void {
    this.native.resetRing(level);
  }

  /** action/free_kept_buf. @throws DeviceError (EINVAL) when the id isn't that of a kept buffer. */
  freeKeptBuffer(id: number): void {
    if (this.native.freeKeptBuffer(id)) return;
    throw this.#failure('free kept buffer', Object.assign(new Error('EINVAL'), { code: 'EINVAL' }));
  }

  /** attrib/…; what is left out stays. @throws DeviceError (EINVAL) for a time-out with zero copy. */
  setAttributes(
    changed: Pick<
      SimulatedDeviceOptions,
      'commandTimeout' | 'queueFullTimeout' | 'tmrNotification'
    >,
  ): void {
    const attributes = { ...this.#attributes, ...changed };
    try {
      this.native.setAttributes(attributes);
    } catch (error) {
      throw this.#failure('set attributes', error);
    }
    this.#attributes = attributes;
  }

  /**
   * Changes dev_size, dev_config or emulate_write_cache: the handler is asked first, and its refusal
   * (a throw) leaves everything as it was.
   * @throws what `onReconfigure` throws; ArgumentError for a dev_config over 255 bytes
   */
  async reconfigure(change: Reconfiguration): Promise<void> {
    if ('config' in change && Buffer.byteLength(change.config) > 255) {
      throw new ArgumentError(`tcmu: reconfigure ${this.name}: dev_config takes at most 255 bytes`);
    }
    await this.#onReconfigure?.(change);
    if ('config' in change) this.#config = change.config;
  }

  /**
   * Takes unused data pages away, as a kernel over its global limit does with idle devices: touching
   * them raises SIGBUS. Returns the bytes freed.
   */
  reclaim(): number {
    return this.native.reclaim();
  }

  /**
   * Unlinks the logical unit: new commands are refused with LOGICAL UNIT NOT SUPPORTED. Resolves
   * when those in flight have ended, or after `deadline` milliseconds: false then. Never rejects.
   */
  async detach(deadline = 30_000): Promise<boolean> {
    if (!this.#closed) this.native.refuseAll();
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<boolean>((resolve) => {
      timer = setTimeout(resolve, deadline, false);
    });
    const ended = await Promise.race([this.#settled().then(() => true), late]);
    clearTimeout(timer);
    return ended;
  }

  /**
   * Detaches, then takes the device away from its handler, which sees its end. What is in flight
   * after the deadline (milliseconds, default 30,000) never reaches the handler's end of the ring
   * again; it ends by its time-out or `close`. Never rejects.
   */
  async remove(deadline?: number): Promise<void> {
    await this.detach(deadline);
    if (!this.#closed) this.native.unregister();
  }

  /** Ends the simulated kernel at once: what is in flight ends with NOT READY. Idempotent. */
  close(): void {
    this.#closed = true;
    this.native.close();
  }

  /** As `close`, for `using`. */
  [Symbol.dispose](): void {
    this.close();
  }

  // --- the tester ---

  /** Replaces all faults; none without arguments. */
  setFaults(faults: SimulatedFaults = {}): void {
    const all: NativeSimFaults = {
      seed: faults.seed ?? 1,
      holdCommand: faults.holdCommand ?? 0,
      lateWakeup: faults.lateWakeup ?? 0,
      lostWakeup: faults.lostWakeup ?? 0,
      spuriousWakeup: faults.spuriousWakeup ?? 0,
      maxDelay: faults.maxDelay ?? 10,
    };
    this.native.setFaults(all);
  }

  /**
   * Keeps `depth` reads and writes going from a thread of the simulated kernel, for measurements and
   * long verified runs. One load at a time; other commands may go beside it.
   * @throws ArgumentError for options that contradict each other, DeviceError while another runs
   */
  async load(options: LoadOptions): Promise<LoadReport> {
    const { count, duration, signal } = options;
    if (count === undefined && duration === undefined) {
      throw new ArgumentError(
        `tcmu: load on ${this.name}: give count or duration, or it never ends`,
      );
    }
    const onAbort = () => this.native.stopLoad();
    try {
      return await new Promise((resolve) => {
        this.native.startLoad(
          {
            depth: options.depth ?? 1,
            bytes: options.bytes ?? 4096,
            blockSize: options.blockSize ?? 512,
            firstBlock: options.firstBlock ?? 0,
            blocks: options.blocks,
            readShare: options.readShare ?? 1,
            sequential: options.sequential ?? false,
            verify: options.verify ?? false,
            count: count ?? Number.MAX_SAFE_INTEGER,
            duration: duration ?? 0,
            seed: options.seed ?? 1,
          },
          (report) => resolve(toLoadReport(report)),
        );
        signal?.addEventListener('abort', onAbort, { once: true });
        if (signal?.aborted) onAbort();
      });
    } catch (error) {
      if (error instanceof RangeError) {
        throw new ArgumentError(`tcmu: load on ${this.name}: ${error.message}`, { cause: error });
      }
      throw this.#failure('load', error);
    } finally {
      signal?.removeEventListener('abort', onAbort);
    }
  }

  /** Wakes the handler without a reason. */
  kick(): void {
    this.native.kick();
  }

  /** Counters since the start, and the state right now. */
  state(): SimulatedDeviceState {
    return this.native.state();
  }

  /** The entries from where the kernel has taken completions to the head, decoded. */
  entries(): RingEntry[] {
    const { from, bytes } = this.native.entries();
    return decodeEntries(bytes, from, this.native.state().ringSize);
  }

  /** A copy of the mapping's bytes. @throws RangeError where the kernel has no memory. */
  peek(offset: number, length: number): Uint8Array {
    return this.native.peek(offset, length);
  }

  /** Writes into the mapping, past all rules: for corrupt mailboxes and entries. */
  poke(offset: number, bytes: Uint8Array): void {
    this.native.poke(offset, bytes);
  }

  #freeTag(): number {
    let tag = this.#nextTag;
    while (this.#pending.has(tag)) tag = (tag + 1) >>> 0;
    this.#nextTag = (tag + 1) >>> 0;
    return tag;
  }

  #listen(tag: number, result: Promise<CommandResult>, signal: AbortSignal): void {
    const pending = this.#pending.get(tag);
    if (pending === undefined) return;
    if (signal.aborted) {
      this.abort(result);
      return;
    }
    const onAbort = () => this.abort(result);
    signal.addEventListener('abort', onAbort, { once: true });
    pending.stopListening = () => signal.removeEventListener('abort', onAbort);
  }

  #finished(count: number): void {
    const { results, sense } = this.native;
    for (let i = 0; i < count; i++) {
      const at = i * SIM_RESULT_WORDS;
      const tag = results[at] as number;
      const word = results[at + 1] as number;
      const pending = this.#pending.get(tag) as Pending;
      this.#pending.delete(tag);
      pending.stopListening?.();
      pending.resolve({
        status: word & 0xff,
        sense: word & SIM_HAS_SENSE ? trimSense(sense, i * SIM_SENSE_BYTES) : undefined,
        data: pending.dataIn.subarray(0, results[at + 2]),
        buffer: pending.dataIn,
        residual: results[at + 3] as number,
      });
    }
    if (this.#pending.size === 0) for (const resolve of this.#idle.splice(0)) resolve();
  }

  /** When no command is pending. */
  #settled(): Promise<void> {
    if (this.#pending.size === 0) return Promise.resolve();
    return new Promise((resolve) => this.#idle.push(resolve));
  }

  #failure(operation: string, error: unknown): DeviceError {
    const errno = errnoOf(error);
    const [code, hint] =
      errno === 'EBUSY'
        ? (['ERR_TCMU_DEVICE_BUSY', `another ${operation} has it: end that one first`] as const)
        : errno === 'ENODEV'
          ? (['ERR_TCMU_DEVICE_GONE', 'it was removed'] as const)
          : (['ERR_TCMU_DEVICE_OPEN', 'see the cause'] as const);
    return new DeviceError(
      code,
      `tcmu: ${operation} ${this.name} (simulated): ${errno ?? 'failed'}; ${hint}`,
      { operation, path: this.name, cause: error },
    );
  }
}

function toLoadReport(report: NativeLoadReport): LoadReport {
  const { commands, reads, failed, corrupt, seconds, firstFailedStatus, firstSense } = report;
  const [p50, p90, p99, p999] = report.latency;
  return {
    commands,
    reads,
    failed,
    corrupt,
    seconds,
    commandsPerSecond: commands / seconds,
    firstFailure:
      failed === 0
        ? undefined
        : {
            status: firstFailedStatus,
            sense: firstSense === undefined ? undefined : trimSense(firstSense, 0),
          },
    latency: { mean: report.meanLatency, p50, p90, p99, p999, max: report.maxLatency },
  };
}

/** Sense data up to its ADDITIONAL SENSE LENGTH (SPC-5 4.4.2, 4.4.3); all of it when it says nothing. */
function trimSense(table: Uint8Array, at: number): Uint8Array {
  const known = ((table[at] as number) & 0x7c) === 0x70;
  const length = known ? Math.min(SIM_SENSE_BYTES, 8 + (table[at + 7] as number)) : SIM_SENSE_BYTES;
  return table.slice(at, at + length);
}
