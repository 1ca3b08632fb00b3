// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import type { MaybePromise } from '../lib/device/data.js';
import { FileError } from '../lib/errors.js';
import {
  type BlockStore,
  delay,
  faults,
  MemoryDataIn,
  MemoryDataOut,
  MemoryStore,
  rateLimit,
  readOnly,
  StoreMiddleware,
  type StoreOperation,
  statistics,
} from '../lib/store/index.js';

/** A new signal each time it is asked for, as each command has its own. */
const context = {
  fua: false,
  mayUnmap: false,
  get signal() {
    return new AbortController().signal;
  },
};
const memory = () => new MemoryStore({ size: 1 << 20 });
const block = (value = 0) => new MemoryDataOut(new Uint8Array(512).fill(value));
const room = (length = 512) => new MemoryDataIn(new Uint8Array(length));
const OPTIONAL = [
  'flush',
  'unmap',
  'writeZeroes',
  'writeSame',
  'compareAndWrite',
  'blockStatus',
  'resize',
] as const;

/** Has every method, and notes what it is called with. */
function complete() {
  const log: unknown[][] = [];
  const note =
    (name: string, answer?: unknown) =>
    (...args: unknown[]) => {
      log.push([name, ...args]);
      return answer;
    };
  const store = {
    size: 1 << 20,
    blockSize: 1024,
    physicalBlockSize: 4096,
    readOnly: false,
    writeCache: true,
    supportsFua: true,
    optimalTransferLength: 65536,
    unmapGranularity: 2048,
    nonRotational: false,
    read: note('read'),
    write: note('write'),
    flush: note('flush'),
    unmap: note('unmap'),
    writeZeroes: note('writeZeroes'),
    writeSame: note('writeSame'),
    compareAndWrite: note('compareAndWrite', -1),
    blockStatus: note('blockStatus', [{ length: 1024, status: 'zero' }]),
    open: note('open'),
    close: note('close'),
    resize: note('resize'),
  } as unknown as Required<BlockStore>;
  return { store, log };
}

describe('StoreMiddleware', () => {
  test.each([
    ['itself', (store: BlockStore) => new StoreMiddleware(store)],
    ['delay', (store: BlockStore) => delay(store, 0)],
    ['faults', (store: BlockStore) => faults(store, [])],
    ['rateLimit', (store: BlockStore) => rateLimit(store, {})],
    ['statistics', statistics],
  ])('forwards everything, and nothing else (%s)', (_, wrap) => {
    const { store, log } = complete();
    const outer = wrap(store) as Required<BlockStore>;
    for (const name of [
      ...([
        'size',
        'blockSize',
        'physicalBlockSize',
        'readOnly',
        'writeCache',
        'supportsFua',
      ] as const),
      ...(['optimalTransferLength', 'unmapGranularity', 'nonRotational'] as const),
    ]) {
      expect(outer[name], name).toBe(store[name]);
    }
    const data = room();
    const out = block();
    const bytes = new Uint8Array(1024);
    outer.open();
    outer.read(1, data, context);
    outer.write(2, out, context);
    outer.flush(context);
    outer.unmap(3, 4, context);
    outer.writeZeroes(5, 6, context);
    outer.writeSame(7, 8, bytes, context);
    expect(outer.compareAndWrite(9, bytes, bytes, context)).toBe(-1);
    expect(outer.blockStatus(10, 11, context)).toEqual([{ length: 1024, status: 'zero' }]);
    outer.resize(12);
    outer.close();
    expect(log).toEqual([
      ['open'],
      ['read', 1, data, context],
      ['write', 2, out, context],
      ['flush', context],
      ['unmap', 3, 4, context],
      ['writeZeroes', 5, 6, context],
      ['writeSame', 7, 8, bytes, context],
      ['compareAndWrite', 9, bytes, bytes, context],
      ['blockStatus', 10, 11, context],
      ['resize', 12],
      ['close'],
    ]);
  });

  test('has exactly the optional methods of the inner store, layer upon layer', () => {
    for (const missing of OPTIONAL) {
      const { store } = complete();
      const outer = statistics(delay({ ...store, [missing]: undefined }, 0));
      const present = OPTIONAL.filter((name) => (outer as BlockStore)[name] !== undefined);
      expect(present).toEqual(OPTIONAL.filter((name) => name !== missing));
    }
  });

  test('the defaults of a store that says little are those of the interface', () => {
    const outer = new StoreMiddleware({ size: 512, read() {}, write() {} });
    expect(outer).toMatchObject({
      blockSize: 512,
      physicalBlockSize: 512,
      readOnly: false,
      writeCache: false,
      supportsFua: false,
      unmapGranularity: 512,
      nonRotational: true,
    });
    const cached = new StoreMiddleware({ size: 512, read() {}, write() {}, flush() {} });
    expect(cached.writeCache).toBe(true);
    expect(outer.open()).toBeUndefined();
    expect(outer.close()).toBeUndefined();
  });

  test('an overridden method is there only if the inner store has it', () => {
    class Flushing extends StoreMiddleware {
      override flush(): MaybePromise<unknown> {
        return 'mine';
      }
    }
    expect(new Flushing(complete().store).flush()).toBe('mine');
    expect(new Flushing(memory()).flush).toBeUndefined();
  });

  test('intercept sees position, length and context of every operation', () => {
    const seen: StoreOperation[] = [];
    class Watching extends StoreMiddleware {
      protected override intercept<T>(
        operation: StoreOperation,
        run: () => MaybePromise<T>,
      ): MaybePromise<T> {
        seen.push(operation);
        return run();
      }
    }
    const store = new Watching(complete().store);
    store.read(1024, room(2048), context);
    store.compareAndWrite(0, new Uint8Array(1024), new Uint8Array(1024), context);
    store.flush(context);
    expect(seen).toEqual([
      { name: 'read', position: 1024, length: 2048, context },
      { name: 'compareAndWrite', position: 0, length: 1024, context },
      { name: 'flush', position: 0, length: 0, context },
    ]);
  });
});

