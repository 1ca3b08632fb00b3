// SPDX-License-Identifier: Apache-2.0
/**
 * A store behind a simulated kernel, with the commands a Linux initiator would send it: for tests of
 * stores in a few lines, and for programs that want a SCSI disk without a kernel.
 *
 * Owns the kernel and the device it made; `close()` ends both. The commands' promises reject with a
 * `SenseError` for every status but GOOD, as the initiator's driver would report it.
 */
import { Device } from '../device/device.js';
import { Status } from '../device/handler.js';
import { ArgumentError } from '../errors.js';
import { BlockDevice, type BlockDeviceOptions } from '../scsi/block-device.js';
import { readU32, readU64, writeU16, writeU32, writeU64 } from '../scsi/bytes.js';
import { decodeSense, SenseError, SenseKey } from '../scsi/sense.js';
import type { BlockStore } from '../store/block-store.js';
import {
  type CommandRequest,
  type CommandResult,
  SimulatedDevice,
  type SimulatedDeviceOptions,
} from './simulated-device.js';

/**
 * How `simulate` serves a store: the kernel's side, the device's (`concurrency`), and how the disk
 * presents itself.
 */
export interface SimulateOptions extends SimulatedDeviceOptions {
  /** Most commands the store has at a time; see `Device.open`. */
  concurrency?: number;
  /** Whether plain reads and writes may pass by the store where it allows that; see `Device.open`. Default true. */
  express?: boolean;
  /** How the disk presents itself. Default: serial `SIMULATED`. */
  scsi?: Partial<BlockDeviceOptions>;
}

/** What an INQUIRY says (SPC-5, standard INQUIRY data). */
export interface InquiryData {
  /** PERIPHERAL DEVICE TYPE; 0 is a direct-access block device. */
  deviceType: number;
  /** RMB. */
  removable: boolean;
  /** T10 VENDOR IDENTIFICATION, without its padding. */
  vendor: string;
  /** PRODUCT IDENTIFICATION, without its padding. */
  product: string;
  /** PRODUCT REVISION LEVEL, without its padding. */
  revision: string;
}

/** What READ CAPACITY (16) says (SBC-4). */
export interface Capacity {
  /** Logical blocks. */
  blocks: number;
  /** Bytes. */
  blockSize: number;
  /** Bytes. */
  physicalBlockSize: number;
  /** LBPME: blocks can be unmapped. */
  thin: boolean;
}

/** For every request of a `SimulatedDisk`. */
export interface RequestOptions {
  /** Aborts the request: ABORT TASK. It then rejects, once the handler has completed it. */
  signal?: AbortSignal;
  /** Force unit access: the medium itself, not a volatile cache. */
  fua?: boolean;
}

/** A range of logical blocks. */
export interface BlockRange {
  /** First logical block. */
  lba: number;
  /** Logical blocks. */
  blocks: number;
}

const FUA = 0x08;
const STATUS_NAMES = new Map<number, string>(
  Object.entries(Status).map(([name, code]) => [code, name.replaceAll('_', ' ')]),
);

/**
 * A disk of the simulated kernel, with the commands that Linux' sd driver sends. Made by
 * `simulate`. Every request rejects with the `SenseError` that the device answered with.
 */
export class SimulatedDisk {
  /** The kernel's side: raw commands, task management, faults. */
  readonly kernel: SimulatedDevice;
  /** The handler's side. */
  readonly device: Device;
  readonly #disk: BlockDevice;
  #blockSize = 512;
  #closing: Promise<void> | undefined;

  private constructor(kernel: SimulatedDevice, device: Device, disk: BlockDevice) {
    this.kernel = kernel;
    this.device = device;
    this.#disk = disk;
  }

  /** @internal */
  static async start(store: BlockStore, options: SimulateOptions): Promise<SimulatedDisk> {
    const kernel = new SimulatedDevice(options);
    try {
      let served: Device | undefined;
      const handler = new BlockDevice(store, {
        serial: 'SIMULATED',
        onStoreFailure: ({ error }) => served?.report(error),
        ...options.scsi,
      });
      const { concurrency, express = true } = options;
      const device = await Device.open(kernel.open(), {
        handler,
        express,
        ...(concurrency === undefined ? {} : { concurrency }),
      });
      served = device;
      const disk = new SimulatedDisk(kernel, device, handler);
      try {
        await disk.#attach();
      } catch (error) {
        await device.close();
        throw error;
      }
      return disk;
    } catch (error) {
      kernel.close();
      throw error;
    }
  }

