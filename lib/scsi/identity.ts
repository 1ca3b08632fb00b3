// SPDX-License-Identifier: Apache-2.0
/**
 * Who a device says it is: the strings and names of INQUIRY and the VPD pages. An initiator takes
 * two devices with the same names for two paths to one disk, so names must differ between disks and
 * stay the same over restarts. Immutable.
 */
import { createHash } from 'node:crypto';
import { ArgumentError } from '../errors.js';

/** Options that say who the device is. */
export interface IdentityOptions {
  /**
   * Unit serial number, 1 to 64 printable ASCII characters. The same at every start of the same
   * disk.
   */
  serial: string;
  /** T10 VENDOR IDENTIFICATION, up to 8 characters. Default `TCMU-JS`. */
  vendor?: string | undefined;
  /** PRODUCT IDENTIFICATION, up to 16 characters. Default `Block device`. */
  product?: string | undefined;
  /** PRODUCT REVISION LEVEL, up to 4 characters. Default `0001`. */
  revision?: string | undefined;
  /**
   * World wide name: an NAA 6 identifier, 32 hexadecimal digits beginning with 6 (a leading `naa.`
   * is taken too). Default: LIO's company id 001405h and a hash of the serial.
   */
  wwn?: string | undefined;
}

/** LIO's IEEE company id, which the kernel's own backstores use for their NAA 6 names. */
const LIO_COMPANY_ID = '001405';

export class Identity {
  readonly vendor: string;
  readonly product: string;
  readonly revision: string;
  readonly serial: string;
  /** NAA 6: 32 lower-case hexadecimal digits (SPC-5, NAA IEEE Registered Extended). */
  readonly naa: string;

  constructor(options: IdentityOptions) {
    this.vendor = ascii('vendor', options.vendor ?? 'TCMU-JS', 8);
    this.product = ascii('product', options.product ?? 'Block device', 16);
    this.revision = ascii('revision', options.revision ?? '0001', 4);
    this.serial = ascii('serial', options.serial, 64);
    if (this.serial.trim() === '') {
      throw new ArgumentError('serial is empty; give each disk its own, the same at every start');
    }
    const hash = createHash('sha256').update(this.serial).digest('hex');
    const naa = (options.wwn ?? `6${LIO_COMPANY_ID}${hash.slice(0, 25)}`).toLowerCase();
    this.naa = naa.startsWith('naa.') ? naa.slice(4) : naa;
    if (!/^6[0-9a-f]{31}$/.test(this.naa)) {
      throw new ArgumentError(
        `wwn '${options.wwn}' is no NAA 6 name: 32 hexadecimal digits beginning with 6`,
      );
    }
  }
}

function ascii(name: string, value: string, length: number): string {
  if (typeof value !== 'string' || value.length > length || !/^[ -~]*$/.test(value)) {
    throw new ArgumentError(
      `${name} ${JSON.stringify(value)} must be at most ${length} printable ASCII characters`,
    );
  }
  return value;
}
