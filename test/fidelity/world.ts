// SPDX-License-Identifier: Apache-2.0
/**
 * One TCMU device, seen from both ends: an initiator that sends single commands, and a handler made of
 * nothing but reads and writes of the shared memory. Behind it stands a real kernel or the simulated
 * one; what a sequence of steps leads to is noted step by step, so that the two can be compared.
 *
 * Noted of a command: its entry as the kernel wrote it (decoded, and a hash over every byte of it), where
 * head and tail stand, and what the initiator got.
 */
import { createHash } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { decodeEntries, type RingEntry, type Segment } from '../../lib/sim/ring-entries.js';

export interface Settings {
  dataPagesPerBlock?: number;
  /** Seconds; 0: none. */
  commandTimeout?: number;
  /** Seconds; 0: refused at once; default: the command time-out, or 30 s. */
  queueFullTimeout?: number;
  tmrNotification?: boolean;
  /** XDWRITEREAD is bidirectional: on a real kernel it takes a module, see kernel/test. */
  bidirectional?: boolean;
}

/** Of every device here: a kernel takes whole mebibytes. */
export const RING_BYTES = 1 << 20;
export const DATA_BYTES = 1 << 20;

export interface Request {
  cdb: readonly number[];
  /** Bytes of Data-Out, of a known pattern. */
  out?: number;
  /** Bytes of Data-In; with `out`: bidirectional. */
  in?: number;
  /** Seconds after which the initiator aborts it. */
  abortAfter?: number;
  /** Seconds for which the initiator sends it again at BUSY and TASK SET FULL, as Linux does. Default 60. */
  patience?: number;
}

/** What an administrator changes on a device in use, and how the handler answers the announcement. */
export interface Change {
  attribute: 'size' | 'config' | 'writeCache';
  value: number | string | boolean;
  accepted: boolean;
}

export interface Response {
  status?: number;
  /** UNKNOWN_OP 1, READ_LEN 2, KEEP_BUF 4. */
  flags?: number;
  readLength?: number;
  /** Sense key, additional sense code and qualifier, in fixed format. */
  sense?: readonly [number, number, number];
  /** Completes with this id instead of the command's. */
  id?: number;
}

export interface Outcome {
  /** SAM status; -1: the initiator gave the command up. */
  status: number;
  sense: string | undefined;
  /** Valid bytes of Data-In. */
  bytes: number;
  data: string | undefined;
}

type CommandEntry = Extract<RingEntry, { op: 'command' }>;

const MAILBOX = { head: 12, tail: 64, ringOffset: 128 };
const PATIENCE_MS = 20_000;

export const UNKNOWN_OP = 1;
export const READ_LEN = 2;
export const KEEP_BUF = 4;

export abstract class World {
  readonly notes: object[] = [];
  readonly #entries = new Map<string, CommandEntry>();
  #expected = 0;
  #eventCount: number | undefined;

  protected abstract peek(offset: number, length: number): Uint8Array;
  protected abstract poke(offset: number, bytes: Uint8Array): void;
  /** Returns when the kernel has handled it. */
  protected abstract doorbell(): void;
  protected abstract begin(label: string, request: Request): void;
  protected abstract outcomeOf(label: string): Promise<Outcome>;
  /** Resolves when a command that has begun has reached the target, if not the ring. */
  protected abstract queued(label: string): Promise<void>;
  /** LOGICAL UNIT RESET; resolves when it is done. */
  protected abstract lunReset(): Promise<void>;
  /** action/block_dev 1, reset_ring, block_dev 0. */
  protected abstract reset(level: 1 | 2): void;
  protected abstract freeKept(id: number): boolean;
  /** `count` reads of 512 bytes, one after the other. */
  protected abstract reads(count: number): Promise<void>;
  /** Resolves when the initiator has given the command up. */
  protected abstract givenUp(label: string): Promise<void>;
  protected abstract setBlocked(blocked: boolean): void;
  /** Writes the attribute; what the handler was told, and whether the write succeeded. */
  protected abstract change(change: Change): Promise<{ announced: object; taken: boolean }>;
  /** Opens the device: what a second opener gets, when this is one. */
  protected abstract openAgain(): 'open' | 'busy' | 'gone';
  /** The handler lets go of the device, and takes it again. */
  protected abstract reopen(): void;
  /** The count of events, taken off the descriptor; undefined: none is there. */
  protected abstract event(): number | 'gone' | undefined;
  /** Unlinks the LUN and removes the backstore; resolves when it is done. */
  protected abstract removal(): Promise<void>;

  // --- steps of a sequence ---

  /** Sends a command and notes its entry. */
  async send(label: string, request: Request): Promise<void> {
    this.#expected = this.#head();
    this.begin(label, request);
    await this.arrives(label);
  }

  /** Sends a command that finds no room. */
  async sendWaiting(label: string, request: Request): Promise<void> {
    const before = this.#head();
    this.begin(label, request);
    await this.queued(label);
    this.#note({ waits: label, moved: this.#head() !== before });
    this.#expected = this.#head();
  }

