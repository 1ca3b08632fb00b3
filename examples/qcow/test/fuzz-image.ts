// SPDX-License-Identifier: Apache-2.0
/**
 * The fuzzer: images that QEMU made, with one to five places changed to what hurts, opened, read, written, checked
 * and repaired. Whatever they hold, the outcome is an error of this package that names the structure, or
 * success; never another exception, endless work, memory out of proportion, or a touch of another file.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { type DataIn, type DataOut, type MaybePromise, TcmuError } from 'tcmu';
import { SenseError } from 'tcmu/scsi';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import { checkImage, type HostFile, MemoryFile, QcowStore } from '../src/index.js';
import { KiB, MiB, qemuImg, qemuIo } from './util.js';

/** Changes of 8 bytes at most, so that a failing case can be told in one line. */
export interface Mutation {
  readonly at: number;
  readonly bytes: Uint8Array;
}

export interface Case {
  readonly seed: string;
  readonly mutations: readonly Mutation[];
  /** The file is cut to, or grown to, this length. */
  readonly length?: number;
}

export type Random = () => number;

/** Images small enough to be copied thousands of times, which between them have every structure. */
export function makeSeeds(dir: string): Map<string, Uint8Array> {
  const seeds = new Map<string, Uint8Array>();
  const make = (
    name: string,
    options: string,
    commands: string[],
    after?: (path: string) => void,
  ) => {
    const path = join(dir, `${name}.qcow2`);
    qemuImg('create', '-q', '-f', 'qcow2', '-o', options, path, '1M');
    qemuIo(path, commands, '-f', 'qcow2');
    after?.(path);
    seeds.set(name, readFileSync(path));
  };
  const some = ['write -q -P 1 0 20k', 'write -q -P 2 300k 9k', 'write -q -z 64k 8k'];
  make('plain', 'cluster_size=4k', some);
  make('version 2', 'cluster_size=1k,compat=0.10', some);
  make('subclusters', 'cluster_size=16k,extended_l2=on', some);
  make('narrow refcounts', 'cluster_size=512,refcount_bits=1', some);
  make('wide refcounts', 'cluster_size=4k,refcount_bits=64,lazy_refcounts=on', some);
  for (const type of ['zlib', 'zstd']) {
    const compressed = ['write -q -c -P 5 0 4k', 'write -q -c -P 6 4k 4k', ...some.slice(1)];
    make(`compressed ${type}`, `cluster_size=4k,compression_type=${type}`, compressed);
  }
  make('snapshots', 'cluster_size=4k', some, (path) => {
    qemuImg('snapshot', '-c', 'first', path);
    qemuIo(path, ['write -q -P 9 0 8k'], '-f', 'qcow2');
    qemuImg('snapshot', '-c', 'second', path);
  });
  make('bitmaps', 'cluster_size=4k', some, (path) => {
    qemuImg('bitmap', '--add', '-g', '4k', path, 'b0');
    qemuImg('bitmap', '--add', '--disable', path, 'b1');
    qemuIo(path, ['write -q -P 9 0 8k'], '-f', 'qcow2');
  });
  return seeds;
}

const pick = <T>(list: readonly T[], random: Random): T =>
  list[Math.floor(random() * list.length)] as T;

/** Where structures lie: tables, their entries, extensions, header fields; of a whole image. */
function places(image: Uint8Array): number[] {
  const view = new DataView(image.buffer, image.byteOffset, image.byteLength);
  const cluster = 1 << view.getUint32(20);
  const offset = (at: number): number => {
    const value = at + 8 <= image.length ? Number(view.getBigUint64(at) & 0x00fffffffffffe00n) : 0;
    return value + cluster <= image.length ? value : 0;
  };
  const header = Array.from({ length: 40 }, (_, i) => i * 4);
  const [l1, refcounts, snapshots] = [offset(40), offset(48), offset(64)];
  const row = (start: number, count: number, step: number) =>
    start === 0 ? [] : Array.from({ length: count }, (_, i) => start + i * step);
  const l2 = row(l1, 4, 8).map(offset).filter(Boolean);
  return [
    ...header,
    ...header,
    ...row(l1, 4, 8),
    ...l2.flatMap((table) => row(table, 24, 8)),
    ...row(refcounts, 4, 8),
    ...row(offset(refcounts), 8, 8),
    ...row(snapshots, 24, 4),
    // Extensions, and whatever follows them in the first cluster.
    ...row(view.getUint32(4) === 2 ? 72 : view.getUint32(100), 60, 4),
    // Bitmap directory and tables are among the last clusters.
    ...row(image.length - (image.length % cluster) - 4 * cluster, 16, cluster / 4),
  ].filter((at) => at >= 0 && at + 8 <= image.length);
}

