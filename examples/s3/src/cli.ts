#!/usr/bin/env -S MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=131072 MALLOC_TRIM_THRESHOLD_=131072 node --max-semi-space-size=1 --single-threaded-gc
// SPDX-License-Identifier: Apache-2.0
/**
 * The command line. Standard output gets results and the one line that others wait for; people are told on
 * standard error. What is created is undone before a regular end; after SIGKILL it stays, and `--recover`
 * takes it back.
 */
import { existsSync, mkdirSync } from 'node:fs';
import { dirname } from 'node:path';
import { type EndReason, Program, UsageError } from 'tcmu/program';
import { formatSize } from 'tcmu/store';
import { connect, parseLocation } from './client/index.js';
import { checkDisk, cloneDisk, createDisk, deleteDisk, readingParts } from './engine/admin.js';
import { DiskError, Gone } from './engine/errors.js';
import { type SweepResult, sweep } from './engine/garbage.js';
import { loadState } from './engine/opening.js';
import { listPins, loadDisk, rotateKeys } from './engine/records.js';
import { type LogLevel, Requests, systemClock } from './engine/requests.js';
import { deleteSnapshot, listSnapshots, pinNow } from './engine/snapshots.js';
import { exportImage, guessFormat, imageSize, importImage, type Progress } from './image.js';
import type { ObjectStore } from './object-store.js';
import { HELP, type Options, parseOptions } from './options.js';
import { type OpenOptions, S3Disk } from './s3-disk.js';
import { startServing } from './serving.js';

const PATIENCE_MS = 60_000;

const program = new Program({
  name: 'tcmu-s3',
  help: HELP,
  manifest: new URL('../package.json', import.meta.url),
});
const tell = (level: LogLevel, message: string, code?: string): void =>
  program.tell(level, message, code);
const say = (text: string, facts: object): void => program.say(text, facts);

/** A progress bar on a terminal; nothing elsewhere. */
function progressBar(what: string): Progress {
  if (!process.stderr.isTTY || program.json) return () => {};
  let shown = -1;
  return (done, all) => {
    const percent = all === 0 ? 100 : Math.floor((done / all) * 100);
    if (percent === shown) return;
    shown = percent;
    const bar = '#'.repeat(Math.floor(percent / 2.5)).padEnd(40, '.');
    process.stderr.write(`\r${what} [${bar}] ${percent} %${percent === 100 ? '\n' : ''}`);
  };
}

interface Place {
  store: ObjectStore;
  prefix: string;
  requests: Requests;
}

async function reach(options: Options): Promise<Place> {
  const { store, prefix } = await connect(options.place, options.connect);
  return { store, prefix, requests: new Requests(store, systemClock, tell, PATIENCE_MS) };
}

async function open(place: Place, options: Options, more: object = {}): Promise<S3Disk> {
  return S3Disk.open(place.store, place.prefix, { ...options.open, onLog: tell, ...more });
}

const commands: Record<
  Exclude<Options['command'], 'serve'>,
  (place: Place, options: Options) => Promise<number>
