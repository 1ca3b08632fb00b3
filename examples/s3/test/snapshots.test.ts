// SPDX-License-Identifier: Apache-2.0
/** Snapshots while writing, clones, collection: what a pin names stays, and the rest goes. */
import { describe, expect, it } from 'vitest';
import { checkDisk, cloneDisk, createDisk, deleteDisk, readingParts } from '../src/engine/admin.js';
import { sweep } from '../src/engine/garbage.js';
import { loadState } from '../src/engine/opening.js';
import { deleteSnapshot, listSnapshots, pinNow } from '../src/engine/snapshots.js';
import type { ObjectStore } from '../src/object-store.js';
import { S3Disk } from '../src/s3-disk.js';
import { CutStore } from './support/cut-store.js';
import {
  causeOf,
  create,
  homeIn,
  KiB,
  MiB,
  Model,
  open,
  PREFIX,
  readAll,
  requestsOf,
  SMALL,
  write,
} from './support/disk.js';
import { MemoryBucket } from './support/memory-objects.js';
import { randomNumbers } from './support/random.js';

const block = (value: number): Buffer => Buffer.alloc(4 * KiB, value);

async function randomWrites(disk: S3Disk, model: Buffer, random: () => number, count: number) {
  for (let i = 0; i < count; i++) {
    const position = Math.floor(random() * 256) * 4096;
    const bytes = block(1 + Math.floor(random() * 255));
    await write(disk, position, bytes);
    bytes.copy(model, position);
  }
}

async function clone(objects: ObjectStore, target: string, snapshot?: string): Promise<S3Disk> {
  await cloneDisk(requestsOf(objects), PREFIX, snapshot, target, undefined);
  return S3Disk.open(objects, target, SMALL);
}

async function problems(objects: ObjectStore, prefix = PREFIX): Promise<string[]> {
  const result = await checkDisk(await readingParts(requestsOf(objects), prefix, undefined));
  return result.problems;
}

describe('snapshots', () => {
  it.each([1, 2, 3, 4])('keep their contents whatever happens later (seed %i)', async (seed) => {
    const random = randomNumbers(seed);
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const disk = await open(bucket.connect(seed));
    const model = Buffer.alloc(MiB);
    const kept = new Map<string, Buffer>();
    for (let i = 0; i < 12; i++) {
      await randomWrites(disk, model, random, 40);
      if (random() < 0.5) await disk.checkpoint();
      await disk.snapshot(`s${i}`);
      kept.set(`s${i}`, Buffer.from(model));
      if (random() < 0.4) {
        const name = [...kept.keys()][Math.floor(random() * kept.size)] as string;
        kept.delete(name);
        await deleteSnapshot(requestsOf(bucket.connect()), PREFIX, name);
      }
      if (random() < 0.3) await disk.collect();
    }
    await disk.checkpoint();
    await disk.collect();
    for (const [name, expected] of kept) {
      const snapshot = await open(bucket.connect(), { snapshot: name });
      expect((await readAll(snapshot)).equals(expected)).toBe(true);
      expect(await causeOf(() => write(snapshot, 0, block(1)))).toBe('ERR_TCMU_S3_READ_ONLY');
      await snapshot.close();
    }
    expect(await problems(bucket.connect())).toEqual([]);
    for (const name of kept.keys()) {
      await deleteSnapshot(requestsOf(bucket.connect()), PREFIX, name);
    }
    await disk.collect();
    expect((await readAll(disk)).equals(model)).toBe(true);
    // One manifest, the leaves it names, at most one object a chunk: nothing else is left.
    const left = (kind: string): number => bucket.keys(`${homeIn(bucket)}/${kind}/`).length;
    expect([left('m'), left('l'), left('p')]).toEqual([1, 1, 0]);
    expect(left('c')).toBeLessThanOrEqual(MiB / (16 * KiB));
    await disk.close();
  });

  it.each([1, 2, 3, 4, 5, 6])(
    'from outside are a prefix of a busy writer’s writes (seed %i)',
    async (seed) => {
      const random = randomNumbers(seed);
      const bucket = new MemoryBucket();
      await create(bucket.connect());
      const disk = await open(bucket.connect(seed));
      const model = new Model(MiB);
      let busy = true;
      const work = (async () => {
        while (busy) {
          const position = Math.floor(random() * 256) * 4096;
          const bytes = block(1 + Math.floor(random() * 255));
          model.note({ kind: 'data', position, bytes });
          await write(disk, position, bytes);
          if (random() < 0.1) await disk.flush();
          if (random() < 0.02) await disk.checkpoint();
          if (random() < 0.1) await new Promise((resolve) => setImmediate(resolve));
        }
      })();
      const outside = bucket.connect(seed + 100);
      const names = ['a', 'b', 'c'];
      for (const name of names) {
        const parts = await readingParts(requestsOf(outside), PREFIX, undefined);
        try {
          await pinNow(parts, { name, kind: 'snapshot' });
        } catch (error) {
          // Checkpoints here are a thousand times as frequent as in the world.
          expect((error as { code?: string }).code).toBe('ERR_TCMU_S3_IN_USE');
          names.splice(names.indexOf(name));
          break;
        }
        for (let turn = 0; turn < 100; turn++) await new Promise((r) => setImmediate(r));
      }
      busy = false;
      await work;
      await disk.checkpoint();
      await disk.collect();
      for (const name of names) {
        const snapshot = await open(bucket.connect(), { snapshot: name });
        expect(model.holds(await readAll(snapshot))).toBe(true);
        await snapshot.close();
      }
      await disk.close();
    },
  );

  it('have names of their own', async () => {
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const disk = await open(bucket.connect());
    await disk.snapshot('one');
    expect(await causeOf(() => disk.snapshot('one'))).toBe('ERR_TCMU_S3_IN_USE');
    expect(await causeOf(() => disk.snapshot('../x'))).toBe('ERR_TCMU_S3_IN_USE');
    expect(await causeOf(() => open(bucket.connect(), { snapshot: 'two' }))).toBe(
      'ERR_TCMU_S3_NOT_A_DISK',
    );
    expect((await listSnapshots(requestsOf(bucket.connect()), PREFIX)).length).toBe(1);
    await disk.close();
  });
});

