// SPDX-License-Identifier: Apache-2.0
/**
 * HTTP exchanges with one server: a bounded pool of kept-alive connections, buffers in, one buffer out.
 *
 * Contract: an exchange settles within its time-out, and at once when its signal is aborted or the transport closed. One that fails
 * tells whether the request may have reached the server. The body of an answer is copied once, from the socket's buffer into
 * the one given, or one of the answer's own size.
 */
import { type Dispatcher, Pool, ProxyAgent } from 'undici';

export interface TransportOptions {
  readonly origin: string;
  /** Proxy to go through; undefined: none. */
  readonly proxy: string | undefined;
  /** Certificates of authorities to trust instead of the usual ones, PEM. */
  readonly ca: string | undefined;
  readonly connections: number;
  readonly connectTimeoutMs: number;
}

export interface Exchange {
  readonly method: Dispatcher.HttpMethod;
  /** With the query. */
  readonly path: string;
  readonly headers: Readonly<Record<string, string>>;
  /** Written one after the other. */
  readonly body: readonly Uint8Array[];
  readonly timeoutMs: number;
  readonly signal: AbortSignal | undefined;
  /** Where the answer's body is put if it is long enough. Not touched once the exchange has settled. */
  readonly into?: Buffer | undefined;
  /** As an answer's body comes: its first `bytes` bytes are there. Must not throw. */
  readonly onProgress?: ((reply: Reply, bytes: number) => void) | undefined;
}

export interface Reply {
  readonly status: number;
  /** By lower-case name. */
  readonly headers: Readonly<Record<string, string>>;
  readonly body: Buffer;
}

export class TransportError extends Error {
  readonly reason: 'connect' | 'timeout' | 'cut' | 'aborted';
  /** The request, or a part of it, may have reached the server. */
  readonly sent: boolean;

  constructor(reason: TransportError['reason'], sent: boolean, message: string, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause });
    this.reason = reason;
    this.sent = sent;
  }
}

/** Smaller pieces are joined: a write to a socket costs more than copying so much. */
const joinBelow = 64 * 1024;
/** No object of ours, and no page of a listing, comes near: a server that says so is not believed. */
const largestBody = 256 * 1024 * 1024;

export class Transport {
  readonly #origin: string;
  readonly #dispatcher: Dispatcher;

  constructor(options: TransportOptions) {
    this.#origin = options.origin;
    const tls = options.ca === undefined ? {} : { ca: options.ca };
    const pool = {
      connections: options.connections,
      pipelining: 1,
      // Exchanges have a time-out of their own.
      headersTimeout: 0,
      bodyTimeout: 0,
      keepAliveTimeout: 10_000,
    };
    this.#dispatcher =
      options.proxy === undefined
        ? new Pool(options.origin, {
            ...pool,
            connect: { timeout: options.connectTimeoutMs, ...tls },
          })
        : new ProxyAgent({
            ...pool,
            uri: options.proxy,
            connectTimeout: options.connectTimeoutMs,
            requestTls: tls,
          });
  }

  exchange(exchange: Exchange): Promise<Reply> {
    return new Promise((resolve, reject) => {
      new Call(exchange, resolve, reject).start(this.#dispatcher, this.#origin);
    });
  }

  /** Calls under way end with `aborted`. */
  async close(): Promise<void> {
    await this.#dispatcher.destroy(new TransportError('aborted', true, 'the client was closed'));
  }
}

/** One exchange: whatever ends it first settles it, and nothing after. */
class Call implements Dispatcher.DispatchHandlers {
  readonly #exchange: Exchange;
  readonly #resolve: (reply: Reply) => void;
  readonly #reject: (error: Error) => void;
  #timer: NodeJS.Timeout | undefined;
  #abort: ((error: Error) => void) | undefined;
  #sent = false;
  #failure: TransportError | undefined;
  #status = 0;
  #headers: Record<string, string> = {};
  /** The answer when its body's length is known; else there are pieces. */
  #reply: Reply | undefined;
  #pieces: Buffer[] = [];
  #received = 0;

  constructor(exchange: Exchange, resolve: (reply: Reply) => void, reject: (error: Error) => void) {
    this.#exchange = exchange;
    this.#resolve = resolve;
    this.#reject = reject;
  }

