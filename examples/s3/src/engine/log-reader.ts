// SPDX-License-Identifier: Apache-2.0
/**
 * Walks the log from a slot on: headers and lists of changes, not the data. What exists is listed first
 * and fetched ahead, in parallel; what comes into being meanwhile is found slot by slot.
 */
import { failureKind } from '../object-store.js';
import {
  type BlobCodec,
  BlobKind,
  decodeHead,
  frameOffset,
  storedLength,
  tableEntry,
} from './blob.js';
import { damaged } from './errors.js';
import { segmentName, slotOf } from './names.js';
import type { Requests } from './requests.js';
import { decodeRecords, type LogRecord } from './segment.js';
import type { SegmentFacts } from './segment-facts.js';

/** Enough for the list of changes of most segments. */
const FIRST_BYTES = 32 * 1024;
const FETCHES_AHEAD = 16;

export interface ReadSegment {
  readonly facts: SegmentFacts;
  /** Empty: a claim. */
  readonly records: readonly LogRecord[];
}

/** Slots that exist from `slot` on, in order. */
export async function listSlots(
  requests: Requests,
  prefix: string,
  slot: number,
): Promise<number[]> {
  const startAfter = `${prefix}/${segmentName(slot)}`.slice(0, -1);
  const found = await requests.list(`${prefix}/s/`, { startAfter });
  return found
    .map(({ key }) => slotOf(key.slice(prefix.length + 1)) ?? -1)
    .filter((known) => known >= slot);
}

export class LogReader {
  readonly #requests: Requests;
  readonly #codec: BlobCodec;
  readonly #prefix: string;
  readonly #diskId: string;
  #known: number[] = [];
  readonly #ahead = new Map<number, Promise<ReadSegment | undefined>>();

  constructor(requests: Requests, codec: BlobCodec, prefix: string, diskId: string) {
    this.#requests = requests;
    this.#codec = codec;
    this.#prefix = prefix;
    this.#diskId = diskId;
  }

  /** Slots that exist from `slot` on, in order; remembered for fetching ahead. */
  async survey(slot: number): Promise<readonly number[]> {
    this.#known = await listSlots(this.#requests, this.#prefix, slot);
    this.#ahead.clear();
    return this.#known;
  }

  /** The segment in `slot`, or undefined when there is none. @throws DiskError */
  read(slot: number): Promise<ReadSegment | undefined> {
    const fetched = this.#ahead.get(slot) ?? this.#fetch(slot);
    this.#ahead.delete(slot);
    const next = this.#known.findIndex((known) => known > slot);
    if (next >= 0) {
      for (const known of this.#known.slice(next, next + FETCHES_AHEAD)) {
        if (this.#ahead.has(known)) continue;
        const ahead = this.#fetch(known);
        ahead.catch(() => {});
        this.#ahead.set(known, ahead);
      }
      this.#known.splice(0, next);
    }
    return fetched;
  }

  async #fetch(slot: number): Promise<ReadSegment | undefined> {
    const key = `${this.#prefix}/${segmentName(slot)}`;
    try {
      const range = { start: 0, end: FIRST_BYTES };
      const { body, size } = await this.#requests.get(key, { range });
      return await this.#decode(key, slot, body, size);
    } catch (error) {
      if (failureKind(error) === 'not-found') return undefined;
      throw error;
    }
  }

  async #decode(key: string, slot: number, start: Buffer, size: number): Promise<ReadSegment> {
    let { header, table } = decodeHead(key, start);
    if (header.length !== size) {
      throw damaged(key, `it has ${size} bytes instead of ${header.length}`);
    }
    if (table === undefined) {
      ({ header, table } = decodeHead(key, (await this.#requests.get(key)).body));
    }
    if (header.kind !== BlobKind.segment || header.number !== slot || table === undefined) {
      throw damaged(key, `it is not the segment ${slot}`);
    }
    if (header.frames === 0) return { facts: { header, table }, records: [] };
    const at = frameOffset(table, 0);
    const end = at + storedLength(table, 0);
    const list =
      end <= start.length
        ? start.subarray(at, end)
        : (await this.#requests.get(key, { range: { start: at, end } })).body;
    const bytes = this.#codec.decodeFrame(key, header, this.#diskId, 0, tableEntry(table, 0), list);
    return { facts: { header, table }, records: decodeRecords(key, bytes) };
  }
}
