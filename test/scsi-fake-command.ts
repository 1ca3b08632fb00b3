// SPDX-License-Identifier: Apache-2.0
/** A command as the device layer would hand it over, on ordinary memory, and what became of it. */
import { expect } from 'vitest';
import type { MaybePromise } from '../lib/device/data.js';
import type { ScsiCommand } from '../lib/device/handler.js';
import { Status } from '../lib/device/handler.js';
import {
  BlockDevice,
  type BlockDeviceOptions,
  decodeSense,
  type Sense,
} from '../lib/scsi/index.js';
import {
  type BlockStore,
  MemoryDataIn,
  MemoryDataOut,
  type OptionalMethod,
  StoreMiddleware,
  type StoreOperation,
} from '../lib/store/index.js';

/** What an unwritten byte of a Data-In buffer looks like: another command's data. */
export const STALE = 0xee;

/** Remembers how far a Data-In buffer has been written, as the device layer does. */
class TrackedDataIn extends MemoryDataIn {
  readonly #mark: { written: number };
  readonly #base: number;

  constructor(bytes: Uint8Array, mark: { written: number }, base = 0) {
    super(bytes);
    this.#mark = mark;
    this.#base = base;
  }

  #touch(end: number): void {
    this.#mark.written = Math.max(this.#mark.written, this.#base + end);
  }

  override slice(start = 0, end = this.length): TrackedDataIn {
    return new TrackedDataIn(super.slice(start, end).bytes, this.#mark, this.#base + start);
  }

  override copyFrom(source: Uint8Array, start = 0): void {
    super.copyFrom(source, start);
    this.#touch(start + source.length);
  }

  override fill(value: number, start = 0, end = this.length): void {
    super.fill(value, start, end);
    this.#touch(end);
  }

  override segments(): readonly Uint8Array[] {
    this.#touch(this.length);
    return super.segments();
  }
}

export interface FakeCommandOptions {
  /** Bytes of the Data-In buffer. */
  in?: number;
  /** The Data-Out buffer. */
  out?: Uint8Array;
}

export class FakeCommand implements ScsiCommand {
  readonly cdb: Uint8Array;
  readonly dataIn: TrackedDataIn;
  readonly #mark = { written: 0 };
  readonly dataOut: MemoryDataOut;
  readonly dataLength: number;
  #controller: AbortController | undefined;
  completions = 0;
  status: number | undefined;
  senseBytes: Uint8Array | undefined;
  #done: Promise<void> | undefined;
  #resolve: (() => void) | undefined;

  constructor(cdb: Uint8Array | readonly number[], options: FakeCommandOptions = {}) {
    this.cdb = Uint8Array.from(cdb);
    this.dataIn = new TrackedDataIn(new Uint8Array(options.in ?? 0).fill(STALE), this.#mark);
    this.dataOut = new MemoryDataOut(options.out ?? new Uint8Array(0));
    this.dataLength = options.out?.length ?? options.in ?? 0;
  }

  /** Made when first asked for: most of a million commands need none. */
  get controller(): AbortController {
    this.#controller ??= new AbortController();
    return this.#controller;
  }

  get done(): Promise<void> {
    this.#done ??= new Promise((resolve) => {
      this.#resolve = resolve;
      if (this.completions > 0) resolve();
    });
    return this.#done;
  }

  get signal(): AbortSignal {
    return this.controller.signal;
  }

  complete(status: number = Status.GOOD, sense?: Uint8Array): void {
    this.completions++;
    if (this.completions > 1) throw new Error('completed twice');
    this.status = status;
    this.senseBytes = sense;
    this.#resolve?.();
  }

  /** How far the Data-In buffer was written. */
  get written(): number {
    return this.#mark.written;
  }

  /** What was written of the Data-In buffer. */
  get data(): Uint8Array {
    return this.dataIn.bytes.subarray(0, this.written);
  }

  get sense(): Sense | undefined {
    return this.senseBytes && decodeSense(this.senseBytes);
  }

  /** `key/asc/ascq` in hexadecimal, or the status when there is no sense data. */
  get outcome(): string {
    const sense = this.sense;
    if (sense !== undefined) {
      return [sense.key, sense.asc, sense.ascq].map((n) => n.toString(16)).join('/');
    }
    if (this.status === undefined) return 'pending';
    return Object.entries(Status).find(([, value]) => value === this.status)?.[0] ?? 'unknown';
  }
}

/** Equal bytes; far faster than comparing arrays element by element. */
export function expectBytes(actual: Uint8Array, expected: Uint8Array): void {
  expect(actual.length).toBe(expected.length);
  if (Buffer.compare(actual, expected) === 0) return;
  const at = actual.findIndex((byte, i) => byte !== expected[i]);
  expect.fail(`byte ${at} is ${actual[at]}, not ${expected[at]}`);
}

