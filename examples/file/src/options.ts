// SPDX-License-Identifier: Apache-2.0
/** The command line: what may be said, and what it means. Nothing is opened here but a password file. */
import { CommandLine, DEVICE_OPTIONS, deviceOptions, FLAG, TEXT, UsageError } from 'tcmu/program';

export const HELP = `Serve a raw file or block device as a SCSI disk of this machine, over iSCSI, or to a virtual machine.

  tcmu-file <path> --name <name> [options]

  tcmu-file /srv/disk.img --name d0 --size 10G      creates the file if need be; prints the disk, /dev/sdX
  tcmu-file /dev/vg0/lv1 --name d1 --export iscsi --iqn iqn.2026-01.org.example:d1 \\
      --portal 192.0.2.1 --initiator iqn.2026-01.org.example:host1 --chap-user alice \\
      --chap-password-file /etc/tcmu/alice

The disk
  --name <name>            name of the backstore, unique on this machine; required unless --uio is given
  --size <size>            create the file with this size, or make a shorter one longer: 512M, 10G, 1T …
                           Space is taken only as it is written. Default: the size that it has
  --block-size <bytes>     512, 1024, 2048 or 4096. Default 512, or the block device's own
  --physical-block-size <bytes>  what initiators align to. Default the file system's block, at most 4096
  --read-only              refuse writes; several read-only servers may share a file
  --thick                  unmap nothing: space that was taken stays taken
  --bandwidth <size>       read and write at most so much a second: 50M
  --state <file>           what the disk remembers over restarts: mode pages that initiators save, a format or
                           sanitize operation that has not ended. Default for a file: <path>.state, there
                           only while there is something to keep; for a block device: none
  --removable              a medium that initiators may lock and eject
  --no-write-cache         answer each write when it is durable, not when the kernel has it
  --direct                 O_DIRECT: past this machine's page cache
  --io <where>             auto (default): in the thread pool only what would wait; inline: all at once on the
                           main thread; pool: all in the thread pool
  --allow-dir <directory>  refuse a path that leads out of it, symbolic links resolved
  --allow-shrink           let --size, and SIGHUP after the file was cut, make the disk shorter

Who gets it
  --export <fabric>        loopback (default): /dev/sdX here; iscsi; vhost: QEMU's vhost-scsi; none
  --iqn <name>             iSCSI: name of the target
  --portal <address>       iSCSI: address[:port] to listen on; repeatable. Default 127.0.0.1:3260
  --initiator <name>       iSCSI: who may log in; repeatable
  --anyone                 iSCSI: everybody who reaches a portal may log in
  --chap-user <name>       iSCSI: ask for this CHAP name, and for the password in …
  --chap-password-file <file>   … this file (its first line), or else in $TCMU_CHAP_PASSWORD

The kernel's side
  --max-sectors <n>        largest I/O in blocks. Default 1 MiB's worth (2048 of 512 bytes)
  --data-area-mb <n>       memory shared with the kernel for data
  --ring-mb <n>            memory shared with the kernel for commands, 1 to 8
  --zero-copy <when>       never (default); auto: show page-aligned commands' own memory to this process where
                           the kernel module can; always: or fail. See docs/zero-copy.md; --timeout is then 0
  --no-zero-copy-scrub     don't zero the memory of reads first: every byte of it is written here
  --timeout <seconds>      when the kernel gives up on a command; 0: never. Kernel's default 30
  --concurrency <n>        most commands worked on at a time. Default 64
  --no-express             pass every read and write through JavaScript, for tracing: plain ones go straight
                           between the file and the command's memory otherwise
  --nice <n>               priority of the serving thread, 0 to 19. On a busy CPU a nice server answers in
                           batches: more throughput (7 to 10 is best), but a smaller share of the CPU
  --serial <text>          what initiators know the disk by. Default: made from this machine's id and the
                           name; give one where the disk moves between machines
  --recover                take back the device of that name that a killed server left, its I/O waiting; when
                           there is none, create it
  --uio <device>           serve a device that exists, such as /dev/uio0, and touch no configfs: needs no
                           privilege but access to that device and the file

  --json                   print the ready line and messages as JSON
  --help, --version

When it serves, it prints one line: ready name=d0 uio=/dev/uio0 disk=/dev/sda (disk= for loopback only).
Everything else goes to the standard error.
SIGINT, SIGTERM: finish what is under way, make it durable, remove what was created, exit.
SIGHUP: look at the file's size again (after truncate -s, lvextend …) and resize the disk.
Exit codes: 0 ended by a signal, 1 failure, 2 wrong usage.
`;

