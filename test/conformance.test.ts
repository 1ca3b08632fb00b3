// SPDX-License-Identifier: Apache-2.0
import { describe, expect, it } from 'vitest';
import { makePlan, suites } from '../conformance/plan.js';
import {
  answeredByKernel,
  combine,
  count,
  formatTable,
  shortcomings,
} from '../conformance/report.js';
import { parseOutput, type TestResult } from '../conformance/suite.js';

const output = `

     CUnit - A unit testing framework for C - Version 2.1-3


Suite: Read10
  Test: Simple ...passed
  Test: BeyondEol ...    [INFO] something happened
passed
  Test: DpoFua ...    [SKIPPED] REPORT_SUPPORTED_OPCODES is not implemented.
    [SKIPPED] REPORT_SUPPORTED_OPCODES is not implemented.
passed
  Test: Async ...    [SKIPPED] LUN too small. Skipping assert
passed    [FAILED] PRIN command: failed with sense. RESERVATION CONFLICT

Suite: Verify10
  Test: Simple ...    [FAILED] VERIFY10 command failed
FAILED
    1. test_verify10_simple.c:45  - CU_ASSERT_EQUAL(_r,0)
    2. test_verify10_simple.c:47  - CU_ASSERT_EQUAL(_r,0)
  Test: Dpo ...FAILED
    1. test_verify10_dpo.c:12  - CU_FAIL("no")

Run Summary:    Type  Total    Ran Passed Failed Inactive
              suites      1      1    n/a      0        0
               tests      6      6      4      2        0
`;

describe('parseOutput', () => {
  it('tells passed, failed and skipped apart', () => {
    expect(parseOutput(output, 'unfinished')).toEqual([
      { name: 'Read10.Simple', verdict: 'passed', detail: '' },
      { name: 'Read10.BeyondEol', verdict: 'passed', detail: '' },
      {
        name: 'Read10.DpoFua',
        verdict: 'skipped',
        detail: 'REPORT_SUPPORTED_OPCODES is not implemented.',
      },
      { name: 'Read10.Async', verdict: 'passed', detail: '' },
      {
        name: 'Verify10.Simple',
        verdict: 'failed',
        detail: '1. test_verify10_simple.c:45  - CU_ASSERT_EQUAL(_r,0)',
      },
      {
        name: 'Verify10.Dpo',
        verdict: 'failed',
        detail: '1. test_verify10_dpo.c:12  - CU_FAIL("no")',
      },
    ]);
  });

  it('takes a test of several parts for run when one of them was', () => {
    const skip = '    [SKIPPED] SANITIZE CRYPTO_ERASE is not implemented.\n';
    const test = (name: string, skips: number) =>
      `  Test: ${name} ...${skip.repeat(skips)}passed\n`;
    const text = `Suite: Sanitize\n${test('Readonly', 2)}${test('Reservations', 3)}`;
    expect(parseOutput(text, '').map(({ verdict }) => verdict)).toEqual(['passed', 'skipped']);
  });

  it('takes a test without a verdict for failed', () => {
    const cut = 'Suite: Read10\n  Test: Simple ...passed\n  Test: Async ...    waiting\n';
    expect(parseOutput(cut, 'out of time')).toEqual([
      { name: 'Read10.Simple', verdict: 'passed', detail: '' },
      { name: 'Read10.Async', verdict: 'failed', detail: 'out of time' },
    ]);
    expect(parseOutput('error: could not connect\n', 'out of time')).toEqual([]);
  });
});

function lun(configuration: string, ...results: TestResult[]) {
  return { subject: 'file', configuration, results };
}

function result(name: string, verdict: TestResult['verdict'], detail = ''): TestResult {
  return { name, verdict, detail };
}

describe('combine', () => {
  it('passes what passed once and failed nowhere', () => {
    const report = combine([
      lun(
        'thin',
        result('A.a', 'skipped', 'why'),
        result('A.b', 'passed'),
        result('A.c', 'skipped', 'x'),
      ),
      lun('thick', result('A.a', 'passed'), result('A.b', 'failed', 'assertion')),
      lun('4k', result('A.b', 'passed'), result('A.a', 'skipped', 'why')),
    ]);
    expect(report).toEqual({
      'A.a': { outcome: 'passed', detail: '' },
      'A.b': { outcome: 'failed', detail: 'thick: assertion' },
      'A.c': { outcome: 'skipped', detail: 'x' },
    });
  });

  it('tells apart what the kernel answers, but a pass is a pass', () => {
    const [first, second] = Object.keys(answeredByKernel) as [string, string];
    const report = combine([lun('thin', result(first, 'failed', 'x'), result(second, 'passed'))]);
    expect(report[first]?.outcome).toBe('kernel');
    expect(report[second]?.outcome).toBe('passed');
    expect(count(report, 'failed')).toBe(0);
    expect(formatTable(new Map([['file', report]]))).toContain(
      'file                    1        0        1        0',
    );
  });
});

describe('shortcomings', () => {
  const good = combine([lun('thin', result('A.a', 'passed'))]);

  it('finds none in a run as good as the best', () => {
    expect(shortcomings('file', good, [lun('thin')], 1)).toEqual([]);
  });

  it('names failures, fewer passes, and a LUN that could not be tested', () => {
    const bad = combine([lun('thin', result('A.a', 'failed'), result('A.b', 'passed'))]);
    expect(shortcomings('file', bad, [lun('thin')], 1)).toEqual(['file: 1 failed']);
    expect(shortcomings('file', good, [lun('thin')], 2)).toEqual([
      'file: 1 passed, below the recorded best of 2',
    ]);
    expect(shortcomings('file', good, [{ ...lun('thin'), failure: 'it died' }], 1)).toEqual([
      'file thin: it died',
    ]);
  });
});

describe('makePlan', () => {
  const base = { root: process.cwd(), examples: ['file'], peers: false, short: false };

  it('runs every suite in the everyday configuration, and the peers beside it', () => {
    const { luns } = makePlan({ ...base, peers: true });
    const tested = new Set(luns[0]?.tests.map((name) => name.replace(/\..*/, '')));
    expect(tested).toEqual(new Set(Object.keys(suites)));
    expect(luns.map(({ subject }) => subject).slice(-2)).toEqual(['fileio', 'tcmu-runner']);
    expect(Object.values(suites).reduce((sum, tests) => sum + tests)).toBe(230);
  });

  it('keeps to the configurations and tests that were asked for', () => {
    const { luns } = makePlan({ ...base, configurations: ['thick'], tests: ['Unmap.VPD'] });
    expect(luns).toMatchObject([{ configuration: 'thick', tests: ['Unmap.VPD'] }]);
  });

  it('says what an example lacks', () => {
    expect(() => makePlan({ ...base, examples: ['none'] })).toThrow(/conformance\.json/);
  });
});
