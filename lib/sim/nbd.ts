// SPDX-License-Identifier: Apache-2.0
/**
 * An NBD server in front of a simulated device: what connects are the clients that exist (qemu-img,
 * nbdcopy, fio, the kernel's nbd-client, …), what answers is the handler, through SCSI and the ring.
 *
 * Requests go from the socket to the ring and back in the addon, on the simulated kernel's thread.
 * This module decides what the export offers, ends TLS (node:tls), and owns the socket file.
 */
import { lstatSync, type Stats, unlinkSync } from 'node:fs';
import { isIP, Socket } from 'node:net';
import { pipeline } from 'node:stream';
import { createSecureContext, TLSSocket, type TlsOptions } from 'node:tls';
import { ArgumentError, DeviceError, errnoOf } from '../errors.js';
import { NativeNbdServer } from '../native-sim.js';
import type { BlockStore } from '../store/block-store.js';
import { describeDisk } from './nbd-disk.js';
import { SimulatedDevice } from './simulated-device.js';
import { SimulatedDisk, type SimulateOptions, simulate } from './simulated-disk.js';

/** node:tls's options of a server: `key` and `cert`, or `pskCallback`; `ca` and `requestCert` for clients. */
export interface NbdTlsOptions extends TlsOptions {
  /** False lets clients without TLS in too. Default true. */
  required?: boolean;
}

/** Where and how an NBD server listens, for `serveNbd`. */
export interface ServeNbdOptions {
  /** Unix socket. One that nobody listens on any more is replaced; it is removed at the end. */
  path?: string;
  /** TCP port, 0 for any free one. */
  port?: number;
  /** Numeric address for `port`. Default 127.0.0.1; others than loopback only with TLS required. */
  host?: string;
  /** Name of the export; the empty name always means it too. Default empty. */
  exportName?: string;
  /** For people, shown by `nbdinfo --list`. */
  description?: string;
  /** Clients at a time; more are turned away. Default 64. */
  maxConnections?: number;
  /** Encryption by NBD's STARTTLS. Default none. */
  tls?: NbdTlsOptions;
  /** What went wrong with a client's TLS. Default: nobody is told. */
  onClientError?: (error: Error) => void;
  /** When a BlockStore is served: how its kernel is simulated. */
  simulate?: SimulateOptions;
}

const EVENT_DESCRIBE = 0;
const EVENT_START_TLS = 1;
const DEFAULT_DEADLINE = 10_000;
/** OpenSSL has PSK of TLS 1.3 for sessions only, so it is TLS 1.2's; forward secrecy first. */
const PSK_CIPHERS = 'kECDHEPSK:kDHEPSK:kPSK:!aNULL:!eNULL';

/** A listening NBD server over a simulated device. Made by `serveNbd`. */
export class NbdServer {
  /** What clients connect to: `nbd+unix:///?socket=…`, `nbd://127.0.0.1:…`, with TLS `nbds…`. */
  readonly uri: string;
  /** The Unix socket, when it is one. */
  readonly path: string | undefined;
  /** The TCP port, when it is one. */
  readonly port: number | undefined;
  /** Settles when the last client is gone, by `close` or the end of the simulated kernel. */
  readonly closed: Promise<void>;
  readonly #native: NativeNbdServer;
  readonly #kernel: SimulatedDevice;
  readonly #options: ServeNbdOptions;
  readonly #ownDisk: SimulatedDisk | undefined;
  readonly #socketFile: Stats | undefined;
  #onClosed!: () => void;
  #closing: Promise<void> | undefined;

  /** @internal */
  constructor(
    kernel: SimulatedDevice,
    options: ServeNbdOptions,
    ownDisk: SimulatedDisk | undefined,
  ) {
    const { path, port, host = '127.0.0.1', exportName = '', tls } = options;
    this.#kernel = kernel;
    this.#options = options;
    this.#ownDisk = ownDisk;
    this.closed = new Promise((resolve) => {
      this.#onClosed = resolve;
    });
    try {
      this.#native = new NativeNbdServer(kernel.native, {
        ...(path === undefined ? { host, port: port ?? 0 } : { path }),
        name: exportName,
        description: options.description ?? '',
        tls: tls === undefined ? 0 : tls.required === false ? 1 : 2,
        maxConnections: options.maxConnections ?? 64,
        event: (kind, connection, socket, plain) => this.#event(kind, connection, socket, plain),
      });
    } catch (error) {
      const where = path ?? `${host} port ${port}`;
      throw new DeviceError(
        'ERR_TCMU_NBD_LISTEN',
        `tcmu: serve ${kernel.name} over NBD at ${where}: ${errnoOf(error) ?? 'failed'}${hintFor(errnoOf(error))}`,
        { operation: 'listen', path: where, cause: error },
      );
    }
    this.path = path;
    this.port = this.#native.port;
    this.#socketFile = path === undefined ? undefined : lstatSync(path);
    const scheme = tls === undefined ? 'nbd' : 'nbds';
    const name = encodeURIComponent(exportName);
    this.uri =
      path === undefined
        ? `${scheme}://${isIP(host) === 6 ? `[${host}]` : host}:${this.port}/${name}`
        : `${scheme}+unix:///${name}?socket=${encodeURIComponent(path)}`;
  }

  /** Clients connected now, and since the start; SCSI commands sent for them. */
  counts(): {
    /** Clients connected now. */
    connections: number;
    /** Clients that connected so far. */
    accepted: number;
    /** SCSI commands sent for them so far. */
    commands: number;
  } {
    return this.#native.counts();
  }

  /**
   * Stops listening, lets the requests under way finish, closes every connection; those that are left
   * after `deadline` milliseconds (default 10,000) at once. A store that was given to `serveNbd` is
   * closed with it. Idempotent.
   */
  close(options: { deadline?: number } = {}): Promise<void> {
    this.#closing ??= this.#close(options.deadline ?? DEFAULT_DEADLINE);
    return this.#closing;
  }

  async #close(deadline: number): Promise<void> {
    this.#native.close(deadline <= 0);
    const timer = setTimeout(() => this.#native.close(true), deadline);
    await this.closed;
    clearTimeout(timer);
    await this.#ownDisk?.close();
  }

  /** As `close`, for `await using`; rejects as that does. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #event(kind: number, connection: number, socket: number, plain: number): void {
    if (kind === EVENT_DESCRIBE) void this.#describe(connection);
    else if (kind === EVENT_START_TLS) this.#startTls(socket, plain);
    else this.#ended();
  }

  async #describe(connection: number): Promise<void> {
    const disk = await describeDisk(this.#kernel).catch(() => undefined);
    this.#native.described(connection, disk);
  }

  /** Ends TLS between the client's socket and the server's, which sees plain text. */
  #startTls(socketFd: number, plainFd: number): void {
    const { tls = {}, onClientError } = this.#options;
    const socket = new Socket({ fd: socketFd, readable: true, writable: true });
    const plain = new Socket({ fd: plainFd, readable: true, writable: true });
    socket.setNoDelay(true);
    const secure = new TLSSocket(socket, { ...tls, isServer: true });
    const failed = (error: Error | null | undefined): void => {
      secure.destroy();
      socket.destroy();
      plain.destroy();
      if (error) onClientError?.(error);
    };
    socket.on('error', failed);
    pipeline(secure, plain, secure, failed);
  }

  #ended(): void {
    if (this.path !== undefined) removeSocket(this.path, this.#socketFile as Stats);
    this.#onClosed();
  }
}

