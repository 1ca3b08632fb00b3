// SPDX-License-Identifier: Apache-2.0
/** Processes that are killed, and processes that are replaced: on a server in memory and on Ceph's. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { createDisk, S3Disk } from '../src/index.js';
import type { ObjectStore } from '../src/object-store.js';
import { drive, readImage, requestsTo } from './support/drive.js';
import { FaultProxy } from './support/fault-proxy.js';
import { readVersions, recoveredPrefix } from './support/model.js';
import { randomNumbers } from './support/random.js';
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

const blocks = 2048;
const size = blocks * 4096;
const geometry = {
  segmentSize: 256 * 1024,
  logLimit: 2 * 1024 * 1024,
  cacheSize: 1024 * 1024,
  leaseMs: 500,
};

let program: string;
beforeAll(async () => {
  program = await buildWriter();
});
afterAll(() => rmSync(program, { force: true }));

describe.each(serverKinds)('on %s', (kind) => {
  describe.skipIf(!available(kind))('a disk', () => {
    let server: TestServer;
    let bucket: string;
    let objects: ObjectStore;
    let dir: string;
    let writers: Writer[];

    beforeAll(async () => {
      server = await startServer(kind);
    });
    afterAll(() => server.stop());
    beforeEach(async () => {
      bucket = await newBucket(server);
      objects = await openBucket(server, bucket);
      await createDisk(requestsTo(objects), 'disk', { size, chunkSize: 128 * 1024 });
      dir = mkdtempSync(join(tmpdir(), 'tcmu-s3-'));
      writers = [];
    });
    afterEach(async () => {
      for (const writer of writers) await writer.kill();
      await objects.close();
      rmSync(dir, { recursive: true, force: true });
    });

    function start(
      history: { seed: number; after?: number },
      more = {},
      endpoint = server.endpoint,
    ) {
      const { accessKeyId, secretAccessKey, region } = server;
      const { env: _env, ...connect } = reaching({
        accessKeyId,
        secretAccessKey,
        region,
        endpoint,
      });
      const writer = new Writer(program, {
        location: `s3://${bucket}/disk`,
        connect,
        disk: { ...geometry, ...more },
        history: { ...history, blocks },
      });
      writers.push(writer);
      return writer;
    }

    async function survives(lives: number, options: object): Promise<void> {
      const random = randomNumbers(lives);
      let before: Uint32Array = new Uint32Array(blocks);
      let after = 0;
      for (let life = 0; life < lives; life++) {
        const history = { seed: life, blocks, after };
        const writer = start(history, options);
        const flushes = 1 + Math.floor(random() * 8);
        const steps = after + Math.floor(random() * 400);
        await writer.until(
          ({ lines, issued }) =>
            lines.filter((line) => line.startsWith('f ')).length >= flushes && issued >= steps,
        );
        await writer.kill();
        const { flushed, issued } = writer;
        const disk = await S3Disk.open(objects, 'disk', { ...geometry, ...options });
        const versions = readVersions(await readImage(disk));
        recoveredPrefix(versions, { history, flushed, issued, before });
        await disk.close();
        [before, after] = [versions, issued];
      }
    }

    it('survives SIGKILL at any moment', () => survives(kind === 'memory' ? 6 : 3, {}), 120_000);

    it(
      'survives SIGKILL with the journal on this host',
      () => survives(kind === 'memory' ? 3 : 1, { journal: join(dir, 'journal') }),
      120_000,
    );

    it('belongs to the process that opened it last', async () => {
      const old = start({ seed: 1 });
      await old.until(({ flushed }) => flushed > 50);
      const disk = await S3Disk.open(objects, 'disk', geometry);
      const taken = readVersions(await readImage(disk));
      await drive(disk, { history: { seed: 2, blocks, after: 1_000_000 }, steps: 300 });
      await disk.flush();
      const mine = readVersions(await readImage(disk));
      await old.ended;
      // It flushed nothing more, and everything it tried since has failed.
      const history = { seed: 1, blocks };
      const { flushed, issued } = old;
      recoveredPrefix(taken, { history, flushed, issued });
      const end = old.lines.findIndex((line) => line.startsWith('failed'));
      expect(old.lines[end]).toBe('failed ERR_TCMU_S3_FENCED');
      expect(old.lines.slice(end + 1)).toHaveLength(20);
      for (const line of old.lines.slice(end + 1))
        expect(line).toMatch(/^[wf] ERR_TCMU_S3_FENCED$/);
      // None of its bytes came in, not after a restart either.
      await disk.close();
      const again = await S3Disk.open(objects, 'disk', geometry);
      expect(readVersions(await readImage(again))).toEqual(mine);
      await again.close();
    }, 120_000);

    it('takes nothing from a replaced process whose requests were held up', async () => {
      const proxy = await new FaultProxy(server.endpoint).start();
      const old = start({ seed: 3 }, {}, proxy.endpoint);
      await old.until(({ flushed }) => flushed > 50);
      // Its uploads stop on their way, and arrive when the disk has another owner.
      let held = 0;
      proxy.plan = ({ method }) => {
        if (method !== 'PUT') return undefined;
        held++;
        return { kind: 'late', ms: 1500 };
      };
      while (held < 3) await new Promise((resolve) => setTimeout(resolve, 10));
      const disk = await S3Disk.open(objects, 'disk', geometry);
      const taken = readVersions(await readImage(disk));
      await drive(disk, { history: { seed: 4, blocks, after: 1_000_000 }, steps: 300 });
      await disk.flush();
      const mine = readVersions(await readImage(disk));
      await new Promise((resolve) => setTimeout(resolve, 1700));
      await old.kill();
      // All that it was ever told is durable was there when the disk was taken from it.
      const { flushed, issued } = old;
      recoveredPrefix(taken, { history: { seed: 3, blocks }, flushed, issued });
      await disk.close();
      const again = await S3Disk.open(objects, 'disk', geometry);
      expect(readVersions(await readImage(again))).toEqual(mine);
      await again.close();
      await proxy.stop();
    }, 120_000);
  });
});
