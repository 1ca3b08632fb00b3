// SPDX-License-Identifier: Apache-2.0
/**
 * A device: one ring, one handler, every command completed exactly once.
 *
 * Data goes one way: the addon fetches a batch and calls `#dispatch` once; each command goes to the
 * handler, or waits for its turn under `concurrency`; a completion is recorded when the handler has
 * completed the command *and* settled; the addon publishes the records in one doorbell after the
 * batch, or this module asks for it in a microtask when they come later.
 *
 * Failures stay inside: what a handler throws becomes sense data and a diagnostics event, never an
 * exception in the event loop.
 */
import { EventEmitter } from 'node:events';
import { closeSync } from 'node:fs';
import {
  ArgumentError,
  CommandError,
  DeviceError,
  errnoOf,
  RingError,
  TcmuError,
} from '../errors.js';
import { io } from '../io/io-queue.js';
import { CDB_STRIDE, EVENT_RESET, EVENT_TMR, type NativeRing, native } from '../native.js';
import { toSense } from '../scsi/sense.js';
import { Command } from './command.js';
import { commandEnd, commandStart, deviceError, handlerError } from './diagnostics.js';
import { ExpressLane } from './express-lane.js';
import { type CommandHandler, Status, type TaskManagement } from './handler.js';
import type { RingSource } from './ring-source.js';

/** How a device is served, for `Device.open`. */
export interface DeviceOptions {
  /**
   * Takes the commands. Without one, iterate over the device: `for await (const command of device)`.
   */
  handler?: CommandHandler<Command>;
  /** Most commands the handler has at a time; the rest wait in arrival order. Default 64. */
  concurrency?: number;
  /**
   * Milliseconds after which the kernel answers a command in the handler's place, and `command.signal`
   * is aborted. Default: what the source says (attrib/cmd_time_out); 0: never.
   */
  commandTimeout?: number;
  /**
   * Whether plain reads and writes may pass by the handler where its store allows that (`BlockStore.fileMap`).
   * They are no part of the diagnostics channels then. Default true.
   */
  express?: boolean;
}

/** How a device stops being served, for `Device.close`. */
export interface CloseOptions {
  /** Milliseconds that commands in flight get to finish. Default 10,000. */
  deadline?: number;
}

/** `error` never throws when nobody listens: it is on the diagnostics channel too. */
export interface DeviceEvents {
  /** The ring is served. */
  open: [];
  /** Everything is released. */
  close: [];
  /** The capacity changed; bytes. Emitted by whoever resized (`Served.resize`). */
  resize: [size: number];
  /** A LUN or target reset arrived. */
  reset: [type: TaskManagement['type']];
  /** A handler or the store behind it failed, a buffer escaped, or the device was lost. */
  error: [error: Error];
}

/** Sweeps in one command time-out: an abort comes at most this fraction of it late. */
const SWEEPS = 8;
const COMPLETION_RECORDS_HEADER = 4;
const TMR_TYPES: Record<number, TaskManagement['type']> = {
  1: 'abort-task',
  2: 'abort-task-set',
  3: 'clear-aca',
  4: 'clear-task-set',
  5: 'lun-reset',
  6: 'target-warm-reset',
  7: 'target-cold-reset',
  128: 'lun-reset-pro',
};

type State = 'serving' | 'closing' | 'closed';

// A CommandHost, too; not said, since its part of that is stripped from the published types.
/**
 * One ring and the handler that answers its commands. Made by `Device.open`; emits `DeviceEvents`;
 * commands never go through events.
 */
