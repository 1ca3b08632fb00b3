// SPDX-License-Identifier: Apache-2.0
/**
 * Programs that do not outlive the process that started them, however that ends: the kernel sends them a signal
 * (prctl PR_SET_PDEATHSIG, by util-linux' setpriv, which every Debian has).
 */

/** The command line that runs `argv` so; its process is the program's. */
export function onLeash(
  argv: readonly string[],
  signal: 'KILL' | 'TERM' = 'KILL',
): [program: string, args: string[]] {
  return ['setpriv', ['--pdeathsig', signal, ...argv]];
}
