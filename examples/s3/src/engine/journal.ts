// SPDX-License-Identifier: Apache-2.0
/**
 * Local files that hold what the bucket doesn't have yet.
 *
 * What it promises: when `written` has settled, every change noted before is in this host's kernel, and
 * survives the process; when `flush` has, it is on this host's disk (fdatasync). Or it is in the bucket. On
 * the next opening `replay` gives back, in order, what the bucket lacks; if another writer has opened the
 * disk meanwhile, its changes came after what is in the bucket and ours can't be put in between: that is an
 * error, and the journal is thrown away only by order. A file that fails once is never trusted again;
 * everything waits for the bucket then.
 *
 * Two files, `path` and `path.2`, are written in turn: each takes as much as may be missing in the bucket at
 * a time, so the other one is not needed any more when the one is full. Whoever opens the disk makes new files: a
 * process that was replaced and lives on has the old ones. Who is about to apply a journal first notes itself in
 * `path.heirs`, a writer a line: when it dies over it, its claim is no reason not to begin again.
 *
 * A file: a line of JSON (disk, writer, epoch, claim, number of its first entry, process), then entries, one a write:
 * u32 magic, body length, CRC-32 of the body, number, data key; the body, encrypted as the disk's objects
 * are, is changes after each other: f64 slot, position, length, u32 type, u32 bytes of data, the data. An
 * entry that is cut ends the journal.
 */
import {
  closeSync,
  fdatasync,
  fsyncSync,
  ftruncateSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  unlinkSync,
  writeSync,
  writevSync,
} from 'node:fs';
import { dirname } from 'node:path';
import { promisify } from 'node:util';
import { crc32 } from 'node:zlib';
import type { DataOut } from 'tcmu';
import type { BlobCodec } from './blob.js';
import { DiskError } from './errors.js';
import type { LogWriter } from './log-writer.js';
import { isGone, processMark } from './process-mark.js';
import type { DiskRecord } from './records.js';
import type { Log } from './requests.js';

const MAGIC = 0x4a334354;
/** Pieces one writev takes (IOV_MAX is 1024). */
const MAX_PIECES = 1000;
const ENTRY_HEAD = 20;
const CHANGE_HEAD = 32;
/** Changes of so many bytes need no memory anew. */
const ARENA_BYTES = 4 * 1024 * 1024 + CHANGE_HEAD;

const TYPE = { data: 1, zero: 2, size: 3 } as const;

export type Change =
  | { type: 'data'; position: number; length: number; data: Uint8Array }
  | { type: 'zero'; position: number; length: number }
  | { type: 'size'; size: number };

interface Noted {
  readonly slot: number;
  readonly bytes: Buffer;
}

interface Owner {
  readonly disk: string;
  readonly writer: string;
  readonly epoch: number;
  /** Slot of its claim. */
  readonly claim: number;
  /** Number of the first entry: numbers are nonces and never come twice. */
  readonly first: number;
  /** Its process (`process-mark.ts`). */
  readonly process: string;
}

const datasync = promisify(fdatasync);

/** One of the two files. */
interface Half {
  readonly fd: number;
  end: number;
  /** Highest slot of what is in it. */
  last: number;
  /** Something is written and not synced. */
  unsynced: boolean;
}

export class Journal {
  readonly path: string;
  readonly #disk: DiskRecord;
  readonly #codec: BlobCodec;
  readonly #log: Log;
  readonly #limit: number;
  #found: { readonly owner: Owner; readonly changes: readonly Found[] } | undefined;
  readonly #heirs: Set<string>;
  #owner: Owner | undefined;
  #halves: Half[] = [];
  /** The half that is written. */
  #now = 0;
  /** Slots up to this one are in the bucket. */
  #durable = -1;
  #number = 0;
  #pending: Noted[] = [];
  /** What is pending is in it, as far as there is room: it is written and forgotten again with each change. */
  #arena = Buffer.alloc(0);
  #used = 0;
  #running: Promise<void> | undefined;
  #next: Promise<void> | undefined;
  #failed: unknown;

