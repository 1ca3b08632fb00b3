#!/usr/bin/env node
// SPDX-License-Identifier: Apache-2.0
/**
 * The command line. Standard output gets what others read: the ready line, information, lists; people
 * are told on standard error.
 */
import { setPriority } from 'node:os';
import { type Served, serve } from 'tcmu';
import { Program, UsageError } from 'tcmu/program';
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
} from './options.js';
import { QcowStore } from './qcow-store.js';
import { resizeImage } from './resize.js';
import { type SnapshotInfo, Snapshots } from './snapshots.js';
import { checkImage, imageInfo } from './tools.js';

const program = new Program({
  name: 'tcmu-qcow',
  help: HELP,
  manifest: new URL('../package.json', import.meta.url),
});
const { warn } = program;

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

async function start(command: ServeCommand) {
  const { path, name, serial, express, device } = command;
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
    express,
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
  if (command.nice !== undefined) setPriority(command.nice);
  return {
    served,
    what: `${path} (${formatSize(store.size)})`,
    facts: { path },
    close: async () => {
      await served.close();
      control?.close();
    },
  };
}

function listText(snapshots: readonly SnapshotInfo[]): string {
  return snapshots
    .map((one) => `${one.id}\t${one.name}\t${one.date.toISOString()}\t${formatSize(one.diskSize)}`)
    .join('\n');
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

async function run(command: Command): Promise<number | 'help' | 'version'> {
  switch (command.command) {
    case 'help':
    case 'version':
      return command.command;
    case 'serve':
      return program.serve(() => start(command));
    case 'create':
      await createImage(command.path, command.options);
      return 0;
    case 'info': {
      const info = await imageInfo(command.path, command.open);
      const lines = Object.entries(info).flatMap(([key, value]) => {
        if (value === undefined || value === false) return [];
        if (Array.isArray(value)) return value.map((one) => `${key}: ${JSON.stringify(one)}`);
        return [`${key}: ${typeof value === 'object' ? JSON.stringify(value) : value}`];
      });
      program.say(lines.join('\n'), info);
      return 0;
    }
    case 'check': {
      const { repair } = command;
      const check = await checkImage(command.path, { ...command.open, repair });
      const { errors, leaks, repaired, allocatedClusters, totalClusters, messages } = check;
      program.say(
        [
          ...messages,
          `${errors} errors, ${leaks} leaked clusters${
            repair === undefined ? '' : `; repaired ${repaired.errors} and ${repaired.leaks}`
          }`,
          `${allocatedClusters} of ${totalClusters} clusters allocated`,
        ].join('\n'),
        check,
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
        program.say(listText(list), list);
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

await program.run(async (args) => {
  const { command, json } = parseCommand(args);
  program.json = json;
  return run(command);
});
