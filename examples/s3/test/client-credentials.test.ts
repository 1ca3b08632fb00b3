// SPDX-License-Identifier: Apache-2.0
/** Credentials and settings where people keep them: each source for real, against servers that play its service. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type RequestListener, type Server } from 'node:http';
import { createServer as createTlsServer } from 'node:https';
import { type AddressInfo, connect as connectTo, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { connect } from '../src/client/index.js';
import { bucketRequest } from './support/bucket.js';
import { MemoryServer } from './support/memory-server.js';

const bucket = 'secrets';
let server: MemoryServer;
let dir: string;
let started: Server[];
/** Access keys and tokens that the server saw, in order. */
let seen: string[];

beforeEach(async () => {
  server = await new MemoryServer({ accessKeyId: 'GOODKEY' }).start();
  await bucketRequest(server, bucket, 'PUT');
  dir = mkdtempSync(join(tmpdir(), 'tcmu-s3-'));
  started = [];
  seen = [];
  // Nothing of this machine's own settings.
  for (const name of Object.keys(process.env)) {
    if (/^AWS_|_proxy$/i.test(name)) vi.stubEnv(name, undefined);
  }
  vi.stubEnv('AWS_CONFIG_FILE', join(dir, 'config'));
  vi.stubEnv('AWS_SHARED_CREDENTIALS_FILE', join(dir, 'credentials'));
  vi.stubEnv('AWS_EC2_METADATA_DISABLED', 'true');
});

afterEach(async () => {
  vi.unstubAllEnvs();
  await server.stop();
  for (const one of started) {
    one.closeAllConnections();
    await new Promise((resolve) => one.close(resolve));
  }
  rmSync(dir, { recursive: true, force: true });
});

async function listen(one: Server): Promise<string> {
  started.push(one);
  await new Promise<void>((resolve) => one.listen(0, '127.0.0.1', resolve));
  return `127.0.0.1:${(one.address() as AddressInfo).port}`;
}

function file(name: string, text: string): string {
  const path = join(dir, name);
  writeFileSync(path, text);
  return path;
}

/** Puts and gets an object by what the environment says. */
async function roundTrip(options: Parameters<typeof connect>[1] = {}): Promise<void> {
  const { store, prefix } = await connect(`s3://${bucket}/disk`, options);
  try {
    await store.put(`${prefix}/x`, [Buffer.from('hello')], { ifNoneMatch: '*' });
    expect(String((await store.get(`${prefix}/x`)).body)).toBe('hello');
    await store.delete([`${prefix}/x`]);
  } finally {
    await store.close();
  }
}

