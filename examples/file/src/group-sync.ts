// SPDX-License-Identifier: Apache-2.0
/**
 * One fdatasync at a time, shared by everyone who waits, and never a second chance after a failure.
 *
 * Both rules come from how Linux reports failed write-back (errseq_t in include/linux/errseq.h): an error is told
 * once per open file. Of two fdatasyncs running at once on one descriptor, one can take the report
 * that was about the other's data; and a repeated fdatasync succeeds, though the data is lost. So
 * syncs are serialised, each serves every caller whose writes were settled before it began, and the
 * first failure is final: from then on `sync` throws it until the file is opened anew.
 */
import type { MaybePromise } from 'tcmu';

export class GroupSync {
  readonly #run: () => MaybePromise<void>;
  readonly #failed: (cause: unknown) => Error;
  #running: Promise<void> | undefined;
  /** The sync that follows the running one; not begun yet, so anybody may still join. */
  #next: Promise<void> | undefined;
  #failure: Error | undefined;

  /**
   * @param run the fdatasync itself
   * @param failed called once, with its failure; answers the error that callers get from then on
   */
  constructor(run: () => MaybePromise<void>, failed: (cause: unknown) => Error) {
    this.#run = run;
    this.#failed = failed;
  }

  /** The first failure, or undefined while all is well. */
  get failure(): Error | undefined {
    return this.#failure;
  }

  /** Makes every write that settled before this call durable, at once where the file allows that. */
  sync(): MaybePromise<void> {
    if (this.#failure !== undefined) throw this.#failure;
    if (this.#next !== undefined) return this.#next;
    if (this.#running !== undefined) {
      this.#next = this.#running.then(() => {
        this.#next = undefined;
        return this.#start();
      });
      return this.#next;
    }
    return this.#start();
  }

  #start(): MaybePromise<void> {
    let result: MaybePromise<void>;
    try {
      result = this.#run();
    } catch (error) {
      throw this.#fail(error);
    }
    if (result === undefined) return;
    this.#running = result.then(
      () => {
        this.#running = undefined;
      },
      (error: unknown) => {
        this.#running = undefined;
        throw this.#fail(error);
      },
    );
    return this.#running;
  }

  #fail(error: unknown): Error {
    this.#failure ??= this.#failed(error);
    return this.#failure;
  }
}
