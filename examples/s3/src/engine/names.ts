// SPDX-License-Identifier: Apache-2.0
/**
 * Names of a disk's objects. Numbers are hexadecimal with leading zeros, so that the order of names is
 * theirs. Every object is created once, under a condition, and never overwritten.
 *
 * | name                     | what                                                              |
 * | ------------------------ | ----------------------------------------------------------------- |
 * | `disk`                   | identity: id, block, frame and chunk sizes, compression           |
 * | `clone`                  | of a clone: its pin; there before anything else, and until after it |
 * | `keys/<n>`               | wrapped data keys; the highest number counts                      |
 * | `s/<slot>`               | log segments, claims and fences                                   |
 * | `c/<chunk>.<n>.<epoch>`  | a chunk as of checkpoint n                                        |
 * | `l/<leaf>.<n>.<epoch>`   | where 256 chunks are                                              |
 * | `m/<n>.<epoch>`          | a manifest: where the leaves are; valid once the log says so      |
 * | `p/<name>`               | a pin: a snapshot, or what a clone needs                          |
 * | `probe/<id>`             | short-lived, to see whether conditions are honoured               |
 */
const hex = (value: number, digits: number): string => value.toString(16).padStart(digits, '0');
const version = (n: number, epoch: number): string => `${hex(n, 10)}.${hex(epoch, 8)}`;

export const diskName = 'disk';
export const cloneName = 'clone';
export const segmentName = (slot: number): string => `s/${hex(slot, 14)}`;
export const chunkName = (chunk: number, n: number, epoch: number): string =>
  `c/${hex(chunk, 12)}.${version(n, epoch)}`;
export const leafName = (leaf: number, n: number, epoch: number): string =>
  `l/${hex(leaf, 10)}.${version(n, epoch)}`;
export const manifestName = (n: number, epoch: number): string => `m/${version(n, epoch)}`;
export const keyringName = (n: number): string => `keys/${hex(n, 8)}`;
export const pinName = (name: string): string => `p/${name}`;

/** Slot of `s/<slot>`, without the prefix; undefined for other names. */
export function slotOf(name: string): number | undefined {
  const match = /^s\/([0-9a-f]{14})$/.exec(name);
  return match === null ? undefined : Number.parseInt(match[1] as string, 16);
}

/** Checkpoint number and epoch of a chunk, leaf or manifest. */
export function versionOf(name: string): { n: number; epoch: number } | undefined {
  const match = /^(?:[cl]\/[0-9a-f]+\.|m\/)([0-9a-f]{10})\.([0-9a-f]{8})$/.exec(name);
  if (match === null) return undefined;
  return {
    n: Number.parseInt(match[1] as string, 16),
    epoch: Number.parseInt(match[2] as string, 16),
  };
}

const PIN = /^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$/;

/** Whether a snapshot may be called so. */
export function isPinName(name: string): boolean {
  return PIN.test(name);
}
