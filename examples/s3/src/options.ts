// SPDX-License-Identifier: Apache-2.0
/** The command line: what may be said, and what it means. Nothing is opened here but key and password files. */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { readFileSync, statSync } from 'node:fs';
import { basename, join } from 'node:path';
import { parseArgs } from 'node:util';
import { parseSize } from 'tcmu/store';
import {
  CONNECT_HELP,
  CONNECT_OPTIONS,
  type ConnectOptions,
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

/** A mistake on the command line. */
export class UsageError extends Error {}

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

export interface IscsiChoice {
  iqn: string;
  portals: string[];
  initiators: string[];
  anyone: boolean;
  chap: { user: string; password: string } | undefined;
}

export type ExportChoice =
  | { type: 'loopback' | 'vhost' | 'none' }
  | ({ type: 'iscsi' } & IscsiChoice);

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
  export: ExportChoice;
  maxSectors: number | undefined;
  dataAreaMb: number | undefined;
  ringMb: number | undefined;
  timeout: number | undefined;
  concurrency: number | undefined;
  recover: boolean;
  serial: string | undefined;
  uio: string | undefined;
}

const FLAG = { type: 'boolean', default: false } as const;
const TEXT = { type: 'string' } as const;
const LIST = { type: 'string', multiple: true } as const;

function read(args: readonly string[]) {
  try {
    return parseArgs({
      args: [...args],
      allowPositionals: true,
      options: {
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
        export: TEXT,
        iqn: TEXT,
        portal: LIST,
        initiator: LIST,
        anyone: FLAG,
        'chap-user': TEXT,
        'chap-password-file': TEXT,
        'max-sectors': TEXT,
        'data-area-mb': TEXT,
        'ring-mb': TEXT,
        timeout: TEXT,
        concurrency: TEXT,
        serial: TEXT,
        recover: FLAG,
        uio: TEXT,
        json: FLAG,
        help: { ...FLAG, short: 'h' },
        version: FLAG,
      },
    });
  } catch (error) {
    throw new UsageError((error as Error).message);
  }
}

type Values = ReturnType<typeof read>['values'];

/** @throws UsageError */
export function parseOptions(
  args: readonly string[],
  env: NodeJS.ProcessEnv = process.env,
): Options | 'help' | 'version' {
  const { values, positionals } = read(args);
  if (values.help) return 'help';
  if (values.version) return 'version';
  const [word, place, ...more] = positionals;
  const command = COMMANDS.find((known) => known === word);
  if (command === undefined) throw new UsageError(`what to do? One of ${COMMANDS.join(', ')}`);
  if (place === undefined) throw new UsageError('where is the disk? Give s3://bucket/prefix');
  const wanted = ARGUMENTS[command];
  if (wanted !== undefined && more.length === 0) throw new UsageError(`${command}: give ${wanted}`);
  const extra = more[wanted === undefined ? 0 : 1];
  if (extra !== undefined) throw new UsageError(`${extra} is too much`);
  const size = sizeOf(values, 'size');
  if (command === 'create' && size === undefined) throw new UsageError('--size is missing');
  const key = keySource(values, 'key-file', 'key-command');
  const newKey = keySource(values, 'new-key-file', 'new-key-command');
  if (command === 'rekey' && (key === undefined || newKey === undefined)) {
    throw new UsageError('rekey needs the old key and the new one: --key-file, --new-key-file');
  }
  if (command === 'serve' && values.name === undefined && values.uio === undefined) {
    throw new UsageError('--name is missing: name the backstore');
  }
  return {
    command,
    place,
    argument: more[0] ?? '',
    connect: connectionOf(values, env),
    json: values.json,
    force: values.force,
    size,
    allowShrink: values['allow-shrink'],
    blockSize: number(values, 'block-size', [512, 4096]),
    chunkSize: sizeOf(values, 'chunk-size'),
    compression: choice('compression', values.compression, ['none', 'deflate', 'zstd']),
    key,
    newKey,
    snapshot: values.snapshot,
    open: openOptions(values, key),
    restartFile: command === 'serve' ? restartFile(values, place, env) : undefined,
    statisticsSeconds: number(values, 'statistics'),
    name: values.name ?? '',
    export: exportChoice(values, env),
    maxSectors: number(values, 'max-sectors'),
    dataAreaMb: number(values, 'data-area-mb'),
    ringMb: number(values, 'ring-mb'),
    timeout: number(values, 'timeout', undefined, 0),
    concurrency: number(values, 'concurrency'),
    recover: values.recover,
    serial: values.serial,
    uio: values.uio,
  };
}

function connectionOf(values: Values, env: NodeJS.ProcessEnv): ConnectOptions {
  try {
    return connectOptions(values, env);
  } catch (error) {
    throw new UsageError((error as Error).message);
  }
}

function openOptions(values: Values, key: KeySource | undefined): OpenOptions {
  const seconds = (option: 'write-back' | 'patience' | 'lease'): number | undefined => {
    const value = number(values, option, undefined, option === 'lease' ? 0 : undefined);
    return value === undefined ? undefined : value * 1000;
  };
  return {
    mode: values['read-only'] ? 'follow' : 'write',
    snapshot: values.snapshot,
    key,
    fencing: choice('fencing', values.fencing, ['required', 'none']),
    writeCache: !values['no-write-cache'],
    dirtyLimit: sizeOf(values, 'dirty'),
    cacheSize: sizeOf(values, 'cache'),
    mapSize: sizeOf(values, 'map-memory'),
    logLimit: sizeOf(values, 'log'),
    uploads: number(values, 'uploads'),
    writeBackMs: seconds('write-back'),
    patienceMs: seconds('patience'),
    leaseMs: seconds('lease'),
    assumeDead: values['assume-dead'],
    cacheFile: values['cache-file'],
    cacheFileSize: sizeOf(values, 'cache-file-size'),
    journal: values['journal-on-this-host'],
    discardJournal: values['discard-journal'],
  };
}

