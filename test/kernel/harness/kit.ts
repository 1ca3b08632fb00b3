// SPDX-License-Identifier: Apache-2.0
/**
 * What a scenario works with inside the guest: commands, processes, disks, fio, and the checks that hold at
 * the end of every scenario (nothing in state D, nothing of LIO left behind).
 *
 * Contract: the kit owns every process it started and kills them all when the scenario is over. It never
 * touches a test disk from its own process, so a wedged device can't wedge the harness.
 */
import assert from 'node:assert/strict';
import { mkdirSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { Configfs } from './configfs.js';
import { Proc, type ShResult, type StartOptions, slowness, within } from './process.js';

export interface ShOptions {
  /** Default 60. */
  timeoutSeconds?: number;
  /** Answer a non-zero exit code instead of failing. */
  anyCode?: boolean;
  /** Keep the output out of the log. */
  quiet?: boolean;
  env?: Readonly<Record<string, string>>;
}

/** A file example that serves. */
export interface Served {
  proc: Proc;
  name: string;
  uio: string;
  /** `/dev/sdX` */
  disk: string;
}

/** The members of fio's JSON report that scenarios look at. */
export interface FioJob {
  jobname: string;
  error: number;
  total_err: number;
  read: { total_ios: number; io_bytes: number; iops: number };
  write: { total_ios: number; io_bytes: number; iops: number };
}

const fileExample = 'examples/file/dist/cli.js';

export class Kit {
  readonly configfs = new Configfs(this);
  /** An empty directory on tmpfs for backing files and the like. */
  readonly dir = '/mnt/work';
  readonly #started = process.hrtime.bigint();
  readonly #procs: Proc[] = [];
  readonly #programDir: string;
  #mounts = 0;
  /** Takes every line about what the scenario does. */
  readonly log: (text: string) => void;

  /**
   * @param programDir where the bundled programs lie
   * @param log default: prints to standard output, with the seconds since the start
   */
  constructor(programDir: string, log?: (text: string) => void) {
    this.#programDir = programDir;
    this.log =
      log ??
      ((text) => {
        const seconds = Number(process.hrtime.bigint() - this.#started) / 1e9;
        process.stdout.write(`${seconds.toFixed(2).padStart(7)} ${text}\n`);
      });
    mkdirSync(this.dir, { recursive: true });
  }

  /** Names a part of the scenario in the log. */
  step(text: string): void {
    this.log(`== ${text}`);
  }

  /** Runs a shell command to its end; fails when it exits with anything but 0 (or takes too long). */
  async sh(command: string, options: ShOptions = {}): Promise<ShResult> {
    const proc = this.#spawn(['/bin/sh', '-c', command], {
      name: 'sh',
      echo: false,
      ...(options.env === undefined ? {} : { env: options.env }),
    });
    if (options.quiet !== true) this.log(`$ ${command}`);
    let stdout = '';
    let stderr = '';
    proc.child.stdout?.on('data', (text: string) => (stdout += text));
    proc.child.stderr?.on('data', (text: string) => (stderr += text));
    const limit = options.timeoutSeconds ?? 60;
    const { code, signal } = await within(
      proc.exited,
      limit,
      `\`${command}\` (pid ${proc.child.pid}, state ${stateOf(proc.child.pid)})`,
    );
    if (options.quiet !== true || (code !== 0 && options.anyCode !== true)) {
      for (const line of `${stdout}${stderr}`.split('\n')) if (line !== '') this.log(`  ${line}`);
    }
    if (options.anyCode !== true) {
      assert.equal(signal ?? code, 0, `\`${command}\` failed: ${stderr.trim() || stdout.trim()}`);
    }
    return { code: code ?? -1, stdout, stderr };
  }

  /** The trimmed standard output of a command. */
  async out(command: string, options: ShOptions = {}): Promise<string> {
    return (await this.sh(command, options)).stdout.trim();
  }

  /** Starts a program beside the scenario. */
  start(argv: readonly string[], options: StartOptions): Proc {
    this.log(`& ${argv.join(' ')}`);
    return this.#spawn(argv, options);
  }

  #spawn(argv: readonly string[], options: StartOptions): Proc {
    const proc = new Proc(argv, options, (text) => {
      if (options.echo !== false) this.log(text);
    });
    this.#procs.push(proc);
    return proc;
  }

  /** Starts a program of test/kernel/programs (without its extension) and waits for its `ready` line. */
  async program(
    script: string,
    args: readonly string[] = [],
    options: { name?: string; readySeconds?: number; env?: Record<string, string> } = {},
  ): Promise<{ proc: Proc; ready: Record<string, string> }> {
    const file = join(this.#programDir, `${script}.js`);
    const proc = this.start([process.execPath, file, ...args], {
      name: options.name ?? script,
      ...(options.env === undefined ? {} : { env: options.env }),
    });
    const match = await proc.line(/^ready\b(.*)/, options.readySeconds ?? 30);
    return { proc, ready: fields(match[1] ?? '') };
  }

  /** Runs a program of test/kernel/programs to its end and answers its output. */
  async run(script: string, args: readonly string[]): Promise<string> {
    const proc = this.start([process.execPath, join(this.#programDir, `${script}.js`), ...args], {
      name: script,
    });
    const { code } = await proc.wait(60);
    assert.equal(code, 0, `${script} failed: ${proc.output}`);
    return proc.output;
  }

  /** Serves a file by the file example's command line and waits until it serves. */
  async serve(path: string, args: readonly string[] = []): Promise<Served> {
    const named = args.indexOf('--name');
    const name = named < 0 ? 'd0' : (args[named + 1] ?? 'd0');
    const all = named < 0 ? ['--name', name, ...args] : args;
    const proc = this.start([process.execPath, fileExample, path, ...all], { name });
    const match = await proc.line(/^ready\b(.*)/, 60);
    const { uio = '', disk = '', ...rest } = fields(match[1] ?? '');
    assert.equal(rest['name'], name, 'the ready line names the device');
    assert.match(uio, /^\/dev\/uio\d+$/, 'the ready line names the uio device');
    return { proc, name, uio, disk };
  }

  /** Names of all SCSI disks, `/dev/sda` and on. */
  disks(): string[] {
    return readdirSync('/sys/block')
      .filter((name) => name.startsWith('sd'))
      .map((name) => `/dev/${name}`);
  }

  /** Reads an attribute of a disk's queue or device in sysfs. */
  diskAttribute(disk: string, attribute: string): string {
    return readFileSync(join('/sys/block', disk.slice('/dev/'.length), attribute), 'utf8').trim();
  }

  /** Mounts a disk and answers the mount point. */
  async mount(disk: string, options: readonly string[] = []): Promise<string> {
    const dir = `/mnt/m${this.#mounts++}`;
    await this.sh(`mkdir -p ${dir} && mount ${[...options, disk, dir].join(' ')}`);
    return dir;
  }

  /** Polls until `look` answers something true. */
  async waitFor<T>(what: string, look: () => T | Promise<T>, limit = 30): Promise<NonNullable<T>> {
    const seconds = limit * slowness;
    const deadline = Date.now() + seconds * 1000;
    for (;;) {
      const found = await look();
      if (found !== undefined && found !== null && found !== false) return found;
      if (Date.now() > deadline) throw new Error(`waited ${seconds} s for ${what}`);
      await sleep(0.1);
    }
  }

  /** Arguments of fio from a job: `{ rw: 'randread', direct: 1 }`; `undefined` and false are left out. */
  fioArguments(job: Readonly<Record<string, string | number | boolean | undefined>>): string[] {
    const { name = 'job', ...rest } = job;
    const args = [`--name=${name}`];
    for (const [key, value] of Object.entries(rest)) {
      if (value === undefined || value === false) continue;
      args.push(value === true ? `--${key}` : `--${key}=${value}`);
    }
    return args;
  }

  /** Runs one fio job to its end; fails on any I/O or verification error. */
  async fio(
    job: Readonly<Record<string, string | number | boolean | undefined>>,
    timeoutSeconds = 60,
  ): Promise<FioJob> {
    const args = this.fioArguments(job).map((arg) => `'${arg}'`);
    this.log(`$ fio ${args.join(' ')}`);
    const { stdout } = await this.sh(`fio --output-format=json ${args.join(' ')}`, {
      timeoutSeconds,
      quiet: true,
    });
    return this.fioReport(stdout);
  }

  /** The job of a JSON report; fails when it had errors. */
  fioReport(text: string): FioJob {
    // fio prints notes before the report when a job is unusual.
    const report = JSON.parse(text.slice(text.indexOf('{'))) as { jobs: FioJob[] };
    const [job] = report.jobs;
    assert(job !== undefined, 'fio reported no job');
    assert.equal(job.error, 0, `fio job ${job.jobname} failed`);
    this.log(
      `  fio ${job.jobname}: ${job.read.total_ios} reads, ${job.write.total_ios} writes, ${Math.round(job.read.iops + job.write.iops)} IOPS`,
    );
    return job;
  }

  /** Fails when a task stays in state D (uninterruptible) over several looks. */
  async assertNoStuckTasks(): Promise<void> {
    const looks = 5;
    let stuck = tasksInStateD();
    for (let look = 1; look < looks && stuck.size > 0; look++) {
      await sleep(0.4);
      const now = tasksInStateD();
      stuck = new Map([...stuck].filter(([id]) => now.has(id)));
    }
    assert.deepEqual([...stuck.values()], [], 'tasks stay in state D');
  }

  /** Fails when backstores, targets or uio devices are left. */
  assertNothingLeft(): void {
    assert.deepEqual(this.configfs.leftovers(), [], 'LIO objects are left behind');
  }

  /** What helps after a failure. */
  async describeState(): Promise<void> {
    this.log('-- processes');
    for (const proc of this.#procs) if (proc.running) this.log(`   ${proc.name} ${proc.child.pid}`);
    for (const task of tasksInStateD().values()) this.log(`   in state D: ${task}`);
    this.log(`-- LIO: ${this.configfs.leftovers().join(' ') || 'nothing'}`);
  }

  /** Kills every process that is left. */
  destroy(): void {
    for (const proc of this.#procs) proc.destroy();
  }
}

export function sleep(seconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, seconds * 1000));
}

/** `a=1 b=2` as an object. */
function fields(text: string): Record<string, string> {
  return Object.fromEntries([...text.matchAll(/(\w+)=(\S*)/g)].map((m) => [m[1], m[2]]));
}

function stateOf(pid: number | undefined): string {
  try {
    return /^State:\s*(\S)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1] ?? '?';
  } catch {
    return 'gone';
  }
}

/** Threads in uninterruptible sleep, by id. */
function tasksInStateD(): Map<string, string> {
  const tasks = new Map<string, string>();
  for (const pid of readdirSync('/proc').filter((name) => /^\d+$/.test(name))) {
    try {
      for (const tid of readdirSync(`/proc/${pid}/task`)) {
        const stat = readFileSync(`/proc/${pid}/task/${tid}/stat`, 'utf8');
        // The name may hold spaces and parentheses; the state follows the last one.
        const end = stat.lastIndexOf(')');
        if (stat[end + 2] === 'D') tasks.set(tid, `${stat.slice(0, end + 1)} of process ${pid}`);
      }
    } catch {
      // It ended while we looked.
    }
  }
  return tasks;
}
