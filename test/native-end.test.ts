// SPDX-License-Identifier: Apache-2.0
/** How the addon ends: worker.terminate(), process.exit(), an exception, several environments. */
import { spawnSync } from 'node:child_process';
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import { buildSync } from 'esbuild';
import { beforeAll, expect, test } from 'vitest';

// Below the package's root, so that the loader finds the addon.
const fixture = fileURLToPath(new URL('../build/test/native-under-load.mjs', import.meta.url));

beforeAll(() => {
  mkdirSync(new URL('../build/test', import.meta.url), { recursive: true });
  buildSync({
    entryPoints: [fileURLToPath(new URL('fixtures/native-under-load.ts', import.meta.url))],
    outfile: fixture,
    bundle: true,
    platform: 'node',
    format: 'esm',
    target: 'node20',
  });
});

interface Busy {
  one: Worker;
  /** Of its kernel; the worker removes it when it exits by itself. */
  folder: string;
}

/** Starts a worker and resolves when it is busy. */
function worker(how: string): Promise<Busy> {
  return new Promise((resolve, reject) => {
    const one = new Worker(fixture, { workerData: how });
    one.once('message', (folder: string) => resolve({ one, folder }));
    one.once('error', reject);
  });
}

async function terminate({ one, folder }: Busy): Promise<number> {
  const code = await one.terminate();
  rmSync(folder, { recursive: true });
  return code;
}

function child(how: string) {
  const { status, signal, stdout, stderr } = spawnSync(process.execPath, [fixture, how], {
    encoding: 'utf8',
    timeout: 100_000,
  });
  return { status, signal, stdout, stderr };
}

test('worker.terminate under load, with a pin, views, a hanging call and reads in the pool', async () => {
  for (let i = 0; i < 8; i++) expect(await terminate(await worker('terminate'))).toBe(1);
});

test('worker.terminate waits for a read that blocks, and not for a call that hangs', async () => {
  const busy = await worker('starved');
  let ended = false;
  const ending = terminate(busy).finally(() => {
    ended = true;
  });
  await sleep(200);
  expect(ended).toBe(false);
  writeFileSync(join(busy.folder, 'read'), 'x');
  expect(await ending).toBe(1);
});

test('process.exit in a worker', async () => {
  const { one } = await worker('exit');
  expect(await new Promise((resolve) => one.once('exit', resolve))).toBe(3);
});

test('several environments at once, ending one after the other', async () => {
  const workers = await Promise.all(Array.from({ length: 4 }, () => worker('terminate')));
  for (const one of workers) expect(await terminate(one)).toBe(1);
});

test.for(['exit', 'blocked', 'close'])('a process that exits under load: %s', (how) => {
  for (let i = 0; i < 3; i++) {
    expect(child(how)).toEqual({ status: 3, signal: null, stdout: 'busy\n', stderr: '' });
  }
});

test('a process that ends by an exception under load', () => {
  const { status, signal, stdout, stderr } = child('throw');
  expect([status, signal, stdout]).toEqual([1, null, 'busy\n']);
  expect(stderr).toContain('on purpose');
});
