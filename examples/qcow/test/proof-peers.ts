// SPDX-License-Identifier: Apache-2.0
/** The two sides of the proof: the same operations on an image by QEMU's programs and by our store. */
import { execFileSync } from 'node:child_process';
import { join } from 'node:path';
import * as fc from 'fast-check';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import { checkImage, createImage, QcowStore } from '../src/index.js';
import { type Combination, createOptions, PASSPHRASE, qemuOptions } from './proof-combinations.js';
import { MiB, qemuImg, qemuIo } from './util.js';

export const SECTOR = 512;

export type Operation =
  | {
      readonly type: 'write';
      readonly start: number;
      readonly count: number;
      readonly fill: number;
    }
  | {
      readonly type: 'compress';
      readonly cluster: number;
      readonly fill: number;
      /** QEMU does not compress what would overwrite a cluster with a place. */
      readonly placed?: boolean;
    }
  | {
      readonly type: 'zero';
      readonly start: number;
      readonly count: number;
      readonly mayUnmap: boolean;
    }
  | { readonly type: 'unmap'; readonly cluster: number; readonly count: number }
  | { readonly type: 'flush' | 'reopen' }
  | { readonly type: 'snapshot' | 'revert' | 'delete'; readonly name: string }
  | { readonly type: 'resize'; readonly sectors: number };

const context = { signal: new AbortController().signal, fua: false, mayUnmap: false };

export interface Shape {
  readonly size: number;
  readonly clusterSize: number;
}

/** Small enough to be read whole after each step, with some clusters and a last one cut short. */
export function shapeOf(c: Combination): Shape {
  const clusters = c.clusterSize >= 2 * MiB ? 3 : c.clusterSize >= 64 * 1024 ? 10 : 100;
  return {
    clusterSize: c.clusterSize,
    size: clusters * c.clusterSize - (c.clusterSize > 512 ? 1536 : 0),
  };
}

/** Operations on a disk of this shape; snapshots and resizing only where the combination has them. */
export function operations(c: Combination): fc.Arbitrary<Operation[]> {
  const { size, clusterSize } = shapeOf(c);
  const sectors = Math.floor(size / SECTOR);
  const clusters = Math.floor(size / clusterSize);
  const fill = fc.integer({ min: 1, max: 255 });
  // Lengths around sectors, clusters and their borders.
  const start = fc.oneof(
    fc.nat(sectors - 1),
    fc.nat(clusters - 1).map((i) => (i * clusterSize) / SECTOR),
  );
  const count = fc.oneof(
    fc.integer({ min: 1, max: 20 }),
    fc.constantFrom(1, 2, 3).map((n) => (n * clusterSize) / SECTOR),
    fc.integer({ min: 1, max: Math.min((3 * clusterSize) / SECTOR, 4096) }),
  );
  const name = fc.constantFrom('one', 'two');
  const kinds: fc.WeightedArbitrary<Operation>[] = [
    { weight: 6, arbitrary: fc.record({ type: fc.constant('write'), start, count, fill }) },
    {
      weight: 3,
      arbitrary: fc.record({ type: fc.constant('zero'), start, count, mayUnmap: fc.boolean() }),
    },
    {
      weight: 2,
      arbitrary: fc.record({
        type: fc.constant('unmap'),
        cluster: fc.nat(clusters - 1),
        count: fc.integer({ min: 1, max: 3 }),
      }),
    },
    { weight: 1, arbitrary: fc.record({ type: fc.constantFrom('flush', 'reopen') }) },
  ];
  if (c.compress) {
    kinds.push({
      weight: 4,
      arbitrary: fc.record({ type: fc.constant('compress'), cluster: fc.nat(clusters - 1), fill }),
    });
  }
  // A snapshot counts each cluster once more, and one that holds compressed clusters as often as they are.
  if (c.dataFile === 'none' && c.refcountBits > (c.compress ? 4 : 1)) {
    kinds.push({
      weight: 2,
      // QEMU reverts no disk that a bitmap follows.
      arbitrary: fc.record({
        type: fc.constantFrom('snapshot', 'delete', ...(c.bitmap ? [] : (['revert'] as const))),
        name,
      }),
    });
  }
  if (c.dataFile === 'none' && !c.bitmap && c.version === 3) {
    // Whole clusters: QEMU shows again what a cut in the middle of one had taken away.
    const sizes = fc.integer({ min: Math.ceil(clusters / 2), max: 2 * clusters });
    const perCluster = clusterSize / SECTOR;
    kinds.push({
      weight: 1,
      arbitrary: sizes.map((n): Operation => ({ type: 'resize', sectors: n * perCluster })),
    });
  }
  return fc.array(fc.oneof(...kinds), { minLength: 4, maxLength: 14 });
}

