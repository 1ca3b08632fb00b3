// SPDX-License-Identifier: Apache-2.0
/** The command line: what may be said, and what it means. Nothing is opened here but a passphrase file. */
import {
  CommandLine,
  DEVICE_OPTIONS,
  deviceOptions,
  FLAG,
  sizeOf,
  TEXT,
  UsageError,
} from 'tcmu/program';
import type { CreateOptions } from './create.js';
import type { OpenOptions } from './open.js';

export const HELP = `Serve qcow2 images as SCSI disks of this machine, over iSCSI, or to a virtual machine; and make, look at,
check and change them.

  tcmu-qcow serve <image> --name <name> [options]      prints: ready name=d0 uio=/dev/uio0 disk=/dev/sda
  tcmu-qcow create <image> [<size>] [options]
  tcmu-qcow info <image> [--json]
  tcmu-qcow check <image> [--repair leaks|all] [--json]
  tcmu-qcow snapshot create|revert|delete <name> <image>
  tcmu-qcow snapshot list <image>
  tcmu-qcow resize <size> <image> [--allow-shrink]
  tcmu-qcow commit <image> [--keep]                    into its backing file; --keep: don't empty the image
  tcmu-qcow rebase <image> [--backing <file> --backing-format <format>] [--unsafe]
                                                       without --backing: the image stands alone afterwards
snapshot and resize take --control <socket> instead of <image>, for one that is being served.

All
  --allow-dir <directory>  refuse images, backing files and data files that lie, or lead, out of it
  --passphrase-file <file> first line: what unlocks an encrypted image; or else $TCMU_PASSPHRASE
  --json                   messages, and what is printed, as JSON

serve
  --name <name>            name of the backstore, unique on this machine
  --read-only              refuse writes; several read-only users may share an image
  --block-size <bytes>     512 (default), 1024, 2048 or 4096
  --no-write-cache         answer each change when it is durable
  --compress               store whole clusters compressed when they are first written
  --no-discard             keep the host file's space when clusters become free
  --l2-cache <size>        memory for L2 tables, default 32M: enough for 256 GiB with clusters of 64 KiB
  --refcount-cache <size>  memory for refcount blocks, default 4M
  --allow-shrink           let resize make the disk shorter
  --control <socket>       take snapshot and resize commands at this UNIX socket
  --export <fabric>        loopback (default): /dev/sdX here; iscsi; vhost; none
  --iqn <name>, --portal <address>, --initiator <name>, --anyone      for iscsi, as with tcmu-file
  --chap-user <name>, --chap-password-file <file>                     for iscsi, as with tcmu-file
  --max-sectors <n>, --data-area-mb <n>, --ring-mb <n>, --timeout <seconds>, --concurrency <n>,
  --nice <n>, --serial <text>, --io <where>                           as with tcmu-file
  --no-express             pass every read and write through JavaScript, for tracing: plain ones whose place is
                           known go straight between files and the command's memory otherwise
  --recover                take back the device of that name that a killed server left

create
  --backing <file>         show this file's content where nothing is written; relative to the image
  --backing-format <f>     raw, qcow2 or qcow; needed with --backing
  --cluster-size <size>    512 to 2M, default 64K          --refcount-bits <n>   1 to 64, default 16
  --version <2|3>          default 3                       --extended-l2         32 subclusters a cluster
  --compression <type>     zlib (default) or zstd          --lazy-refcounts
  --data-file <file>       keep guest data there           --data-file-raw       … as a raw image of its own
  --encrypt                LUKS, with the passphrase       --overwrite           replace an image that is there

Exit codes: 0 done, 1 failure, 2 wrong usage; check: 3 leaks, 4 errors.
`;

export interface ServeCommand {
  command: 'serve';
  path: string;
  name: string;
  blockSize: number | undefined;
  writeCache: boolean;
  allowShrink: boolean;
  control: string | undefined;
  nice: number | undefined;
  open: OpenOptions;
  express: boolean;
  device: ReturnType<typeof deviceOptions>;
  serial: string | undefined;
}

