// SPDX-License-Identifier: Apache-2.0
/** The built command against a server in memory, as far as it goes without a kernel that has TCMU. */
import { execFileSync, spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { UsageError } from 'tcmu/program';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { HELP, parseOptions } from '../src/options.js';
import { newBucket, openBucket, startServer, type TestServer } from './support/servers.js';

const here = dirname(fileURLToPath(import.meta.url));
const cli = join(here, '../dist/cli.js');
const dir = mkdtempSync(join(tmpdir(), 'tcmu-s3-cli-'));
const KiB = 1024;
const MiB = 1024 * KiB;
let server: TestServer;
let bucket: string;

beforeAll(async () => {
  server = await startServer('memory');
  bucket = await newBucket(server);
});
afterAll(async () => {
  await server.stop();
  rmSync(dir, { recursive: true, force: true });
});

function run(
  ...args: string[]
): Promise<{ status: number | null; stdout: string; stderr: string }> {
  return new Promise((resolve) => {
    const child = spawn(process.execPath, [cli, ...args], {
      env: {
        PATH: process.env['PATH'],
        AWS_ENDPOINT_URL_S3: server.endpoint,
        AWS_REGION: server.region,
        AWS_ACCESS_KEY_ID: server.accessKeyId,
        AWS_SECRET_ACCESS_KEY: server.secretAccessKey,
      },
    });
    let stdout = '';
    let stderr = '';
    child.stdout.on('data', (text) => {
      stdout += text;
    });
    child.stderr.on('data', (text) => {
      stderr += text;
    });
    child.on('close', (status) => resolve({ status, stdout, stderr }));
  });
}

/** Answers the JSON result of a command that must succeed. */
async function result(...args: string[]): Promise<Record<string, unknown>> {
  const { status, stdout, stderr } = await run(...args, '--json');
  expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
  return JSON.parse(stdout);
}

describe('tcmu-s3', () => {
  it('helps on standard output, and ends with 2 when it is used wrongly', async () => {
    expect(await run('--help')).toEqual({ status: 0, stdout: HELP, stderr: '' });
    const { status, stdout, stderr } = await run('frobnicate');
    expect({ status, stdout }).toEqual({ status: 2, stdout: '' });
    expect(stderr).toMatch(/Try tcmu-s3 --help\.\n$/);
  });

  it.each([
    [['create', 's3://b/p'], /--size/],
    [['serve', 's3://b/p'], /--name/],
    [['snapshot', 's3://b/p'], /name for the snapshot/],
    [['rekey', 's3://b/p', '--key-file', 'k'], /old key and the new/],
    [['create', 's3://b/p', '--size', '10X'], /--size 10X/],
    [['info', 's3://b/p', 'more'], /too much/],
  ])('refuses %j', (args, message) => {
    expect(() => parseOptions(args)).toThrow(UsageError);
    expect(() => parseOptions(args)).toThrow(message);
  });

  it.each([
    ['plain', []],
    ['encrypted and compressed', ['--compression', 'deflate', '--key-file', join(dir, 'key')]],
  ])(
    'takes an image through its whole life, %s',
    async (name, traits) => {
      writeFileSync(join(dir, 'key'), Buffer.alloc(32, 1), { mode: 0o600 });
      writeFileSync(join(dir, 'new-key'), 'ab'.repeat(32), { mode: 0o600 });
      const key = traits.slice(2);
      const place = `s3://${bucket}/${name.split(' ')[0]}`;
      const image = Buffer.alloc(5 * MiB + 4096);
      for (let at = 0; at < image.length; at += 4) {
        if (at % (2 * MiB) < MiB) image.writeUInt32LE(at ^ 0x5a5a, at);
      }
      const raw = join(dir, `${name}.raw`);
      writeFileSync(raw, image);
      await result('import', place, raw, ...traits);
      expect(await result('info', place, ...key)).toMatchObject({ size: image.length, epoch: 1 });
      await result('snapshot', place, 'first', ...key);
      await result('clone', place, `${place}-clone`, '--snapshot', 'first', ...key);
      for (const [from, more] of [
        [place, []],
        [place, ['--snapshot', 'first']],
        [`${place}-clone`, []],
      ] as const) {
        const out = join(dir, `out-${Math.random()}`);
        await result('export', from, out, ...more, ...key);
        expect(readFileSync(out).equals(image)).toBe(true);
      }
      expect(await result('check', place, ...key)).toMatchObject({ problems: [], unused: 0 });
      const needed = await run('delete', place);
      expect(needed.status).toBe(1);
      expect(needed.stderr).toMatch(/clone/);
      if (key.length > 0) {
        await result('rekey', place, ...key, '--new-key-file', join(dir, 'new-key'));
        expect((await run('check', place, ...key)).stderr).toMatch(/does not open/);
        await result('check', place, '--key-file', join(dir, 'new-key'));
        key[1] = join(dir, 'new-key');
      }
      await result('snapshot-delete', place, 'first', ...key);
      await result('delete', `${place}-clone`);
      await result('delete', place);
      expect((await run('info', place)).stderr).toMatch(/there is no disk/);
    },
    60_000,
  );

  it('brings qcow2 images in and out', async () => {
    // Data and holes in the image, in its backing file, and over it.
    const base = join(dir, 'base.qcow2');
    const image = join(dir, 'q.qcow2');
    execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', base, '5M']);
    execFileSync('qemu-io', [
      '-f',
      'qcow2',
      '-c',
      'write -P 1 0 1M',
      '-c',
      'write -P 2 3M 1M',
      base,
    ]);
    execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', base, '-F', 'qcow2', image]);
    execFileSync('qemu-io', [
      '-f',
      'qcow2',
      '-c',
      'write -P 3 3584K 4K',
      '-c',
      'write -z 0 64K',
      image,
    ]);
    const place = `s3://${bucket}/qcow`;
    await result('import', place, image);
    const out = join(dir, 'out.qcow2');
    await result('export', place, out);
    execFileSync('qemu-img', ['compare', '-f', 'qcow2', '-F', 'qcow2', out, image]);
    expect(execFileSync('qemu-img', ['check', '-f', 'qcow2', out]).toString()).toMatch(/No errors/);
    // Holes are holes. The file may be longer: clusters made ready for writes that didn't come are given back, not cut.
    const facts = execFileSync('qemu-img', ['check', '--output=json', out]).toString();
    const clusters = (JSON.parse(facts) as { 'allocated-clusters': number })['allocated-clusters'];
    expect(clusters * 64 * KiB).toBeLessThan(3 * MiB);
    expect(clusters * 64 * KiB).toBeGreaterThan(MiB);
    writeFileSync(join(dir, 'broken.qcow2'), readFileSync(image).subarray(0, 100));
    const { status, stderr } = await run('import', `${place}-broken`, join(dir, 'broken.qcow2'));
    expect(status).toBe(1);
    expect(stderr).toMatch(/broken\.qcow2/);
  });

  it('check names the object that is damaged', async () => {
    const place = `s3://${bucket}/hurt`;
    writeFileSync(join(dir, 'hurt.raw'), Buffer.alloc(MiB, 'hurt'));
    await result('import', place, join(dir, 'hurt.raw'));
    const { stdout } = await run('info', place, '--json');
    expect(JSON.parse(stdout).checkpoint).toBe(1);
    const store = await openBucket(server, bucket);
    for await (const { key } of store.list('hurt/c/')) {
      const { body } = await store.get(key);
      body.writeUInt8((body[body.length - 1] as number) ^ 1, body.length - 1);
      await store.put(key, [body]);
      const answer = await run('check', place);
      expect(answer.status).toBe(1);
      expect(answer.stdout).toContain(`${key}: frame`);
    }
    await store.close();
  });
});
