// SPDX-License-Identifier: Apache-2.0
/**
 * What the image says of its guest data's places, so that plain reads and writes need not come to it: the
 * addon moves the data of a command all of whose bytes have a known place, without any JavaScript.
 *
 * Such a move happens between two turns of the event loop, as a whole: no step of ours is under way in it, though
 * operations that wait for the thread pool are. So it has to be allowed beside each of them, as the shortest way of
 * `QcowImage.read` and `write` is, which looks the place up and moves the data without a wait: what is in the map is
 * what that way would find now.
 *
 * - Readable: the entry, or that of a layer below, says so in memory. (Layers below never change.)
 * - Writable: the refcount is one, the place is no metadata's, and the entry is in the file, so that an
 *   acknowledged write is found again after a kill, as `MetadataSync.written` has it.
 * - Each change of an entry takes its place back in the same turn (`Mapping.touch`). A copy on write changes the
 *   entry when the copy is complete; until then reads see the old place, and nobody may write there. A place that was
 *   given up is used anew only by way of a sync: no move is under way then. A new L2 table says the same as what was there
 *   before it. A slice pushed out of the cache says the same when it is back.
 * - New metadata takes all back: in a damaged image it may lie where an entry points.
 * - `exclusively` (snapshots, resize, a regular end) takes all back before it begins, and nothing is learned until it ends.
 * - A failed flush, damage found, and bitmaps that follow the disk end writing.
 * - A flush makes durable what the files hold: these writes are in them like any other.
 */
import { FileMap } from 'tcmu';
import type { QcowImage } from './image.js';

/** 1 MiB of memory: 4 GiB of the disk with clusters of 64 KiB. */
const MOST_UNITS = 65536;

export class ExpressPlaces {
  readonly map: FileMap;
  readonly #image: QcowImage;
  readonly #mayWrite: (host: number, length: number) => boolean;

  /** Only while nothing is under way. */
  constructor(image: QcowImage, isDataPlace: (host: number, length: number) => boolean) {
    const { geometry, mapping, refcounts, sync, acknowledgesWritten } = image;
    const unit = geometry.subclusterSize;
    const units = 2 ** Math.ceil(Math.log2(Math.max(1, image.size / unit)));
    this.#image = image;
    this.map = new FileMap({ unit, units: Math.min(MOST_UNITS, units) });
    this.#mayWrite = (host, length) =>
      (!acknowledgesWritten || sync.isWritten) && isDataPlace(host, length);
    mapping.onChange = (position, length) => this.map.forget(position, length);
    refcounts.metadata.onAdd = () => this.map.clear();
    this.limit();
  }

  /** Notes the places of a request's bytes, as they are now. Nothing runs exclusively. */
  learn(position: number, length: number): void {
    const { geometry, reader } = this.#image;
    const unit = geometry.subclusterSize;
    const start = position - (position % unit);
    const end = Math.ceil((position + length) / unit) * unit;
    reader.mapInto(this.map, start, end - start, this.#mayWrite);
  }

  /** Sets how far the map may be used now: the size may have changed, and whether anything is written at all. */
  limit(): void {
    const { size, readOnly, bitmaps, sync } = this.#image;
    const writes = !readOnly && bitmaps === undefined && sync.failure === undefined;
    this.map.allow(size, writes ? size : 0);
  }
}
