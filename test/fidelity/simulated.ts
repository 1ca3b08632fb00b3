/** The simulated kernel as a `World`. */
import { writeSync } from 'node:fs';
import type { RingSource } from '../../lib/device/ring-source.js';
import { type CommandResult, SimulatedDevice } from '../../lib/sim/index.js';
import {
  DATA_BYTES,
  hash,
  type Outcome,
  pattern,
  type Request,
  RING_BYTES,
  type Settings,
  senseText,
  World,
} from './world.js';

const TASK_ABORTED = 0x40;

export class SimulatedWorld extends World {
  readonly #kernel: SimulatedDevice;
  readonly #source: RingSource;
  readonly #results = new Map<string, Promise<CommandResult>>();

  constructor(settings: Settings) {
    super();
    this.#kernel = new SimulatedDevice({
      config: 'test/one',
      ringBytes: RING_BYTES,
      dataAreaBytes: DATA_BYTES,
      dataPagesPerBlock: settings.dataPagesPerBlock ?? 1,
      commandTimeout: (settings.commandTimeout ?? 0) * 1000,
      tmrNotification: settings.tmrNotification ?? false,
    });
    this.#source = this.#kernel.open();
  }

  protected override peek(offset: number, length: number): Uint8Array {
    return this.#kernel.peek(offset, length);
  }
  protected override poke(offset: number, bytes: Uint8Array): void {
    this.#kernel.poke(offset, bytes);
  }
  protected override doorbell(): void {
    writeSync(this.#source.doorbellFd, Buffer.alloc(4));
    this.#kernel.state();
  }
  protected override begin(label: string, request: Request): void {
    const result = this.#kernel.submit({
      cdb: request.cdb,
      ...(request.out === undefined ? {} : { dataOut: pattern(request.out) }),
      ...(request.in === undefined ? {} : { dataInLength: request.in }),
      ...(request.abortAfter === undefined
        ? {}
        : { signal: AbortSignal.timeout(request.abortAfter * 1000) }),
    });
    this.#results.set(label, result);
  }
  protected override async outcomeOf(label: string): Promise<Outcome> {
    const { status, sense, data } = (await this.#results.get(label)) as CommandResult;
    // The recorder's initiator shows no data of a command that failed.
    const shown = status === 0 ? data : new Uint8Array(0);
    return {
      status: status === TASK_ABORTED ? -1 : status,
      sense: senseText(sense),
      bytes: shown.length,
      data: shown.length === 0 ? undefined : hash(shown),
    };
  }
  protected override async queued(): Promise<void> {}
  protected override lunReset(): Promise<void> {
    return this.#kernel.lunReset();
  }
  protected override reset(level: 1 | 2): void {
    this.#kernel.block();
    this.#kernel.resetRing(level);
    this.#kernel.unblock();
  }
  protected override freeKept(id: number): boolean {
    try {
      this.#kernel.freeKeptBuffer(id);
      return true;
    } catch {
      return false;
    }
  }
  protected override async reads(count: number): Promise<void> {
    for (let i = 0; i < count; i++) {
      await this.#kernel.submit({ cdb: [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], dataInLength: 512 });
    }
  }

  close(): void {
    this.#kernel.close();
  }
}
