// SPDX-License-Identifier: Apache-2.0
/** A disk in a bucket, served by the S3 example's command line over a server in memory inside the guest. */
import assert from 'node:assert/strict';
import { join } from 'node:path';
import { type Kit, sleep } from '../harness/kit.js';
import type { Proc } from '../harness/process.js';
import { scenario } from '../harness/scenario.js';

const cli = 'examples/s3/dist/cli.js';
const place = 's3://bucket/disk';
const tree = 'examples/s3/dist';

/** A server with an empty disk, and the ways to work with it. */
class Bucket {
  readonly #kit: Kit;
  readonly env: Record<string, string>;

  private constructor(kit: Kit, endpoint: string) {
    this.#kit = kit;
    this.env = {
      AWS_ENDPOINT_URL: endpoint,
      AWS_ACCESS_KEY_ID: 'kernel-test',
      AWS_SECRET_ACCESS_KEY: 'secret',
      STATE_DIRECTORY: join(kit.dir, 'state'),
    };
  }

  static async create(kit: Kit, size: string): Promise<Bucket> {
    const { ready } = await kit.program('s3-server', ['bucket']);
    const bucket = new Bucket(kit, ready['endpoint'] ?? '');
    await bucket.tool(`create ${place} --size ${size}`);
    return bucket;
  }

  /** Runs a command of the tool to its end and answers its output. */
  tool(command: string): Promise<string> {
    return this.#kit.out(`${process.execPath} ${cli} ${command}`, { env: this.env });
  }

  async serve(name: string, ...args: string[]): Promise<{ proc: Proc; disk: string }> {
    const argv = [process.execPath, cli, 'serve', place, '--name', name, ...args];
    const proc = this.#kit.start(argv, { name, env: this.env });
    const [, disk = ''] = await proc.line(/^ready .*disk=(\S+)/, 60);
    return { proc, disk };
  }
}

const verify = {
  ioengine: 'libaio',
  direct: 1,
  rw: 'randwrite',
  bsrange: '4k-64k',
  iodepth: 16,
  size: '24M',
  verify: 'crc32c',
  verify_fatal: 1,
  verify_state_save: 0,
} as const;

/** fio goes on across a SIGKILL and a restart, and verifies all it wrote. */
async function acrossKill(
  k: Kit,
  bucket: Bucket,
  ...options: string[]
): Promise<{ proc: Proc; disk: string }> {
  const first = await bucket.serve('d0', ...options);
  const report = join(k.dir, 'fio.json');
  const job = {
    ...verify,
    name: 'across',
    filename: first.disk,
    size: '12M',
    rate: '4m',
    do_verify: 1,
  };
  const fio = k.start(
    ['fio', '--output-format=json', `--output=${report}`, ...k.fioArguments(job)],
    { name: 'fio' },
  );
  await sleep(1.5);
  first.proc.kill('SIGKILL');
  await first.proc.wait();
  await sleep(0.5);
  assert(fio.running, 'fio waits for the disk');
  const next = await bucket.serve('d0', ...options, '--recover');
  const { code } = await fio.wait(60);
  assert.equal(code, 0, `fio: ${fio.output}`);
  k.fioReport(await k.out(`cat ${report}`, { quiet: true }));
  return next;
}

