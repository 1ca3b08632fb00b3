// SPDX-License-Identifier: Apache-2.0
/**
 * From results of single LUNs to one verdict a test and backstore, a table, and the comparison with the
 * recorded best. Pure.
 *
 * A test of a backstore has failed when it failed in any configuration, has passed when it ran and passed
 * in at least one, and is skipped otherwise. A failure that the kernel is the cause of, whatever the
 * handler does (`answeredByKernel`), is told apart: it is no failure of the backstore, nor a pass.
 */
import type { TestResult, Verdict } from './suite.js';

export interface LunResults {
  readonly subject: string;
  readonly configuration: string;
  readonly results: readonly TestResult[];
  /** Why the LUN could not be tested to the end. */
  readonly failure?: string | undefined;
}

/** A verdict, or that the kernel fails the test for every TCMU backstore. */
export type Outcome = Verdict | 'kernel';

export interface Combined {
  readonly outcome: Outcome;
  /** Why it failed or skipped, and in which configuration. */
  readonly detail: string;
}

export type SubjectReport = Readonly<Record<string, Combined>>;

/** Tests that fail for every TCMU backstore, by the reason that the kernel's source gives. */
export const answeredByKernel: Readonly<Record<string, string>> = {
  'iSCSIdatasn.iSCSIDataSnInvalid':
    'iscsi_target_mod ends the connection on a wrong DataSN: no command reaches a handler',
  ...Object.fromEntries(
    ['Read10Invalid', ...['Read', 'Write', 'WriteVerify'].flatMap(residuals)].map((test) => [
      `iSCSIResiduals.${test}`,
      'the residual of a buffer unlike the CDB is the target core’s (target_cmd_size_check), which does ' +
        'not look at the CDBs of passed-through devices (passthrough_parse_cdb)',
    ]),
  ),
};

function residuals(command: string): string[] {
  return [10, 12, 16].map((form) => `${command}${form}Residuals`);
}

/** One verdict a test, over all configurations of one subject. */
export function combine(luns: readonly LunResults[]): SubjectReport {
  const combined: Record<string, Combined> = {};
  const rank: Record<Outcome, number> = { skipped: 0, passed: 1, kernel: 2, failed: 3 };
  for (const { configuration, results } of luns) {
    for (const { name, verdict, detail } of results) {
      const excused = verdict === 'failed' ? answeredByKernel[name] : undefined;
      const outcome: Outcome = excused === undefined ? verdict : 'kernel';
      const known = combined[name];
      if (known !== undefined && rank[known.outcome] >= rank[outcome]) continue;
      const said = excused ?? detail;
      combined[name] = {
        outcome,
        detail: verdict === 'failed' && excused === undefined ? `${configuration}: ${said}` : said,
      };
    }
  }
  return combined;
}

export function count(report: SubjectReport, outcome: Outcome): number {
  return Object.values(report).filter((entry) => entry.outcome === outcome).length;
}

/** Column by column, one row a subject, and what did not pass, by reason. */
export function formatTable(reports: ReadonlyMap<string, SubjectReport>): string {
  const lines = [row('backstore', ['passed', 'failed', 'kernel', 'skipped'])];
  for (const [subject, report] of reports) {
    const counts = (['passed', 'failed', 'kernel', 'skipped'] as const).map((outcome) =>
      String(count(report, outcome)),
    );
    lines.push(row(subject, counts));
  }
  for (const [subject, report] of reports) {
    for (const outcome of ['failed', 'kernel', 'skipped'] as const) {
      const reasons = new Map<string, string[]>();
      for (const [name, entry] of Object.entries(report)) {
        if (entry.outcome !== outcome) continue;
        reasons.set(entry.detail, [...(reasons.get(entry.detail) ?? []), name]);
      }
      if (reasons.size > 0) lines.push('', `${subject}: ${titles[outcome]}`);
      for (const [reason, names] of reasons) lines.push(`  ${names.join(' ')}: ${reason}`);
    }
  }
  return lines.join('\n');
}

const titles = {
  failed: 'failed',
  kernel: 'failed, as for every TCMU device: the kernel answers',
  skipped: 'skipped in every configuration',
} as const;

function row(name: string, columns: readonly string[]): string {
  return name.padEnd(16) + columns.map((text) => text.padStart(9)).join('');
}

/** What keeps a run from being as good as the recorded best; empty when it is. */
export function shortcomings(
  subject: string,
  report: SubjectReport,
  luns: readonly LunResults[],
  best: number | undefined,
): string[] {
  const found = luns.flatMap(({ configuration, failure }) =>
    failure === undefined ? [] : [`${subject} ${configuration}: ${failure}`],
  );
  const failed = count(report, 'failed');
  if (failed > 0) found.push(`${subject}: ${failed} failed`);
  const passed = count(report, 'passed');
  if (best !== undefined && passed < best) {
    found.push(`${subject}: ${passed} passed, below the recorded best of ${best}`);
  }
  return found;
}