  start(dispatcher: Dispatcher, origin: string): void {
    const { method, path, headers, body, timeoutMs, signal } = this.#exchange;
    if (signal?.aborted) return this.#fail(aborted(signal, false));
    signal?.addEventListener('abort', this.#onAbort);
    this.#timer = setTimeout(this.#onTimeout, timeoutMs);
    const length = body.reduce((sum, part) => sum + part.length, 0);
    const [first] = body;
    try {
      dispatcher.dispatch(
        {
          origin,
          method,
          path,
          headers: first === undefined ? headers : { ...headers, 'content-length': String(length) },
          body: first === undefined ? null : length < joinBelow ? joined(body) : joinSmall(body),
        } as Dispatcher.DispatchOptions,
        this,
      );
    } catch (error) {
      this.onError(error as Error);
    }
  }

  readonly #onAbort = () => {
    this.#fail(aborted(this.#exchange.signal, this.#sent));
  };

  readonly #onTimeout = () => {
    const { timeoutMs } = this.#exchange;
    this.#fail(new TransportError('timeout', this.#sent, `no answer within ${timeoutMs / 1000} s`));
  };

  onConnect(abort: (error?: Error) => void): void {
    this.#abort = abort;
    // It ended while it waited for a connection.
    if (this.#failure !== undefined) abort(this.#failure);
    else this.#sent = true;
  }

  onHeaders(status: number, raw: Buffer[]): boolean {
    // 100 Continue and the like come before the answer.
    if (status < 200) return true;
    this.#status = status;
    for (let at = 0; at + 1 < raw.length; at += 2) {
      this.#headers[String(raw[at]).toLowerCase()] = String(raw[at + 1]);
    }
    const length = this.#headers['content-length'];
    if (length !== undefined && this.#exchange.method !== 'HEAD') {
      if (Number(length) > largestBody) {
        this.#fail(new TransportError('cut', true, `an answer of ${length} bytes is not taken`));
        return false;
      }
      const { into } = this.#exchange;
      const body =
        into !== undefined && into.length >= Number(length)
          ? into.subarray(0, Number(length))
          : Buffer.allocUnsafeSlow(Number(length));
      this.#reply = { status, headers: this.#headers, body };
    }
    return true;
  }

  onData(chunk: Buffer): boolean {
    if (this.#failure !== undefined) return false;
    const reply = this.#reply;
    if (reply !== undefined) chunk.copy(reply.body, this.#received);
    else this.#pieces.push(Buffer.from(chunk));
    this.#received += chunk.length;
    if (reply !== undefined && this.#received <= reply.body.length) {
      this.#exchange.onProgress?.(reply, this.#received);
    }
    if (this.#received > largestBody) {
      this.#fail(new TransportError('cut', true, 'an answer without a length does not end'));
      return false;
    }
    return true;
  }

  onComplete(): void {
    if (this.#failure !== undefined) return;
    const reply = this.#reply ?? {
      status: this.#status,
      headers: this.#headers,
      body: Buffer.concat(this.#pieces),
    };
    if (this.#received !== reply.body.length) {
      return this.#fail(
        new TransportError('cut', true, `${this.#received} of ${reply.body.length} bytes came`),
      );
    }
    this.#release();
    this.#resolve(reply);
  }

  onError(error: Error): void {
    if (error instanceof TransportError) return this.#fail(error);
    this.#fail(
      new TransportError(this.#sent ? 'cut' : 'connect', this.#sent, describe(error), error),
    );
  }

  #fail(failure: TransportError): void {
    if (this.#failure !== undefined) return;
    this.#failure = failure;
    this.#release();
    this.#abort?.(failure);
    this.#reject(failure);
  }

  #release(): void {
    clearTimeout(this.#timer);
    this.#exchange.signal?.removeEventListener('abort', this.#onAbort);
  }
}

function aborted(signal: AbortSignal | undefined, sent: boolean): TransportError {
  return new TransportError('aborted', sent, 'the request was aborted', signal?.reason);
}

/** A failed connection to several addresses says nothing by itself. */
function describe(error: Error & { code?: string; errors?: readonly Error[] }): string {
  if (error.message !== '') return error.message;
  return error.errors?.map(({ message }) => message).join('; ') || (error.code ?? error.name);
}

function joined(parts: readonly Uint8Array[]): Uint8Array {
  const [first = new Uint8Array()] = parts;
  return parts.length === 1 ? first : Buffer.concat(parts);
}

/** The same bytes in pieces worth a write each; large ones are not copied. */
function joinSmall(parts: readonly Uint8Array[]): Uint8Array | Iterable<Uint8Array> {
  if (parts.length === 1) return joined(parts);
  const pieces: Uint8Array[] = [];
  let small: Uint8Array[] = [];
  let bytes = 0;
  const flush = () => {
    if (bytes > 0) pieces.push(joined(small));
    small = [];
    bytes = 0;
  };
  for (const part of parts) {
    if (part.length >= joinBelow) {
      flush();
      pieces.push(part);
    } else {
      small.push(part);
      bytes += part.length;
      if (bytes >= joinBelow) flush();
    }
  }
  flush();
  return pieces;
}
