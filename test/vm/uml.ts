// SPDX-License-Identifier: Apache-2.0
/**
 * Boots user-mode Linux (Debian's `user-mode-linux`), runs one command in it as root, and powers off.
 *
 * Contract: the guest sees the host's files read-only at their own places, below a root of its own on tmpfs
 * where /tmp, /run, /mnt and parts of /var start empty; only `outDir` is written, through /run/out. One CPU,
 * a boot of some 4 s.
 * No privilege is needed on the host. The machine never outlives the promise, nor this process.
 */
import { spawn } from 'node:child_process';
import { accessSync, constants, copyFileSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { delimiter, dirname, join, resolve } from 'node:path';
import {
  baseModules,
  endOfRunMark,
  kernelProblems,
  LineSplitter,
  ownGroup,
  shellQuote,
  type VmOptions,
  type VmResult,
} from './vm.js';

/** How long the guest may take to boot, to report a deadline, and to power off after its command. */
const bootSeconds = 30;
const powerOffSeconds = 3;

const projectRoot = findRoot();

/** The project's root: the working directory of npm scripts, or the closest one above with our package. */
function findRoot(): string {
  for (let dir = process.cwd(); dir !== dirname(dir); dir = dirname(dir)) {
    try {
      accessSync(join(dir, 'test/vm/init.sh'));
      return dir;
    } catch {
      // Look one higher.
    }
  }
  throw new Error('run this inside the tcmu checkout: test/vm/init.sh was not found above the cwd');
}

/** Where the linux.uml binary is, or undefined when the package is not installed. */
export function findUml(): string | undefined {
  const { PATH = '' } = process.env;
  for (const dir of [...PATH.split(delimiter), '/usr/bin']) {
    const file = join(dir, 'linux.uml');
    try {
      accessSync(file, constants.X_OK);
      return file;
    } catch {
      // Not in this directory.
    }
  }
  return undefined;
}

function jobFile(options: VmOptions): string {
  const visible = [projectRoot, dirname(process.execPath), ...(options.visible ?? [])];
  const env = Object.entries(options.env ?? {});
  return [
    `OUT=${options.outDir === undefined ? '' : shellQuote(resolve(options.outDir))}`,
    `KEEP=${shellQuote(visible.join('\n'))}`,
    `DEADLINE=${options.timeoutSeconds ?? 120}`,
    `MODULES=${shellQuote((options.modules ?? baseModules).join(' '))}`,
    'run_job() {',
    ...env.map(([name, value]) => `  export ${name}=${shellQuote(value)}`),
    `  cd ${shellQuote(resolve(options.cwd ?? '.'))} || exit 126`,
    `  exec ${options.command.map(shellQuote).join(' ')}`,
    '}',
    '',
  ].join('\n');
}

/** Runs one command in a machine of its own; rejects only when user-mode Linux can't be started at all. */
export async function runUml(options: VmOptions): Promise<VmResult> {
  const uml = findUml();
  if (uml === undefined) {
    throw new Error('linux.uml is not installed; on Debian: apt-get install user-mode-linux kmod');
  }
  // Kernel arguments are split at spaces, so the init lies at a short path of our own making.
  const dir = mkdtempSync(join(/\s/.test(tmpdir()) ? '/tmp' : tmpdir(), 'tcmu-vm-'));
  const started = process.hrtime.bigint();
  try {
    copyFileSync(join(projectRoot, 'test/vm/init.sh'), join(dir, 'init'));
    writeFileSync(join(dir, 'job'), jobFile(options));
    const child = spawn(
      uml,
      [
        `mem=${options.memoryMb ?? 1024}M`,
        'rootfstype=hostfs',
        'rootflags=/',
        'ro',
        `init=${dir}/init`,
        'con=null',
        'con0=null,fd:1',
        'ssl=null',
        'ssl0=null,fd:3',
        'ssl1=null,fd:4',
        'loglevel=8',
        'printk.time=1',
        'log_buf_len=1M',
        'umid=vm',
        `uml_dir=${dir}`,
      ],
      // Its own group: a machine is many host processes, and all must go when one goes.
      {
        detached: true,
        stdio: ['ignore', 'pipe', 'pipe', 'pipe', 'pipe'],
        env: { PATH: '/usr/bin:/bin' },
      },
    );
    const kill = ownGroup(child);
    const timers: NodeJS.Timeout[] = [];
    const killIn = (seconds: number): void => {
      timers.push(setTimeout(kill, seconds * 1000));
    };
    killIn((options.timeoutSeconds ?? 120) + bootSeconds);
    let exitCode: number | undefined;
    let output = '';
    let consoleText = '';
    const lines = new LineSplitter((line) => {
      output += `${line}\n`;
      options.onLine?.(line);
    });
    const control = new LineSplitter((line) => {
      const code = /^exit (\d+)$/.exec(line)?.[1];
      if (code === undefined) return;
      exitCode = Number(code);
      // A power-off waits for disks, and a dead handler's disk never answers.
      killIn(powerOffSeconds);
    });
    const [, kernel, monitor, job, status] = child.stdio;
    for (const [stream, sink] of [
      [kernel, (text: string) => (consoleText += text)],
      [monitor, (text: string) => (consoleText += text)],
      [job, (text: string) => lines.push(text)],
      [status, (text: string) => control.push(text)],
    ] as const) {
      if (stream === null || stream === undefined || !('setEncoding' in stream)) continue;
      stream.setEncoding('utf8');
      stream.on('data', sink);
    }
    try {
      await new Promise<void>((done, failed) => {
        child.once('error', failed);
        child.once('close', () => done());
        // A helper process of the machine may hold the pipes open after its leader's end.
        child.once('exit', () => killIn(0.5));
      });
    } finally {
      for (const timer of timers) clearTimeout(timer);
      kill();
    }
    lines.end();
    const kernelLog =
      consoleText
        .replaceAll('\r', '')
        .split(endOfRunMark)[0]
        ?.replace(/[^\n]*$/, '') ?? '';
    return {
      exitCode,
      timedOut: exitCode === 124 || (exitCode === undefined && child.signalCode === 'SIGKILL'),
      output,
      kernelLog,
      kernelProblems: kernelProblems(kernelLog),
      seconds: Number(process.hrtime.bigint() - started) / 1e9,
    };
  } finally {
    rmSync(dir, { recursive: true, force: true });
  }
}
