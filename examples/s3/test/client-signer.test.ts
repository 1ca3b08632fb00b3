// SPDX-License-Identifier: Apache-2.0
/** Signatures beside those of the SDK's own package. */
import { createHash, createHmac } from 'node:crypto';
import { SignatureV4 } from '@smithy/signature-v4';
import { afterEach, expect, it, vi } from 'vitest';
import { FixedCredentials } from '../src/client/credentials.js';
import { Signer } from '../src/client/signer.js';
import { randomNumbers } from './support/random.js';

class Sha256 {
  readonly #hash;

  constructor(secret?: string | ArrayBuffer | ArrayBufferView) {
    this.#hash =
      secret === undefined ? createHash('sha256') : createHmac('sha256', secret as Uint8Array);
  }

  update(data: string | ArrayBuffer | ArrayBufferView): void {
    this.#hash.update(data as Uint8Array);
  }

  digest(): Promise<Uint8Array> {
    return Promise.resolve(this.#hash.digest());
  }

  reset(): void {}
}

/** As the client sends a key. */
function encoded(key: string): string {
  return encodeURIComponent(key)
    .replaceAll('%2F', '/')
    .replace(/[!'()*]/g, (one) => `%${one.charCodeAt(0).toString(16).toUpperCase()}`);
}

afterEach(() => {
  vi.useRealTimers();
});

it('are the same, whatever is in the request, on every day', async () => {
  const random = randomNumbers(11);
  const chance = (share: number) => random() < share;
  const characters = [..."abcXYZ019-._~!'()*/&=+ %?#äß漢🙂:;,@$"];
  const text = (most: number) =>
    Array.from(
      { length: 1 + Math.floor(random() * most) },
      () => characters[Math.floor(random() * characters.length)],
    ).join('');
  const value = () => Array.from({ length: 12 }, () => (chance(0.3) ? ' ' : 'v')).join('');
  vi.useFakeTimers();
  for (const sessionToken of [undefined, 'token/with+signs==']) {
    const credentials = { accessKeyId: 'AKIA', secretAccessKey: 'secret/key', sessionToken };
    const theirs = new SignatureV4({
      service: 's3',
      region: 'eu-central-1',
      credentials: {
        accessKeyId: 'AKIA',
        secretAccessKey: 'secret/key',
        ...(sessionToken === undefined ? {} : { sessionToken }),
      },
      sha256: Sha256 as never,
      uriEscapePath: false,
      applyChecksum: false,
    });
    for (let i = 0; i < 300; i++) {
      const now = new Date(1.7e12 + i * 3.1e7);
      vi.setSystemTime(now);
      const offset = chance(0.1) ? 86_400_000 : 0;
      const signer = new Signer('eu-central-1', new FixedCredentials(credentials), offset);
      const signable = {
        method: ['GET', 'PUT', 'POST', 'DELETE', 'HEAD'][i % 5] as string,
        path: `/${encoded(text(20))}`,
        query: chance(0.5)
          ? {}
          : Object.fromEntries(Array.from({ length: i % 4 }, () => [text(5), text(9)])),
        headers: {
          host: 'bucket.example:7480',
          'x-amz-content-sha256': chance(0.5) ? 'UNSIGNED-PAYLOAD' : 'a'.repeat(64),
          ...(chance(0.5) ? { range: 'bytes=0-5' } : {}),
          ...(chance(0.5) ? { 'if-none-match': '*' } : {}),
          ...(chance(0.5) ? { 'x-amz-meta-b': value() } : {}),
        },
      };
      const ours = await signer.sign(signable);
      const expected = await theirs.sign(
        { ...signable, protocol: 'https:', hostname: '', query: { ...signable.query } },
        { signingDate: new Date(now.getTime() + offset) },
      );
      expect(ours.headers).toEqual(expected.headers);
    }
  }
});
