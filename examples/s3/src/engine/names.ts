// SPDX-License-Identifier: Apache-2.0
/**
 * Names of a disk's objects. Numbers are hexadecimal with leading zeros, so that the order of names is
 * theirs. Every object is created once, under a condition, and never overwritten; `disk` may be, under one (`place`).
 *
 * At the disk's place there is one object, `disk`: its identity, its id, sizes, compression, and of a clone the pin that it
 * has at its origin. It is there before anything else and until after it, so it says whose the place is. All else
 * is in the disk's home, `<place>/<id>/`. No id ever comes twice: whoever makes or deletes a disk touches nobody else's.
 *
 * | name in the home         | what                                                              |
 * | ------------------------ | ----------------------------------------------------------------- |
 * | `state/whole`            | all that the disk begins with is there: without, nobody opens it  |
 * | `state/deleted-<who>`    | somebody deletes it: nobody opens it                              |
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
export const stateFolder = 'state/';
export const wholeName = `${stateFolder}whole`;
export const deletedName = (who: string): string => `${stateFolder}deleted-${who}`;
export const homeOf = (place: string, id: string): string => `${place}/${id}`;
export const segmentName = (slot: number): string => `s/${hex(slot, 14)}`;
export const chunkName = (chunk: number, n: number, epoch: number): string =>
  `c/${hex(chunk, 12)}.${version(n, epoch)}`;
export const leafName = (leaf: number, n: number, epoch: number): string =>
  `l/${hex(leaf, 10)}.${version(n, epoch)}`;
export const manifestName = (n: number, epoch: number): string => `m/${version(n, epoch)}`;
export const keyringName = (n: number): string => `keys/${hex(n, 8)}`;
export const probeName = (id: string): string => `probe/${id}`;
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

const HOME = /^[0-9a-f]{32}\//;

/** Whether a name at a disk's place is in some disk's home. */
export function isInHome(name: string): boolean {
  return HOME.test(name);
}

const PIN = /^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$/;

/** Whether a snapshot may be called so. */
export function isPinName(name: string): boolean {
  return PIN.test(name);
}
