// SPDX-License-Identifier: Apache-2.0
/**
 * Steps with their way back. What was made is removed in reverse order, by the same record whether a
 * later step failed (everything, best effort) or the owner is done with it (step by step, and a step that
 * fails is kept so that the removal can be tried again).
 */
import { TargetError } from '../errors.js';
import { isProblem } from './host.js';

interface Step {
  what: string;
  run: () => Promise<void>;
}

export class Undo {
  readonly #steps: Step[] = [];

  /** @param what as it reads in a message: `remove /sys/…/d0` */
  add(what: string, run: () => Promise<void>): void {
    this.#steps.push({ what, run });
  }

  /** What would still have to be undone, last first. */
  get pending(): string[] {
    return this.#steps.map((step) => step.what).reverse();
  }

  /** Takes everything back, last first; stops at the first failure, which a further call tries again. */
  async run(): Promise<void> {
    for (let step = this.#steps.at(-1); step !== undefined; step = this.#steps.at(-1)) {
      await step.run();
      this.#steps.splice(this.#steps.indexOf(step), 1);
    }
  }

  /** Takes back as much as possible; answers the failures. */
  async rollBack(): Promise<unknown[]> {
    const failures: unknown[] = [];
    for (const step of this.#steps.splice(0).reverse()) {
      try {
        await step.run();
      } catch (error) {
        failures.push(error);
      }
    }
    return failures;
  }
}

/**
 * Runs `body`; when it fails, undoes what it recorded and throws its error, to which failures of the
 * undoing are added. After a call that is stuck in the kernel nothing is undone: removing a backstore
 * under it would block for ever too.
 */
export async function undoOnFailure<T>(undo: Undo, body: (undo: Undo) => Promise<T>): Promise<T> {
  try {
    return await body(undo);
  } catch (error) {
    if (isProblem(error, 'STUCK')) {
      throw extended(error, `Left as it is, still to do: ${undo.pending.join(', ')}`, []);
    }
    const failures = await undo.rollBack();
    if (failures.length === 0) throw error;
    const list = failures.map((failure) => `  - ${messageOf(failure)}`).join('\n');
    throw extended(error, `Undoing what was made before failed too:\n${list}`, failures);
  }
}

function extended(error: unknown, addition: string, failures: unknown[]): TargetError {
  const known = error instanceof TargetError ? error : undefined;
  return new TargetError(
    known?.code ?? 'ERR_TCMU_TARGET_FAILED',
    `${messageOf(error)}\n${addition}`,
    {
      operation: known?.operation,
      path: known?.path,
      errno: known?.errno,
      cause: failures.length === 0 ? error : new AggregateError([error, ...failures]),
    },
  );
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
