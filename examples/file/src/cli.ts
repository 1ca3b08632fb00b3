#!/usr/bin/env node
// SPDX-License-Identifier: Apache-2.0
/**
 * The command line. Standard output gets the one line that others wait for; people are told on standard
 * error. What is created is undone before a regular end; after SIGKILL it stays, and `--recover` takes
 * it back.
 */
import { subscribe } from 'node:diagnostics_channel';
import { readFileSync, unlinkSync } from 'node:fs';
import { setPriority } from 'node:os';
import { TcmuError } from 'tcmu';
import type { StoreFailure } from 'tcmu/scsi';
import { formatSize } from 'tcmu/store';
import { FileStore } from './file-store.js';
import { HELP, type Options, parseOptions, UsageError } from './options.js';
import { type Serving, startServing } from './serving.js';

const REPEAT_AFTER_MS = 10_000;

let json = false;
const told = new Map<string, number>();

/** Tells people something; the same message at most every ten seconds, however often it happens. */
function tell(level: 'info' | 'warning' | 'error', message: string, code?: string): void {
  const now = Date.now();
  if (level !== 'info' && now - (told.get(message) ?? -Infinity) < REPEAT_AFTER_MS) return;
  for (const [old, at] of told) if (now - at >= REPEAT_AFTER_MS) told.delete(old);
  told.set(message, now);
  const prefix = level === 'info' ? '' : `${level}: `;
  process.stderr.write(
    json ? `${JSON.stringify({ level, message, code })}\n` : `tcmu-file: ${prefix}${message}\n`,
  );
}

const warn = (message: string): void => tell('warning', message.replace(/^tcmu: /, ''));

/** Our own errors say it all; of others the stack is wanted. */
function tellError(error: unknown, level: 'warning' | 'error' = 'error'): void {
  if (TcmuError.is(error)) return tell(level, error.message.replace(/^tcmu: /, ''), error.code);
  if (error instanceof UsageError) return tell(level, `${error.message}\nTry tcmu-file --help.`);
  tell(level, error instanceof Error ? (error.stack ?? error.message) : String(error));
}

/** Signals, from the first moment on: one that comes while starting is not lost. */
class Signals {
  readonly #queue: NodeJS.Signals[] = [];
  #wake: ((signal: NodeJS.Signals) => void) | undefined;

  constructor() {
    for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
      process.on(name, () => {
        if (this.#wake === undefined) this.#queue.push(name);
        else this.#wake(name);
        this.#wake = undefined;
      });
    }
  }

  next(): Promise<NodeJS.Signals> {
    const waiting = this.#queue.shift();
    if (waiting !== undefined) return Promise.resolve(waiting);
    return new Promise((resolve) => {
      this.#wake = resolve;
    });
  }
}

function describe(store: FileStore, serving: Serving): string {
  const traits = [
    store.kind,
    formatSize(store.size),
    `blocks of ${store.blockSize} bytes`,
    store.readOnly ? 'read-only' : `write cache ${store.writeCache ? 'on' : 'off'}`,
    ...(store.unmap === undefined ? [] : ['thin']),
  ];
  return `serving ${store.path} (${traits.join(', ')}) as ${serving.name}: ${serving.reach}`;
}

function ready(store: FileStore, { name, uio, disk }: Serving): string {
  if (!json) return `ready name=${name} uio=${uio}${disk === undefined ? '' : ` disk=${disk}`}\n`;
  const { path, size, blockSize, readOnly, writeCache } = store;
  const thin = store.unmap !== undefined;
  const facts = { name, uio, disk, path, size, blockSize, readOnly, writeCache, thin };
  return `${JSON.stringify({ ready: facts })}\n`;
}

/** Serves until it is told to end. @returns the exit code */
async function run(options: Options, signals: Signals): Promise<number> {
  const store = await FileStore.open(options.path, {
    size: options.size,
    blockSize: options.blockSize,
    physicalBlockSize: options.physicalBlockSize,
    readOnly: options.readOnly,
    thick: options.thick,
    writeCache: options.writeCache,
    direct: options.direct,
    io: options.io,
    allowedDirectory: options.allowedDirectory,
    allowShrink: options.allowShrink,
    onWarning: warn,
  });
  const serving = await startServing(store, options, warn).catch((error: unknown) => {
    if (store.created) unlinkSync(store.path);
    throw error;
  });
  const lost = new Promise<'lost'>((resolve) => {
    serving.device.on('error', (error) => {
      tellError(error, 'warning');
      if (serving.device.lost !== undefined) resolve('lost');
    });
    if (serving.device.lost !== undefined) resolve('lost');
  });
  // Of this thread alone, on Linux: the one that serves.
  if (options.nice !== undefined) setPriority(options.nice);
  tell('info', describe(store, serving));
  process.stdout.write(ready(store, serving));

  for (;;) {
    const event = await Promise.race([signals.next(), lost]);
    try {
      if (event === 'SIGHUP') {
        const size = store.fileSize;
        if (size === store.size) tell('info', `the size is still ${formatSize(size)}`);
        else {
          await serving.resize(size);
          tell('info', `resized to ${formatSize(size)}`);
        }
      } else {
        await serving.close();
        return event === 'lost' ? 1 : 0;
      }
    } catch (error) {
      tellError(error);
      // A disk that is mounted is served on; the next signal tries again.
      if (serving.device.closed || event === 'lost') return 1;
    }
  }
}

async function main(): Promise<number> {
  const signals = new Signals();
  try {
    const options = parseOptions(process.argv.slice(2));
    if (options === 'help') {
      process.stdout.write(HELP);
      return 0;
    }
    if (options === 'version') {
      const manifest = readFileSync(new URL('../package.json', import.meta.url), 'utf8');
      process.stdout.write(`${(JSON.parse(manifest) as { version: string }).version}\n`);
      return 0;
    }
    json = options.json;
    subscribe('tcmu:scsi:error', (message) =>
      tellError((message as StoreFailure).error, 'warning'),
    );
    return await run(options, signals);
  } catch (error) {
    tellError(error);
    return error instanceof UsageError ? 2 : 1;
  }
}

// Whoever waited for the ready line may have closed the pipe since.
process.stdout.on('error', () => {});
process.exitCode = await main();
// Nothing is left to do; a mapping leaked under a stuck operation must not keep the process.
process.stdout.write('', () => process.exit());