/** A device over `store`, opened, without the power-on attention unless asked for. */
export async function openDevice(
  store: BlockStore,
  options: Partial<BlockDeviceOptions> = {},
): Promise<BlockDevice> {
  const device = new BlockDevice(store, {
    serial: 'test-0001',
    powerOnAttention: false,
    ...options,
  });
  await device.open();
  return device;
}

/** Runs one command to its end. */
export async function run(
  device: BlockDevice,
  cdb: Uint8Array | readonly number[],
  options?: FakeCommandOptions,
): Promise<FakeCommand> {
  const command = new FakeCommand(cdb, options);
  await device.handle(command);
  if (command.completions !== 1) throw new Error(`completed ${command.completions} times`);
  return command;
}

/** `store`, answering by promises, each after a turn of the event loop. */
export function asynchronous(store: BlockStore): StoreMiddleware {
  return new AsynchronousStore(store);
}

class AsynchronousStore extends StoreMiddleware {
  protected override intercept<T>(
    _operation: StoreOperation,
    run: () => MaybePromise<T>,
  ): MaybePromise<T> {
    return new Promise((resolve) => setImmediate(resolve)).then(run);
  }
}

/** `store` with nothing but `read` and `write`, and what is `kept`. */
export class BareStore extends StoreMiddleware {
  constructor(store: BlockStore, ...kept: readonly OptionalMethod[]) {
    super(store);
    const all = ['flush', 'unmap', 'writeZeroes', 'writeSame', 'compareAndWrite'] as const;
    this.hide(...all.filter((name) => !kept.includes(name)), 'blockStatus', 'resize');
    this.hide('space', 'cryptoErase');
  }

  override get atomicWriteLength(): number {
    return 0;
  }
}

/** The CDBs of everyday commands. */
export const CDB = {
  testUnitReady: () => [0, 0, 0, 0, 0, 0],
  read10: (lba: number, blocks: number, options = 0) =>
    cdb(0x28, options, [lba, 4], 0, [blocks, 2], 0),
  write10: (lba: number, blocks: number, options = 0) =>
    cdb(0x2a, options, [lba, 4], 0, [blocks, 2], 0),
  read16: (lba: number | bigint, blocks: number, options = 0) =>
    cdb(0x88, options, [lba, 8], [blocks, 4], 0, 0),
  write16: (lba: number | bigint, blocks: number, options = 0) =>
    cdb(0x8a, options, [lba, 8], [blocks, 4], 0, 0),
  synchronizeCache10: () => cdb(0x35, 0, [0, 4], 0, [0, 2], 0),
  compareAndWrite: (lba: number, blocks: number, options = 0) =>
    cdb(0x89, options, [lba, 8], 0, 0, 0, blocks, 0, 0),
  writeSame10: (lba: number, blocks: number, options = 0) =>
    cdb(0x41, options, [lba, 4], 0, [blocks, 2], 0),
  writeSame16: (lba: number | bigint, blocks: number, options = 0) =>
    cdb(0x93, options, [lba, 8], [blocks, 4], 0, 0),
  unmap: (length: number, options = 0) => cdb(0x42, options, [0, 4], 0, [length, 2], 0),
  inquiry: (page?: number, allocation = 255) =>
    cdb(0x12, page === undefined ? 0 : 1, page ?? 0, [allocation, 2], 0),
  modeSense6: (page: number, allocation = 255, control = 0) =>
    cdb(0x1a, 0x08, (control << 6) | page, 0, allocation, 0),
};

/** The parameter list of an UNMAP. */
export function unmapList(
  ...ranges: readonly (readonly [lba: number | bigint, blocks: number])[]
): Uint8Array {
  const descriptors = ranges.flatMap(([lba, blocks]) => cdb([lba, 8], [blocks, 4], [0, 4]));
  const length = descriptors.length;
  return Uint8Array.from([...cdb([length + 6, 2], [length, 2], [0, 4]), ...descriptors]);
}

/**
 * A CDB from its parts: numbers are bytes, [value, width] pairs big-endian integers of `width`
 * bytes.
 */
export function cdb(
  ...parts: (number | readonly [value: number | bigint, width: number])[]
): number[] {
  return parts.flatMap((part) => {
    if (typeof part === 'number') return [part];
    const [value, width] = part;
    return Array.from({ length: width }, (_, i) =>
      Number((BigInt(value) >> BigInt(8 * (width - 1 - i))) & 0xffn),
    );
  });
}
