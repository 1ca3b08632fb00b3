// SPDX-License-Identifier: Apache-2.0
/**
 * Signature Version 4 of the SDK's own package, over Node's hashes: the headers of one request.
 *
 * Contract: signs with the credentials that the provider answers at that moment, and with a clock that can be corrected by what the
 * server says of its own.
 */
import { createHash, createHmac, type Hash, type Hmac } from 'node:crypto';
import { SignatureV4 } from '@smithy/signature-v4';
import type { CredentialSource, Credentials } from './credentials.js';

/** The interface that the signer hashes through. */
class Sha256 {
  readonly #hash: Hash | Hmac;

  constructor(secret?: string | ArrayBuffer | ArrayBufferView) {
    this.#hash =
      secret === undefined
        ? createHash('sha256')
        : createHmac('sha256', typeof secret === 'string' ? secret : bytesOf(secret));
  }

  update(data: string | ArrayBuffer | ArrayBufferView): void {
    this.#hash.update(typeof data === 'string' ? data : bytesOf(data));
  }

  digest(): Promise<Uint8Array> {
    return Promise.resolve(this.#hash.digest());
  }

  reset(): void {
    throw new Error('a hash is used once');
  }
}

function bytesOf(data: ArrayBuffer | ArrayBufferView): Uint8Array {
  return ArrayBuffer.isView(data)
    ? new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
    : new Uint8Array(data);
}

export interface Signable {
  readonly method: string;
  readonly path: string;
  readonly query: Readonly<Record<string, string>>;
  /** With `host` and `x-amz-content-sha256`. */
  readonly headers: Readonly<Record<string, string>>;
}

export interface Signed {
  readonly headers: Record<string, string>;
  /** Those it was signed with. */
  readonly credentials: Credentials;
}

export class Signer {
  readonly region: string;
  /** Milliseconds that the server's clock is ahead of ours. */
  clockOffset = 0;
  readonly #source: CredentialSource;
  #credentials: Credentials | undefined;
  #signature: SignatureV4 | undefined;

  constructor(region: string, source: CredentialSource) {
    this.region = region;
    this.#source = source;
  }

  /** @throws ObjectStoreError of kind `credentials` when there are none */
  async sign({ method, path, query, headers }: Signable): Promise<Signed> {
    const credentials = await this.#source.get();
    const request = {
      method,
      protocol: 'https:',
      hostname: '',
      path,
      query: { ...query },
      headers: { ...headers },
    };
    const signed = await this.#signatureBy(credentials).sign(request, {
      signingDate: new Date(Date.now() + this.clockOffset),
    });
    return { headers: signed.headers, credentials };
  }

  #signatureBy(credentials: Credentials): SignatureV4 {
    if (this.#signature === undefined || this.#credentials !== credentials) {
      const { accessKeyId, secretAccessKey, sessionToken } = credentials;
      this.#credentials = credentials;
      this.#signature = new SignatureV4({
        service: 's3',
        region: this.region,
        credentials: {
          accessKeyId,
          secretAccessKey,
          ...(sessionToken === undefined ? {} : { sessionToken }),
        },
        sha256: Sha256,
        // S3 alone signs the path as it is sent (SigV4, "URI encode twice … except S3").
        uriEscapePath: false,
        applyChecksum: false,
      });
    }
    return this.#signature;
  }
}
