// SPDX-License-Identifier: Apache-2.0
/** The judge of the crash tests is judged first: it must find every kind of loss. */
import { describe, expect, it } from 'vitest';
import {
  BLOCK,
  DiskModel,
  fill,
  history,
  readVersions,
  recoveredPrefix,
  type Step,
} from './support/model.js';

const blocks = 256;
const options = { seed: 7, blocks };

function stateAfter(steps: number, skip: readonly number[] = []): Uint32Array {
  const model = new DiskModel(blocks);
  for (const step of history(options)) {
    if (step.seq > steps) break;
    if (!skip.includes(step.seq)) model.apply(step);
  }
  return model.versions;
}

function firstSteps(count: number): Step[] {
  const steps: Step[] = [];
  for (const step of history(options)) if (steps.push(step) === count) break;
  return steps;
}

function imageOf(versions: Uint32Array): Buffer {
  const image = Buffer.alloc(blocks * BLOCK);
  versions.forEach((seq, block) => {
    if (seq > 0) fill(image.subarray(block * BLOCK, (block + 1) * BLOCK), seq, block);
  });
  return image;
}

describe('the model', () => {
  it('takes any prefix that holds what was flushed', () => {
    for (const steps of [40, 41, 99, 100]) {
      const versions = readVersions(imageOf(stateAfter(steps)));
      const crash = { history: options, flushed: 40, issued: 100 };
      // A step may change nothing (zeros over zeros): then the prefix may be called longer.
      expect(recoveredPrefix(versions, crash)).toBeGreaterThanOrEqual(steps);
    }
  });

  it('finds a flushed step that is lost', () => {
    const crash = { history: options, flushed: 40, issued: 100 };
    expect(() => recoveredPrefix(stateAfter(30), crash)).toThrow(/flushed ones are lost/);
  });

  it('finds a hole in the middle, and what comes from after the end', () => {
    const crash = { history: options, flushed: 0, issued: 100 };
    const visible = firstSteps(60).find(
      ({ kind, seq }) => kind === 'write' && stateAfter(60).includes(seq),
    );
    expect(() => recoveredPrefix(stateAfter(60, [visible?.seq ?? 0]), crash)).toThrow(/no prefix/);
    expect(() => recoveredPrefix(stateAfter(120), crash)).toThrow(/no prefix/);
  });

  it('finds a block that is torn, or in another one’s place', () => {
    const image = imageOf(stateAfter(50));
    const written = stateAfter(50).findIndex((seq) => seq > 0);
    image.writeUInt8(1, written * BLOCK + 4000);
    expect(() => readVersions(image)).toThrow(`block ${written}`);
    const moved = imageOf(stateAfter(50));
    moved.copy(moved, (blocks - 1) * BLOCK, written * BLOCK, (written + 1) * BLOCK);
    expect(() => readVersions(moved)).toThrow(`block ${blocks - 1}`);
  });
});