describe('credentials', () => {
  beforeEach(() => vi.stubEnv('AWS_ENDPOINT_URL', server.endpoint));

  it('come from the environment', async () => {
    vi.stubEnv('AWS_ACCESS_KEY_ID', 'GOODKEY');
    vi.stubEnv('AWS_SECRET_ACCESS_KEY', 'x');
    await roundTrip();
  });

  it('come from a profile of the shared files, with region and endpoint', async () => {
    vi.stubEnv('AWS_ENDPOINT_URL', undefined);
    file('credentials', '[work]\naws_access_key_id = GOODKEY\naws_secret_access_key = x\n');
    file('config', `[profile work]\nregion = eu-north-1\nendpoint_url = ${server.endpoint}\n`);
    await roundTrip({ profile: 'work' });
    vi.stubEnv('AWS_PROFILE', 'work');
    await roundTrip();
  });

  it('come from a program that a profile names', async () => {
    const answer = { Version: 1, AccessKeyId: 'GOODKEY', SecretAccessKey: 'x' };
    const program = file('keys.json', JSON.stringify(answer));
    file('config', `[profile tool]\ncredential_process = cat ${program}\n`);
    await roundTrip({ profile: 'tool' });
  });

  it('come from a web identity, exchanged for a role', async () => {
    const sts = await listen(
      createServer((request, response) => {
        let body = '';
        request.on('data', (chunk) => (body += chunk));
        request.on('end', () => {
          seen.push(body);
          response.setHeader('content-type', 'text/xml').end(assumedRole('GOODKEY'));
        });
      }),
    );
    vi.stubEnv('AWS_ENDPOINT_URL_STS', `http://${sts}`);
    vi.stubEnv('AWS_REGION', 'eu-west-1');
    vi.stubEnv('AWS_ROLE_ARN', 'arn:aws:iam::123456789012:role/disk');
    vi.stubEnv('AWS_WEB_IDENTITY_TOKEN_FILE', file('token', 'a.web.token'));
    await roundTrip();
    expect(seen).toHaveLength(1);
    expect(seen[0]).toContain('WebIdentityToken=a.web.token');
  });

  it("come from the instance's metadata", async () => {
    vi.stubEnv('AWS_EC2_METADATA_DISABLED', undefined);
    const imds = await listen(createServer(instanceMetadata('GOODKEY')));
    vi.stubEnv('AWS_EC2_METADATA_SERVICE_ENDPOINT', `http://${imds}`);
    await roundTrip();
    expect(seen).toContain('PUT /latest/api/token');
  });

  it("come from the container's own service", async () => {
    const service = await listen(
      createServer((request, response) => {
        seen.push(String(request.headers.authorization));
        response.end(JSON.stringify(temporary('GOODKEY', 'one')));
      }),
    );
    vi.stubEnv('AWS_CONTAINER_CREDENTIALS_FULL_URI', `http://${service}/keys`);
    vi.stubEnv('AWS_CONTAINER_AUTHORIZATION_TOKEN', 'let-me-in');
    await roundTrip();
    expect(seen).toEqual(['let-me-in']);
  });

  it('are got anew, within the call, when the server says they have expired', async () => {
    let token = 'old';
    const service = await listen(
      createServer((_request, response) => {
        seen.push(token);
        response.end(JSON.stringify(temporary('GOODKEY', token)));
      }),
    );
    vi.stubEnv('AWS_CONTAINER_CREDENTIALS_FULL_URI', `http://${service}/keys`);
    const { store } = await connect(`s3://${bucket}/disk`);
    await store.put('disk/x', [Buffer.from('1')]);
    server.expiredTokens.add('old');
    token = 'new';
    const many = Array.from({ length: 8 }, (_, n) => store.put(`disk/${n}`, [Buffer.from('2')]));
    await Promise.all(many);
    expect(seen[0]).toBe('old');
    expect(seen).toContain('new');
    // Still the same ones: then it is for the caller to wait.
    server.expiredTokens.add('new');
    await expect(store.get('disk/x')).rejects.toMatchObject({
      kind: 'credentials',
      code: 'ERR_TCMU_S3_CREDENTIALS',
    });
    token = 'newest';
    expect(String((await store.get('disk/x')).body)).toBe('1');
    await store.close();
  });

  it('that are nowhere are an error that says where to put them', async () => {
    const { store } = await connect(`s3://${bucket}/disk`);
    await expect(store.get('disk/x')).rejects.toMatchObject({
      kind: 'credentials',
      ambiguous: false,
      message: expect.stringContaining('AWS_PROFILE'),
    });
    await store.close();
  });

  it('of a service that does not answer end with the time-out, or the signal', async () => {
    const silent = await listen(createServer(() => {}));
    vi.stubEnv('AWS_CONTAINER_CREDENTIALS_FULL_URI', `http://${silent}/keys`);
    const { store } = await connect(`s3://${bucket}/disk`, { requestTimeoutMs: 50 });
    await expect(store.get('disk/x')).rejects.toMatchObject({ kind: 'credentials' });
    const stop = new AbortController();
    const call = store.get('disk/x', { signal: stop.signal });
    stop.abort();
    await expect(call).rejects.toMatchObject({ kind: 'aborted' });
    await store.close();
  });
});

describe('options that can not be meant', () => {
  it.each([
    [{ profile: 'nobody' }, /profile nobody/],
    [{ accessKeyId: 'only' }, /go together/],
    [{ proxy: 'socks5://x' }, /proxy socks5/],
    [{ caFile: '/does/not/exist' }, /\/does\/not\/exist/],
    [{ endpoint: 'nonsense' }, /nonsense/],
  ])('%j', async (options, message) => {
    await expect(connect(`s3://${bucket}/disk`, options)).rejects.toMatchObject({
      code: 'ERR_TCMU_INVALID_ARGUMENT',
      message: expect.stringMatching(message),
    });
  });
});

