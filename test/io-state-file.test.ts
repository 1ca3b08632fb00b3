// SPDX-License-Identifier: Apache-2.0
/** A disk's memory beside its data: what comes back after a restart, and what a broken file does. */
import {
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { FileError } from '../lib/errors.js';
import { StateFile } from '../lib/io/state-file.js';

let folder: string;
let path: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'tcmu-state-'));
  path = join(folder, 'disk.state');
});
afterEach(() => rmSync(folder, { recursive: true }));

const bytes = (...values: number[]) => Uint8Array.from(values);

test('what was saved comes back, each part by itself', async () => {
  const file = new StateFile(path);
  const [one, two] = [file.storage('one'), file.storage('two')];
  expect(await one.load()).toBeUndefined();
  await Promise.all([one.save(bytes(1, 2)), two.save(bytes(3)), one.save(bytes(0, 255))]);
  const again = new StateFile(path);
  expect([...((await again.storage('one').load()) ?? [])]).toEqual([0, 255]);
  expect([...((await again.storage('two').load()) ?? [])]).toEqual([3]);
  expect(await again.storage('three').load()).toBeUndefined();
});

test('the file is there only while there is something to keep, and nothing else ever', async () => {
  const storage = new StateFile(path).storage('one');
  await storage.save(bytes());
  expect(existsSync(path)).toBe(false);
  await storage.save(bytes(1));
  expect(readdirSync(folder)).toEqual(['disk.state']);
  await storage.save(bytes());
  expect(readdirSync(folder)).toEqual([]);
  expect(await storage.load()).toBeUndefined();
});

test('what a crash left of a save is not taken for the state', async () => {
  await new StateFile(path).storage('one').save(bytes(1));
  writeFileSync(`${path}.new`, '{"tcmu":1,"sta');
  const storage = new StateFile(path).storage('one');
  expect([...((await storage.load()) ?? [])]).toEqual([1]);
  await storage.save(bytes(2));
  expect(readdirSync(folder)).toEqual(['disk.state']);
});

test('a file that is no state is refused and stays', async () => {
  const broken = ['', 'null', '[]', '{"tcmu":2,"state":{}}', '{"tcmu":1,"state":{"one":"0g"}}'];
  for (const text of broken) {
    writeFileSync(path, text);
    const storage = new StateFile(path).storage('one');
    for (const attempt of [() => storage.load(), () => storage.save(bytes(1))]) {
      const error = await Promise.resolve(attempt()).catch((thrown: unknown) => thrown);
      expect(error).toBeInstanceOf(FileError);
      expect(error).toMatchObject({ code: 'ERR_TCMU_STATE', path });
    }
    expect(readFileSync(path, 'utf8')).toBe(text);
  }
});

test('no symbolic link is followed', async () => {
  const elsewhere = join(folder, 'elsewhere');
  writeFileSync(elsewhere, 'precious');
  symlinkSync(elsewhere, `${path}.new`);
  const storage = new StateFile(path).storage('one');
  await storage.save(bytes(1));
  expect(readFileSync(elsewhere, 'utf8')).toBe('precious');
  rmSync(path);
  symlinkSync(elsewhere, path);
  await expect(new StateFile(path).storage('one').load()).rejects.toMatchObject({ errno: 'ELOOP' });
});

test('what the file system refuses is told, and the next save is tried', async () => {
  const storage = new StateFile(join(folder, 'none', 'disk.state')).storage('one');
  await expect(storage.save(bytes(1))).rejects.toMatchObject({ errno: 'ENOENT' });
  const readOnly = new StateFile(path, { readOnly: true }).storage('one');
  await expect(readOnly.save(bytes(1))).rejects.toMatchObject({ errno: 'EROFS' });
  const folderThere = new StateFile(folder).storage('one');
  await expect(folderThere.load()).rejects.toMatchObject({ errno: 'EISDIR' });
});