describe('a clone', () => {
  it('begins as its origin and goes its own way; so do its clones', async () => {
    const random = randomNumbers(3);
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const disk = await open(bucket.connect());
    const model = Buffer.alloc(MiB);
    await randomWrites(disk, model, random, 200);
    await disk.checkpoint();
    await randomWrites(disk, model, random, 20);
    await disk.unmap(512 * KiB, 64 * KiB);
    model.fill(0, 512 * KiB, 576 * KiB);
    await disk.snapshot('base');
    const atBase = Buffer.from(model);
    await randomWrites(disk, model, random, 100);
    await disk.checkpoint();
    await disk.collect();
    const chunks = bucket.keys(`${homeIn(bucket)}/c/`).length;
    const first = await clone(bucket.connect(), 'disks/first', 'base');
    expect(bucket.keys(`${homeIn(bucket, 'disks/first')}/c/`)).toEqual([]);
    expect(bucket.keys(`${homeIn(bucket)}/c/`).length).toBe(chunks);
    expect((await readAll(first)).equals(atBase)).toBe(true);
    const ofFirst = Buffer.from(atBase);
    await randomWrites(first, ofFirst, random, 60);
    await first.checkpoint();
    await randomWrites(first, ofFirst, random, 10);
    await first.close();
    // The clone of a clone uses the objects of both.
    const requests = requestsOf(bucket.connect());
    await cloneDisk(requests, 'disks/first', undefined, 'disks/second', undefined);
    const second = await S3Disk.open(bucket.connect(), 'disks/second', SMALL);
    expect((await readAll(second)).equals(ofFirst)).toBe(true);
    await randomWrites(second, Buffer.from(ofFirst), random, 60);
    await second.checkpoint();
    await second.collect();
    await second.close();
    await deleteSnapshot(requests, PREFIX, 'base');
    await disk.collect();
    expect((await readAll(disk)).equals(model)).toBe(true);
    const again = await S3Disk.open(bucket.connect(), 'disks/first', SMALL);
    expect((await readAll(again)).equals(ofFirst)).toBe(true);
    await again.collect();
    await again.close();
    for (const prefix of [PREFIX, 'disks/first', 'disks/second']) {
      expect(await problems(bucket.connect(), prefix)).toEqual([]);
    }
    expect(await causeOf(() => deleteDisk(requests, PREFIX, false))).toBe('ERR_TCMU_S3_IN_USE');
    expect(await causeOf(() => deleteDisk(requests, 'disks/first', false))).toBe(
      'ERR_TCMU_S3_IN_USE',
    );
    await deleteDisk(requests, 'disks/second', false);
    await deleteDisk(requests, 'disks/first', false);
    await disk.close();
    await deleteDisk(requests, PREFIX, false);
    expect(bucket.keys()).toEqual([]);
  });

  it.each([
    ['of a snapshot', 'base', undefined],
    ['of an encrypted disk', undefined, () => Buffer.alloc(32, 7)],
  ])('%s that is cut at any request is whole, or not there', async (_, snapshot, key) => {
    const random = randomNumbers(5);
    const origin = new MemoryBucket();
    await create(origin.connect(), { key });
    const first = await open(origin.connect(), { key });
    const model = Buffer.alloc(MiB);
    await randomWrites(first, model, random, 40);
    await first.checkpoint();
    await randomWrites(first, model, random, 10);
    await first.unmap(512 * KiB, 64 * KiB);
    model.fill(0, 512 * KiB, 576 * KiB);
    await first.snapshot('base');
    if (snapshot === undefined) await deleteSnapshot(requestsOf(origin.connect()), PREFIX, 'base');
    await first.close();
    const target = 'disks/first';
    const outcomes = new Map<unknown, number>();
    const cut = async (after: number, arrives: boolean): Promise<boolean> => {
      const bucket = new MemoryBucket();
      for (const [name, stored] of origin.objects) bucket.objects.set(name, stored);
      const objects = bucket.connect();
      const requests = requestsOf(objects);
      const cloneAgain = () => cloneDisk(requests, PREFIX, snapshot, target, key);
      let died = (): void => {};
      const death = new Promise<void>((resolve) => {
        died = resolve;
      });
      const store = new CutStore(objects, after, () => (arrives ? 1 : 0), died);
      await Promise.race([death, cloneDisk(requestsOf(store), PREFIX, snapshot, target, key)]);
      await store.settled();
      // The origin goes on, and collects what it takes for garbage.
      const disk = await open(objects, { key });
      const later = Buffer.from(model);
      await randomWrites(disk, later, random, 20);
      await disk.checkpoint();
      await disk.collect();
      let outcome: unknown = 'whole';
      try {
        const found = await S3Disk.open(objects, target, { ...SMALL, key });
        expect((await readAll(found)).equals(model)).toBe(true);
        await found.close();
        expect(await causeOf(cloneAgain)).toBe('ERR_TCMU_S3_EXISTS');
      } catch (error) {
        outcome = (error as { code?: unknown }).code;
        if (outcome !== 'ERR_TCMU_S3_UNFINISHED' && outcome !== 'ERR_TCMU_S3_NOT_A_DISK')
          throw error;
      }
      outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1);
      if (outcome === 'ERR_TCMU_S3_UNFINISHED') {
        expect(await causeOf(cloneAgain)).toBe(outcome);
        expect(await causeOf(() => createDisk(requests, target, { size: MiB }))).toBe(outcome);
      }
      if (outcome !== 'ERR_TCMU_S3_NOT_A_DISK') await deleteDisk(requests, target, false);
      expect(bucket.keys(`${target}/`)).toEqual([]);
      expect(bucket.keys(`${homeIn(bucket)}/p/`)).toEqual(origin.keys(`${homeIn(bucket)}/p/`));
      await cloneAgain();
      const again = await S3Disk.open(objects, target, { ...SMALL, key });
      expect((await readAll(again)).equals(snapshot === undefined ? later : model)).toBe(true);
      await again.close();
      await deleteDisk(requests, target, false);
      if (snapshot !== undefined) await deleteSnapshot(requests, PREFIX, snapshot);
      await disk.collect();
      expect((await readAll(disk)).equals(later)).toBe(true);
      await disk.close();
      const checked = await checkDisk(await readingParts(requests, PREFIX, key));
      expect([checked.problems, checked.unused]).toEqual([[], 0]);
      return store.dead;
    };
    for (let after = 0; await cut(after, false); after++) await cut(after, true);
    expect([...outcomes.keys()].sort()).toEqual([
      'ERR_TCMU_S3_NOT_A_DISK',
      'ERR_TCMU_S3_UNFINISHED',
      'whole',
    ]);
  });

  it('whose deletion is cut at any request can be deleted again, with its pin', async () => {
    const origin = new MemoryBucket();
    await create(origin.connect());
    const disk = await open(origin.connect());
    await randomWrites(disk, Buffer.alloc(MiB), randomNumbers(6), 40);
    await disk.close();
    await (await clone(origin.connect(), 'disks/first')).close();
    const outcomes = new Set<unknown>();
    const cut = async (after: number): Promise<boolean> => {
      const bucket = new MemoryBucket();
      for (const [name, stored] of origin.objects) bucket.objects.set(name, stored);
      const requests = requestsOf(bucket.connect());
      let died = (): void => {};
      const death = new Promise<void>((resolve) => {
        died = resolve;
      });
      const store = new CutStore(bucket.connect(), after, () => 1, died);
      await Promise.race([death, deleteDisk(requestsOf(store), 'disks/first', false)]);
      await store.settled();
      const found = S3Disk.open(bucket.connect(), 'disks/first', SMALL);
      const outcome = await found.then(
        (there) => there.close(),
        (error: { code?: unknown }) => error.code,
      );
      outcomes.add(outcome);
      // What said that it is being deleted may be left.
      await deleteDisk(requests, 'disks/first', outcome === 'ERR_TCMU_S3_NOT_A_DISK');
      expect(bucket.keys('disks/first/')).toEqual([]);
      expect(await listSnapshots(requests, PREFIX)).toEqual([]);
      return store.dead;
    };
    for (let after = 0; await cut(after); after++);
    expect(outcomes).toEqual(
      new Set([undefined, 'ERR_TCMU_S3_UNFINISHED', 'ERR_TCMU_S3_NOT_A_DISK']),
    );
  });
});

