// SPDX-License-Identifier: Apache-2.0
/**
 * One command in flight: what the handler sees of it, and the state that decides when its completion
 * may be published.
 *
 * Life: active → completed (the handler said how it ends; its data is revoked for our own methods) →
 * published (the handler has settled too: the completion is handed to the addon, which publishes it
 * when the last pin is gone and detaches every ArrayBuffer at that moment).
 */
import { ArgumentError, BufferError, CommandError } from '../errors.js';
import {
  CDB_STRIDE,
  COMPLETE_KEEP_BUF,
  COMPLETE_READ_LEN,
  COMPLETE_SENSE,
  INFO_BIDI_BYTES,
  INFO_CDB_LENGTH,
  INFO_DATA_BYTES,
  INFO_ID,
  INFO_KFLAGS,
  INFO_STRIDE,
  KFLAG_KEEP_BUF,
  KFLAG_ZERO_COPY,
  KFLAG_ZERO_COPY_DATA_IN,
  MAILBOX_KEEP_BUF,
  MAILBOX_KEEP_BUF_CMD,
  MAILBOX_READ_LEN,
  type NativeRing,
  NO_ZERO,
  SENSE_STRIDE,
} from '../native.js';
import type { DataIn, DataOut } from './data.js';
import { type ScsiCommand, Status } from './handler.js';
import { type DataOwner, RingDataIn, RingDataOut } from './ring-data.js';

/** What a command needs of its device. */
export interface CommandHost {
  readonly name: string;
  readonly ring: NativeRing;
  /** The ring's tables, read for every command: here they are properties of an ordinary object. */
  readonly info: Uint32Array;
  readonly completions: Uint32Array;
  /** A view of the first `length` bytes of a slot's CDB, made once for each slot. */
  cdbView(slot: number, length: number): Uint8Array;
  /** The command was completed and its handler has settled. */
  publish(command: Command): void;
  /** Gives the kernel back the pages of a command completed with KEEP_BUF. */
  readonly freeKeptBuffer: ((id: number) => Promise<void>) | undefined;
}

const ACTIVE = 0;
const COMPLETED = 1;
const PUBLISHED = 2;

const ZERO_COPY_BITS = KFLAG_ZERO_COPY | KFLAG_ZERO_COPY_DATA_IN;

// A DataOwner, too; not said, since its part of that is stripped from the published types.
/**
 * One command in flight, from its fetch to its completion: what a `CommandHandler` gets, and an
 * iteration over a `Device` yields.
 */
export class Command implements ScsiCommand {
  /** @internal */ readonly ring: NativeRing;
  /** @internal */ readonly slot: number;
  /** @internal */ written = 0;
  /** @internal */ exposed = false;
  /** The handler has returned, or its promise has settled. @internal */
  settled = false;
  /** Sweep of the device's clock at which it arrived. @internal */
  readonly tick: number;
  /** Bytes of the Data-In or Data-Out buffer; for a bidirectional command, of Data-Out. */
  readonly dataLength: number;
  /** Bytes of a bidirectional command's Data-In buffer, else 0. */
  readonly bidiLength: number;

  readonly #host: CommandHost;
  #state = ACTIVE;
  #status: number = Status.GOOD;
  #sense: Uint8Array | undefined;
  #keep = false;
  #cdb: Uint8Array | undefined;
  #in: RingDataIn | undefined;
  #out: RingDataOut | undefined;
  #abort: AbortController | undefined;
  #abortReason: unknown;

  /** @internal */
  constructor(host: CommandHost, slot: number, tick: number) {
    const { ring } = host;
    const at = slot * INFO_STRIDE;
    this.#host = host;
    this.ring = ring;
    this.slot = slot;
    this.tick = tick;
    this.dataLength = host.info[at + INFO_DATA_BYTES] as number;
    this.bidiLength = host.info[at + INFO_BIDI_BYTES] as number;
  }

  /** The kernel's id of the command: unique among those in flight. Not after completion. */
  get id(): number {
    return this.ring.info[this.slot * INFO_STRIDE + INFO_ID] as number;
  }

