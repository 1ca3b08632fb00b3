// SPDX-License-Identifier: Apache-2.0
/**
 * Where a bucket is: from `s3://bucket/prefix`, an endpoint and a region to the host and path that requests name.
 *
 * Contract: pure; what it answers needs no further encoding. Buckets of Amazon's are addressed as virtual hosts, those behind an
 * endpoint by path, unless told otherwise: few servers of one's own have a wildcard in their DNS.
 */
import { ArgumentError } from 'tcmu';

/** A key has 1024 bytes at most (Amazon S3 User Guide, "Naming objects"), of which a disk needs up to 136. */
const longestPrefix = 880;

export interface BucketLocation {
  readonly bucket: string;
  /** Without slashes at its ends, never empty. */
  readonly prefix: string;
}

/** @throws ArgumentError saying what an S3 location looks like */
export function parseLocation(location: string): BucketLocation {
  const [, bucket = '', prefix = ''] = /^s3:\/\/([^/]*)\/?(.*?)\/?$/.exec(location) ?? [];
  const wrong = (why: string) =>
    new ArgumentError(`${location}: ${why}; a disk's place is s3://bucket/prefix`, {
      operation: 'parse location',
      path: location,
    });
  // The rules of Amazon's buckets, and the upper case and underscores that others allow.
  if (!/^[A-Za-z0-9][A-Za-z0-9._-]{1,254}$/.test(bucket)) throw wrong('there is no bucket name');
  if (prefix === '') throw wrong('there is no prefix');
  if (!/^[A-Za-z0-9._-]+(\/[A-Za-z0-9._-]+)*$/.test(prefix)) {
    throw wrong('a prefix is made of letters, digits, ".", "_", "-" and single slashes');
  }
  // HTTP clients and proxies take such segments out of a path.
  if (prefix.split('/').some((part) => part === '.' || part === '..')) {
    throw wrong('"." and ".." are not parts of a prefix');
  }
  if (prefix.length > longestPrefix) {
    throw wrong(`a prefix has ${longestPrefix} characters at most`);
  }
  return { bucket, prefix };
}

export interface BucketAddress {
  /** Scheme, host and port: what a connection is made to. */
  readonly origin: string;
  /** The Host header. */
  readonly host: string;
  /** What comes before a key's slash. */
  readonly path: string;
}

export interface AddressOptions {
  readonly bucket: string;
  readonly region: string;
  /** Undefined: Amazon's own for the region. */
  readonly endpoint: string | undefined;
  /** Default: path style with an endpoint, and for buckets whose name would break a certificate. */
  readonly pathStyle: boolean | undefined;
}

/** @throws ArgumentError when the endpoint is not an http or https URL, or region or endpoint can't go into one */
export function bucketAddress(options: AddressOptions): BucketAddress {
  const { bucket, endpoint, region } = options;
  if (endpoint === undefined && !isRegion(region, endpoint)) {
    throw new ArgumentError(`region ${JSON.stringify(region)} is not a region's name`, {
      operation: 'find endpoint',
    });
  }
  const url = parseEndpoint(endpoint ?? amazonEndpoint(region));
  const base = url.pathname.replace(/\/+$/, '');
  // A wildcard certificate is for one label, and a name with capitals or underscores is not a host's.
  const fitsHost = /^[a-z0-9-]+$/.test(bucket);
  if (options.pathStyle ?? (endpoint !== undefined || !fitsHost)) {
    return { origin: url.origin, host: url.host, path: `${base}/${bucket}` };
  }
  const host = `${bucket}.${url.host}`;
  return { origin: `${url.protocol}//${host}`, host, path: base };
}

/** Whether a region can be called so: Amazon's are parts of host names, others' of what is signed. */
export function isRegion(name: string, endpoint: string | undefined): boolean {
  return (endpoint === undefined ? /^[a-z0-9-]{1,63}$/ : /^[\w.-]{1,63}$/).test(name);
}

function amazonEndpoint(region: string): string {
  const domain = region.startsWith('cn-') ? 'amazonaws.com.cn' : 'amazonaws.com';
  return `https://s3.${region}.${domain}`;
}

function parseEndpoint(endpoint: string): URL {
  let url: URL | undefined;
  try {
    url = new URL(endpoint);
  } catch {
    // Said below, with what is wanted.
  }
  if (
    url === undefined ||
    !/^https?:$/.test(url.protocol) ||
    url.username !== '' ||
    url.search !== '' ||
    url.hash !== ''
  ) {
    throw new ArgumentError(
      `endpoint ${JSON.stringify(endpoint)}: give http:// or https://, a host and perhaps a port`,
      { operation: 'find endpoint', path: endpoint },
    );
  }
  return url;
}
