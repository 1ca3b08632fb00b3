// SPDX-License-Identifier: Apache-2.0
/**
 * Listens to TCM-USER on generic netlink: devices that are enabled, removed, reconfigured.
 *
 * Contract, in the order of what can go wrong:
 * - The kernel waits for replies only when a module-wide switch is on, without any time limit and
 *   uninterruptibly. The switch is never touched unless `replies: true` asks for it, and then switched off
 *   at `close` and at process exit. After SIGKILL it stays on: `rescueNetlink()`, which opening with
 *   `replies` does first.
 * - With `replies`, every event is answered exactly once and before its deadline, whether its handler
 *   returns, throws, hangs or isn't there. Never twice, and never for another kind of event: Linux 6.1
 *   drops a waiter from its list before it compares kinds, and nothing can wake it any more.
 * - Events of one device are handled in order, of different devices concurrently.
 * - When the kernel had to drop events (ENOBUFS), whoever waits for a lost one is let go by the rescue
 *   sequence, and what changed meanwhile is found in sysfs and configfs.
 */
import { constants } from 'node:os';
import { errnoOf, TargetError } from '../errors.js';
import type { NativeNetlinkSocket } from '../native.js';
import { targetError } from './explain.js';
import { localHost, type TargetHost } from './host.js';
import { checkInteger } from './names.js';
import {
  decodeError,
  decodeEvent,
  decodeFamily,
  decodeMessages,
  encodeDone,
  encodeFamilyRequest,
  encodeMessage,
  encodeReplySwitch,
  GENL_ID_CTRL,
  NLM_F_ACK,
  NLM_F_REQUEST,
  NLMSG_ERROR,
  TCMU_FAMILY,
  TCMU_GROUP,
  type TcmuEvent,
} from './netlink-codec.js';
import { rescueNetlink } from './rescue.js';
import { listUio, parseUioName, type UioName } from './uio.js';

/** Milliseconds the kernel gets to answer a request; it does so within the same system call. */
const REQUEST_TIMEOUT = 2_000;
const SETTLE_ATTEMPTS = 5;
const CHANNEL = 'generic netlink';
const ANSWER_ADVICE = 'whoever waits for it may be stuck: see rescueNetlink()';

/** One socket: requests with their answers, and a stream of events. */
class Channel {
  readonly #socket: NativeNetlinkSocket;
  readonly #waiting = new Map<
    number,
    { done(payload: Uint8Array): void; failed(e: Error): void }
  >();
  #sequence = 0;
  #family = 0;

  private constructor(socket: NativeNetlinkSocket) {
    this.#socket = socket;
  }

  static async open(
    host: TargetHost,
    receiveBuffer: number,
    on: {
      event(event: TcmuEvent): void;
      overrun(): void;
      failed(error: TargetError): void;
    },
  ): Promise<Channel> {
    const { NetlinkSocket } = await host.calls();
    let channel: Channel | undefined;
    const socket = ((): NativeNetlinkSocket => {
      try {
        return new NetlinkSocket({
          receiveBuffer,
          message: (datagram) => channel?.take(datagram, on.event),
          overrun: () => on.overrun(),
          failed: (code, message) => {
            const cause = Object.assign(new Error(message), { code });
            const error = targetError('NETLINK', 'read from', CHANNEL, 'the socket failed', cause);
            channel?.failAll(error);
            on.failed(error);
          },
        });
      } catch (error) {
        throw targetError(
          'NETLINK',
          'open',
          CHANNEL,
          'the kernel gave no socket for it: a sandbox may forbid netlink',
          error,
        );
      }
    })();
    channel = new Channel(socket);
    try {
      const group = await channel.#resolve();
      socket.join(group);
    } catch (error) {
      socket.close();
      throw error;
    }
    return channel;
  }

  /** Sends to the family and waits for the kernel's acknowledgement. */
  async command(operation: string, payload: Uint8Array): Promise<void> {
    await this.#request(operation, this.#family, payload, NLM_F_ACK);
  }

