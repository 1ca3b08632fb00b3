// SPDX-License-Identifier: Apache-2.0
/**
 * A proxy between a client and an S3 server that misbehaves on demand, the way networks and servers do.
 *
 * Contract: requests are taken whole, then passed on unchanged (the Host header too: it is part of the signature) unless `plan` names a
 * fault for them. Each fault says whether the server carried the request out; that is what makes an answer ambiguous. Counts every
 * request it was sent. Faults that are still waiting are dropped by `stop`.
 */
import {
  Agent,
  createServer,
  request as httpRequest,
  type IncomingHttpHeaders,
  type IncomingMessage,
  type Server,
  type ServerResponse,
} from 'node:http';
import type { AddressInfo } from 'node:net';

export interface ProxiedRequest {
  readonly method: string;
  /** Bucket and key, still encoded, without the query. */
  readonly path: string;
  readonly query: string;
  readonly headers: IncomingHttpHeaders;
  readonly bytes: number;
  /** Counts from 0. */
  readonly index: number;
}

export type Fault =
  /** Answered after a while. */
  | { kind: 'delay'; ms: number }
  /** The connection is cut without an answer; `after` the server carried it out, or `before`. */
  | { kind: 'cut'; when: 'before' | 'after' }
  /** No answer for ever; carried out or not. */
  | { kind: 'hang'; when: 'before' | 'after' }
  /** An error instead of the answer; carried out or not. */
  | { kind: 'status'; status: number; code: string; when: 'before' | 'after'; retryAfter?: number }
  /** The answer's body ends early, with the length promised in full. */
  | { kind: 'truncate'; bytes: number }
  /** One bit of the answer's body is wrong. */
  | { kind: 'corrupt'; offset: number }
  /** Carried out twice, as a retry of the network's own; the second answer is passed on. */
  | { kind: 'duplicate' }
  /** The connection is cut, and the request carried out a while later: a packet that was held up. */
  | { kind: 'late'; ms: number };

export type FaultPlan = (request: ProxiedRequest) => Fault | undefined;

interface Answer {
  status: number;
  headers: IncomingHttpHeaders;
  body: Buffer;
}

export class FaultProxy {
  /** Asked for every request. Default: no faults. */
  plan: FaultPlan = () => undefined;
  /** While true, connections are cut as soon as they come: the server is down. */
  down = false;
  /** Requests that have come, by method; `LIST` and `DELETE-MANY` by their own names. */
  readonly requests = new Map<string, number>();
  /** Faults done, by kind. */
  readonly faults = new Map<string, number>();
  readonly #upstream: URL;
  readonly #agent = new Agent({ keepAlive: true });
  readonly #server: Server;
  readonly #timers = new Set<NodeJS.Timeout>();
  #index = 0;