/** A random case; the same one for the same generator. */
export function makeCase(seeds: ReadonlyMap<string, Uint8Array>, random: Random): Case {
  const seed = pick([...seeds.keys()], random);
  const image = seeds.get(seed) as Uint8Array;
  const cluster = 1 << new DataView(image.buffer, image.byteOffset).getUint32(20);
  const all = places(image);
  const clusters = Math.ceil(image.length / cluster);
  const values: (() => bigint)[] = [
    () => 0n,
    () => 0xffffffffffffffffn,
    () => 1n << BigInt(Math.floor(random() * 64)),
    () => BigInt(Math.floor(random() * 2 ** 32)),
    // A cluster of the image, mostly one that is something else already; with the flags of entries.
    () => BigInt(Math.floor(random() * clusters) * cluster),
    () => BigInt(Math.floor(random() * clusters) * cluster) | (1n << 63n),
    () => BigInt(Math.floor(random() * clusters) * cluster) | (1n << 62n),
    () => BigInt(Math.floor(random() * clusters) * cluster + 512) | 1n,
    () => BigInt(image.length + cluster - (image.length % cluster)) | (1n << 63n),
    () => (1n << 55n) | (1n << 63n),
    () => 0x7fffffffn << 32n,
  ];
  const mutations = Array.from({ length: 1 + Math.floor(random() * 5) }, (): Mutation => {
    const anywhere = random() < 0.2;
    const at = anywhere ? Math.floor(random() * (image.length - 8)) : pick(all, random);
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64BE(pick(values, random)());
    // A whole entry, a field of four bytes, or one byte.
    const width = pick([8, 8, 4, 1], random);
    return { at, bytes: bytes.subarray(8 - width) };
  });
  if (random() > 0.1) return { seed, mutations };
  return { seed, mutations, length: Math.floor(random() * image.length * 1.5) };
}

export function mutate(seeds: ReadonlyMap<string, Uint8Array>, { seed, mutations, length }: Case) {
  const image = Buffer.from(seeds.get(seed) as Uint8Array);
  for (const { at, bytes } of mutations) image.set(bytes, at);
  if (length === undefined) return image;
  const resized = Buffer.alloc(length);
  image.copy(resized);
  return resized;
}

export function describeCase({ seed, mutations, length }: Case): string {
  const changes = mutations.map(({ at, bytes }) => `${at}:=${Buffer.from(bytes).toString('hex')}`);
  return `${seed} ${changes.join(' ')}${length === undefined ? '' : ` length ${length}`}`;
}

/** More than any honest work on images of this size. */
const MOST_OPERATIONS = 60_000;
const MOST_BYTES = 256 * MiB;
const LARGEST_FILE = 64 * MiB;

/** A file in memory that fails the case when it is asked for too much. */
class BoundedFile implements HostFile {
  readonly path = 'image';
  readOnly = false;
  readonly #file: MemoryFile;
  #operations = 0;
  #bytes = 0;

  constructor(content: Uint8Array) {
    this.#file = new MemoryFile(content);
  }

