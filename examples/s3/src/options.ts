// SPDX-License-Identifier: Apache-2.0
/** The command line: what may be said, and what it means. Nothing is opened here but key and password files. */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { basename, join } from 'node:path';
import {
  CommandLine,
  DEVICE_OPTIONS,
  deviceOptions,
  FLAG,
  secretFile,
  TEXT,
  UsageError,
} from 'tcmu/program';
import {
  CONNECT_HELP,
  CONNECT_OPTIONS,
  type ConnectOptions,
  type ConnectValues,
  connectOptions,
} from './client/index.js';
import type { Compression } from './engine/blob.js';
import type { KeySource } from './engine/records.js';
import type { OpenOptions } from './s3-disk.js';

export const HELP = `A disk in a bucket of any S3-compatible store, served as a SCSI disk of this machine or over iSCSI.

  tcmu-s3 create <place> --size 100G [--compression deflate] [--key-file F]
  tcmu-s3 serve <place> --name d0 [options]
  tcmu-s3 info | check | gc | snapshots <place>
  tcmu-s3 snapshot | snapshot-delete <place> <name>       also while the disk is served
  tcmu-s3 clone <place> <new place> [--snapshot NAME]     writable at once, nothing is copied
  tcmu-s3 import <place> <file>                           raw or qcow2; creates the disk if need be
  tcmu-s3 export <place> <file> [--snapshot NAME]         the same way out (FILE.qcow2: qcow2)
  tcmu-s3 rekey <place> --key-file OLD --new-key-file NEW
  tcmu-s3 delete <place> [--force]

A place is s3://bucket/prefix; the bucket must exist.

create, import
  --size <size>            512M, 10G, 4T …; nothing is taken before it is written. import: the image's
  --block-size <bytes>     512 or 4096 (default)
  --chunk-size <size>      256K to 64M. Default 1M
  --compression <how>      none (default), deflate, zstd (Node.js 22.15 or later)
  --key-file <file>        encrypt on this side, with the 32 bytes (or 64 hexadecimal digits) in this file …
  --key-command <command>  … or that this command prints

serve
  --name <name>            name of the backstore, unique on this machine
  --read-only              follow the disk that another one writes
  --snapshot <name>        serve this snapshot, read-only
  --size <size>            make the disk longer; shorter only with --allow-shrink
  --cache <size>           memory for data. Default 64M
  --map-memory <size>      memory for the map of what is where (160 KiB a GiB written). Default 32M
  --cache-file <file>      keep what was read in this local file, also over restarts …
  --cache-file-size <size> … of this size. Default 1G
  --dirty <size>           most data acknowledged and not yet in the bucket. Default 64M
  --log <size>             log kept before it is moved into chunks. Default 512M
  --uploads <n>            1 to 16 at a time. Default 8
  --write-back <seconds>   send what is written without waiting for a flush. Default 2
  --no-write-cache         answer each write when it is in the bucket
  --restart-file <file>    keep what is acknowledged and not in the bucket here too, so that a killed server
                           loses none of it. Default: one in $STATE_DIRECTORY, else /var/lib/tcmu-s3; or: none
  --journal-on-this-host <file>   answer flushes when they are on THIS host's disk. Losing the host loses
                           them; a killed server loses nothing acknowledged
  --discard-journal        throw away what a journal or restart file holds and can't be applied any more
  --fencing none           take a store that can't keep two writers apart; make sure yourself
  --lease <seconds>        answer from memory for that long after knowing that the disk is still ours; a server that takes
                           over from one that was killed waits as long. Default 10; 0: neither
  --assume-dead            don't wait: I know that the server before this one is dead
  --patience <seconds>     tell the initiator NOT READY after that long without the bucket. Default 25
  --statistics <seconds>   a line of counters, as JSON, on the standard error

Who gets it (as tcmu-file's)
  --export <fabric>        loopback (default): /dev/sdX here; iscsi; vhost: QEMU's vhost-scsi; none
  --iqn <name>  --portal <address>  --initiator <name>  --anyone  --chap-user <name>  --chap-password-file <file>
  --max-sectors <n>  --data-area-mb <n>  --ring-mb <n>  --timeout <seconds>  --concurrency <n>
  --serial <text>          what initiators know the disk by. Default: made from the disk's id
  --recover                take back the device of that name that a killed server left
  --uio <device>           serve a device that exists, and touch no configfs

${CONNECT_HELP}
  --json                   results, the ready line and messages as JSON
  --help, --version

When it serves, it prints one line: ready name=d0 uio=/dev/uio0 disk=/dev/sda (disk= for loopback only).
SIGINT, SIGTERM: make everything durable, remove what was created, exit.
Exit codes: 0 done, 1 failure (check: something is wrong), 2 wrong usage.
`;