/** Where a snapshot or resize is to happen. */
export type Subject = { image: string } | { control: string };

export type SnapshotAction =
  | { action: 'list' }
  | { action: 'create' | 'revert' | 'delete'; name: string };

export type Command =
  | ServeCommand
  | { command: 'help' | 'version' }
  | { command: 'create'; path: string; options: CreateOptions }
  | { command: 'info'; path: string; open: OpenOptions }
  | { command: 'check'; path: string; repair: 'leaks' | 'all' | undefined; open: OpenOptions }
  | { command: 'snapshot'; what: SnapshotAction; on: Subject; open: OpenOptions }
  | { command: 'resize'; size: number; allowShrink: boolean; on: Subject; open: OpenOptions }
  | { command: 'commit'; path: string; keep: boolean; open: OpenOptions }
  | {
      command: 'rebase';
      path: string;
      backing: string | undefined;
      format: string | undefined;
      unsafe: boolean;
      open: OpenOptions;
    };

const COMMON = { 'allow-dir': TEXT, 'passphrase-file': TEXT, json: FLAG, help: FLAG } as const;

const OPTIONS = {
  serve: {
    name: TEXT,
    'read-only': FLAG,
    'block-size': TEXT,
    'no-write-cache': FLAG,
    compress: FLAG,
    'no-discard': FLAG,
    'l2-cache': TEXT,
    'refcount-cache': TEXT,
    'allow-shrink': FLAG,
    control: TEXT,
    ...DEVICE_OPTIONS,
    nice: TEXT,
    serial: TEXT,
    io: TEXT,
    'no-express': FLAG,
  },
  create: {
    backing: TEXT,
    'backing-format': TEXT,
    'cluster-size': TEXT,
    'refcount-bits': TEXT,
    version: TEXT,
    'extended-l2': FLAG,
    compression: TEXT,
    'lazy-refcounts': FLAG,
    'data-file': TEXT,
    'data-file-raw': FLAG,
    encrypt: FLAG,
    overwrite: FLAG,
  },
  info: {},
  check: { repair: TEXT },
  snapshot: { control: TEXT },
  resize: { control: TEXT, 'allow-shrink': FLAG },
  commit: { keep: FLAG },
  rebase: { backing: TEXT, 'backing-format': TEXT, unsafe: FLAG },
} as const;

type CommandName = keyof typeof OPTIONS;
/** An option of any command. */
type OptionName =
  | keyof typeof COMMON
  | { [Name in CommandName]: keyof (typeof OPTIONS)[Name] }[CommandName];
type Said = CommandLine<OptionName>;

/** @throws UsageError */
export function parseCommand(
  args: readonly string[],
  env: NodeJS.ProcessEnv = process.env,
): { command: Command; json: boolean } {
  const [name, ...rest] = args;
  if (name === undefined) throw new UsageError('what is to be done?');
  if (name === '--help' || name === '-h') return { command: { command: 'help' }, json: false };
  if (name === '--version') return { command: { command: 'version' }, json: false };
  if (!(name in OPTIONS)) throw new UsageError(`there is no command ${name}`);
  const said: Said = new CommandLine(rest, { ...COMMON, ...OPTIONS[name as CommandName] });
  if (said.flag('help')) return { command: { command: 'help' }, json: false };
  const words = new Words(said.words);
  const command = build(name as CommandName, said, words, env);
  words.end();
  return { command, json: said.flag('json') };
}

/** What stands on the command line besides options. */
class Words {
  readonly #words: string[];

  constructor(words: readonly string[]) {
    this.#words = [...words];
  }

  take(what: string): string {
    const word = this.#words.shift();
    if (word === undefined) throw new UsageError(`${what} is missing`);
    return word;
  }

  more(): boolean {
    return this.#words.length > 0;
  }

  end(): void {
    if (this.more()) throw new UsageError(`${this.#words.join(' ')} is too much`);
  }
}