describe('readOnly', () => {
  test('reads, and has no way to change anything', () => {
    const { store, log } = complete();
    const outer = readOnly(store);
    expect(outer.readOnly).toBe(true);
    expect(outer.writeCache).toBe(false);
    expect(OPTIONAL.filter((name) => outer[name] !== undefined)).toEqual(['blockStatus']);
    outer.read(0, room(), context);
    expect(() => outer.write(0, block(), context)).toThrow(FileError);
    expect(() => outer.write(0, block(), context)).toThrow(
      expect.objectContaining({ errno: 'EROFS' }),
    );
    expect(log.map(([name]) => name)).toEqual(['read']);
  });
});

describe('delay', () => {
  test('waits before the operation', async () => {
    const store = memory();
    const start = performance.now();
    const pending = delay(store, 30).write(0, block(1), context);
    expect(store.allocated).toBe(0);
    await pending;
    // A timer may end a millisecond or two early.
    expect(performance.now() - start).toBeGreaterThanOrEqual(25);
    expect(store.allocated).toBeGreaterThan(0);
  });

  test('by operation, or by a function', () => {
    const byName = delay(memory(), { write: 50 });
    expect(byName.read(0, room(), context)).toBeUndefined();
    const byFunction = delay(memory(), ({ position }) => (position === 0 ? 0 : 50));
    expect(byFunction.read(0, room(), context)).toBeUndefined();
    expect(byName.write(0, block(), context)).toBeInstanceOf(Promise);
    expect(byFunction.read(512, room(), context)).toBeInstanceOf(Promise);
  });

  test('an abort ends the wait, and the operation is not carried out', async () => {
    const store = memory();
    const controller = new AbortController();
    const pending = delay(store, 60_000).write(0, block(1), {
      signal: controller.signal,
      fua: false,
    });
    controller.abort();
    await expect(pending).rejects.toThrow(expect.objectContaining({ name: 'AbortError' }));
    expect(store.allocated).toBe(0);
  });
});

describe('faults', () => {
  const fails = (run: () => unknown) => {
    try {
      run();
      return false;
    } catch {
      return true;
    }
  };

  test('by operation, range, skip and times', () => {
    const store = faults(memory(), {
      operations: ['write'],
      range: [1024, 2048],
      skip: 1,
      times: 2,
    });
    expect(fails(() => store.read(1024, room(), context))).toBe(false);
    expect(fails(() => store.write(512, block(), context))).toBe(false);
    expect(fails(() => store.write(2048, block(), context))).toBe(false);
    const outcomes = [0, 1, 2, 3].map(() => fails(() => store.write(1536, block(), context)));
    expect(outcomes).toEqual([false, true, true, false]);
  });

  test('the error names the operation and carries its errno', () => {
    const store = faults(memory(), { error: 'ENOSPC' });
    expect(() => store.write(512, block(), context)).toThrow(
      expect.objectContaining({
        errno: 'ENOSPC',
        operation: 'write',
        message: 'write of 512 bytes at 512: injected ENOSPC',
      }),
    );
    const own = new Error('mine');
    expect(() => faults(memory(), { error: () => own }).read(0, room(), context)).toThrow(own);
  });

  test('afterwards: the operation is carried out and fails all the same', () => {
    for (const afterwards of [false, true]) {
      const store = memory();
      const outer = faults(store, { operations: ['write'], afterwards });
      expect(fails(() => outer.write(0, block(1), context))).toBe(true);
      expect(store.allocated > 0).toBe(afterwards);
    }
  });

  test('the same seed fails the same operations, another seed others', () => {
    const run = (seed: number) => {
      const store = faults(memory(), { probability: 0.5 }, { seed });
      return Array.from({ length: 64 }, () => fails(() => store.read(0, room(), context)));
    };
    expect(run(1)).toEqual(run(1));
    expect(run(1)).not.toEqual(run(2));
    const share = run(3).filter(Boolean).length;
    expect(share).toBeGreaterThan(16);
    expect(share).toBeLessThan(48);
  });

  test('the first rule that strikes decides', () => {
    const store = faults(memory(), [
      { operations: ['write'], error: 'EIO', times: 1 },
      { error: 'ENOSPC' },
    ]);
    const errno = (run: () => unknown) => {
      try {
        run();
      } catch (error) {
        return (error as FileError).errno;
      }
    };
    expect(errno(() => store.write(0, block(), context))).toBe('EIO');
    expect(errno(() => store.write(0, block(), context))).toBe('ENOSPC');
  });
});

