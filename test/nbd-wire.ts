// SPDX-License-Identifier: Apache-2.0
/** The NBD protocol by hand, for what no client would send. */
import { connect, type Socket } from 'node:net';

export const OPTION = {
  exportName: 1,
  abort: 2,
  list: 3,
  startTls: 5,
  info: 6,
  go: 7,
  structured: 8,
};

export class Wire {
  readonly socket: Socket;
  #bytes = Buffer.alloc(0);
  #closed = false;
  #changed: (() => void)[] = [];

  constructor(path: string) {
    this.socket = connect(path);
    this.socket.on('data', (chunk) => {
      this.#bytes = Buffer.concat([this.#bytes, chunk]);
      this.#wake();
    });
    // A server that hangs up on us is what these tests provoke.
    this.socket.on('error', () => {});
    this.socket.on('close', () => {
      this.#closed = true;
      this.#wake();
    });
  }

  #wake(): void {
    for (const resolve of this.#changed.splice(0)) resolve();
  }

  send(...parts: Uint8Array[]): void {
    this.socket.write(Buffer.concat(parts));
  }

  /** The next bytes; throws when the server hangs up before. */
  async take(count: number): Promise<Buffer> {
    while (this.#bytes.length < count) {
      if (this.#closed) throw new Error('closed by the server');
      await new Promise<void>((resolve) => this.#changed.push(resolve));
    }
    const taken = this.#bytes.subarray(0, count);
    this.#bytes = this.#bytes.subarray(count);
    return taken;
  }

  /** Resolves when the server has hung up. */
  async ended(): Promise<void> {
    while (!this.#closed) await new Promise<void>((resolve) => this.#changed.push(resolve));
  }

  /** Takes the greeting and answers it. */
  async greet(flags = 3): Promise<void> {
    await this.take(18);
    this.send(numbers([4, flags]));
  }

  /** Sends an option and takes its replies up to the last: `[type, data]`. */
  async option(option: number, data: Uint8Array = new Uint8Array(0)): Promise<[number, Buffer][]> {
    this.send(Buffer.from('IHAVEOPT'), numbers([4, option], [4, data.length]), data);
    const replies: [number, Buffer][] = [];
    for (;;) {
      const head = await this.take(20);
      const type = head.readUInt32BE(12);
      replies.push([type, await this.take(head.readUInt32BE(16))]);
      if (type === 1 || type >= 2 ** 31) return replies;
    }
  }

  /** Up to transmission, with simple replies. */
  async start(): Promise<void> {
    await this.greet();
    const replies = await this.option(OPTION.go, numbers([4, 0], [2, 0]));
    if (replies.at(-1)?.[0] !== 1) throw new Error('the export was refused');
  }

  request(type: number, cookie: number, offset: number | bigint, length: number, flags = 0): void {
    this.send(
      numbers([4, 0x25609513], [2, flags], [2, type], [8, cookie], [8, offset], [4, length]),
    );
  }

  /** A simple reply: its error and cookie. */
  async reply(): Promise<{ error: number; cookie: number }> {
    const head = await this.take(16);
    if (head.readUInt32BE(0) !== 0x67446698) throw new Error('no simple reply');
    return { error: head.readUInt32BE(4), cookie: Number(head.readBigUInt64BE(8)) };
  }
}

/** Big-endian integers: `[bytes, value]`. */
export function numbers(...fields: [2 | 4 | 8, number | bigint][]): Buffer {
  return Buffer.concat(
    fields.map(([bytes, value]) => {
      const field = Buffer.alloc(8);
      field.writeBigUInt64BE(BigInt(value));
      return field.subarray(8 - bytes);
    }),
  );
}
