// SPDX-License-Identifier: Apache-2.0
/** Buckets made and removed: what the example itself never does. */
import { createHash } from 'node:crypto';
import { FixedCredentials } from '../../src/client/credentials.js';
import { Signer } from '../../src/client/signer.js';

/** What it takes to talk to an S3 server. */
export interface S3Access {
  readonly endpoint: string;
  readonly accessKeyId: string;
  readonly secretAccessKey: string;
  readonly region: string;
}

/** Makes or removes a bucket, or changes its settings. @throws Error with the server's answer */
export async function bucketRequest(
  server: S3Access,
  bucket: string,
  method: 'PUT' | 'DELETE',
  query: Readonly<Record<string, string>> = {},
  body = '',
): Promise<void> {
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
