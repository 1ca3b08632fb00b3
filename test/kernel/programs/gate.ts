// SPDX-License-Identifier: Apache-2.0
/**
 * A slow disk in memory: every read and write takes so many milliseconds, or waits until SIGUSR2 opens the gate.
 *
 *     gate.js '{"name":"d0","size":67108864,"delay":20,"serve":{…}}'
 *
 * Without `delay` the gate is open at first; SIGUSR1 closes it. Prints `ready …`, and `holding=N` while the gate is
 * closed and N has changed.
 */
import type { BlockStore, DataIn, DataOut } from 'tcmu';
import { serve } from 'tcmu';
import { MemoryStore } from 'tcmu/store';

interface Arguments {
  name: string;
  size: number;
  delay?: number;
  serve?: Partial<Parameters<typeof serve>[1]>;
}

const options = JSON.parse(process.argv[2] ?? '{}') as Arguments;
const { delay } = options;

class GatedStore implements BlockStore {
  readonly #inner: MemoryStore;
  readonly #waiting: (() => void)[] = [];
  isOpen = true;

  constructor(size: number) {
    this.#inner = new MemoryStore({ size });
  }

  get size(): number {
    return this.#inner.size;
  }

  get holding(): number {
    return this.#waiting.length;
  }

  release(): void {
    this.isOpen = true;
    for (const go of this.#waiting.splice(0)) go();
  }

  #pass(): Promise<void> | undefined {
    if (delay !== undefined) return new Promise((resolve) => setTimeout(resolve, delay));
    if (this.isOpen) return undefined;
    return new Promise((resolve) => this.#waiting.push(resolve));
  }

  read(position: number, data: DataIn): void | Promise<void> {
    const gate = this.#pass();
    if (gate === undefined) return this.#inner.read(position, data);
    return gate.then(() => this.#inner.read(position, data));
  }

  write(position: number, data: DataOut): void | Promise<void> {
    const gate = this.#pass();
    if (gate === undefined) return this.#inner.write(position, data);
    return gate.then(() => this.#inner.write(position, data));
  }
}

const store = new GatedStore(options.size);
const served = await serve(store, {
  name: options.name,
  export: 'loopback',
  signals: false,
  concurrency: 100_000,
  ...options.serve,
});
let told = -1;
setInterval(() => {
  if (store.holding === told) return;
  told = store.holding;
  console.log(`holding=${told}`);
}, 250).unref();
process.on('SIGUSR1', () => {
  store.isOpen = false;
  console.log('closed');
});
process.on('SIGUSR2', () => store.release());
process.once('SIGTERM', () => {
  void served.close().then(() => process.exit(0));
});
console.log(`ready name=${options.name} uio=${served.uioPath} disk=${served.disk ?? ''}`);