  private constructor(path: string, disk: DiskRecord, codec: BlobCodec, limit: number, log: Log) {
    this.path = path;
    this.#disk = disk;
    this.#codec = codec;
    this.#limit = limit;
    this.#log = log;
    this.#found = this.#read();
    this.#heirs = new Set(this.#found === undefined ? [] : this.#readHeirs());
  }

  /**
   * @param limit most bytes of changes that the bucket may lack at a time
   * @throws DiskError `journal` when the file can't be used, `key`
   */
  static open(path: string, disk: DiskRecord, codec: BlobCodec, limit: number, log: Log): Journal {
    return new Journal(path, disk, codec, limit, log);
  }

  get #paths(): [string, string] {
    return [this.path, `${this.path}.2`];
  }

  /** Whether there is anything that may have to be applied. */
  get holds(): boolean {
    return this.#found !== undefined && this.#found.changes.length > 0;
  }

  /** Whether that writer is the one whose files these are, and has ended: then so has its lease. */
  isGone(writer: string): boolean {
    const owner = this.#found?.owner;
    if (owner?.disk !== this.#disk.id || owner.writer !== writer) return false;
    return isGone(owner.process);
  }

  get #heirsPath(): string {
    return `${this.path}.heirs`;
  }

  #readHeirs(): string[] {
    return (this.#contents(this.#heirsPath)?.toString() ?? '').split('\n').filter(Boolean);
  }

  #contents(path: string): Buffer | undefined {
    try {
      return readFileSync(path);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
      throw this.#error((error as Error).message, error);
    }
  }

  #read(): { owner: Owner; changes: readonly Found[] } | undefined {
    const halves = this.#paths
      .map((path) => this.#contents(path))
      .map((bytes) => (bytes === undefined ? undefined : this.#parse(bytes)))
      .filter((half) => half !== undefined)
      .sort((a, b) => a.owner.epoch - b.owner.epoch || a.owner.first - b.owner.first);
    const [older, newer] = halves;
    if (older === undefined || newer === undefined) return older;
    // Files of a writer before are left over: all they held was in the bucket when the new ones were made.
    if (older.owner.writer !== newer.owner.writer) return newer;
    if (older.next !== newer.owner.first) return older;
    return { owner: older.owner, changes: [...older.changes, ...newer.changes] };
  }

  /** Of a file, if it has a head. @throws DiskError `journal` */
  #ownerIn(bytes: Buffer): { owner: Owner; end: number } | undefined {
    const end = bytes.indexOf('\n');
    if (end < 0) return undefined;
    try {
      return { owner: JSON.parse(bytes.toString('utf8', 0, end)) as Owner, end };
    } catch (cause) {
      throw this.#error('it is no journal of this program; give another path', cause);
    }
  }

  #parse(bytes: Buffer): { owner: Owner; changes: Found[]; next: number } | undefined {
    const head = this.#ownerIn(bytes);
    if (head === undefined) return undefined;
    const { owner } = head;
    const changes: Found[] = [];
    let at = head.end + 1;
    let number = owner.first;
    for (; at + ENTRY_HEAD <= bytes.length; number++) {
      const length = bytes.readUInt32LE(at + 4);
      const body = bytes.subarray(at + ENTRY_HEAD, at + ENTRY_HEAD + length);
      const good =
        bytes.readUInt32LE(at) === MAGIC &&
        bytes.readUInt32LE(at + 12) === number &&
        body.length === length &&
        crc32(body) === bytes.readUInt32LE(at + 8);
      if (!good) break;
      const keyId = bytes.readUInt32LE(at + 16);
      const plain = this.#cipher(keyId, owner)?.decrypt(number, body) ?? body;
      for (let i = 0; i < plain.length; ) {
        const dataLength = plain.readUInt32LE(i + 28);
        changes.push({
          slot: plain.readDoubleLE(i),
          position: plain.readDoubleLE(i + 8),
          length: plain.readDoubleLE(i + 16),
          type: plain.readUInt32LE(i + 24),
          data: plain.subarray(i + CHANGE_HEAD, i + CHANGE_HEAD + dataLength),
        });
        i += CHANGE_HEAD + dataLength;
      }
      at += ENTRY_HEAD + length;
    }
    return { owner, changes, next: number };
  }

  #cipher(keyId: number, owner: Owner) {
    if (keyId === 0) return undefined;
    if (this.#codec.keyring === undefined) throw this.#error('it is encrypted and the disk is not');
    return this.#codec.keyring.object(
      keyId,
      `${owner.disk}/journal/${owner.writer}/${owner.epoch}`,
    );
  }

  #error(what: string, cause?: unknown): DiskError {
    return new DiskError('journal', `journal ${this.path}: ${what}`, { path: this.path, cause });
  }

  /**
   * Before the claim of the writer who will replay: of what is there, and of what is still noted until the
   * claim, and the lease of the writer before, say no. @throws DiskError `journal`
   */
  bequeath(writer: string): void {
    if (this.#found === undefined) return;
    this.#heirs.add(writer);
    try {
      const fd = openSync(this.#heirsPath, 'a', 0o600);
      try {
        writeSync(fd, `${writer}\n`);
        fsyncSync(fd);
      } finally {
        closeSync(fd);
      }
    } catch (error) {
      throw this.#error((error as Error).message, error);
    }
  }

  /** Whether nobody has written after this journal's changes. */
  #follows(writer: string): boolean {
    if (this.#found === undefined) return false;
    const { disk, writer: owner } = this.#found.owner;
    return disk === this.#disk.id && (writer === owner || this.#heirs.has(writer));
  }

  /**
   * Before the claim, so that nobody is ended in vain: whether what the journal holds can be applied.
   * @throws DiskError `journal`
   */
  check(state: { slot: number; claims: readonly number[]; writer: string }): void {
    const lacking = this.#lacking(state);
    if (lacking.length > 0 && !this.#follows(state.writer)) throw this.#useless(lacking.length);
  }

  /** What to say when, before the claim, somebody writes the disk faster than `check` can find out who. */
  refuse(cause: DiskError): DiskError {
    return this.#error(
      `it holds acknowledged changes, and somebody else is writing the disk now, so that they can't be applied any more (${cause.message}). Copy the file if you want to keep them, and say --discard-journal`,
      cause,
    );
  }

  #useless(changes: number): DiskError {
    if ((this.#found as { owner: Owner }).owner.disk !== this.#disk.id) {
      return this.#error('it belongs to another disk; give another path, or --discard-journal');
    }
    return this.#error(
      `it holds ${changes} acknowledged changes that the bucket lacks, and another writer has opened the disk since: they can't be applied any more. Copy the file if you want to keep them, and say --discard-journal`,
    );
  }

  /** A writer's segments count up to the claim of the next one, or the fence before it. */
  #lacking({ slot, claims }: { slot: number; claims: readonly number[] }): readonly Found[] {
    if (this.#found === undefined) return [];
    const { owner, changes } = this.#found;
    if (owner.disk !== this.#disk.id) return changes;
    const end = claims.find((claim) => claim > owner.claim) ?? slot;
    return changes.filter((change) => change.slot >= end);
  }

  /**
   * After the claim, when no writer before answers for anything any more: gives what the bucket lacks to `apply`, and once `settle` has made that durable the
   * files begin anew.
   * @param discard throw away what can't be applied
   * @returns changes applied. @throws DiskError `journal`
   */
  async replay(
    claimed: {
      slot: number;
      claims: readonly number[];
      epoch: number;
      writer: string;
      predecessor: { writer: string };
    },
    discard: boolean,
    apply: (change: Change) => Promise<void>,
    settle: () => Promise<void>,
  ): Promise<number> {
    // Whoever wrote it may have lived on until now.
    this.#found = this.#read();
    let changes = this.#lacking(claimed);
    if (!this.#follows(claimed.predecessor.writer)) {
      if (changes.length > 0 && !discard) throw this.#useless(changes.length);
      if (changes.length > 0) {
        this.#log(
          'warning',
          `journal ${this.path}: ${changes.length} changes that were never flushed to the bucket are thrown away, since another writer has opened the disk after them`,
        );
      }
      changes = [];
    }
    for (const { position, length, type, data } of changes) {
      if (type === TYPE.size) await apply({ type: 'size', size: position });
      else if (type === TYPE.zero) await apply({ type: 'zero', position, length });
      else await apply({ type: 'data', position, length, data });
    }
    if (changes.length > 0) await settle();
    const { epoch, writer } = claimed;
    const claim = claimed.claims.at(-1) as number;
    const process = processMark();
    this.#owner = { disk: this.#disk.id, writer, epoch, claim, first: 0, process };
    this.#assertNewest(epoch);
    this.#create();
    return changes.length;
  }

  /** Nothing is waited for from here until the files are ours. @throws DiskError `journal` when a later writer has put its own there */
  #assertNewest(epoch: number): void {
    for (const path of this.#paths) {
      const bytes = this.#contents(path);
      const owner = bytes === undefined ? undefined : this.#ownerIn(bytes)?.owner;
      if (owner === undefined || owner.disk !== this.#disk.id || owner.epoch <= epoch) continue;
      throw this.#error('another process has opened the disk with it meanwhile, and goes on');
    }
  }

  /** New files, when nothing in the old ones is needed. @throws DiskError `journal` */
  #create(): void {
    try {
      this.#halves = this.#paths.map((path, i) => {
        const fresh = `${path}.new`;
        const half = { fd: openSync(fresh, 'w', 0o600), end: 0, last: -1, unsynced: false };
        this.#halves.push(half);
        if (i === 0) this.#begin(half);
        fsyncSync(half.fd);
        renameSync(fresh, path);
        return half;
      });
      rmSync(this.#heirsPath, { force: true });
      const directory = openSync(dirname(this.path), 'r');
      try {
        fsyncSync(directory);
      } finally {
        closeSync(directory);
      }
    } catch (error) {
      for (const { fd } of this.#halves) closeSync(fd);
      this.#halves = [];
      throw this.#error((error as Error).message, error);
    }
  }

  #begin(half: Half): void {
    const head = Buffer.from(`${JSON.stringify({ ...this.#owner, first: this.#number })}\n`);
    writeSync(half.fd, head, 0, head.length, 0);
    half.end = head.length;
    half.last = -1;
  }

  noteData(slot: number, position: number, data: DataOut | Uint8Array): void {
    const bytes = this.#head(slot, position, data.length, TYPE.data, data.length);
    if (data instanceof Uint8Array) bytes.set(data, CHANGE_HEAD);
    else data.copyTo(bytes, CHANGE_HEAD);
    this.#pending.push({ slot, bytes });
  }

  noteZero(slot: number, position: number, length: number): void {
    this.#pending.push({ slot, bytes: this.#head(slot, position, length, TYPE.zero, 0) });
  }

  noteSize(slot: number, size: number): void {
    this.#pending.push({ slot, bytes: this.#head(slot, size, 0, TYPE.size, 0) });
  }

  #head(slot: number, position: number, length: number, type: number, data: number): Buffer {
    const bytes = this.#space(CHANGE_HEAD + data);
    bytes.writeDoubleLE(slot, 0);
    bytes.writeDoubleLE(position, 8);
    bytes.writeDoubleLE(length, 16);
    bytes.writeUInt32LE(type, 24);
    bytes.writeUInt32LE(data, 28);
    return bytes;
  }

  #space(length: number): Buffer {
    if (this.#pending.length === 0) {
      this.#used = 0;
      if (length > this.#arena.length && length <= ARENA_BYTES) {
        this.#arena = Buffer.allocUnsafeSlow(
          Math.min(ARENA_BYTES, Math.max(length, 2 * this.#arena.length)),
        );
      }
    }
    const end = this.#used + length;
    if (end > this.#arena.length) return Buffer.allocUnsafeSlow(length);
    const bytes = this.#arena.subarray(this.#used, end);
    this.#used = end;
    return bytes;
  }

  /** Everything up to this slot is in the bucket. */
  durable(slot: number): void {
    this.#durable = slot;
    let count = 0;
    while (count < this.#pending.length && (this.#pending[count] as Noted).slot <= slot) count++;
    if (count > 0) this.#pending.splice(0, count);
  }

  /**
   * Settled at once, as long as the file takes it: the kernel copies.
   * @throws DiskError as `LogWriter.flush`
   */
  written(log: LogWriter): Promise<void> | undefined {
    log.check();
    if (this.#failed === undefined) {
      try {
        this.#write();
        return undefined;
      } catch (error) {
        this.#fail(error);
      }
    }
    return log.flush();
  }

  /** Flushes at the same time share one fdatasync. @throws DiskError as `LogWriter.flush` */
  async flush(log: LogWriter): Promise<void> {
    log.check();
    if (this.#failed !== undefined) return log.flush();
    this.#next ??= (this.#running ?? Promise.resolve()).then(() => {
      this.#next = undefined;
      this.#running = this.#sync().finally(() => {
        this.#running = undefined;
      });
      return this.#running;
    });
    try {
      await this.#next;
    } catch {
      await log.flush();
    }
  }

  async #sync(): Promise<void> {
    try {
      this.#write();
      // What is in the other half comes first.
      for (const half of [this.#halves[1 - this.#now] as Half, this.#current]) {
        if (!half.unsynced) continue;
        half.unsynced = false;
        await datasync(half.fd);
      }
    } catch (error) {
      this.#fail(error);
      throw error;
    }
  }

  /** The kernel tells of lost data only once: nothing it says later proves anything. */
  #fail(error: unknown): void {
    if (this.#failed !== undefined) return;
    this.#failed = error;
    this.#log(
      'error',
      `journal ${this.path}: ${(error as Error).message}; from now on everything waits for the bucket`,
    );
  }

  get #current(): Half {
    return this.#halves[this.#now] as Half;
  }

  /** What is pending, as one entry. */
  #write(): void {
    if (this.#failed !== undefined) throw this.#failed;
    if (this.#pending.length === 0) return;
    const pending = this.#pending;
    this.#pending = [];
    this.#turn();
    const number = this.#number++;
    const keyId = this.#codec.keyring?.current ?? 0;
    const cipher = this.#cipher(keyId, this.#owner as Owner);
    const plain = pending.map(({ bytes }) => bytes);
    const body = cipher === undefined ? plain : [cipher.encrypt(number, Buffer.concat(plain))];
    const head = Buffer.alloc(ENTRY_HEAD);
    const length = body.reduce((sum, bytes) => sum + bytes.length, 0);
    head.writeUInt32LE(MAGIC, 0);
    head.writeUInt32LE(length, 4);
    head.writeUInt32LE(
      body.reduce((crc, bytes) => crc32(bytes, crc), 0),
      8,
    );
    head.writeUInt32LE(number, 12);
    head.writeUInt32LE(keyId, 16);
    const half = this.#current;
    half.unsynced = true;
    for (let at = 0; at < body.length || at === 0; at += MAX_PIECES) {
      const pieces = body.slice(at, at + MAX_PIECES);
      if (at === 0) pieces.unshift(head);
      const wanted = pieces.reduce((sum, bytes) => sum + bytes.length, 0);
      if (writevSync(half.fd, pieces, half.end) !== wanted)
        throw new Error('the file system is full');
      half.end += wanted;
    }
    half.last = (pending.at(-1) as Noted).slot;
  }

  /** Goes on in the other half when this one is full and nothing in the other is needed. */
  #turn(): void {
    const other = this.#halves[1 - this.#now] as Half;
    if (this.#current.end < this.#limit || other.last > this.#durable) return;
    ftruncateSync(other.fd, 0);
    this.#begin(other);
    this.#now = 1 - this.#now;
  }

  /** @param done everything is in the bucket: the files go */
  async close(done: boolean): Promise<void> {
    await this.#running?.catch(() => {});
    for (const { fd } of this.#halves) closeSync(fd);
    if (!done || this.#halves.length === 0) return;
    for (const path of this.#paths) unlinkSync(path);
  }
}

interface Found {
  readonly slot: number;
  readonly position: number;
  readonly length: number;
  readonly type: number;
  readonly data: Buffer;
}