/** A file for this disk under this name: a process that takes the disk over here has another one. */
function restartFile(values: Values, place: string, env: NodeJS.ProcessEnv): string | undefined {
  const given = values['restart-file'];
  if (given === 'none' || values['read-only'] || values.snapshot !== undefined) return undefined;
  if (given !== undefined) {
    if (values['journal-on-this-host'] === undefined) return given;
    throw new UsageError('--restart-file and --journal-on-this-host exclude each other');
  }
  const name = values.name ?? basename(values.uio ?? '');
  const id = createHash('sha256').update(`${place}\n${name}`).digest('hex').slice(0, 16);
  return join(env['STATE_DIRECTORY'] ?? '/var/lib/tcmu-s3', `restart-${id}`);
}

type SizeOption =
  | 'size'
  | 'chunk-size'
  | 'cache'
  | 'map-memory'
  | 'cache-file-size'
  | 'dirty'
  | 'log';

function sizeOf(values: Values, option: SizeOption): number | undefined {
  const text = values[option];
  if (text === undefined) return undefined;
  const size = parseSize(text);
  if (size === undefined || size === 0) {
    throw new UsageError(`--${option} ${text}: give a size such as 512M, 10G or 1073741824`);
  }
  return size;
}

type NumberOption =
  | 'block-size'
  | 'uploads'
  | 'write-back'
  | 'patience'
  | 'lease'
  | 'statistics'
  | 'max-sectors'
  | 'data-area-mb'
  | 'ring-mb'
  | 'timeout'
  | 'concurrency';

function number(
  values: Values,
  option: NumberOption,
  allowed?: readonly number[],
  least = 1,
): number | undefined {
  const text = values[option];
  if (text === undefined) return undefined;
  const value = Number(text);
  const good =
    /^\d+$/.test(text) &&
    Number.isSafeInteger(value) &&
    value >= least &&
    (allowed?.includes(value) ?? true);
  if (!good) {
    const rule = allowed?.join(' or ') ?? `a whole number from ${least} on`;
    throw new UsageError(`--${option} ${text}: give ${rule}`);
  }
  return value;
}

function choice<T extends string>(
  option: string,
  text: string | undefined,
  allowed: readonly T[],
): T | undefined {
  if (text === undefined) return undefined;
  const found = allowed.find((value) => value === text);
  if (found === undefined) throw new UsageError(`--${option} ${text}: give ${allowed.join(', ')}`);
  return found;
}

/** The key is read when it is wanted, and kept nowhere. */
function keySource(
  values: Values,
  fileOption: 'key-file' | 'new-key-file',
  commandOption: 'key-command' | 'new-key-command',
): KeySource | undefined {
  const file = values[fileOption];
  const command = values[commandOption];
  if (file !== undefined && command !== undefined) {
    throw new UsageError(`--${fileOption} and --${commandOption} exclude each other`);
  }
  if (file !== undefined) return () => keyFrom(`--${fileOption} ${file}`, () => secretFile(file));
  if (command === undefined) return undefined;
  return () =>
    keyFrom(`--${commandOption}`, () =>
      execFileSync('/bin/sh', ['-c', command], { stdio: ['ignore', 'pipe', 'inherit'] }),
    );
}

function secretFile(file: string): Buffer {
  if ((statSync(file).mode & 0o007) !== 0) {
    throw new UsageError(`${file}: everybody may read it; chmod 600 ${file}`);
  }
  return readFileSync(file);
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

const ISCSI_ONLY = [
  'iqn',
  'portal',
  'initiator',
  'anyone',
  'chap-user',
  'chap-password-file',
] as const;

function exportChoice(values: Values, env: NodeJS.ProcessEnv): ExportChoice {
  const standard = values.uio === undefined ? 'loopback' : 'none';
  const type = choice('export', values.export, ['loopback', 'iscsi', 'vhost', 'none']) ?? standard;
  if (type !== 'iscsi') {
    const wrong = ISCSI_ONLY.find((option) => values[option]);
    if (wrong !== undefined) throw new UsageError(`--${wrong} goes with --export iscsi only`);
    return { type };
  }
  const { iqn, portal = [], initiator = [], anyone } = values;
  if (iqn === undefined) throw new UsageError('--export iscsi needs --iqn, the name of the target');
  if (anyone === initiator.length > 0) {
    throw new UsageError('--export iscsi needs either --initiator or --anyone: who may log in?');
  }
  return {
    type,
    iqn,
    portals: portal,
    initiators: initiator,
    anyone,
    chap: chap(values, env),
  };
}

function chap(values: Values, env: NodeJS.ProcessEnv): IscsiChoice['chap'] {
  const user = values['chap-user'];
  const file = values['chap-password-file'];
  if (user === undefined) {
    if (file !== undefined) throw new UsageError('--chap-password-file needs --chap-user');
    return undefined;
  }
  const password =
    file === undefined ? env['TCMU_CHAP_PASSWORD'] : secretFile(file).toString().split('\n')[0];
  if (!password) {
    throw new UsageError('--chap-user needs --chap-password-file or $TCMU_CHAP_PASSWORD');
  }
  return { user, password };
}
