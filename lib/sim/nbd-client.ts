// SPDX-License-Identifier: Apache-2.0
/**
 * A small NBD client: for tests and demonstrations on machines without libnbd or qemu. Fixed
 * newstyle, structured replies, `base:allocation`, STARTTLS. Requests may overlap; each settles with
 * its own reply, and all that are left reject when the connection ends.
 */
import { connect as connectSocket, type Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { type ConnectionOptions, connect as connectTls } from 'node:tls';
import { DeviceError } from '../errors.js';

/** Where an NBD server is, for `NbdClient.connect`. */
export interface NbdConnectOptions {
  /** Unix socket, or `port`. */
  path?: string;
  /** TCP port. Default 10809. */
  port?: number;
  /** Default 127.0.0.1. */
  host?: string;
  /** Name of the export. Default: empty, the server's default export. */
  exportName?: string;
  /** Asks for TLS before anything else. */
  tls?: ConnectionOptions;
}

/** For requests that change data. */
export interface NbdWriteOptions {
  /** Durable when it settles. */
  fua?: boolean;
}

/** For `NbdClient.writeZeroes`. */
export interface NbdZeroOptions extends NbdWriteOptions {
  /** The range must stay allocated. */
  noHole?: boolean;
  /** Rather ENOTSUP than as slow as writing. */
  fastZero?: boolean;
}

/** A piece of the disk in one state, as `base:allocation` has it. */
export interface NbdExtent {
  /** Bytes. */
  length: number;
  /** Not allocated. */
  hole: boolean;
  /** Reads as zeros. */
  zero: boolean;
}

const OPTION = { structured: 8, startTls: 5, setMetaContext: 10, go: 7 } as const;
const REPLY_ACK = 1;
const REPLY_INFO = 3;
const COMMAND = {
  read: 0,
  write: 1,
  disconnect: 2,
  flush: 3,
  trim: 4,
  cache: 5,
  zeroes: 6,
  status: 7,
};
const FLAG = { fua: 1, noHole: 2, fastZero: 16 } as const;
const SIMPLE_REPLY = 0x67446698;
const STRUCTURED_REPLY = 0x668e33ef;
const CHUNK = { offsetData: 1, blockStatus: 5 } as const;
const ERRORS: Record<number, string> = {
  1: 'EPERM',
  5: 'EIO',
  12: 'ENOMEM',
  22: 'EINVAL',
  28: 'ENOSPC',
  75: 'EOVERFLOW',
  95: 'ENOTSUP',
  108: 'ESHUTDOWN',
};

interface Pending {
  what: string;
  offset: number;
  data: Buffer | undefined;
  extents: NbdExtent[];
  failure: DeviceError | undefined;
  resolve(pending: Pending): void;
  reject(error: Error): void;
}

/**
 * A connection to an NBD server, after the handshake. Made by `NbdClient.connect`; requests may
 * overlap.
 */
export class NbdClient {
  /** Bytes. */
  size = 0;
  /** Transmission flags of the protocol. */
  flags = 0;
  /** Bytes: requests are multiples of the minimum. */
  blockSizes = {
    /** Offsets and lengths are multiples of it. */
    minimum: 1,
    /** Bytes that are best for speed. */
    preferred: 4096,
    /** Bytes of the longest read or write. */
    maximum: 32 << 20,
  };
  readonly #where: string;
  #stream: Duplex;
  #chunks: Buffer[] = [];
  #available = 0;
  #wanted: { bytes: number; resolve(): void; reject(error: Error): void } | undefined;
  #ended: Error | undefined;
  readonly #pending = new Map<bigint, Pending>();
  #cookie = 0n;

  private constructor(stream: Socket, where: string) {
    this.#where = where;
    this.#stream = stream;
    this.#listen(stream);
  }

  /** @throws DeviceError `ERR_TCMU_NBD` when the server refuses or can't be reached */
  static async connect(options: NbdConnectOptions): Promise<NbdClient> {
    const { path, port = 10809, host = '127.0.0.1' } = options;
    const where = path ?? `${host} port ${port}`;
    const socket = path === undefined ? connectSocket(port, host) : connectSocket(path);
    const client = new NbdClient(socket.setNoDelay(true), where);
    try {
      await client.#negotiate(options);
    } catch (error) {
      client.#stream.destroy();
      throw error;
    }
    void client.#receive().catch((error: Error) => client.#fail(error));
    return client;
  }

  /**
   * NBD_CMD_READ of `length` bytes at `offset`.
   * @throws DeviceError `ERR_TCMU_NBD` with the server's errno
   */
  async read(offset: number, length: number): Promise<Uint8Array> {
    const { data } = await this.#request('read', COMMAND.read, 0, offset, length);
    return data as Uint8Array;
  }

  /**
   * NBD_CMD_WRITE of `data` at byte `offset`.
   * @throws DeviceError `ERR_TCMU_NBD` with the server's errno
   */
  async write(offset: number, data: Uint8Array, options: NbdWriteOptions = {}): Promise<void> {
    const flags = options.fua ? FLAG.fua : 0;
    await this.#request('write', COMMAND.write, flags, offset, data.length, data);
  }

  /**
   * NBD_CMD_FLUSH: what was written before is durable when it settles.
   * @throws DeviceError `ERR_TCMU_NBD`
   */
  async flush(): Promise<void> {
    await this.#request('flush', COMMAND.flush, 0, 0, 0);
  }

  /**
   * NBD_CMD_TRIM: `length` bytes at `offset` are not needed any more.
   * @throws DeviceError `ERR_TCMU_NBD`
   */
  async trim(offset: number, length: number, options: NbdWriteOptions = {}): Promise<void> {
    await this.#request('trim', COMMAND.trim, options.fua ? FLAG.fua : 0, offset, length);
  }

  /**
   * NBD_CMD_WRITE_ZEROES over `length` bytes at `offset`.
   * @throws DeviceError `ERR_TCMU_NBD`, errno ENOTSUP for a `fastZero` that would be slow
   */
  async writeZeroes(offset: number, length: number, options: NbdZeroOptions = {}): Promise<void> {
    const flags =
      (options.fua ? FLAG.fua : 0) |
      (options.noHole ? FLAG.noHole : 0) |
      (options.fastZero ? FLAG.fastZero : 0);
    await this.#request('write zeroes', COMMAND.zeroes, flags, offset, length);
  }

  /**
   * NBD_CMD_CACHE: `length` bytes at `offset` will be read soon.
   * @throws DeviceError `ERR_TCMU_NBD`
   */
  async cache(offset: number, length: number): Promise<void> {
    await this.#request('cache', COMMAND.cache, 0, offset, length);
  }

  /**
   * NBD_CMD_BLOCK_STATUS: what is allocated from byte `offset` on; may end before `length` bytes.
   * @throws DeviceError `ERR_TCMU_NBD`
   */
  async blockStatus(offset: number, length: number): Promise<NbdExtent[]> {
    return (await this.#request('block status', COMMAND.status, 0, offset, length)).extents;
  }

  /** NBD_CMD_DISC: the server finishes what it was asked before. Never rejects. Idempotent. */
  async close(): Promise<void> {
    if (this.#ended === undefined) {
      this.#send(COMMAND.disconnect, 0, 0n, 0, 0);
      const closed = new Promise((resolve) => this.#stream.once('close', resolve));
      this.#stream.end();
      await closed;
    }
    this.#stream.destroy();
  }

  /** As `close`, for `await using`; rejects as that does. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  // --- handshake ---

  async #negotiate(options: NbdConnectOptions): Promise<void> {
    const greeting = await this.#take(18);
    if (greeting.toString('latin1', 0, 16) !== 'NBDMAGICIHAVEOPT') {
      throw this.#failure('connect', 'what answers is no NBD server of the newstyle protocol');
    }
    const flags = Buffer.alloc(4);
    flags.writeUInt32BE(3);
    this.#stream.write(flags);
    if (options.tls !== undefined) {
      await this.#option('STARTTLS', OPTION.startTls, Buffer.alloc(0));
      await this.#startTls(options.tls);
    }
    await this.#option('structured replies', OPTION.structured, Buffer.alloc(0));
    const name = Buffer.from(options.exportName ?? '');
    const query = Buffer.from('base:allocation');
    await this.#option(
      'metadata context',
      OPTION.setMetaContext,
      Buffer.concat([u32(name.length), name, u32(1), u32(query.length), query]),
    );
    // One information request: the block sizes.
    const information = Buffer.from([0, 1, 0, 3]);
    await this.#option('export', OPTION.go, Buffer.concat([u32(name.length), name, information]));
  }

  async #option(what: string, option: number, data: Buffer): Promise<void> {
    const head = Buffer.alloc(16);
    head.write('IHAVEOPT', 'latin1');
    head.writeUInt32BE(option, 8);
    head.writeUInt32BE(data.length, 12);
    this.#stream.write(Buffer.concat([head, data]));
    for (;;) {
      const reply = await this.#take(20);
      const type = reply.readUInt32BE(12);
      const body = await this.#take(reply.readUInt32BE(16));
      if (type === REPLY_ACK) return;
      if (type >= 2 ** 31) {
        throw this.#failure(what, `the server refuses (reply 2^31+${type - 2 ** 31}): ${body}`);
      }
      if (type === REPLY_INFO) this.#takeInformation(body);
    }
  }

  #takeInformation(body: Buffer): void {
    const type = body.readUInt16BE(0);
    if (type === 0) {
      this.size = Number(body.readBigUInt64BE(2));
      this.flags = body.readUInt16BE(10);
    } else if (type === 3) {
      const [minimum, preferred, maximum] = [2, 6, 10].map((at) => body.readUInt32BE(at));
      this.blockSizes = { minimum, preferred, maximum } as NbdClient['blockSizes'];
    }
  }

  async #startTls(options: ConnectionOptions): Promise<void> {
    const plain = this.#stream;
    plain.removeAllListeners();
    const secure = connectTls({ ...options, socket: plain });
    this.#stream = secure;
    await new Promise((resolve, reject) => {
      secure.once('secureConnect', resolve).once('error', reject);
    });
    this.#listen(secure);
  }

  // --- transmission ---

  #request(
    what: string,
    type: number,
    flags: number,
    offset: number,
    length: number,
    payload?: Uint8Array,
  ): Promise<Pending> {
    return new Promise((resolve, reject) => {
      if (this.#ended !== undefined) {
        reject(this.#ended);
        return;
      }
      this.#cookie += 1n;
      const data = type === COMMAND.read ? Buffer.alloc(length) : undefined;
      this.#pending.set(this.#cookie, {
        what: `${what} of ${length} bytes at ${offset}`,
        offset,
        data,
        extents: [],
        failure: undefined,
        resolve,
        reject,
      });
      this.#send(type, flags, this.#cookie, offset, length);
      if (payload !== undefined) this.#stream.write(payload);
    });
  }

  #send(type: number, flags: number, cookie: bigint, offset: number, length: number): void {
    const head = Buffer.alloc(28);
    head.writeUInt32BE(0x25609513);
    head.writeUInt16BE(flags, 4);
    head.writeUInt16BE(type, 6);
    head.writeBigUInt64BE(cookie, 8);
    head.writeBigUInt64BE(BigInt(offset), 16);
    head.writeUInt32BE(length, 24);
    this.#stream.write(head);
  }

  async #receive(): Promise<void> {
    for (;;) {
      const magic = (await this.#take(4)).readUInt32BE(0);
      if (magic === SIMPLE_REPLY) {
        const head = await this.#take(12);
        const pending = this.#find(head.readBigUInt64BE(4));
        this.#failed(pending, head.readUInt32BE(0), '');
        this.#settle(head.readBigUInt64BE(4), pending);
      } else if (magic === STRUCTURED_REPLY) {
        const head = await this.#take(16);
        const cookie = head.readBigUInt64BE(4);
        const pending = this.#find(cookie);
        this.#takeChunk(pending, head.readUInt16BE(2), await this.#take(head.readUInt32BE(12)));
        if ((head.readUInt16BE(0) & 1) !== 0) this.#settle(cookie, pending);
      } else {
        throw this.#failure('receive', `the server sent 0x${magic.toString(16)} for a reply`);
      }
    }
  }

  #takeChunk(pending: Pending, type: number, body: Buffer): void {
    if (type === CHUNK.offsetData) {
      body.copy(pending.data as Buffer, Number(body.readBigUInt64BE(0)) - pending.offset, 8);
    } else if (type === CHUNK.blockStatus) {
      for (let at = 4; at + 8 <= body.length; at += 8) {
        const state = body.readUInt32BE(at + 4);
        pending.extents.push({
          length: body.readUInt32BE(at),
          hole: (state & 1) !== 0,
          zero: (state & 2) !== 0,
        });
      }
    } else if ((type & 0x8000) !== 0) {
      const text = body.toString('utf8', 6, 6 + body.readUInt16BE(4));
      this.#failed(pending, body.readUInt32BE(0), text);
    }
  }

  #find(cookie: bigint): Pending {
    const pending = this.#pending.get(cookie);
    if (pending === undefined) {
      throw this.#failure('receive', `a reply to ${cookie}, which was not asked`);
    }
    return pending;
  }

  #failed(pending: Pending, error: number, text: string): void {
    if (error === 0) return;
    const errno = ERRORS[error] ?? `error ${error}`;
    pending.failure = this.#failure(pending.what, text === '' ? errno : `${errno}: ${text}`, errno);
  }

  #settle(cookie: bigint, pending: Pending): void {
    this.#pending.delete(cookie);
    if (pending.failure === undefined) pending.resolve(pending);
    else pending.reject(pending.failure);
  }

  // --- the stream ---

  #listen(stream: Duplex): void {
    stream.on('data', (chunk: Buffer) => {
      this.#chunks.push(chunk);
      this.#available += chunk.length;
      if (this.#wanted !== undefined && this.#available >= this.#wanted.bytes) {
        const { resolve } = this.#wanted;
        this.#wanted = undefined;
        resolve();
      }
    });
    stream.on('error', (error) => this.#fail(error));
    stream.on('close', () => this.#fail(new Error('the connection has ended')));
  }

  async #take(bytes: number): Promise<Buffer> {
    if (this.#available < bytes) {
      if (this.#ended !== undefined) throw this.#ended;
      await new Promise<void>((resolve, reject) => {
        this.#wanted = { bytes, resolve, reject };
      });
    }
    const all =
      this.#chunks.length === 1 ? (this.#chunks[0] as Buffer) : Buffer.concat(this.#chunks);
    this.#available -= bytes;
    this.#chunks = this.#available > 0 ? [all.subarray(bytes)] : [];
    return all.subarray(0, bytes);
  }

  /** The connection is over: everything that waits for it hears why. */
  #fail(cause: Error): void {
    if (this.#ended !== undefined) return;
    this.#ended =
      cause instanceof DeviceError ? cause : this.#failure('connection', cause.message, cause);
    this.#stream.destroy();
    this.#wanted?.reject(this.#ended);
    for (const pending of this.#pending.values()) pending.reject(this.#ended);
    this.#pending.clear();
  }

  #failure(operation: string, text: string, cause?: Error | string): DeviceError {
    return new DeviceError('ERR_TCMU_NBD', `tcmu: NBD ${operation}, ${this.#where}: ${text}`, {
      operation,
      path: this.#where,
      ...(typeof cause === 'string' ? { errno: cause } : { cause }),
    });
  }
}

function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}
