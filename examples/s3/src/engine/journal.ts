/**
 * A local file that makes a flush durable on this host before the bucket has it.
 *
 * What it promises: when `written` has settled, every change noted before is in this host's kernel, and
 * survives the process; when `flush` has, it is on this host's disk (fdatasync). Or it is in the bucket. On the next opening `replay` gives back, in order, what the bucket lacks; if another
 * writer has opened the disk meanwhile, its changes came after what is in the bucket and ours can't be
 * put in between: that is an error, and the journal is thrown away only by order. A file that fails once
 * is never trusted again; flushes wait for the bucket then.
 *
 * The file: a line of JSON (disk, writer, epoch, first number), then entries, one a write: u32 magic, body length, CRC-32 of
 * the body, number, data key; the body, encrypted as the disk's objects are, is changes after each other:
 * f64 slot, position, length, u32 type, u32 bytes of data, the data. An entry that is cut ends the journal.
 */
import {
  closeSync,
  fdatasync,
  fdatasyncSync,
  ftruncateSync,
  openSync,
  readFileSync,
  write,
  writeSync,
} from 'node:fs';
import { promisify } from 'node:util';
import { crc32 } from 'node:zlib';
import type { DataOut } from 'tcmu';
import type { BlobCodec } from './blob.js';
import { DiskError } from './errors.js';
import type { LogWriter } from './log-writer.js';
import type { DiskState } from './opening.js';
import type { DiskRecord } from './records.js';
import type { Log } from './requests.js';

const MAGIC = 0x4a334354;
const ENTRY_HEAD = 20;
const CHANGE_HEAD = 32;
/** From this size on the file is emptied, after the bucket has everything. */
const SIZE_LIMIT = 256 * 1024 * 1024;

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
}

const datasync = promisify(fdatasync);
const writeAt = promisify(write) as (
  fd: number,
  bytes: Uint8Array,
  offset: number,
  length: number,
  position: number,
) => Promise<{ bytesWritten: number }>;

export class Journal {
  readonly path: string;
  readonly #fd: number;
  readonly #disk: DiskRecord;
  readonly #codec: BlobCodec;
  readonly #log: Log;
  readonly #found: { readonly owner: Owner; readonly changes: readonly Found[] } | undefined;
  #owner: Owner | undefined;
  /** Of the newest writer when we looked. */
  #epoch = 0;
  #end = 0;
  #number = 0;
  #pending: Noted[] = [];
  #running: Promise<void> | undefined;
  #next: Promise<void> | undefined;
  #failed: unknown;
  #syncWanted = false;
  /** Something is written and not synced. */
  #unsynced = false;

  private constructor(path: string, fd: number, disk: DiskRecord, codec: BlobCodec, log: Log) {
    this.#log = log;
    this.path = path;
    this.#fd = fd;
    this.#disk = disk;
    this.#codec = codec;
    this.#found = this.#parse(readFileSync(path));
  }

  /** @throws DiskError `journal` when the file can't be used, `key` */
  static open(path: string, disk: DiskRecord, codec: BlobCodec, log: Log): Journal {
    let fd: number;
    try {
      closeSync(openSync(path, 'a', 0o600));
      fd = openSync(path, 'r+');
    } catch (cause) {
      throw new DiskError('journal', `journal ${path}: ${(cause as Error).message}`, {
        operation: 'open',
        path,
        cause,
      });
    }
    try {
      return new Journal(path, fd, disk, codec, log);
    } catch (error) {
      closeSync(fd);
      throw error;
    }
  }

