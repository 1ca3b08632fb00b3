// SPDX-License-Identifier: Apache-2.0
/**
 * Mode pages as bytes: current, saved, default and changeable values of each page a block device has
 * (SPC-5 and SBC-4, mode parameters). State lives as long as the logical unit and goes back to the saved
 * values, or without a storage for them to the defaults, at a reset. Pages are shared by all initiators
 * (mode page policy `shared`).
 */
import { ArgumentError } from '../errors.js';

/** One page, its header included. */
export interface ModePage {
  readonly code: number;
  readonly subpage: number;
  /** Bytes in front of the page's parameters: 2, or 4 in sub_page format. */
  readonly headerLength: number;
  readonly current: Uint8Array;
  readonly defaults: Uint8Array;
  /** What a reset and a restart bring back. */
  readonly saved: Uint8Array;
  /** Bits an initiator may change; zero in the header. */
  readonly changeable: Uint8Array;
}

/** Facts that the pages state. */
export interface ModePageFacts {
  /** Acknowledged writes may be volatile: WCE is set, and can be cleared. */
  readonly writeCache: boolean;
  /** The store tells of its space: soft thresholds can be set. */
  readonly thresholds: boolean;
  /** Pages can be saved: PS is set in each. */
  readonly savable: boolean;
}

export const ModePageCode = {
  READ_WRITE_ERROR_RECOVERY: 0x01,
  CACHING: 0x08,
  CONTROL: 0x0a,
  INFORMATIONAL_EXCEPTIONS: 0x1c,
  ALL: 0x3f,
} as const;

/**
 * A page of `length` parameter bytes; `values` and `changeable` are [byte of the page, bits] pairs.
 */
function page(
  code: number,
  subpage: number,
  length: number,
  values: readonly (readonly [number, number])[],
  changeable: readonly (readonly [number, number])[] = [],
): ModePage {
  const headerLength = subpage === 0 ? 2 : 4;
  const bytes = new Uint8Array(headerLength + length);
  bytes.set(subpage === 0 ? [code, length] : [code | 0x40, subpage, length >>> 8, length]);
  for (const [at, value] of values) bytes[at] = value;
  const mask = new Uint8Array(bytes.length);
  for (const [at, value] of changeable) mask[at] = value;
  return {
    code,
    subpage,
    headerLength,
    current: bytes.slice(),
    defaults: bytes,
    saved: bytes.slice(),
    changeable: mask,
  };
}

const PS = 0x80;

/** Bytes of the Logical Block Provisioning mode page in front of its threshold descriptors (SBC-4). */
const THRESHOLDS_AT = 16;
const THRESHOLD_LENGTH = 8;

/** One soft threshold a resource; only ENABLED and THRESHOLD COUNT can be changed. */
function provisioningPage(): ModePage {
  const values: [number, number][] = [];
  const changeable: [number, number][] = [];
  // THRESHOLD ARMING (001b when the count goes down, 010b when it goes up) and RESOURCE.
  for (const [index, [arming, resource]] of [
    [0x01, 0x01],
    [0x02, 0x02],
  ].entries()) {
    const at = THRESHOLDS_AT + index * THRESHOLD_LENGTH;
    values.push([at, arming as number], [at + 1, resource as number]);
    changeable.push([at, 0x80]);
    for (let byte = 4; byte < 8; byte++) changeable.push([at + byte, 0xff]);
  }
  return page(ModePageCode.INFORMATIONAL_EXCEPTIONS, 0x02, 0x1c, values, changeable);
}

export class ModePages {
  /** In ascending order of page code and subpage. */
  readonly pages: readonly ModePage[];
  readonly #caching: ModePage;
  readonly #control: ModePage;
  readonly #provisioning: ModePage | undefined;
  /** A threshold of the Logical Block Provisioning page is enabled. */
  thresholdsEnabled = false;
  readonly savable: boolean;

