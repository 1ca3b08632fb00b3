// SPDX-License-Identifier: Apache-2.0
/**
 * What libiscsi's `iscsi-test-cu` prints in verbose mode, taken apart. Nothing here runs anything.
 *
 * CUnit prints `  Test: Name ...`, then whatever the test says, then its verdict, at the end of that line
 * or at the start of a later one; failed assertions follow, numbered. A test that passed but said
 * `[SKIPPED]` did not get to what it is for, and counts as skipped, except where it left out a single
 * assertion because of the size of the disk.
 */

export type Verdict = 'passed' | 'failed' | 'skipped';

export interface TestResult {
  /** `Read10.Simple`: suite and test. */
  readonly name: string;
  readonly verdict: Verdict;
  /** Why it failed or skipped, in the suite's own words; empty when it passed. */
  readonly detail: string;
}

/** Tests made of several parts, each of which says so when it skips: skipped only when all of them are. */
const parts: Readonly<Record<string, number>> = {
  'ReadOnly.ReadOnlySBC': 11,
  'Sanitize.Readonly': 3,
  'Sanitize.Reservations': 3,
};

/** CHECK_SIZE of the suite: one assertion left out, the test goes on. */
const SKIPPED_ASSERTION = 'Skipping assert';

/** A test that has no verdict failed: the run ended inside it, for the reason `unfinished`. */
export function parseOutput(output: string, unfinished: string): TestResult[] {
  const results: TestResult[] = [];
  let suite = '';
  let open: { name: string; said: string[]; verdict?: string } | undefined;
  const close = () => {
    if (open !== undefined) results.push(judge(open.name, open.said, open.verdict, unfinished));
    open = undefined;
  };
  for (const line of output.split('\n')) {
    const heading = /^(Suite| {2}Test|Run Summary): ?(\S*)(?: \.\.\.(.*))?$/.exec(line);
    if (heading?.[1] === 'Suite') {
      close();
      suite = heading[2] as string;
    } else if (heading !== null) {
      close();
      if (heading[1] !== 'Run Summary') open = { name: `${suite}.${heading[2]}`, said: [] };
    } else if (line.startsWith('Run Summary:')) close();
    if (open === undefined) continue;
    const rest = heading === null ? line : (heading[3] ?? '');
    const verdict = open.verdict === undefined ? /^(passed|FAILED)/.exec(rest)?.[1] : undefined;
    if (verdict !== undefined) open.verdict = verdict;
    else if (rest.trim() !== '') open.said.push(rest.trim());
  }
  close();
  return results;
}

function judge(
  name: string,
  said: readonly string[],
  verdict: string | undefined,
  unfinished: string,
): TestResult {
  if (verdict === undefined) return { name, verdict: 'failed', detail: unfinished };
  if (verdict === 'FAILED') {
    const assertions = said.filter((line) => /^\d+\. /.test(line));
    return { name, verdict: 'failed', detail: (assertions[0] ?? said[0] ?? '').slice(0, 160) };
  }
  const skips = said.filter(
    (line) => line.includes('[SKIPPED]') && !line.includes(SKIPPED_ASSERTION),
  );
  const skipped = skips.length >= (parts[name] ?? 1) ? skips[0] : undefined;
  if (skipped === undefined) return { name, verdict: 'passed', detail: '' };
  return { name, verdict: 'skipped', detail: skipped.replace(/.*\[SKIPPED\]\s*/, '') };
}
