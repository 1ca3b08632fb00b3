// SPDX-License-Identifier: Apache-2.0
/** The clients that exist, against the NBD server: libnbd's tools, qemu's, fio. */
import { execFile, execFileSync, spawnSync } from 'node:child_process';
import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type NbdServer, type ServeNbdOptions, serveNbd } from '../lib/sim/index.js';
import { MemoryStore } from '../lib/store/index.js';

const MiB = 1 << 20;
const run = promisify(execFile);

let directory: string;
let server: NbdServer;

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'tcmu-nbd-'));
});

afterEach(async () => {
  await server.close();
  rmSync(directory, { recursive: true });
});

function has(program: string): boolean {
  return spawnSync('sh', ['-c', `command -v ${program}`]).status === 0;
}

async function serve(options: Partial<ServeNbdOptions> = {}, size = 64 * MiB): Promise<string> {
  const place = options.port === undefined ? { path: join(directory, 'nbd.sock') } : {};
  server = await serveNbd(new MemoryStore({ size, pageSize: 4096 }), { ...place, ...options });
  return server.uri;
}

/** A file with data, holes, and data at its very end. */
function image(size: number): string {
  const file = join(directory, 'source');
  const bytes = Buffer.alloc(size);
  for (let at = 0; at < size; at += 7 * MiB) {
    for (let i = 0; i < MiB; i += 4) bytes.writeUInt32LE((at + i) ^ 0x5bd1e995, at + i);
  }
  bytes.fill(0xee, size - 512);
  writeFileSync(file, bytes);
  return file;
}

describe.skipIf(!has('nbdcopy') || !has('nbdinfo'))('libnbd', () => {
  test('nbdinfo sees what the server can', async () => {
    const { stdout } = await run('nbdinfo', ['--json', await serve({ description: 'a test' })]);
    expect(JSON.parse(stdout).exports[0]).toMatchObject({
      'export-size': 64 * MiB,
      description: 'a test',
      contexts: ['base:allocation'],
      can_cache: true,
      can_df: true,
      can_fast_zero: true,
      can_flush: true,
      can_fua: true,
      can_multi_conn: true,
      can_trim: true,
      can_zero: true,
      is_read_only: false,
      block_size_minimum: 512,
      block_size_maximum: 32 * MiB,
    });
    const { stdout: list } = await run('nbdinfo', ['--list', '--json', server.uri]);
    expect(JSON.parse(list).exports).toHaveLength(1);
  });

  test.each(['--connections=1', '--connections=4'])(
    'nbdcopy there and back, %s',
    async (option) => {
      const uri = await serve();
      const source = image(64 * MiB);
      await run('nbdcopy', [option, '--flush', source, uri]);
      const { stdout } = await run('nbdinfo', ['--map', '--json', uri]);
      const holes = (JSON.parse(stdout) as { type: number; length: number }[]).filter(
        ({ type }) => type === 3,
      );
      expect(holes.reduce((sum, { length }) => sum + length, 0)).toBeGreaterThan(48 * MiB);
      const back = join(directory, 'back');
      await run('nbdcopy', [option, uri, back]);
      expect(Buffer.compare(readFileSync(back), readFileSync(source))).toBe(0);
    },
  );

  test('over TLS with a shared key', async () => {
    const key = '0123456789abcdef0123456789abcdef';
    const uri = await serve({
      port: 0,
      tls: { pskCallback: (_, name) => (name === 'alice' ? Buffer.from(key, 'hex') : null) },
    });
    const keys = join(directory, 'keys.psk');
    writeFileSync(keys, `alice:${key}\n`);
    const withKey = `nbds://alice@127.0.0.1:${server.port}/?tls-psk-file=${keys}`;
    const { stdout } = await run('nbdinfo', ['--json', withKey]);
    expect(JSON.parse(stdout)).toMatchObject({ TLS: true });
    const source = image(64 * MiB);
    await run('nbdcopy', [source, withKey]);
    await run('nbdcopy', [withKey, join(directory, 'back')]);
    expect(Buffer.compare(readFileSync(join(directory, 'back')), readFileSync(source))).toBe(0);
    await expect(run('nbdinfo', [uri.replace('nbds', 'nbd')])).rejects.toThrow(
      /server replied with error/,
    );
  });
});

