// SPDX-License-Identifier: Apache-2.0
/**
 * A handler's program around its `main`: what people are told, what other programs read, exit codes, and a
 * disk that is served until a signal.
 *
 * Contract: standard output carries results alone (the ready line, what `say` is given), standard error what
 * people are told. What was made is undone before a regular end; a disk that is mounted is served on, and the
 * next signal tries again.
 */
import { subscribe, unsubscribe } from 'node:diagnostics_channel';
import { readFileSync } from 'node:fs';
import type { Device } from '../device/device.js';
import { errnoOf, TcmuError } from '../errors.js';
import type { StoreFailure } from '../scsi/block-device.js';
import { SenseError } from '../scsi/sense.js';
import { UsageError } from './command-line.js';

/** How much it matters. */
export type TellLevel = 'info' | 'warning' | 'error';

/** A disk that is served. What `serve` answers is one. */
export interface ServedDisk {
  /** Of the backstore. */
  readonly name: string;
  /** `/dev/uio0`. */
  readonly uioPath: string;
  /** `/dev/sda`, over loopback. */
  readonly disk?: string | undefined;
  /** How to reach it, for people. */
  readonly reach: string;
  /** Its errors are told; when it is lost, serving ends. */
  readonly device: Pick<Device, 'on' | 'lost' | 'closed'>;
  /** Undoes everything. May fail because the disk is mounted, and be tried again. */
  close(): Promise<unknown>;
}

/** Why serving ends: a signal, or the kernel has taken the device away. */
export type EndReason = 'SIGINT' | 'SIGTERM' | 'lost';

/** What `Program.serve` has to know. */
export interface Serving {
  /** The disk. */
  readonly served: ServedDisk;
  /** What is served, for people: `disk.img (1 GiB, read-only)`. */
  readonly what: string;
  /** More for the ready line in JSON. */
  readonly facts?: object;
  /** Instead of `served.close()`: fails as that does. */
  close?(reason: EndReason): Promise<unknown>;
}

/** What a program says of itself. */
export interface ProgramOptions {
  /** What it is called: begins each line that people are told. */
  name: string;
  /** For `--help`. */
  help: string;
  /** Its package.json, for `--version`. */
  manifest: URL;
}

const REPEAT_AFTER_MS = 10_000;
const FAILURES = 'tcmu:scsi:error';

/** A handler's program: its messages, its results, its exit code. The guide on deployment has a whole one. */
export class Program {
  /** Whether what is told and said is one line of JSON each. */
  json = false;
  readonly #name: string;
  readonly #help: string;
  readonly #manifest: URL;
  readonly #told = new Map<string, number>();

  constructor(options: ProgramOptions) {
    this.#name = options.name;
    this.#help = options.help;
    this.#manifest = options.manifest;
  }

