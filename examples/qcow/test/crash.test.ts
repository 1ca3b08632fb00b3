// SPDX-License-Identifier: Apache-2.0
/**
 * Crash consistency: random operations, many at once, on an image whose file records every change; then
 * the power fails at every event, with everything that no flush covers there, gone, or partly there in
 * random pieces. Each time the image must have no errors (leaks are allowed) by our check and, on a
 * sample, by qemu-img's, and each sector must hold what was flushed or something newer.
 */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import * as fc from 'fast-check';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import { expect, test } from 'vitest';
import {
  type CreateOptions,
  checkImage,
  createImage,
  MemoryFile,
  QcowStore,
} from '../src/index.js';
import { CrashJournal, GuestHistory, type Keep, stamped } from '../src/testing/index.js';
import { KiB, qemuImg, scratch } from './util.js';

const SECTOR = 512;
const dir = scratch();
const thorough = process.env['TCMU_PROOF'] === 'all';
const context = { signal: new AbortController().signal, fua: false, mayUnmap: true };

type Step =
  | { readonly type: 'write' | 'unmap'; readonly start: number; readonly count: number }
  | { readonly type: 'flush' }
  | { readonly type: 'snapshot' | 'revert' | 'delete'; readonly name: string }
  | { readonly type: 'resize'; readonly sectors: number };

interface Subject {
  readonly name: string;
  readonly clusterSize: number;
  readonly clusters: number;
  readonly options?: Partial<CreateOptions>;
  readonly compress?: boolean;
  readonly snapshots?: boolean;
  readonly resize?: boolean;
  /** Acknowledged in memory: a kill of the process may lose it. */
  readonly memory?: boolean;
  /** Small changes, one after the other, mostly of clusters that are not there: space is ready when it is needed. */
  readonly small?: boolean;
  /** Clean only after repair, by the format: refcounts are behind while the dirty bit is set. */
  readonly dirty?: boolean;
}

const subjects: Subject[] = [
  { name: 'version 3', clusterSize: 4 * KiB, clusters: 24, snapshots: true, resize: true },
  {
    name: 'version 2, many tables',
    clusterSize: 512,
    clusters: 200,
    options: { version: 2 },
    snapshots: true,
  },
  { name: 'space made ready', clusterSize: KiB, clusters: 200, small: true },
  {
    name: 'growing refcount table',
    clusterSize: 512,
    clusters: 300,
    options: { refcountBits: 64 },
    resize: true,
  },
  {
    name: 'subclusters',
    clusterSize: 16 * KiB,
    clusters: 6,
    options: { extendedL2: true },
    snapshots: true,
  },
  { name: 'compressed', clusterSize: 4 * KiB, clusters: 24, compress: true },
  {
    name: 'acknowledged in memory',
    clusterSize: 4 * KiB,
    clusters: 24,
    memory: true,
    snapshots: true,
  },
  {
    name: 'lazy refcounts',
    clusterSize: 4 * KiB,
    clusters: 24,
    options: { lazyRefcounts: true },
    dirty: true,
  },
];