  /** What an initiator does with a new disk: takes its unit attention, asks how large it is. */
  async #attach(): Promise<void> {
    await this.testUnitReady().catch((error: unknown) => {
      if (!SenseError.is(error) || error.key !== SenseKey.UNIT_ATTENTION) throw error;
    });
    this.#blockSize = (await this.readCapacity()).blockSize;
  }

  /** Bytes of a logical block. */
  get blockSize(): number {
    return this.#blockSize;
  }

  /** Any command. Never rejects; see `SimulatedDevice.submit`. */
  submit(request: CommandRequest): Promise<CommandResult> {
    return this.kernel.submit(request);
  }

  /**
   * TEST UNIT READY.
   * @throws SenseError when the disk is not ready
   */
  async testUnitReady(): Promise<void> {
    await this.#good('TEST UNIT READY', { cdb: new Uint8Array(6) });
  }

  /**
   * INQUIRY, the standard page.
   * @throws SenseError
   */
  async inquiry(): Promise<InquiryData> {
    const data = await this.#in('INQUIRY', cdb(6, 0x12, { 4: 96 }), 96);
    const text = (start: number, end: number): string =>
      Buffer.from(data.subarray(start, end)).toString('latin1').trimEnd();
    return {
      deviceType: (data[0] as number) & 0x1f,
      removable: ((data[1] as number) & 0x80) !== 0,
      vendor: text(8, 16),
      product: text(16, 32),
      revision: text(32, 36),
    };
  }

  /**
   * INQUIRY of a vital product data page, header included (SPC-5).
   * @param page page code, 0x00 to 0xff
   * @throws SenseError what the device answered, for a page that it does not have
   */
  async vpdPage(page: number): Promise<Uint8Array> {
    const data = await this.#in('INQUIRY', cdb(6, 0x12, { 1: 1, 2: page, 3: 0x02 }), 512);
    return data.subarray(0, 4 + (((data[2] as number) << 8) | (data[3] as number)));
  }

  /**
   * READ CAPACITY (16).
   * @throws SenseError
   */
  async readCapacity(): Promise<Capacity> {
    const data = await this.#in('READ CAPACITY (16)', cdb(16, 0x9e, { 1: 0x10, 13: 32 }), 32);
    const blockSize = readU32(data, 8);
    return {
      blocks: readU64(data, 0) + 1,
      blockSize,
      physicalBlockSize: blockSize << ((data[13] as number) & 0x0f),
      thin: ((data[14] as number) & 0x80) !== 0,
    };
  }

  /**
   * READ (16) of `blocks` logical blocks from block `lba` on.
   * @throws SenseError what the device answered
   */
  async read(lba: number, blocks: number, options: RequestOptions = {}): Promise<Uint8Array> {
    const request = this.#blockCommand(0x88, lba, blocks, options);
    return (
      await this.#good(`READ of ${blocks} blocks at ${lba}`, {
        ...request,
        dataInLength: blocks * this.#blockSize,
      })
    ).data;
  }

  /**
   * WRITE (16) from block `lba` on.
   * @throws ArgumentError when `data` isn't whole blocks; SenseError what the device answered
   */
  async write(lba: number, data: Uint8Array, options: RequestOptions = {}): Promise<void> {
    const blocks = this.#wholeBlocks(data);
    const request = this.#blockCommand(0x8a, lba, blocks, options);
    await this.#good(`WRITE of ${blocks} blocks at ${lba}`, { ...request, dataOut: data });
  }

  /**
   * SYNCHRONIZE CACHE (10) of the whole disk: what was written before is durable when it settles.
   * @throws SenseError what the device answered
   */
  async flush(): Promise<void> {
    await this.#good('SYNCHRONIZE CACHE', { cdb: cdb(10, 0x35) });
  }

  /**
   * UNMAP: what the ranges hold is not needed any more.
   * @throws SenseError what the device answered
   */
  async unmap(...ranges: readonly BlockRange[]): Promise<void> {
    const list = new Uint8Array(8 + 16 * ranges.length);
    writeU16(list, 0, list.length - 2);
    writeU16(list, 2, 16 * ranges.length);
    for (const [i, { lba, blocks }] of ranges.entries()) {
      writeU64(list, 8 + 16 * i, lba);
      writeU32(list, 16 + 16 * i, blocks);
    }
    const command = cdb(10, 0x42);
    writeU16(command, 7, list.length);
    await this.#good('UNMAP', { cdb: command, dataOut: list });
  }

  /**
   * WRITE SAME (16): one block's contents over `blocks` logical blocks from block `lba` on.
   * @param block one logical block; left out: zeros without data (NDOB)
   * @param options.unmap the range may be deallocated instead
   * @throws SenseError what the device answered
   */
  async writeSame(
    lba: number,
    blocks: number,
    block?: Uint8Array,
    options: { unmap?: boolean } = {},
  ): Promise<void> {
    const { cdb: command } = this.#blockCommand(0x93, lba, blocks, {});
    command[1] = (options.unmap ? 0x08 : 0) | (block === undefined ? 0x01 : 0);
    await this.#good(`WRITE SAME of ${blocks} blocks at ${lba}`, {
      cdb: command,
      ...(block === undefined ? {} : { dataOut: block }),
    });
  }

  /**
   * COMPARE AND WRITE at block `lba`: writes `replacement` if the disk holds `expected`, at once.
   * @returns -1 when it was written, else the offset of the first byte that differs
   * @throws ArgumentError when `expected` isn't whole blocks; SenseError what the device answered
   */
  async compareAndWrite(
    lba: number,
    expected: Uint8Array,
    replacement: Uint8Array,
  ): Promise<number> {
    const blocks = this.#wholeBlocks(expected);
    const command = cdb(16, 0x89, { 13: blocks });
    writeU64(command, 2, lba);
    const dataOut = Buffer.concat([expected, replacement]);
    try {
      await this.#good(`COMPARE AND WRITE at ${lba}`, { cdb: command, dataOut });
      return -1;
    } catch (error) {
      if (SenseError.is(error) && error.key === SenseKey.MISCOMPARE) return error.information ?? 0;
      throw error;
    }
  }

  /**
   * Resizes the store and tells the initiator: the next command gets the unit attention CAPACITY DATA
   * HAS CHANGED.
   * @throws ArgumentError when the store has no `resize`
   */
  async resize(size: number): Promise<void> {
    const { store } = this.#disk;
    if (store.resize === undefined) {
      throw new ArgumentError(`tcmu: resize ${this.kernel.name}: its store has no resize method`);
    }
    await store.resize(size);
    this.#disk.capacityChanged();
  }

  /**
   * Refuses new commands, waits for those in flight, closes the handler, ends the kernel.
   * Idempotent.
   * @throws what the store's `close` throws
   */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    try {
      await this.kernel.detach();
      await this.device.close();
    } finally {
      this.kernel.close();
    }
  }

  /** As `close`, for `await using`; rejects as that does. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #blockCommand(
    opcode: number,
    lba: number,
    blocks: number,
    options: RequestOptions,
  ): { cdb: Uint8Array; signal?: AbortSignal } {
    const command = cdb(16, opcode, { 1: options.fua ? FUA : 0 });
    writeU64(command, 2, lba);
    writeU32(command, 10, blocks);
    return { cdb: command, ...(options.signal === undefined ? {} : { signal: options.signal }) };
  }

  #wholeBlocks(data: Uint8Array): number {
    const blocks = data.length / this.#blockSize;
    if (Number.isInteger(blocks)) return blocks;
    throw new ArgumentError(
      `tcmu: ${data.length} bytes are no whole number of blocks of ${this.#blockSize}`,
    );
  }

  async #in(name: string, command: Uint8Array, length: number): Promise<Uint8Array> {
    return (await this.#good(name, { cdb: command, dataInLength: length })).data;
  }

  async #good(name: string, request: CommandRequest): Promise<CommandResult> {
    const result = await this.kernel.submit(request);
    if (result.status === Status.GOOD) return result;
    const { status } = result;
    const text = `${name} ended with ${STATUS_NAMES.get(status) ?? `status ${status}`}`;
    const sense = result.sense === undefined ? undefined : decodeSense(result.sense);
    if (sense === undefined) throw new SenseError(0, 0, 0, text, { status });
    throw new SenseError(sense.key, sense.asc, sense.ascq, text, { ...sense, status });
  }
}

/**
 * Serves a store over a simulated kernel, without root or modules.
 * @throws ArgumentError for options that can't be, or what the store's `open` throws; nothing is
 *   left then
 */
export function simulate(store: BlockStore, options: SimulateOptions = {}): Promise<SimulatedDisk> {
  return SimulatedDisk.start(store, options);
}

function cdb(length: number, opcode: number, bytes: Record<number, number> = {}): Uint8Array {
  const result = new Uint8Array(length);
  result[0] = opcode;
  for (const [at, value] of Object.entries(bytes)) result[Number(at)] = value;
  return result;
}
