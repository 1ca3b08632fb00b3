/** What the tests share: folders, QEMU's tools. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
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

/** Standard output of qemu-img. @throws when it fails */
export function qemuImg(...args: string[]): string {
  return execFileSync('qemu-img', args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });
}

/** Standard output of qemu-io on an image. @throws when it fails */
export function qemuIo(image: string, commands: readonly string[], ...args: string[]): string {
  const all = [...args, ...commands.flatMap((command) => ['-c', command]), image];
  return execFileSync('qemu-io', all, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] });
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