function build(name: CommandName, said: Said, words: Words, env: NodeJS.ProcessEnv): Command {
  const passphrase = said.secret('passphrase-file') ?? env['TCMU_PASSPHRASE'];
  const open: OpenOptions = {
    allowedDirectory: said.text('allow-dir'),
    ...(passphrase === undefined ? {} : { passphrase }),
  };
  switch (name) {
    case 'serve':
      return serveCommand(said, words.take('the image'), open, env);
    case 'create':
      return {
        command: 'create',
        path: words.take('the image'),
        options: createOptions(said, words, open),
      };
    case 'info':
      return { command: 'info', path: words.take('the image'), open };
    case 'check': {
      const repair = said.choice('repair', ['leaks', 'all']);
      return { command: 'check', path: words.take('the image'), repair, open };
    }
    case 'snapshot': {
      const action = words.take('create, list, revert or delete');
      if (action === 'list') {
        return { command: 'snapshot', what: { action }, on: subject(said, words), open };
      }
      if (action !== 'create' && action !== 'revert' && action !== 'delete') {
        throw new UsageError(`snapshot ${action}: give create, list, revert or delete`);
      }
      const what = { action, name: words.take("the snapshot's name") } as const;
      return { command: 'snapshot', what, on: subject(said, words), open };
    }
    case 'resize':
      return {
        command: 'resize',
        size: sizeOf('resize', words.take('the new size')),
        allowShrink: said.flag('allow-shrink'),
        on: subject(said, words),
        open,
      };
    case 'commit':
      return { command: 'commit', path: words.take('the image'), keep: said.flag('keep'), open };
    case 'rebase':
      return {
        command: 'rebase',
        path: words.take('the image'),
        backing: said.text('backing'),
        format: said.text('backing-format'),
        unsafe: said.flag('unsafe'),
        open,
      };
  }
}

function subject(said: Said, words: Words): Subject {
  const control = said.text('control');
  return control === undefined ? { image: words.take('the image') } : { control };
}

function serveCommand(
  said: Said,
  path: string,
  open: OpenOptions,
  env: NodeJS.ProcessEnv,
): ServeCommand {
  const name = said.text('name');
  if (name === undefined) throw new UsageError('--name is missing: name the backstore');
  return {
    command: 'serve',
    path,
    name,
    blockSize: said.number('block-size', { oneOf: [512, 1024, 2048, 4096] }),
    writeCache: !said.flag('no-write-cache'),
    allowShrink: said.flag('allow-shrink'),
    control: said.text('control'),
    nice: said.number('nice', { least: 0, most: 19 }),
    open: {
      ...open,
      readOnly: said.flag('read-only'),
      compress: said.flag('compress'),
      discard: !said.flag('no-discard'),
      l2CacheBytes: said.size('l2-cache'),
      refcountCacheBytes: said.size('refcount-cache'),
      io: said.choice('io', ['auto', 'inline', 'pool']),
    },
    express: !said.flag('no-express'),
    device: deviceOptions(said, env),
    serial: said.text('serial'),
  };
}

function createOptions(said: Said, words: Words, open: OpenOptions): CreateOptions {
  const version = said.choice('version', ['2', '3']);
  const encrypt = said.flag('encrypt');
  if (encrypt && open.passphrase === undefined) {
    throw new UsageError('--encrypt needs --passphrase-file or $TCMU_PASSPHRASE');
  }
  return {
    size: words.more() ? sizeOf('size', words.take('size')) : undefined,
    version: version === undefined ? undefined : version === '2' ? 2 : 3,
    clusterSize: said.size('cluster-size'),
    refcountBits: said.number('refcount-bits', { most: 64 }),
    extendedL2: said.flag('extended-l2'),
    compressionType: said.choice('compression', ['zlib', 'zstd']),
    lazyRefcounts: said.flag('lazy-refcounts'),
    backingFile: said.text('backing'),
    backingFormat: said.text('backing-format'),
    dataFile: said.text('data-file'),
    dataFileRaw: said.flag('data-file-raw'),
    overwrite: said.flag('overwrite'),
    allowedDirectory: open.allowedDirectory,
    encryption:
      encrypt && open.passphrase !== undefined ? { passphrase: open.passphrase } : undefined,
  };
}
