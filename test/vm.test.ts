// SPDX-License-Identifier: Apache-2.0
/** The parts of the test kernel's driver that decide whether a run was good. */
import { execFileSync } from 'node:child_process';
import { expect, test } from 'vitest';
import { endOfRunMark, kernelProblems, LineSplitter, shellQuote } from './vm/vm.js';

const boot = [
  '[    1.0] Kernel command line: root=98:0 loglevel=8',
  '[    2.0] sd 0:0:1:0: [sda] Attached SCSI disk',
  '[    3.0] ABORT_TASK: Found referenced loopback task_tag: 1002',
  '[    4.0] critical medium error, dev sda, sector 64 op 0x0:(READ)',
];

test('a log of plain I/O errors has no problems', () => {
  expect(kernelProblems(boot.join('\n'))).toEqual([]);
});

test.each([
  'BUG: kernel NULL pointer dereference, address: 0000000000000008',
  'WARNING: CPU: 0 PID: 1 at drivers/target/target_core_user.c:1800',
  'INFO: task dd:812 blocked for more than 120 seconds.',
  'Kernel panic - not syncing: Fatal exception',
  'Oops: 0000 [#1] PREEMPT SMP',
  'refcount_t: underflow; use-after-free.',
  'Out of memory: Killed process 812 (node)',
  'node[812]: segfault at 10 ip 00007f0e sp 00007ffd error 4',
])('%s is a problem', (line) => {
  expect(kernelProblems([...boot, `[    5.0] ${line}`].join('\n'))).toEqual([`[    5.0] ${line}`]);
});

test('what comes after the end of the run does not count', () => {
  const log = [...boot, `[    5.0] ${endOfRunMark}`, '[    6.0] Call Trace:'].join('\n');
  expect(kernelProblems(log)).toEqual([]);
});

test('lines come out whole, whatever the pieces', () => {
  const lines: string[] = [];
  const splitter = new LineSplitter((line) => lines.push(line));
  for (const piece of ['a', 'b\nc', '\r\n', '\n', 'd']) splitter.push(piece);
  expect(lines).toEqual(['ab', 'c', '']);
  splitter.end();
  splitter.end();
  expect(lines).toEqual(['ab', 'c', '', 'd']);
});

test.each(['', 'plain', "it's", 'a b', '$HOME `id` "x" \\', 'two\nlines', '*', '~'])(
  'a shell takes %j as one word',
  (word) => {
    const printed = execFileSync('/bin/sh', ['-c', `printf '%s|' ${shellQuote(word)}`]);
    expect(printed.toString()).toBe(`${word}|`);
  },
);
