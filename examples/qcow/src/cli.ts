#!/usr/bin/env node
// SPDX-License-Identifier: Apache-2.0
/**
 * The command line. Standard output gets what others read: the ready line, information, lists; people
 * are told on standard error.
 */
import { subscribe } from 'node:diagnostics_channel';
import { readFileSync } from 'node:fs';
import { setPriority } from 'node:os';
import { type Served, serve, TcmuError } from 'tcmu';
import type { StoreFailure } from 'tcmu/scsi';
import { formatSize } from 'tcmu/store';
import { commitImage, rebaseImage } from './chain.js';
import { listen, type Request, send } from './control.js';
import { createImage } from './create.js';
import { type OpenOptions, openImage } from './open.js';
import {
  type Command,
  HELP,
  parseCommand,
  type ServeCommand,
  type SnapshotAction,
  UsageError,
} from './options.js';
import { QcowStore } from './qcow-store.js';
import { resizeImage } from './resize.js';
import { type SnapshotInfo, Snapshots } from './snapshots.js';
import { checkImage, imageInfo } from './tools.js';

let json = false;

function tell(level: 'info' | 'warning' | 'error', message: string, code?: string): void {
  const text = message.replace(/^tcmu: /, '');
  const prefix = level === 'info' ? '' : `${level}: `;
  process.stderr.write(
    json ? `${JSON.stringify({ level, message: text, code })}\n` : `tcmu-qcow: ${prefix}${text}\n`,
  );
}

const warn = (message: string): void => tell('warning', message);

function tellError(error: unknown, level: 'warning' | 'error' = 'error'): void {
  if (error instanceof UsageError) return tell(level, `${error.message}\nTry tcmu-qcow --help.`);
  if (TcmuError.is(error)) return tell(level, error.message, error.code);
  tell(level, error instanceof Error ? error.message : String(error));
}

function print(value: unknown, text: string): void {
  process.stdout.write(
    json
      ? `${JSON.stringify(value, (_key, one) => (typeof one === 'bigint' ? Number(one) : one))}\n`
      : text,
  );
}

/** Signals, from the first moment on: one that comes while starting is not lost. */
class Signals {
  readonly #queue: NodeJS.Signals[] = [];
  #wake: ((signal: NodeJS.Signals) => void) | undefined;

