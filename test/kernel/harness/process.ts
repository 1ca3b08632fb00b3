// SPDX-License-Identifier: Apache-2.0
/**
 * Child processes of a scenario. Each is logged, lives in a process group of its own, and is killed by that
 * group when the scenario ends; nothing here blocks the harness, whatever state the child is in.
 */
import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import { constants } from 'node:os';
import { LineSplitter } from '../../vm/vm.js';

export interface ShResult {
  code: number;
  stdout: string;
  stderr: string;
}

export interface StartOptions {
  /** Shown before each of its lines in the log. */
  name: string;
  env?: Readonly<Record<string, string>>;
  /** Print its output in the scenario's log; it is collected either way. Default true. */
  echo?: boolean;
}

/** A process that runs beside the scenario. */
export class Proc {
  readonly name: string;
  readonly child: ChildProcess;
  readonly lines: string[] = [];
  /** Settles when it is gone; never rejects. */
  readonly exited: Promise<{ code: number | null; signal: NodeJS.Signals | null }>;
  #gone = false;
  #watchers = new Set<() => void>();

  constructor(argv: readonly string[], options: StartOptions, log: (text: string) => void) {
    const [program, ...args] = argv;
    assert(program !== undefined, 'a process needs a program');
    this.name = options.name;
    this.child = spawn(program, args, {
      detached: true,
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, ...options.env },
    });
    for (const stream of [this.child.stdout, this.child.stderr]) {
      const splitter = new LineSplitter((line) => {
        this.lines.push(line);
        if (options.echo !== false) log(`${this.name}| ${line}`);
        for (const watcher of this.#watchers) watcher();
      });
      stream?.setEncoding('utf8').on('data', (text: string) => splitter.push(text));
      stream?.on('close', () => splitter.end());
    }
    this.exited = new Promise((resolve) => {
      const end = (code: number | null, signal: NodeJS.Signals | null): void => {
        if (this.#gone) return;
        this.#gone = true;
        log(`${this.name}: ended with ${signal ?? `code ${code}`}`);
        for (const watcher of this.#watchers) watcher();
        resolve({ code, signal });
      };
      this.child.once('error', (error) => {
        log(`${this.name}: ${error.message}`);
        end(127, null);
      });
      this.child.once('close', end);
    });
  }

  get pid(): number {
    assert(this.child.pid !== undefined, `${this.name} did not start`);
    return this.child.pid;
  }

  get running(): boolean {
    return !this.#gone;
  }

  get output(): string {
    return this.lines.join('\n');
  }

  /** Resolves with the first line (past ones too) that matches; rejects when it ends or takes too long. */
  line(pattern: RegExp, seconds = 30): Promise<RegExpExecArray> {
    let seen = 0;
    return new Promise((resolve, reject) => {
      const done = (settle: () => void): void => {
        clearTimeout(timer);
        this.#watchers.delete(look);
        settle();
      };
      const look = (): void => {
        for (; seen < this.lines.length; seen++) {
          const match = pattern.exec(this.lines[seen] as string);
          if (match !== null) return done(() => resolve(match));
        }
        if (this.#gone)
          done(() => reject(new Error(`${this.name} ended before printing ${pattern}`)));
      };
      const timer = setTimeout(
        () =>
          done(() =>
            reject(new Error(`${this.name} printed no ${pattern} within ${seconds * slowness} s`)),
          ),
        seconds * slowness * 1000,
      );
      this.#watchers.add(look);
      look();
    });
  }

  /** Signals the process alone (its children live on, as after a crash). */
  kill(signal: NodeJS.Signals = 'SIGTERM'): void {
    if (this.running) this.child.kill(signal);
  }

  /** Asks it to end and expects that it does so with code 0. */
  async stop(seconds = 30): Promise<void> {
    this.kill('SIGTERM');
    const { code, signal } = await this.wait(seconds);
    assert.equal(signal ?? code, 0, `${this.name} did not end cleanly`);
  }

  /** Waits for its end. */
  wait(seconds = 30): Promise<{ code: number | null; signal: NodeJS.Signals | null }> {
    return within(this.exited, seconds, `${this.name} (pid ${this.child.pid}) to end`);
  }

  /** SIGKILL to the whole group; for the end of a scenario. */
  destroy(): void {
    if (this.child.pid === undefined) return;
    try {
      process.kill(-this.child.pid, constants.signals.SIGKILL);
    } catch {
      // ESRCH: all of it is gone.
    }
  }
}

/** How much more time everything is given: a kernel that checks itself is slow. `TCMU_TEST_SLOWNESS`, 1. */
export const slowness = Number(process.env['TCMU_TEST_SLOWNESS'] ?? 1);

/** A promise with a limit, times `slowness`; the error names what was waited for. */
export async function within<T>(promise: Promise<T>, limit: number, what: string): Promise<T> {
  const seconds = limit * slowness;
  let timer: NodeJS.Timeout | undefined;
  try {
    return await Promise.race([
      promise,
      new Promise<never>((_, reject) => {
        timer = setTimeout(
          () => reject(new Error(`waited ${seconds} s for ${what}`)),
          seconds * 1000,
        );
      }),
    ]);
  } finally {
    clearTimeout(timer);
  }
}