  /** Sends a command that never reaches the ring. */
  async sendRefused(label: string, request: Request): Promise<void> {
    const before = this.#head();
    this.begin(label, request);
    await this.ends(label);
    this.#note({ moved: this.#head() !== before });
  }

  /** Waits for the command on the ring. */
  async arrives(label: string): Promise<void> {
    let entry: RingEntry | undefined;
    await this.#until(`${label} on the ring`, () => {
      entry = this.#between(this.#expected).find((each) => each.op === 'command');
      return entry !== undefined;
    });
    if (entry?.op !== 'command') throw new Error(`${label}: no command came`);
    this.#expected = (entry.at + entry.length) % this.#ringSize();
    this.#entries.set(label, entry);
    this.#note({ sent: label, entry: this.#describe(entry), head: this.#head() });
  }

  /** Answers a command: into the oldest slot, whichever that is. */
  complete(label: string, response: Response = {}): void {
    const entry = this.#entries.get(label) as CommandEntry;
    this.#fill(entry);
    this.#passOver();
    const tail = this.#tail();
    const slot = MAILBOX.ringOffset + tail;
    const length = (this.#u32(slot) & ~7) >>> 0;
    const bytes = Buffer.alloc(104);
    bytes.writeUInt8(response.status ?? 0, 0);
    bytes.writeUInt32LE(response.readLength ?? 0, 4);
    if (response.sense !== undefined) {
      const [key, asc, ascq] = response.sense;
      bytes.set([0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, asc, ascq], 8);
    }
    this.poke(slot + 4, u16(response.id ?? entry.id));
    this.poke(slot + 7, Uint8Array.of(response.flags ?? 0));
    this.poke(slot + 8, bytes);
    this.poke(MAILBOX.tail, u32((tail + length) % this.#ringSize()));
    this.doorbell();
    this.#note({ completed: label, tail: this.#tail(), head: this.#head() });
  }

  /** Notes what the initiator got. */
  async ends(label: string): Promise<void> {
    this.#note({ ended: label, ...(await this.outcomeOf(label)) });
  }

  /** Completes and notes what the initiator got. */
  async finish(label: string, response?: Response): Promise<void> {
    this.complete(label, response);
    await this.ends(label);
  }

  /** Waits for a task management entry and notes it. */
  async notified(): Promise<void> {
    let entry: RingEntry | undefined;
    await this.#until('a TMR entry', () => {
      entry = this.#between(this.#expected).find((each) => each.op === 'task-management');
      return entry !== undefined;
    });
    const { at, length } = entry as unknown as RingEntry;
    this.#expected = (at + length) % this.#ringSize();
    this.#note({ notified: entry, head: this.#head() });
  }

  /** Moves the tail over PADs and TMRs. */
  skip(): void {
    this.#passOver();
    this.doorbell();
    this.#note({ tail: this.#tail() });
  }

  /** Begins a LUN RESET; the result notes that it is done. */
  beginLunReset(): () => Promise<void> {
    this.#expected = this.#head();
    const done = this.lunReset();
    return async () => {
      await done;
      this.#note({ reset: 'done' });
    };
  }

  /** Waits for the initiator to give a command up, of which the ring shows nothing. */
  async aborted(label: string): Promise<void> {
    const before = this.#head();
    await this.givenUp(label);
    this.#note({ aborted: label, moved: this.#head() !== before });
  }

  block(): void {
    this.setBlocked(true);
    this.#note({ blocked: true, head: this.#head(), tail: this.#tail() });
  }

  unblock(): void {
    this.#expected = this.#head();
    this.setBlocked(false);
    this.#note({ blocked: false });
  }

  async reconfigure(change: Change): Promise<void> {
    const before = this.#head();
    const { announced, taken } = await this.change(change);
    this.#note({ announced, taken, moved: this.#head() !== before });
  }

  openSecond(): void {
    this.#note({ second: this.openAgain() });
  }

  /** The next handler: what it finds. */
  takeOver(): void {
    this.reopen();
    this.#note({ opened: true, head: this.#head(), tail: this.#tail() });
    this.look();
  }

  /** How many events have come since the last look; reading takes them all. */
  events(): void {
    const count = this.event();
    if (typeof count !== 'number') {
      this.#note({ events: count ?? 'none' });
      return;
    }
    // The first look sets the scale: a counter starts when the device does.
    this.#note({ events: this.#eventCount === undefined ? 'some' : count - this.#eventCount });
    this.#eventCount = count;
  }

  /** Begins to remove the device; the result notes that it is done. */
  beginRemoval(): () => Promise<void> {
    const done = this.removal();
    return async () => {
      await done;
      this.#note({ removed: true, head: this.#head(), tail: this.#tail() });
    };
  }

  resetRing(level: 1 | 2): void {
    this.reset(level);
    this.#expected = 0;
    this.#note({ ringReset: level, head: this.#head(), tail: this.#tail() });
  }

  release(label: string): void {
    const { id } = this.#entries.get(label) as CommandEntry;
    this.#note({ released: label, taken: this.freeKept(id) });
  }

  /** Drives the ring on by `count` commands of 128 bytes. */
  async turn(count: number): Promise<void> {
    let over = false;
    const done = this.reads(count).finally(() => {
      over = true;
    });
    while (!over) {
      this.#answerAll();
      await new Promise(setImmediate);
    }
    await done;
    this.#expected = this.#head();
    this.#note({ turned: count, head: this.#head(), tail: this.#tail() });
  }

  /** Notes the whole ring between tail and head. */
  look(): void {
    this.#note({ ring: this.#between(this.#tail()).map((entry) => this.#describe(entry)) });
  }

  mailbox(): void {
    const bytes = Buffer.from(this.peek(0, 16));
    this.#note({
      mailbox: [bytes.readUInt16LE(0), bytes.readUInt16LE(2)],
      ring: [bytes.readUInt32LE(4), bytes.readUInt32LE(8)],
    });
  }

  // --- the handler ---

  #answerAll(): void {
    for (const entry of this.#between(this.#tail())) {
      if (entry.op === 'command') {
        const slot = MAILBOX.ringOffset + this.#tail();
        this.poke(slot + 7, Uint8Array.of(0));
        this.poke(slot + 8, Buffer.alloc(8));
      }
      this.poke(MAILBOX.tail, u32((this.#tail() + entry.length) % this.#ringSize()));
      this.doorbell();
    }
  }

  /** Every byte of Data-In is written: what the initiator gets shows how much the kernel copied. */
  #fill(entry: CommandEntry): void {
    const segments = entry.bidirectional.length > 0 ? entry.bidirectional : entry.segments;
    if (!isRead(entry.cdb)) return;
    let at = 0;
    for (const { offset, length } of segments) {
      this.poke(offset, pattern(length, at));
      at += length;
    }
  }

  #passOver(): void {
    for (const entry of this.#between(this.#tail())) {
      if (entry.op === 'command') return;
      this.poke(MAILBOX.tail, u32((this.#tail() + entry.length) % this.#ringSize()));
    }
  }

  // --- looking ---

  #describe(entry: RingEntry): object {
    if (entry.op !== 'command') return entry;
    const raw = this.peek(MAILBOX.ringOffset + entry.at, entry.length);
    const { cdb, segments, bidirectional, ...rest } = entry;
    return {
      ...rest,
      cdb: Buffer.from(cdb).toString('hex'),
      segments: segments.map(text),
      bidirectional: bidirectional.map(text),
      bytes: hash(raw),
      ...(isWrite(cdb) ? { data: hash(this.#dataOf(segments)) } : {}),
    };
  }

  #dataOf(segments: Segment[]): Uint8Array {
    return Buffer.concat(segments.map(({ offset, length }) => this.peek(offset, length)));
  }

  #between(from: number): RingEntry[] {
    const head = this.#head();
    const ring = (start: number, end: number) => this.peek(MAILBOX.ringOffset + start, end - start);
    const bytes =
      head >= from
        ? ring(from, head)
        : Buffer.concat([ring(from, this.#ringSize()), ring(0, head)]);
    return decodeEntries(bytes, from, this.#ringSize());
  }

  #head(): number {
    return this.#u32(MAILBOX.head);
  }
  #tail(): number {
    return this.#u32(MAILBOX.tail);
  }
  #ringSize(): number {
    return this.#u32(8);
  }
  #u32(offset: number): number {
    return Buffer.from(this.peek(offset, 4)).readUInt32LE(0);
  }

  async #until(what: string, condition: () => boolean): Promise<void> {
    for (const deadline = Date.now() + PATIENCE_MS; !condition(); await sleep(1)) {
      if (Date.now() > deadline) throw new Error(`waited in vain for ${what}`);
    }
  }

  /** As it will be read from a file. */
  #note(note: object): void {
    this.notes.push(JSON.parse(JSON.stringify(note)) as object);
  }
}

/** Position-dependent bytes; what a command carries. */
export function pattern(length: number, from = 0): Buffer {
  const bytes = Buffer.alloc(length);
  for (let i = 0; i < length; i++) bytes[i] = ((from + i) * 7 + ((from + i) >> 8)) & 0xff;
  return bytes;
}

export function hash(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex').slice(0, 16);
}

/** Sense data as `key asc ascq`. */
export function senseText(sense: Uint8Array | undefined): string | undefined {
  if (sense === undefined || sense.length < 14) return undefined;
  return Buffer.from([
    (sense[2] as number) & 0x0f,
    sense[12] as number,
    sense[13] as number,
  ]).toString('hex');
}

function isRead(cdb: Uint8Array): boolean {
  return [0x28, 0x88, 0xa8, 0x12, 0x53].includes(cdb[0] as number);
}

function isWrite(cdb: Uint8Array): boolean {
  return [0x2a, 0x8a, 0xaa, 0x53].includes(cdb[0] as number);
}

function text({ offset, length }: Segment): string {
  return `${offset}+${length}`;
}

function u16(value: number): Uint8Array {
  return Uint8Array.of(value & 0xff, value >> 8);
}

function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value >>> 0);
  return bytes;
}
