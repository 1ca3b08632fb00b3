// SPDX-License-Identifier: Apache-2.0
/**
 * The express lane over an image: what an initiator sees, what QEMU finds, and what a kill leaves must be the same
 * with and without it, whatever is done to the image meanwhile.
 */
import {
  closeSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  writeSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import * as fc from 'fast-check';
import { type SimulatedDisk, simulate } from 'tcmu/sim';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import { afterEach, describe, expect, test } from 'vitest';
import { checkImage, createImage, QcowStore, type QcowStoreOptions } from '../src/index.js';
import { cases, dirtyParts, KiB, MiB, qemuImg, qemuIo, scratch } from './util.js';

const SECTOR = 512;
const dir = scratch(existsSync('/dev/shm') ? '/dev/shm' : undefined);
/** Not in memory, so that operations have to wait. */
const slowDir = scratch();
const context = { signal: new AbortController().signal, fua: false, mayUnmap: true };

/** A disk over an image in a folder of its own. */
class Side {
  readonly path: string;
  readonly #options: QcowStoreOptions;
  readonly #express: boolean;
  store!: QcowStore;
  disk!: SimulatedDisk;
  /** Of disks before this one. */
  #carried = 0;

  constructor(path: string, options: QcowStoreOptions, express: boolean) {
    this.path = path;
    this.#options = options;
    this.#express = express;
  }

  async open(): Promise<this> {
    this.store = await QcowStore.open(this.path, {
      allowShrink: true,
      ...this.#options,
    });
    this.disk = await simulate(this.store, { express: this.#express });
    return this;
  }

  async close(): Promise<void> {
    this.#carried = this.carried;
    await this.disk.close();
  }

  get carried(): number {
    return this.#carried + this.disk.device.stats().express;
  }

  async contents(): Promise<Buffer> {
    const data = new MemoryDataIn(new Uint8Array(this.store.size));
    await this.store.read(0, data);
    return Buffer.from(data.bytes);
  }

  /** What the disk would show had this process been killed now. */
  async afterKill(): Promise<Buffer> {
    const copy = mkdtempSync(join(dir, 'killed-'));
    cpSync(dirname(this.path), copy, { recursive: true });
    const store = await QcowStore.open(join(copy, 'disk.qcow2'));
    const data = new MemoryDataIn(new Uint8Array(store.size));
    await store.read(0, data);
    await store.close();
    return Buffer.from(data.bytes);
  }
}

let folders = 0;
const open: Side[] = [];

afterEach(async () => {
  for (const side of open.splice(0)) await side.disk.close();
});

async function start(
  make: (path: string) => unknown,
  options: QcowStoreOptions = {},
  express = true,
): Promise<Side> {
  const folder = join(options.io === undefined ? dir : slowDir, `disk-${++folders}`);
  mkdirSync(folder);
  const path = join(folder, 'disk.qcow2');
  await make(path);
  const side = await new Side(path, options, express).open();
  open.push(side);
  return side;
}

function filled(length: number, value: number): Uint8Array {
  return new Uint8Array(length).fill(value);
}

/** The lane is open, and knows where a sector lies. */
async function known(side: Side, sector: number): Promise<void> {
  await side.disk.read(sector, 1);
  await side.disk.read(sector, 1);
}

/** Holds calls of a method back, but for the first `through`, until the result is called. */
function heldBack<T extends object, K extends keyof T>(on: T, method: K, through = 0): () => void {
  const before = (on[method] as (...args: unknown[]) => unknown).bind(on);
  let release = () => {};
  const gate = new Promise<void>((resolve) => {
    release = resolve;
  });
  let calls = 0;
  Object.defineProperty(on, method, {
    configurable: true,
    value: (...args: unknown[]) =>
      calls++ < through ? before(...args) : gate.then(() => before(...args)),
  });
  return () => {
    delete on[method];
    release();
  };
}

const turn = () => new Promise((resolve) => setTimeout(resolve, 20));

describe('on the lane', () => {
  test('what has a place is read and written without the store', async () => {
    const side = await start((path) => createImage(path, { size: MiB }));
    await side.disk.write(0, filled(128 * KiB, 1));
    await side.disk.write(0, filled(SECTOR, 2));
    await side.disk.read(0, 256);
    for (const method of ['read', 'write'] as const) {
      side.store[method] = () => {
        throw new Error('asked');
      };
    }
    const before = side.carried;
    await side.disk.write(1, filled(100 * KiB, 3));
    const read = await side.disk.read(0, 256);
    expect(side.carried - before).toBe(2);
    expect([read[0], read[SECTOR], read[100 * KiB], read[101 * KiB]]).toEqual([2, 3, 3, 1]);
  });

  test('a chain is read from all of its files', async () => {
    const side = await start((path) => {
      const at = (name: string) => join(dirname(path), name);
      qemuImg('create', '-qf', 'raw', at('base.raw'), '96K');
      qemuIo(at('base.raw'), ['write -P 1 0 96k'], '-f', 'raw');
      const chain = ['-qf', 'qcow2', '-o', 'cluster_size=32k'];
      qemuImg('create', ...chain, '-F', 'raw', '-b', 'base.raw', at('middle.qcow2'), '1M');
      qemuIo(at('middle.qcow2'), ['write -P 2 32k 32k']);
      qemuImg('create', ...chain, '-F', 'qcow2', '-b', 'middle.qcow2', path, '1M');
      qemuIo(path, ['write -P 3 64k 32k']);
    });
    const whole = await side.disk.read(0, 192);
    const before = side.carried;
    const again = await side.disk.read(0, 192);
    expect(side.carried - before).toBe(1);
    expect(Buffer.compare(again, whole)).toBe(0);
    expect([0, 32, 64].map((at) => again[at * KiB])).toEqual([1, 2, 3]);
    // A first write takes the place below back.
    await side.disk.write(0, filled(SECTOR, 4));
    const mixed = await side.disk.read(0, 2);
    expect([mixed[0], mixed[SECTOR]]).toEqual([4, 1]);
    expect(readFileSync(join(dirname(side.path), 'base.raw')).every((byte) => byte === 1)).toBe(
      true,
    );
  });

  test('behind the end of a layer there are zeros, whatever its last cluster holds', async () => {
    const side = await start(async (path) => {
      const base = join(dirname(path), 'base.qcow2');
      await createImage(base, { size: 64 * KiB });
      qemuIo(base, ['write -P 7 0 64k']);
      const end = Buffer.alloc(8);
      end.writeBigUInt64BE(BigInt(33 * SECTOR));
      const fd = openSync(base, 'r+');
      writeSync(fd, end, 0, 8, 24);
      closeSync(fd);
      qemuImg('create', '-qf', 'qcow2', '-F', 'qcow2', '-b', 'base.qcow2', path, '64k');
    });
    for (let i = 0; i < 3; i++) {
      const read = await side.disk.read(0, 128);
      expect([read[33 * SECTOR - 1], read[33 * SECTOR]]).toEqual([7, 0]);
    }
  });

  test('what a resize adds', async () => {
    const side = await start((path) => createImage(path, { size: 64 * KiB }));
    await side.disk.resize(MiB);
    await side.disk.testUnitReady().catch(() => {});
    await side.disk.write(1024, filled(64 * KiB, 1));
    await known(side, 1024);
    const before = side.carried;
    await side.disk.write(1024, filled(SECTOR, 2));
    expect(side.carried - before).toBe(1);
  });

  test('no writes to an image that is open for reading', async () => {
    const side = await start((path) => createImage(path, { size: MiB }), { readOnly: true });
    expect(side.store.fileMap).toMatchObject({ readable: MiB, writable: 0 });
  });

  test('nothing of an encrypted layer below', async () => {
    const passphrase = 'of no consequence';
    const side = await start(
      async (path) => {
        const base = join(dirname(path), 'base.qcow2');
        await createImage(base, { size: MiB, encryption: { passphrase, iterationTime: 1 } });
        const store = await QcowStore.open(base, { passphrase });
        await store.write(0, new MemoryDataOut(filled(64 * KiB, 5)));
        await store.close();
        qemuImg('create', '-uqf', 'qcow2', '-F', 'qcow2', '-b', 'base.qcow2', path, '1M');
      },
      { passphrase },
    );
    for (let i = 0; i < 3; i++) expect((await side.disk.read(0, 1))[0]).toBe(5);
    expect(side.carried).toBe(0);
  });

  test('nothing of an encrypted image', async () => {
    const passphrase = 'of no consequence';
    const side = await start(
      (path) => createImage(path, { size: MiB, encryption: { passphrase, iterationTime: 1 } }),
      { passphrase },
    );
    await side.disk.write(0, filled(64 * KiB, 1));
    await known(side, 0);
    expect(side.carried).toBe(0);
  });
});

describe('what ends or delays it', () => {
  test('a write waits for the entry it needs to be found again', async () => {
    const side = await start((path) => createImage(path, { size: MiB }), { l2CacheBytes: MiB });
    await side.disk.write(1024, filled(SECTOR, 9));
    await known(side, 1024);
    const release = heldBack(side.store.image.file, 'write');
    const first = side.disk.write(0, filled(SECTOR, 1));
    // The mapping comes to have it, the file does not.
    while ((await side.disk.read(0, 1))[0] !== 1) await turn();
    let acknowledged = false;
    const second = side.disk.write(1, filled(SECTOR, 2)).then(() => {
      acknowledged = true;
    });
    await turn();
    expect(acknowledged).toBe(false);
    release();
    await Promise.all([first, second]);
    expect((await side.afterKill())[SECTOR]).toBe(2);
  });

  test('nor does it pass by an entry that is not being written yet', async () => {
    const side = await start((path) => createImage(path, { size: MiB, clusterSize: 512 }));
    await side.disk.write(1024, filled(SECTOR, 9));
    await known(side, 1024);
    // Of two L2 tables: the second one's data has to wait.
    const release = heldBack(side.store.image.data.file, 'writeData', 1);
    const first = side.disk.write(63, filled(2 * SECTOR, 1));
    while ((await side.disk.read(63, 1))[0] !== 1) await turn();
    const second = side.disk.write(63, filled(SECTOR, 2));
    const acknowledged = await Promise.race([second.then(() => true), turn()]);
    if (acknowledged) expect((await side.afterKill())[63 * SECTOR]).toBe(2);
    release();
    await Promise.all([first, second]);
    expect((await side.afterKill())[63 * SECTOR]).toBe(2);
  });

  test('what a snapshot shares is read there, and written elsewhere', async () => {
    const side = await start((path) => createImage(path, { size: MiB }));
    await side.disk.write(0, filled(64 * KiB, 1));
    await side.store.snapshots.create('one');
    await known(side, 0);
    const before = side.carried;
    await side.disk.read(0, 1);
    expect(side.carried - before).toBe(1);
    await side.disk.write(0, filled(SECTOR, 2));
    await side.store.snapshots.revert('one');
    expect((await side.disk.read(0, 1))[0]).toBe(1);
  });

  test('an operation on the whole image holds reads and writes up', async () => {
    const side = await start((path) => createImage(path, { size: MiB }));
    await side.disk.write(0, filled(64 * KiB, 1));
    await known(side, 0);
    const release = heldBack(side.store.image.file, 'flush');
    const before = side.carried;
    const snapshot = side.store.snapshots.create('one');
    const settled: string[] = [];
    const commands = [
      side.disk.write(0, filled(SECTOR, 2)).then(() => settled.push('write')),
      side.disk.read(1, 1).then(() => settled.push('read')),
    ];
    await turn();
    expect([settled, side.carried - before]).toEqual([[], 0]);
    release();
    await Promise.all([snapshot, ...commands]);
    await side.store.snapshots.revert('one');
    expect((await side.disk.read(0, 1))[0]).toBe(1);
  });

  test('after a failed flush nothing is written any more', async () => {
    const side = await start((path) => createImage(path, { size: MiB }));
    await side.disk.write(0, filled(64 * KiB, 1));
    await known(side, 0);
    Object.defineProperty(side.store.image.file, 'flush', {
      value: () => {
        throw new Error('the device is gone');
      },
    });
    await expect(side.disk.flush()).rejects.toThrow();
    await expect(side.disk.write(0, filled(SECTOR, 2))).rejects.toThrow();
    await known(side, 0);
    await expect(side.disk.write(0, filled(SECTOR, 2))).rejects.toThrow();
    expect((await side.disk.read(0, 1))[0]).toBe(1);
    // As if the flush, too, had been asked for by somebody else than the initiator.
    open.pop();
    await side.disk.close().catch(() => {});
  });

  test('a flush that fails beside the device ends writing at once', async () => {
    const side = await start((path) => createImage(path, { size: MiB }));
    await side.disk.write(0, filled(64 * KiB, 1));
    await known(side, 0);
    Object.defineProperty(side.store.image.file, 'flush', {
      value: () => Promise.reject(new Error('the device is gone')),
    });
    await expect(Promise.resolve(side.store.flush())).rejects.toThrow();
    await expect(side.disk.write(0, filled(SECTOR, 2))).rejects.toThrow();
    open.pop();
    await side.disk.close().catch(() => {});
  });

  test('bitmaps see every write', async () => {
    const side = await start(async (path) => {
      await createImage(path, { size: MiB });
      qemuImg('bitmap', '--add', '-g', '64K', path, 'b0');
    });
    await side.disk.write(0, filled(64 * KiB, 1));
    await side.close();
    qemuImg('bitmap', '--clear', side.path, 'b0');
    await side.open();
    await known(side, 0);
    await side.disk.write(0, filled(SECTOR, 2));
    open.pop();
    await side.close();
    expect(dirtyParts(side.path, 'b0')).toEqual([[0, 64 * KiB]]);
  });

  test('metadata that comes to lie where a damaged image has data is not written over', async () => {
    const side = await start(async (path) => {
      await createImage(path, { size: MiB, clusterSize: 512 });
      qemuIo(path, ['write -P 1 0 512']);
      const [{ offset }] = JSON.parse(qemuImg('map', '--output=json', path)) as [
        { offset: number },
      ];
      // The one refcount block's entry for the data's cluster, of 16 bits: nobody counts it.
      const bytes = readFileSync(path);
      const table = Number(bytes.readBigUInt64BE(48));
      const block = Number(bytes.readBigUInt64BE(table));
      const fd = openSync(path, 'r+');
      writeSync(fd, new Uint8Array(2), 0, 2, block + 2 * (offset / 512));
      closeSync(fd);
    });
    await known(side, 0);
    await side.disk.write(0, filled(SECTOR, 1));
    const before = side.carried;
    await side.disk.write(0, filled(SECTOR, 1));
    expect(side.carried - before).toBe(1);
    const { metadata } = side.store.image.refcounts;
    const [{ offset }] = JSON.parse(qemuImg('map', '-U', '--output=json', side.path)) as [
      { offset: number },
    ];
    // Until the allocator gives that cluster to a table.
    for (let sector = 64; !metadata.has(offset / 512); sector += 64) {
      await side.disk.write(sector, filled(SECTOR, 2));
    }
    await known(side, 0);
    await expect(side.disk.write(0, filled(SECTOR, 3))).rejects.toThrow();
    open.pop();
    await side.disk.close().catch(() => {});
  });

  test('a closed image is not touched', async () => {
    const side = await start((path) => createImage(path, { size: MiB }));
    await side.disk.write(0, filled(64 * KiB, 1));
    await known(side, 0);
    await side.store.close();
    await expect(side.disk.read(0, 1)).rejects.toThrow();
  });
});

// --- the same image twice, with and without the lane ---

interface Subject {
  readonly name: string;
  /** Sectors of the disk at first. */
  readonly sectors: number;
  readonly clusterSize: number;
  readonly make: (path: string) => unknown;
  readonly options?: QcowStoreOptions;
  readonly snapshots?: boolean;
  readonly resize?: boolean;
  /** The image names no file by a path that a copy would share. */
  readonly copies?: boolean;
}

function subject(
  name: string,
  clusterSize: number,
  clusters: number,
  more: Partial<Subject> & { create?: Partial<Parameters<typeof createImage>[1]> } = {},
): Subject {
  const size = clusters * clusterSize;
  const { create, ...rest } = more;
  return {
    name,
    clusterSize,
    sectors: size / SECTOR,
    make: (path) => createImage(path, { size, clusterSize, ...create }),
    snapshots: true,
    resize: true,
    copies: true,
    ...rest,
  };
}

/** As `make`, made once and copied. */
function copied(name: string, make: (path: string) => void): (path: string) => void {
  return (path) => {
    const template = join(dir, name);
    if (!existsSync(template)) {
      mkdirSync(template);
      make(join(template, 'disk.qcow2'));
    }
    cpSync(template, dirname(path), { recursive: true });
  };
}

/** A raw file, two images over it, each with some clusters, zeros and compressed data of its own. */
function chain(path: string, clusterSize: number, size: number): void {
  const at = (name: string) => join(dirname(path), name);
  const short = Math.floor((size * 0.6) / SECTOR) * SECTOR;
  qemuImg('create', '-qf', 'raw', at('base.raw'), String(short));
  qemuIo(at('base.raw'), [`write -P 1 0 ${short}`], '-f', 'raw');
  const over = (backing: string, format: string, cluster: number, file: string) =>
    qemuImg(
      ...['create', '-qf', 'qcow2', '-o', `cluster_size=${cluster}`, '-F', format, '-b', backing],
      ...[at(file), String(size)],
    );
  over('base.raw', 'raw', clusterSize / 2, 'lower.qcow2');
  qemuIo(at('lower.qcow2'), [
    `write -P 2 ${clusterSize} ${2 * clusterSize}`,
    `write -c -P 3 ${4 * clusterSize} ${clusterSize / 2}`,
    `write -z ${6 * clusterSize} ${clusterSize}`,
  ]);
  over('lower.qcow2', 'qcow2', clusterSize * 2, 'upper.qcow2');
  qemuIo(at('upper.qcow2'), [`write -P 4 ${8 * clusterSize} ${2 * clusterSize}`]);
  over('upper.qcow2', 'qcow2', clusterSize, 'disk.qcow2');
}

const subjects: readonly Subject[] = [
  subject('clusters of 4 KiB', 4 * KiB, 24),
  subject('tables that do not fit the cache', 512, 300, { options: { l2CacheBytes: 2 * KiB } }),
  subject('version 2', 4 * KiB, 24, { create: { version: 2 } }),
  subject('subclusters', 16 * KiB, 8, { create: { extendedL2: true } }),
  subject('acknowledged in memory', 4 * KiB, 24, { options: { acknowledge: 'memory' } }),
  subject('through the thread pool where it has to wait', 4 * KiB, 24, { options: { io: 'auto' } }),
  subject('compressed', 4 * KiB, 24, { options: { compress: true } }),
  subject('durable writes', 4 * KiB, 24, { options: { writeCache: false } }),
  ...[false, true].map((dataFileRaw) =>
    subject(dataFileRaw ? 'a raw data file' : 'a data file', 4 * KiB, 24, {
      make: (path) =>
        createImage(path, {
          size: 96 * KiB,
          clusterSize: 4 * KiB,
          dataFile: `${path}.data`,
          dataFileRaw,
        }),
      snapshots: false,
      copies: false,
    }),
  ),
  subject('a chain', 4 * KiB, 24, {
    make: copied('chain', (path) => chain(path, 4 * KiB, 24 * 4 * KiB)),
  }),
];

interface Part {
  readonly write: boolean;
  readonly start: number;
  readonly count: number;
  readonly value: number;
}

type Step =
  | { readonly type: 'batch'; readonly parts: readonly Part[] }
  | {
      readonly type: 'unmap' | 'zero' | 'store write' | 'keep zeros';
      readonly at: number;
      readonly count: number;
    }
  | { readonly type: 'snapshot' | 'revert' | 'delete'; readonly name: string }
  | { readonly type: 'resize'; readonly sectors: number }
  | { readonly type: 'flush' | 'reopen' | 'kill' };

function stepsOf({
  sectors,
  clusterSize,
  snapshots,
  resize,
  copies,
}: Subject): fc.Arbitrary<Step[]> {
  const perCluster = clusterSize / SECTOR;
  const at = fc.nat(sectors - 1);
  const part = fc.record({
    write: fc.boolean(),
    start: at,
    count: fc.oneof(fc.integer({ min: 1, max: 8 }), fc.integer({ min: 1, max: 2 * perCluster })),
    value: fc.integer({ min: 1, max: 255 }),
  });
  const batch = fc.array(part, { minLength: 1, maxLength: 6 }).map((parts): Step => {
    // At once, so none may overlap a write.
    const taken: Part[] = [];
    for (const one of parts) {
      const apart = (other: Part) =>
        other.start + other.count <= one.start || one.start + one.count <= other.start;
      if (taken.every(apart)) taken.push(one);
    }
    return { type: 'batch', parts: taken };
  });
  const kinds: fc.WeightedArbitrary<Step>[] = [
    { weight: 40, arbitrary: batch },
    {
      weight: 4,
      arbitrary: fc.record({
        type: fc.constantFrom('unmap', 'zero', 'store write', 'keep zeros'),
        at,
        count: fc.integer({ min: 1, max: 3 * perCluster }),
      }),
    },
    {
      weight: 2,
      arbitrary: fc.record({
        type: fc.constantFrom('flush', 'reopen', ...(copies ? (['kill'] as const) : [])),
      }),
    },
  ];
  if (snapshots) {
    kinds.push({
      weight: 6,
      arbitrary: fc.record({
        type: fc.constantFrom('snapshot', 'snapshot', 'revert', 'revert', 'delete'),
        name: fc.constantFrom('one', 'two'),
      }),
    });
  }
  if (resize) {
    const sizes = fc.integer({ min: Math.ceil(sectors / 2), max: 2 * sectors });
    kinds.push({
      weight: 1,
      arbitrary: sizes.map((n): Step => ({ type: 'resize', sectors: n })),
    });
  }
  return fc.array(fc.oneof(...kinds), { minLength: 20, maxLength: 100 });
}

/** Everything an observer hears of a step. */
async function perform(side: Side, step: Step): Promise<unknown> {
  const { disk, store } = side;
  const total = store.size / SECTOR;
  const refused = (error: unknown) => (error as Error).message.replace(side.path, 'PATH');
  switch (step.type) {
    case 'batch':
      return Promise.all(
        step.parts.map(async ({ write, start, count, value }) => {
          const cdb = new Uint8Array(10);
          cdb[0] = write ? 0x2a : 0x28;
          new DataView(cdb.buffer).setUint32(2, start);
          new DataView(cdb.buffer).setUint16(7, count);
          const length = count * SECTOR;
          const data = write ? { dataOut: filled(length, value) } : { dataInLength: length };
          return disk.submit({ cdb, ...data });
        }),
      );
    case 'unmap':
      return disk.unmap({ lba: step.at, blocks: step.count }).catch(refused);
    case 'zero':
      return disk.writeSame(step.at, step.count, filled(SECTOR, 0)).catch(refused);
    case 'store write':
    case 'keep zeros': {
      if (step.at + step.count > total) return;
      const [position, length] = [step.at * SECTOR, step.count * SECTOR];
      if (step.type === 'store write') {
        return void (await store.write(position, new MemoryDataOut(filled(length, 0x77))));
      }
      return void (await store.writeZeroes(position, length, { ...context, mayUnmap: false }));
    }
    case 'snapshot':
      return store.snapshots.create(step.name).catch(refused);
    case 'delete':
      return store.snapshots.delete(step.name).catch(refused);
    case 'revert': {
      const before = store.size;
      const answer = await store.snapshots.revert(step.name).catch(refused);
      if (store.size !== before) await disk.resize(store.size);
      return answer;
    }
    case 'resize':
      return disk.resize(step.sectors * SECTOR).catch(refused);
    case 'flush':
      return disk.submit({ cdb: [0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0] });
    case 'reopen':
      await side.close();
      await side.open();
      return;
    case 'kill':
      return;
  }
}

describe('with and without the lane', () => {
  let carried = 0;

  test.each(subjects)('$name', async (one) => {
    let last: string[] = [];
    const durable = one.options?.acknowledge !== 'memory';
    await fc.assert(
      fc.asyncProperty(stepsOf(one), async (steps) => {
        const fast = await start(one.make, one.options);
        const slow = await start(one.make, one.options, false);
        const most = Math.floor(one.sectors * 0.8);
        for (const { disk } of [fast, slow]) await disk.write(0, filled(most * SECTOR, 0xaa));
        for (const step of steps) {
          const answers = await perform(fast, step);
          const expected = await perform(slow, step);
          // Vitest's own comparison takes long for a disk.
          if (!isDeepStrictEqual(answers, expected)) expect(answers).toEqual(expected);
          if (step.type === 'kill' && durable) {
            expect((await fast.afterKill()).equals(await slow.contents())).toBe(true);
          }
        }
        expect((await fast.contents()).equals(await slow.contents())).toBe(true);
        for (const side of open.splice(0)) await side.close();
        carried += fast.carried;
        last = [fast.path, slow.path];
        expect(slow.carried).toBe(0);
        expect(await checkImage(fast.path)).toMatchObject({ errors: 0, leaks: 0 });
      }),
      cases(8),
    );
    for (const path of last) qemuImg('check', path);
    qemuImg('compare', ...last);
  });

  // The comparison means something only if the lane was used.
  test('… which was used', () => {
    expect(carried).toBeGreaterThan(500);
  });
});
