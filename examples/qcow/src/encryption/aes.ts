// SPDX-License-Identifier: Apache-2.0
/**
 * Encryption method 1, from before LUKS: AES-128 in CBC mode, the key being the first 16 bytes of the
 * passphrase, the vector the sector's number on the virtual disk. Broken by design (no salt, no
 * stretching, guessable vectors) and no longer served by QEMU; here to get data out. A wrong
 * passphrase can't be told from a right one.
 */
import { type DataCipher, passphraseBytes } from './cipher.js';
import { SECTOR, sectorCipher } from './sector-cipher.js';

const KEY_BYTES = 16;

export function legacyAes(passphrase: string | Uint8Array): DataCipher {
  const key = new Uint8Array(KEY_BYTES);
  key.set(passphraseBytes(passphrase).subarray(0, KEY_BYTES));
  const cipher = sectorCipher('cbc-plain64', key);
  return {
    tweak: 'guest',
    encrypt: (data, position) => cipher.encrypt(data, position / SECTOR),
    decrypt: (data, position) => cipher.decrypt(data, position / SECTOR),
  };
}
