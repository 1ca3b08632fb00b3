// SPDX-License-Identifier: Apache-2.0
/**
 * Guest data in the host file, encrypted where the image is: without encryption it goes between a
 * command's memory and the file as it is, else through a copy.
 */
import type { DataIn, DataOut, MaybePromise } from 'tcmu';
import type { DataCipher } from './encryption/cipher.js';
import type { HostFile } from './host/host-file.js';
import { chain } from './maybe.js';

export class GuestData {
  readonly file: HostFile;
  readonly #cipher: DataCipher | undefined;

  constructor(file: HostFile, cipher: DataCipher | undefined) {
    this.file = file;
    this.#cipher = cipher;
  }

  /** What is not there reads as zeros, also when it lies in a hole of the host file. */
  get plain(): boolean {
    return this.#cipher === undefined;
  }

  /** Fills `data` from `host`, the place of the guest's `position`. */
  read(data: DataIn, host: number, position: number): MaybePromise<unknown> {
    const cipher = this.#cipher;
    if (cipher === undefined) return this.file.readData(data, host);
    const bytes = new Uint8Array(data.length);
    return chain(this.file.read(bytes, host), () => {
      cipher.decrypt(bytes, cipher.tweak === 'host' ? host : position);
      data.copyFrom(bytes);
    });
  }

  write(data: DataOut, host: number, position: number): MaybePromise<unknown> {
    if (this.#cipher === undefined) return this.file.writeData(data, host);
    return this.writeBytes(data.toBytes(), host, position);
  }

  /** Writes `bytes`, which are changed when the image is encrypted. */
  writeBytes(bytes: Uint8Array, host: number, position: number): MaybePromise<unknown> {
    const cipher = this.#cipher;
    cipher?.encrypt(bytes, cipher.tweak === 'host' ? host : position);
    return this.file.write(bytes, host);
  }
}