  /** @param upstream the server's endpoint */
  constructor(upstream: string) {
    this.#upstream = new URL(upstream);
    this.#server = createServer((request, response) => {
      // A client that goes away, or a server that does, ends this one exchange.
      this.#serve(request, response).catch(() => response.destroy());
    });
    this.#server.keepAliveTimeout = 60_000;
    this.#server.on('connection', (socket) => {
      if (this.down) socket.destroy();
    });
  }

  get endpoint(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  start(): Promise<this> {
    return new Promise((resolve, reject) => {
      this.#server.once('error', reject);
      this.#server.listen(0, '127.0.0.1', () => resolve(this));
    });
  }

  stop(): Promise<void> {
    for (const timer of this.#timers) clearTimeout(timer);
    this.#server.closeAllConnections();
    this.#agent.destroy();
    return new Promise((resolve) => this.#server.close(() => resolve()));
  }

  /** The server goes away: connections are cut now, and refused until `restore`. */
  outage(): void {
    this.down = true;
    this.#server.closeAllConnections();
  }

  restore(): void {
    this.down = false;
  }

  /** Requests so far. */
  get total(): number {
    return [...this.requests.values()].reduce((sum, count) => sum + count, 0);
  }

  async #serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const chunks: Buffer[] = [];
    for await (const chunk of request) chunks.push(chunk as Buffer);
    const body = Buffer.concat(chunks);
    const [path = '', query = ''] = (request.url ?? '').split('?');
    const { method = '', headers } = request;
    count(this.requests, operation(method, query));
    const fault = this.plan({
      method,
      path,
      query,
      headers,
      bytes: body.length,
      index: this.#index++,
    });
    if (fault !== undefined) count(this.faults, fault.kind);
    const forward = () => this.#forward(request, body);

    switch (fault?.kind) {
      case undefined:
        return pass(response, await forward());
      case 'delay':
        await this.#wait(fault.ms);
        return pass(response, await forward());
      case 'cut':
        if (fault.when === 'after') await forward();
        response.destroy();
        return;
      case 'hang':
        if (fault.when === 'after') await forward();
        return;
      case 'status':
        if (fault.when === 'after') await forward();
        return pass(response, refusal(fault));
      case 'truncate': {
        const answer = await forward();
        response.writeHead(answer.status, replyHeaders(answer));
        response.write(answer.body.subarray(0, fault.bytes), () => response.destroy());
        return;
      }
      case 'corrupt': {
        const answer = await forward();
        if (answer.body.length > 0) {
          const at = fault.offset % answer.body.length;
          answer.body.writeUInt8(answer.body.readUInt8(at) ^ 1, at);
        }
        return pass(response, answer);
      }
      case 'duplicate':
        await forward();
        return pass(response, await forward());
      case 'late':
        response.destroy();
        await this.#wait(fault.ms);
        await forward();
        return;
    }
  }

  #wait(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const timer = setTimeout(() => {
        this.#timers.delete(timer);
        resolve();
      }, ms);
      this.#timers.add(timer);
    });
  }

  #forward({ method, url, headers }: IncomingMessage, body: Buffer): Promise<Answer> {
    return new Promise((resolve, reject) => {
      const upstream = httpRequest(
        {
          host: this.#upstream.hostname,
          port: this.#upstream.port,
          agent: this.#agent,
          method,
          path: url,
          headers: { ...headers, connection: 'keep-alive' },
        },
        (answer) => {
          const chunks: Buffer[] = [];
          answer.on('data', (chunk: Buffer) => chunks.push(chunk));
          answer.on('end', () => {
            const { statusCode: status = 502, headers: answered } = answer;
            resolve({ status, headers: answered, body: Buffer.concat(chunks) });
          });
          answer.on('error', reject);
        },
      );
      upstream.on('error', reject);
      upstream.end(body);
    });
  }
}

function operation(method: string, query: string): string {
  if (method === 'GET' && query.includes('list-type=')) return 'LIST';
  if (method === 'POST' && /(^|&)delete/.test(query)) return 'DELETE-MANY';
  return method;
}

function count(counters: Map<string, number>, name: string): void {
  counters.set(name, (counters.get(name) ?? 0) + 1);
}

function pass(response: ServerResponse, answer: Answer): void {
  response.writeHead(answer.status, replyHeaders(answer));
  response.end(answer.body);
}

/** What belongs to the connection is the proxy's own. */
function replyHeaders({ headers }: Answer): IncomingHttpHeaders {
  const { connection: _connection, 'keep-alive': _keepAlive, ...rest } = headers;
  return rest;
}

function refusal(fault: { status: number; code: string; retryAfter?: number }): Answer {
  const body = Buffer.from(
    `<?xml version="1.0" encoding="UTF-8"?><Error><Code>${fault.code}</Code><Message>injected</Message></Error>`,
  );
  const headers: IncomingHttpHeaders = {
    'content-type': 'application/xml',
    'content-length': String(body.length),
  };
  if (fault.retryAfter !== undefined) headers['retry-after'] = String(fault.retryAfter);
  return { status: fault.status, headers, body };
}
