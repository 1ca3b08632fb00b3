// SPDX-License-Identifier: Apache-2.0
/**
 * What keeps a logical unit from its normal work: FORMAT UNIT or SANITIZE under way, or the state after
 * one of them failed (SBC-4, FORMAT UNIT and SANITIZE). While there is one, commands that need the medium
 * are refused by it.
 *
 * An operation goes over the whole medium piece by piece, lets other commands in between, counts its
 * progress, and outlives the command that started it: only `stop`, at the close of the device, ends it
 * early. It never completes a command.
 */
import type { MaybePromise } from '../device/data.js';
import { ArgumentError } from '../errors.js';
import { chain, eachPiece } from '../store/maybe.js';
import type { CommandEntry } from './command-spec.js';
import { type SenseError, sense } from './sense.js';

/** Refuses commands. */
export interface Hindrance {
  /** Why the command can't run now; undefined when it can. */
  refusal(entry: CommandEntry): SenseError | undefined;
  /** What REQUEST SENSE reports. */
  readonly report: SenseError;
}

export type OperationKind = 'format' | 'sanitize';

/** What a `StateStorage` keeps of an operation, from before it begins until it has succeeded. */
export function encodeOperation(kind: OperationKind, mayExit: boolean): Uint8Array {
  return Uint8Array.of(kind === 'format' ? 1 : 2, mayExit ? 1 : 0);
}

/**
 * The state that an operation which never ended leaves.
 * @throws ArgumentError when the bytes are none of `encodeOperation`'s.
 */
export function decodeOperation(bytes: Uint8Array): FailedOperation | undefined {
  if (bytes.length === 0) return undefined;
  const [kind, mayExit] = bytes;
  if (bytes.length !== 2 || (kind !== 1 && kind !== 2) || (mayExit !== 0 && mayExit !== 1)) {
    throw new ArgumentError(
      'saved state of the medium: it is no state of a format or sanitize operation; remove it if the contents of the medium are known to be good',
    );
  }
  return new FailedOperation(kind === 1 ? 'format' : 'sanitize', mayExit === 1);
}

/** Bytes between two looks at the rest of the world. */
const PIECE = 32 * 1024 * 1024;

export class MediumOperation implements Hindrance {
  readonly kind: OperationKind;
  readonly #total: number;
  #done = 0;
  #stopped = false;
  readonly #controller = new AbortController();
  /** Settles when the operation has ended, either way. Set by who starts it. */
  finished: MaybePromise<void> = undefined;

  /** @param total bytes that all passes together go over. */
  constructor(kind: OperationKind, total: number) {
    this.kind = kind;
    this.#total = total;
  }

  /** For the store: aborted by `stop`. */
  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  /** PROGRESS INDICATION: n of 65536. */
  get progress(): number {
    return Math.min(Math.floor((this.#done / this.#total) * 0x1_0000), 0xffff);
  }

  /** Every command but those that ask about the device is refused. */
  refusal(entry: CommandEntry): SenseError | undefined {
    return entry.whileHindered ? undefined : this.report;
  }

  get report(): SenseError {
    const { progress } = this;
    return this.kind === 'format'
      ? sense.formatInProgress({ progress })
      : sense.sanitizeInProgress({ progress });
  }

  /** Calls `step` for all of `[0, size)`; with a synchronous store and a small disk at once. */
  pass(
    size: number,
    step: (position: number, length: number) => MaybePromise<unknown>,
  ): MaybePromise<void> {
    return eachPiece(size, PIECE, (position, length) => {
      const go = (): MaybePromise<true> => {
        if (this.#stopped) throw sense.abortedCommand();
        return chain(step(position, length), () => {
          this.#done += length;
          return true as const;
        });
      };
      return position === 0 ? go() : new Promise((resolve) => setImmediate(resolve)).then(go);
    });
  }

  /** Ends it at the next piece, as failed. */
  stop(): void {
    this.#stopped = true;
    this.#controller.abort();
  }
}

/** After an operation that failed, or that the process did not live to end: the contents are undefined. */
export class FailedOperation implements Hindrance {
  readonly kind: OperationKind;
  /** AUSE of the SANITIZE: EXIT FAILURE MODE may end this state. */
  readonly mayExit: boolean;

  constructor(kind: OperationKind, mayExit: boolean) {
    this.kind = kind;
    this.mayExit = mayExit;
  }

  /** Only trying again, and what does not need the medium. */
  refusal(entry: CommandEntry): SenseError | undefined {
    const mends =
      entry.mendsMedium === 'sanitize' ||
      (entry.mendsMedium === 'format' && this.kind === 'format');
    return entry.medium === 'none' || mends ? undefined : this.report;
  }

  get report(): SenseError {
    return this.kind === 'format' ? sense.mediumFormatCorrupted() : sense.sanitizeCommandFailed();
  }
}
