// SPDX-License-Identifier: Apache-2.0
/**
 * Reaching a bucket: everything that environment, shared config files and options say about it, put together into an `ObjectStore`.
 *
 * Contract: `connect` sends nothing to the bucket; what is wrong with options or files is an `ArgumentError`, what is wrong with
 * server, bucket or keys shows at the first request.
 */
import { existsSync, readFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { ArgumentError } from 'tcmu';
import type { ObjectStore } from '../object-store.js';
import {
  type CredentialSource,
  defaultCredentials,
  FixedCredentials,
  type RequestHandler,
} from './credentials.js';
import { parseLocation } from './location.js';
import type { ConnectOptions } from './options.js';
import { type Environment, proxyFor } from './proxy.js';
import { S3Store } from './s3-store.js';
import { sdkRequestHandler } from './sdk-handler.js';

export { parseLocation } from './location.js';
export {
  CONNECT_HELP,
  CONNECT_OPTIONS,
  type ConnectOptions,
  type ConnectValues,
  connectOptions,
} from './options.js';

export interface Connected {
  readonly store: ObjectStore;
  /** Without slashes at its ends, never empty. */
  readonly prefix: string;
}

/** @throws ArgumentError for a location, options or shared files that make no sense */
export async function connect(location: string, options: ConnectOptions = {}): Promise<Connected> {
  const { bucket, prefix } = parseLocation(location);
  const env = options.env ?? process.env;
  const profile = await readProfile(options.profile ?? env['AWS_PROFILE']);
  const endpoint =
    options.endpoint ??
    env['AWS_ENDPOINT_URL_S3'] ??
    env['AWS_ENDPOINT_URL'] ??
    profile['endpoint_url'];
  const region =
    options.region ??
    env['AWS_REGION'] ??
    env['AWS_DEFAULT_REGION'] ??
    profile['region'] ??
    'us-east-1';
  const ca = readAuthorities(options.caFile ?? env['AWS_CA_BUNDLE'] ?? profile['ca_bundle']);
  const proxy = proxyChoice(options.proxy, env);
  const connection = {
    ca,
    connections: options.maxConnections ?? 32,
    connectTimeoutMs: options.connectTimeoutMs ?? 5000,
  };
  const store = new S3Store({
    bucket,
    region,
    endpoint,
    pathStyle: options.pathStyle ?? styleOf(profile['s3.addressing_style']),
    credentials: await credentialSource(
      options,
      region,
      sdkRequestHandler({ ...connection, connections: 1 }, proxy),
    ),
    requestTimeoutMs: options.requestTimeoutMs ?? 15_000,
    signBodies: options.signBodies,
    connection,
    proxy,
  });
  return { store, prefix };
}

/** Where the SDK looks for them. */
const sharedFiles = (): string[] => [
  process.env['AWS_CONFIG_FILE'] ?? join(homedir(), '.aws', 'config'),
  process.env['AWS_SHARED_CREDENTIALS_FILE'] ?? join(homedir(), '.aws', 'credentials'),
];

/** The settings of a profile in the shared config and credentials files; empty when there is none. */
async function readProfile(name: string | undefined): Promise<Record<string, string | undefined>> {
  // Some MiB of code that is not loaded for nothing.
  if (name === undefined && !sharedFiles().some((file) => existsSync(file))) return {};
  const { loadSharedConfigFiles } = await import('@smithy/core/config');
  const { configFile, credentialsFile } = await loadSharedConfigFiles({ ignoreCache: true });
  const wanted = name ?? 'default';
  const found = { ...credentialsFile[wanted], ...configFile[wanted] };
  if (name !== undefined && Object.keys(found).length === 0) {
    throw new ArgumentError(
      `profile ${name}: neither the shared config file nor the credentials file has it`,
      { operation: 'read profile', path: name },
    );
  }
  return found;
}

function readAuthorities(file: string | undefined): string | undefined {
  if (file === undefined) return undefined;
  try {
    return readFileSync(file, 'utf8');
  } catch (cause) {
    throw new ArgumentError(
      `${file}: the certificates of the authorities can't be read: ${(cause as Error).message}`,
      { operation: 'read certificates', path: file, cause },
    );
  }
}

function proxyChoice(
  chosen: string | undefined,
  env: Environment,
): (origin: string) => string | undefined {
  if (chosen === 'none') return () => undefined;
  if (chosen === undefined) return (origin) => proxyFor(origin, env);
  try {
    if (!/^https?:$/.test(new URL(chosen).protocol)) throw new Error('not http or https');
  } catch (cause) {
    throw new ArgumentError(`proxy ${chosen}: give http://host:port, or none`, {
      operation: 'find proxy',
      path: chosen,
      cause,
    });
  }
  return () => chosen;
}

function styleOf(addressing: string | undefined): boolean | undefined {
  if (addressing === 'path') return true;
  return addressing === 'virtual' ? false : undefined;
}

async function credentialSource(
  options: ConnectOptions,
  region: string,
  requestHandler: RequestHandler,
): Promise<CredentialSource> {
  const { accessKeyId, secretAccessKey, sessionToken, profile } = options;
  if ((accessKeyId === undefined) !== (secretAccessKey === undefined)) {
    throw new ArgumentError('accessKeyId and secretAccessKey go together', {
      operation: 'read options',
    });
  }
  if (accessKeyId !== undefined && secretAccessKey !== undefined) {
    return new FixedCredentials({ accessKeyId, secretAccessKey, sessionToken });
  }
  return defaultCredentials({ profile, region, requestHandler });
}