> = {
  async create({ requests, prefix }, options) {
    const { size = 0, blockSize, chunkSize, compression, key } = options;
    const record = await createDisk(requests, prefix, {
      size,
      blockSize,
      chunkSize,
      compression,
      key,
    });
    say(`created ${options.place}, ${formatSize(size)}`, record);
    return 0;
  },

  async info({ requests, prefix }, { key, place }) {
    const parts = await readingParts(requests, prefix, key);
    const { disk } = parts;
    const { manifest, image, slot, epoch } = await loadState(parts);
    const pins = await listPins(requests, parts.prefix);
    let objects = 0;
    let stored = 0;
    for (const { size } of await requests.list(`${parts.prefix}/`)) {
      objects++;
      stored += size;
    }
    let log = 0;
    for (const { header } of image.segments.values()) log += header.length;
    const facts = {
      id: disk.id,
      size: image.size,
      blockSize: disk.blockSize,
      chunkSize: disk.chunkSize,
      compression: disk.compression,
      encrypted: disk.encrypted,
      created: disk.created,
      origin: disk.origin,
      epoch,
      nextSlot: slot,
      checkpoint: manifest.n,
      logBytes: log,
      logSegments: image.segments.size,
      objects,
      storedBytes: stored,
      pins,
    };
    say(
      [
        `${place}: ${formatSize(image.size)}, blocks of ${disk.blockSize} bytes, id ${disk.id}`,
        `stored: ${objects} objects, ${formatSize(stored)}; of that log ${formatSize(log)} in ${image.segments.size} segments`,
        `chunks of ${formatSize(disk.chunkSize)}, compression ${disk.compression}, ${disk.encrypted ? 'encrypted' : 'not encrypted'}`,
        `opened for writing ${epoch} times, checkpoint ${manifest.n}, created ${disk.created}`,
        ...(disk.origin === undefined ? [] : [`a clone: uses objects of ${disk.origin.prefix}`]),
        ...pins.map(
          ({ kind, name, created, size }) => `${kind} ${name}, ${formatSize(size)}, ${created}`,
        ),
      ].join('\n'),
      facts,
    );
    return 0;
  },

  async check({ requests, prefix }, { key }) {
    const parts = await readingParts(requests, prefix, key);
    const result = await checkDisk(parts, progressBar('check'));
    const { objects, bytes, unused, problems } = result;
    const verdict = problems.length === 0 ? 'all good' : `${problems.length} problems`;
    say(
      [
        ...problems,
        `${objects} objects, ${formatSize(bytes)} read and verified: ${verdict}`,
        ...(unused === 0 ? [] : [`${unused} objects are not needed: tcmu-s3 gc deletes them`]),
      ].join('\n'),
      result,
    );
    return problems.length === 0 ? 0 : 1;
  },

  async gc({ requests, prefix: place }, { key }) {
    const { codec, disk, prefix, ...parts } = await readingParts(requests, place, key);
    const sweepNow = async (): Promise<SweepResult> => {
      const { manifest } = await loadState({ codec, disk, prefix, ...parts });
      return sweep(requests, codec, prefix, disk, manifest);
    };
    // A writer at work may have replaced that manifest in between.
    const result = await sweepNow().catch((error: unknown) => {
      if (error instanceof Gone) return sweepNow();
      throw error;
    });
    const { deleted, bytesDeleted, kept } = result;
    say(`${deleted} objects deleted, ${formatSize(bytesDeleted)}; ${kept} kept`, result);
    return 0;
  },

  async snapshot({ requests, prefix }, { key, argument }) {
    const parts = await readingParts(requests, prefix, key);
    const pin = await pinNow(parts, { name: argument, kind: 'snapshot' });
    say(`snapshot ${pin.name}: what was flushed by ${pin.created}`, pin);
    return 0;
  },

  async snapshots({ requests, prefix }) {
    const pins = await listSnapshots(requests, prefix);
    const lines = pins.map(
      ({ name, kind, size, created, clone }) =>
        `${name}  ${formatSize(size)}  ${created}${kind === 'clone' ? `  needed by ${clone}` : ''}`,
    );
    say(lines.join('\n'), pins);
    return 0;
  },

  async 'snapshot-delete'(place, options) {
    await deleteSnapshot(place.requests, place.prefix, options.argument);
    return commands.gc(place, options);
  },

  async clone({ requests, prefix }, options) {
    const { key, argument, snapshot } = options;
    const source = parseLocation(options.place);
    const target = parseLocation(argument);
    if (source.bucket !== target.bucket) {
      throw new UsageError('a clone uses its origin’s objects: it must be in the same bucket');
    }
    const record = await cloneDisk(requests, prefix, snapshot, target.prefix, key);
    say(`cloned to ${argument}`, record);
    return 0;
  },

  async import(place, options) {
    const { argument, key, blockSize, chunkSize, compression } = options;
    const format = await guessFormat(argument);
    const bytes = await imageSize(argument, format);
    try {
      await loadDisk(place.requests, place.prefix);
    } catch (error) {
      if (!(error instanceof DiskError) || error.failure !== 'not-a-disk') throw error;
      const unit = blockSize ?? 4096;
      const size = options.size ?? Math.max(1024 * 1024, Math.ceil(bytes / unit) * unit);
      const create = { size, blockSize, chunkSize, compression, key };
      await createDisk(place.requests, place.prefix, create);
    }
    const disk = await open(place, options);
    try {
      await importImage(argument, format, disk, progressBar('import'));
      await disk.checkpoint();
    } finally {
      await disk.close();
    }
    say(`${formatSize(bytes)} imported`, { bytes });
    return 0;
  },

  async export(place, options) {
    const { argument } = options;
    const format = await guessFormat(argument);
    const disk = await open(place, options, { mode: 'follow', watchMs: 0, readAhead: false });
    try {
      await exportImage(disk, argument, format, progressBar('export'));
      say(`${formatSize(disk.size)} exported`, { bytes: disk.size });
    } finally {
      await disk.close();
    }
    return 0;
  },

  async rekey({ requests, prefix }, { key, newKey, place }) {
    if (key === undefined || newKey === undefined) throw new UsageError('rekey needs two keys');
    const disk = await loadDisk(requests, prefix);
    if (!disk.encrypted) throw new UsageError(`${place} is not encrypted`);
    await rotateKeys(requests, prefix, disk, key, newKey);
    say('the new key opens the disk, the old one does not', { rotated: true });
    return 0;
  },

  async delete({ requests, prefix }, { force, place }) {
    const objects = await deleteDisk(requests, prefix, force);
    say(`${place} deleted, ${objects} objects`, { objects });
    return 0;
  },
};

