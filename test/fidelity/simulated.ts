// SPDX-License-Identifier: Apache-2.0
/** The simulated kernel as a `World`. */
import { closeSync, readSync, writeSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import type { RingSource } from '../../lib/device/ring-source.js';
import type { DeviceError } from '../../lib/errors.js';
import { type CommandResult, type Reconfiguration, SimulatedDevice } from '../../lib/sim/index.js';
import {
  type Change,
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
const BUSY = 0x08;
const TASK_SET_FULL = 0x28;
/** What takes a real initiator a second. */
const SECOND_MS = 100;

export class SimulatedWorld extends World {
  readonly #kernel: SimulatedDevice;
  #source: RingSource;
  readonly #results = new Map<string, Promise<CommandResult>>();
  readonly #aborts = new Map<string, AbortSignal>();
  #announced: { change: object; accept: boolean } | undefined;

  constructor(settings: Settings) {
    super();
    this.#kernel = new SimulatedDevice({
      config: 'test/one',
      ringBytes: RING_BYTES,
      dataAreaBytes: DATA_BYTES,
      dataPagesPerBlock: settings.dataPagesPerBlock ?? 1,
      commandTimeout: (settings.commandTimeout ?? 0) * SECOND_MS,
      queueFullTimeout:
        settings.queueFullTimeout === undefined ? -1 : settings.queueFullTimeout * SECOND_MS,
      tmrNotification: settings.tmrNotification ?? false,
      onReconfigure: (change) => this.#hear(change),
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
    if (request.abortAfter !== undefined) {
      this.#aborts.set(label, AbortSignal.timeout(request.abortAfter * SECOND_MS));
    }
    this.#results.set(label, this.#send(label, request));
  }

  /** As Linux does, again and again where the device is busy or its queue full. */
  async #send(label: string, request: Request): Promise<CommandResult> {
    const signal = this.#aborts.get(label);
    const until = performance.now() + (request.patience ?? 60) * SECOND_MS;
    for (;;) {
      const result = await this.#kernel.submit({
        cdb: request.cdb,
        bidirectional: request.out !== undefined && request.in !== undefined,
        ...(request.out === undefined ? {} : { dataOut: pattern(request.out) }),
        ...(request.in === undefined ? {} : { dataInLength: request.in }),
        ...(signal === undefined ? {} : { signal }),
      });
      // Who comes after the one that expired is answered, however slow this machine is.
      if (this.#kernel.state().expired > 0) this.#kernel.setAttributes({ commandTimeout: 0 });
      const again = result.status === BUSY || result.status === TASK_SET_FULL;
      if (!again || performance.now() > until) return result;
      await sleep(1);
    }
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
  protected override async givenUp(label: string): Promise<void> {
    const signal = this.#aborts.get(label) as AbortSignal;
    while (!signal.aborted) await sleep(1);
    await sleep(1);
  }
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

  protected override setBlocked(blocked: boolean): void {
    if (blocked) this.#kernel.block();
    else this.#kernel.unblock();
  }

  protected override async change({ attribute, value, accepted }: Change) {
    const change = { [attribute]: value } as Reconfiguration;
    this.#announced = { change: {}, accept: accepted };
    let taken = true;
    try {
      await this.#kernel.reconfigure(change);
    } catch {
      taken = false;
    }
    return { announced: this.#announced.change, taken };
  }
  #hear(change: Reconfiguration): void {
    if (this.#announced === undefined) return;
    this.#announced.change = change;
    if (!this.#announced.accept) throw new Error('refused');
  }

  protected override openAgain() {
    try {
      closeSource(this.#kernel.open());
      return 'open';
    } catch (error) {
      return (error as DeviceError).code === 'ERR_TCMU_DEVICE_BUSY' ? 'busy' : 'gone';
    }
  }
  protected override reopen(): void {
    closeSource(this.#source);
    this.#kernel.state();
    this.#source = this.#kernel.open();
  }

  protected override event() {
    const bytes = Buffer.alloc(4);
    try {
      return readSync(this.#source.eventFd, bytes) === 0 ? 'gone' : bytes.readInt32LE(0);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'EAGAIN') return undefined;
      throw error;
    }
  }
  protected override removal(): Promise<void> {
    return this.#kernel.remove();
  }

  close(): void {
    closeSource(this.#source);
    this.#kernel.close();
  }
}

function closeSource({ memoryFd, eventFd, doorbellFd }: RingSource): void {
  for (const fd of new Set([memoryFd, eventFd, doorbellFd])) closeSync(fd);
}