  /** Sends to the family and lets it be: for what must go out without waiting. */
  send(payload: Uint8Array): void {
    this.#sequence += 1;
    this.#socket.send(
      encodeMessage({
        type: this.#family,
        flags: NLM_F_REQUEST,
        sequence: this.#sequence,
        port: 0,
        payload,
      }),
    );
  }

  /** Returns when everything that was received before this call has been handed over. */
  async settle(): Promise<void> {
    for (let attempt = 1; ; attempt += 1) {
      try {
        await this.#request('catch up with', GENL_ID_CTRL, encodeFamilyRequest(TCMU_FAMILY), 0);
        return;
      } catch (error) {
        // The answer itself is dropped as long as the buffer is full.
        if (attempt === SETTLE_ATTEMPTS) throw error;
      }
    }
  }

  close(): void {
    this.failAll(targetError('NETLINK', 'wait for', CHANNEL, 'it was closed'));
    this.#socket.close();
  }

  async #resolve(): Promise<number> {
    let payload: Uint8Array;
    try {
      payload = await this.#request(
        'find TCM-USER in',
        GENL_ID_CTRL,
        encodeFamilyRequest(TCMU_FAMILY),
        0,
      );
    } catch (error) {
      if (errnoOf(error) !== 'ENOENT') throw error;
      throw targetError(
        'NO_MODULE',
        'find TCM-USER in',
        CHANNEL,
        'the module is not loaded: modprobe target_core_user',
        error,
      );
    }
    const family = decodeFamily(payload);
    const group = family?.groups.get(TCMU_GROUP);
    if (family === undefined || group === undefined) {
      throw targetError(
        'NETLINK',
        'find TCM-USER in',
        CHANNEL,
        "the kernel's answer lacks its group",
      );
    }
    this.#family = family.id;
    return group;
  }

  async #request(
    operation: string,
    type: number,
    payload: Uint8Array,
    flags: number,
  ): Promise<Uint8Array> {
    this.#sequence += 1;
    const sequence = this.#sequence;
    let timer: NodeJS.Timeout | undefined;
    try {
      return await new Promise<Uint8Array>((done, failed) => {
        const silent = () =>
          failed(targetError('NETLINK', operation, CHANNEL, 'the kernel did not answer'));
        // When this process was busy, the answer may lie in the socket, which is read before.
        timer = setTimeout(() => setImmediate(silent), REQUEST_TIMEOUT);
        this.#waiting.set(sequence, { done, failed });
        this.#socket.send(
          encodeMessage({ type, flags: NLM_F_REQUEST | flags, sequence, port: 0, payload }),
        );
      });
    } catch (error) {
      if (error instanceof TargetError) throw error;
      const advice =
        errnoOf(error) === 'EPERM' ? 'run this as root (CAP_NET_ADMIN)' : 'the kernel refused it';
      throw targetError('NETLINK', operation, CHANNEL, advice, error);
    } finally {
      clearTimeout(timer);
      this.#waiting.delete(sequence);
    }
  }

  private take(datagram: Uint8Array, event: (event: TcmuEvent) => void): void {
    for (const message of decodeMessages(datagram)) {
      if (message.type === this.#family && message.sequence === 0) {
        const decoded = decodeEvent(message.payload);
        if (decoded !== undefined) event(decoded);
        continue;
      }
      const waiting = this.#waiting.get(message.sequence);
      if (waiting === undefined) continue;
      if (message.type !== NLMSG_ERROR) {
        waiting.done(message.payload);
        continue;
      }
      const status = decodeError(message.payload) ?? -constants.errno.EPROTO;
      if (status === 0) waiting.done(new Uint8Array());
      else waiting.failed(Object.assign(new Error(nameOf(-status)), { code: nameOf(-status) }));
    }
  }

  private failAll(error: TargetError): void {
    for (const waiting of this.#waiting.values()) waiting.failed(error);
  }
}

