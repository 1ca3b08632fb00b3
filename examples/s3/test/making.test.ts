// SPDX-License-Identifier: Apache-2.0
/**
 * Two who make or delete a disk at one place, interleaved at every pair of their requests, and one that is killed at each of its
 * requests before the other comes: a place is free, or exactly one wanted disk's, or refused by name.
 */
import { beforeAll, describe, expect, it } from 'vitest';
import { checkDisk, cloneDisk, createDisk, deleteDisk, readingParts } from '../src/engine/admin.js';
import { type ObjectStore, ObjectStoreError } from '../src/object-store.js';
import { S3Disk } from '../src/s3-disk.js';
import {
  create,
  GEOMETRY,
  KiB,
  MiB,
  open,
  PREFIX,
  readAll,
  requestsOf,
  SMALL,
  write,
} from './support/disk.js';
import { MemoryBucket } from './support/memory-objects.js';
import { Turns } from './support/turns.js';

const TARGET = 'disks/new';
const key = () => Buffer.alloc(32, 9);

/** What somebody does, and the disk that comes of it; answers its id. */
interface Deed {
  run(store: ObjectStore): Promise<string | undefined>;
  /** The first byte of each MiB, by which disks are told. */
  readonly makes: readonly number[] | undefined;
  readonly key?: typeof key;
}

const deeds = {
  create: {
    run: async (store) =>
      (await createDisk(requestsOf(store), TARGET, { size: 3 * MiB, ...GEOMETRY })).id,
    makes: [0, 0, 0],
  },
  'create encrypted': {
    run: async (store) => {
      const options = { size: 2 * MiB, ...GEOMETRY, key };
      return (await createDisk(requestsOf(store), TARGET, options)).id;
    },
    makes: [0, 0],
    key,
  },
  clone: {
    run: async (store) =>
      (await cloneDisk(requestsOf(store), PREFIX, undefined, TARGET, undefined)).id,
    makes: [2],
  },
  'clone a snapshot': {
    run: async (store) =>
      (await cloneDisk(requestsOf(store), PREFIX, 'base', TARGET, undefined)).id,
    makes: [1],
  },
  delete: {
    run: async (store) => {
      await deleteDisk(requestsOf(store), TARGET, false);
      return undefined;
    },
    makes: undefined,
  },
  'delete the origin': {
    run: async (store) => {
      await deleteDisk(requestsOf(store), PREFIX, false);
      return undefined;
    },
    makes: undefined,
  },
} satisfies Record<string, Deed>;
type Name = keyof typeof deeds;
const refused = ['ERR_TCMU_S3_EXISTS', 'ERR_TCMU_S3_UNFINISHED'];

const empty = new MemoryBucket();
const afterClone = new MemoryBucket();

function copyOf(bucket: MemoryBucket): MemoryBucket {
  const copy = new MemoryBucket();
  for (const [name, stored] of bucket.objects) copy.objects.set(name, stored);
  return copy;
}

beforeAll(async () => {
  await create(empty.connect());
  const disk = await open(empty.connect());
  await write(disk, 0, Buffer.alloc(4 * KiB, 1));
  await disk.checkpoint();
  await disk.snapshot('base');
  await write(disk, 0, Buffer.alloc(4 * KiB, 2));
  await disk.close();
  for (const [name, stored] of empty.objects) afterClone.objects.set(name, stored);
  await deeds.clone.run(afterClone.connect());
});

const codeOf = (outcome: Turns<unknown>['outcome']): unknown => {
  if (outcome === undefined) return 'killed';
  if (!('error' in outcome)) return undefined;
  const { code } = outcome.error as { code?: unknown };
  if (code === undefined) throw outcome.error;
  return code;
};

/** What is at a place: why it can't be opened, or the disk's id and contents, every object of which is verified. */
async function look(bucket: MemoryBucket, place: string, name?: Deed['key']) {
  const objects = bucket.connect(1, 1);
  try {
    const disk = await S3Disk.open(objects, place, { ...SMALL, key: name });
    const { id } = disk.record;
    const found: number[] = [];
    for (let at = 0; at < disk.size; at += MiB) {
      found.push((await readAll(disk, at, 4 * KiB))[0] as number);
    }
    await disk.close();
    const { problems } = await checkDisk(await readingParts(requestsOf(objects), place, name));
    expect(problems).toEqual([]);
    return { id, found };
  } catch (error) {
    const { code } = error as { code?: string };
    if (code === undefined) throw error;
    return { code };
  }
}

const pinsIn = (bucket: MemoryBucket) =>
  bucket.keys(`${PREFIX}/`).filter((name) => name.includes('/p/clone-')).length;

