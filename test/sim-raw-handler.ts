// SPDX-License-Identifier: Apache-2.0
/**
 * A handler made of nothing but reads and writes of the shared memory, through the simulated kernel's
 * own `peek` and `poke`: for tests that want the ring misused, or want no `Device` in between.
 */
import { closeSync, readSync, writeSync } from 'node:fs';
import type { RingSource } from '../lib/device/ring-source.js';
import type { RingEntry, SimulatedDevice } from '../lib/sim/index.js';

export interface RawResponse {
  status?: number;
  /** UNKNOWN_OP 1, READ_LEN 2, KEEP_BUF 4. */
  flags?: number;
  readLength?: number;
  sense?: Uint8Array;
  /** Written to the start of the Data-In segments. */
  data?: Uint8Array;
}

type CommandEntry = Extract<RingEntry, { op: 'command' }>;

export class RawHandler {
  readonly source: RingSource;
  /** Entries seen so far, counted from when the handler was made. */
  #commands = new Map<number, CommandEntry>();

  constructor(readonly sim: SimulatedDevice) {
    this.source = sim.open();
  }

  /** The commands on the ring that are not completed. */
  commands(): CommandEntry[] {
    const list = this.sim.entries().filter((entry) => entry.op === 'command');
    for (const entry of list) this.#commands.set(entry.id, entry);
    return list;
  }

  dataOut(entry: CommandEntry): Uint8Array {
    return Buffer.concat(entry.segments.map(({ offset, length }) => this.sim.peek(offset, length)));
  }

  /** Writes the response into the oldest slot and moves the tail; rings unless told otherwise. */
  complete(id: number, response: RawResponse = {}, ring = true): void {
    const entry = this.#commands.get(id) ?? this.commands().find((each) => each.id === id);
    if (entry !== undefined && response.data !== undefined) this.#fill(entry, response.data);
    const tail = this.passOver();
    const bytes = Buffer.alloc(8);
    bytes.writeUInt8(response.status ?? 0, 0);
    bytes.writeUInt32LE(response.readLength ?? 0, 4);
    this.sim.poke(128 + tail + 4, u16(id));
    this.sim.poke(128 + tail + 7, Uint8Array.of(response.flags ?? 0));
    this.sim.poke(128 + tail + 8, bytes);
    if (response.sense !== undefined) this.sim.poke(128 + tail + 16, response.sense);
    this.#commands.delete(id);
    this.#advance(tail);
    if (ring) this.ring();
  }

  /** Moves the tail over PADs and TMRs; returns where it stands then. */
  passOver(): number {
    for (;;) {
      const tail = this.word(64);
      if (tail === this.word(12) || (this.word(128 + tail) & 7) === 1) return tail;
      this.#advance(tail);
    }
  }

  /** The doorbell. */
  ring(): void {
    writeSync(this.source.doorbellFd, Uint8Array.of(1, 0, 0, 0));
  }

  /** Takes a wake-up: its count, 0 at the end of the device, undefined when there is none. */
  takeEvent(): number | undefined {
    const count = Buffer.alloc(4);
    try {
      return readSync(this.source.eventFd, count) === 4 ? count.readUInt32LE() : 0;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'EAGAIN') return undefined;
      throw error;
    }
  }

  close(): void {
    for (const fd of [this.source.memoryFd, this.source.eventFd, this.source.doorbellFd]) {
      closeSync(fd);
    }
  }

  word(offset: number): number {
    return Buffer.from(this.sim.peek(offset, 4)).readUInt32LE();
  }

  #advance(tail: number): void {
    const next = (tail + (this.word(128 + tail) & ~7)) % this.word(8);
    const bytes = Buffer.alloc(4);
    bytes.writeUInt32LE(next);
    this.sim.poke(64, bytes);
  }

  #fill(entry: CommandEntry, data: Uint8Array): void {
    const segments = entry.bidirectional.length > 0 ? entry.bidirectional : entry.segments;
    let at = 0;
    for (const { offset, length } of segments) {
      this.sim.poke(offset, data.subarray(at, at + length));
      at += length;
    }
  }
}

function u16(value: number): Uint8Array {
  return Uint8Array.of(value & 0xff, value >> 8);
}
