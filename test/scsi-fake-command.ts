/** A command as the device layer would hand it over, on ordinary memory, and what became of it. */
import type { ScsiCommand } from '../lib/device/handler.js';
import { Status } from '../lib/device/handler.js';
import {
  BlockDevice,
  type BlockDeviceOptions,
  decodeSense,
  type Sense,
} from '../lib/scsi/index.js';
import type { BlockStore } from '../lib/store/index.js';
import { MemoryDataIn, MemoryDataOut } from '../lib/store/memory-data.js';

/** What an unwritten byte of a Data-In buffer looks like: another command's data. */
export const STALE = 0xee;

export interface FakeCommandOptions {
  /** Bytes of the Data-In buffer. */
  in?: number;
  /** The Data-Out buffer. */
  out?: Uint8Array;
}

export class FakeCommand implements ScsiCommand {
  readonly cdb: Uint8Array;
  readonly dataIn: MemoryDataIn;
  readonly dataOut: MemoryDataOut;
  readonly dataLength: number;
  readonly controller = new AbortController();
  completions = 0;
  status: number | undefined;
  senseBytes: Uint8Array | undefined;
  readonly done: Promise<void>;
  #resolve!: () => void;

  constructor(cdb: Uint8Array | readonly number[], options: FakeCommandOptions = {}) {
    this.cdb = Uint8Array.from(cdb);
    this.dataIn = new MemoryDataIn(new Uint8Array(options.in ?? 0).fill(STALE));
    this.dataOut = new MemoryDataOut(options.out ?? new Uint8Array(0));
    this.dataLength = options.out?.length ?? options.in ?? 0;
    this.done = new Promise((resolve) => {
      this.#resolve = resolve;
    });
  }

  get signal(): AbortSignal {
    return this.controller.signal;
  }

  complete(status: number = Status.GOOD, sense?: Uint8Array): void {
    this.completions++;
    if (this.completions > 1) throw new Error('completed twice');
    this.status = status;
    this.senseBytes = sense;
    this.#resolve();
  }

  /** The Data-In buffer. */
  get data(): Uint8Array {
    return this.dataIn.bytes;
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
