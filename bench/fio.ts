// SPDX-License-Identifier: Apache-2.0
/** What the benchmarks read out of fio's JSON report. */
export interface FioResult {
  iops: number;
  bytesPerSecond: number;
  p99Ns: number;
  /** Reads, or writes. */
  operations: number;
}

interface FioSide {
  iops: number;
  bw_bytes: number;
  total_ios: number;
  clat_ns: Latency;
  /** From submission on; with `--lat_percentiles=1`. */
  lat_ns?: Latency;
}

interface Latency {
  percentile?: Record<string, number>;
}

/** @throws Error naming the measurement when the text is not fio's report, or the report is empty */
export function parseFio(text: string, name: string): FioResult {
  // Warnings may come before the report.
  const start = text.indexOf('{');
  const report = JSON.parse(start < 0 ? 'null' : text.slice(start)) as {
    jobs: { read: FioSide; write: FioSide }[];
  } | null;
  const job = report?.jobs[0];
  const side = job && (job.read.total_ios > 0 ? job.read : job.write);
  const latency = side?.lat_ns?.percentile ?? side?.clat_ns.percentile;
  const p99Ns = latency?.['99.000000'];
  if (!side || side.iops <= 0 || p99Ns === undefined) {
    throw new Error(`fio reported nothing for ${name}: ${text.slice(0, 200)}`);
  }
  return { iops: side.iops, bytesPerSecond: side.bw_bytes, p99Ns, operations: side.total_ios };
}