export interface Options {
  path: string;
  /** Empty with `uio`: the device has its name already. */
  name: string;
  size: number | undefined;
  blockSize: number | undefined;
  physicalBlockSize: number | undefined;
  readOnly: boolean;
  thick: boolean;
  bandwidth: number | undefined;
  removable: boolean;
  state: string | undefined;
  writeCache: boolean;
  direct: boolean;
  io: 'auto' | 'inline' | 'pool';
  allowedDirectory: string | undefined;
  allowShrink: boolean;
  device: ReturnType<typeof deviceOptions>;
  zeroCopy: 'never' | 'auto' | 'always';
  zeroCopyScrub: boolean;
  express: boolean;
  nice: number | undefined;
  serial: string | undefined;
  uio: string | undefined;
  json: boolean;
}

const OPTIONS = {
  name: TEXT,
  size: TEXT,
  'block-size': TEXT,
  'physical-block-size': TEXT,
  'read-only': FLAG,
  thick: FLAG,
  bandwidth: TEXT,
  removable: FLAG,
  state: TEXT,
  'no-write-cache': FLAG,
  direct: FLAG,
  io: TEXT,
  'allow-dir': TEXT,
  'allow-shrink': FLAG,
  ...DEVICE_OPTIONS,
  'zero-copy': TEXT,
  'no-zero-copy-scrub': FLAG,
  'no-express': FLAG,
  nice: TEXT,
  serial: TEXT,
  uio: TEXT,
  json: FLAG,
  help: { ...FLAG, short: 'h' },
  version: FLAG,
} as const;

/** @throws UsageError */
export function parseOptions(
  args: readonly string[],
  env: NodeJS.ProcessEnv = process.env,
): Options | 'help' | 'version' {
  const line = new CommandLine(args, OPTIONS);
  if (line.flag('help')) return 'help';
  if (line.flag('version')) return 'version';
  const [path, ...more] = line.words;
  if (path === undefined) throw new UsageError('which file or block device? Give its path');
  if (more.length > 0) throw new UsageError(`one path only: ${more.join(' ')} is too much`);
  const uio = line.text('uio');
  return {
    path,
    name: deviceName(line),
    size: line.size('size'),
    blockSize: line.number('block-size', { oneOf: [512, 1024, 2048, 4096] }),
    physicalBlockSize: line.number('physical-block-size', { oneOf: PHYSICAL_BLOCK_SIZES }),
    readOnly: line.flag('read-only'),
    thick: line.flag('thick'),
    bandwidth: line.size('bandwidth'),
    removable: line.flag('removable'),
    state: line.text('state'),
    writeCache: !line.flag('no-write-cache'),
    direct: line.flag('direct'),
    io: line.choice('io', ['auto', 'inline', 'pool']) ?? 'auto',
    allowedDirectory: line.text('allow-dir'),
    allowShrink: line.flag('allow-shrink'),
    device: deviceOptions(line, env, uio === undefined ? 'loopback' : 'none'),
    zeroCopy: line.choice('zero-copy', ['never', 'auto', 'always']) ?? 'never',
    zeroCopyScrub: !line.flag('no-zero-copy-scrub'),
    express: !line.flag('no-express'),
    // Lowering needs no privilege; raising (below 0) is what service managers are for.
    nice: line.number('nice', { least: 0, most: 19 }),
    serial: line.text('serial'),
    uio,
    json: line.flag('json'),
  };
}

const PHYSICAL_BLOCK_SIZES = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536];

/** What concerns making a device says nothing about one that exists. */
const NOT_WITH_UIO = [
  'name',
  'export',
  'max-sectors',
  'data-area-mb',
  'ring-mb',
  'zero-copy',
  'timeout',
  'recover',
] as const;

function deviceName(line: CommandLine<keyof typeof OPTIONS>): string {
  if (!line.has('uio')) {
    const name = line.text('name');
    if (name === undefined) throw new UsageError('--name is missing: name the backstore');
    return name;
  }
  const wrong = NOT_WITH_UIO.find((option) => line.has(option));
  if (wrong !== undefined) {
    throw new UsageError(`--${wrong} does not go with --uio: that device exists already`);
  }
  return '';
}
