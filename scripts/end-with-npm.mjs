// SPDX-License-Identifier: Apache-2.0
/**
 * `npm run` that is killed leaves what it runs: SIGTERM ends npm and its shell, SIGKILL npm alone. Who calls this ends with
 * them, by SIGTERM to itself. Not run by npm, nothing happens: a shell that put us in the background may go.
 */
import { readFileSync } from 'node:fs';

/** Parent and its parent: the shell and npm. */
function ancestors() {
  try {
    const stat = readFileSync(`/proc/${process.ppid}/stat`, 'utf8');
    return `${process.ppid} ${stat.slice(stat.lastIndexOf(')') + 2).split(' ')[1]}`;
  } catch {
    return '';
  }
}

export function endWithNpm() {
  if (process.env.npm_lifecycle_event === undefined) return;
  const before = ancestors();
  setInterval(() => {
    if (ancestors() !== before) process.kill(process.pid, 'SIGTERM');
  }, 1000).unref();
}