describe('a sweep', () => {
  it('beside a writer takes nothing that is needed', async () => {
    const random = randomNumbers(9);
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const disk = await open(bucket.connect());
    const model = Buffer.alloc(MiB);
    let swept = 0;
    for (let round = 0; round < 10; round++) {
      const parts = await readingParts(requestsOf(bucket.connect(round)), PREFIX, undefined);
      const sweeping = loadState(parts)
        .then(({ manifest }) =>
          sweep(parts.requests, parts.codec, parts.prefix, parts.disk, manifest),
        )
        .then(
          () => swept++,
          () => {},
        );
      await randomWrites(disk, model, random, 60);
      await disk.checkpoint();
      await sweeping;
    }
    expect(swept).toBeGreaterThan(0);
    expect((await readAll(disk)).equals(model)).toBe(true);
    await disk.close();
    expect(await problems(bucket.connect())).toEqual([]);
  });
});

describe('a follower', () => {
  it('sees what was flushed, in order, through checkpoints and collections', async () => {
    const random = randomNumbers(11);
    const bucket = new MemoryBucket();
    await create(bucket.connect());
    const disk = await open(bucket.connect());
    const follower = await open(bucket.connect(2), { mode: 'follow' });
    const model = Buffer.alloc(MiB);
    await randomWrites(disk, model, random, 300);
    await disk.checkpoint();
    const lazy = await open(bucket.connect(3), { mode: 'follow' });
    for (let round = 0; round < 15; round++) {
      await randomWrites(disk, model, random, 50);
      if (random() < 0.5) await disk.checkpoint();
      await disk.flush();
      expect(await follower.refresh()).toBe(true);
      expect((await readAll(follower)).equals(model)).toBe(true);
    }
    await disk.resize(2 * MiB);
    await follower.refresh();
    expect(follower.size).toBe(2 * MiB);
    // One that slept: its map names objects that are gone.
    await disk.checkpoint();
    expect((await readAll(lazy, 0, MiB)).equals(model)).toBe(true);
    expect(await causeOf(() => lazy.flush())).toBe('ERR_TCMU_S3_READ_ONLY');
    for (const one of [disk, follower, lazy]) await one.close();
  });
});
