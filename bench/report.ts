// SPDX-License-Identifier: Apache-2.0
/**
 * What all benchmarks share: samples in, medians and ratios out, one table, one JSON form, one set of bars.
 *
 * Contract: a sample is one value of one subject in one round. A row sums up a subject's rounds; a ratio compares the medians of
 * our subject and a peer such that above 1 means we are better, whichever way the metric points. The JSON written is
 * `{ meta, rows, ratios }` with exactly the fields below. Nothing here measures.
 */
import { writeFileSync } from 'node:fs';

export interface Metric {
  name: string;
  unit: string;
  better: 'higher' | 'lower';
}

export interface Sample {
  job: string;
  metric: Metric;
  subject: string;
  round: number;
  value: number;
}

export interface Row {
  job: string;
  metric: string;
  unit: string;
  subject: string;
  median: number;
  min: number;
  max: number;
  /** How many values the median is of. */
  rounds: number;
}

export interface Ratio {
  job: string;
  metric: string;
  /** The subject that ours is compared with. */
  peer: string;
  /** Of the medians; above 1: ours is better. */
  ratio: number;
}

export interface Report {
  meta: Record<string, unknown>;
  rows: Row[];
  ratios: Ratio[];
}

/** The least ratio that is good enough. */
export interface Bar {
  metric: string;
  peer: string;
  ratio: number;
  /** The jobs it holds for. */
  jobs: readonly string[];
}

/** @throws RangeError on an empty list */
export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const upper = sorted[sorted.length >> 1];
  const lower = sorted[(sorted.length - 1) >> 1];
  if (upper === undefined || lower === undefined) throw new RangeError('median of nothing');
  return (lower + upper) / 2;
}

/** Rows in the order of the samples' first appearance, and a ratio wherever ours and a peer have the same job and metric. */
export function summarise(
  meta: Record<string, unknown>,
  samples: readonly Sample[],
  ours: string,
): Report {
  const groups = new Map<string, [Sample, ...Sample[]]>();
  for (const sample of samples) {
    const key = JSON.stringify([sample.job, sample.metric.name, sample.subject]);
    const group = groups.get(key);
    if (group) group.push(sample);
    else groups.set(key, [sample]);
  }
  const summaries = [...groups.values()].map(summary);
  const ratios: Ratio[] = [];
  for (const { row, better } of summaries) {
    if (row.subject === ours) continue;
    const own = summaries.find(
      (other) =>
        other.row.subject === ours && other.row.job === row.job && other.row.metric === row.metric,
    )?.row.median;
    if (own === undefined) continue;
    const ratio = better === 'higher' ? own / row.median : row.median / own;
    // A count can be 0 for both (no system call at all): equal.
    ratios.push({
      job: row.job,
      metric: row.metric,
      peer: row.subject,
      ratio: own === row.median ? 1 : ratio,
    });
  }
  return { meta, rows: summaries.map(({ row }) => row), ratios };
}

function summary(group: readonly [Sample, ...Sample[]]): {
  row: Row;
  better: Metric['better'];
} {
  const [{ job, metric, subject }] = group;
  const values = group.map(({ value }) => value);
  const row: Row = {
    job,
    metric: metric.name,
    unit: metric.unit,
    subject,
    median: median(values),
    min: Math.min(...values),
    max: Math.max(...values),
    rounds: values.length,
  };
  return { row, better: metric.better };
}

/** @throws Error naming the file, when it can't be written */
export function writeJson(file: string, report: Report): void {
  try {
    writeFileSync(file, `${JSON.stringify(report, null, 2)}\n`);
  } catch (cause) {
    throw new Error(`can't write the results to ${file}: ${(cause as Error).message}`, { cause });
  }
}

/** One line a row: median, spread, and for peers how many times better ours is. */
export function formatTable({ rows, ratios }: Report): string {
  const head = ['job', 'metric', 'subject', 'median', 'min', 'max', 'unit', 'ours is better by'];
  const body = rows.map((row) => {
    const ratio = ratios.find(
      ({ job, metric, peer }) => job === row.job && metric === row.metric && peer === row.subject,
    );
    const numbers = [row.median, row.min, row.max].map(formatNumber);
    return [row.job, row.metric, row.subject, ...numbers, row.unit, formatRatio(ratio?.ratio)];
  });
  return alignColumns([head, ...body], [3, 4, 5, 7]);
}

/** One line a bar and job; `met` says whether all of those that were measured are met. */
export function checkBars(report: Report, bars: readonly Bar[]): { text: string; met: boolean } {
  let met = true;
  const lines: string[][] = [];
  for (const bar of bars) {
    for (const job of bar.jobs) {
      const found = report.ratios.find(
        (ratio) => ratio.job === job && ratio.metric === bar.metric && ratio.peer === bar.peer,
      );
      if (!found) continue;
      const good = found.ratio >= bar.ratio;
      met &&= good;
      const wanted = `at least ${bar.ratio} times ${bar.peer}`;
      lines.push([job, bar.metric, wanted, formatRatio(found.ratio), good ? 'met' : 'NOT MET']);
    }
  }
  return { text: lines.length > 0 ? alignColumns(lines, [3]) : '', met };
}

function formatRatio(ratio: number | undefined): string {
  return ratio === undefined ? '' : `${ratio.toFixed(2)} x`;
}

/** Four significant digits at least, thousands apart. */
function formatNumber(value: number): string {
  const digits = value >= 1000 || Number.isInteger(value) ? 0 : value >= 100 ? 1 : 2;
  return value.toLocaleString('en', {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  });
}

function alignColumns(lines: readonly (readonly string[])[], right: readonly number[]): string {
  const widths = lines.reduce<number[]>(
    (all, line) => line.map((cell, index) => Math.max(cell.length, all[index] ?? 0)),
    [],
  );
  return lines
    .map((line) =>
      line
        .map((cell, index) => {
          const width = widths[index] ?? 0;
          return right.includes(index) ? cell.padStart(width) : cell.padEnd(width);
        })
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}