  #parse(bytes: Buffer): { owner: Owner; changes: Found[] } | undefined {
    const end = bytes.indexOf('\n');
    if (end < 0) return undefined;
    let owner: Owner;
    try {
      owner = JSON.parse(bytes.toString('utf8', 0, end)) as Owner;
    } catch (cause) {
      throw this.#error('it is no journal of this program; give another path', cause);
    }
    const changes: Found[] = [];
    let at = end + 1;
    for (let number = owner.first; at + ENTRY_HEAD <= bytes.length; number++) {
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
    return { owner, changes };
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
   * Before the claim: whether what the journal holds can still be applied.
   * @throws DiskError `journal`
   */
  check(state: DiskState, discard: boolean): void {
    this.#epoch = state.epoch;
    const lacking = this.#lacking(state);
    if (lacking.length === 0 || discard) {
      if (this.#found !== undefined) (this.#found.changes as Found[]).length = 0;
      return;
    }
    const { owner } = this.#found as { owner: Owner };
    if (owner.disk !== this.#disk.id) {
      throw this.#error('it belongs to another disk; give another path, or --discard-journal');
    }
    if (owner.writer !== state.writer) {
      throw this.#error(
        `it holds ${lacking.length} flushed changes that the bucket lacks, and another writer has opened the disk since: they can't be applied any more. Copy the file if you want to keep them, and say --discard-journal`,
      );
    }
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
   * After the claim: gives what the bucket lacks to `apply`, and once `settle` has made that durable the
   * file begins anew.
   * @returns changes applied. @throws DiskError `journal`
   */
  async replay(
    claimed: { slot: number; claims: readonly number[]; epoch: number; writer: string },
    apply: (change: Change) => Promise<void>,
    settle: () => Promise<void>,
  ): Promise<number> {
    const changes = this.#lacking(claimed);
    if (changes.length > 0 && claimed.epoch !== this.#epoch + 1) {
      throw this.#error('another writer opened the disk at the same moment; open it again');
    }
    for (const { position, length, type, data } of changes) {
      if (type === TYPE.size) await apply({ type: 'size', size: position });
      else if (type === TYPE.zero) await apply({ type: 'zero', position, length });
      else await apply({ type: 'data', position, length, data });
    }
    if (changes.length > 0) await settle();
    const { epoch, writer } = claimed;
    const claim = claimed.claims.at(-1) as number;
    this.#owner = { disk: this.#disk.id, writer, epoch, claim, first: 0 };
    this.#empty();
    return changes.length;
  }

  /** Only when nothing in it is needed: a crash in between leaves an empty journal. */
  #empty(): void {
    this.#owner = { ...(this.#owner as Owner), first: this.#number };
    const head = Buffer.from(`${JSON.stringify(this.#owner)}\n`);
    ftruncateSync(this.#fd, 0);
    fdatasyncSync(this.#fd);
    writeSync(this.#fd, head, 0, head.length, 0);
    fdatasyncSync(this.#fd);
    this.#end = head.length;
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
    const bytes = Buffer.allocUnsafe(CHANGE_HEAD + data);
    bytes.writeDoubleLE(slot, 0);
    bytes.writeDoubleLE(position, 8);
    bytes.writeDoubleLE(length, 16);
    bytes.writeUInt32LE(type, 24);
    bytes.writeUInt32LE(data, 28);
    return bytes;
  }

  /** Everything up to this slot is in the bucket. */
  durable(slot: number): void {
    let count = 0;
    while (count < this.#pending.length && (this.#pending[count] as Noted).slot <= slot) count++;
    if (count > 0) this.#pending.splice(0, count);
  }

  /** Changes at the same time share one write. @throws DiskError as `LogWriter.flush` */
  written(log: LogWriter): Promise<void> {
    return this.#settle(log, false);
  }

  /** Flushes at the same time share one fdatasync. @throws DiskError as `LogWriter.flush` */
  flush(log: LogWriter): Promise<void> {
    return this.#settle(log, true);
  }

  async #settle(log: LogWriter, sync: boolean): Promise<void> {
    log.check();
    if (this.#failed !== undefined) return log.flush();
    if (this.#end > SIZE_LIMIT && this.#running === undefined && this.#next === undefined) {
      await log.flush();
      if (log.dirty === 0 && this.#running === undefined && this.#next === undefined) this.#empty();
      return;
    }
    this.#syncWanted ||= sync;
    this.#next ??= (this.#running ?? Promise.resolve()).then(() => {
      this.#next = undefined;
      const syncing = this.#syncWanted;
      this.#syncWanted = false;
      this.#running = this.#append(syncing).finally(() => {
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

  async #append(sync: boolean): Promise<void> {
    try {
      if (this.#pending.length > 0) await this.#write(this.#encode());
      if (sync && this.#unsynced) await datasync(this.#fd);
      if (sync) this.#unsynced = false;
    } catch (error) {
      // The kernel tells of lost data only once: nothing it says later proves anything.
      this.#failed = error;
      this.#log(
        'error',
        `journal ${this.path}: ${(error as Error).message}; from now on everything waits for the bucket`,
      );
      throw error;
    }
  }

  async #write(bytes: Buffer): Promise<void> {
    const { bytesWritten } = await writeAt(this.#fd, bytes, 0, bytes.length, this.#end);
    if (bytesWritten !== bytes.length) throw new Error('the file system is full');
    this.#unsynced = true;
    this.#end += bytes.length;
  }

  /** What is pending as one entry. */
  #encode(): Buffer {
    const plain = Buffer.concat(this.#pending.map(({ bytes }) => bytes));
    this.#pending = [];
    const number = this.#number++;
    const keyId = this.#codec.keyring?.current ?? 0;
    const body = this.#cipher(keyId, this.#owner as Owner)?.encrypt(number, plain) ?? plain;
    const head = Buffer.alloc(ENTRY_HEAD);
    head.writeUInt32LE(MAGIC, 0);
    head.writeUInt32LE(body.length, 4);
    head.writeUInt32LE(crc32(body), 8);
    head.writeUInt32LE(number, 12);
    head.writeUInt32LE(keyId, 16);
    return Buffer.concat([head, body]);
  }

  async close(): Promise<void> {
    await this.#running?.catch(() => {});
    closeSync(this.#fd);
  }
}

interface Found {
  readonly slot: number;
  readonly position: number;
  readonly length: number;
  readonly type: number;
  readonly data: Buffer;
}