/**
 * Serves a simulated device, a simulated disk, or a store of its own over NBD.
 * @throws ArgumentError, DeviceError `ERR_TCMU_NBD_LISTEN`
 */
export async function serveNbd(
  target: SimulatedDevice | SimulatedDisk | BlockStore,
  options: ServeNbdOptions,
): Promise<NbdServer> {
  const checked = check(options);
  if (target instanceof SimulatedDevice) return new NbdServer(target, checked, undefined);
  if (target instanceof SimulatedDisk) return new NbdServer(target.kernel, checked, undefined);
  const disk = await simulate(target, options.simulate);
  try {
    return new NbdServer(disk.kernel, checked, disk);
  } catch (error) {
    await disk.close();
    throw error;
  }
}

function check(options: ServeNbdOptions): ServeNbdOptions {
  const { path, port, host = '127.0.0.1', tls, exportName = '', maxConnections = 64 } = options;
  const refuse = (why: string): never => {
    throw new ArgumentError(`tcmu: serve over NBD: ${why}`);
  };
  if ((path === undefined) === (port === undefined)) refuse('give either path or port');
  if (path !== undefined && Buffer.byteLength(path) > 107) {
    refuse(`${path}: a Unix socket's path has at most 107 bytes`);
  }
  if (port !== undefined && !(Number.isInteger(port) && port >= 0 && port <= 65535)) {
    refuse(`port ${port}`);
  }
  if (isIP(host) === 0) refuse(`host ${host}: give a numeric address`);
  const loopback = host === '::1' || host.startsWith('127.');
  if (!loopback && (tls === undefined || tls.required === false)) {
    refuse(`host ${host} can be reached by other machines: require TLS, or use 127.0.0.1`);
  }
  if (Buffer.byteLength(exportName) > 4096) refuse('the export name has more than 4096 bytes');
  if (!(Number.isInteger(maxConnections) && maxConnections >= 1)) {
    refuse(`maxConnections ${maxConnections}: at least one client must be let in`);
  }
  if (tls === undefined) return options;
  return { ...options, tls: checkTls(tls, refuse) };
}

/** What is wrong with keys is wrong now, not at the first client. */
function checkTls(tls: NbdTlsOptions, refuse: (why: string) => never): NbdTlsOptions {
  if (tls.pskCallback === undefined && tls.secureContext === undefined && !tls.cert && !tls.pfx) {
    refuse('TLS needs key and cert, or pskCallback');
  }
  const prepared: NbdTlsOptions =
    tls.pskCallback === undefined
      ? { rejectUnauthorized: true, ...tls }
      : { ciphers: PSK_CIPHERS, maxVersion: 'TLSv1.2', dhparam: 'auto', ...tls };
  try {
    return { ...prepared, secureContext: tls.secureContext ?? createSecureContext(prepared) };
  } catch (error) {
    throw new ArgumentError(`tcmu: serve over NBD: TLS: ${(error as Error).message}`, {
      cause: error,
    });
  }
}

function hintFor(errno: string | undefined): string {
  if (errno === 'EADDRINUSE') return ': somebody listens there already; choose another place';
  if (errno === 'EACCES') return ': no permission; choose a directory or port of your own';
  if (errno === 'ENOENT') return ': its directory does not exist';
  return ': see the cause';
}

/** Unless somebody else's socket stands there by now. */
function removeSocket(path: string, ours: Stats): void {
  try {
    const found = lstatSync(path);
    if (found.ino === ours.ino && found.dev === ours.dev) unlinkSync(path);
  } catch {
    // gone already
  }
}
