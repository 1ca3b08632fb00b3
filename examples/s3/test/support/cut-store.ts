// SPDX-License-Identifier: Apache-2.0
/**
 * An object store whose user dies: up to some request all is well, then nothing is ever answered again.
 *
 * Contract: of the requests under way at the cut, and of those begun after it, none is answered; each of the former was carried out or not, as
 * the dice fall. What the store behind sees is what it would see of a process that was killed.
 */
import type {
  CallOptions,
  DeleteOptions,
  GetOptions,
  GetResult,
  ListedObject,
  ListOptions,
  ObjectFacts,
  ObjectStore,
  PutOptions,
} from '../../src/object-store.js';

const never = new Promise<never>(() => {});

export class CutStore implements ObjectStore {
  readonly #store: ObjectStore;
  readonly #random: () => number;
  #left: number;
  #dead = false;
  readonly #onDeath: () => void;
  /** Changes still under way when it died, done when the store behind has answered them. */
  readonly #underWay = new Set<Promise<unknown>>();

  /** @param after requests that are let pass */
  constructor(store: ObjectStore, after: number, random: () => number, onDeath: () => void) {
    this.#store = store;
    this.#left = after;
    this.#random = random;
    this.#onDeath = onDeath;
  }

  get description(): string {
    return this.#store.description;
  }

  get dead(): boolean {
    return this.#dead;
  }

  /** Kills now. */
  cut(): void {
    if (this.#dead) return;
    this.#dead = true;
    this.#onDeath();
  }

  /** Waits until what was under way has reached the store behind. */
  async settled(): Promise<void> {
    await Promise.allSettled(this.#underWay);
  }

  async #pass<T>(call: () => Promise<T>): Promise<T> {
    if (this.#dead) return never;
    if (this.#left-- <= 0) {
      this.cut();
      // The request that was cut got to the server, or it did not.
      if (this.#random() < 0.5) return never;
    }
    const running = call();
    this.#underWay.add(running);
    try {
      const answer = await running;
      return this.#dead ? await never : answer;
    } catch (error) {
      if (this.#dead) return await never;
      throw error;
    } finally {
      this.#underWay.delete(running);
    }
  }

  get(key: string, options?: GetOptions): Promise<GetResult> {
    return this.#pass(() => this.#store.get(key, options));
  }

  put(key: string, body: readonly Uint8Array[], options?: PutOptions): Promise<string> {
    return this.#pass(() => this.#store.put(key, body, options));
  }

  delete(keys: readonly string[], options?: DeleteOptions): Promise<void> {
    return this.#pass(() => this.#store.delete(keys, options));
  }

  head(key: string, options?: CallOptions): Promise<ObjectFacts> {
    return this.#pass(() => this.#store.head(key, options));
  }

  async *list(prefix: string, options?: ListOptions): AsyncIterable<ListedObject> {
    await this.#pass(() => Promise.resolve());
    yield* this.#store.list(prefix, options);
  }

  close(): Promise<void> {
    return this.#store.close();
  }
}
