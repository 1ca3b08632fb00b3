// SPDX-License-Identifier: Apache-2.0
/**
 * Client-side encryption: AES-256-GCM under a key of each object's own.
 *
 * A data key, wrapped by the user's key, is in `keys/<n>`. An object's key is HKDF-SHA256 of the data key
 * and the object's full identity (disk, name, epoch, writer), none of which ever comes twice, so a frame's
 * number is nonce enough; the same identity and number are authenticated, so no frame can be passed off
 * as another. Rotating the user's key wraps the data keys anew; rotating the data key makes a new one for
 * what is written from then on.
 */
import { createCipheriv, createDecipheriv, hkdfSync, randomBytes } from 'node:crypto';
import { DiskError } from './errors.js';

const TAG = 16;
export const KEY_BYTES = 32;

/** The data keys of a disk by id, 1 and up; the highest encrypts. */
export class Keyring {
  readonly #keys: ReadonlyMap<number, Buffer>;
  readonly current: number;

  constructor(keys: ReadonlyMap<number, Buffer>) {
    this.#keys = keys;
    this.current = Math.max(0, ...keys.keys());
  }

  static create(): Keyring {
    return new Keyring(new Map([[1, randomBytes(KEY_BYTES)]]));
  }

  /** With one more data key, for what is written from now on. */
  extended(): Keyring {
    return new Keyring(new Map([...this.#keys, [this.current + 1, randomBytes(KEY_BYTES)]]));
  }

  /** @throws DiskError `key` */
  object(id: number, identity: string): ObjectCipher {
    const key = this.#keys.get(id);
    if (key === undefined) {
      throw new DiskError(
        'key',
        `${identity}: encrypted with data key ${id}, which is not among the disk's keys`,
      );
    }
    return new ObjectCipher(
      Buffer.from(hkdfSync('sha256', key, '', identity, KEY_BYTES)),
      identity,
    );
  }

  /** The data keys, encrypted with the user's key: what goes into `keys/<n>`. */
  wrap(userKey: Uint8Array, disk: string): WrappedKey[] {
    return [...this.#keys].map(([id, key]) => {
      const nonce = randomBytes(12);
      const cipher = createCipheriv('aes-256-gcm', userKey, nonce);
      cipher.setAAD(Buffer.from(`${disk}/${id}`));
      const wrapped = Buffer.concat([
        nonce,
        cipher.update(key),
        cipher.final(),
        cipher.getAuthTag(),
      ]);
      return { id, key: wrapped.toString('base64') };
    });
  }

  /** @throws DiskError `key` when `userKey` is not the one they were wrapped with. */
  static unwrap(wrapped: readonly WrappedKey[], userKey: Uint8Array, disk: string): Keyring {
    const keys = new Map<number, Buffer>();
    for (const { id, key } of wrapped) {
      const bytes = Buffer.from(key, 'base64');
      try {
        const decipher = createDecipheriv('aes-256-gcm', userKey, bytes.subarray(0, 12));
        decipher.setAAD(Buffer.from(`${disk}/${id}`));
        decipher.setAuthTag(bytes.subarray(-TAG));
        keys.set(id, Buffer.concat([decipher.update(bytes.subarray(12, -TAG)), decipher.final()]));
      } catch (cause) {
        throw new DiskError(
          'key',
          'the key does not open this disk: give the one it was created with, or the one of the last rotation',
          { cause },
        );
      }
    }
    return new Keyring(keys);
  }
}

export interface WrappedKey {
  readonly id: number;
  /** Base64 of nonce, ciphertext and tag. */
  readonly key: string;
}

/** One object's frames. */
export class ObjectCipher {
  readonly #key: Buffer;
  readonly #identity: string;

  constructor(key: Buffer, identity: string) {
    this.#key = key;
    this.#identity = identity;
  }

  encrypt(frame: number, plain: Uint8Array): Buffer {
    const cipher = createCipheriv('aes-256-gcm', this.#key, nonceOf(frame));
    cipher.setAAD(Buffer.from(`${this.#identity}#${frame}`));
    return Buffer.concat([cipher.update(plain), cipher.final(), cipher.getAuthTag()]);
  }

  /** @throws Error when it is not what was encrypted. */
  decrypt(frame: number, stored: Uint8Array): Buffer {
    const decipher = createDecipheriv('aes-256-gcm', this.#key, nonceOf(frame));
    decipher.setAAD(Buffer.from(`${this.#identity}#${frame}`));
    decipher.setAuthTag(stored.subarray(stored.length - TAG));
    return Buffer.concat([
      decipher.update(stored.subarray(0, stored.length - TAG)),
      decipher.final(),
    ]);
  }
}

function nonceOf(frame: number): Buffer {
  const nonce = Buffer.alloc(12);
  nonce.writeUInt32LE(frame, 0);
  return nonce;
}