/** What makes a killed server lose nothing. @throws UsageError */
function restarting({ restartFile, open, device }: Options): OpenOptions {
  if (restartFile === undefined) return {};
  if (open.journal !== undefined) {
    if (!existsSync(restartFile)) return {};
    throw new UsageError(
      `${restartFile} holds what a killed server had acknowledged: serve once without --journal-on-this-host, or delete it`,
    );
  }
  try {
    mkdirSync(dirname(restartFile), { recursive: true, mode: 0o700 });
  } catch (error) {
    throw new UsageError(
      `${(error as Error).message}: give --restart-file FILE, or none (what a killed server has not flushed is lost then)`,
    );
  }
  // What was never flushed is no reason not to start; a device that has outlived us believes it written.
  return { restartFile, discardJournal: open.discardJournal === true || device.recover === false };
}

async function start(place: Place, options: Options) {
  const disk = await open(place, options, restarting(options));
  if (options.size !== undefined && options.size !== disk.size) {
    if (options.size < disk.size && !options.allowShrink) {
      await disk.close();
      throw new UsageError(`--size is less than the disk’s ${disk.size} bytes: say --allow-shrink`);
    }
    await disk.resize(options.size);
  }
  const served = await startServing(disk, options, program.warn);
  const traits = [
    formatSize(disk.size),
    `blocks of ${disk.blockSize} bytes`,
    disk.snapshotName !== undefined
      ? `snapshot ${disk.snapshotName}`
      : disk.readOnly
        ? 'following'
        : `epoch ${disk.epoch}, write cache ${disk.writeCache ? 'on' : 'off'}`,
    ...(options.open.journal === undefined
      ? []
      : [`flushes are durable on THIS HOST ONLY, in ${options.open.journal}`]),
  ];
  const timer = options.statisticsSeconds;
  const reporting =
    timer === undefined
      ? undefined
      : setInterval(() => {
          process.stderr.write(`${JSON.stringify({ statistics: disk.statistics() })}\n`);
        }, timer * 1000);
  return {
    served,
    what: `${options.place} (${traits.join(', ')})`,
    facts: { size: disk.size, blockSize: disk.blockSize },
    close: async (reason: EndReason) => {
      tell('info', `${reason}: making everything durable`);
      await served.close();
      clearInterval(reporting);
    },
  };
}

await program.run(async (args) => {
  const options = parseOptions(args);
  if (typeof options === 'string') return options;
  program.json = options.json;
  const place = await reach(options);
  try {
    if (options.command === 'serve') return await program.serve(() => start(place, options));
    return await commands[options.command](place, options);
  } finally {
    await place.store.close();
  }
});
