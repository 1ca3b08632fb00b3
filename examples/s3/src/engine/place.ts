// SPDX-License-Identifier: Apache-2.0
/**
 * A disk's place, that is the object `disk`: how it is taken and given back, by any number at the same time.
 *
 * Contract: one of those who take a place gets it. Whoever frees a disk's place never frees another disk's, however late a request of its
 * arrives: each says what it expects to find there. Where a store ignores that of a DELETE (Ceph, MinIO) none is sent: a note that the place is free
 * is put over the record, and the next disk's record over the note. Notes are all different, so what was put over the one before is never put over a
 * later one. The last one stays. Only where neither is honoured a place is looked at, and then freed.
 */
import { randomBytes } from 'node:crypto';
import { type FailureKind, failureKind, type PutOptions } from '../object-store.js';
import { DiskError } from './errors.js';
import { diskName, probeName } from './names.js';
import { type DiskRecord, encodeJson, encodeVacancy, isVacant, loadDisk } from './records.js';
import type { Requests } from './requests.js';

/** How often a place is claimed that is taken then, and free a moment later. */
const PLACE_ATTEMPTS = 16;
/** No object's. */
const NO_ETAG = '0'.repeat(32);

/** @throws DiskError `exists`, `unfinished`, `in-use` */
export async function takePlace(
  requests: Requests,
  place: string,
  record: DiskRecord,
): Promise<void> {
  const where = `${requests.objects.description}/${place}`;
  for (let attempt = 0; attempt < PLACE_ATTEMPTS; attempt++) {
    try {
      if (await requests.claim(`${place}/${diskName}`, [encodeJson(record)], isVacant)) return;
      await loadDisk(requests, place);
    } catch (error) {
      // Taken when we came, and free when we looked by whom.
      const isFree =
        failureKind(error) === 'not-found' ||
        (error instanceof DiskError && error.failure === 'not-a-disk');
      if (isFree) continue;
      throw error;
    }
    throw new DiskError(
      'exists',
      `${where}: there is a disk already; take another name, or delete it`,
    );
  }
  throw new DiskError(
    'in-use',
    `${where}: taken whenever it was claimed, and free whenever it was looked at: others make and delete disks there, or the bucket doesn't show what it has`,
  );
}

/** Of which requests a store honours If-Match: the first that will do. */
export type Honoured = 'delete' | 'put' | 'none';

/**
 * Found out on an object in a disk's home.
 * @throws DiskError `in-use`
 */
export async function honouredIn(requests: Requests, home: string): Promise<Honoured> {
  for (let attempt = 0; attempt < PLACE_ATTEMPTS; attempt++) {
    const key = `${home}/${probeName(randomBytes(8).toString('hex'))}`;
    const honoured = await requests.retry(`probe ${home}`, () => probe(requests, key));
    if (honoured !== undefined) return honoured;
  }
  throw new DiskError('in-use', `${home}: others delete whatever is put there`);
}

/** @returns undefined when it can't be told: somebody else, who deletes the disk, has deleted the object, or a request has arrived late */
async function probe(requests: Requests, key: string): Promise<Honoured | undefined> {
  const { objects, signal } = requests;
  // Never the same twice, also not what an attempt before has sent and what arrives late.
  const put = (options: PutOptions = {}): Promise<string> =>
    requests.put(key, [randomBytes(16)], options);
  const etag = async (): Promise<string> => {
    requests.counters.gets++;
    return (await objects.get(key, { signal })).etag;
  };
  try {
    await put();
    requests.counters.deletes++;
    if (await isRefused(objects.delete([key], { ifMatch: NO_ETAG, signal }))) return 'delete';
    await put();
    const own = await etag();
    // It must match itself, too.
    const isOdd = own === '' || (await isRefused(put({ ifMatch: own }), 'bad-request'));
    if (isOdd) return (await etag()) === own ? 'none' : undefined;
    return (await isRefused(put({ ifMatch: own }))) ? 'put' : 'none';
  } catch (error) {
    if (failureKind(error) === 'not-found') return undefined;
    throw error;
  } finally {
    requests.counters.deletes++;
    await objects.delete([key], { signal });
  }
}

async function isRefused(answer: Promise<unknown>, ...also: FailureKind[]): Promise<boolean> {
  try {
    await answer;
    return false;
  } catch (error) {
    const kind = failureKind(error);
    if (kind === 'precondition' || also.some((other) => other === kind)) return true;
    throw error;
  }
}

/** Frees a place if what is there is what is meant. */
export function freePlace(
  requests: Requests,
  place: string,
  isMeant: (body: Buffer) => boolean,
  honoured: Honoured,
): Promise<void> {
  const key = `${place}/${diskName}`;
  return honoured === 'put'
    ? requests.replaceIf(key, isMeant, encodeVacancy())
    : requests.deleteIf(key, isMeant);
}
