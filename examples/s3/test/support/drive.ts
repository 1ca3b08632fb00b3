// SPDX-License-Identifier: Apache-2.0
/**
 * Writes a history to a disk as a busy initiator does: the next step is begun when the last was acknowledged, flushes run beside.
 *
 * Contract: steps are begun in the order of the history. `onFlushed` is told the last step that a flush which has succeeded covers: one that was
 * acknowledged before the flush was begun.
 */
import type { BlockStore, RequestContext } from 'tcmu';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import { Requests, systemClock } from '../../src/index.js';
import type { ObjectStore } from '../../src/object-store.js';
import { BLOCK, fill, type HistoryOptions, history, type Step } from './model.js';
import { randomNumbers } from './random.js';

export const request: RequestContext = { signal: new AbortController().signal };

/** What creating a disk takes, by the system's clock. */
export function requestsTo(objects: ObjectStore): Requests {
  return new Requests(objects, systemClock, () => {}, 25_000);
}

export interface DriveOptions {
  readonly history: HistoryOptions;
  /** Steps to write. Default: until something fails. */
  readonly steps?: number;
  /** Share of the steps that a flush is begun after. Default 0.05. */
  readonly flushes?: number;
  /** Share of the writes that are FUA. Default 0. */
  readonly fua?: number;
  readonly onIssued?: (seq: number) => void;
  readonly onFlushed?: (seq: number) => void;
}

/** Carries out one step. */
export async function carryOut(disk: BlockStore, step: Step, fua = false): Promise<void> {
  const { seq, kind, first, count } = step;
  const [position, length] = [first * BLOCK, count * BLOCK];
  if (kind === 'write') {
    const data = Buffer.alloc(length);
    fill(data, seq, first);
    await disk.write(position, new MemoryDataOut(data), { ...request, fua });
  } else if (kind === 'unmap') {
    await disk.unmap?.(position, length, request);
  } else {
    await disk.writeZeroes?.(position, length, { ...request, mayUnmap: false });
  }
}

/** @throws what the first step or flush that fails throws */
export async function drive(disk: BlockStore, options: DriveOptions): Promise<void> {
  const { flushes = 0.05, fua = 0, steps = Number.POSITIVE_INFINITY } = options;
  const random = randomNumbers(options.history.seed ^ 0x5eed);
  const flushing = new Set<Promise<void>>();
  let failed: { error: unknown } | undefined;
  let left = steps;
  for (const step of history(options.history)) {
    if (left-- <= 0) break;
    options.onIssued?.(step.seq);
    const durable = step.kind === 'write' && random() < fua;
    await carryOut(disk, step, durable);
    if (random() < flushes) {
      const flush = Promise.resolve(disk.flush?.(request)).then(
        () => options.onFlushed?.(step.seq),
        (error: unknown) => {
          failed = { error };
        },
      );
      flushing.add(flush);
      flush.finally(() => flushing.delete(flush));
    }
    if (failed !== undefined) throw (failed as { error: unknown }).error;
  }
  await Promise.all(flushing);
  if (failed !== undefined) throw (failed as { error: unknown }).error;
}

export async function readImage(disk: BlockStore): Promise<Buffer> {
  const image = Buffer.alloc(disk.size);
  const piece = 1024 * 1024;
  for (let at = 0; at < image.length; at += piece) {
    const data = new MemoryDataIn(image.subarray(at, Math.min(at + piece, image.length)));
    await disk.read(at, data, request);
  }
  return image;
}