  #count(end: number, length: number): void {
    this.#bytes += length;
    if (++this.#operations > MOST_OPERATIONS || this.#bytes > MOST_BYTES) {
      throw new Error(`endless: ${this.#operations} operations, ${this.#bytes} bytes`);
    }
    if (end > LARGEST_FILE) throw new Error(`the file was to grow to ${end} bytes`);
  }

  size(): number {
    return this.#file.size();
  }
  toBytes(): Uint8Array {
    return this.#file.toBytes();
  }
  read(target: Uint8Array, position: number): void {
    this.#count(0, target.length);
    this.#file.read(target, position);
  }
  write(source: Uint8Array, position: number): void {
    this.#count(position + source.length, source.length);
    this.#file.write(source, position);
  }
  readData(data: DataIn, position: number): void {
    this.#count(0, data.length);
    this.#file.readData(data, position);
  }
  writeData(data: DataOut, position: number): void {
    this.#count(position + data.length, data.length);
    this.#file.writeData(data, position);
  }
  writeZeroes(position: number, length: number): void {
    this.#count(position + length, length);
    this.#file.writeZeroes(position, length);
  }
  discard(position: number, length: number): void {
    this.#count(0, 0);
    this.#file.discard(position, length);
  }
  flush(): void {
    this.#count(0, 0);
  }
  truncate(length: number): void {
    this.#count(length, 0);
    this.#file.truncate(length);
  }
  nextData(position: number): MaybePromise<number | undefined> {
    this.#count(0, 0);
    return this.#file.nextData(position);
  }
  nextHole(): number {
    this.#count(0, 0);
    return this.#file.nextHole();
  }
  close(): void {}
}

const context = { signal: new AbortController().signal, fua: false, mayUnmap: true };

/** What the image may do: fail with an error of ours that says where. @throws whatever else happens */
async function attempt(run: () => MaybePromise<unknown>): Promise<boolean> {
  try {
    await run();
    return true;
  } catch (error) {
    const cause = SenseError.is(error) ? (error as Error).cause : error;
    if (!TcmuError.is(cause)) throw error;
    if (/_(FORMAT|CORRUPT)$/.test(cause.code)) {
      const { structure, message } = cause as TcmuError & { structure?: string };
      if (structure === undefined || !message.includes(structure)) {
        throw new Error(`an error that does not name the structure: ${message}`, { cause: error });
      }
    }
    return false;
  }
}

/** Runs one case. @throws Error when anything is as it must not be */
export async function runCase(image: Uint8Array): Promise<void> {
  let file = new BoundedFile(image);
  const openFile = async (path: string, { readOnly }: { readOnly: boolean }) => {
    file.readOnly = readOnly;
    if (path === 'image') return file;
    // Named by a mutated header: nothing is there.
    throw Object.assign(new Error(`ENOENT: ${path}`), { code: 'ENOENT' });
  };
  const options = { lock: false, openFile, l2CacheBytes: 64 * KiB, refcountCacheBytes: 64 * KiB };
  const withStore = async (
    readOnly: boolean,
    run: (store: QcowStore) => Promise<void>,
  ): Promise<void> => {
    await attempt(async () => {
      const store = await QcowStore.open('image', { ...options, readOnly });
      try {
        await run(store);
      } finally {
        await attempt(() => store.close());
      }
    });
  };
  const read = async (store: QcowStore): Promise<void> => {
    const ends = [0, 300 * KiB, Math.max(0, store.size - 64 * KiB)];
    for (const position of ends) {
      const length = Math.min(64 * KiB, store.size - position);
      if (length <= 0) continue;
      const data = new MemoryDataIn(new Uint8Array(length));
      await attempt(() => store.read(position - (position % 512), data, context));
      await attempt(() => store.blockStatus(position - (position % 512), length, context));
    }
  };
  await withStore(true, read);
  await attempt(() => checkImage('image', { lock: false, openFile }));
  const untouched = Buffer.compare(file.toBytes(), image) === 0;
  await withStore(false, async (store) => {
    const write = (position: number, length: number) =>
      attempt(() =>
        store.write(position, new MemoryDataOut(new Uint8Array(length).fill(7)), context),
      );
    await write(0, 512);
    if (store.size >= 512 * KiB) await write(256 * KiB, 32 * KiB);
    await attempt(() => store.flush(context));
    await attempt(() => store.snapshots.create('fuzz'));
    await attempt(() => store.unmap?.(0, 64 * KiB, context));
    await attempt(() => store.snapshots.revert('fuzz'));
    await attempt(() => store.snapshots.delete('fuzz'));
    await read(store);
  });
  file = new BoundedFile(image);
  const repaired = await attempt(() =>
    checkImage('image', { lock: false, openFile, repair: 'all' }),
  );
  if (repaired) {
    const after = await checkImage('image', { lock: false, openFile }).catch((cause: unknown) => {
      throw new Error('a repaired image can not be checked', { cause });
    });
    if (after.errors > 0) throw new Error(`after repair: ${after.messages.join('; ')}`);
  }
  if (!untouched) throw new Error('reading and checking changed the image');
}
