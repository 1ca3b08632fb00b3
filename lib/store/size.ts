// SPDX-License-Identifier: Apache-2.0
/** Sizes as people write them, on a command line, say. Powers of 1024 throughout. */

const UNITS = ['', 'K', 'M', 'G', 'T', 'P'] as const;

/**
 * Bytes of `1G`, `512M`, `1.5T`, `10GiB`, `1073741824`; undefined when the text is no size, or no whole number of
 * bytes below 2^53.
 */
export function parseSize(text: string): number | undefined {
  const match = /^(\d+(?:\.\d+)?)(?:([KMGTP])(?:i?B)?|B)?$/i.exec(text);
  if (match === null) return undefined;
  const unit = (match[2] ?? '').toUpperCase() as (typeof UNITS)[number];
  const bytes = Number(match[1]) * 1024 ** UNITS.indexOf(unit);
  return Number.isSafeInteger(bytes) ? bytes : undefined;
}

/** `1 GiB`, `1.5 TiB`, `512 B`; the exact number of bytes is added when the short form hides some. */
export function formatSize(bytes: number): string {
  let value = bytes;
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit++;
  }
  if (unit === 0) return `${bytes} B`;
  const short = `${Number(value.toFixed(2))} ${UNITS[unit]}iB`;
  return Number(value.toFixed(2)) === value ? short : `${short} (${bytes} bytes)`;
}