export const COMMANDS = [
  'create',
  'serve',
  'info',
  'check',
  'gc',
  'snapshot',
  'snapshots',
  'snapshot-delete',
  'clone',
  'import',
  'export',
  'rekey',
  'delete',
] as const;
export type CommandName = (typeof COMMANDS)[number];

/** Arguments after the place. */
const ARGUMENTS: Partial<Record<CommandName, string>> = {
  snapshot: 'a name for the snapshot',
  'snapshot-delete': 'the name of the snapshot',
  clone: 'the place of the clone',
  import: 'the image to read',
  export: 'the file to write',
};

export interface Options {
  command: CommandName;
  place: string;
  /** What comes after the place. */
  argument: string;
  connect: ConnectOptions;
  json: boolean;
  force: boolean;
  size: number | undefined;
  allowShrink: boolean;
  blockSize: number | undefined;
  chunkSize: number | undefined;
  compression: Compression | undefined;
  key: KeySource | undefined;
  newKey: KeySource | undefined;
  snapshot: string | undefined;
  open: OpenOptions;
  /** Where a killed server's acknowledged changes are; the folder may have to be made. */
  restartFile: string | undefined;
  statisticsSeconds: number | undefined;
  name: string;
  device: ReturnType<typeof deviceOptions>;
  serial: string | undefined;
  uio: string | undefined;
}

const OPTIONS = {
  ...CONNECT_OPTIONS,
  size: TEXT,
  'allow-shrink': FLAG,
  'block-size': TEXT,
  'chunk-size': TEXT,
  compression: TEXT,
  'key-file': TEXT,
  'key-command': TEXT,
  'new-key-file': TEXT,
  'new-key-command': TEXT,
  snapshot: TEXT,
  force: FLAG,
  name: TEXT,
  'read-only': FLAG,
  cache: TEXT,
  'map-memory': TEXT,
  'cache-file': TEXT,
  'cache-file-size': TEXT,
  dirty: TEXT,
  log: TEXT,
  uploads: TEXT,
  'write-back': TEXT,
  'no-write-cache': FLAG,
  'journal-on-this-host': TEXT,
  'restart-file': TEXT,
  'discard-journal': FLAG,
  fencing: TEXT,
  patience: TEXT,
  lease: TEXT,
  'assume-dead': FLAG,
  statistics: TEXT,
  ...DEVICE_OPTIONS,
  serial: TEXT,
  uio: TEXT,
  json: FLAG,
  help: { ...FLAG, short: 'h' },
  version: FLAG,
} as const;

type Line = CommandLine<keyof typeof OPTIONS>;

/** @throws UsageError */
export function parseOptions(
  args: readonly string[],
  env: NodeJS.ProcessEnv = process.env,
): Options | 'help' | 'version' {
  const line: Line = new CommandLine(args, OPTIONS);
  if (line.flag('help')) return 'help';
  if (line.flag('version')) return 'version';
  const [word, place, ...more] = line.words;
  const command = COMMANDS.find((known) => known === word);
  if (command === undefined) throw new UsageError(`what to do? One of ${COMMANDS.join(', ')}`);
  if (place === undefined) throw new UsageError('where is the disk? Give s3://bucket/prefix');
  const wanted = ARGUMENTS[command];
  if (wanted !== undefined && more.length === 0) throw new UsageError(`${command}: give ${wanted}`);
  const extra = more[wanted === undefined ? 0 : 1];
  if (extra !== undefined) throw new UsageError(`${extra} is too much`);
  const size = line.size('size');
  if (command === 'create' && size === undefined) throw new UsageError('--size is missing');
  const key = keySource(line, 'key-file', 'key-command');
  const newKey = keySource(line, 'new-key-file', 'new-key-command');
  if (command === 'rekey' && (key === undefined || newKey === undefined)) {
    throw new UsageError('rekey needs the old key and the new one: --key-file, --new-key-file');
  }
  if (command === 'serve' && !line.has('name') && !line.has('uio')) {
    throw new UsageError('--name is missing: name the backstore');
  }
  const uio = line.text('uio');
  return {
    command,
    place,
    argument: more[0] ?? '',
    connect: connectionOf(line, env),
    json: line.flag('json'),
    force: line.flag('force'),
    size,
    allowShrink: line.flag('allow-shrink'),
    blockSize: line.number('block-size', { oneOf: [512, 4096] }),
    chunkSize: line.size('chunk-size'),
    compression: line.choice('compression', ['none', 'deflate', 'zstd']),
    key,
    newKey,
    snapshot: line.text('snapshot'),
    open: openOptions(line, key),
    restartFile: command === 'serve' ? restartFile(line, place, env) : undefined,
    statisticsSeconds: line.number('statistics'),
    name: line.text('name') ?? '',
    device: deviceOptions(line, env, uio === undefined ? 'loopback' : 'none'),
    serial: line.text('serial'),
    uio,
  };
}

