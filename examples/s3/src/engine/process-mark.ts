// SPDX-License-Identifier: Apache-2.0
/**
 * Who a process of this host is, so that a later one can tell that it is gone: boot, PID namespace, PID and start time. A
 * PID that is used again has another start time; another boot or namespace can't be looked into, so nothing
 * is known about it.
 */
import { readFileSync, readlinkSync } from 'node:fs';

/** Of this process; empty where there is no /proc. */
export function processMark(): string {
  try {
    return [...place(), process.pid, startOf(process.pid)].join(' ');
  } catch {
    return '';
  }
}

/** Whether the process has certainly ended. */
export function isGone(mark = ''): boolean {
  const [boot, namespace, pid, start] = mark.split(' ');
  if (start === undefined) return false;
  try {
    const [ourBoot, ourNamespace] = place();
    if (boot !== ourBoot || namespace !== ourNamespace) return false;
    return startOf(Number(pid)) !== start;
  } catch {
    return false;
  }
}

function place(): [boot: string, namespace: string] {
  return [
    readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim(),
    readlinkSync('/proc/self/ns/pid'),
  ];
}

/** Clock ticks since boot (proc(5), field 22), after the name, which may hold anything; undefined: no such process. */
function startOf(pid: number): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19];
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}
