// SPDX-License-Identifier: Apache-2.0
/**
 * Carries copies out between the logical units of one process, and remembers how they ended (SPC-4, copy
 * operations). Units of one copy group find each other by their NAA name; a unit without a group knows only
 * itself. Who sent a command is not known here, so the group is what keeps an initiator of one disk from others.
 *
 * Blocks go from store to store in pieces of bounded memory: holes of the source are unmapped or zeroed in
 * the destination, what `copyFrom` can do is left to the destination's store, and only the rest is read and
 * written. A destination range is held alone while it is copied to. A failed copy leaves the pieces before
 * the failure copied. Nothing here completes a command.
 */
import type { MaybePromise } from '../../device/data.js';
import type { BlockExtent, RequestContext, WriteContext } from '../../store/block-store.js';
import { unmap, writeZeroes } from '../../store/emulate.js';
import { chain, eachPiece, settled } from '../../store/maybe.js';
import { MemoryDataIn, MemoryDataOut } from '../../store/memory-data.js';
import type { LogicalUnit } from '../logical-unit.js';
import { askNexuses, soon } from '../nexuses.js';
import { type SenseError, sense, toSense } from '../sense.js';
import {
  COPY_LIMITS,
  type CopyRequest,
  type CopySegment,
  type CopyUnit,
  OWN_UNIT,
} from './parameter-list.js';

/** Open units by copy group and NAA name; two devices over one disk may share a name. */
const open = new Map<string, Set<LogicalUnit>>();

function keyOf(group: string, naa: string): string {
  return `${naa} ${group}`;
}

/** Makes an open unit known to the copy managers of its group in this process. */
export function registerUnit(unit: LogicalUnit): void {
  const { copyGroup } = unit.options;
  if (copyGroup === undefined) return;
  const key = keyOf(copyGroup, unit.identity.naa);
  const units = open.get(key);
  if (units === undefined) open.set(key, new Set([unit]));
  else units.add(unit);
}

export function unregisterUnit(unit: LogicalUnit): void {
  const { copyGroup } = unit.options;
  if (copyGroup === undefined) return;
  const key = keyOf(copyGroup, unit.identity.naa);
  const units = open.get(key);
  units?.delete(unit);
  if (units?.size === 0) open.delete(key);
}

/** Bytes copied at a time, so that other commands and an abort come in between. */
const PIECE = 1024 * 1024;

/** Results kept for RECEIVE COPY RESULTS; the oldest is forgotten first. */
const MAX_KEPT = 32;

/** A copy, and how it went. */
export class CopyOperation {
  readonly listId: number;
  readonly form: 1 | 4;
  segmentsProcessed = 0;
  bytes = 0;
  state: 'running' | 'done' | 'failed' | 'aborted' = 'running';
  failure: SenseError | undefined;
  /** The nexuses there were when it began, as far as is known: the result is kept for one of them. */
  nexuses: ReadonlySet<string> | undefined;
  readonly #controller = new AbortController();
  finished: MaybePromise<unknown> = undefined;

  constructor(listId: number, form: 1 | 4) {
    this.listId = listId;
    this.form = form;
  }

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  abort(): void {
    this.#controller.abort();
  }
}

class CopyContext implements WriteContext {
  readonly fua = false;
  readonly #operation: CopyOperation;

  constructor(operation: CopyOperation) {
    this.#operation = operation;
  }

  get signal(): AbortSignal {
    return this.#operation.signal;
  }
}

export class CopyManager {
  readonly #unit: LogicalUnit;
  readonly #operations: CopyOperation[] = [];

  constructor(unit: LogicalUnit) {
    this.#unit = unit;
  }

  /** A copy by its identifier, of the same form of command; the latest. */
  find(listId: number, form: 1 | 4): CopyOperation | undefined {
    return this.#operations.findLast((known) => known.listId === listId && known.form === form);
  }

