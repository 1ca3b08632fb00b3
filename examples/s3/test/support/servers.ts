// SPDX-License-Identifier: Apache-2.0
/** The servers that tests run against, behind one shape: each test has a bucket of its own in one of them. */
import { inject } from 'vitest';
import { type ConnectOptions, connect } from '../../src/client/index.js';
import type { ObjectStore } from '../../src/object-store.js';
import { bucketRequest, type S3Access } from './bucket.js';
import { MemoryServer } from './memory-server.js';

export interface TestServer extends S3Access {
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
export function reaching(server: S3Access, options: ConnectOptions = {}): ConnectOptions {
  const { endpoint, accessKeyId, secretAccessKey, region } = server;
  return { endpoint, accessKeyId, secretAccessKey, region, env: {}, ...options };
}

let buckets = 0;

/** A bucket that no other test has. */
export async function newBucket(server: S3Access): Promise<string> {
  const bucket = `test-${process.pid}-${buckets++}`;
  await bucketRequest(server, bucket, 'PUT');
  return bucket;
}

/** A store over a bucket of a server, perhaps by way of a proxy's endpoint. */
export async function openBucket(
  server: S3Access,
  bucket: string,
  options: ConnectOptions = {},
): Promise<ObjectStore> {
  const { store } = await connect(`s3://${bucket}/disk`, reaching(server, options));
  return store;
}
