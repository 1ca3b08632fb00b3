/** The servers that tests run against, behind one shape: each test has a bucket of its own in one of them. */
import { inject } from 'vitest';
import { type ConnectOptions, connect } from '../../src/client/index.js';
import type { ObjectStore } from '../../src/object-store.js';
import { MemoryServer } from './memory-server.js';

export interface TestServer {
  readonly endpoint: string;
  readonly accessKeyId: string;
  readonly secretAccessKey: string;
  readonly region: string;
  /** Ends it, where it was started for this file alone. */
  stop(): Promise<void>;
}

export const serverKinds = ['memory', 'radosgw'] as const;
export type ServerKind = (typeof serverKinds)[number];

/** Whether the server can run on this machine. */
export function available(kind: ServerKind): boolean {
  return kind === 'memory' || inject('radosgw') !== undefined;
}

export async function startServer(kind: ServerKind): Promise<TestServer> {
  if (kind === 'memory') {
    const memory = await new MemoryServer().start();
    const { endpoint, accessKeyId, secretAccessKey, region } = memory;
    return { endpoint, accessKeyId, secretAccessKey, region, stop: () => memory.stop() };
  }
  const running = inject('radosgw');
  if (running === undefined) throw new Error('radosgw does not run on this machine');
  return { ...running, stop: () => Promise.resolve() };
}

/** Options that reach a server, with nothing taken from this process's environment. */
export function reaching(
  server: Omit<TestServer, 'stop'>,
  options: ConnectOptions = {},
): ConnectOptions {
  const { endpoint, accessKeyId, secretAccessKey, region } = server;
  return { endpoint, accessKeyId, secretAccessKey, region, env: {}, ...options };
}

let buckets = 0;

/** A bucket that no other test has. */
export async function newBucket(server: Omit<TestServer, 'stop'>): Promise<string> {
  const bucket = `test-${process.pid}-${buckets++}`;
  await bucketRequest(server, bucket, 'PUT');
  return bucket;
}

/** A store over a bucket of a server, perhaps by way of a proxy's endpoint. */
export async function openBucket(
  server: Omit<TestServer, 'stop'>,
  bucket: string,
  options: ConnectOptions = {},
): Promise<ObjectStore> {
  const { store } = await connect(`s3://${bucket}/disk`, reaching(server, options));
  return store;
}

/** Makes or removes a bucket, or changes its settings: what the example itself never does. */
export async function bucketRequest(
  server: Omit<TestServer, 'stop'>,
  bucket: string,
  method: 'PUT' | 'DELETE',
  query: Readonly<Record<string, string>> = {},
  body = '',
): Promise<void> {
  const { createHash } = await import('node:crypto');
  const { Signer } = await import('../../src/client/signer.js');
  const { FixedCredentials } = await import('../../src/client/credentials.js');
  const signer = new Signer(server.region, new FixedCredentials(server));
  const path = `/${bucket}`;
  const { headers } = await signer.sign({
    method,
    path,
    query,
    headers: {
      host: new URL(server.endpoint).host,
      'x-amz-content-sha256': createHash('sha256').update(body).digest('hex'),
    },
  });
  const search = Object.keys(query).length === 0 ? '' : `?${new URLSearchParams(query)}`;
  const response = await fetch(`${server.endpoint}${path}${search}`, {
    method,
    headers,
    ...(body === '' ? {} : { body }),
  });
  if (!response.ok) {
    throw new Error(`${method} ${path}${search}: ${response.status} ${await response.text()}`);
  }
}