/** Groups of steps; those of a group are under way at once. */
function stepsOf(subject: Subject): fc.Arbitrary<Step[][]> {
  const { clusterSize, clusters, snapshots, resize, small } = subject;
  const perCluster = clusterSize / SECTOR;
  if (small) {
    const start = fc.nat(clusters * perCluster - 1);
    const step: fc.Arbitrary<Step> = fc.oneof(
      {
        weight: 5,
        arbitrary: fc.record({ type: fc.constant('write'), start, count: fc.constant(1) }),
      },
      {
        weight: 3,
        arbitrary: fc.record({
          type: fc.constant('unmap'),
          start,
          count: fc.constant(20 * perCluster),
        }),
      },
      { weight: 1, arbitrary: fc.constant<Step>({ type: 'flush' }) },
    );
    return fc.array(
      step.map((one) => [one]),
      { minLength: 40, maxLength: 60 },
    );
  }
  const range = {
    start: fc.oneof(
      fc.nat(clusters - 1).map((i) => i * perCluster),
      fc.nat(clusters * perCluster - 1),
    ),
    count: fc.oneof(
      fc.constantFrom(1, perCluster, 2 * perCluster),
      fc.integer({ min: 1, max: 3 * perCluster }),
    ),
  };
  const data: fc.Arbitrary<Step> = fc.oneof(
    { weight: 4, arbitrary: fc.record({ type: fc.constant('write'), ...range }) },
    { weight: 1, arbitrary: fc.record({ type: fc.constant('unmap'), ...range }) },
    { weight: 1, arbitrary: fc.constant<Step>({ type: 'flush' }) },
  );
  const alone: fc.Arbitrary<Step>[] = [fc.constant({ type: 'flush' })];
  if (snapshots) {
    const name = fc.constantFrom('one', 'two');
    alone.push(fc.record({ type: fc.constantFrom('snapshot', 'revert', 'delete'), name }));
  }
  if (resize) {
    const sectors = fc.integer({ min: 1, max: 2 * clusters * perCluster });
    alone.push(sectors.map((n) => ({ type: 'resize', sectors: n })));
  }
  return fc.array(
    fc.oneof(
      { weight: 4, arbitrary: fc.array(data, { minLength: 1, maxLength: 5 }) },
      { weight: 1, arbitrary: fc.oneof(...alone).map((step) => [step]) },
    ),
    { minLength: 3, maxLength: 12 },
  );
}