  /**
   * Tells people something, on the standard error. The same warning or error at most every ten seconds, however
   * often it happens.
   */
  tell(level: TellLevel, message: string, code?: string): void {
    if (level !== 'info' && this.#toldLately(message)) return;
    const text = message.replace(/^tcmu: /, '');
    const prefix = level === 'info' ? '' : `${level}: `;
    process.stderr.write(
      this.json
        ? `${JSON.stringify({ level, message: text, code })}\n`
        : `${this.#name}: ${prefix}${text}\n`,
    );
  }

  #toldLately(message: string): boolean {
    const now = performance.now();
    for (const [old, at] of this.#told) if (now - at >= REPEAT_AFTER_MS) this.#told.delete(old);
    if (this.#told.has(message)) return true;
    this.#told.set(message, now);
    return false;
  }

  /** Tells a warning; bound, to be handed over as it is. */
  readonly warn = (message: string): void => this.tell('warning', message);

  /** Tells an error. One of this package or of the system says it all; of others the stack is wanted. */
  tellError(error: unknown, level: 'warning' | 'error' = 'error'): void {
    if (!(error instanceof Error)) return this.tell(level, String(error));
    if (error instanceof UsageError) {
      return this.tell(level, `${error.message}\nTry ${this.#name} --help.`, error.code);
    }
    if (TcmuError.is(error)) return this.tell(level, error.message, error.code);
    const errno = errnoOf(error);
    if (errno !== undefined) return this.tell(level, error.message, errno);
    this.tell(level, error.stack ?? error.message);
  }

  /** A result, on the standard output: text for people (nothing when it is empty), or the facts as JSON. */
  say(text: string, facts: unknown): void {
    if (this.json) process.stdout.write(`${JSON.stringify(facts, numbers)}\n`);
    else if (text !== '') process.stdout.write(`${text}\n`);
  }

  /**
   * Serves until a signal or the loss of the device; says `ready name=… uio=… disk=…` (`disk=` where there is
   * one) once it does. Signals count from the call on: one that comes while starting is not lost.
   *
   * @param start makes the disk; what it throws is thrown
   * @param reload does what SIGHUP asks for; without it that signal ends the process at once
   * @returns the exit code: 0 ended by SIGINT or SIGTERM, 1 lost
   */
  async serve<T extends Serving>(
    start: () => Promise<T>,
    reload?: (serving: T) => Promise<unknown>,
  ): Promise<number> {
    const signals = new Signals(reload !== undefined);
    const tellFailure = (message: unknown): void => {
      const { error } = message as StoreFailure;
      // Sense is for the initiator; people want to know what it came from.
      this.tellError((SenseError.is(error) && error.cause) || error, 'warning');
    };
    subscribe(FAILURES, tellFailure);
    try {
      return await this.#serveUntil(signals, await start(), reload);
    } finally {
      signals.close();
      unsubscribe(FAILURES, tellFailure);
    }
  }

  async #serveUntil<T extends Serving>(
    signals: Signals,
    serving: T,
    reload: ((serving: T) => Promise<unknown>) | undefined,
  ): Promise<number> {
    const { device, name, uioPath: uio, disk, reach } = serving.served;
    const lost = new Promise<'lost'>((resolve) => {
      device.on('error', (error) => {
        this.tellError(error, 'warning');
        if (device.lost !== undefined) resolve('lost');
      });
      if (device.lost !== undefined) resolve('lost');
    });
    this.tell('info', `serving ${serving.what} as ${name}: ${reach}`);
    this.say(`ready name=${name} uio=${uio}${disk === undefined ? '' : ` disk=${disk}`}`, {
      ready: { name, uio, disk, ...serving.facts },
    });
    for (;;) {
      const event = await Promise.race([signals.next(), lost]);
      try {
        if (event === 'SIGHUP') await reload?.(serving);
        else {
          await (serving.close === undefined ? serving.served.close() : serving.close(event));
          return event === 'lost' ? 1 : 0;
        }
      } catch (error) {
        this.tellError(error);
        if (device.closed || event === 'lost') return 1;
      }
    }
  }

  /**
   * Runs the program to its end, and ends the process.
   *
   * @param main given the words after the program's name; answers the exit code, or which of `--help` and
   *   `--version` was asked. An error it throws is told, and the exit code 1; of a `UsageError` 2
   */
  async run(
    main: (args: readonly string[]) => Promise<number | 'help' | 'version'>,
  ): Promise<void> {
    // Whoever waited for the ready line may have closed the pipe since.
    process.stdout.on('error', () => {});
    try {
      const end = await main(process.argv.slice(2));
      if (end === 'help') process.stdout.write(this.#help);
      if (end === 'version') process.stdout.write(`${this.#version()}\n`);
      process.exitCode = typeof end === 'number' ? end : 0;
    } catch (error) {
      this.tellError(error);
      process.exitCode = error instanceof UsageError ? 2 : 1;
    }
    // Nothing is left to do; a mapping leaked under a stuck operation must not keep the process.
    process.stdout.write('', () => process.exit());
  }

  #version(): string {
    return (JSON.parse(readFileSync(this.#manifest, 'utf8')) as { version: string }).version;
  }
}

/** JSON knows no bigint; sizes and counts fit a number. */
function numbers(_key: string, value: unknown): unknown {
  return typeof value === 'bigint' ? Number(value) : value;
}

type Signal = 'SIGINT' | 'SIGTERM' | 'SIGHUP';

/** Signals, in the order they came. */
class Signals {
  readonly #names: readonly Signal[];
  readonly #queue: Signal[] = [];
  #wake: ((signal: Signal) => void) | undefined;

  constructor(hangup: boolean) {
    this.#names = hangup ? ['SIGINT', 'SIGTERM', 'SIGHUP'] : ['SIGINT', 'SIGTERM'];
    for (const name of this.#names) process.on(name, this.#came);
  }

  readonly #came = (name: NodeJS.Signals): void => {
    if (this.#wake === undefined) this.#queue.push(name as Signal);
    else this.#wake(name as Signal);
    this.#wake = undefined;
  };

  next(): Promise<Signal> {
    const waiting = this.#queue.shift();
    if (waiting !== undefined) return Promise.resolve(waiting);
    return new Promise((resolve) => {
      this.#wake = resolve;
    });
  }

  close(): void {
    for (const name of this.#names) process.off(name, this.#came);
  }
}
