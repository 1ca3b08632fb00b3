// SPDX-License-Identifier: Apache-2.0
/** How a bucket is reached, as options of a program and as its command line says them. */
import type { Environment } from './proxy.js';

export interface ConnectOptions {
  /** URL of a server other than Amazon's. Default: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, the profile's `endpoint_url`. */
  readonly endpoint?: string | undefined;
  /** Default: AWS_REGION, AWS_DEFAULT_REGION, the profile's `region`; us-east-1 when none says. */
  readonly region?: string | undefined;
  /** The bucket in the path rather than in the host's name. Default: with an endpoint, or the profile's `s3.addressing_style`. */
  readonly pathStyle?: boolean | undefined;
  /** Profile of the shared files. Default: AWS_PROFILE, then `default`. */
  readonly profile?: string | undefined;
  /** Explicit keys, before all that is found elsewhere. */
  readonly accessKeyId?: string | undefined;
  readonly secretAccessKey?: string | undefined;
  readonly sessionToken?: string | undefined;
  /** PEM file of the authorities to trust. Default: AWS_CA_BUNDLE, the profile's `ca_bundle`, else Node's. */
  readonly caFile?: string | undefined;
  /** URL of a proxy; `none` ignores those of the environment. Default: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY. */
  readonly proxy?: string | undefined;
  /** Milliseconds for one request, to which each MiB of a body adds four seconds. Default 15000. */
  readonly requestTimeoutMs?: number | undefined;
  /** Milliseconds to connect. Default 5000. */
  readonly connectTimeoutMs?: number | undefined;
  /** Connections kept at most. Default 32. */
  readonly maxConnections?: number | undefined;
  /** Sign bodies (SHA-256) rather than leave them to TLS. Default: when the endpoint is not https. */
  readonly signBodies?: boolean | undefined;
  /** Where variables are looked up, but those of the credentials' chain, which are the process's. Default `process.env`. */
  readonly env?: Environment | undefined;
}

/** For `parseArgs`. */
export const CONNECT_OPTIONS = {
  endpoint: { type: 'string' },
  region: { type: 'string' },
  profile: { type: 'string' },
  'path-style': { type: 'boolean' },
  'virtual-host': { type: 'boolean' },
  'ca-file': { type: 'string' },
  proxy: { type: 'string' },
  'request-timeout': { type: 'string' },
  'max-connections': { type: 'string' },
} as const;

export const CONNECT_HELP = `Reaching the bucket
  --endpoint <url>         a server other than Amazon's: http://127.0.0.1:9000. Default: AWS_ENDPOINT_URL_S3,
                           AWS_ENDPOINT_URL, or the profile's endpoint_url
  --region <name>          default: AWS_REGION, AWS_DEFAULT_REGION, or the profile's
  --profile <name>         of the shared config and credentials files. Default: AWS_PROFILE, or "default"
  --path-style             the bucket in the path (default with an endpoint) …
  --virtual-host           … or in the host's name (default without)
  --ca-file <file>         trust the certificate authorities of this PEM file. Default: AWS_CA_BUNDLE
  --proxy <url>            default: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY; none: no proxy
  --request-timeout <seconds>   for one request without data. Default 15
  --max-connections <n>    kept open to the server. Default 32
Credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), profiles, roles, web identity,
container and instance metadata, in the order of the AWS tools. Keys are never taken from the command line.
`;

/** Values of `CONNECT_OPTIONS` as `parseArgs` answers them. */
export interface ConnectValues {
  readonly endpoint?: string | undefined;
  readonly region?: string | undefined;
  readonly profile?: string | undefined;
  readonly 'path-style'?: boolean | undefined;
  readonly 'virtual-host'?: boolean | undefined;
  readonly 'ca-file'?: string | undefined;
  readonly proxy?: string | undefined;
  readonly 'request-timeout'?: string | undefined;
  readonly 'max-connections'?: string | undefined;
}

/** @throws RangeError for a value that can't be meant */
export function connectOptions(values: ConnectValues, env: Environment): ConnectOptions {
  if (values['path-style'] && values['virtual-host']) {
    throw new RangeError('--path-style and --virtual-host exclude each other');
  }
  const seconds = positive(values['request-timeout'], 'request-timeout', 3600);
  return {
    endpoint: values.endpoint,
    region: values.region,
    profile: values.profile,
    pathStyle: values['path-style'] ? true : values['virtual-host'] ? false : undefined,
    caFile: values['ca-file'],
    proxy: values.proxy,
    requestTimeoutMs: seconds === undefined ? undefined : seconds * 1000,
    maxConnections: positive(values['max-connections'], 'max-connections', 1024),
    env,
  };
}

function positive(text: string | undefined, option: string, most: number): number | undefined {
  if (text === undefined) return undefined;
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1 || value > most) {
    throw new RangeError(`--${option} takes a whole number from 1 to ${most}, not ${text}`);
  }
  return value;
}
