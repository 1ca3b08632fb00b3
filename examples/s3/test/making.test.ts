// SPDX-License-Identifier: Apache-2.0
/**
 * Two who make or delete a disk at one place, interleaved at every pair of their requests, and one that is killed at each of its
 * requests before the other comes: a place is free, or exactly one wanted disk's, or refused by name.
 */
import { beforeAll, describe, expect, it } from 'vitest';
import { checkDisk, cloneDisk, createDisk, deleteDisk, readingParts } from '../src/engine/admin.js';
import { type Honoured, honouredIn } from '../src/engine/place.js';
import { encodeVacancy, isVacant, loadDisk } from '../src/engine/records.js';
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
import { type Fate, MemoryBucket } from './support/memory-objects.js';
import { available, newBucket, openBucket, serverKinds, startServer } from './support/servers.js';
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
/** Of one that honours conditions of PUTs alone: a clone was there and has been deleted. */
const afterDeletion = new MemoryBucket();
afterDeletion.conditionalDeletes = false;

function copyOf(bucket: MemoryBucket, conditionalDeletes = bucket.conditionalDeletes) {
  const copy = new MemoryBucket();
  copy.conditionalDeletes = conditionalDeletes;
  for (const [name, stored] of bucket.objects) copy.put(name, stored.body);
  return copy;
}

/** What there is, all but a note that the place is free. */
const keysOf = (bucket: MemoryBucket, prefix = ''): string[] =>
  bucket.keys(prefix).filter((name) => !isVacant(bucket.objects.get(name)?.body as Buffer));

