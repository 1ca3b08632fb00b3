// SPDX-License-Identifier: Apache-2.0
/**
 * A kernel made of files, for tests of the addon's ring alone: the mapping is a file in memory, the
 * two event descriptors are FIFOs. It writes what it is told and reads back what the addon published;
 * `tcmu/sim` is the one that behaves like a kernel.
 */
import { execFileSync } from 'node:child_process';
import {
  constants,
  ftruncateSync,
  mkdtempSync,
  openSync,
  readSync,
  rmSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { type NativeIo, type NativeRing, type NativeRingOptions, native } from '../lib/native.js';

export const RING_OFFSET = 128;
export const RING_BYTES = 8192;
export const DATA_OFFSET = RING_OFFSET + RING_BYTES;
export const DATA_BYTES = 65536;
export const MAP_BYTES = 81920;

export interface Answer {
  id: number;
  userFlags: number;
  status: number;
  readLength: number;
  sense: Uint8Array;
}

export interface CommandSpec {
  id: number;
  cdb?: Uint8Array;
  /** [offset in the data area, bytes] */
  pieces?: [number, number][];
  bidi?: [number, number][];
}

/** Calls that JavaScript gets, in order. */
export interface Seen {
  batches: number[][];
  lost: [string, string][];
  escaped: number[];
  io: [number, number][];
}

export class FakeKernel {
  readonly folder = mkdtempSync('/dev/shm/tcmu-test-');
  readonly memory: number;
  readonly event: number;
  readonly doorbell: number;
  #head = 0;
  #tail = 0;

  constructor() {
    execFileSync('mkfifo', [this.path('event'), this.path('doorbell')]);
    this.memory = openSync(this.path('memory'), constants.O_RDWR | constants.O_CREAT, 0o600);
    ftruncateSync(this.memory, MAP_BYTES);
    const flags = constants.O_RDWR | constants.O_NONBLOCK;
    this.event = openSync(this.path('event'), flags);
    this.doorbell = openSync(this.path('doorbell'), flags);
    const mailbox = new DataView(new ArrayBuffer(68));
    mailbox.setUint16(0, 2, true);
    mailbox.setUint16(2, 0xf, true);
    mailbox.setUint32(4, RING_OFFSET, true);
    mailbox.setUint32(8, RING_BYTES, true);
    this.write(0, new Uint8Array(mailbox.buffer));
  }

  path(name: string): string {
    return join(this.folder, name);
  }

  write(position: number, bytes: Uint8Array): void {
    writeSync(this.memory, bytes, 0, bytes.length, position);
  }

  read(position: number, length: number): Uint8Array {
    const bytes = new Uint8Array(length);
    readSync(this.memory, bytes, 0, length, position);
    return bytes;
  }

  word(position: number): number {
    return new DataView(this.read(position, 4).buffer).getUint32(0, true);
  }

  setWord(position: number, value: number): void {
    const view = new DataView(new ArrayBuffer(4));
    view.setUint32(0, value, true);
    this.write(position, new Uint8Array(view.buffer));
  }

  data(offset: number, length: number): Uint8Array {
    return this.read(DATA_OFFSET + offset, length);
  }

  setData(offset: number, bytes: Uint8Array): void {
    this.write(DATA_OFFSET + offset, bytes);
  }

  #place(entry: Uint8Array): number {
    if (this.#head + entry.length > RING_BYTES) {
      const pad = new DataView(new ArrayBuffer(8));
      pad.setUint32(0, RING_BYTES - this.#head, true);
      this.write(RING_OFFSET + this.#head, new Uint8Array(pad.buffer));
      this.#head = 0;
    }
    const place = this.#head;
    this.write(RING_OFFSET + place, entry);
    this.#head = (place + entry.length) % RING_BYTES;
    return place;
  }

  /** Makes what was queued visible and rings. */
  ring(): void {
    this.setWord(12, this.#head);
    writeSync(this.event, new Uint8Array([1, 0, 0, 0]));
  }

  /** Where in the ring the entry stands. */
  queue({ id, cdb = new Uint8Array(6), pieces = [], bidi = [] }: CommandSpec): number {
    const all = [...pieces, ...bidi];
    const fixed = Math.max(112, 48 + 16 * all.length);
    const bytes = fixed + Math.ceil(cdb.length / 8) * 8;
    const entry = new Uint8Array(bytes);
    const view = new DataView(entry.buffer);
    const place = this.#head + bytes > RING_BYTES ? 0 : this.#head;
    view.setUint32(0, bytes | 1, true);
    view.setUint16(4, id, true);
    view.setUint32(8, pieces.length, true);
    view.setUint32(12, bidi.length, true);
    view.setBigUint64(24, BigInt(RING_OFFSET + place + fixed), true);
    for (const [i, [offset, length]] of all.entries()) {
      view.setBigUint64(48 + 16 * i, BigInt(DATA_OFFSET + offset), true);
      view.setBigUint64(56 + 16 * i, BigInt(length), true);
    }
    entry.set(cdb, fixed);
    return this.#place(entry);
  }

  queueTmr(type: number, ids: number[]): void {
    const entry = new Uint8Array(Math.ceil((32 + 2 * ids.length) / 8) * 8);
    const view = new DataView(entry.buffer);
    view.setUint32(0, entry.length | 2, true);
    view.setUint8(8, type);
    view.setUint32(12, ids.length, true);
    for (const [i, id] of ids.entries()) view.setUint16(32 + 2 * i, id, true);
    this.#place(entry);
  }

  /** What action/reset_ring does. */
  reset(): void {
    this.#head = 0;
    this.#tail = 0;
    this.setWord(64, 0);
    this.ring();
  }

  /** Completions published since the last call. */
  collect(): Answer[] {
    const tail = this.word(64);
    const answers: Answer[] = [];
    while (this.#tail !== tail) {
      const at = RING_OFFSET + this.#tail;
      const lengthOp = this.word(at);
      if ((lengthOp & 7) === 1) {
        const entry = this.read(at, 112);
        const view = new DataView(entry.buffer);
        answers.push({
          id: view.getUint16(4, true),
          userFlags: entry[7] as number,
          status: entry[8] as number,
          readLength: view.getUint32(12, true),
          sense: entry.subarray(16),
        });
      }
      this.#tail = (this.#tail + (lengthOp & ~7)) % RING_BYTES;
    }
    return answers;
  }

  /** Times the doorbell was rung since the last call. */
  doorbells(): number {
    const bytes = new Uint8Array(4096);
    try {
      return readSync(this.doorbell, bytes) / 4;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'EAGAIN') return 0;
      throw error;
    }
  }

  remove(): void {
    rmSync(this.folder, { recursive: true });
  }
}

/** Descriptors of its own for a ring: it closes them, the kernel's stay for looking at. */
export function ringOptions(kernel: FakeKernel) {
  const flags = constants.O_RDWR | constants.O_NONBLOCK;
  return {
    memoryFd: openSync(kernel.path('memory'), constants.O_RDWR),
    eventFd: openSync(kernel.path('event'), flags),
    doorbellFd: openSync(kernel.path('doorbell'), flags),
    mapSize: MAP_BYTES,
  };
}

export interface Served {
  kernel: FakeKernel;
  ring: NativeRing;
  io: NativeIo;
  seen: Seen;
}

/** A ring on a new fake kernel, polling. `dispatch` gets the events of a batch. */
export function serve(
  dispatch: (events: number[], served: Served) => void = () => {},
  options: Partial<NativeRingOptions> & { start?: boolean } = {},
): Served {
  const kernel = new FakeKernel();
  const seen: Seen = { batches: [], lost: [], escaped: [], io: [] };
  const io =
    options.io ??
    new native.IoQueue((count) => {
      for (let i = 0; i < count; i++) {
        seen.io.push([io.results[2 * i] as number, io.results[2 * i + 1] as number]);
      }
    });
  const ring = new native.Ring({
    ...ringOptions(kernel),
    batchSize: 16,
    io,
    dispatch: () => {
      const events = [...ring.events.subarray(1, 1 + (ring.events[0] as number))];
      seen.batches.push(events);
      dispatch(events, served);
    },
    lost: (code, message) => seen.lost.push([code, message]),
    escaped: (slot) => seen.escaped.push(slot),
    ...options,
  });
  const served = { kernel, ring, io, seen };
  if (options.start ?? true) ring.start();
  return served;
}

export interface Record {
  status?: number;
  flags?: number;
  readLength?: number;
  zeroFrom?: number;
  sense?: Uint8Array;
}

/** Puts a completion on its way; `flush` publishes it. */
export function complete(ring: NativeRing, slot: number, record: Record = {}): void {
  const { completions } = ring;
  const index = completions[0] as number;
  completions.set(
    [
      slot,
      (record.status ?? 0) | ((record.flags ?? 0) << 8),
      record.readLength ?? 0,
      record.zeroFrom ?? 0xffffffff,
    ],
    4 + 4 * index,
  );
  if (record.sense) ring.sense.set(record.sense, 96 * index);
  completions[0] = index + 1;
}

export async function until(condition: () => boolean, what: string): Promise<void> {
  const end = performance.now() + 60_000;
  while (!condition()) {
    if (performance.now() > end) throw new Error(`waited in vain for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
}

/** Several turns of the event loop: enough for anything that was going to happen. */
export function settle(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, 20));
}
