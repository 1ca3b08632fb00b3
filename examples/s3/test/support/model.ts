// SPDX-License-Identifier: Apache-2.0
/**
 * What a disk must hold after a crash: the state after the first P of the writes, for some P that is no less than what was
 * flushed.
 *
 * Contract: a history follows from its seed alone, so that a writer which is killed and the one who checks after it need not talk. Every block that was
 * written names the step that wrote it, and its whole content follows from that name and its place: nothing else can pass for it.
 */
import { randomNumbers } from './random.js';

export const BLOCK = 4096;

export interface Step {
  /** From 1. */
  readonly seq: number;
  readonly kind: 'write' | 'zero' | 'unmap';
  readonly first: number;
  readonly count: number;
}

export interface HistoryOptions {
  readonly seed: number;
  readonly blocks: number;
  /** Steps that came before, with other seeds. Default 0. */
  readonly after?: number;
}

/** Without end. Half of the writes go to a sixteenth of the disk, so that blocks are written over and over. */
export function* history({ seed, blocks, after = 0 }: HistoryOptions): Generator<Step> {
  const random = randomNumbers(seed);
  const below = (bound: number) => Math.floor(random() * bound);
  for (let seq = after + 1; ; seq++) {
    const what = random();
    const kind = what < 0.9 ? 'write' : what < 0.95 ? 'unmap' : 'zero';
    const first = random() < 0.5 ? below(Math.ceil(blocks / 16)) : below(blocks);
    const most = kind === 'write' ? (random() < 0.8 ? 4 : 32) : 64;
    yield { seq, kind, first, count: Math.min(1 + below(most), blocks - first) };
  }
}

/** Fills blocks as a step writes them. */
export function fill(data: Buffer, seq: number, first: number): void {
  const pattern = Buffer.alloc(16);
  for (let block = 0; block * BLOCK < data.length; block++) {
    pattern.writeUInt32LE(seq, 0);
    pattern.writeUInt32LE(first + block, 4);
    pattern.writeUInt32LE(Math.imul(seq, 0x9e3779b1) >>> 0, 8);
    pattern.writeUInt32LE(0x746d6375, 12);
    data.fill(pattern, block * BLOCK, (block + 1) * BLOCK);
  }
}

/** For each block the step that wrote it last, 0 for zeros. */
export class DiskModel {
  readonly versions: Uint32Array;

  constructor(blocks: number, versions?: Uint32Array) {
    this.versions = versions === undefined ? new Uint32Array(blocks) : versions.slice();
  }

  apply({ seq, kind, first, count }: Step): void {
    this.versions.fill(kind === 'write' ? seq : 0, first, first + count);
  }
}

/** Which step wrote each block of an image. @throws Error for a block that no step wrote as it is */
export function readVersions(image: Buffer, from = 0): Uint32Array {
  const versions = new Uint32Array(image.length / BLOCK);
  const zeros = Buffer.alloc(BLOCK);
  const expected = Buffer.alloc(BLOCK);
  for (let block = 0; block < versions.length; block++) {
    const content = image.subarray(block * BLOCK, (block + 1) * BLOCK);
    if (content.equals(zeros)) continue;
    const seq = content.readUInt32LE(0);
    fill(expected, seq, from + block);
    if (!content.equals(expected)) throw new Error(`block ${from + block} holds what nobody wrote`);
    versions[block] = seq;
  }
  return versions;
}

export interface Crash {
  /** The state before the history began. Default: zeros. */
  readonly before?: Uint32Array;
  readonly history: HistoryOptions;
  /** The last step that a flush which succeeded covers. */
  readonly flushed: number;
  /** The last step that may have been begun. */
  readonly issued: number;
}

/**
 * Which prefix of a history a recovered disk holds.
 * @returns the last step of the prefix
 * @throws Error when it is no prefix that keeps what was flushed, saying in what way
 */
export function recoveredPrefix(versions: Uint32Array, crash: Crash): number {
  const { flushed, issued } = crash;
  const model = new DiskModel(versions.length, crash.before);
  let wrong = 0;
  for (let block = 0; block < versions.length; block++) {
    if (model.versions[block] !== versions[block]) wrong++;
  }
  const start = crash.history.after ?? 0;
  let last: number | undefined;
  if (wrong === 0) last = start;
  for (const step of history(crash.history)) {
    if (step.seq > issued) break;
    for (let block = step.first; block < step.first + step.count; block++) {
      if (model.versions[block] !== versions[block]) wrong--;
    }
    model.apply(step);
    for (let block = step.first; block < step.first + step.count; block++) {
      if (model.versions[block] !== versions[block]) wrong++;
    }
    if (wrong === 0) last = step.seq;
  }
  const where = `seed ${crash.history.seed}, flushed ${flushed}, issued ${issued}`;
  if (last === undefined)
    throw new Error(`the disk holds no prefix of what was written (${where})`);
  if (last < flushed) {
    throw new Error(
      `the disk holds only the first ${last} steps: flushed ones are lost (${where})`,
    );
  }
  return last;
}