/** Debian's module is for Debian's Python: another one in front of it on the path does not have it. */
const debianPath = { ...process.env, PATH: `/usr/bin:${process.env['PATH']}` };
const hasShell =
  has('nbdsh') && spawnSync('nbdsh', ['--version'], { env: debianPath }).status === 0;

describe.skipIf(!hasShell)('nbdsh', () => {
  async function shell(script: string): Promise<void> {
    const file = join(directory, 'script.py');
    writeFileSync(file, script);
    const read = `exec(open(${JSON.stringify(file)}).read(), globals())`;
    await run('nbdsh', ['--base-allocation', '-u', await serve(), '-c', read], {
      env: debianPath,
      timeout: 60_000,
    });
  }

  test('flags, extents, one chunk, and many requests at once', async () => {
    await shell(`
page = 4096
assert h.get_size() == 64 << 20
assert all([h.can_fua(), h.can_trim(), h.can_zero(), h.can_fast_zero(), h.can_df(), h.can_cache()])
h.pwrite(b"\x5a" * (1 << 20), 1 << 20, nbd.CMD_FLAG_FUA)
assert h.pread(1 << 20, 1 << 20) == b"\x5a" * (1 << 20)
h.zero(16 * page, 1 << 20, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(16 * page, 1 << 20) == bytes(16 * page)
h.trim(32 * page, (1 << 20) + 16 * page)
extents = []
h.block_status(4 << 20, 0, lambda context, offset, entries, error: extents.extend(entries))
assert sum(extents[0::2]) == 4 << 20, extents
assert len(set(extents[1::2])) > 1, extents
chunks = []
h.pread_structured(2 << 20, 0, lambda data, at, status, error: chunks.append((at, len(data))), nbd.CMD_FLAG_DF)
assert chunks == [(0, 2 << 20)], chunks
h.cache(16 * page, 0)
h.flush()
buffers = [nbd.Buffer.from_bytearray(bytearray([i]) * page) for i in range(64)]
cookies = [h.aio_pwrite(each, (8 << 20) + i * page) for i, each in enumerate(buffers)]
while h.aio_in_flight(): h.poll(-1)
assert all(h.aio_command_completed(each) for each in cookies)
for i in range(64): assert h.pread(page, (8 << 20) + i * page) == bytes([i]) * page
`);
  });

  test('what libnbd itself would not send is refused, and the talk goes on', async () => {
    await shell(`
import errno
h.set_strict_mode(0)
end = 64 << 20
for what, expected in [
    (lambda: h.pread(512, end), errno.EINVAL),
    (lambda: h.pwrite(bytes(1024), end - 512), errno.ENOSPC),
    (lambda: h.pread(511, 0), errno.EINVAL),
    (lambda: h.trim(1024, end - 512), errno.ENOSPC),
    (lambda: h.zero(1024, end - 512), errno.ENOSPC),
]:
    try:
        what()
    except nbd.Error as error:
        assert error.errnum == expected, (error.errnum, expected)
    else:
        raise AssertionError("it was taken")
assert h.pread(512, 0) == bytes(512)
`);
  });
});