const DEAF = { event: () => {}, overrun: () => {}, failed: () => {} };

function nameOf(errno: number): string {
  const known = Object.entries(constants.errno).find(([, value]) => value === errno);
  return known?.[0] ?? `E${errno}`;
}

/**
 * Runs `change` while a listener is there. An enabled device's reconfiguration is multicast, and the
 * kernel fails it with ESRCH when nobody hears it (seen on Linux 6.1); this one hears and says nothing.
 */
export async function whileListening<T>(host: TargetHost, change: () => Promise<T>): Promise<T> {
  const channel = await Channel.open(host, 1 << 16, DEAF);
  try {
    return await change();
  } finally {
    channel.close();
  }
}

/** The device an event is about. */
export interface NetlinkDevice extends UioName {
  /** `/dev/uioN`. */
  uioPath: string;
  /** Minor number, the N of `/dev/uioN`. */
  minor: number;
}

/** What was changed; only what was changed is there, or everything known after dropped events. */
export interface Reconfiguration {
  /** Bytes. */
  size?: number;
  /** The new attrib/emulate_write_cache. */
  writeCache?: boolean;
  /** The new configuration string. */
  config?: string;
}

/**
 * Handlers get a signal that is aborted at the deadline. With `replies`, one that throws fails the
 * operation that caused the event, with the thrown error's errno or EIO.
 */
export interface NetlinkHandlers {
  /** A backstore was enabled: open its uio device. */
  added?(device: NetlinkDevice, signal: AbortSignal): void | Promise<void>;
  /** It is about to go: close its uio device. */
  removed?(device: NetlinkDevice, signal: AbortSignal): void | Promise<void>;
  /** Its size, write cache or configuration is about to change. */
  reconfigured?(
    device: NetlinkDevice,
    change: Reconfiguration,
    signal: AbortSignal,
  ): void | Promise<void>;
  /** A handler failed or was late, or the channel did. */
  error?(error: TargetError): void;
}

/** What is done about the kernel's events, for `TcmuNetlink.open`. */
export interface NetlinkOptions {
  /**
   * Lets the kernel wait for this process: `enable`, resizes and removals of **all** devices of the
   * machine (those made with `waitForListener`) return only when it has answered. For the one daemon that
   * serves all devices; a second process with replies makes the kernel lose waiters. Needs CAP_NET_ADMIN,
   * and write access to the module's parameters. Default false.
   */
  replies?: boolean;
  /** Milliseconds an event may take from its arrival to its answer. Default 10,000. */
  deadline?: number;
  /** Calls `added` for the devices that exist already. Default false. */
  existing?: boolean;
  /** Bytes of the socket's receive buffer. Default 4 MiB: some thousand events. */
  receiveBuffer?: number;
  /** Default: this machine. */
  host?: TargetHost;
}

interface Known {
  device: NetlinkDevice;
  /** The kernel's number of the device, never the same for two in a row. */
  id: number | undefined;
  /** What `added` said, when it was called: 0 or -errno. */
  added?: Promise<number>;
  /** The kernel, waiting in `enable`, has taken that. */
  told: boolean;
}

type Answer = (status: number) => void | Promise<void>;

