// SPDX-License-Identifier: Apache-2.0
/** Locks against QEMU's own programs, in both directions, over every file of a chain. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { afterEach, expect, test } from 'vitest';
import { QcowStore } from '../src/index.js';
import { failure, qemuImg, scratch } from './util.js';

const dir = scratch();
const children: ChildProcess[] = [];
let images = 0;

/** An image over a base of its own. */
function chain(): { base: string; top: string } {
  const base = join(dir, `base-${images}.qcow2`);
  const top = join(dir, `top-${images++}.qcow2`);
  qemuImg('create', '-q', '-f', 'qcow2', base, '1M');
  qemuImg('create', '-q', '-f', 'qcow2', '-b', base, '-F', 'qcow2', top);
  return { base, top };
}

/** qemu-io has the image open from its prompt on. */
async function openByQemu(image: string, ...args: string[]): Promise<void> {
  const child = spawn('qemu-io', [...args, '-f', 'qcow2', image], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  children.push(child);
  child.stdin?.write('length\n');
  await once(createInterface({ input: child.stdout as NodeJS.ReadableStream }), 'line');
}

afterEach(async () => {
  for (const child of children.splice(0)) {
    const exited = once(child, 'exit');
    child.stdin?.end('quit\n');
    await exited;
  }
});

const locked = { code: 'ERR_TCMU_QCOW_LOCKED' };
const refused = /Failed to get|lock/;

test('served for writing: QEMU neither writes nor reads it, and does not write its base', async () => {
  const { base, top } = chain();
  const store = await QcowStore.open(top);
  expect(() => qemuImg('resize', '-q', top, '2M')).toThrow(refused);
  expect(() => qemuImg('check', '-q', top)).toThrow(refused);
  expect(() => qemuImg('resize', '-q', base, '2M')).toThrow(refused);
  qemuImg('check', '-q', base);
  expect(await failure(() => QcowStore.open(top, { readOnly: true }))).toMatchObject(locked);
  expect(await failure(() => QcowStore.open(base))).toMatchObject(locked);
  await store.close();
  qemuImg('resize', '-q', top, '2M');
  qemuImg('resize', '-q', base, '2M');
});

test('served for reading: QEMU may read it, not write', async () => {
  const { top } = chain();
  const store = await QcowStore.open(top, { readOnly: true });
  qemuImg('check', '-q', top);
  await (await QcowStore.open(top, { readOnly: true })).close();
  expect(() => qemuImg('resize', '-q', top, '2M')).toThrow(refused);
  await store.close();
});

test('open for writing in QEMU: refused here, for reading, too; its base can be read', async () => {
  const { base, top } = chain();
  await openByQemu(top);
  for (const readOnly of [false, true]) {
    expect(await failure(() => QcowStore.open(top, { readOnly }))).toMatchObject({
      ...locked,
      path: top,
    });
  }
  expect(await failure(() => QcowStore.open(base))).toMatchObject(locked);
  await (await QcowStore.open(base, { readOnly: true })).close();
});

test('open for reading in QEMU: read here, not written', async () => {
  const { top } = chain();
  await openByQemu(top, '-r');
  await (await QcowStore.open(top, { readOnly: true })).close();
  expect(await failure(() => QcowStore.open(top))).toMatchObject(locked);
});
