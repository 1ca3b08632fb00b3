/**
 * Mode pages as bytes: current, default and changeable values of each page a block device has
 * (SPC-5 and SBC-4, mode parameters). State lives as long as the logical unit and goes back to the
 * defaults at a reset: there is no saving. Pages are shared by all initiators (mode page policy
 * `shared`).
 */

/** One page, its header included. */
export interface ModePage {
  readonly code: number;
  readonly subpage: number;
  /** Bytes in front of the page's parameters: 2, or 4 in sub_page format. */
  readonly headerLength: number;
  readonly current: Uint8Array;
  readonly defaults: Uint8Array;
  /** Bits an initiator may change; zero in the header. */
  readonly changeable: Uint8Array;
}

/** Facts that the pages state. */
export interface ModePageFacts {
  /** Acknowledged writes may be volatile: WCE is set, and can be cleared. */
  readonly writeCache: boolean;
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
  return { code, subpage, headerLength, current: bytes.slice(), defaults: bytes, changeable: mask };
}

export class ModePages {
  /** In ascending order of page code and subpage. */
  readonly pages: readonly ModePage[];
  readonly #caching: ModePage;
  readonly #control: ModePage;

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
    this.pages = [
      // AWRE: what is below us reassigns bad blocks by itself.
      page(ModePageCode.READ_WRITE_ERROR_RECOVERY, 0, 0x0a, [[2, 0x80]]),
      this.#caching,
      this.#control,
      page(ModePageCode.CONTROL, 0x01, 0x1c, []),
      // DEXCPT: no informational exceptions are reported.
      page(ModePageCode.INFORMATIONAL_EXCEPTIONS, 0, 0x0a, [[2, 0x08]]),
    ];
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

  /** Back to the defaults (logical unit reset). */
  reset(): void {
    for (const entry of this.pages) entry.current.set(entry.defaults);
  }
}