export class Device extends EventEmitter<DeviceEvents> {
  /** `<hba>/<device>`, as configfs has it; of a simulated device its own name. */
  readonly name: string;
  /** The configuration string of the backstore, `<subtype>/<rest>`. */
  readonly config: string;
  /** @internal */
  readonly ring: NativeRing;
  /** @internal */
  readonly info: Uint32Array;
  /** @internal */
  readonly completions: Uint32Array;
  readonly #cdbs: Uint8Array;
  readonly #events: Int32Array;
  /** By slot. */
  readonly #cdbViews: Uint8Array[] = [];
  /** @internal */
  readonly freeKeptBuffer: ((id: number) => Promise<void>) | undefined;
  readonly #handler: CommandHandler<Command> | undefined;
  readonly #concurrency: number;
  readonly #batch: number;
  /** By slot: commands fetched and not yet handed to the addon for publishing. */
  readonly #commands: (Command | undefined)[] = [];
  /** Commands that wait for a place under `concurrency`, oldest first from `#head` on. */
  #waiting: Command[] = [];
  #head = 0;
  #running = 0;
  /** Commands fetched and not yet recorded as completed. */
  #open = 0;
  #state: State = 'serving';
  #dispatching = false;
  #flushPending = false;
  #starting = false;
  #tick = 0;
  #sweeper: NodeJS.Timeout | undefined;
  #drained: (() => void) | undefined;
  #closing: Promise<void> | undefined;
  #lost: Error | undefined;
  /** Commands whose handler outlived the deadline of `close` with raw memory in its hands. */
  readonly #held = new Set<Command>();
  #pulls: ((command: Command | undefined) => void)[] = [];

  private constructor(source: RingSource, options: DeviceOptions) {
    super();
    this.name = source.name;
    this.config = source.config;
    this.freeKeptBuffer = source.freeKeptBuffer;
    this.#handler = options.handler;
    this.#concurrency = options.concurrency ?? 64;
    this.#batch = 256;
    try {
      this.ring = new native.Ring({
        memoryFd: source.memoryFd,
        eventFd: source.eventFd,
        doorbellFd: source.doorbellFd,
        mapSize: source.mapSize,
        batchSize: this.#batch,
        io,
        dispatch: () => this.#dispatch(),
        lost: (code, message) => this.#onLost(code, message),
        escaped: () => this.#onEscaped(),
      });
    } catch (error) {
      for (const fd of new Set([source.memoryFd, source.eventFd, source.doorbellFd])) closeSync(fd);
      throw wrapRingError(`open ${source.name}`, error);
    }
    this.info = this.ring.info;
    this.completions = this.ring.completions;
    this.#cdbs = this.ring.cdbs;
    this.#events = this.ring.events;
    this.#startSweeper(options.commandTimeout ?? source.commandTimeout ?? 0);
  }

  /**
   * Maps the ring, opens the handler, and begins to serve.
   * @throws DeviceError, RingError (`ERR_TCMU_RING_VERSION`, `ERR_TCMU_RING_CORRUPT`), or what the
   *   handler's `open` throws; the source's descriptors are closed then.
   */
  static async open(source: RingSource, options: DeviceOptions = {}): Promise<Device> {
    const { concurrency } = options;
    if (concurrency !== undefined && !(concurrency >= 1)) {
      throw new ArgumentError(`tcmu: concurrency ${concurrency}: at least one command must run`);
    }
    const device = new Device(source, options);
    try {
      await options.handler?.open?.();
    } catch (error) {
      device.#stopSweeper();
      device.ring.close();
      throw error;
    }
    if (options.express !== false) options.handler?.express?.(new ExpressLane(device.ring));
    device.ring.start();
    device.emit('open');
    return device;
  }

  /** Commands fetched and not yet completed. */
  get inFlight(): number {
    return this.#open;
  }

  /** Whether `close` has ended, or the device was lost and everything is released. */
  get closed(): boolean {
    return this.#state === 'closed';
  }

  /** The error that ended serving (the device was removed, its ring is corrupt), if one did. */
  get lost(): Error | undefined {
    return this.#lost;
  }

  /** Counters of the ring since it was opened. */
  stats(): ReturnType<NativeRing['stats']> {
    return this.ring.stats();
  }

  // --- from the ring to the handler ---

  #dispatch(): void {
    const events = this.#events;
    const count = events[0] as number;
    this.#dispatching = true;
    for (let i = 1; i <= count; i++) {
      const event = events[i] as number;
      if (event === EVENT_TMR) {
        this.#onTmr();
        continue;
      }
      if (event === EVENT_RESET) {
        this.#onReset();
        continue;
      }
      const command = new Command(this, event, this.#tick);
      this.#commands[event] = command;
      this.#open++;
      if (this.#running < this.#concurrency && this.#head === this.#waiting.length) {
        this.#start(command);
      } else {
        this.#waiting.push(command);
      }
    }
    this.#dispatching = false;
  }

