// SPDX-License-Identifier: Apache-2.0
/**
 * What is compared: ways to have a disk in a bucket, each a server process of its own over the same S3 server.
 *
 * Contract: `start` answers when the disk can be read and written by fio with the arguments it gives; a started subject can be stopped and
 * started again over the same objects, with empty caches. Nothing outlives `stop`.
 */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, rmSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { onLeash } from '../../examples/s3/test/support/leash.js';
import type { ServerPlan } from './server.js';

export interface Bucket {
  readonly endpoint: string;
  readonly region: string;
  readonly bucket: string;
  readonly accessKeyId: string;
  readonly secretAccessKey: string;
}

export interface Place {
  /** A directory of the subject's own. */
  readonly dir: string;
  readonly sizeBytes: number;
  /** Memory for data, of all that have any. */
  readonly cacheBytes: number;
  /** Where the bundled server program lies. */
  readonly programs: string;
}

export const MIB = 1024 * 1024;
const backerBlock = 128 * 1024;

interface Command {
  readonly argv: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  readonly ready: (output: string) => boolean;
  /** How fio reaches the disk. */
  readonly fio: readonly string[];
  readonly mounted?: string;
}

export interface Subject {
  readonly name: string;
  readonly about: string;
  command(bucket: Bucket, place: Place): Command;
}

function backer(cached: boolean): Subject['command'] {
  return (bucket, { dir, sizeBytes, cacheBytes }) => {
    const mount = join(dir, 'mount');
    mkdirSync(mount, { recursive: true });
    const blocks = cached ? cacheBytes / backerBlock : 0;
    return {
      argv: [
        's3backer',
        '-f',
        '--quiet',
        '--force',
        `--accessId=${bucket.accessKeyId}`,
        `--accessKey=${bucket.secretAccessKey}`,
        `--baseURL=${bucket.endpoint}/`,
        `--size=${sizeBytes}`,
        `--blockSize=${backerBlock}`,
        `--blockCacheSize=${blocks}`,
        // The server is consistent: what guards against one that isn't would only make it wait.
        '--md5CacheSize=0',
        '--md5CacheTime=0',
        '--minWriteDelay=0',
        bucket.bucket,
        mount,
      ],
      ready: () => existsSync(join(mount, 'file')),
      fio: [`--filename=${join(mount, 'file')}`, '--ioengine=libaio', '--direct=1'],
      mounted: mount,
    };
  };
}

function overNbd(socket: string): string[] {
  return ['--ioengine=nbd', `--uri=nbd+unix:///?socket=${socket}`];
}

export const subjects = {
  ours: {
    name: 'ours',
    about:
      'tcmu-s3 over NBD, write buffer and caches together as large as the cache; durable at a flush',
    command: ({ bucket, ...connect }, { dir, sizeBytes, cacheBytes, programs }) => {
      const socket = join(dir, 'nbd.sock');
      const plan: ServerPlan = {
        location: `s3://${bucket}/disk`,
        connect,
        socket,
        sizeBytes,
        cacheBytes,
        restartFile: join(dir, 'restart'),
      };
      return {
        argv: [
          process.execPath,
          // As the command line starts itself.
          '--max-semi-space-size=1',
          '--single-threaded-gc',
          join(programs, 'server.mjs'),
          JSON.stringify(plan),
        ],
        env: {
          MALLOC_ARENA_MAX: '1',
          MALLOC_MMAP_THRESHOLD_: '131072',
          MALLOC_TRIM_THRESHOLD_: '131072',
        },
        ready: (output) => output.includes('ready'),
        fio: overNbd(socket),
      };
    },
  },
  durable: {
    name: 's3backer-durable',
    about: 's3backer, 128 KiB blocks, no cache: a write is durable when it is answered',
    command: backer(false),
  },
  cached: {
    name: 's3backer-cached',
    about: 's3backer, 128 KiB blocks; its flush does nothing',
    command: backer(true),
  },
  nbdkit: {
    name: 'nbdkit-S3',
    about:
      "nbdkit's S3 plugin, 64 KiB objects (it fails with larger ones): no cache, one request at a time",
    command: ({ endpoint, region, bucket, accessKeyId, secretAccessKey }, { dir, sizeBytes }) => {
      const socket = join(dir, 'nbd.sock');
      return {
        argv: [
          'nbdkit',
          '--foreground',
          '--exit-with-parent',
          `--unix=${socket}`,
          // The plugin itself takes whole objects only.
          '--filter=blocksize',
          'S3',
          `endpoint-url=${endpoint}`,
          `access-key=${accessKeyId}`,
          `secret-key=${secretAccessKey}`,
          `size=${sizeBytes}`,
          'object-size=64k',
          `bucket=${bucket}`,
          'key=disk',
        ],
        env: { AWS_DEFAULT_REGION: region },
        ready: () => existsSync(socket) && statSync(socket).isSocket(),
        fio: overNbd(socket),
      };
    },
  },
} as const satisfies Record<string, Subject>;