/** A small generator, so that a failing seed is one number. */
function random(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

async function newImage({ clusterSize, clusters, options }: Subject): Promise<Uint8Array> {
  const file = new MemoryFile();
  await createImage('image', {
    size: clusters * clusterSize,
    clusterSize,
    ...options,
    openFile: async () => file,
  });
  return file.toBytes();
}

/** Runs the steps; answers when all have settled. The last stamps are what a shadow of the disk holds. */
async function run(subject: Subject, groups: Step[][], seed: number) {
  const before = await newImage(subject);
  const journal = new CrashJournal();
  const history = new GuestHistory(() => journal.mark());
  const chance = random(seed);
  const turns = () => Math.floor(chance() * 4);
  const file = journal.record(new MemoryFile(before, { path: 'image' }), before, { turns });
  const store = await QcowStore.open('image', {
    lock: false,
    compress: subject.compress ?? false,
    acknowledge: subject.memory ? 'memory' : 'written',
    // What is used anew holds what it held.
    discard: !subject.small,
    allowShrink: true,
    openFile: async () => file,
  });
  let disk = new Uint32Array(store.size / SECTOR);
  const saved = new Map<string, Uint32Array>();
  let stamp = 0;

  const change = async (start: number, count: number, value: number, act: () => unknown) => {
    const done = history.write(start * SECTOR, count * SECTOR, value);
    disk.fill(value, start, start + count);
    await act();
    done();
  };
  const busy: { start: number; end: number }[] = [];
  const perform = async (step: Step): Promise<void> => {
    switch (step.type) {
      case 'write':
      case 'unmap': {
        const perCluster = subject.clusterSize / SECTOR;
        let { start } = step;
        let count = Math.min(step.count, disk.length - start);
        if (step.type === 'unmap') {
          start -= start % perCluster;
          count = Math.min(Math.ceil(count / perCluster) * perCluster, disk.length - start);
          count -= count % perCluster;
        }
        // Two writes of one sector at once may end in either order, even the flushed one.
        if (count <= 0 || busy.some((other) => start < other.end && other.start < start + count)) {
          return;
        }
        busy.push({ start, end: start + count });
        const value = step.type === 'write' ? ++stamp : 0;
        const data = stamped(count * SECTOR, value);
        return change(start, count, value, () =>
          step.type === 'write'
            ? store.write(start * SECTOR, new MemoryDataOut(data), context)
            : store.unmap?.(start * SECTOR, count * SECTOR, context),
        );
      }
      case 'flush': {
        const done = history.flush();
        await store.flush(context);
        return done();
      }
      case 'snapshot':
        if (saved.has(step.name)) return;
        saved.set(step.name, disk.slice());
        await store.snapshots.create(step.name);
        return;
      case 'delete':
        if (saved.delete(step.name)) await store.snapshots.delete(step.name);
        return;
      case 'revert': {
        const old = saved.get(step.name);
        if (old === undefined) return;
        const ends = [...old].map((value, i) => history.write(i * SECTOR, SECTOR, value));
        disk = old.slice();
        await store.snapshots.revert(step.name);
        for (const end of ends) end();
        return;
      }
      case 'resize': {
        if (saved.size > 0) return;
        const { length } = disk;
        const next = new Uint32Array(step.sectors);
        next.set(disk.subarray(0, step.sectors));
        disk = next;
        const [from, to] = [Math.min(length, step.sectors), Math.max(length, step.sectors)];
        if (from === to) return;
        const done = history.write(from * SECTOR, (to - from) * SECTOR, 0);
        await store.resize(step.sectors * SECTOR);
        done();
      }
    }
  };
  for (const group of groups) {
    busy.length = 0;
    await Promise.all(group.map(perform));
  }
  const flushed = history.flush();
  await store.close();
  flushed();
  return { journal, history };
}

let images = 0;

async function judge(
  subject: Subject,
  bytes: Uint8Array,
  history: GuestHistory,
  cut: number,
  crashed: 'host' | 'process',
  sampled: boolean,
) {
  if (sampled) {
    const path = join(dir, `cut-${images++}.qcow2`);
    writeFileSync(path, bytes);
    if (subject.dirty) qemuImg('check', '-q', '-r', 'all', path);
    else qemuAllowsLeaks(path);
  }
  const file = new MemoryFile(bytes, { path: 'image' });
  const openFile = async () => file;
  const repair = subject.dirty ? ({ repair: 'all' } as const) : {};
  const check = await checkImage('image', { ...repair, lock: false, openFile });
  expect(check.errors, check.messages.join('; ')).toBe(0);
  const store = await QcowStore.open('image', { lock: false, openFile });
  const disk = new Uint8Array(store.size);
  await store.read(0, new MemoryDataIn(disk), context);
  await store.close();
  expect(history.violation(disk, cut, crashed)).toBeUndefined();
}

/** Exit code 3: leaks, and nothing else. */
function qemuAllowsLeaks(path: string): void {
  try {
    qemuImg('check', '-q', path);
  } catch (error) {
    const { status, stderr } = error as { status: number; stderr: string };
    if (status !== 3) throw new Error(`qemu-img check of ${path}: ${status}: ${stderr}`);
  }
}

test.each(subjects.map((subject) => [subject.name, subject] as const))(
  '%s',
  async (_name, subject) => {
    let judged = 0;
    await fc.assert(
      fc.asyncProperty(stepsOf(subject), fc.nat(), async (groups, seed) => {
        const { journal, history } = await run(subject, groups, seed);
        const chance = random(seed);
        const keeps: Keep[] = [() => false, () => chance() < 0.5, () => chance() < 0.9];
        for (const cut of journal.cuts()) {
          // Killed alone, the process loses nothing that it has acknowledged: the host has it all.
          const all = journal.crash(cut).get('image') as Uint8Array;
          await judge(subject, all, history, cut, subject.memory ? 'host' : 'process', false);
          for (const keep of keeps) {
            const bytes = journal.crash(cut, keep).get('image') as Uint8Array;
            await judge(subject, bytes, history, cut, 'host', ++judged % 40 === 0);
          }
        }
      }),
      { seed: 7, numRuns: thorough ? 200 : 3 },
    );
    expect(judged).toBeGreaterThan(40);
  },
  thorough ? 3_600_000 : 120_000,
);
