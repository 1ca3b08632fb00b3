// SPDX-License-Identifier: Apache-2.0
/**
 * Users of one object store whose requests are let through one at a time, in an order that the test chooses.
 *
 * Contract: a request is carried out, whole, when its turn comes, and answered before the next turn of anybody. One whose user is
 * killed is carried out or not, as the test says, and never answered.
 */
import type {
  DeleteOptions,
  GetOptions,
  GetResult,
  ListedObject,
  ListOptions,
  ObjectFacts,
  ObjectStore,
  PutOptions,
} from '../../src/object-store.js';

/** One user: what it does, and its requests that wait for their turn. */
export class Turns<T> {
  readonly #waiting: (() => Promise<void>)[] = [];
  #dead = false;
  /** What became of it; undefined while it is at work, or when it was killed. */
  outcome: { value: T } | { error: unknown } | undefined;
  /** Requests let through. */
  count = 0;

  constructor(store: ObjectStore, run: (store: ObjectStore) => Promise<T>) {
    run(this.#gate(store)).then(
      (value) => {
        this.outcome = { value };
      },
      (error: unknown) => {
        this.outcome = { error };
      },
    );
  }

  /** Lets requests through, `most` at most. @returns whether it has come to its end */
  async go(most = Number.POSITIVE_INFINITY): Promise<boolean> {
    for (let i = 0; i < most; i++) {
      if (!(await this.#isWaiting())) return true;
      this.count++;
      await this.#waiting.shift()?.();
    }
    return !(await this.#isWaiting());
  }

  /** @param carriesOut whether the request that is under way gets through */
  async kill(carriesOut: boolean): Promise<void> {
    const last = (await this.#isWaiting()) ? this.#waiting.shift() : undefined;
    this.#dead = true;
    if (carriesOut) await last?.();
  }

  /** It has a request waiting, or has come to its end. */
  async #isWaiting(): Promise<boolean> {
    while (this.outcome === undefined && this.#waiting.length === 0) {
      await new Promise((resolve) => setImmediate(resolve));
    }
    return this.outcome === undefined;
  }

  #turn<R>(call: () => Promise<R>): Promise<R> {
    return new Promise((resolve, reject) => {
      this.#waiting.push(async () => {
        const answer = call();
        await answer.catch(() => {});
        if (!this.#dead) answer.then(resolve, reject);
      });
    });
  }

  #gate(store: ObjectStore): ObjectStore {
    const turn = <R>(call: () => Promise<R>): Promise<R> => this.#turn(call);
    return {
      description: store.description,
      get: (key: string, options?: GetOptions): Promise<GetResult> =>
        turn(() => store.get(key, options)),
      put: (key: string, body: readonly Uint8Array[], options?: PutOptions): Promise<string> =>
        turn(() => store.put(key, body, options)),
      delete: (keys: readonly string[], options?: DeleteOptions): Promise<void> =>
        turn(() => store.delete(keys, options)),
      head: (key: string): Promise<ObjectFacts> => turn(() => store.head(key)),
      async *list(prefix: string, options?: ListOptions): AsyncIterable<ListedObject> {
        yield* await turn(async () => {
          const found: ListedObject[] = [];
          for await (const object of store.list(prefix, options)) found.push(object);
          return found;
        });
      },
      close: () => store.close(),
    };
  }
}
