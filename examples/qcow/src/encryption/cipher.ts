// SPDX-License-Identifier: Apache-2.0
/** Encryption of guest data, in sectors of 512 bytes, in place. Metadata is never encrypted. */
export interface DataCipher {
  /**
   * What the initialization vector counts: sectors of the host file (LUKS), or of the virtual disk (the
   * old AES method).
   */
  readonly tweak: 'host' | 'guest';
  /** @param position in bytes, of host or guest as `tweak` says; a multiple of 512, as is the length */
  encrypt(data: Uint8Array, position: number): void;
  decrypt(data: Uint8Array, position: number): void;
}

/** A passphrase as it goes into key derivation: UTF-8, or the bytes themselves. */
export function passphraseBytes(passphrase: string | Uint8Array): Uint8Array {
  return typeof passphrase === 'string' ? Buffer.from(passphrase) : passphrase;
}
