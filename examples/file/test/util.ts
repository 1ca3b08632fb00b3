// SPDX-License-Identifier: Apache-2.0
/** What the tests share: folders, buffers, requests. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { MemoryDataIn, MemoryDataOut } from 'tcmu/store';
import { afterAll } from 'vitest';
import { FileStore, type FileStoreOptions } from '../src/file-store.js';

export const MiB = 1024 * 1024;

/** A disk and memory: they differ in what blocks, and in which of fallocate's modes they have. */
export const folders = [tmpdir(), '/dev/shm'];

/** An empty directory, removed after the file's tests. */
export function scratch(parent = tmpdir()): string {
  const dir = mkdtempSync(join(parent, 'tcmu-file-'));
  afterAll(() => rmSync(dir, { recursive: true, force: true }));
  return dir;
}

/** How a property is run, as in the package's own test/cases.ts. */
export function cases(numRuns: number): { numRuns: number; seed?: number } {
  return process.env['TCMU_TEST_RANDOM'] === '1'
    ? { numRuns: 10 * numRuns }
    : { numRuns, seed: 20261123 };
}

/** A request as the SCSI layer makes it. */
export function request(options: { fua?: boolean; mayUnmap?: boolean; signal?: AbortSignal } = {}) {
  const { fua = false, mayUnmap = false, signal = new AbortController().signal } = options;
  return { fua, mayUnmap, signal };
}

export async function readAll(store: FileStore, position = 0, length = store.size - position) {
  const data = new MemoryDataIn(Buffer.alloc(length, 0xee));
  await store.read(position, data);
  return Buffer.from(data.bytes);
}

export async function write(store: FileStore, position: number, bytes: Uint8Array, fua = false) {
  await store.write(position, new MemoryDataOut(bytes), request({ fua }));
}

/** A store with its warnings. */
export async function open(path: string, options: FileStoreOptions = {}) {
  const warnings: string[] = [];
  const store = await FileStore.open(path, {
    onWarning: (message) => warnings.push(message),
    ...options,
  });
  return { store, warnings };
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