export default [
  scenario({
    name: 's3.filesystem',
    about:
      'mkfs, a tree, trim and fio verify on a disk in a bucket; all of it is there in the next process',
    timeoutSeconds: 150,
    async run(k) {
      const bucket = await Bucket.create(k, '256M');
      let { proc, disk } = await bucket.serve('d0');
      assert.equal(await k.out(`blockdev --getsize64 ${disk}`), `${256 * 1024 * 1024}`);
      assert.equal(await k.out(`blockdev --getss ${disk}`), '4096');
      await k.sh(`mkfs.ext4 -q ${disk}`);
      const mount = await k.mount(disk);
      await k.sh(`cp -a ${tree} ${mount}/tree && fstrim ${mount} && umount ${mount}`);
      await proc.stop();
      ({ proc, disk } = await bucket.serve('d1'));
      await k.sh(`e2fsck -fn ${disk}`);
      const again = await k.mount(disk);
      await k.sh(`diff -r ${tree} ${again}/tree`);
      await k.fio({ ...verify, name: 'verify', filename: `${again}/fio` });
      await k.sh(`umount ${again}`);
      await proc.stop();
      assert.match(await bucket.tool(`check ${place}`), /\S/);
    },
  }),
  scenario({
    name: 's3.kill',
    about:
      'SIGKILL and restart: under fio with durable writes it all verifies; with a write cache a mounted file system misses nothing; what was synced is there on another machine',
    timeoutSeconds: 240,
    async run(k) {
      const bucket = await Bucket.create(k, '128M');
      let { proc, disk } = await acrossKill(k, bucket, '--no-write-cache');
      await proc.stop();
      k.step('a mounted file system goes on, and misses nothing');
      ({ proc, disk } = await bucket.serve('d0'));
      await k.sh(`mkfs.ext4 -q ${disk}`);
      const kept = await k.mount(disk);
      for (const round of ['a', 'b']) {
        // Acknowledged, and not flushed: a direct write waits for the disk and asks for no flush.
        await k.sh(
          `cp -a ${tree} ${kept}/${round} && dd if=/dev/urandom of=${kept}/${round}.direct bs=64k count=64 oflag=direct status=none && sha256sum ${kept}/${round}.direct > ${k.dir}/${round}.sum`,
        );
        proc.kill('SIGKILL');
        await proc.wait();
        ({ proc, disk } = await bucket.serve('d0', '--recover'));
      }
      await k.sh(`echo 3 > /proc/sys/vm/drop_caches`);
      for (const round of ['a', 'b']) {
        await k.sh(`diff -r ${tree} ${kept}/${round} && sha256sum -c ${k.dir}/${round}.sum`);
      }
      await k.sh(`umount ${kept} && e2fsck -fn ${disk}`);
      await proc.stop();

      k.step('a write cache: what sync has answered for is there');
      ({ proc, disk } = await bucket.serve('d0'));
      await k.sh(`mkfs.ext4 -q ${disk}`);
      const mount = await k.mount(disk);
      await k.sh(`cp -a ${tree} ${mount}/tree && sync`);
      await k.sh(`dd if=/dev/urandom of=${mount}/unsynced bs=64k count=64 status=none`);
      proc.kill('SIGKILL');
      await proc.wait();
      // Another machine's turn: it sees what a disk shows whose power was cut.
      const other = await bucket.serve('d1', '--assume-dead');
      const again = await k.mount(other.disk);
      await k.sh(`diff -r ${tree} ${again}/tree && umount ${again}`);
      await k.sh(`e2fsck -fn ${other.disk}`);
      await other.proc.stop();
      // Here a mount lives on that takes for written what the other machine has never seen: not by itself.
      const refused = await k.sh(`${process.execPath} ${cli} serve ${place} --name d0 --recover`, {
        env: bucket.env,
        anyCode: true,
      });
      assert.match(refused.stderr, /another writer has opened the disk since/);
      // Only to be rid of it.
      ({ proc, disk } = await bucket.serve('d0', '--recover', '--discard-journal'));
      await k.sh(`umount ${mount}`);
      await proc.stop();
    },
  }),
  scenario({
    name: 's3.takeover',
    about: 'a second process takes the disk: the first one’s I/O fails, none of its bytes comes in',
    timeoutSeconds: 150,
    // The old disk's I/O fails, as it must.
    expectedInKernelLog: /I\/O error|Not Ready|critical target error|Buffer I\/O/i,
    async run(k) {
      const bucket = await Bucket.create(k, '64M');
      const old = await bucket.serve('old', '--lease', '1');
      const blocks = (letter: string, disk: string) =>
        `head -c 1M /dev/zero | tr '\\0' ${letter} | dd of=${disk} bs=64k iflag=fullblock oflag=direct conv=fsync status=none`;
      await k.sh(blocks('A', old.disk));
      const next = await bucket.serve('new');
      const read = () =>
        k.out(
          `dd if=${next.disk} bs=64k count=16 iflag=direct status=none | tr -d '\\0' | head -c 1`,
        );
      // Into its cache, without a flush: its lease is over.
      const cached = await k.sh(
        `dd if=/dev/zero of=${old.disk} bs=4k count=1 oflag=direct status=none`,
        { anyCode: true },
      );
      assert.notEqual(cached.code, 0, 'a replaced writer takes nothing into its cache');
      assert.equal(await read(), 'A', 'what was flushed has come over');
      for (let attempt = 0; attempt < 3; attempt++) {
        const { code } = await k.sh(blocks('B', old.disk), { anyCode: true });
        assert.notEqual(code, 0, 'a replaced writer answers for nothing');
      }
      assert.equal(await read(), 'A');
      await k.sh(blocks('C', next.disk));
      assert.equal(await read(), 'C');
      await old.proc.stop();
      await next.proc.stop();
      const last = await bucket.serve('last');
      assert.equal(await k.out(`head -c 1 ${last.disk}`), 'C');
      await last.proc.stop();
    },
  }),
];
