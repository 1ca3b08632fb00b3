// SPDX-License-Identifier: Apache-2.0
/**
 * What every way to boot a test kernel shares: the shape of a run and its result, the signs of trouble in a
 * kernel log, shell quoting, and the duty never to leave a virtual machine behind.
 *
 * Contract: a machine is one process group led by the process given to `ownGroup`. It is killed by that
 * group's id when its time is over and when this process exits, however it exits short of SIGKILL.
 */
import type { ChildProcess } from 'node:child_process';
import { constants } from 'node:os';

export interface VmOptions {
  /** Program and arguments, run as root in the guest; the program is found through the guest's PATH. */
  command: readonly string[];
  /** Added to the guest's environment (which has PATH, HOME, TMPDIR and LANG only). */
  env?: Readonly<Record<string, string>>;
  /** Working directory in the guest; default: this process's, which the guest sees read-only. */
  cwd?: string;
  /** Guest memory in MiB; taken from the host only as it is touched. Default 1024. */
  memoryMb?: number;
  /** The command is stopped after so many seconds, and the machine 30 s later. Default 120. */
  timeoutSeconds?: number;
  /** Host directory, writable in the guest as /run/out. */
  outDir?: string;
  /** Kernel modules to load first; default: TCMU, loopback, sd and sg. */
  modules?: readonly string[];
  /** Host paths below /tmp, /run, /mnt, /var/log or /var/tmp to be seen at their places, read-only. */
  visible?: readonly string[];
  /** Called with every line of the command's output (both streams) as it comes. */
  onLine?: (line: string) => void;
}

export interface VmResult {
  /** Of the command; undefined when the machine ended without saying (a panic, a kill). */
  exitCode: number | undefined;
  /** The command was stopped for taking longer than `timeoutSeconds`. */
  timedOut: boolean;
  /** Both output streams of the command. */
  output: string;
  /** Everything the kernel logged up to the end of the command. */
  kernelLog: string;
  /** Lines of `kernelLog` that mean something broke: oops, warning, hung task… Empty in a good run. */
  kernelProblems: string[];
  /** From start to power-off. */
  seconds: number;
}

/** Modules a TCMU test needs whatever it does. */
export const baseModules: readonly string[] = [
  'configfs',
  'target_core_mod',
  'target_core_user',
  'tcm_loop',
  'sd_mod',
  'sg',
];

/** The guest's init writes this line to the kernel log when the command has ended. */
export const endOfRunMark = 'tcmu-vm: end';

const trouble =
  /\bBUG\b|WARNING:|\bOops\b|Kernel panic|general protection|blocked for more than|Call Trace|segfault|refcount_t|Out of memory|invalid opcode|soft lockup|self-detected stall/;

/** The lines of a kernel log that mean something broke, up to the end-of-run mark. */
export function kernelProblems(log: string): string[] {
  const problems: string[] = [];
  for (const line of log.split('\n')) {
    if (line.includes(endOfRunMark)) break;
    if (trouble.test(line)) problems.push(line.trim());
  }
  return problems;
}

/** Quotes one word for a POSIX shell. */
export function shellQuote(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

/** Cuts a stream into lines; `end` hands out an unfinished last one. */
export class LineSplitter {
  #rest = '';
  readonly #onLine: (line: string) => void;

  constructor(onLine: (line: string) => void) {
    this.#onLine = onLine;
  }

  push(text: string): void {
    const lines = (this.#rest + text).split('\n');
    this.#rest = lines.pop() ?? '';
    for (const line of lines) this.#onLine(line.endsWith('\r') ? line.slice(0, -1) : line);
  }

  end(): void {
    if (this.#rest !== '') this.#onLine(this.#rest);
    this.#rest = '';
  }
}

const groups = new Set<number>();

function killGroup(pid: number): void {
  try {
    process.kill(-pid, 'SIGKILL');
  } catch {
    // ESRCH: the whole group is gone already.
  }
}

let guarded = false;
function guardExit(): void {
  if (guarded) return;
  guarded = true;
  process.on('exit', () => {
    for (const pid of groups) killGroup(pid);
  });
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    process.once(signal, () => process.exit(128 + constants.signals[signal]));
  }
}

/**
 * Takes charge of a machine's process group (the child must have been spawned `detached`).
 * The returned function kills what is left of it; call it when the machine has ended too.
 */
export function ownGroup(child: ChildProcess): () => void {
  const pid = child.pid;
  if (pid === undefined) return () => {};
  guardExit();
  groups.add(pid);
  return () => {
    killGroup(pid);
    groups.delete(pid);
  };
}
