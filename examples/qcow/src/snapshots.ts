// SPDX-License-Identifier: Apache-2.0
/**
 * Internal snapshots of a running image. Each operation runs exclusively and is one switch of the
 * metadata (`restructure`): it has happened or it hasn't, wherever it is stopped.
 *
 * A new snapshot takes the L1 and L2 tables over as they are; the disk goes on with copies in which no
 * cluster may be written in place.
 */
import { ClusterCounts } from './cluster-counts.js';
import { QcowError } from './errors.js';
import { Autoclear, hasFeature, l1EntriesFor } from './format/header.js';
import type { Snapshot } from './format/snapshot-table.js';
import type { QcowImage } from './image.js';
import { countTree } from './restructure.js';

export interface SnapshotInfo {
  readonly id: string;
  readonly name: string;
  readonly date: Date;
  /** Bytes of the disk then. */
  readonly diskSize: number;
  readonly vmStateSize: bigint;
}

export class Snapshots {
  readonly #image: QcowImage;

  constructor(image: QcowImage) {
    this.#image = image;
  }

  list(): SnapshotInfo[] {
    const { snapshots, header } = this.#image;
    return snapshots.map(({ id, name, date, diskSize, vmStateSize }) => ({
      id,
      name,
      date: new Date(date.seconds * 1000 + Math.floor(date.nanoseconds / 1e6)),
      diskSize: diskSize ?? header.size,
      vmStateSize,
    }));
  }

  /** Keeps the disk as it is now, everything acknowledged included. @returns the new snapshot's id */
  create(name: string): Promise<string> {
    return this.#change(async (image) => {
      const { header, geometry, mapping } = image;
      if (Buffer.byteLength(name) > 0xffff || name === '') {
        throw this.#refuse('a snapshot needs a name of 1 to 65535 bytes');
      }
      if (image.snapshots.length >= 65536) throw this.#refuse('it has 65536 snapshots already');
      const id = String(1 + Math.max(0, ...image.snapshots.map((one) => Number(one.id) || 0)));
      const now = Date.now();
      const snapshot: Snapshot = {
        id,
        name,
        l1Offset: header.l1Offset,
        l1Size: header.l1Size,
        date: { seconds: Math.floor(now / 1000), nanoseconds: (now % 1000) * 1e6 },
        guestClock: 0n,
        vmStateSize: 0n,
        diskSize: header.size,
        icount: undefined,
        unknownExtra: new Uint8Array(0),
      };
      const deltas = new ClusterCounts();
      const l1 = mapping.l1.slice(0, header.l1Size * 8);
      await countTree(image.file, geometry, l1, 1, deltas);
      const snapshots = [...image.snapshots, snapshot];
      await image.replaceMetadata({ l1, oldL1: 'kept', snapshots, deltas });
      return id;
    });
  }

  /** Makes the disk what it was. What has been written since is gone. @returns the disk's size */
  revert(idOrName: string): Promise<number> {
    return this.#change(async (image) => {
      const { header, geometry, mapping } = image;
      const snapshot = this.#find(idOrName);
      const size = snapshot.diskSize ?? header.size;
      const { clusterBits, extended } = geometry;
      const entries = Math.max(snapshot.l1Size, l1EntriesFor(size, clusterBits, extended));
      const l1 = new Uint8Array(entries * 8);
      await image.file.read(l1.subarray(0, snapshot.l1Size * 8), snapshot.l1Offset);
      const deltas = new ClusterCounts();
      await countTree(image.file, geometry, l1, 1, deltas);
      const old = mapping.l1.slice(0, header.l1Size * 8);
      await countTree(image.file, geometry, old, -1, deltas);
      const before = header.size;
      // They have the disk's size, too; until the switch the image says that they don't count.
      if (size !== before) await image.bitmaps?.resize(size);
      header.size = size;
      try {
        const { snapshots } = image;
        await image.replaceMetadata({ l1, oldL1: 'given up', snapshots, deltas });
      } catch (error) {
        header.size = before;
        if (size !== before) image.giveUpBitmaps();
        throw error;
      }
      image.bitmaps?.mark(0, size);
      return image.size;
    });
  }

  delete(idOrName: string): Promise<void> {
    return this.#change(async (image) => {
      const { header, geometry, mapping } = image;
      const snapshot = this.#find(idOrName);
      const old = new Uint8Array(snapshot.l1Size * 8);
      await image.file.read(old, snapshot.l1Offset);
      const deltas = new ClusterCounts();
      await countTree(image.file, geometry, old, -1, deltas);
      deltas.addRange(snapshot.l1Offset, old.length, geometry.clusterSize, -1);
      const rest = image.snapshots.filter((one) => one !== snapshot);
      const l1 = mapping.l1.slice(0, header.l1Size * 8);
      await image.replaceMetadata({ l1, oldL1: 'given up', snapshots: rest, deltas });
    });
  }

  #refuse(problem: string): QcowError {
    return new QcowError('ERR_TCMU_QCOW_STATE', problem, { path: this.#image.path });
  }

  /** By id first, as QEMU does, then by name. */
  #find(idOrName: string): Snapshot {
    const { snapshots } = this.#image;
    const found =
      snapshots.find(({ id }) => id === idOrName) ??
      snapshots.find(({ name }) => name === idOrName);
    if (found === undefined) throw this.#refuse(`it has no snapshot ${JSON.stringify(idOrName)}`);
    return found;
  }

  async #change<T>(run: (image: QcowImage) => Promise<T>): Promise<T> {
    const image = this.#image;
    if (image.readOnly) {
      throw new QcowError('ERR_TCMU_QCOW_READ_ONLY', 'it is open for reading only', {
        path: image.path,
        operation: 'snapshot',
      });
    }
    if (image.geometry.dataFile || hasFeature(image.header.autoclear, Autoclear.DATA_FILE_RAW)) {
      throw this.#refuse('the format has no snapshots of images with an external data file');
    }
    return image.exclusively(() => run(image));
  }
}