/** A listener to the kernel's announcements of devices. Made by `TcmuNetlink.open`. */
export class TcmuNetlink {
  readonly #host: TargetHost;
  readonly #handlers: NetlinkHandlers;
  readonly #replies: boolean;
  readonly #deadline: number;
  #channel!: Channel;
  /** What is known of each device, by `hba/name`. */
  readonly #known = new Map<string, Known>();
  /** The end of each device's queue. */
  readonly #queues = new Map<string, Promise<void>>();
  #resync: Promise<void> | undefined;
  #resyncAgain = false;
  #closing: Promise<void> | undefined;
  readonly #atExit = (): void => {
    try {
      this.#channel.send(encodeReplySwitch(false));
    } catch {
      // The process ends anyhow; rescueNetlink() is for what it leaves.
    }
  };

  private constructor(handlers: NetlinkHandlers, options: NetlinkOptions) {
    this.#host = options.host ?? localHost;
    this.#handlers = handlers;
    this.#replies = options.replies ?? false;
    this.#deadline = options.deadline ?? 10_000;
  }

  /**
   * Starts to listen.
   *
   * @throws TargetError `ERR_TCMU_TARGET_NO_MODULE`, `_NETLINK`, with `replies` also `_PERMISSION`
   */
  static async open(handlers: NetlinkHandlers, options: NetlinkOptions = {}): Promise<TcmuNetlink> {
    checkInteger('deadline', options.deadline ?? 10_000, 1, 2 ** 31 - 1);
    const receiveBuffer = options.receiveBuffer ?? 4 << 20;
    checkInteger('receiveBuffer', receiveBuffer, 4096, 1 << 30);
    const listener = new TcmuNetlink(handlers, options);
    listener.#channel = await Channel.open(listener.#host, receiveBuffer, {
      event: (event) => listener.#take(event),
      overrun: () => listener.#dropped(),
      failed: (error) => listener.#report(error),
    });
    try {
      await listener.#start(options.existing ?? false);
    } catch (error) {
      listener.#channel.close();
      throw error;
    }
    return listener;
  }

  /** The devices known now. */
  get devices(): NetlinkDevice[] {
    return [...this.#known.values()].map((known) => known.device);
  }

  /**
   * Answers what is under way, switches replies off, stops listening. Takes up to the deadline.
   * Idempotent.
   */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  /** As `close`, for `await using`; rejects as that does. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  async #start(existing: boolean): Promise<void> {
    if (this.#replies) {
      // A predecessor may have left operations waiting.
      await this.#rescue();
      await this.#channel.command('switch replies on in', encodeReplySwitch(true));
      process.once('exit', this.#atExit);
    }
    for (const { device, id } of await this.#list()) {
      if (this.#known.has(keyOf(device))) continue;
      if (existing) this.#added(device, id);
      else this.#known.set(keyOf(device), { device, id, told: false });
    }
  }

  async #close(): Promise<void> {
    try {
      await this.#resync;
      if (this.#replies) await this.#switchOff();
      await Promise.all(this.#queues.values());
    } finally {
      this.#channel.close();
    }
  }

  async #switchOff(): Promise<void> {
    const off = encodeReplySwitch(false);
    try {
      // Whoever waits was in the socket before the acknowledgement, and is in a queue now.
      await this.#channel.command('switch replies off in', off);
    } catch (error) {
      // The switch must not stay on because our own socket has failed.
      this.#report(targetError('NETLINK', 'close', CHANNEL, 'trying on another socket', error));
      const other = await Channel.open(this.#host, 1 << 16, DEAF);
      try {
        await other.command('switch replies off in', off);
      } finally {
        other.close();
      }
    } finally {
      process.off('exit', this.#atExit);
    }
  }

  #take(event: TcmuEvent): void {
    const name = parseUioName(event.uioName);
    if (name === undefined) {
      this.#enqueue('', async () =>
        this.#answer(event.kind, event.deviceId, -constants.errno.EINVAL),
      );
      return;
    }
    const { kind, minor, deviceId: id, size, writeCache, config } = event;
    const device = netlinkDevice({ ...name, minor }, this.#host);
    const key = keyOf(device);
    const known = this.#known.get(key);
    const answer = (status: number): void => this.#answer(kind, id, status);
    if (kind === 'added') {
      const same = known !== undefined && sameDevice(known, { device, id });
      const added = same ? known.added : undefined;
      if (added === undefined) {
        this.#added(device, id, answer);
      } else {
        // Found in sysfs before its event came: the same one.
        this.#enqueue(key, async () => {
          const status = await added;
          if (known?.told !== true) answer(status);
        });
      }
      return;
    }
    if (kind === 'removed') {
      this.#known.delete(key);
    } else {
      const now = { ...device, config: config ?? name.config };
      if (known === undefined) this.#known.set(key, { device: now, id, told: false });
      else known.device = now;
    }
    const change = {
      ...(size === undefined ? {} : { size }),
      ...(writeCache === undefined ? {} : { writeCache }),
      ...(config === undefined ? {} : { config }),
    };
    void this.#handle(kind, device, change, answer);
  }

  /** Calls `added` and keeps its answer; a device that it refuses is none where the kernel waits for it. */
  #added(device: NetlinkDevice, id: number | undefined, answer?: Answer): Known {
    const key = keyOf(device);
    const known: Known = { device, id, told: false };
    this.#known.set(key, known);
    known.added = this.#handle('added', device, {}, async (status) => {
      if (answer !== undefined && this.#replies && status !== 0 && this.#known.get(key) === known) {
        this.#known.delete(key);
      }
      await answer?.(status);
    });
    return known;
  }

  /**
   * Runs the handler behind what is under way for the same device, then `answer` with 0 or -errno; the
   * deadline counts from now. Never rejects.
   */
  #handle(
    kind: TcmuEvent['kind'],
    device: NetlinkDevice,
    change: Reconfiguration,
    answer?: Answer,
  ): Promise<number> {
    const abort = new AbortController();
    const what = `handle netlink event "${kind}" of`;
    const path = `user_${device.hba}/${device.name}`;
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<number>((resolve) => {
      timer = setTimeout(() => {
        const advice = `its handler has not settled within ${this.#deadline} ms`;
        const error = targetError('STUCK', what, path, advice);
        abort.abort(error);
        this.#report(error);
        resolve(-constants.errno.ETIMEDOUT);
      }, this.#deadline);
    });
    const run = async (): Promise<number> => {
      try {
        if (kind === 'reconfigured') {
          await this.#handlers.reconfigured?.(device, change, abort.signal);
        } else {
          await this.#handlers[kind]?.(device, abort.signal);
        }
        return 0;
      } catch (error) {
        if (!abort.signal.aborted) {
          this.#report(targetError('NETLINK', what, path, 'its handler failed', error));
        }
        const known = constants.errno as Record<string, number | undefined>;
        return -(known[errnoOf(error) ?? 'EIO'] ?? constants.errno.EIO);
      }
    };
    return new Promise((resolve) => {
      this.#enqueue(keyOf(device), async () => {
        const status = await Promise.race([run(), late]);
        clearTimeout(timer);
        resolve(status);
        await answer?.(status);
      });
    });
  }

  /** Runs tasks of one device one after the other. */
  #enqueue(key: string, task: () => Promise<void>): void {
    const end = (this.#queues.get(key) ?? Promise.resolve())
      .then(task)
      .catch((error: unknown) =>
        this.#report(targetError('NETLINK', 'answer by', CHANNEL, ANSWER_ADVICE, error)),
      )
      .then(() => {
        if (this.#queues.get(key) === end) this.#queues.delete(key);
      });
    this.#queues.set(key, end);
  }

  #answer(kind: TcmuEvent['kind'], id: number, status: number): void {
    if (this.#replies) this.#channel.send(encodeDone(kind, id, status));
  }

  /** The kernel dropped events: find out what changed. Once more if it happens again meanwhile. */
  #dropped(): void {
    if (this.#resync !== undefined) {
      this.#resyncAgain = true;
      return;
    }
    this.#resync = (async () => {
      do {
        this.#resyncAgain = false;
        try {
          if (this.#replies) await this.#rescue();
          await this.#compare();
        } catch (error) {
          const advice = 'call rescueNetlink() if an operation is stuck';
          this.#report(targetError('NETLINK', 'catch up with', CHANNEL, advice, error));
        }
      } while (this.#resyncAgain);
      this.#resync = undefined;
    })();
  }

  /**
   * Ends all waits in the kernel whose events are lost to us, so that none lasts for ever: an `enable` can
   * be found and gets its answer, anything else fails with EINTR. It happens while new waits are blocked,
   * and after everything that did reach us has been answered: an answer that comes after the reset could
   * meet a wait of another kind.
   */
  async #rescue(): Promise<void> {
    await rescueNetlink(this.#host, async () => {
      await this.#channel.settle();
      for (const { device, id, enabled } of await this.#list()) {
        if (enabled || id === undefined || this.#known.get(keyOf(device))?.id === id) continue;
        // It has its uio device and is not enabled yet: its `enable` waits.
        const known = this.#added(device, id, async (status) => {
          try {
            await this.#channel.command('answer by', encodeDone('added', id, status));
            known.told = true;
          } catch (error) {
            // Not yet, after all: its event is still to come, and is answered then.
            if (errnoOf(error) !== 'ENODEV') throw error;
          }
        });
      }
      await Promise.all(this.#queues.values());
    });
  }

  /** Brings the handlers up to what sysfs and configfs say. */
  async #compare(): Promise<void> {
    const present = new Map((await this.#list()).map((found) => [keyOf(found.device), found]));
    for (const [key, known] of this.#known) {
      const now = present.get(key);
      if (now !== undefined && sameDevice(now, known)) continue;
      this.#known.delete(key);
      void this.#handle('removed', known.device, {});
    }
    for (const [key, { device, id }] of present) {
      const known = this.#known.get(key);
      if (known === undefined) {
        this.#added(device, id);
      } else {
        known.device = device;
        void this.#handle('reconfigured', device, await this.#current(device));
      }
    }
  }

  async #list(): Promise<
    Array<{ device: NetlinkDevice; id: number | undefined; enabled: boolean }>
  > {
    return Promise.all(
      (await listUio(this.#host)).map(async (found) => {
        const folder = this.#host.target('core', `user_${found.hba}`, found.name);
        const [id, enabled] = await Promise.all([
          this.#host.readOptional(`${folder}/statistics/scsi_dev/indx`),
          this.#host.readOptional(`${folder}/enable`),
        ]);
        return {
          device: netlinkDevice(found, this.#host),
          id: id === undefined ? undefined : Number(id),
          enabled: enabled !== '0',
        };
      }),
    );
  }

  async #current(device: NetlinkDevice): Promise<Reconfiguration> {
    const attributes = this.#host.target('core', `user_${device.hba}`, device.name, 'attrib');
    const [size, cache] = await Promise.all([
      this.#host.readOptional(`${attributes}/dev_size`),
      this.#host.readOptional(`${attributes}/emulate_write_cache`),
    ]);
    return {
      config: device.config,
      ...(size === undefined ? {} : { size: Number(size) }),
      ...(cache === undefined ? {} : { writeCache: cache !== '0' }),
    };
  }

  #report(error: TargetError): void {
    try {
      this.#handlers.error?.(error);
    } catch {
      // Whoever fails while told of a failure must not stop the other devices.
    }
  }
}

/** Gone and made anew under the same name is another device. */
function sameDevice(
  a: { device: NetlinkDevice; id: number | undefined },
  b: { device: NetlinkDevice; id: number | undefined },
): boolean {
  // The number can't be read everywhere.
  const idsMatch = a.id === undefined || b.id === undefined || a.id === b.id;
  return idsMatch && a.device.minor === b.device.minor;
}

function keyOf(device: UioName): string {
  return `${device.hba}/${device.name}`;
}

function netlinkDevice(device: UioName & { minor: number }, host: TargetHost): NetlinkDevice {
  const { hba, name, config, minor } = device;
  return { hba, name, config, minor, uioPath: `${host.dev}/uio${minor}` };
}
