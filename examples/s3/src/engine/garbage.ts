// SPDX-License-Identifier: Apache-2.0
/**
 * What no manifest that counts, and no pin, needs any more.
 *
 * A chunk or leaf made for checkpoint b and replaced at checkpoint d is in the manifests b to d - 1 and in
 * no other, so it is needed by the pins of those alone: no manifest has to be read to know. Pins are listed
 * after the checkpoint is in the log and before anything is deleted; who takes a snapshot looks, after
 * its pin is there, whether a newer manifest has appeared, and begins anew if so. Claims and fences are never deleted.
 */
import { type BlobCodec, BlobKind, decodeHead, HEADER_BYTES } from './blob.js';
import { ChunkMap, type Manifest } from './chunk-map.js';
import { chunkName, leafName, manifestName, segmentName, slotOf, versionOf } from './names.js';
import { loadManifest } from './opening.js';
import { type DiskRecord, listPins, type Pin } from './records.js';
import type { Requests } from './requests.js';

/** Keys deleted by one request while somebody waits. */
const SMALL_BATCH = 16;

/** What a checkpoint replaced. */
export interface Superseded {
  /** Of the manifest that counts now. */
  readonly n: number;
  /** Of the one before. */
  readonly manifest: { readonly n: number; readonly epoch: number };
  /** Names of chunks and leaves, with the checkpoint they were made for. */
  readonly objects: readonly { readonly name: string; readonly born: number }[];
  readonly slots: readonly number[];
}

/** @returns how many objects were deleted */
export async function collectSuperseded(
  requests: Requests,
  prefix: string,
  { n, manifest, objects, slots }: Superseded,
): Promise<number> {
  const pins = await requests.background.run(() => listPins(requests, prefix));
  const doomed = objects
    .filter(({ born }) => !pins.some((pin) => pin.n >= born && pin.n < n))
    .map(({ name }) => name);
  if (!pins.some((pin) => pin.n === manifest.n)) {
    doomed.push(manifestName(manifest.n, manifest.epoch));
  }
  for (const slot of slots) if (!keepsSlot(pins, slot)) doomed.push(segmentName(slot));
  const { background } = requests;
  for (let at = 0; at < doomed.length; ) {
    // A server may take a millisecond a key, which a flush behind it would wait for.
    const batch = doomed.slice(at, at + (background.yields ? SMALL_BATCH : doomed.length));
    const keys = batch.map((name) => `${prefix}/${name}`);
    await background.run(() => requests.delete(keys, Number.POSITIVE_INFINITY));
    at += batch.length;
  }
  return doomed.length;
}

function keepsSlot(pins: readonly Pin[], slot: number): boolean {
  return pins.some(({ from, to }) => slot >= from && slot < to);
}

export interface SweepResult {
  /** Objects of the disk that are needed. */
  readonly kept: number;
  readonly deleted: number;
  readonly bytesDeleted: number;
}

/**
 * Looks at every object's name and deletes what is not needed: what crashes and deleted snapshots left.
 * Safe beside a writer at work: nothing made for a checkpoint after `manifest`'s is touched.
 * @param manifest one that counts
 */
export async function sweep(
  requests: Requests,
  codec: BlobCodec,
  prefix: string,
  disk: DiskRecord,
  manifest: Manifest,
  onProgress: (deleted: number) => void = () => {},
): Promise<SweepResult> {
  const pins = await listPins(requests, prefix);
  const needed = new Set<string>();
  const manifests = [manifest];
  for (const { n, epoch } of pins) {
    if (manifests.some((known) => known.n === n && known.epoch === epoch)) continue;
    manifests.push(await loadManifest(requests, codec, prefix, disk, n, epoch));
  }
  for (const one of manifests) {
    needed.add(manifestName(one.n, one.epoch));
    await addNames(requests, codec, disk, one, needed);
  }
  const claims = new Set(manifest.claims);
  let kept = 0;
  let deleted = 0;
  let bytesDeleted = 0;
  for (const kind of ['c', 'l', 'm', 's']) {
    const doomed: string[] = [];
    for (const { key, size } of await requests.list(`${prefix}/${kind}/`)) {
      const name = key.slice(prefix.length + 1);
      const slot = slotOf(name);
      const version = versionOf(name);
      const keep =
        slot === undefined
          ? version === undefined || version.n > manifest.n || needed.has(name)
          : slot >= manifest.cut || keepsSlot(pins, slot) || claims.has(slot);
      // A claim that the manifest does not know yet has no frames, and nothing else has that size.
      if (keep || (slot !== undefined && (await isClaim(requests, key, size)))) {
        kept++;
        continue;
      }
      doomed.push(key);
      bytesDeleted += size;
    }
    await requests.delete(doomed);
    deleted += doomed.length;
    onProgress(deleted);
  }
  const day = Date.now() - 24 * 3600 * 1000;
  const probes = await requests.list(`${prefix}/probe/`);
  await requests.delete(probes.filter(({ modified }) => modified < day).map(({ key }) => key));
  return { kept, deleted, bytesDeleted };
}

async function isClaim(requests: Requests, key: string, size: number): Promise<boolean> {
  if (size !== HEADER_BYTES) return false;
  const { header } = decodeHead(key, (await requests.get(key)).body);
  return header.kind === BlobKind.segment && header.frames === 0;
}

async function addNames(
  requests: Requests,
  codec: BlobCodec,
  disk: DiskRecord,
  manifest: Manifest,
  names: Set<string>,
): Promise<void> {
  const map = new ChunkMap(manifest, requests, codec, disk.chunkSize / disk.frameSize, 0);
  for (const [index, ref] of manifest.leaves) {
    if (ref.origin !== 0) continue;
    names.add(leafName(index, ref.n, ref.epoch));
    const leaf = await map.leaf(index, ref);
    for (const [within, chunk] of leaf.entries(ref.origin)) {
      if (chunk.origin !== 0) continue;
      names.add(chunkName(map.chunkOf(index, within), chunk.n, chunk.epoch));
    }
  }
}
