// SPDX-License-Identifier: Apache-2.0
/**
 * The kernel's side of generic netlink with the family TCM-USER, byte by byte and independent of the codec
 * under test: answers requests, multicasts events, waits for replies as Linux 6.1 does, its pitfalls too.
 */
import type { NativeNetlinkOptions } from '../lib/native.js';
import type { FakeKernel } from './target-fake.js';

const FAMILY = 0x1c;
const GROUP = 5;
const COMMANDS = { added: 1, removed: 2, reconfigured: 3 } as const;

export interface FakeEvent {
  kind: keyof typeof COMMANDS;
  name: string;
  minor: number;
  id: number;
  size?: bigint;
  config?: string;
  writeCache?: number;
}

/** An operation in the kernel that waits for its *_DONE. */
interface Wait {
  kind: keyof typeof COMMANDS;
  id: number;
  done(status: number): void;
}

function attribute(type: number, value: Buffer): Buffer {
  const padded = Buffer.alloc((4 + value.length + 3) & ~3);
  padded.writeUInt16LE(4 + value.length, 0);
  padded.writeUInt16LE(type, 2);
  value.copy(padded, 4);
  return padded;
}

function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}

function u64(value: bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(value);
  return bytes;
}

function message(type: number, sequence: number, payload: Buffer): Buffer {
  const header = Buffer.alloc(16);
  header.writeUInt32LE(16 + payload.length, 0);
  header.writeUInt16LE(type, 4);
  header.writeUInt32LE(sequence, 8);
  return Buffer.concat([header, payload]);
}

export function eventMessage(event: FakeEvent): Buffer {
  return message(
    FAMILY,
    0,
    Buffer.concat([
      Buffer.from([COMMANDS[event.kind], 2, 0, 0]),
      attribute(1, Buffer.from(`${event.name}\0`)),
      attribute(2, u32(event.minor)),
      attribute(8, u32(event.id)),
      ...(event.config === undefined ? [] : [attribute(4, Buffer.from(`${event.config}\0`))]),
      ...(event.size === undefined ? [] : [attribute(5, u64(event.size))]),
      ...(event.writeCache === undefined ? [] : [attribute(6, Buffer.from([event.writeCache]))]),
    ]),
  );
}

class FakeSocket {
  readonly options: NativeNetlinkOptions;
  readonly #netlink: FakeNetlink;
  joined = false;
  closed = false;
  /** When set, what is delivered stays in the socket until the kernel answers a request behind it. */
  held: Uint8Array[] | undefined;

  constructor(netlink: FakeNetlink, options: NativeNetlinkOptions) {
    this.#netlink = netlink;
    this.options = options;
  }

  send(bytes: Uint8Array): void {
    if (this.closed) throw Object.assign(new Error('EBADF, sendto'), { code: 'EBADF' });
    this.#netlink.request(this, Buffer.from(bytes));
  }

  join(group: number): void {
    if (group !== GROUP) throw Object.assign(new Error('EINVAL, join'), { code: 'EINVAL' });
    this.joined = true;
  }

  close(): void {
    this.closed = true;
  }

  /** Lets what is held be read, before what comes after. */
  release(): void {
    const { held = [] } = this;
    this.held = undefined;
    for (const bytes of held) this.deliver(bytes);
  }

  deliver(bytes: Uint8Array): void {
    if (this.held !== undefined) {
      this.held.push(bytes);
      return;
    }
    setImmediate(() => {
      if (!this.closed) this.options.message(new Uint8Array(bytes));
    });
  }
}

export class FakeNetlink {
  readonly #kernel: FakeKernel;
  readonly sockets: FakeSocket[] = [];
  /** The module-wide switch. */
  replies = false;
  blocked = false;
  readonly waits: Wait[] = [];
  /** All *_DONE that came: `kind id status`. */
  readonly done: string[] = [];
  /** Operations that nothing can wake any more. */
  readonly lost: Wait[] = [];
  /** Answers no request. */
  silent = false;
  /** Fails commands of the family with this errno. */
  refuse: number | undefined;

