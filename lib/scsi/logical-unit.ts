// SPDX-License-Identifier: Apache-2.0
/**
 * The state that commands of one block device share: geometry, identity, mode pages, pending unit
 * attentions, the range lock, and the rules of writing durably. Owned by `BlockDevice`; lives from
 * its construction to its close, on one JavaScript thread. It never completes a command.
 */
import type { MaybePromise } from '../device/data.js';
import type { ScsiCommand } from '../device/handler.js';
import { ArgumentError } from '../errors.js';
import type {
  BlockStore,
  RequestContext,
  UnmapContext,
  WriteContext,
} from '../store/block-store.js';
import { chain, settled } from '../store/maybe.js';
import { RangeLock } from '../store/range-lock.js';
import { type CommandSpec, CommandTable } from './command-spec.js';
import { CopyManager } from './copy/copy-manager.js';
import type { Express } from './express.js';
import type { Hindrance } from './hindrance.js';
import type { Identity } from './identity.js';
import { ModePages } from './mode-pages.js';
import { type AskNexuses, RemovalPrevention } from './nexuses.js';
import type { PortGroups } from './port-groups.js';
import { type Sense, type SenseError, sense } from './sense.js';
import { SpaceWatch } from './space-watch.js';
import type { StateStorage } from './state-storage.js';

/**
 * What a store is told of the command that a request belongs to; makes the signal only when asked.
 */
export class StoreRequest implements WriteContext, UnmapContext {
  readonly fua: boolean;
  readonly mayUnmap: boolean;
  private readonly command: ScsiCommand;

  constructor(command: ScsiCommand, fua = false, mayUnmap = false) {
    this.command = command;
    this.fua = fua;
    this.mayUnmap = mayUnmap;
  }

  get signal(): AbortSignal {
    return this.command.signal;
  }
}

/**
 * Limits that the Block Limits VPD page reports and the commands enforce; in bytes where not said.
 */
export interface Limits {
  /** MAXIMUM TRANSFER LENGTH; 0: none. */
  readonly transfer: number;
  /** MAXIMUM COMPARE AND WRITE LENGTH, in blocks. */
  readonly compareAndWriteBlocks: number;
  /** MAXIMUM UNMAP LBA COUNT, in blocks. */
  readonly unmapBlocks: number;
  /** MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT. */
  readonly unmapDescriptors: number;
  /** MAXIMUM WRITE SAME LENGTH. */
  readonly writeSame: number;
  /** MAXIMUM ATOMIC TRANSFER LENGTH, in blocks; 0: none. */
  readonly atomicBlocks: number;
}

/** What a unit is told about itself and its surroundings. */
export interface UnitOptions {
  readonly removable: boolean;
  readonly maxTransferLength: number;
  readonly longCommands: boolean;
  readonly copyGroup: string | undefined;
  readonly modePageStorage: StateStorage | undefined;
  readonly operationStorage: StateStorage | undefined;
  readonly portGroups: PortGroups;
  /** The I_T nexuses there are now. */
  readonly nexuses: AskNexuses | undefined;
}

/** Counters of the General Statistics and Performance log page: indexes into `LogicalUnit.counters`. */
export const Counter = { READS: 0, WRITES: 1, BLOCKS_WRITTEN: 2, BLOCKS_READ: 3 } as const;

const MiB = 1024 * 1024;

export class LogicalUnit {
  readonly store: BlockStore;
  readonly identity: Identity;
  readonly removable: boolean;
  readonly lock = new RangeLock(() => this.express?.close());
  readonly options: UnitOptions;
  readonly copies: CopyManager;
  readonly space: SpaceWatch;
  readonly removal: RemovalPrevention;
  /** See `Counter`. */
  counters: Float64Array = new Float64Array(4);
  /** There on a device that has an express lane. */
  express: Express | undefined;
  /** Start and stop cycles: how often the medium was loaded. */
  loads = 0;
  /** Milliseconds to add to this machine's clock: SET TIMESTAMP. */
  timestampOffset: number | undefined;

  // From here to `thin` set by `open`, since a store may learn of its capabilities only there.
  modePages!: ModePages;
  limits!: Limits;
  commands!: CommandTable;
  blockSize = 0;
  blocks = 0;
  /** Log2 of logical blocks a physical block. */
  physicalExponent = 0;

  /** The store can lose acknowledged writes that were not flushed. */
  volatile = false;
  /** Writes must be durable when they settle: WCE is zero though the store has a cache. */
  writeThrough = false;
  /** Unmap is there: LBPME, LBPU, LBPWS, LBPWS10. */
  thin = false;

  /** A removable medium is out. */
  ejected = false;
  /** What refuses commands now: an operation on the whole medium, or that one failed. */
  hindrance: Hindrance | undefined;
  /** What REQUEST SENSE tells of the power condition; undefined for the active one. */
  power: Sense | undefined;
  /**
   * Unit attentions not yet reported, oldest first. There is one queue for all nexuses: TCMU does
   * not tell handlers which initiator sent a command.
   */
  readonly attentions: SenseError[] = [];

  constructor(store: BlockStore, identity: Identity, options: UnitOptions) {
    this.store = store;
    this.identity = identity;
    this.removable = options.removable;
    this.options = options;
    this.copies = new CopyManager(this);
    this.space = new SpaceWatch(this);
    this.removal = new RemovalPrevention(options.nexuses);
  }