/** @returns what is at the place, which must be one of the deeds' or `before` */
async function lookAsAnybody(bucket: MemoryBucket, names: readonly Name[]) {
  let seen = await look(bucket, TARGET);
  if (seen.code === 'ERR_TCMU_S3_KEY') seen = await look(bucket, TARGET, key);
  if (seen.code !== undefined) {
    expect(['ERR_TCMU_S3_NOT_A_DISK', 'ERR_TCMU_S3_UNFINISHED']).toContain(seen.code);
    return seen;
  }
  const wanted = names.map((name) => deeds[name].makes).filter((made) => made !== undefined);
  expect([...wanted, deeds.clone.makes]).toContainEqual(seen.found);
  return seen;
}

/** Nothing is left but the origin, with its snapshot, whole. */
async function cleanUp(bucket: MemoryBucket, seen: { code?: string | undefined }): Promise<void> {
  const requests = requestsOf(bucket.connect(1, 1));
  await deleteDisk(requests, TARGET, seen.code === 'ERR_TCMU_S3_NOT_A_DISK');
  expect(bucket.keys(`${TARGET}/`)).toEqual([]);
  expect(pinsIn(bucket)).toBe(0);
}

/** Every pair of numbers of requests: so many of the first, so many of the second, the rest of the first, the rest. */
async function everyOrder(
  begin: MemoryBucket,
  names: readonly [Name, Name],
  judge: (
    bucket: MemoryBucket,
    both: readonly [Turns<string | undefined>, Turns<string | undefined>],
  ) => Promise<void>,
): Promise<number> {
  let orders = 0;
  for (let first = 0, isOver = false; !isOver; first++) {
    for (let second = 1, isSecondOver = false; !isSecondOver; second++) {
      const bucket = copyOf(begin);
      const [a, b] = names.map((name) => new Turns(bucket.connect(1, 1), deeds[name].run)) as [
        Turns<string | undefined>,
        Turns<string | undefined>,
      ];
      isOver = await a.go(first);
      isSecondOver = await b.go(second);
      await a.go();
      await b.go();
      await judge(bucket, [a, b]);
      orders++;
    }
  }
  return orders;
}

describe('two who make a disk at one place', () => {
  it.each<[Name, Name]>([
    ['create', 'create'],
    ['create', 'create encrypted'],
    ['create encrypted', 'create encrypted'],
    ['create', 'clone'],
    ['create encrypted', 'clone a snapshot'],
    ['clone', 'create'],
    ['clone', 'clone a snapshot'],
  ])('%s and %s: one of them does', async (...names) => {
    const orders = await everyOrder(empty, names, async (bucket, both) => {
      const codes = both.map(({ outcome }) => codeOf(outcome));
      const winner = codes.indexOf(undefined);
      expect(codes[1 - winner]).toBeOneOf(refused);
      const seen = await lookAsAnybody(bucket, names);
      const { outcome } = both[winner] as Turns<string>;
      expect(seen).toEqual({
        id: (outcome as { value: string }).value,
        found: deeds[names[winner] as Name].makes,
      });
      expect(pinsIn(bucket)).toBe(names[winner]?.startsWith('clone') ? 1 : 0);
      await cleanUp(bucket, seen);
    });
    expect(orders).toBeGreaterThan(10);
  });
});