  constructor(kernel: FakeKernel) {
    this.#kernel = kernel;
  }

  /** Whether somebody listens. */
  get heard(): boolean {
    return this.sockets.some((socket) => socket.joined && !socket.closed);
  }

  open(options: NativeNetlinkOptions): FakeSocket {
    const socket = new FakeSocket(this, options);
    this.sockets.push(socket);
    return socket;
  }

  /** Multicasts an event; settles with the status of its reply, at once if none is waited for. */
  emit(event: FakeEvent, dropped = false): Promise<number> {
    if (this.blocked) return Promise.resolve(-11);
    const waiting = this.replies
      ? new Promise<number>((done) => this.waits.push({ kind: event.kind, id: event.id, done }))
      : Promise.resolve(0);
    for (const socket of this.sockets) {
      if (!socket.joined) continue;
      if (dropped) setImmediate(() => socket.options.overrun());
      else socket.deliver(eventMessage(event));
    }
    return waiting;
  }

  /** block_netlink and reset_netlink. */
  parameter(name: string, value: string): void {
    if (name === 'block_netlink') this.blocked = value === '1';
    else if (!this.blocked) throw Object.assign(new Error('EBUSY, write'), { code: 'EBUSY' });
    else for (const wait of this.waits.splice(0)) wait.done(-4);
  }

  request(socket: FakeSocket, bytes: Buffer): void {
    if (this.silent) return;
    socket.release();
    const type = bytes.readUInt16LE(4);
    const flags = bytes.readUInt16LE(6);
    const sequence = bytes.readUInt32LE(8);
    const answer = (status: number): void => {
      const error = Buffer.concat([Buffer.alloc(4), bytes.subarray(0, 16)]);
      error.writeInt32LE(status, 0);
      socket.deliver(message(2, sequence, error));
    };
    if (type === 16) {
      if (!this.#kernel.modules.has('target_core_user')) return answer(-2);
      socket.deliver(message(16, sequence, familyAnswer()));
      return;
    }
    if (type !== FAMILY) return answer(-22);
    const status = this.refuse === undefined ? this.#command(bytes.subarray(16)) : -this.refuse;
    if (status !== 0 || (flags & 4) !== 0) answer(status);
  }

  #command(payload: Buffer): number {
    const command = payload[0];
    const attributes = new Map<number, Buffer>();
    for (let at = 4; at < payload.length; ) {
      const length = payload.readUInt16LE(at);
      attributes.set(payload.readUInt16LE(at + 2), payload.subarray(at + 4, at + length));
      at += (length + 3) & ~3;
    }
    if (command === 7) {
      this.replies = attributes.get(9)?.[0] === 1;
      return 0;
    }
    const kind = (['added', 'removed', 'reconfigured'] as const)[(command ?? 0) - 4];
    const id = attributes.get(8)?.readUInt32LE();
    const status = attributes.get(7)?.readInt32LE();
    if (kind === undefined || id === undefined || status === undefined) return -22;
    this.done.push(`${kind} ${id} ${status}`);
    const index = this.waits.findIndex((wait) => wait.id === id);
    if (index < 0) return -19;
    const [wait] = this.waits.splice(index, 1);
    if (wait === undefined) return -19;
    if (wait.kind !== kind) {
      // Linux 6.1 has taken the waiter off its list by now.
      this.lost.push(wait);
      return -22;
    }
    wait.done(status);
    return 0;
  }
}

export function familyAnswer(): Buffer {
  const group = Buffer.concat([attribute(1, Buffer.from('config\0')), attribute(2, u32(GROUP))]);
  const id = Buffer.alloc(2);
  id.writeUInt16LE(FAMILY);
  return Buffer.concat([
    Buffer.from([1, 2, 0, 0]),
    attribute(2, Buffer.from('TCM-USER\0')),
    attribute(1, id),
    attribute(3, u32(2)),
    attribute(4, u32(0)),
    attribute(5, u32(9)),
    attribute(7, attribute(1, group)),
  ]);
}
