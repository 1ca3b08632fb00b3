// SPDX-License-Identifier: Apache-2.0
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { bars, jobs, sumHistogram } from '../bench/disk.js';
import { parseFio } from '../bench/fio.js';
import {
  checkBars,
  formatTable,
  type Metric,
  median,
  type Sample,
  summarise,
  writeJson,
} from '../bench/report.js';

const iops: Metric = { name: 'iops', unit: '1/s', better: 'higher' };
const p99: Metric = { name: 'p99', unit: 'µs', better: 'lower' };

function samples(metric: Metric, subject: string, values: number[], job = 'read'): Sample[] {
  return values.map((value, index) => ({ job, metric, subject, round: index + 1, value }));
}

describe('median', () => {
  it('takes the middle, and the mean of the two in the middle', () => {
    expect(median([9, 1, 5])).toBe(5);
    expect(median([4, 1, 3, 100])).toBe(3.5);
  });

  it('refuses an empty list', () => {
    expect(() => median([])).toThrow(RangeError);
  });
});

describe('summarise', () => {
  it('sums up the rounds of each subject', () => {
    const { rows } = summarise({}, samples(iops, 'ours', [30, 10, 20]), 'ours');
    expect(rows).toEqual([
      {
        job: 'read',
        metric: 'iops',
        unit: '1/s',
        subject: 'ours',
        median: 20,
        min: 10,
        max: 30,
        rounds: 3,
      },
    ]);
  });

  it('makes a ratio above 1 mean that ours is better, whichever way the metric points', () => {
    const { ratios } = summarise(
      {},
      [
        ...samples(iops, 'ours', [200]),
        ...samples(iops, 'peer', [100]),
        ...samples(p99, 'peer', [100]),
        ...samples(p99, 'ours', [50]),
      ],
      'ours',
    );
    expect(ratios).toEqual([
      { job: 'read', metric: 'iops', peer: 'peer', ratio: 2 },
      { job: 'read', metric: 'p99', peer: 'peer', ratio: 2 },
    ]);
  });

  it('compares within a job only', () => {
    const all = [...samples(iops, 'ours', [1], 'a'), ...samples(iops, 'peer', [1], 'b')];
    expect(summarise({}, all, 'ours').ratios).toEqual([]);
  });

  it('calls two counts of nothing equal', () => {
    const all = [...samples(p99, 'ours', [0]), ...samples(p99, 'peer', [0])];
    expect(summarise({}, all, 'ours').ratios[0]?.ratio).toBe(1);
  });
});

describe('a report', () => {
  const report = summarise(
    { date: 'today' },
    [...samples(iops, 'ours', [1500, 1600]), ...samples(iops, 'peer', [1000, 1100])],
    'ours',
  );

  it('is a table with the peers’ ratios', () => {
    const [head, ours, peer] = formatTable(report).split('\n');
    expect(head).toMatch(/^job +metric +subject +median/);
    expect(ours).toMatch(/ours +1,550 +1,500 +1,600 +1\/s$/);
    expect(peer).toMatch(/peer +1,050 +1,000 +1,100 +1\/s +1\.48 x$/);
  });

  it('says which bars are met, and leaves out what was not measured', () => {
    const bar = { metric: 'iops', peer: 'peer', jobs: ['read', 'write'] };
    expect(checkBars(report, [{ ...bar, ratio: 1.4 }])).toEqual({
      text: 'read  iops  at least 1.4 times peer  1.48 x  met',
      met: true,
    });
    expect(checkBars(report, [{ ...bar, ratio: 1.5 }])).toEqual({
      text: 'read  iops  at least 1.5 times peer  1.48 x  NOT MET',
      met: false,
    });
  });

  it('is written as JSON with its fields and no others', () => {
    const dir = mkdtempSync(join(tmpdir(), 'tcmu-report-'));
    try {
      const file = join(dir, 'report.json');
      writeJson(file, report);
      const read = JSON.parse(readFileSync(file, 'utf8'));
      expect(read).toEqual(report);
      expect(Object.keys(read)).toEqual(['meta', 'rows', 'ratios']);
      expect(() => writeJson(join(dir, 'none', 'x.json'), report)).toThrow(/none\/x\.json.*ENOENT/);
    } finally {
      rmSync(dir, { recursive: true });
    }
  });
});

describe('the disk benchmark', () => {
  it('has a bar over every job, for instructions and for the wall clock', () => {
    for (const metrics of [['instructions'], ['iops', 'throughput']]) {
      const covered = bars
        .filter(({ metric, peer }) => metrics.includes(metric) && peer === 'tcmu-runner')
        .flatMap((bar) => bar.jobs);
      expect([...covered].sort()).toEqual(jobs.map(({ name }) => name).sort());
    }
  });

  it('reads fio’s report behind its warnings, whichever side was used', () => {
    const idle = { iops: 0, bw_bytes: 0, total_ios: 0, clat_ns: {} };
    const busy = {
      iops: 10,
      bw_bytes: 40960,
      total_ios: 5,
      clat_ns: { percentile: { '99.000000': 7000 } },
    };
    const text = (job: unknown) => `fio: a note\n${JSON.stringify({ jobs: [job] })}`;
    const expected = { iops: 10, bytesPerSecond: 40960, p99Ns: 7000, operations: 5 };
    expect(parseFio(text({ read: busy, write: idle }), 'x')).toEqual(expected);
    expect(parseFio(text({ read: idle, write: busy }), 'x')).toEqual(expected);
    expect(() => parseFio(text({ read: idle, write: idle }), 'job 7')).toThrow(/job 7/);
    expect(() => parseFio('', 'job 7')).toThrow(/job 7/);
  });

  it('sums a tracing histogram over the threads of one process', () => {
    const histogram = `# event histogram
{ common_pid:       7, id.syscall: sys_write                     [  1] } hitcount:         30
{ common_pid:       8, id.syscall: sys_write                     [  1] } hitcount:          4
{ common_pid:      71, id.syscall: sys_read                      [  0] } hitcount:        500
Totals:
    Hits: 534
`;
    expect(sumHistogram(histogram, 'common_pid', new Set([7, 8]))).toBe(34);
  });
});