  constructor() {
    for (const name of ['SIGINT', 'SIGTERM'] as const) {
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

function snapshotAction(snapshots: Snapshots, what: SnapshotAction): Promise<unknown> {
  switch (what.action) {
    case 'list':
      return Promise.resolve(snapshots.list());
    case 'create':
      return snapshots.create(what.name);
    case 'revert':
      return snapshots.revert(what.name);
    case 'delete':
      return snapshots.delete(what.name);
  }
}

/** A request to a running server. The disk's size follows a snapshot that had another one. */
async function handle(request: Request, store: QcowStore, served: Served): Promise<unknown> {
  if (request.action === 'resize') return served.resize(request.size);
  const before = store.size;
  const result = await snapshotAction(store.snapshots, request);
  if (store.size !== before) await served.resize(store.size);
  return result;
}

/** Serves until it is told to end. @returns the exit code */
async function serveImage(command: ServeCommand, signals: Signals): Promise<number> {
  const { path, name, serial, device } = command;
  subscribe('tcmu:scsi:error', (message) => tellError((message as StoreFailure).error, 'warning'));
  const store = await QcowStore.open(path, {
    ...command.open,
    blockSize: command.blockSize,
    writeCache: command.writeCache,
    allowShrink: command.allowShrink,
    onWarning: warn,
  });
  const served = await serve(store, {
    name,
    subtype: 'qcow',
    configuration: path,
    signals: false,
    scsi: { product: 'Qcow', ...(serial === undefined ? {} : { serial }) },
    ...device,
  });
  const control =
    command.control === undefined
      ? undefined
      : await listen(command.control, (request) => handle(request, store, served)).catch(
          async (error: unknown) => {
            await served.close();
            throw error;
          },
        );
  const lost = new Promise<'lost'>((resolve) => {
    served.device.on('error', (error) => {
      tellError(error, 'warning');
      if (served.device.lost !== undefined) resolve('lost');
    });
    if (served.device.lost !== undefined) resolve('lost');
  });
  if (command.nice !== undefined) setPriority(command.nice);
  const { disk, uioPath: uio } = served;
  const where = disk ?? served.iscsi?.url ?? uio;
  tell('info', `serving ${path} (${formatSize(store.size)}) as ${name}: ${where}`);
  const suffix = disk === undefined ? '' : ` disk=${disk}`;
  print({ ready: { name, uio, disk, path } }, `ready name=${name} uio=${uio}${suffix}\n`);
  for (;;) {
    const event = await Promise.race([signals.next(), lost]);
    try {
      await served.close();
      control?.close();
      return event === 'lost' ? 1 : 0;
    } catch (error) {
      tellError(error);
      // A disk that is mounted is served on; the next signal tries again.
      if (served.device.closed || event === 'lost') return 1;
    }
  }
}

function listText(snapshots: readonly SnapshotInfo[]): string {
  return snapshots
    .map(
      (one) => `${one.id}\t${one.name}\t${one.date.toISOString()}\t${formatSize(one.diskSize)}\n`,
    )
    .join('');
}

/** A snapshot operation on an image that is not being served. */
async function offline(path: string, what: SnapshotAction, open: OpenOptions): Promise<unknown> {
  const readOnly = what.action === 'list';
  const image = await openImage(path, { ...open, readOnly, onWarning: warn });
  try {
    return await snapshotAction(new Snapshots(image), what);
  } finally {
    await image.close();
  }
}

async function run(command: Command, signals: Signals): Promise<number> {
  switch (command.command) {
    case 'help':
      process.stdout.write(HELP);
      return 0;
    case 'version': {
      const manifest = readFileSync(new URL('../package.json', import.meta.url), 'utf8');
      process.stdout.write(`${(JSON.parse(manifest) as { version: string }).version}\n`);
      return 0;
    }
    case 'serve':
      return serveImage(command, signals);
    case 'create':
      await createImage(command.path, command.options);
      return 0;
    case 'info': {
      const info = await imageInfo(command.path, command.open);
      const lines = Object.entries(info).flatMap(([key, value]) => {
        if (value === undefined || value === false) return [];
        if (Array.isArray(value)) return value.map((one) => `${key}: ${JSON.stringify(one)}\n`);
        return [`${key}: ${typeof value === 'object' ? JSON.stringify(value) : value}\n`];
      });
      print(info, lines.join(''));
      return 0;
    }
    case 'check': {
      const { repair } = command;
      const check = await checkImage(command.path, { ...command.open, repair });
      const { errors, leaks, repaired, allocatedClusters, totalClusters, messages } = check;
      print(
        check,
        `${messages.map((message) => `${message}\n`).join('')}${errors} errors, ${leaks} leaked clusters${
          repair === undefined ? '' : `; repaired ${repaired.errors} and ${repaired.leaks}`
        }\n${allocatedClusters} of ${totalClusters} clusters allocated\n`,
      );
      return errors > 0 ? 4 : leaks > 0 ? 3 : 0;
    }
    case 'snapshot': {
      const { what, on, open } = command;
      const result =
        'control' in on ? await send(on.control, what) : await offline(on.image, what, open);
      if (what.action === 'list') {
        const list = (result as SnapshotInfo[]).map((one) => ({
          ...one,
          date: new Date(one.date),
        }));
        print(list, listText(list));
      }
      return 0;
    }
    case 'resize': {
      const { on, size, allowShrink } = command;
      if ('control' in on) {
        await send(on.control, { action: 'resize', size });
        return 0;
      }
      const image = await openImage(on.image, { ...command.open, onWarning: warn });
      try {
        if (size < image.size && !allowShrink) {
          throw new UsageError(
            `this cuts data off: ${image.size} bytes become ${size}; say --allow-shrink`,
          );
        }
        await resizeImage(image, size);
      } finally {
        await image.close();
      }
      return 0;
    }
    case 'commit':
      await commitImage(command.path, { ...command.open, keep: command.keep, onWarning: warn });
      return 0;
    case 'rebase': {
      const { path, backing, format, unsafe, open } = command;
      await rebaseImage(path, backing, {
        ...open,
        backingFormat: format,
        unsafe,
        onWarning: warn,
      });
      return 0;
    }
  }
}

async function main(): Promise<number> {
  const signals = new Signals();
  try {
    const parsed = parseCommand(process.argv.slice(2));
    json = parsed.json;
    return await run(parsed.command, signals);
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