  get cdb(): Uint8Array {
    if (this.#state === PUBLISHED) throw misuse(this.#host, 'its CDB was asked for');
    this.#cdb ??= readCdb(this.#host, this.slot);
    return this.#cdb;
  }

  get dataOut(): DataOut {
    this.#out ??= new RingDataOut(this, 0, this.dataLength);
    return this.#out;
  }

  get dataIn(): DataIn {
    this.#in ??= new RingDataIn(this, 0, this.bidiLength > 0 ? this.bidiLength : this.dataLength);
    return this.#in;
  }

  /** @internal */
  get inBase(): number {
    return this.bidiLength > 0 ? this.dataLength : 0;
  }

  /** Whether `dataIn` is Data-Out in truth, which can't be stored into. @internal */
  get readOnly(): boolean {
    const flags = kernelFlags(this.#host, this.slot);
    return (flags & ZERO_COPY_BITS) === KFLAG_ZERO_COPY && this.bidiLength === 0;
  }

  get signal(): AbortSignal {
    if (this.#abort === undefined) {
      this.#abort = new AbortController();
      if (this.#abortReason !== undefined) this.#abort.abort(this.#abortReason);
    }
    return this.#abort.signal;
  }

  /** @internal */
  get active(): boolean {
    return this.#state === ACTIVE;
  }

  /** Whether a completion is recorded. @internal */
  get completed(): boolean {
    return this.#state !== ACTIVE;
  }

  /** Whether it has been aborted. @internal */
  get aborted(): boolean {
    return this.#abortReason !== undefined;
  }

  /** @internal */
  abort(reason: Error): void {
    if (this.#abortReason !== undefined || this.#state !== ACTIVE) return;
    this.#abortReason = reason;
    this.#abort?.abort(reason);
  }

  complete(status: number = Status.GOOD, sense?: Uint8Array): void {
    if (this.#state !== ACTIVE) {
      throw new CommandError(
        'ERR_TCMU_COMMAND_COMPLETED',
        `tcmu: ${this.describe()}: completed a second time; a command has exactly one completion`,
      );
    }
    if (!Number.isInteger(status) || status < 0 || status > 0xff) {
      throw new ArgumentError(`tcmu: ${this.describe()}: ${status} is no SAM status code`);
    }
    if (sense !== undefined && sense.length > SENSE_STRIDE) {
      throw new ArgumentError(
        `tcmu: ${this.describe()}: ${sense.length} bytes of sense data, at most ${SENSE_STRIDE} fit`,
      );
    }
    this.#status = status;
    this.#sense = sense;
    this.#state = COMPLETED;
    if (this.settled) this.#host.publish(this);
  }

  /**
   * Completes, but keeps the command's memory (KEEP_BUF) for reading until the result is released:
   * for a handler that answers a write first and works on its data afterwards. The kernel's data area
   * is short of these pages until then, and only the device's configfs action gives them back.
   * @throws CommandError `ERR_TCMU_KEEP_BUF` when the ring has no such capability, the data is the
   *   initiator's own memory (zero copy), or the device was opened without a way to release
   *   (`RingSource.freeKeptBuffer`).
   */
  completeKeeping(status: number = Status.GOOD): KeptData {
    const free = this.#host.freeKeptBuffer;
    const { mailboxFlags } = this.ring;
    let obstacle: string | undefined;
    if (free === undefined) {
      obstacle = 'the device was opened without access to its configfs action free_kept_buf';
    } else if ((mailboxFlags & MAILBOX_KEEP_BUF_CMD) !== 0) {
      if ((kernelFlags(this.#host, this.slot) & KFLAG_KEEP_BUF) === 0) {
        obstacle = "it is the initiator's own memory (zero copy): copy what is needed later";
      }
    } else if ((mailboxFlags & MAILBOX_KEEP_BUF) === 0) {
      obstacle = "this kernel's ring lacks the KEEP_BUF capability";
    }
    if (free === undefined || obstacle !== undefined) {
      throw new CommandError(
        'ERR_TCMU_KEEP_BUF',
        `tcmu: ${this.describe()}: its buffer can't be kept: ${obstacle}`,
      );
    }
    const kept = new KeptData(this, free);
    this.#keep = true;
    this.complete(status);
    return kept;
  }

  /**
   * Keeps the command's memory valid, and its completion unpublished, until the result is disposed of.
   * For operations outside JavaScript that hold the memory: `fs.read`, `socket.write`, zlib, crypto.
   * @throws BufferError `ERR_TCMU_BUFFER_REVOKED` after completion.
   */
  pin(): Disposable {
    if (this.#state !== ACTIVE) {
      throw new BufferError(
        'ERR_TCMU_BUFFER_REVOKED',
        `tcmu: ${this.describe()}: pinned after completion; pin before complete()`,
      );
    }
    const { ring, slot } = this;
    ring.pin(slot);
    let held = true;
    return {
      [Symbol.dispose](): void {
        if (!held) return;
        held = false;
        ring.unpin(slot);
      },
    };
  }

  /** Writes the completion record `index`. @internal */
  record(index: number): void {
    const { ring } = this;
    this.#state = PUBLISHED;
    let flags = 0;
    let readLength = 0;
    let zeroFrom = NO_ZERO;
    // With CHECK CONDITION and no READ_LEN the kernel delivers no data; any other status delivers the
    // whole Data-In buffer. Which way the data goes the kernel says of zero-copy commands alone, and a
    // handler may ask for both buffers and use one. Where a store would harm Data-Out that is kept, it
    // takes a handler that wrote, or that asked for Data-In alone. Zero-copy Data-In has been zeroed.
    const isBidi = this.bidiLength > 0;
    const inAsked = this.#in !== undefined;
    const outAsked = this.#out !== undefined;
    const isDataIn =
      isBidi ||
      this.written > 0 ||
      ((kernelFlags(this.#host, this.slot) & KFLAG_ZERO_COPY) !== 0
        ? inAsked && !this.readOnly
        : this.#keep
          ? inAsked && !outAsked
          : inAsked || !outAsked);
    const inLength = isBidi ? this.bidiLength : this.dataLength;
    if (isDataIn && this.#status !== Status.CHECK_CONDITION && this.written < inLength) {
      // The kernel looks at READ_LEN only where the data goes one way.
      if (this.written > 0 && !isBidi && (ring.mailboxFlags & MAILBOX_READ_LEN) !== 0) {
        flags |= COMPLETE_READ_LEN;
        readLength = this.written;
      } else {
        zeroFrom = this.inBase + this.written;
      }
    }
    if (this.#sense !== undefined) {
      flags |= COMPLETE_SENSE;
      const at = index * SENSE_STRIDE;
      ring.sense.fill(0, at + this.#sense.length, at + SENSE_STRIDE);
      ring.sense.set(this.#sense, at);
    }
    if (this.#keep) flags |= COMPLETE_KEEP_BUF;
    const at = 4 + 4 * index;
    const { completions } = this.#host;
    completions[at] = this.slot;
    completions[at + 1] = this.#status | (flags << 8);
    completions[at + 2] = readLength;
    completions[at + 3] = zeroFrom;
  }

  /** For messages, where the command may be long gone. @internal */
  get deviceName(): string {
    return this.#host.name;
  }

  /** The status it was completed with. @internal */
  get status(): number {
    return this.#status;
  }

  /** For messages: the device and the operation code. @internal */
  describe(): string {
    const opcode =
      this.#state === PUBLISHED
        ? 'a finished command'
        : `command 0x${(this.cdb[0] as number).toString(16).padStart(2, '0')}`;
    return `${this.#host.name}: ${opcode}`;
  }
}

// Functions, not private methods: those would cost every command a field and a check at each call.

function readCdb(host: CommandHost, slot: number): Uint8Array {
  const length = host.info[slot * INFO_STRIDE + INFO_CDB_LENGTH] as number;
  if (length > CDB_STRIDE) return host.ring.longCdb(slot).slice(0, length);
  return host.cdbView(slot, length);
}

function kernelFlags(host: CommandHost, slot: number): number {
  return host.info[slot * INFO_STRIDE + INFO_KFLAGS] as number;
}

function misuse(host: CommandHost, what: string): CommandError {
  return new CommandError(
    'ERR_TCMU_COMMAND_COMPLETED',
    `tcmu: ${host.name}: ${what} after the command had been completed`,
  );
}

/** The Data-Out memory of a command that was completed with KEEP_BUF. */
export class KeptData {
  readonly #id: number;
  readonly #free: (id: number) => Promise<void>;
  readonly #owner: DataOwner & { active: boolean };
  /** The data, valid until `release`. */
  readonly dataOut: DataOut;

  /** @internal */
  constructor(command: Command, free: (id: number) => Promise<void>) {
    const { ring, slot, id, deviceName } = command;
    this.#id = id;
    this.#free = free;
    this.#owner = {
      ring,
      slot,
      active: true,
      inBase: 0,
      readOnly: true,
      written: 0,
      exposed: false,
      describe: () => `${deviceName}: kept buffer ${id}`,
    };
    this.dataOut = new RingDataOut(this.#owner, 0, command.dataLength);
  }

  /** Revokes the memory and gives its pages back. Idempotent. @throws TargetError when configfs refuses. */
  async release(): Promise<void> {
    if (!this.#owner.active) return;
    this.#owner.active = false;
    this.#owner.ring.releaseKept(this.#owner.slot);
    await this.#free(this.#id);
  }

  /** As `release`, for `await using`; rejects as that does. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.release();
  }
}