describe('the way to the server', () => {
  const keys = { accessKeyId: 'GOODKEY', secretAccessKey: 'x' };

  it('may be TLS with an authority of its own, the body left unsigned', async () => {
    const hashes: string[] = [];
    const tls = createTlsServer(
      {
        key: readFileSync(new URL('fixtures/server-key.pem', import.meta.url)),
        cert: readFileSync(new URL('fixtures/server-cert.pem', import.meta.url)),
      },
      (request, response) => {
        hashes.push(String(request.headers['x-amz-content-sha256']));
        server.handle(request, response);
      },
    ) as unknown as Server;
    const endpoint = `https://${await listen(tls)}`;
    await expect(roundTrip({ ...keys, endpoint })).rejects.toMatchObject({
      kind: 'outage',
      ambiguous: false,
      message: expect.stringContaining('self-signed'),
    });
    const caFile = new URL('fixtures/server-cert.pem', import.meta.url).pathname;
    await roundTrip({ ...keys, endpoint, caFile });
    expect(hashes[0]).toBe('UNSIGNED-PAYLOAD');
    await roundTrip({ ...keys, endpoint, caFile, signBodies: true });
    expect(hashes.at(-3)).toMatch(/^[0-9a-f]{64}$/);
    vi.stubEnv('AWS_CA_BUNDLE', caFile);
    await roundTrip({ ...keys, endpoint });
  });

  it('may lead through a proxy', async () => {
    const tunnels: string[] = [];
    const proxy = createServer();
    proxy.on('connect', (request, client: Socket) => {
      tunnels.push(String(request.url));
      const { port } = new URL(server.endpoint);
      const upstream = connectTo(Number(port), '127.0.0.1', () => {
        client.write('HTTP/1.1 200 OK\r\n\r\n');
        client.pipe(upstream).pipe(client);
      });
      for (const socket of [client, upstream]) socket.on('error', () => upstream.destroy());
      client.on('close', () => upstream.destroy());
    });
    const address = await listen(proxy);
    const endpoint = 'http://store.invalid:9000';
    for (const options of [
      { env: { HTTP_PROXY: `http://${address}` } },
      { proxy: `http://${address}`, env: {} },
    ]) {
      await roundTrip({ ...keys, endpoint, ...options });
      expect(new Set(tunnels.splice(0))).toEqual(new Set(['store.invalid:9000']));
    }
    await expect(
      roundTrip({ ...keys, endpoint, proxy: 'none', env: { HTTP_PROXY: `http://${address}` } }),
    ).rejects.toMatchObject({ kind: 'outage', ambiguous: false });
  });

  it('moves to the region that the server names', async () => {
    let regions: string[] = [];
    const regional = await listen(
      createServer((request, response) => {
        const region = /Credential=[^/]+\/\d+\/([^/]+)\//.exec(
          String(request.headers.authorization),
        )?.[1];
        regions.push(String(region));
        if (region === 'eu-central-1') return server.handle(request, response);
        request.resume();
        response
          .writeHead(400, { 'x-amz-bucket-region': 'eu-central-1' })
          .end('<Error><Code>AuthorizationHeaderMalformed</Code></Error>');
      }),
    );
    const endpoint = `http://${regional}`;
    const { store } = await connect(`s3://${bucket}/disk`, { ...keys, endpoint, region: 'here' });
    await store.put('disk/x', [Buffer.from('1')]);
    expect(regions).toEqual(['here', 'eu-central-1']);
    regions = [];
    await store.put('disk/y', [Buffer.from('1')]);
    expect(regions).toEqual(['eu-central-1']);
    await store.close();
  });

  it('survives a clock that is wrong', async () => {
    server.clockOffset = 3 * 60 * 60_000;
    const options = { ...keys, endpoint: server.endpoint };
    await roundTrip(options);
    server.clockOffset = -40 * 60_000;
    await roundTrip(options);
  });
});

function temporary(AccessKeyId: string, Token: string) {
  const Expiration = new Date(Date.now() + 3_600_000).toISOString();
  return { Code: 'Success', AccessKeyId, SecretAccessKey: 'x', Token, Expiration };
}

function assumedRole(accessKeyId: string): string {
  const { Expiration, Token } = temporary(accessKeyId, 'session');
  return `<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>${accessKeyId}</AccessKeyId><SecretAccessKey>x</SecretAccessKey><SessionToken>${Token}</SessionToken><Expiration>${Expiration}</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`;
}

function instanceMetadata(accessKeyId: string): RequestListener {
  return (request, response) => {
    seen.push(`${request.method} ${request.url}`);
    request.resume();
    if (request.method === 'PUT') response.end('imds-token');
    else if (/security-credentials(-extended)?\/?$/.test(String(request.url)))
      response.end('disk-role');
    else response.end(JSON.stringify(temporary(accessKeyId, 'session')));
  };
}