/**
 * What the disk holds by the rules, and which operations make sense at the moment: the others are
 * left out, so that shrinking a failing sequence can remove any of them.
 */
export class Model {
  disk: Buffer;
  readonly #clusterSize: number;
  readonly #snapshots = new Map<string, Buffer>();
  /** Clusters that may have a place in the file. */
  readonly #placed = new Set<number>();

  constructor({ size, clusterSize }: Shape, backing: Buffer) {
    this.#clusterSize = clusterSize;
    this.disk = Buffer.alloc(size);
    backing.copy(this.disk);
  }

  /** The operation cut to the disk's present size, or undefined. */
  take(operation: Operation): Operation | undefined {
    const sectors = this.disk.length / SECTOR;
    const cut = (start: number, count: number) => Math.min(count, sectors - start);
    switch (operation.type) {
      case 'write':
      case 'zero': {
        const count = cut(operation.start, operation.count);
        if (count <= 0) return undefined;
        const from = operation.start * SECTOR;
        const value = operation.type === 'write' ? operation.fill : 0;
        this.disk.fill(value, from, from + count * SECTOR);
        this.#place(from, count * SECTOR);
        return { ...operation, count };
      }
      case 'compress': {
        const from = operation.cluster * this.#clusterSize;
        if (from + this.#clusterSize > this.disk.length) return undefined;
        this.disk.fill(operation.fill, from, from + this.#clusterSize);
        const placed = this.#placed.has(operation.cluster);
        this.#place(from, this.#clusterSize);
        return { ...operation, placed };
      }
      case 'unmap': {
        const from = operation.cluster * this.#clusterSize;
        const whole = Math.floor((this.disk.length - from) / this.#clusterSize);
        const count = Math.min(operation.count, whole);
        if (count <= 0) return undefined;
        this.disk.fill(0, from, from + count * this.#clusterSize);
        this.#place(from, count * this.#clusterSize);
        return { ...operation, count };
      }
      case 'snapshot':
        if (this.#snapshots.has(operation.name)) return undefined;
        this.#snapshots.set(operation.name, Buffer.from(this.disk));
        return operation;
      case 'revert': {
        const disk = this.#snapshots.get(operation.name);
        if (disk === undefined) return undefined;
        this.disk = Buffer.from(disk);
        this.#place(0, disk.length);
        return operation;
      }
      case 'delete':
        return this.#snapshots.delete(operation.name) ? operation : undefined;
      case 'resize': {
        // QEMU does not shrink an image with snapshots, and forgets what a backing file holds behind.
        if (this.#snapshots.size > 0) return undefined;
        const disk = Buffer.alloc(operation.sectors * SECTOR);
        this.disk.copy(disk);
        this.disk = disk;
        return operation;
      }
      default:
        return operation;
    }
  }

  #place(position: number, length: number): void {
    const end = (position + length) / this.#clusterSize;
    for (let c = Math.floor(position / this.#clusterSize); c < end; c++) this.#placed.add(c);
  }
}

/** An image of a combination in a folder of its own. */
export interface Image {
  readonly path: string;
  readonly combination: Combination;
}

/** Backing files that all images of a combination share, and what the chain shows. */
export interface Base {
  readonly path: string | undefined;
  readonly format: 'raw' | 'qcow2';
  readonly disk: Buffer;
}

export function makeBase(dir: string, c: Combination): Base {
  const { size } = shapeOf(c);
  const raw = join(dir, 'base.raw');
  const half = Math.floor(size / 2 / SECTOR) * SECTOR;
  if (c.backing === 'none') return { path: undefined, format: 'raw', disk: Buffer.alloc(0) };
  if (c.backing === 'raw, shorter') {
    qemuImg('create', '-q', '-f', 'raw', raw, String(half));
    qemuIo(raw, [`write -q -P 17 0 ${half}`], '-f', 'raw');
    return { path: 'base.raw', format: 'raw', disk: Buffer.alloc(half, 17) };
  }
  const long = join(dir, 'long.qcow2');
  const longSize = 2 * size + SECTOR - ((2 * size) % SECTOR);
  qemuImg('create', '-q', '-f', 'qcow2', '-o', 'cluster_size=4k', long, String(longSize));
  qemuIo(long, [`write -q -P 33 ${half} ${longSize - half}`], '-f', 'qcow2');
  const disk = Buffer.alloc(longSize);
  disk.fill(33, half);
  if (c.backing === 'qcow2, longer') return { path: 'long.qcow2', format: 'qcow2', disk };
  const middle = join(dir, 'middle.qcow2');
  const third = Math.floor(size / 3 / SECTOR) * SECTOR;
  const middleSize = third * 2 + half;
  const options = 'cluster_size=2k';
  qemuImg(
    ...['create', '-q', '-f', 'qcow2', '-o', options, '-b', 'long.qcow2', '-F', 'qcow2'],
    ...[middle, String(middleSize)],
  );
  qemuIo(middle, [`write -q -P 49 ${third} ${third}`, `write -q -z 0 1024`], '-f', 'qcow2');
  disk.fill(49, third, 2 * third);
  disk.fill(0, 0, 1024);
  return { path: 'middle.qcow2', format: 'qcow2', disk: disk.subarray(0, middleSize) };
}

/** By QEMU where it can without measuring how fast keys are stretched, which takes seconds. */
export async function createByQemu(dir: string, c: Combination, base: Base): Promise<Image> {
  if (c.encrypted) return createByUs(dir, 'qemu', c, base);
  const path = join(dir, 'qemu.qcow2');
  const options = qemuOptions(c);
  if (c.dataFile !== 'none') {
    options.push(`data_file=${path}.data`, `data_file_raw=${c.dataFile === 'raw' ? 'on' : 'off'}`);
  }
  const backing = base.path === undefined ? [] : ['-b', base.path, '-F', base.format];
  const size = String(shapeOf(c).size);
  qemuImg('create', '-q', '-f', 'qcow2', '-o', options.join(','), ...backing, path, size);
  return { path, combination: c };
}

export async function createByUs(
  dir: string,
  name: string,
  c: Combination,
  base: Base,
): Promise<Image> {
  const path = join(dir, `${name}.qcow2`);
  await createImage(path, {
    ...createOptions(c, shapeOf(c).size),
    ...(base.path === undefined ? {} : { backingFile: base.path, backingFormat: base.format }),
    ...(c.dataFile === 'none'
      ? {}
      : { dataFile: `${path}.data`, dataFileRaw: c.dataFile === 'raw' }),
  });
  return { path, combination: c };
}

/** How QEMU's programs are told to open it, passphrase included. */
function qemuArguments({ path, combination }: Image): { options: string[]; name: string } {
  if (!combination.encrypted) return { options: ['-f', 'qcow2'], name: path };
  return {
    options: ['--object', `secret,id=s,data=${PASSPHRASE}`, '--image-opts'],
    name: `driver=qcow2,encrypt.key-secret=s,file.filename=${path}`,
  };
}

const imageOptions = ({ path, combination }: Image): string =>
  `driver=qcow2,file.filename=${path}${combination.encrypted ? ',encrypt.key-secret=s' : ''}`;

export function qemuCheck(image: Image): void {
  const { options, name } = qemuArguments(image);
  qemuImg('check', '-q', ...options, name);
}

export function qemuCompare(a: Image, b: Image): void {
  const secret = ['--object', `secret,id=s,data=${PASSPHRASE}`];
  qemuImg('compare', '-q', ...secret, '--image-opts', imageOptions(a), imageOptions(b));
}

function addBitmap(image: Image): void {
  const secret = ['--object', `secret,id=s,data=${PASSPHRASE}`];
  qemuImg('bitmap', '--add', ...secret, '--image-opts', imageOptions(image), 'b0');
}

function qemuCommand(operation: Operation, clusterSize: number): string | undefined {
  switch (operation.type) {
    case 'write':
      return `write -q -P ${operation.fill} ${operation.start * SECTOR} ${operation.count * SECTOR}`;
    case 'compress':
      return `write -q ${operation.placed ? '' : '-c '}-P ${operation.fill} ${operation.cluster * clusterSize} ${clusterSize}`;
    case 'zero':
      return `write -q -z ${operation.mayUnmap ? '-u ' : ''}${operation.start * SECTOR} ${operation.count * SECTOR}`;
    case 'unmap':
      return `write -q -z -u ${operation.cluster * clusterSize} ${operation.count * clusterSize}`;
    case 'flush':
      return 'flush';
    default:
      return undefined;
  }
}

export function runByQemu(image: Image, all: readonly Operation[]): void {
  const { clusterSize } = image.combination;
  const { options, name } = qemuArguments(image);
  let batch: string[] = [];
  const send = () => {
    if (batch.length > 0) qemuIo(name, batch, ...options, '-d', 'unmap');
    batch = [];
  };
  const img = (...args: string[]) => {
    send();
    qemuImg(...args);
  };
  const secret = image.combination.encrypted ? ['--object', `secret,id=s,data=${PASSPHRASE}`] : [];
  const opened = image.combination.encrypted ? ['--image-opts', name] : [image.path];
  for (const operation of all) {
    const command = qemuCommand(operation, clusterSize);
    if (command !== undefined) batch.push(command);
    else if (operation.type === 'resize') {
      const format = image.combination.encrypted ? [] : ['-f', 'qcow2'];
      img(
        'resize',
        '-q',
        '--shrink',
        ...secret,
        ...format,
        ...opened,
        `${operation.sectors * SECTOR}`,
      );
    } else if ('name' in operation) {
      const letter = { snapshot: '-c', revert: '-a', delete: '-d' }[operation.type];
      img('snapshot', '-q', ...secret, letter, operation.name, ...opened);
    } else send();
  }
  send();
}

function open({ path, combination }: Image, readOnly = false): Promise<QcowStore> {
  return QcowStore.open(path, {
    readOnly,
    ...(combination.encrypted ? { passphrase: PASSPHRASE } : {}),
    compress: combination.compress,
    allowShrink: true,
  });
}

export async function runByUs(image: Image, all: readonly Operation[]): Promise<void> {
  const { clusterSize } = image.combination;
  let store = await open(image);
  const write = (position: number, length: number, fill: number) =>
    store.write(position, new MemoryDataOut(new Uint8Array(length).fill(fill)), context);
  try {
    for (const operation of all) {
      switch (operation.type) {
        case 'write':
          await write(operation.start * SECTOR, operation.count * SECTOR, operation.fill);
          break;
        case 'compress':
          await write(operation.cluster * clusterSize, clusterSize, operation.fill);
          break;
        case 'zero':
          await store.writeZeroes(operation.start * SECTOR, operation.count * SECTOR, {
            ...context,
            mayUnmap: operation.mayUnmap,
          });
          break;
        case 'unmap':
          await store.unmap?.(
            operation.cluster * clusterSize,
            operation.count * clusterSize,
            context,
          );
          break;
        case 'flush':
          await store.flush(context);
          break;
        case 'reopen':
          await store.close();
          store = await open(image);
          break;
        case 'snapshot':
          await store.snapshots.create(operation.name);
          break;
        case 'revert':
          await store.snapshots.revert(operation.name);
          break;
        case 'delete':
          await store.snapshots.delete(operation.name);
          break;
        case 'resize':
          await store.resize(operation.sectors * SECTOR);
      }
    }
  } finally {
    await store.close();
  }
}

/** All of the disk, and whether what the store says to be zeros is. */
export async function readByUs(image: Image): Promise<Buffer> {
  const store = await open(image, true);
  try {
    const disk = Buffer.alloc(store.size);
    await store.read(0, new MemoryDataIn(disk), context);
    for (let at = 0; at < disk.length; ) {
      for (const { length, status } of await store.blockStatus(at, disk.length - at, context)) {
        if (status !== 'data' && !disk.subarray(at, at + length).every((byte) => byte === 0)) {
          throw new Error(`${at}+${length} is said to be ${status}, and is not zeros`);
        }
        at += length;
      }
    }
    return disk;
  } finally {
    await store.close();
  }
}

/** Sectors that a bitmap calls dirty, as qemu-nbd shows them to NBD clients. */
function dirtySectors(image: Image): Set<number> {
  const secret = ['--object', `secret,id=s,data=${PASSPHRASE}`];
  const server = ['qemu-nbd', '-r', '-B', 'b0', ...secret, '--image-opts', imageOptions(image)];
  const map = execFileSync(
    'nbdinfo',
    ['--json', '--map=qemu:dirty-bitmap:b0', '--', '[', ...server, ']'],
    { encoding: 'utf8' },
  );
  const dirty = new Set<number>();
  for (const { offset, length, type } of JSON.parse(map) as Record<string, number>[]) {
    if (type !== 1) continue;
    const end = ((offset as number) + (length as number)) / SECTOR;
    for (let i = (offset as number) / SECTOR; i < end; i++) dirty.add(i);
  }
  return dirty;
}

/** Bytes of both are the same; says where they are not. */
export function assertDisk(found: Buffer, expected: Buffer, what: string): void {
  if (found.equals(expected)) return;
  const at = expected.findIndex((byte, i) => byte !== found[i]);
  throw new Error(
    `${what}: ${found.length} bytes for ${expected.length}; byte ${at} is ${found[at]} instead of ${expected[at]}`,
  );
}

/**
 * The whole of it in an empty folder. @throws Error when the two sides, or a side and the model, differ, or when
 * an image has errors or leaks
 */
export async function prove(
  home: string,
  c: Combination,
  first: readonly Operation[],
  second: readonly Operation[],
): Promise<void> {
  const base = makeBase(home, c);
  const model = new Model(shapeOf(c), base.disk);
  const theirs = await createByQemu(home, c, base);
  const ours = await createByUs(home, 'ours', c, base);
  if (c.bitmap) for (const image of [theirs, ours]) addBitmap(image);

  const compare = async (when: string): Promise<void> => {
    for (const [image, name] of [
      [theirs, "QEMU's image"],
      [ours, 'our image'],
    ] as const) {
      qemuCheck(image);
      const check = await checkImage(image.path, c.encrypted ? { passphrase: PASSPHRASE } : {});
      if (check.errors + check.leaks > 0) {
        throw new Error(`our check of ${name} ${when}: ${check.messages.join('; ')}`);
      }
      assertDisk(await readByUs(image), model.disk, `${name} ${when}`);
    }
    qemuCompare(theirs, ours);
    if (!c.bitmap) return;
    // What QEMU calls changed is; we may call more so, a whole disk that was reverted.
    const [wanted, found] = [dirtySectors(theirs), dirtySectors(ours)];
    const missing = [...wanted].filter((sector) => !found.has(sector));
    if (missing.length > 0)
      throw new Error(`${when} the bitmap lacks ${missing.length} sectors from ${missing[0]} on`);
  };
  const step = async (wanted: readonly Operation[], byQemu: Image, byUs: Image): Promise<void> => {
    const doable = wanted.flatMap((operation) => model.take(operation) ?? []);
    runByQemu(byQemu, doable);
    await runByUs(byUs, doable);
  };
  await step(first, theirs, ours);
  await compare('after the first operations');
  await step(second, ours, theirs);
  await compare('after each side has gone on with the image of the other');
}