describe('rateLimit', () => {
  test('holds operations to the rate, after a burst', async () => {
    const store = rateLimit(memory(), { operationsPerSecond: 100, burst: 0.05 });
    const start = performance.now();
    await Promise.all(Array.from({ length: 15 }, () => store.read(0, room(), context)));
    expect(performance.now() - start).toBeGreaterThanOrEqual(90);
  });

  test('lets a burst through at once, and one more, since the first starts at its beginning', async () => {
    // An operation in a hundred seconds: a slow machine earns none meanwhile.
    const store = rateLimit(memory(), { operationsPerSecond: 0.01, burst: 500 });
    const controller = new AbortController();
    const answers = Array.from({ length: 15 }, () =>
      store.read(0, room(), { signal: controller.signal }),
    );
    controller.abort();
    const waited = answers.filter((answer) => answer instanceof Promise);
    expect(answers.length - waited.length).toBe(6);
    for (const { status } of await Promise.allSettled(waited)) expect(status).toBe('rejected');
  });

  test('counts bytes, and lets flushes pass', async () => {
    const store = rateLimit(Object.assign(memory(), { flush() {} }), {
      bytesPerSecond: 512 * 100,
      burst: 0,
    });
    const start = performance.now();
    for (let i = 0; i < 5; i++) await store.write(0, block(), context);
    expect(performance.now() - start).toBeGreaterThanOrEqual(40);
    expect(store.flush?.(context)).toBeUndefined();
  });

  test('an abort ends the wait; a rate of nothing is refused', async () => {
    const store = rateLimit(memory(), { operationsPerSecond: 0.001, burst: 0 });
    await store.read(0, room(), context);
    const signal = AbortSignal.abort();
    await expect(store.read(0, room(), { signal })).rejects.toThrow(
      expect.objectContaining({ name: 'AbortError' }),
    );
    expect(() => rateLimit(memory(), { bytesPerSecond: 0 })).toThrow(/no rate/);
  });
});

describe('statistics', () => {
  test('counts operations, bytes, errors, time and concurrency', async () => {
    const store = statistics(
      delay(faults(memory(), { operations: ['write'], skip: 1 }), { read: 20 }),
    );
    const reads = [store.read(0, room(1024), context), store.read(0, room(), context)];
    expect(store.statistics.read).toMatchObject({ operations: 0, inFlight: 2 });
    await Promise.all(reads);
    store.write(0, block(), context);
    expect(() => store.write(0, block(), context)).toThrow();
    expect(store.statistics.read).toMatchObject({
      operations: 2,
      bytes: 1536,
      errors: 0,
      inFlight: 0,
      maxInFlight: 2,
    });
    // A timer may end a millisecond or two early.
    expect(store.statistics.read.totalTime).toBeGreaterThanOrEqual(30);
    expect(store.statistics.read.maxTime).toBeGreaterThanOrEqual(15);
    expect(store.statistics.write).toMatchObject({ operations: 2, bytes: 1024, errors: 1 });
    store.reset();
    expect(store.statistics.read).toMatchObject({ operations: 0, bytes: 0, maxTime: 0 });
  });

  test('a rejection counts as an error and stays one', async () => {
    const store = statistics(delay(faults(memory(), {}), 1));
    await expect(store.read(0, room(), context)).rejects.toThrow(FileError);
    expect(store.statistics.read).toMatchObject({ operations: 1, errors: 1, inFlight: 0 });
  });
});