describe('one who deletes, and another', () => {
  it.each<[string, Name, Name]>([
    ['nobody’s', 'create', 'delete'],
    ['nobody’s', 'create encrypted', 'delete'],
    ['nobody’s', 'clone', 'delete'],
    ['nobody’s', 'delete', 'clone a snapshot'],
    ['a clone’s', 'delete', 'create'],
    ['a clone’s', 'delete', 'create encrypted'],
    ['a clone’s', 'delete', 'clone a snapshot'],
    ['a clone’s', 'create', 'delete'],
    ['a clone’s', 'delete', 'delete'],
  ])('at a place that is %s: %s, %s', async (owner, ...names) => {
    const seenAll = new Set<string>();
    await everyOrder(owner === 'nobody’s' ? empty : afterClone, names, async (bucket, both) => {
      const codes = both.map(({ outcome }) => codeOf(outcome));
      const seen = await lookAsAnybody(bucket, names);
      expect(seen.code).not.toBe('ERR_TCMU_S3_UNFINISHED');
      const maker = names.findIndex((name) => name !== 'delete');
      const made = both[maker]?.outcome;
      if (seen.code === undefined && made !== undefined && 'value' in made) {
        expect(seen.id).toBe(made.value);
      }
      // What was made is there, unless it was deleted; and who could not make it says so.
      if (seen.code !== undefined) expect(codes).toContain(undefined);
      else if (maker >= 0) expect(codes[maker]).toBeUndefined();
      for (const code of codes) {
        expect([undefined, ...refused, 'ERR_TCMU_S3_NOT_A_DISK', 'ERR_TCMU_S3_IN_USE']).toContain(
          code,
        );
      }
      seenAll.add(String(codes));
      await cleanUp(bucket, seen);
    });
    expect(seenAll.size).toBeGreaterThan(1);
  });

  it('so slowly that the disk is gone and the place another’s meanwhile: that one stays', async () => {
    for (let after = 1, isOver = false; !isOver; after++) {
      const bucket = copyOf(afterClone);
      const slow = new Turns(bucket.connect(1, 1), deeds.delete.run);
      isOver = await slow.go(after);
      const other = new Turns(bucket.connect(1, 1), deeds.delete.run);
      await other.go();
      const maker = new Turns(bucket.connect(1, 1), deeds['clone a snapshot'].run);
      await maker.go();
      expect(codeOf(maker.outcome)).toBeUndefined();
      await slow.go();
      const seen = await lookAsAnybody(bucket, ['clone a snapshot']);
      expect(seen).toMatchObject({ found: [1] });
      await cleanUp(bucket, seen);
    }
  });

  it.each(['', 'matches-nothing'])(
    'of a store whose ETags are %j: the place is free',
    async (etag) => {
      const bucket = copyOf(afterClone);
      const store = bucket.connect(1, 1);
      const get = store.get.bind(store);
      store.get = async (name, options) => ({ ...(await get(name, options)), etag });
      await deleteDisk(requestsOf(store), TARGET, false);
      expect(bucket.keys(`${TARGET}/`)).toEqual([]);
    },
  );

  it.each<[Name, Name]>([
    ['clone', 'delete the origin'],
    ['delete the origin', 'clone a snapshot'],
  ])('%s, %s: a clone never lacks its origin', async (...names) => {
    const outcomes = new Set<string>();
    await everyOrder(empty, names, async (bucket, both) => {
      const codes = both.map(({ outcome }) => codeOf(outcome));
      const origin = await look(bucket, PREFIX);
      const seen = await lookAsAnybody(bucket, names);
      const cloned = codes[names.findIndex((name) => name !== 'delete the origin')] === undefined;
      const deleted = codes[names.indexOf('delete the origin')] === undefined;
      expect(cloned && deleted).toBe(false);
      expect(seen.code).toBe(cloned ? undefined : 'ERR_TCMU_S3_NOT_A_DISK');
      expect(origin.code).toBe(deleted ? 'ERR_TCMU_S3_NOT_A_DISK' : undefined);
      outcomes.add(String(codes));
      await cleanUp(bucket, seen);
      if (!deleted) await deleteDisk(requestsOf(bucket.connect(1, 1)), PREFIX, false);
      expect(bucket.keys()).toEqual([]);
    });
    expect(outcomes.size).toBeGreaterThan(1);
  });
});

describe('one who is killed at any request, and another after it', () => {
  const firsts: Name[] = ['create', 'create encrypted', 'clone', 'delete'];
  const seconds: Name[] = ['create encrypted', 'clone a snapshot', 'delete'];
  it.each(firsts.flatMap((first) => seconds.map((second) => [first, second] as const)))(
    '%s, %s',
    async (first, second) => {
      const begin = first === 'delete' ? afterClone : empty;
      for (const carriesOut of [false, true]) {
        for (let after = 0, isOver = false; !isOver; after++) {
          const bucket = copyOf(begin);
          const killed = new Turns(bucket.connect(1, 1), deeds[first].run);
          isOver = await killed.go(after);
          await killed.kill(carriesOut);
          const before = await lookAsAnybody(bucket, [first]);
          const other = new Turns(bucket.connect(1, 1), deeds[second].run);
          await other.go();
          const code = codeOf(other.outcome);
          const seen = await lookAsAnybody(bucket, [first, second]);
          if (second === 'delete') {
            const there = before.code !== 'ERR_TCMU_S3_NOT_A_DISK';
            expect(code).toBe(there ? undefined : 'ERR_TCMU_S3_NOT_A_DISK');
            expect(seen.code).toBe('ERR_TCMU_S3_NOT_A_DISK');
          } else if (before.code === 'ERR_TCMU_S3_NOT_A_DISK') {
            expect([code, seen.code]).toEqual([undefined, undefined]);
          } else {
            // Unfinished, or whole: as it was before.
            expect(code).toBe(before.code ?? 'ERR_TCMU_S3_EXISTS');
            expect(seen).toEqual(before);
          }
          await cleanUp(bucket, seen);
          await deleteDisk(requestsOf(bucket.connect(1, 1)), PREFIX, false);
          expect(bucket.keys()).toEqual([]);
        }
      }
    },
  );
});

it('a bucket that takes no record and shows none ends the making, and does not go on for ever', async () => {
  const store = new MemoryBucket().connect();
  let claims = 0;
  store.put = async (key) => {
    claims++;
    throw new ObjectStoreError('precondition', `put ${key}`);
  };
  await expect(
    createDisk(requestsOf(store), TARGET, { size: MiB, ...GEOMETRY }),
  ).rejects.toMatchObject({ failure: 'in-use' });
  expect(claims).toBeLessThan(100);
});
