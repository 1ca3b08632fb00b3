// SPDX-License-Identifier: Apache-2.0
/**
 * The base of stores that stand in front of another store. It forwards everything, and has exactly
 * the optional methods that the inner store has, so that a device advertises the same capabilities
 * with it as without. It owns the inner store: opening and closing pass through.
 *
 * To write one: extend `StoreMiddleware` and override `intercept`, which sees every operation, or
 * single methods. An overridden optional method is there only if the inner store has it; `hide` takes
 * methods away. `copyFrom` and `fileMap` are never
 * forwarded: they would pass by a middleware that changes or watches data on its way.
 */
import type { DataIn, DataOut, MaybePromise } from '../device/data.js';
import type {
  BlockExtent,
  BlockStore,
  RequestContext,
  StoreSpace,
  UnmapContext,
  WriteContext,
} from './block-store.js';

const OPTIONAL_METHODS = [
  'flush',
  'unmap',
  'writeZeroes',
  'writeSame',
  'compareAndWrite',
  'blockStatus',
  'space',
  'cryptoErase',
  'resize',
] as const;

/** A method that a store may leave out. */
export type OptionalMethod = (typeof OPTIONAL_METHODS)[number];

/** The name of an operation of a store. */
export type OperationName = 'read' | 'write' | Exclude<OptionalMethod, 'resize' | 'space'>;

/** All operations, in the order of the interface. */
export const OPERATIONS: readonly OperationName[] = [
  'read',
  'write',
  'flush',
  'unmap',
  'writeZeroes',
  'writeSame',
  'compareAndWrite',
  'blockStatus',
  'cryptoErase',
];

/** One operation on its way to the inner store. */
export interface StoreOperation {
  /** The method called. */
  readonly name: OperationName;
  /** Bytes from the start of the disk; 0 for a flush. */
  readonly position: number;
  /** Bytes; 0 for a flush. */
  readonly length: number;
  /** What the method is called with. */
  readonly context: RequestContext;
}

/** Forwards to `inner`; see the module's description. */
export class StoreMiddleware implements BlockStore {
  /** The store it stands in front of, and owns. */
  readonly inner: BlockStore;

  constructor(inner: BlockStore) {
    this.inner = inner;
    this.hide(...OPTIONAL_METHODS.filter((name) => inner[name] === undefined));
  }

  /** Makes optional methods absent, as if they were not implemented. */
  protected hide(...names: readonly OptionalMethod[]): void {
    for (const name of names) Object.defineProperty(this, name, { value: undefined });
  }

  /** Called around every operation; `run` carries it out on the inner store. */
  protected intercept<T>(_operation: StoreOperation, run: () => MaybePromise<T>): MaybePromise<T> {
    return run();
  }

  get size(): number {
    return this.inner.size;
  }

  get blockSize(): number {
    return this.inner.blockSize ?? 512;
  }

  get physicalBlockSize(): number {
    return this.inner.physicalBlockSize ?? this.blockSize;
  }

  get readOnly(): boolean {
    return this.inner.readOnly ?? false;
  }

  get writeCache(): boolean {
    return this.inner.writeCache ?? this.inner.flush !== undefined;
  }

  get supportsFua(): boolean {
    return this.inner.supportsFua ?? false;
  }

  get optimalTransferLength(): number {
    return this.inner.optimalTransferLength ?? 0;
  }

  get unmapGranularity(): number {
    return this.inner.unmapGranularity ?? this.blockSize;
  }

  get nonRotational(): boolean {
    return this.inner.nonRotational ?? true;
  }

  get atomicWriteLength(): number {
    return this.inner.atomicWriteLength ?? 0;
  }

  read(position: number, data: DataIn, context: RequestContext): MaybePromise<unknown> {
    const operation = { name: 'read', position, length: data.length, context } as const;
    return this.intercept(operation, () => this.inner.read(position, data, context));
  }

  write(position: number, data: DataOut, context: WriteContext): MaybePromise<unknown> {
    const operation = { name: 'write', position, length: data.length, context } as const;
    return this.intercept(operation, () => this.inner.write(position, data, context));
  }

  flush(context: RequestContext): MaybePromise<unknown> {
    const operation = { name: 'flush', position: 0, length: 0, context } as const;
    return this.intercept(operation, () => this.inner.flush?.(context));
  }

  unmap(position: number, length: number, context: RequestContext): MaybePromise<unknown> {
    const operation = { name: 'unmap', position, length, context } as const;
    return this.intercept(operation, () => this.inner.unmap?.(position, length, context));
  }

  writeZeroes(position: number, length: number, context: UnmapContext): MaybePromise<unknown> {
    const operation = { name: 'writeZeroes', position, length, context } as const;
    return this.intercept(operation, () => this.inner.writeZeroes?.(position, length, context));
  }

  writeSame(
    position: number,
    length: number,
    block: Uint8Array,
    context: RequestContext,
  ): MaybePromise<unknown> {
    const operation = { name: 'writeSame', position, length, context } as const;
    return this.intercept(operation, () =>
      this.inner.writeSame?.(position, length, block, context),
    );
  }

  compareAndWrite(
    position: number,
    expected: Uint8Array,
    replacement: Uint8Array,
    context: RequestContext,
  ): MaybePromise<number> {
    const { length } = expected;
    return this.intercept({ name: 'compareAndWrite', position, length, context }, () =>
      (this.inner as Required<BlockStore>).compareAndWrite(
        position,
        expected,
        replacement,
        context,
      ),
    );
  }

  blockStatus(
    position: number,
    length: number,
    context: RequestContext,
  ): MaybePromise<readonly BlockExtent[]> {
    return this.intercept({ name: 'blockStatus', position, length, context }, () =>
      (this.inner as Required<BlockStore>).blockStatus(position, length, context),
    );
  }

  space(): MaybePromise<StoreSpace> {
    return (this.inner as Required<BlockStore>).space();
  }

  cryptoErase(context: RequestContext): MaybePromise<unknown> {
    const { size } = this;
    return this.intercept({ name: 'cryptoErase', position: 0, length: size, context }, () =>
      this.inner.cryptoErase?.(context),
    );
  }

  open(): MaybePromise<unknown> {
    return this.inner.open?.();
  }

  close(): MaybePromise<unknown> {
    return this.inner.close?.();
  }

  resize(size: number): MaybePromise<unknown> {
    return this.inner.resize?.(size);
  }
}
