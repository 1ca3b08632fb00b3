// SPDX-License-Identifier: Apache-2.0
/**
 * The I_T nexuses (iSCSI sessions, say) of a logical unit as far as they can be told, for what SPC ties to
 * them. TCMU does not say which one sent a command.
 *
 * Whoever tells of them may have to wait for others: configfs is locked while a disk is attached or taken
 * away, and the kernel may hold that lock until this very unit has answered a command. So nothing here is
 * waited for without an end; what is not known in time is treated as unknown.
 */
import type { MaybePromise } from '../device/data.js';
import { chain, isPromise } from '../store/maybe.js';

/** The I_T nexuses (iSCSI sessions, say) that a logical unit has now. */
export interface Nexuses {
  /** Names that differ between nexuses and change when one is lost and comes again. */
  readonly names: ReadonlySet<string>;
  /** There are, or may be, more than those named. Default false. */
  readonly incomplete?: boolean;
}

/** Asks for the nexuses there are now; undefined when nobody knows. */
export type AskNexuses = () => MaybePromise<Nexuses | undefined>;

/** Milliseconds that a command waits for what it can do without. */
const PATIENCE = 250;
/** Milliseconds for what decides a command's outcome. */
const LIMIT = 10_000;
/** Milliseconds between two questions. */
const PAUSE = 20;

/** As `ask`, but a failure means that nobody knows. */
export function askNexuses(ask: AskNexuses | undefined): MaybePromise<Nexuses | undefined> {
  try {
    const answer = ask?.();
    return isPromise(answer)
      ? Promise.resolve(answer as Promise<Nexuses | undefined>).catch(() => undefined)
      : answer;
  } catch {
    return undefined;
  }
}

/** `value`, or undefined when it is not there soon. */
export function soon<T>(
  value: MaybePromise<T>,
  patience: number = PATIENCE,
): MaybePromise<T | undefined> {
  if (!isPromise(value)) return value;
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<undefined>((resolve) => {
    timer = setTimeout(resolve, patience, undefined);
  });
  return Promise.race([value as Promise<T>, late]).finally(() => clearTimeout(timer));
}

/**
 * PREVENT ALLOW MEDIUM REMOVAL: the prevention and its end. SPC-5: it ends with the nexus that asked for it,
 * which here means when none is left, for certain, of those there were then.
 */
export class RemovalPrevention {
  readonly #ask: AskNexuses | undefined;
  /** Who may have prevented removal; undefined for nobody known. Absent while removal is allowed. */
  #current: { readonly preventers: MaybePromise<ReadonlySet<string> | undefined> } | undefined;

  constructor(ask: AskNexuses | undefined) {
    this.#ask = ask;
  }

  /**
   * Prevents removal at once. Settles when the nexuses were looked at, so that the one that sent the command
   * is still there; or soon, when that takes long: attaching a removable disk sends this command, and holds
   * what the look waits for. The look goes on then.
   */
  prevent(): MaybePromise<unknown> {
    const seen = askNexuses(this.#ask);
    this.#current = { preventers: chain(seen, (nexuses) => this.#all(nexuses)) };
    return soon(seen);
  }

  allow(): void {
    this.#current = undefined;
  }

  /** Whether the medium may not be moved now. */
  holds(): MaybePromise<boolean> {
    const state = this.#current;
    if (state === undefined) return false;
    const over = soon(this.#over(state.preventers), LIMIT);
    return chain(over, (gone) => {
      // Meanwhile another command may have prevented or allowed it.
      if (this.#current === state && gone === true) this.#current = undefined;
      return this.#current !== undefined;
    });
  }

  /** Whether none of `preventers` is left. */
  #over(preventers: MaybePromise<ReadonlySet<string> | undefined>): MaybePromise<boolean> {
    return chain(preventers, (names) => {
      if (names === undefined) return false;
      const left = ({ names: now }: Nexuses) => [...names].some((name) => now.has(name));
      return chain(
        this.#until((now) => now.incomplete !== true || left(now)),
        (now) => now !== undefined && !left(now),
      );
    });
  }

  /** The names of `seen` when there were no others: when those not named are gone soon, a lost session, say. */
  #all(seen: Nexuses | undefined): MaybePromise<ReadonlySet<string> | undefined> {
    if (seen?.incomplete !== true) return seen?.names;
    return chain(
      this.#until((now) => now.incomplete !== true),
      (now) => (now === undefined ? undefined : seen.names),
    );
  }

  /** The first answer that will do; undefined when none comes in time, or nobody knows. */
  #until(
    enough: (now: Nexuses) => boolean,
    deadline = performance.now() + LIMIT,
  ): MaybePromise<Nexuses | undefined> {
    return chain(askNexuses(this.#ask), (now) => {
      if (now === undefined || enough(now)) return now;
      if (performance.now() >= deadline) return undefined;
      return new Promise((resolve) => setTimeout(resolve, PAUSE)).then(() =>
        this.#until(enough, deadline),
      );
    });
  }
}
