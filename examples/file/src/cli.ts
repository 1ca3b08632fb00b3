#!/usr/bin/env node
// SPDX-License-Identifier: Apache-2.0
/**
 * The command line. Standard output gets the one line that others wait for; people are told on standard
 * error. What is created is undone before a regular end; after SIGKILL it stays, and `--recover` takes
 * it back.
 */
import { unlinkSync } from 'node:fs';
import { setPriority } from 'node:os';
import { Program } from 'tcmu/program';
import { formatSize } from 'tcmu/store';
import { FileStore } from './file-store.js';
import { HELP, type Options, parseOptions } from './options.js';
import { startServing } from './serving.js';

const program = new Program({
  name: 'tcmu-file',
  help: HELP,
  manifest: new URL('../package.json', import.meta.url),
});

function describe(store: FileStore): string {
  const traits = [
    store.kind,
    formatSize(store.size),
    `blocks of ${store.blockSize} bytes`,
    store.readOnly ? 'read-only' : `write cache ${store.writeCache ? 'on' : 'off'}`,
    ...(store.unmap === undefined ? [] : ['thin']),
  ];
  return `${store.path} (${traits.join(', ')})`;
}

async function start(options: Options) {
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
    onWarning: program.warn,
  });
  const served = await startServing(store, options, program.warn).catch((error: unknown) => {
    if (store.created) unlinkSync(store.path);
    throw error;
  });
  // Of this thread alone, on Linux: the one that serves.
  if (options.nice !== undefined) setPriority(options.nice);
  const { path, size, blockSize, readOnly, writeCache } = store;
  const thin = store.unmap !== undefined;
  const facts = { path, size, blockSize, readOnly, writeCache, thin };
  return { store, served, what: describe(store), facts };
}

await program.run(async (args) => {
  const options = parseOptions(args);
  if (typeof options === 'string') return options;
  program.json = options.json;
  return program.serve(
    () => start(options),
    async ({ store, served }) => {
      const size = store.fileSize;
      if (size === store.size) {
        program.tell('info', `the size is still ${formatSize(size)}`);
        return;
      }
      await served.resize(size);
      program.tell('info', `resized to ${formatSize(size)}`);
    },
  );
});