  /**
   * Takes capabilities and geometry from the store, which is open.
   * @throws ArgumentError when they contradict each other.
   */
  open(specs: readonly CommandSpec[]): void {
    const { store } = this;
    this.thin = store.unmap !== undefined;
    this.volatile = store.writeCache ?? store.flush !== undefined;
    if (this.volatile && store.flush === undefined) {
      throw new ArgumentError(
        'block store: writeCache is true but there is no flush method; add flush, or set writeCache to false if settled writes are durable',
      );
    }
    this.modePages = new ModePages({
      writeCache: this.volatile,
      thresholds: store.space !== undefined,
      savable: this.options.modePageStorage !== undefined,
    });
    this.measure();
    const { atomicWriteLength = 0 } = store;
    if (!Number.isSafeInteger(atomicWriteLength / this.blockSize) || atomicWriteLength < 0) {
      throw new ArgumentError(
        `block store: atomicWriteLength is ${atomicWriteLength}; it must be a multiple of the block size ${this.blockSize}`,
      );
    }
    this.limits = {
      transfer: this.options.maxTransferLength,
      compareAndWriteBlocks: 255,
      unmapBlocks: MiB,
      unmapDescriptors: 256,
      // Emulated, WRITE SAME is as slow as writing: it must end long before the kernel's time-out.
      writeSame: (store.writeSame ?? store.writeZeroes) === undefined ? 256 * MiB : 1024 * MiB,
      // WRITE ATOMIC (16) says its length in 16 bits.
      atomicBlocks: Math.min(atomicWriteLength / this.blockSize, 0xffff),
    };
    this.commands = new CommandTable(specs.filter((spec) => spec.available?.(this) ?? true));
  }

  /** Takes the geometry from the store. @throws ArgumentError when it is none. */
  measure(): void {
    const { size, blockSize = 512, physicalBlockSize = blockSize } = this.store;
    if (![512, 1024, 2048, 4096].includes(blockSize)) {
      throw new ArgumentError(
        `block store: blockSize is ${blockSize}; use 512, 1024, 2048 or 4096 bytes`,
      );
    }
    if (!Number.isSafeInteger(size) || size <= 0 || size % blockSize !== 0) {
      throw new ArgumentError(
        `block store: size is ${size}; it must be a positive multiple of the block size ${blockSize}, at most 2^53 - 1`,
      );
    }
    const exponent = Math.log2(physicalBlockSize / blockSize);
    if (!Number.isInteger(exponent) || exponent < 0 || exponent > 15) {
      throw new ArgumentError(
        `block store: physicalBlockSize is ${physicalBlockSize}; it must be blockSize (${blockSize}) times a power of two up to 32768`,
      );
    }
    const { unmapGranularity = blockSize } = this.store;
    if (!Number.isSafeInteger(unmapGranularity / blockSize) || unmapGranularity <= 0) {
      throw new ArgumentError(
        `block store: unmapGranularity is ${unmapGranularity}; it must be a multiple of the block size ${blockSize}`,
      );
    }
    this.blockSize = blockSize;
    this.blocks = size / blockSize;
    this.physicalExponent = exponent;
  }

  get writeProtected(): boolean {
    return this.store.readOnly === true || this.modePages.softwareWriteProtect;
  }

  /** @throws SenseError LOGICAL BLOCK ADDRESS OUT OF RANGE. Holds also for LBAs above 2^53. */
  checkRange(lba: number, blocks: number): void {
    if (lba + blocks > this.blocks) throw sense.lbaOutOfRange();
  }

  /** Follows WCE. @returns whether the cache was just switched off and has to be written out. */
  cacheModeChanged(): boolean {
    const before = this.writeThrough;
    this.writeThrough = this.volatile && !this.modePages.writeCacheEnabled;
    return this.writeThrough && !before;
  }

  /** Queues a unit attention, once. */
  raiseAttention(attention: SenseError): void {
    this.express?.close();
    const same = (other: SenseError) =>
      other.asc === attention.asc && other.ascq === attention.ascq;
    if (!this.attentions.some(same)) this.attentions.push(attention);
  }

  /** Makes settled writes durable, where that takes anything. */
  flush(context: RequestContext): MaybePromise<unknown> {
    return this.store.flush?.(context);
  }

  /**
   * Bytes of block data a command moves: what the CDB asks for, or the Data-Out Buffer if that is
   * shorter by whole blocks.
   * @throws SenseError when the range or the length is not allowed, or the buffer ends inside a
   *   block.
   */
  dataOutLength(command: ScsiCommand, lba: number, blocks: number): number {
    this.checkRange(lba, blocks);
    this.checkTransfer(blocks * this.blockSize);
    const length = Math.min(blocks * this.blockSize, command.dataLength);
    if (length % this.blockSize !== 0) throw sense.invalidFieldInInformationUnit();
    return length;
  }

  /** @throws SenseError INVALID FIELD IN CDB above the MAXIMUM TRANSFER LENGTH. */
  checkTransfer(length: number): void {
    if (this.limits.transfer !== 0 && length > this.limits.transfer) {
      throw sense.invalidFieldInCdb();
    }
  }

  /** Runs a modification of `[position, position + length)` apart from exclusive ones; or alone. */
  apart<T>(
    position: number,
    length: number,
    exclusive: boolean,
    run: () => MaybePromise<T>,
  ): MaybePromise<T> {
    return chain(this.lock.acquire(position, position + length, exclusive), (held) =>
      settled(run, () => this.lock.release(held)),
    );
  }

  /** Makes what was written durable when there is no write cache, or `fua` asks for it. */
  makeDurable(request: RequestContext, fua = false): MaybePromise<unknown> {
    return this.volatile && (fua || this.writeThrough) ? this.flush(request) : undefined;
  }
}