  /** Forgets the results of copies for nexuses that are lost (SPC-4, held data). */
  forgetLost(): MaybePromise<void> {
    const kept = this.#operations.filter(({ nexuses }) => nexuses !== undefined);
    if (kept.length === 0) return;
    return chain(soon(askNexuses(this.#unit.options.nexuses)), (now) => {
      if (now === undefined || now.incomplete) return;
      for (const operation of kept) {
        if (![...(operation.nexuses ?? [])].some((nexus) => now.names.has(nexus)))
          this.forget(operation);
      }
    });
  }

  /** Forgets a copy whose result was told. */
  forget(operation: CopyOperation): void {
    const at = this.#operations.indexOf(operation);
    if (at >= 0 && operation.state !== 'running') this.#operations.splice(at, 1);
  }

  /**
   * Starts a copy.
   * @throws SenseError when its identifier is in use or too many are running.
   */
  start(
    request: CopyRequest,
    form: 1 | 4,
    nexuses?: ReadonlySet<string> | undefined,
  ): CopyOperation {
    const running = this.#operations.filter(({ state }) => state === 'running');
    if (running.length >= COPY_LIMITS.concurrent) throw sense.busy();
    const known = request.anonymous ? undefined : this.find(request.listId, form);
    if (known?.state === 'running') throw sense.operationInProgress();
    if (known !== undefined) this.forget(known);
    const operation = new CopyOperation(request.anonymous ? -1 : request.listId, form);
    operation.nexuses = nexuses;
    this.#operations.push(operation);
    if (this.#operations.length > MAX_KEPT + COPY_LIMITS.concurrent) {
      const oldest = this.#operations.find(({ state }) => state !== 'running');
      if (oldest !== undefined) this.forget(oldest);
    }
    const fail = (error: unknown): never => {
      const failure = toSense(error);
      operation.failure = failure;
      operation.state = operation.signal.aborted ? 'aborted' : 'failed';
      if (request.anonymous) this.forget(operation);
      throw failure;
    };
    try {
      const copied = this.#run(request, operation);
      operation.finished = chain(copied, () => {
        operation.state = 'done';
        if (request.anonymous) this.forget(operation);
      });
      if (operation.finished !== undefined) {
        operation.finished = (operation.finished as Promise<unknown>).catch(fail);
      }
    } catch (error) {
      fail(error);
    }
    return operation;
  }

  /** Ends all copies, as aborted; settles when they have ended. */
  close(): MaybePromise<unknown> {
    const running = this.#operations.filter(({ state }) => state === 'running');
    for (const operation of running) operation.abort();
    const pending = running.map(({ finished }) => finished);
    return pending.length === 0 ? undefined : Promise.allSettled(pending);
  }

  #run(request: CopyRequest, operation: CopyOperation): MaybePromise<unknown> {
    const units = request.units.map((unit) => this.#resolve(unit));
    const unitAt = (index: number, segment: number): LogicalUnit => {
      const unit = index === OWN_UNIT ? this.#unit : units[index];
      if (unit === undefined) throw sense.copyAborted(segment);
      return unit;
    };
    return eachPiece(request.segments.length, 1, (index) => {
      const segment = request.segments[index] as CopySegment;
      const source = unitAt(segment.source, index);
      const destination = unitAt(segment.destination, index);
      const range = segmentRange(segment, index, source, destination);
      const copied = guard(index, () => copyRange(source, destination, range, operation));
      return chain(copied, () => {
        operation.segmentsProcessed = index + 1;
        return true;
      });
    });
  }

  /** The unit a descriptor names. */
  #resolve({ type, designator, blockSize }: CopyUnit): LogicalUnit {
    const naa = Buffer.from(designator).toString('hex');
    const own = this.#unit;
    const { copyGroup } = own.options;
    const others = () =>
      copyGroup === undefined ? undefined : open.get(keyOf(copyGroup, naa))?.values().next().value;
    const unit = type !== 3 ? undefined : naa === own.identity.naa ? own : others();
    if (unit === undefined) throw sense.copyTargetNotReachable();
    if (blockSize !== unit.blockSize) throw sense.copyTargetNotReachable();
    return unit;
  }
}

interface CopyRange {
  readonly from: number;
  readonly to: number;
  readonly length: number;
}

/** In bytes. @throws SenseError COPY ABORTED when one of the units does not have the blocks. */
function segmentRange(
  segment: CopySegment,
  index: number,
  source: LogicalUnit,
  destination: LogicalUnit,
): CopyRange {
  const counted = segment.countsDestination ? destination : source;
  const length = segment.blocks * counted.blockSize;
  const from = segment.sourceLba * source.blockSize;
  const to = segment.destinationLba * destination.blockSize;
  const inside =
    segment.sourceLba + length / source.blockSize <= source.blocks &&
    segment.destinationLba + length / destination.blockSize <= destination.blocks;
  // A length that is no whole number of the other unit's blocks would leave a residue (PAD).
  const whole = length % source.blockSize === 0 && length % destination.blockSize === 0;
  if (!inside || !whole) throw sense.copyAborted(index);
  const ready = (unit: LogicalUnit) => !unit.ejected && unit.hindrance === undefined;
  if (!ready(source) || !ready(destination)) throw sense.copyTargetNotReachable();
  if (destination.writeProtected) throw sense.copyAborted(index, sense.writeProtected());
  return { from, to, length };
}

