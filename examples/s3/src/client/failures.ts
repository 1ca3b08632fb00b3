// SPDX-License-Identifier: Apache-2.0
/** What an answer's status and S3's error code mean for the caller (Amazon S3 API reference, "Error responses"), and what to do about it. */
import type { FailureKind } from '../object-store.js';

/** Codes that mean the same whatever the status is: servers differ in that. */
const byCode: Readonly<Record<string, FailureKind>> = {
  NoSuchBucket: 'no-bucket',
  NoSuchKey: 'not-found',
  PreconditionFailed: 'precondition',
  // 409: somebody, perhaps an earlier attempt of ours, is at it. It says nothing of what will be there: try again.
  ConditionalRequestConflict: 'outage',
  OperationAborted: 'outage',
  SlowDown: 'throttled',
  Throttling: 'throttled',
  ThrottlingException: 'throttled',
  RequestLimitExceeded: 'throttled',
  TooManyRequests: 'throttled',
  BandwidthLimitExceeded: 'throttled',
  ExpiredToken: 'credentials',
  TokenRefreshRequired: 'credentials',
  RequestTimeTooSkewed: 'clock-skew',
  // Of a bucket that is new: until its name has got round.
  TemporaryRedirect: 'outage',
  // The bytes were spoilt or held up on their way.
  RequestTimeout: 'outage',
  IncompleteBody: 'outage',
  BadDigest: 'outage',
  XAmzContentSHA256Mismatch: 'outage',
  NotImplemented: 'bad-request',
};

export function kindOf(status: number, code: string): FailureKind {
  const known = byCode[code];
  if (known !== undefined) return known;
  switch (status) {
    case 401:
    case 403:
      return 'forbidden';
    case 404:
      return 'not-found';
    case 408:
      return 'outage';
    case 412:
      return 'precondition';
    case 429:
      return 'throttled';
    case 501:
      return 'bad-request';
    default:
      return status >= 500 ? 'outage' : 'bad-request';
  }
}

/** What people can do; the disk does its own part by itself. */
export const remedies: Readonly<Record<FailureKind, string>> = {
  precondition: 'another writer was first, or this request had been carried out before',
  'not-found': 'the object is not there',
  'no-bucket': 'create the bucket, or correct its name, region or endpoint',
  throttled: 'the server asks for fewer requests',
  credentials: 'renew the credentials; they are looked up anew at the next request',
  forbidden: 'check the keys, and the policies of user and bucket',
  'clock-skew': "set this host's clock (NTP)",
  outage: 'it is tried again; check server, network and proxy if this goes on',
  'bad-request': 'the server does not take this request: check endpoint and region',
  aborted: 'nothing to do',
};
