// SPDX-License-Identifier: Apache-2.0
/** A program of test/programs as a child process: what it said, and its end. */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import type { WriterPlan } from '../programs/writer.js';

const root = fileURLToPath(new URL('../..', import.meta.url));

/** Bundles a program for plain Node. @returns its file */
export async function buildWriter(name = 'writer'): Promise<string> {
  // Inside the package, so that the program finds its dependencies; by process, so that test files don't meet.
  const outfile = join(root, `build/test/${name}-${process.pid}.mjs`);
  mkdirSync(join(root, 'build/test'), { recursive: true });
  await build({
    entryPoints: [join(root, `test/programs/${name}.ts`)],
    outfile,
    bundle: true,
    platform: 'node',
    format: 'esm',
    target: 'node20',
    packages: 'external',
    logLevel: 'warning',
  });
  return outfile;
}

export class Writer {
  readonly lines: string[] = [];
  /** The last step that may have been begun. */
  issued: number;
  /** The last step that a flush which succeeded covers. */
  flushed: number;
  /** The history's last step before this writer. */
  readonly after: number;
  readonly ended: Promise<void>;
  readonly #child: ChildProcess;
  #errors = '';
  readonly #waiting = new Set<() => void>();

  constructor(program: string, plan: WriterPlan) {
    this.after = plan.history.after ?? 0;
    this.issued = this.after;
    this.flushed = this.after;
    this.#child = spawn(process.execPath, [program, JSON.stringify(plan)], {
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    let rest = '';
    this.#child.stdout?.setEncoding('utf8').on('data', (text: string) => {
      const lines = `${rest}${text}`.split('\n');
      rest = lines.pop() ?? '';
      for (const line of lines) this.#hear(line);
      for (const look of this.#waiting) look();
    });
    this.#child.stderr?.setEncoding('utf8').on('data', (text: string) => (this.#errors += text));
    this.ended = new Promise((resolve) => {
      this.#child.once('close', () => {
        resolve();
        for (const look of this.#waiting) look();
      });
    });
  }

  #hear(line: string): void {
    this.lines.push(line);
    const [, what, step] = /^([if]) (\d+)$/.exec(line) ?? [];
    if (what === 'i') this.issued = Number(step);
    if (what === 'f') this.flushed = Math.max(this.flushed, Number(step));
  }

  get running(): boolean {
    return this.#child.exitCode === null && this.#child.signalCode === null;
  }

  /** Waits until something holds of what it said. @throws Error when it ends before */
  until(holds: (writer: this) => boolean): Promise<void> {
    return new Promise((resolve, reject) => {
      const look = () => {
        if (holds(this)) resolve();
        else if (!this.running)
          reject(new Error(`the writer ended: ${this.lines.slice(-5)} ${this.#errors}`));
        else return;
        this.#waiting.delete(look);
      };
      this.#waiting.add(look);
      look();
    });
  }

  /** As a machine does that is stopped, and goes on later. */
  stop(): void {
    this.#child.kill('SIGSTOP');
  }

  goOn(): void {
    this.#child.kill('SIGCONT');
  }

  /** SIGKILL, and wait until all it said has come. */
  async kill(): Promise<void> {
    this.#child.kill('SIGKILL');
    await this.ended;
  }
}
