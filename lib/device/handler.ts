// SPDX-License-Identifier: Apache-2.0
/**
 * What a handler gets and what it owes. A command is completed exactly once; the completion is
 * published to the kernel only after the handler has settled and every pin on its memory is gone.
 */
import type { DataIn, DataOut, MaybePromise } from './data.js';
import type { ExpressLane } from './express-lane.js';

/** SAM-5 5.3.1 status codes. */
export const Status = {
  /** Done. */
  GOOD: 0x00,
  /** Failed; sense data says why. */
  CHECK_CONDITION: 0x02,
  /** PRE-FETCH: everything fits into the cache. */
  CONDITION_MET: 0x04,
  /** Not now; the initiator sends the command again. */
  BUSY: 0x08,
  /** Another initiator's reservation forbids it. */
  RESERVATION_CONFLICT: 0x18,
  /** No room for one more command; the initiator lowers its queue depth. */
  TASK_SET_FULL: 0x28,
  /** An auto contingent allegiance blocks the logical unit. */
  ACA_ACTIVE: 0x30,
  /** Aborted by another initiator, or by a reset. */
  TASK_ABORTED: 0x40,
} as const;

/** One SCSI command in flight. */
export interface ScsiCommand {
  /**
   * The CDB, exactly as long as its operation code says (SPC-5 4.2.5.1), apart from the ring. Valid until
   * the command completes: its memory is used again for other commands, so copy what you keep.
   */
  readonly cdb: Uint8Array;
  /** Bytes of the Data-In or Data-Out buffer; for a bidirectional command, of Data-Out. */
  readonly dataLength: number;
  /** Where the initiator's data is. For a command without Data-Out: length 0. */
  readonly dataOut: DataOut;
  /**
   * Where data for the initiator goes. Whether a command's buffer is Data-In or Data-Out is known
   * from the CDB alone; ask only for the one that the command has.
   */
  readonly dataIn: DataIn;
  /** Aborted by a task management function, by the kernel's command time-out, or when the device is lost. */
  readonly signal: AbortSignal;
  /**
   * Ends the command with a SAM status.
   * @param status SAM-5 status code, default GOOD.
   * @param sense sense data, at most 96 bytes (kernel header: TCMU_SENSE_BUFFERSIZE), for CHECK CONDITION.
   * @throws CommandError `ERR_TCMU_COMMAND_COMPLETED` when it was completed before.
   */
  complete(status?: number, sense?: Uint8Array): void;
}

/** A task management function the kernel reported (kernel header: tcmu_tmr_type). */
export interface TaskManagement<C extends ScsiCommand = ScsiCommand> {
  /** The function (SAM-5 clause 7; `tmr_type` of the kernel header). */
  readonly type:
    | 'abort-task'
    | 'abort-task-set'
    | 'clear-aca'
    | 'clear-task-set'
    | 'lun-reset'
    | 'target-warm-reset'
    | 'target-cold-reset'
    | 'lun-reset-pro'
    | 'unknown';
  /** The commands in flight that it affects; their signals are aborted already. */
  readonly commands: readonly C[];
}

/** The raw level: every CDB the kernel does not answer itself. */
export interface CommandHandler<C extends ScsiCommand = ScsiCommand> {
  /**
   * Called for each command, up to `concurrency` at a time. Must lead to exactly one
   * `command.complete()`: before it returns, before the returned promise resolves, or, when it
   * returns nothing, at any later time. A throw becomes the sense of a `SenseError`, or else
   * CHECK CONDITION / HARDWARE ERROR and a diagnostics event.
   */
  handle(command: C): MaybePromise<void>;
  /** Called once before the first command. */
  open?(): MaybePromise<void>;
  /** Called once after the last command has been completed. */
  close?(): MaybePromise<void>;
  /** Called once between `open` and the first command, unless the device was opened without a lane. @internal */
  express?(lane: ExpressLane): void;
  /** Task management that the kernel passed on (needs attrib/tmr_notification=1). */
  taskManagement?(tmr: TaskManagement<C>): void;
}
