// SPDX-License-Identifier: Apache-2.0
/**
 * Snapshots and clones of a disk that somebody else may be writing: only pins are made.
 *
 * A pin is good if no manifest newer than the one it names counted when it was there: whoever makes
 * one lists the pins before deleting anything. If one did, the pin is taken back and made anew. One that had appeared before
 * may have begun to count meanwhile: the log tells.
 */
import { randomBytes } from 'node:crypto';
import { DiskError, Gone } from './errors.js';
import { homeOf, pinName } from './names.js';
import { type DiskState, listManifests, loadState, type OpeningParts } from './opening.js';
import { listPins, loadDisk, loadPin, type Pin, savePin } from './records.js';
import type { Requests } from './requests.js';

const MAX_ATTEMPTS = 20;

/** What of a pin its maker chooses. */
export type PinPurpose = Pick<Pin, 'name' | 'kind' | 'clone'>;

export function pinOf(state: DiskState, purpose: PinPurpose, end: number): Pin {
  const { n, epoch, cut } = state.manifest;
  const { size } = state.image;
  const id = randomBytes(8).toString('hex');
  const created = new Date().toISOString();
  return { ...purpose, id, n, epoch, from: cut, to: end, size, created };
}

/**
 * Pins what is in the bucket now: all that was flushed, perhaps more, always a prefix of the writes.
 * @throws DiskError `in-use` when the name is taken, or the disk changes too fast
 */
export async function pinNow(parts: OpeningParts, purpose: PinPurpose): Promise<Pin> {
  const { requests, prefix } = parts;
  for (let attempt = 0; attempt < MAX_ATTEMPTS; attempt++) {
    const before = (await listManifests(requests, prefix))[0];
    const state = await loadState(parts);
    const pin = pinOf(state, purpose, state.slot);
    await savePin(requests, prefix, pin);
    const isStill = await countsStill(state, pin);
    // Last: what the log said is all there was, unless some of it had been collected for a newer one.
    const after = (await listManifests(requests, prefix))[0];
    if (isStill && before?.n === after?.n && before?.epoch === after?.epoch) return pin;
    await requests.delete([`${prefix}/${pinName(pin.name)}`]);
  }
  throw new DiskError(
    'in-use',
    `${prefix}: checkpoints follow each other too fast for a snapshot from outside; try again`,
  );
}

/** Whether the log, as far as it is there now, declares no newer manifest valid than the one a pin names. */
async function countsStill(state: DiskState, { n, epoch }: Pin): Promise<boolean> {
  try {
    await state.survey();
    await state.advance(state.lastKnown + 1);
  } catch (error) {
    if (error instanceof Gone) return false;
    throw error;
  }
  return state.manifest.n === n && state.manifest.epoch === epoch;
}

/** The snapshots of a disk, and what keeps its clones. @throws DiskError `not-a-disk`, `unfinished` */
export async function listSnapshots(requests: Requests, place: string): Promise<Pin[]> {
  return listPins(requests, homeOf(place, (await loadDisk(requests, place)).id));
}

/** @throws DiskError `not-a-disk`, `unfinished`; `in-use` for what a clone needs */
export async function deleteSnapshot(
  requests: Requests,
  place: string,
  name: string,
): Promise<void> {
  const prefix = homeOf(place, (await loadDisk(requests, place)).id);
  const pin = await loadPin(requests, prefix, name);
  if (pin.kind === 'clone') {
    throw new DiskError(
      'in-use',
      `${place}: ${name} is what the clone ${pin.clone} needs: delete the clone`,
    );
  }
  await requests.delete([`${prefix}/${pinName(name)}`]);
}
