// SPDX-License-Identifier: Apache-2.0
/**
 * How the credentials' chain reaches services that give out credentials (STS, SSO): over our own transport, so that
 * proxies and certificate authorities hold for them too. Metadata services of host and container are asked by the chain itself, directly.
 */
import { Readable } from 'node:stream';
import type { RequestHandler, SdkRequest, SdkResponse } from './credentials.js';
import { Transport, type TransportOptions } from './transport.js';

const timeoutMs = 10_000;

export function sdkRequestHandler(
  connection: Omit<TransportOptions, 'origin' | 'proxy'>,
  proxy: (origin: string) => string | undefined,
): RequestHandler {
  return {
    async handle(request: SdkRequest): Promise<{ response: SdkResponse }> {
      const port = request.port === undefined ? '' : `:${request.port}`;
      const origin = `${request.protocol}//${request.hostname}${port}`;
      // Such requests are rare: a connection is not worth keeping for the next.
      const transport = new Transport({ ...connection, origin, proxy: proxy(origin) });
      try {
        const reply = await transport.exchange({
          method: request.method as 'GET' | 'POST',
          path: request.path + queryString(request.query),
          headers: request.headers,
          body: bodyOf(request.body),
          timeoutMs,
          signal: undefined,
        });
        const { status: statusCode, headers, body } = reply;
        return { response: { statusCode, headers: { ...headers }, body: Readable.from([body]) } };
      } finally {
        await transport.close();
      }
    },
  };
}

function queryString(query: SdkRequest['query']): string {
  const search = new URLSearchParams();
  for (const [name, value] of Object.entries(query ?? {})) {
    for (const one of Array.isArray(value) ? value : [value]) search.append(name, one ?? '');
  }
  return search.size === 0 ? '' : `?${search}`;
}

function bodyOf(body: unknown): Uint8Array[] {
  if (typeof body === 'string') return [Buffer.from(body)];
  return body instanceof Uint8Array ? [body] : [];
}