function connectionOf(line: Line, env: NodeJS.ProcessEnv): ConnectOptions {
  const names = Object.keys(CONNECT_OPTIONS) as (keyof typeof CONNECT_OPTIONS)[];
  const values = names.map((name) => [name, line.text(name) ?? (line.flag(name) || undefined)]);
  try {
    return connectOptions(Object.fromEntries(values) as ConnectValues, env);
  } catch (error) {
    throw new UsageError((error as Error).message, error);
  }
}

function openOptions(line: Line, key: KeySource | undefined): OpenOptions {
  const seconds = (option: 'write-back' | 'patience' | 'lease'): number | undefined => {
    const value = line.number(option, { least: option === 'lease' ? 0 : 1 });
    return value === undefined ? undefined : value * 1000;
  };
  return {
    mode: line.flag('read-only') ? 'follow' : 'write',
    snapshot: line.text('snapshot'),
    key,
    fencing: line.choice('fencing', ['required', 'none']),
    writeCache: !line.flag('no-write-cache'),
    dirtyLimit: line.size('dirty'),
    cacheSize: line.size('cache'),
    mapSize: line.size('map-memory'),
    logLimit: line.size('log'),
    uploads: line.number('uploads'),
    writeBackMs: seconds('write-back'),
    patienceMs: seconds('patience'),
    leaseMs: seconds('lease'),
    assumeDead: line.flag('assume-dead'),
    cacheFile: line.text('cache-file'),
    cacheFileSize: line.size('cache-file-size'),
    journal: line.text('journal-on-this-host'),
    discardJournal: line.flag('discard-journal'),
  };
}

/** A file for this disk under this name: a process that takes the disk over here has another one. */
function restartFile(line: Line, place: string, env: NodeJS.ProcessEnv): string | undefined {
  const given = line.text('restart-file');
  if (given === 'none' || line.flag('read-only') || line.has('snapshot')) return undefined;
  if (given !== undefined) {
    if (!line.has('journal-on-this-host')) return given;
    throw new UsageError('--restart-file and --journal-on-this-host exclude each other');
  }
  const name = line.text('name') ?? basename(line.text('uio') ?? '');
  const id = createHash('sha256').update(`${place}\n${name}`).digest('hex').slice(0, 16);
  return join(env['STATE_DIRECTORY'] ?? '/var/lib/tcmu-s3', `restart-${id}`);
}

/** The key is read when it is wanted, and kept nowhere. */
function keySource(
  line: Line,
  fileOption: 'key-file' | 'new-key-file',
  commandOption: 'key-command' | 'new-key-command',
): KeySource | undefined {
  const file = line.text(fileOption);
  const command = line.text(commandOption);
  if (file !== undefined && command !== undefined) {
    throw new UsageError(`--${fileOption} and --${commandOption} exclude each other`);
  }
  if (file !== undefined) {
    const what = `--${fileOption} ${file}`;
    return () => keyFrom(what, () => secretFile(what, file));
  }
  if (command === undefined) return undefined;
  return () =>
    keyFrom(`--${commandOption}`, () =>
      execFileSync('/bin/sh', ['-c', command], { stdio: ['ignore', 'pipe', 'inherit'] }),
    );
}

function keyFrom(what: string, get: () => Buffer): Buffer {
  let bytes: Buffer;
  try {
    bytes = get();
  } catch (error) {
    if (error instanceof UsageError) throw error;
    throw new UsageError(`${what}: ${(error as Error).message}`);
  }
  if (bytes.length === 32) return bytes;
  const text = bytes.toString().trim();
  if (/^[0-9a-fA-F]{64}$/.test(text)) return Buffer.from(text, 'hex');
  throw new UsageError(
    `${what}: a key is 32 bytes or 64 hexadecimal digits (head -c 32 /dev/urandom > key)`,
  );
}
