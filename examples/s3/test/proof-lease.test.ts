// SPDX-License-Identifier: Apache-2.0
/** Two processes on one disk: nothing is acknowledged by the older one once the newer one is open. In memory and on Ceph. */
import { rmSync } from 'node:fs';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { createDisk, S3Disk } from '../src/index.js';
import type { ObjectStore } from '../src/object-store.js';
import { requestsTo } from './support/drive.js';
import { FaultProxy } from './support/fault-proxy.js';
import {
  available,
  newBucket,
  openBucket,
  reaching,
  serverKinds,
  startServer,
  type TestServer,
} from './support/servers.js';
import { buildWriter, Writer } from './support/writer.js';

/** Nothing but the lease tells the older one: it never uploads, and doesn't look around. */
const silent = { leaseMs: 500, watchMs: 0, writeBackMs: 1e9 };

let program: string;
beforeAll(async () => {
  program = await buildWriter('pulse');
});
afterAll(() => rmSync(program, { force: true }));

const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

describe.each(serverKinds)('on %s', (kind) => {
  describe.skipIf(!available(kind))('a writer that is replaced', () => {
    let server: TestServer;
    let bucket: string;
    let objects: ObjectStore;
    let proxy: FaultProxy;
    let old: Writer;

    beforeAll(async () => {
      server = await startServer(kind);
    });
    afterAll(() => server.stop());
    beforeEach(async () => {
      bucket = await newBucket(server);
      objects = await openBucket(server, bucket);
      proxy = await new FaultProxy(server.endpoint).start();
      await createDisk(requestsTo(objects), 'disk', { size: 1024 * 1024 });
      const { accessKeyId, secretAccessKey, region } = server;
      const { endpoint } = proxy;
      const { env: _env, ...connect } = reaching({
        accessKeyId,
        secretAccessKey,
        region,
        endpoint,
      });
      const location = `s3://${bucket}/disk`;
      old = new Writer(program, {
        location,
        connect,
        disk: silent,
        history: { seed: 1, blocks: 1 },
      });
      await old.until(({ lines }) => lines.length > 5);
    });
    afterEach(async () => {
      await old.kill();
      await proxy.stop();
      await objects.close();
    });

    const acknowledged = (): bigint[] =>
      old.lines.filter((line) => line.startsWith('a ')).map((line) => BigInt(line.slice(2)));

    async function replace(): Promise<bigint> {
      const next = await S3Disk.open(objects, 'disk', { leaseMs: 500 });
      const at = process.hrtime.bigint();
      await next.close();
      return at;
    }

    async function expectSilence(since: bigint): Promise<void> {
      await old.until(({ lines }) => lines.some((line) => line.startsWith('failed')));
      await pause(100);
      expect(acknowledged().length).toBeGreaterThan(0);
      expect(acknowledged().filter((at) => at > since)).toEqual([]);
      const failures = new Set(old.lines.filter((line) => line.startsWith('failed')));
      expect([...failures]).toEqual(['failed ERR_TCMU_S3_FENCED']);
    }

    it('while it writes', async () => {
      await expectSilence(await replace());
    });

    it('while it is stopped, and goes on when the other one is open', async () => {
      old.stop();
      const opened = await replace();
      await pause(200);
      old.goOn();
      await expectSilence(opened);
    });

    it('while its requests take longer than its lease', async () => {
      proxy.plan = () => ({ kind: 'delay', ms: 700 });
      const opened = await replace();
      await pause(800);
      expect(acknowledged().filter((at) => at > opened)).toEqual([]);
      proxy.plan = () => undefined;
      await expectSilence(opened);
    });
  });
});
