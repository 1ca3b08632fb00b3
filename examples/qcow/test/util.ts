// SPDX-License-Identifier: Apache-2.0
/** What the tests share: folders, QEMU's tools. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll } from 'vitest';

export const KiB = 1024;
export const MiB = 1024 * KiB;

/** An empty directory, removed after the file's tests. */
export function scratch(parent = tmpdir()): string {
  const dir = mkdtempSync(join(parent, 'tcmu-qcow-'));
  afterAll(() => rmSync(dir, { recursive: true, force: true }));
  return dir;
}

/** How a property is run, as in the package's own test/cases.ts. */
export function cases(numRuns: number): { numRuns: number; seed?: number } {
  return process.env['TCMU_TEST_RANDOM'] === '1'
    ? { numRuns: 10 * numRuns }
    : { numRuns, seed: 20261123 };
}

/** Standard output of qemu-img. @throws when it fails */
export function qemuImg(...args: string[]): string {
  return execFileSync('qemu-img', args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });
}

/** Standard output of qemu-io on an image. @throws when it fails */
export function qemuIo(image: string, commands: readonly string[], ...args: string[]): string {
  const all = [...args, ...commands.flatMap((command) => ['-c', command]), image];
  return execFileSync('qemu-io', all, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });
}

/** What QEMU says of a bitmap: positions and lengths of what is dirty. */
export function dirtyParts(path: string, bitmap: string): [number, number][] {
  const socket = `${path}.socket`;
  const pidFile = `${path}.pid`;
  const options = ['--fork', '--persistent', '-r', '-f', 'qcow2', '-B', bitmap];
  execFileSync('qemu-nbd', [...options, '-k', socket, '--pid-file', pidFile, path]);
  try {
    const server = `driver=nbd,server.type=unix,server.path=${socket}`;
    const context = `x-dirty-bitmap=qemu:dirty-bitmap:${bitmap}`;
    const map = qemuImg('map', '--output=json', '--image-opts', `${server},${context}`);
    return (JSON.parse(map) as { start: number; length: number; data: boolean }[])
      .filter(({ data }) => !data)
      .map(({ start, length }) => [start, length]);
  } finally {
    process.kill(Number(readFileSync(pidFile, 'utf8')));
  }
}

/** What a failing call rejects with or throws; fails when it does neither. */
export async function failure(run: () => unknown): Promise<Error & Record<string, unknown>> {
  try {
    await run();
  } catch (error) {
    return error as Error & Record<string, unknown>;
  }
  throw new Error('it did not fail');
}
