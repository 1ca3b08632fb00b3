// SPDX-License-Identifier: Apache-2.0
/**
 * Every combination of format options that qcow2 allows, and a choice of them in which every pair of
 * values that can meet does.
 */
import type { CreateOptions } from '../src/index.js';
import { KiB, MiB } from './util.js';

const values = {
  version: [3, 2],
  clusterSize: [64 * KiB, 512, 4 * KiB, 16 * KiB, 2 * MiB],
  refcountBits: [16, 1, 2, 4, 8, 32, 64],
  extendedL2: [false, true],
  compressionType: ['zlib', 'zstd'],
  /** Writes of whole clusters are compressed. */
  compress: [false, true],
  lazyRefcounts: [false, true],
  backing: ['none', 'raw, shorter', 'qcow2, longer', 'three deep'],
  dataFile: ['none', 'own', 'raw'],
  encrypted: [false, true],
  bitmap: [false, true],
} as const;

type Values = typeof values;
export type Combination = { readonly [Key in keyof Values]: Values[Key][number] };

const keys = Object.keys(values) as (keyof Values)[];

/** What the format, or QEMU, does not know together. */
function possible(c: Combination): boolean {
  const needsVersion3 =
    c.refcountBits !== 16 ||
    c.extendedL2 ||
    c.compressionType === 'zstd' ||
    c.lazyRefcounts ||
    c.dataFile !== 'none' ||
    c.bitmap;
  if (c.version === 2 && needsVersion3) return false;
  if (c.extendedL2 && c.clusterSize < 16 * KiB) return false;
  if (c.dataFile !== 'none' && (c.compress || c.compressionType === 'zstd')) return false;
  if (c.dataFile === 'raw' && c.backing !== 'none') return false;
  return !(c.compress && c.encrypted);
}

export function allCombinations(): Combination[] {
  let partial: Partial<Combination>[] = [{}];
  for (const key of keys) {
    partial = partial.flatMap((c) => values[key].map((value) => ({ ...c, [key]: value })));
  }
  return (partial as Combination[]).filter(possible);
}

/** Few combinations with every pair of values that any combination has; the same ones every time. */
export function pairwise(all: readonly Combination[]): Combination[] {
  const numbers = new Map<string, number>();
  const number = (pair: string): number => {
    const known = numbers.get(pair) ?? numbers.size;
    numbers.set(pair, known);
    return known;
  };
  const candidates = all.map((c) =>
    keys.flatMap((a, i) => keys.slice(i + 1).map((b) => number(`${a}=${c[a]} ${b}=${c[b]}`))),
  );
  const missing = new Set(numbers.values());
  const chosen: Combination[] = [];
  while (missing.size > 0) {
    let best = 0;
    let most = 0;
    for (const [i, pairs] of candidates.entries()) {
      let count = 0;
      for (const pair of pairs) if (missing.has(pair)) count++;
      if (count > most) [best, most] = [i, count];
    }
    chosen.push(all[best] as Combination);
    for (const pair of candidates[best] ?? []) missing.delete(pair);
  }
  return chosen;
}

/** `v3 64K …`: what differs from the defaults. */
export function describeCombination(c: Combination): string {
  const parts = keys.map((key) => {
    const value = c[key];
    if (key === 'version') return `v${value}`;
    if (key === 'clusterSize') return `${Number(value) / KiB}K`;
    if (value === values[key][0]) return '';
    if (value === true) return key;
    return `${key} ${value}`;
  });
  return parts.filter(Boolean).join(', ');
}

export const PASSPHRASE = 'open sesame';

/** The options of the top image, without what refers to other files. */
export function createOptions(c: Combination, size: number): CreateOptions {
  return {
    size,
    version: c.version,
    clusterSize: c.clusterSize,
    refcountBits: c.refcountBits,
    extendedL2: c.extendedL2,
    compressionType: c.compressionType,
    lazyRefcounts: c.lazyRefcounts,
    ...(c.encrypted ? { encryption: { passphrase: PASSPHRASE, iterationTime: 1 } } : {}),
  };
}

/** The same for `qemu-img create -o`. */
export function qemuOptions(c: Combination): string[] {
  return [
    `compat=${c.version === 2 ? '0.10' : '1.1'}`,
    `cluster_size=${c.clusterSize}`,
    `refcount_bits=${c.refcountBits}`,
    `extended_l2=${c.extendedL2 ? 'on' : 'off'}`,
    `compression_type=${c.compressionType}`,
    `lazy_refcounts=${c.lazyRefcounts ? 'on' : 'off'}`,
  ];
}