/** A failure of a store inside a segment is the copy's: COPY ABORTED, with the cause kept. */
function guard<T>(segment: number, run: () => MaybePromise<T>): MaybePromise<T> {
  const fail = (error: unknown): never => {
    throw sense.copyAborted(segment, error);
  };
  try {
    const value = run();
    return value instanceof Promise ? value.catch(fail) : value;
  } catch (error) {
    return fail(error);
  }
}

function copyRange(
  source: LogicalUnit,
  destination: LogicalUnit,
  { from, to, length }: CopyRange,
  operation: CopyOperation,
): MaybePromise<unknown> {
  const context = new CopyContext(operation);
  const held = destination.lock.acquire(to, to + length, true);
  return chain(held, (range) =>
    settled(
      () =>
        chain(walk(source, destination, { from, to, length }, operation, context), () =>
          destination.makeDurable(context),
        ),
      () => destination.lock.release(range),
    ),
  );
}

/** Ranges of one store that overlap are copied as if all had been read first: from the far end. */
function walk(
  source: LogicalUnit,
  destination: LogicalUnit,
  { from, to, length }: CopyRange,
  operation: CopyOperation,
  context: WriteContext,
): MaybePromise<void> {
  const overlaps =
    source.store === destination.store && from < to + length && to < from + length && from !== to;
  const backwards = overlaps && to > from;
  return eachPiece(length, PIECE, (offset, piece) => {
    if (operation.signal.aborted) throw sense.abortedCommand();
    const at = backwards ? length - offset - piece : offset;
    const step = (): MaybePromise<boolean> =>
      chain(copyPiece(source, destination, from + at, to + at, piece, overlaps, context), () => {
        operation.bytes += piece;
        return true;
      });
    // A synchronous store must let others in now and then.
    if (offset === 0 || offset % (16 * PIECE) !== 0) return step();
    return new Promise((resolve) => setImmediate(resolve)).then(step);
  });
}

function copyPiece(
  source: LogicalUnit,
  destination: LogicalUnit,
  from: number,
  to: number,
  length: number,
  overlaps: boolean,
  context: WriteContext,
): MaybePromise<unknown> {
  const plain = (start: number, count: number): MaybePromise<unknown> => {
    if (count === 0) return undefined;
    const memory = new Uint8Array(count);
    return chain(source.store.read(from + start, new MemoryDataIn(memory), context), () =>
      destination.store.write(to + start, new MemoryDataOut(memory), context),
    );
  };
  if (overlaps) return plain(0, length);
  const extents = source.store.blockStatus?.(from, length, context) ?? [
    { length, status: 'data' as const },
  ];
  return chain(extents, (found) => {
    const runs = mergeRuns(found, length);
    return eachPiece(runs.length, 1, (i) => {
      const run = runs[i] as (typeof runs)[number];
      const done = run.zero
        ? clear(destination, to + run.start, run.length, context)
        : offload(source, destination, from + run.start, to + run.start, run.length, context, (n) =>
            plain(run.start + n, run.length - n),
          );
      return chain(done, () => true);
    });
  });
}

/** Runs of data and of zeros that cover `length`; what the store did not tell of counts as data. */
function mergeRuns(extents: readonly BlockExtent[], length: number) {
  const runs: { start: number; length: number; zero: boolean }[] = [];
  let at = 0;
  const add = (count: number, zero: boolean) => {
    const last = runs.at(-1);
    if (last?.zero === zero) last.length += count;
    else runs.push({ start: at, length: count, zero });
    at += count;
  };
  for (const extent of extents) {
    const count = Math.min(extent.length, length - at);
    if (count > 0) add(count, extent.status !== 'data');
  }
  if (at < length) add(length - at, false);
  return runs;
}

function clear(
  destination: LogicalUnit,
  position: number,
  length: number,
  context: RequestContext,
): MaybePromise<unknown> {
  const { store } = destination;
  return destination.thin
    ? unmap(store, position, length, context)
    : writeZeroes(store, position, length, false, context);
}

/** What the destination's store can do by itself; `rest(n)` does what is left behind `n` bytes. */
function offload(
  source: LogicalUnit,
  destination: LogicalUnit,
  from: number,
  to: number,
  length: number,
  context: RequestContext,
  rest: (done: number) => MaybePromise<unknown>,
): MaybePromise<unknown> {
  const { store } = destination;
  const done = store.copyFrom?.(source.store, from, to, length, context) ?? 0;
  return chain(done, rest);
}