beforeAll(async () => {
  await create(empty.connect());
  const disk = await open(empty.connect());
  await write(disk, 0, Buffer.alloc(4 * KiB, 1));
  await disk.checkpoint();
  await disk.snapshot('base');
  await write(disk, 0, Buffer.alloc(4 * KiB, 2));
  await disk.close();
  for (const [name, { body }] of empty.objects) {
    afterClone.put(name, body);
    afterDeletion.put(name, body);
  }
  await deeds.clone.run(afterClone.connect());
  await deeds.clone.run(afterDeletion.connect());
  await deeds.delete.run(afterDeletion.connect());
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
  expect(keysOf(bucket, `${TARGET}/`)).toEqual([]);
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
  it.each<[Name, Name, string]>([
    ['create', 'create', ''],
    ['create', 'create encrypted', ''],
    ['create encrypted', 'create encrypted', ''],
    ['create', 'clone', ''],
    ['create encrypted', 'clone a snapshot', ''],
    ['clone', 'create', ''],
    ['clone', 'clone a snapshot', ''],
    ['create', 'create', ', with a note there'],
    ['create encrypted', 'clone a snapshot', ', with a note there'],
    ['clone', 'create', ', with a note there'],
  ])('%s and %s%s: one of them does', async (first, second, where) => {
    const names = [first, second] as const;
    const begin = where === '' ? empty : afterDeletion;
    const orders = await everyOrder(begin, names, async (bucket, both) => {
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
  const begins: Record<string, () => MemoryBucket> = {
    'nobody’s': () => empty,
    'a clone’s': () => afterClone,
    'nobody’s any more': () => afterDeletion,
    'a clone’s, with DELETEs unconditional': () => copyOf(afterClone, false),
  };
  it.each<[string, Name, Name]>([
    ['nobody’s', 'create', 'delete'],
    ['nobody’s', 'create encrypted', 'delete'],
    ['nobody’s', 'clone', 'delete'],
    ['nobody’s', 'delete', 'clone a snapshot'],
    ['nobody’s any more', 'create', 'delete'],
    ['nobody’s any more', 'delete', 'clone a snapshot'],
    ['a clone’s', 'delete', 'create'],
    ['a clone’s', 'delete', 'create encrypted'],
    ['a clone’s', 'delete', 'clone a snapshot'],
    ['a clone’s', 'create', 'delete'],
    ['a clone’s', 'delete', 'delete'],
    ['a clone’s, with DELETEs unconditional', 'delete', 'create'],
    ['a clone’s, with DELETEs unconditional', 'clone a snapshot', 'delete'],
    ['a clone’s, with DELETEs unconditional', 'delete', 'delete'],
  ])('at a place that is %s: %s, %s', async (owner, ...names) => {
    const seenAll = new Set<string>();
    await everyOrder((begins[owner] as () => MemoryBucket)(), names, async (bucket, both) => {
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

  it.each([
    ['', true],
    [', with DELETEs unconditional', false],
  ])(
    'so slowly that the disk is gone and the place another’s meanwhile: that one stays%s',
    async (_, conditional) => {
      for (let after = 1, isOver = false; !isOver; after++) {
        const bucket = copyOf(afterClone, conditional);
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
    },
  );

  it.each([
    ['', true],
    ['', false],
    ['matches-nothing', true],
    ['matches-nothing', false],
  ])(
    'of a store whose ETags are %j, conditional DELETEs %j: the place is free',
    async (etag, conditional) => {
      const bucket = copyOf(afterClone, conditional);
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
      expect(keysOf(bucket)).toEqual([]);
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
          expect(keysOf(bucket)).toEqual([]);
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

describe('what a store honours', () => {
  const home = `${TARGET}/0123`;
  const storeWith = (conditional: boolean, conditionalDeletes: boolean): MemoryBucket => {
    const bucket = new MemoryBucket();
    bucket.conditional = conditional;
    bucket.conditionalDeletes = conditionalDeletes;
    return bucket;
  };

  it.each<[boolean, boolean, Honoured]>([
    [true, true, 'delete'],
    [true, false, 'put'],
    [false, false, 'none'],
  ])('PUTs %j, DELETEs %j: %s', async (puts, deletes, honoured) => {
    const bucket = storeWith(puts, deletes);
    expect(await honouredIn(requestsOf(bucket.connect()), home)).toBe(honoured);
    expect(bucket.keys()).toEqual([]);
  });

  it('may be a refusal of conditions, and then none', async () => {
    const store = storeWith(false, false).connect();
    const put = store.put.bind(store);
    store.put = async (name, body, options = {}) => {
      if (options.ifMatch === undefined) return put(name, body, options);
      throw new ObjectStoreError('bad-request', `put ${name}`);
    };
    expect(await honouredIn(requestsOf(store), home)).toBe('none');
  });

  it.each<[string, (bucket: MemoryBucket) => Fate]>([
    ['an answer that is lost', () => ({ after: 'outage' })],
    [
      'somebody who deletes what is there',
      (bucket) => {
        bucket.objects.clear();
        return 'good';
      },
    ],
  ])('is found out in spite of %s, whenever that is', async (_, trouble) => {
    for (let at = 0, isOver = false; !isOver; at++) {
      const bucket = storeWith(true, false);
      let requests = 0;
      bucket.fate = () => (requests++ === at ? trouble(bucket) : 'good');
      expect(await honouredIn(requestsOf(bucket.connect()), home)).toBe('put');
      isOver = requests <= at;
    }
  });

  it('is found out in spite of a network that sends a PUT twice, whose second one is refused', async () => {
    const bucket = storeWith(true, false);
    let puts = 0;
    bucket.fate = (operation) =>
      operation === 'put' && ++puts === 3 ? { after: 'precondition' } : 'good';
    expect(await honouredIn(requestsOf(bucket.connect()), home)).toBe('put');
  });

  it('does not matter to a note: each is another', () => {
    expect(encodeVacancy().equals(encodeVacancy())).toBe(false);
    expect(isVacant(encodeVacancy())).toBe(true);
  });
});

describe.each(serverKinds)('a place in a bucket of %s', (kind) => {
  describe.skipIf(!available(kind))('is free when its disk is deleted', () => {
    it('and one of many gets it, each time', async () => {
      const server = await startServer(kind);
      const store = await openBucket(server, await newBucket(server));
      const place = async (): Promise<string[]> => {
        const found: string[] = [];
        for await (const { key: name } of store.list('d0/')) found.push(name);
        return found;
      };
      for (let round = 0; round < 3; round++) {
        const makers = Array.from({ length: 6 }, () =>
          createDisk(requestsOf(store), 'd0', { size: MiB, ...GEOMETRY }),
        );
        const made = await Promise.allSettled(makers);
        expect(made.filter(({ status }) => status === 'fulfilled')).toHaveLength(1);
        const deleters = Array.from({ length: 3 }, () =>
          deleteDisk(requestsOf(store), 'd0', false),
        );
        const deleted = await Promise.allSettled(deleters);
        expect(deleted.map(({ status }) => status)).toContain('fulfilled');
        // Ceph ignores conditions of DELETEs: there, a note is left.
        expect(await place()).toEqual(kind === 'memory' ? [] : ['d0/disk']);
        const gone = loadDisk(requestsOf(store), 'd0');
        await expect(gone).rejects.toMatchObject({ failure: 'not-a-disk' });
      }
      await store.close();
      await server.stop();
    });
  });
});