describe.skipIf(!has('qemu-img') || !has('qemu-io'))('qemu', () => {
  test('qemu-img converts, compares and maps', async () => {
    const uri = await serve();
    const source = image(64 * MiB);
    await run('qemu-img', ['convert', '-n', '-f', 'raw', '-O', 'raw', source, uri]);
    await run('qemu-img', ['compare', '-f', 'raw', '-F', 'raw', source, uri]);
    const map = await run('qemu-img', ['map', '-f', 'raw', '--output=json', uri]);
    const extents = JSON.parse(map.stdout) as { zero: boolean; length: number }[];
    const zeroes = extents.filter(({ zero }) => zero);
    expect(zeroes.reduce((sum, { length }) => sum + length, 0)).toBeGreaterThan(48 * MiB);
    const qcow = join(directory, 'copy.qcow2');
    await run('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', uri, qcow]);
    await run('qemu-img', ['compare', '-f', 'qcow2', '-F', 'raw', qcow, uri]);
  });

  test('qemu-io: every kind of request', async () => {
    const uri = await serve();
    const commands = [
      'write -P 7 0 1M',
      'write -f -P 8 1M 64k',
      'aio_write -P 9 2M 4M',
      'aio_flush',
      'read -P 7 0 1M',
      'read -P 8 1M 64k',
      'read -P 9 2M 4M',
      'write -z 0 512k',
      'write -z -u 1M 64k',
      'read -P 0 0 512k',
      'read -P 7 512k 512k',
      'read -P 0 1M 64k',
      'discard 2M 4M',
      'flush',
    ];
    const { stdout } = await run('qemu-io', [
      ...['-f', 'raw'],
      ...commands.flatMap((command) => ['-c', command]),
      uri,
    ]);
    expect(stdout).not.toMatch(/fail|error|invalid/i);
    const wrong = run('qemu-io', ['-f', 'raw', '-c', 'read -P 1 0 512', uri]);
    await expect(wrong).rejects.toMatchObject({
      stdout: expect.stringMatching(/verification failed/),
    });
  });

  test.skipIf(!has('openssl'))('over TLS with certificates of both sides', async () => {
    const certificates = certify(directory);
    await serve({
      port: 0,
      tls: {
        key: readFileSync(join(directory, 'server-key.pem')),
        cert: readFileSync(join(directory, 'server-cert.pem')),
        ca: readFileSync(certificates),
        requestCert: true,
      },
    });
    const target = (credentials: string) => [
      ...['--object', credentials],
      ...['--image-opts'],
      `driver=nbd,host=127.0.0.1,port=${server.port},tls-creds=t`,
    ];
    const object = `tls-creds-x509,id=t,endpoint=client,dir=${directory}`;
    const { stdout } = await run('qemu-io', [
      ...['-c', 'write -P 3 0 1M', '-c', 'read -P 3 0 1M'],
      ...target(object),
    ]);
    expect(stdout).toMatch(/read 1048576\/1048576/);
    // A client whose certificate nobody signed.
    rmSync(join(directory, 'client-cert.pem'));
    rmSync(join(directory, 'client-key.pem'));
    await expect(run('qemu-io', ['-c', 'read 0 512', ...target(object)])).rejects.toThrow();
  });
});

describe.skipIf(!has('fio'))('fio', () => {
  test.each([
    ['4k', 16],
    ['256k', 4],
  ])('its nbd engine writes %s at depth %i and verifies', async (size, depth) => {
    const uri = await serve();
    await run(
      'fio',
      [
        ...['--name=verify', '--ioengine=nbd', `--uri=${uri}`, '--rw=randrw', `--bs=${size}`],
        ...[`--iodepth=${depth}`, '--size=32m', '--verify=crc32c', '--verify_fatal=1'],
        ...['--verify_state_save=0', '--output=/dev/null'],
      ],
      { cwd: directory },
    );
    expect(server.counts().commands).toBeGreaterThan((32 * MiB) / (256 << 10));
  });
});

/** An authority, and certificates of it for server and client, under the names qemu expects. */
function certify(into: string): string {
  const openssl = (...args: string[]) =>
    execFileSync('openssl', args, { cwd: into, stdio: 'pipe' });
  openssl(
    ...['req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-subj', '/CN=authority', '-days', '2'],
    ...['-keyout', 'ca-key.pem', '-out', 'ca-cert.pem'],
    ...['-addext', 'keyUsage=critical,keyCertSign'],
  );
  for (const [name, use] of [
    ['server', 'serverAuth'],
    ['client', 'clientAuth'],
  ] as const) {
    const extensions = join(into, `${name}.ext`);
    writeFileSync(
      extensions,
      `subjectAltName=IP:127.0.0.1\nextendedKeyUsage=${use}\nbasicConstraints=CA:FALSE\nkeyUsage=digitalSignature,keyEncipherment\n`,
    );
    openssl(
      ...['req', '-newkey', 'rsa:2048', '-nodes', '-subj', `/CN=${name}`],
      ...['-keyout', `${name}-key.pem`, '-out', `${name}.csr`],
    );
    openssl(
      ...['x509', '-req', '-in', `${name}.csr`, '-CA', 'ca-cert.pem', '-CAkey', 'ca-key.pem'],
      ...['-CAcreateserial', '-days', '2', '-extfile', extensions, '-out', `${name}-cert.pem`],
    );
    chmodSync(join(into, `${name}-key.pem`), 0o600);
  }
  return join(into, 'ca-cert.pem');
}
