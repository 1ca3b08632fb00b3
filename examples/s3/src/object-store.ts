// SPDX-License-Identifier: Apache-2.0
/**
 * The one interface between a disk and whatever keeps its objects. A store is one bucket; keys are
 * whole (`prefix/s/0000…`), made of `A-Z a-z 0-9 . _ - /`, so nobody needs to encode them.
 *
 * Contract:
 * - One call is one attempt: waiting and trying again is the disk's business, which alone knows who
 *   waits. A call settles within the store's own time-out, or at once when its signal is aborted.
 * - Whatever goes wrong rejects with an `ObjectStoreError`; `kind` says what to do about it.
 * - Everything is strongly consistent, as S3 promises: a GET or LIST that starts after a PUT was answered
 *   sees it.
 * - A body that is handed over belongs to the store until the call has settled; an answer's body
 *   belongs to the caller.
 */
import { TcmuError, type TcmuErrorDetails } from 'tcmu';

/** Bytes of an object: `[start, end)`. */
export interface ByteRange {
  readonly start: number;
  readonly end: number;
}

export interface CallOptions {
  readonly signal?: AbortSignal | undefined;
}

export interface GetOptions extends CallOptions {
  /** An end behind the object's is cut; a start behind it is `bad-request`. Default: all. */
  readonly range?: ByteRange | undefined;
  /** Only when the object still has this ETag, else `precondition`. */
  readonly ifMatch?: string | undefined;
  /**
   * Where the body may be put if there is room for it, so that no memory is needed: the answer's body is then
   * a part of it. It belongs to the store until the call has settled, and isn't touched after.
   */
  readonly into?: Buffer | undefined;
  /**
   * Of a range with `into`: called as the answer comes, with its first `bytes` bytes in `body`. They are the object's, though the call
   * may fail yet. Must not throw. A store may leave it out.
   */
  readonly onProgress?: ((body: Buffer, bytes: number) => void) | undefined;
}

export interface PutOptions extends CallOptions {
  /** Only when there is no object of that name, else `precondition`. */
  readonly ifNoneMatch?: '*' | undefined;
  /** Only when the object still has this ETag, else `precondition`. */
  readonly ifMatch?: string | undefined;
  /** CRC-32 of the body (`zlib.crc32`), for stores that check it on arrival. */
  readonly crc32?: number | undefined;
}

export interface DeleteOptions extends CallOptions {
  /** Of a single key: only when the object still has this ETag, else `precondition`. Some stores ignore it. */
  readonly ifMatch?: string | undefined;
}

export interface ObjectFacts {
  /** Bytes of the whole object. */
  readonly size: number;
  /** As the server gave it, without quotes. */
  readonly etag: string;
  /** Milliseconds since 1970, by the server's clock. */
  readonly modified: number;
}

export interface GetResult extends ObjectFacts {
  /** Exactly the bytes asked for: a shorter answer has been rejected as `outage`. */
  readonly body: Buffer;
}

export interface ListedObject extends ObjectFacts {
  readonly key: string;
}

export interface ListOptions extends CallOptions {
  /** Only keys behind this one, in the order of their UTF-8 bytes. */
  readonly startAfter?: string | undefined;
  /** Most keys to answer. Default: all there are, in as many requests as it takes. */
  readonly limit?: number | undefined;
}

export interface ObjectStore {
  /** For people: `s3://bucket` and where it is. */
  readonly description: string;
  get(key: string, options?: GetOptions): Promise<GetResult>;
  /** The parts are written one after the other, as one object. @returns the ETag */
  put(key: string, body: readonly Uint8Array[], options?: PutOptions): Promise<string>;
  /** What is not there is no error. */
  delete(keys: readonly string[], options?: DeleteOptions): Promise<void>;
  head(key: string, options?: CallOptions): Promise<ObjectFacts>;
  /** Keys that begin with `prefix`, in the order of their UTF-8 bytes. */
  list(prefix: string, options?: ListOptions): AsyncIterable<ListedObject>;
  /** Ends idle connections. Calls under way are aborted. */
  close(): Promise<void>;
}

/**
 * What a failure means:
 * - `precondition`: the condition did not hold (412): there is such an object, or there is another one
 * - `not-found`: there is no such object
 * - `no-bucket`: there is no such bucket
 * - `throttled`: slower, please (503 SlowDown, 429)
 * - `credentials`: expired, or none found; fresh ones may be had in a moment
 * - `forbidden`: refused for good, by policy or a wrong key
 * - `clock-skew`: our clock is too far from the server's (RequestTimeTooSkewed)
 * - `outage`: no or no usable answer: connection, time-out, 5xx, a body cut short, 409 of a conditional write beside another
 * - `bad-request`: the server doesn't take what we asked for; asking again is no use
 * - `aborted`: by the caller's signal, or `close`
 */
export type FailureKind =
  | 'precondition'
  | 'not-found'
  | 'no-bucket'
  | 'throttled'
  | 'credentials'
  | 'forbidden'
  | 'clock-skew'
  | 'outage'
  | 'bad-request'
  | 'aborted';

export interface ObjectStoreErrorDetails extends TcmuErrorDetails {
  /** HTTP status, when there was an answer. */
  status?: number | undefined;
  /**
   * A change may have been carried out although it failed: the request may have reached the server.
   * Default: true for `outage` and `aborted`, else false.
   */
  ambiguous?: boolean | undefined;
}

/**
 * A request that failed. Codes: `ERR_TCMU_S3_` and the kind (`ERR_TCMU_S3_NOT_FOUND`,
 * `ERR_TCMU_S3_NO_BUCKET`, `ERR_TCMU_S3_OUTAGE` …). The message names operation, key and
 * what to do.
 */
export class ObjectStoreError extends TcmuError {
  readonly kind: FailureKind;
  readonly status: number | undefined;
  readonly ambiguous: boolean;

  constructor(kind: FailureKind, message: string, details: ObjectStoreErrorDetails = {}) {
    super(`ERR_TCMU_S3_${kind.toUpperCase().replace('-', '_')}`, message, details);
    this.kind = kind;
    this.status = details.status;
    this.ambiguous = details.ambiguous ?? (kind === 'outage' || kind === 'aborted');
  }
}

/** The kind of a failed request; undefined for any other error. */
export function failureKind(error: unknown): FailureKind | undefined {
  return error instanceof ObjectStoreError ? error.kind : undefined;
}