  constructor(facts: ModePageFacts) {
    // SBC-4, Caching mode page: WCE is bit 2 of byte 2.
    const wce = [[2, 0x04]] as const;
    this.#caching = page(
      ModePageCode.CACHING,
      0,
      0x12,
      facts.writeCache ? wce : [],
      facts.writeCache ? wce : [],
    );
    this.#control = page(
      ModePageCode.CONTROL,
      0,
      0x0a,
      [
        // QUEUE ALGORITHM MODIFIER 1: unrestricted reordering.
        [3, 0x10],
        // TAS: LIO reports TASK ABORTED to other nexuses (attrib/emulate_tas, on by default).
        [5, 0x40],
      ],
      // D_SENSE and SWP.
      [
        [2, 0x04],
        [4, 0x08],
      ],
    );
    this.#provisioning = facts.thresholds ? provisioningPage() : undefined;
    this.savable = facts.savable;
    this.pages = [
      // AWRE: what is below us reassigns bad blocks by itself.
      page(ModePageCode.READ_WRITE_ERROR_RECOVERY, 0, 0x0a, [[2, 0x80]]),
      this.#caching,
      this.#control,
      page(ModePageCode.CONTROL, 0x01, 0x1c, []),
      // DEXCPT: no informational exceptions are reported.
      page(ModePageCode.INFORMATIONAL_EXCEPTIONS, 0, 0x0a, [[2, 0x08]]),
      ...(this.#provisioning === undefined ? [] : [this.#provisioning]),
    ];
    if (!facts.savable) return;
    for (const { current, defaults, saved } of this.pages) {
      for (const values of [current, defaults, saved]) (values[0] as number) |= PS;
    }
  }

  /** The threshold descriptors. */
  thresholds(): Uint8Array[] {
    const found: Uint8Array[] = [];
    const bytes = this.#provisioning?.current ?? new Uint8Array(0);
    for (let at = THRESHOLDS_AT; at < bytes.length; at += THRESHOLD_LENGTH) {
      found.push(bytes.subarray(at, at + THRESHOLD_LENGTH));
    }
    return found;
  }

  /** After current values have changed. */
  changed(): void {
    this.thresholdsEnabled = this.thresholds().some((bytes) => ((bytes[0] as number) & 0x80) !== 0);
  }

  /** All current values, for a `StateStorage`. */
  encode(): Uint8Array {
    return Buffer.concat(this.pages.map(({ current }) => current));
  }

  /**
   * Takes what a `StateStorage` kept. A page that this device no longer has is passed over.
   * @throws ArgumentError when the bytes are no mode pages, or say what can't be.
   */
  load(bytes: Uint8Array): void {
    const broken = (why: string) =>
      new ArgumentError(`saved mode pages: ${why}; remove them to start from the defaults`);
    const loaded: { page: ModePage; values: Uint8Array }[] = [];
    for (let at = 0; at < bytes.length; ) {
      const first = bytes[at] as number;
      const long = (first & 0x40) !== 0;
      const header = long ? 4 : 2;
      if (at + header > bytes.length) throw broken(`they end inside a page header`);
      const length = long
        ? ((bytes[at + 2] as number) << 8) | (bytes[at + 3] as number)
        : (bytes[at + 1] as number);
      const end = at + header + length;
      if (end > bytes.length) throw broken(`they end inside page ${(first & 0x3f).toString(16)}h`);
      const values = bytes.subarray(at, end);
      const subpage = long ? (bytes[at + 1] as number) : 0;
      const page = this.pages.find(
        (entry) =>
          entry.code === (first & 0x3f) &&
          entry.subpage === subpage &&
          entry.current.length === values.length,
      );
      if (page !== undefined) loaded.push({ page, values });
      at = end;
    }
    for (const { page, values } of loaded) {
      for (let i = page.headerLength; i < values.length; i++) {
        const mask = page.changeable[i] as number;
        const value = ((page.defaults[i] as number) & ~mask) | ((values[i] as number) & mask);
        page.current[i] = value;
        page.saved[i] = value;
      }
    }
    this.changed();
  }

  /** The saved values are the current ones from now on. */
  saveCurrent(): void {
    for (const { current, saved } of this.pages) saved.set(current);
  }

  /** WCE: writes may be acknowledged before they are durable. */
  get writeCacheEnabled(): boolean {
    return ((this.#caching.current[2] as number) & 0x04) !== 0;
  }

  /** D_SENSE: sense data goes out in descriptor format. */
  get descriptorSense(): boolean {
    return ((this.#control.current[2] as number) & 0x04) !== 0;
  }

  /** SWP: an initiator has write-protected the device. */
  get softwareWriteProtect(): boolean {
    return ((this.#control.current[4] as number) & 0x08) !== 0;
  }

  /** Pages that MODE SENSE asks for: one, all subpages of one (FFh), or all (page 3Fh). */
  select(code: number, subpage: number): ModePage[] {
    return this.pages.filter(
      (entry) =>
        (code === ModePageCode.ALL || entry.code === code) &&
        // Page 3Fh subpage 00h: all pages, but only their page_0 form (SPC-5, MODE SENSE (6)).
        (subpage === 0xff || entry.subpage === subpage),
    );
  }

  /** Back to the saved values (logical unit reset). */
  reset(): void {
    for (const { current, saved } of this.pages) current.set(saved);
    this.changed();
  }
}