  #start(command: Command): void {
    if (command.aborted) {
      this.#running++;
      command.settled = true;
      command.complete(Status.TASK_ABORTED);
      return;
    }
    const handler = this.#handler;
    if (handler === undefined) {
      const pull = this.#pulls.shift();
      if (pull === undefined) {
        this.#waiting.push(command);
        return;
      }
      this.#running++;
      command.settled = true;
      pull(command);
      return;
    }
    this.#running++;
    if (commandStart.hasSubscribers) commandStart.publish({ device: this, command });
    let result: void | Promise<void>;
    try {
      result = handler.handle(command);
    } catch (error) {
      this.#failed(command, error);
      return;
    }
    if (result === undefined) {
      // Nothing more will be run for it, unless it keeps the command for a callback of its own.
      command.settled = true;
      if (command.completed) this.publish(command);
    } else {
      this.#follow(command, result);
    }
  }

  #follow(command: Command, result: PromiseLike<void>): void {
    result.then(
      () => {
        command.settled = true;
        if (command.completed) {
          this.publish(command);
          return;
        }
        this.#failed(
          command,
          new CommandError(
            'ERR_TCMU_COMMAND_UNCOMPLETED',
            `tcmu: ${command.describe()}: the handler's promise resolved without complete(); every command needs one`,
          ),
        );
      },
      (error: unknown) => this.#failed(command, error),
    );
  }

  /** The handler threw: the initiator gets sense data, the author a diagnostics event. */
  #failed(command: Command, error: unknown): void {
    command.settled = true;
    if (command.completed) {
      this.#report(command, error);
      this.publish(command);
      return;
    }
    const answer = toSense(error);
    // Sense data without a cause is an answer; with one it is the translation of a failure.
    if (answer !== error || answer.cause !== undefined) this.#report(command, error);
    command.complete(answer.status, answer.encode());
  }

  #report(command: Command, error: unknown): void {
    if (handlerError.hasSubscribers) handlerError.publish({ device: this, command, error });
    this.report(error);
  }

  /** A failure behind the handler, which has answered the initiator. @internal */
  report(error: unknown): void {
    this.#emitError(error instanceof Error ? error : new Error(String(error), { cause: error }));
  }

  #emitError(error: Error): void {
    if (this.listenerCount('error') === 0) return;
    // A listener that throws must not end up in the ring's callback.
    try {
      this.emit('error', error);
    } catch (thrown) {
      queueMicrotask(() => {
        throw thrown;
      });
    }
  }

  // --- from the handler to the ring ---

  /** @internal */
  cdbView(slot: number, length: number): Uint8Array {
    let view = this.#cdbViews[slot];
    if (view?.length !== length) {
      const start = slot * CDB_STRIDE;
      view = this.#cdbs.subarray(start, start + length);
      this.#cdbViews[slot] = view;
    }
    return view;
  }

  /** @internal */
  publish(command: Command): void {
    const { completions } = this;
    if (this.#commands[command.slot] !== command) return;
    this.#commands[command.slot] = undefined;
    if (commandEnd.hasSubscribers) {
      commandEnd.publish({ device: this, command, status: command.status });
    }
    const index = completions[0] as number;
    command.record(index);
    completions[0] = index + 1;
    if ((index + 2) * 4 + COMPLETION_RECORDS_HEADER > completions.length) this.ring.flush();
    else this.#scheduleFlush();
    this.#open--;
    this.#running--;
    if (this.#head < this.#waiting.length) this.#startWaiting();
    if (this.#open === 0) this.#drained?.();
    if (this.#held.size > 0 && this.#held.delete(command)) {
      this.ring.flush();
      this.ring.unpin(command.slot);
    }
  }

  /** During a dispatch the addon flushes by itself when it returns. */
  #scheduleFlush(): void {
    if (this.#dispatching || this.#flushPending) return;
    this.#flushPending = true;
    queueMicrotask(this.#flush);
  }

  readonly #flush = (): void => {
    this.#flushPending = false;
    this.ring.flush();
  };

  /** A loop, not a recursion: a handler that completes at once calls `publish` from `#start`. */
  #startWaiting(): void {
    if (this.#starting) return;
    this.#starting = true;
    while (this.#head < this.#waiting.length && this.#running < this.#concurrency) {
      if (this.#handler === undefined && this.#pulls.length === 0) break;
      const command = this.#waiting[this.#head++] as Command;
      if (this.#head === this.#waiting.length) {
        this.#waiting = [];
        this.#head = 0;
      }
      this.#start(command);
    }
    this.#starting = false;
  }

  /**
   * The commands one by one, for a device opened without a handler. Several loops share the commands.
   * Each command must be completed; how many are out at a time is bounded by `concurrency`. Ends when
   * the device closes. Leaving the loop leaves the device open.
   */
  async *[Symbol.asyncIterator](): AsyncGenerator<Command, void, undefined> {
    if (this.#handler !== undefined) {
      throw new ArgumentError(
        `tcmu: ${this.name}: opened with a handler, which takes the commands`,
      );
    }
    while (this.#state === 'serving') {
      const command = await new Promise<Command | undefined>((resolve) => {
        this.#pulls.push(resolve);
        this.#startWaiting();
      });
      if (command === undefined) return;
      yield command;
    }
  }

  // --- task management, expiry, loss ---

  #onTmr(): void {
    const { type, slots } = this.ring.takeTmr();
    const name = TMR_TYPES[type] ?? 'unknown';
    const reason = new CommandError(
      'ERR_TCMU_COMMAND_ABORTED',
      `tcmu: ${this.name}: the initiator gave up on the command (${name})`,
    );
    const commands: Command[] = [];
    for (const slot of slots) {
      const command = this.#commands[slot];
      if (command !== undefined) commands.push(command);
    }
    for (const command of commands) command.abort(reason);
    const tmr: TaskManagement<Command> = { type: name, commands };
    try {
      this.#handler?.taskManagement?.(tmr);
      if (type >= 5) this.emit('reset', name);
    } catch (error) {
      this.#emitError(error instanceof Error ? error : new Error(String(error)));
    }
  }

  /** An administrator reset the ring: the kernel has answered all commands that were fetched. */
  #onReset(): void {
    const reason = new CommandError(
      'ERR_TCMU_COMMAND_ABORTED',
      `tcmu: ${this.name}: the ring was reset, and the kernel answered the initiator`,
    );
    for (const command of this.#commands) command?.abort(reason);
  }

  #startSweeper(timeout: number): void {
    if (!(timeout > 0)) return;
    const expiry = Math.min(timeout, 2 ** 31 - 1);
    this.#sweeper = setInterval(() => this.#sweep(), Math.max(expiry / SWEEPS, 1));
    this.#sweeper.unref();
  }

  #stopSweeper(): void {
    clearInterval(this.#sweeper);
  }

  /** A command that has seen SWEEPS + 1 ticks is older than the time-out: the kernel has answered it. */
  #sweep(): void {
    this.#tick++;
    if (this.#open === 0) return;
    const oldest = this.#tick - SWEEPS;
    for (const command of this.#commands) {
      if (command !== undefined && command.tick < oldest && !command.aborted) {
        command.abort(
          new CommandError(
            'ERR_TCMU_COMMAND_ABORTED',
            `tcmu: ${command.describe()}: the kernel's command time-out has passed and it answered the initiator`,
          ),
        );
      }
    }
  }

  #onLost(code: string, message: string): void {
    const corrupt = code.startsWith('ERR_TCMU_RING');
    const error = corrupt
      ? new RingError(
          code,
          `tcmu: ${this.name}: ${message}; serving has ended: reset the ring and reopen`,
        )
      : new DeviceError(
          'ERR_TCMU_DEVICE_GONE',
          `tcmu: ${this.name}: the kernel took the device away (${code}: ${message}); serving has ended`,
          { errno: code },
        );
    this.#lost = error;
    for (const command of this.#commands) command?.abort(error);
    this.#reportDevice(error);
    void this.close({ deadline: 1000 }).catch((problem: Error) => this.#reportDevice(problem));
  }

  #onEscaped(): void {
    this.#reportDevice(
      new DeviceError(
        'ERR_TCMU_BUFFER_ESCAPED',
        `tcmu: ${this.name}: a command's ArrayBuffer was detached by somebody else before completion (transfer(), structuredClone, or a BYOB stream took it): its memory can no longer be revoked; copy the data instead`,
      ),
    );
  }

  #reportDevice(error: Error): void {
    if (deviceError.hasSubscribers) deviceError.publish({ device: this, error });
    this.#emitError(error);
  }

  // --- end ---

  /**
   * Stops taking commands, answers those that still wait for the handler with BUSY, gives the others
   * until the deadline, then answers BUSY for those whose memory nobody can be using. Closes the
   * handler, and unmaps. Idempotent.
   *
   * @throws DeviceError `ERR_TCMU_MAPPING_LEAKED` when a command is still pinned, or its raw memory is
   *   in the hands of a handler that has not settled: the mapping then stays until the last of them ends
   *   (or the process), and the device stays busy.
   */
  close(options: CloseOptions = {}): Promise<void> {
    this.#closing ??= this.#close(options.deadline ?? 10_000);
    return this.#closing;
  }

  async #close(deadline: number): Promise<void> {
    this.#state = 'closing';
    this.ring.stop();
    for (const pull of this.#pulls.splice(0)) pull(undefined);
    const waiting = this.#waiting.slice(this.#head);
    this.#waiting = [];
    this.#head = 0;
    for (const command of waiting) {
      command.settled = true;
      this.#running++;
      command.complete(Status.BUSY);
    }
    if (this.#open > 0 && deadline > 0) await this.#drain(deadline);
    const held = this.#abandon();
    if (this.#lost === undefined) this.ring.flush();
    let failure: unknown;
    try {
      await this.#handler?.close?.();
    } catch (error) {
      failure = error;
    }
    this.#stopSweeper();
    this.ring.flush();
    const unmapped = this.ring.close();
    this.#state = 'closed';
    this.emit('close');
    if (!unmapped || held > 0) {
      throw new DeviceError(
        'ERR_TCMU_MAPPING_LEAKED',
        `tcmu: close ${this.name}: the memory of ${held > 0 ? `${held} commands` : 'a command'} is still pinned or in the hands of a handler that has not settled; the mapping is kept until that ends, and the device stays busy`,
        { operation: 'close', cause: failure },
      );
    }
    if (failure !== undefined) throw failure;
  }

  #drain(deadline: number): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, deadline);
      this.#drained = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  /** Answers BUSY for what is left, except commands whose memory may still be in use. */
  #abandon(): number {
    const reason = new CommandError('ERR_TCMU_COMMAND_ABORTED', `tcmu: ${this.name}: closing`);
    for (const command of this.#commands) {
      if (command === undefined) continue;
      command.abort(reason);
      if (command.exposed && !command.settled) {
        // Something native may be working on its raw memory: the pin makes the addon keep the mapping.
        this.ring.pin(command.slot);
        this.#held.add(command);
        continue;
      }
      command.settled = true;
      if (command.completed) this.publish(command);
      else command.complete(Status.BUSY);
    }
    return this.#held.size;
  }

  /** As `close` with the default deadline, for `await using`; rejects as that does. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

function wrapRingError(operation: string, error: unknown): Error {
  const code = (error as { code?: unknown } | null)?.code;
  const message = error instanceof Error ? error.message : String(error);
  if (TcmuError.is(error)) return error;
  if (typeof code === 'string' && code.startsWith('ERR_TCMU_RING')) {
    return new RingError(code, `tcmu: ${operation}: ${message}`, { operation, cause: error });
  }
  return new DeviceError(
    'ERR_TCMU_DEVICE_OPEN',
    `tcmu: ${operation}: ${errnoOf(error) ?? 'failed'}: ${message}`,
    { operation, cause: error },
  );
}