export type SubjectName = keyof typeof subjects;

/** A subject that serves. */
export class Running {
  readonly fio: readonly string[];
  readonly #name: string;
  readonly #child: ChildProcess;
  readonly #mounted: string | undefined;
  #output = '';
  #resident = 0;
  #anonymous = 0;
  readonly #sampling: NodeJS.Timeout;

  private constructor(name: string, child: ChildProcess, { fio, mounted }: Command) {
    this.#name = name;
    this.#child = child;
    this.fio = fio;
    this.#mounted = mounted;
    for (const stream of [child.stdout, child.stderr]) {
      stream?.setEncoding('utf8').on('data', (text: string) => (this.#output += text));
    }
    this.#sampling = setInterval(() => this.#sample(), 200);
    process.once('exit', this.#onExit);
  }

  readonly #onExit = () => {
    this.#child.kill('SIGKILL');
    if (this.#mounted !== undefined) spawnSync('umount', ['-l', this.#mounted]);
  };

  /** @throws Error with what the server said when it does not come up */
  static async start(subject: Subject, bucket: Bucket, place: Place): Promise<Running> {
    rmSync(join(place.dir, 'nbd.sock'), { force: true });
    const command = subject.command(bucket, place);
    // A FUSE server unmounts at SIGTERM.
    const [program, args] = onLeash(command.argv, command.mounted === undefined ? 'KILL' : 'TERM');
    const child = spawn(program, args, {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, ...command.env },
    });
    const running = new Running(subject.name, child, command);
    let failed: Error | undefined;
    child.once('error', (error) => {
      failed = error;
    });
    const deadline = Date.now() + 60_000;
    while (!command.ready(running.#output)) {
      if (failed !== undefined || !running.#alive || Date.now() > deadline) {
        await running.stop();
        throw new Error(`${subject.name} does not serve: ${failed?.message ?? running.#output}`);
      }
      await sleep(50);
    }
    return running;
  }

  get #alive(): boolean {
    return this.#child.exitCode === null && this.#child.signalCode === null;
  }

  /** Most memory it has had, each kind at its own moment. */
  get peak(): { residentMib: number; anonymousMib: number } {
    this.#sample();
    return { residentMib: this.#resident / 1024, anonymousMib: this.#anonymous / 1024 };
  }

  /** @throws Error when it has died */
  assertAlive(): void {
    if (!this.#alive) throw new Error(`${this.#name} died: ${this.#output.slice(-2000)}`);
  }

  async stop(): Promise<void> {
    clearInterval(this.#sampling);
    process.off('exit', this.#onExit);
    // A FUSE server writes back when it is unmounted, and ends by itself.
    if (this.#mounted !== undefined) spawnSync('umount', [this.#mounted]);
    else if (this.#alive) this.#child.kill('SIGTERM');
    const deadline = Date.now() + 60_000;
    while (this.#alive && Date.now() < deadline) await sleep(20);
    if (this.#alive) this.#onExit();
  }

  #sample(): void {
    try {
      const status = readFileSync(`/proc/${this.#child.pid}/status`, 'utf8');
      this.#resident = Number(/^VmHWM:\s*(\d+)/m.exec(status)?.[1]);
      const anonymous = Number(/^RssAnon:\s*(\d+)/m.exec(status)?.[1]);
      this.#anonymous = Math.max(this.#anonymous, anonymous);
    } catch {
      // It has ended.
    }
  }
}
