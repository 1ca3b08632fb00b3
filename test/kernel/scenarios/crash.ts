// SPDX-License-Identifier: Apache-2.0
/** A handler is killed without warning: its successor takes the device back, and nothing acknowledged is lost. */
import assert from 'node:assert/strict';
import { copyAcrossKill, tree } from '../harness/killed-copy.js';
import { type Kit, sleep } from '../harness/kit.js';
import type { Proc } from '../harness/process.js';
import { scenario } from '../harness/scenario.js';

/** A running writer. */
interface Writing {
  writer: Proc;
  /** Writes acknowledged when it last told: it does so twice a second. */
  acknowledged(): number;
  /** Waits until a count that is no older than this call has come in. */
  told(): Promise<void>;
}

async function startWriter(k: Kit, disk: string, image: string): Promise<Writing> {
  const { proc } = await k.program('writer', [disk, image], {
    env: { UV_THREADPOOL_SIZE: '16' },
  });
  const counts = (): string[] => proc.lines.filter((line) => line.startsWith('progress'));
  return {
    writer: proc,
    acknowledged: () => Number(/=(\d+)/.exec(counts().at(-1) ?? '')?.[1] ?? 0),
    async told() {
      const before = counts().length;
      // The next line may have been under way already.
      await k.waitFor('the writer to tell its count', () => counts().length >= before + 2);
    },
  };
}

/** Lets the writer finish and compare disk and file with what was acknowledged. */
async function finishWriter(writer: Proc): Promise<void> {
  writer.kill('SIGTERM');
  const { code } = await writer.wait(60);
  assert.equal(code, 0, `the writer: ${writer.lines.at(-1)}`);
  assert.match(writer.output, /^checked blocks=[1-9]/m);
}

/** fio must keep going: killed and successor, then its own verification of every block. */
async function killUnderFio(k: Kit, args: readonly string[]): Promise<void> {
  const image = `${k.dir}/disk.img`;
  await k.sh(`truncate -s 64M ${image}`);
  let { proc, disk } = await k.serve(image, args);
  const fio = k.start(
    [
      'fio',
      '--output-format=json',
      '--output=/tmp/fio.json',
      ...k.fioArguments({
        name: 'across-the-kill',
        filename: disk,
        ioengine: 'libaio',
        direct: 1,
        rw: 'randwrite',
        bsrange: '4k-64k',
        iodepth: 32,
        size: '60M',
        // Slow enough to last over the kill and the wait.
        rate: '10m',
        verify: 'crc32c',
        verify_fatal: 1,
        do_verify: 1,
      }),
    ],
    { name: 'fio' },
  );
  await sleep(2.5);
  proc.kill('SIGKILL');
  await proc.wait();
  await sleep(1);
  assert(fio.running, 'fio waits for the disk');
  ({ proc, disk } = await k.serve(image, [...args, '--recover']));
  const { code } = await fio.wait(60);
  assert.equal(code, 0, `fio: ${fio.output}`);
  k.fioReport(await k.out('cat /tmp/fio.json', { quiet: true }));
  await k.assertNoStuckTasks();
  await proc.stop();
}

export default [
  scenario({
    name: 'kill.fio',
    about: 'SIGKILL under fio at depth 32, restart: I/O resumes, everything verifies',
    timeoutSeconds: 120,
    run: (k) => killUnderFio(k, []),
  }),
  scenario({
    name: 'kill.acknowledged-writes',
    about:
      'three SIGKILLs under 16 writers: every acknowledged write is on the disk and in the file',
    timeoutSeconds: 120,
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 32M ${image}`);
      let { proc, disk } = await k.serve(image);
      const { writer, acknowledged } = await startWriter(k, disk, image);
      for (const [round, downSeconds] of [0, 1.5, 4].entries()) {
        const before = acknowledged();
        await k.waitFor('acknowledged writes', () => acknowledged() > before + 200);
        k.step(`kill ${round + 1}, down for ${downSeconds} s`);
        proc.kill('SIGKILL');
        await proc.wait();
        await sleep(downSeconds);
        ({ proc, disk } = await k.serve(image, ['--recover']));
      }
      const resumed = acknowledged();
      await k.waitFor('writes after the last recovery', () => acknowledged() > resumed + 200);
      await finishWriter(writer);
      await proc.stop();
    },
  }),
  scenario({
    name: 'kill.out-of-order',
    about: 'SIGKILL when the ring has gone past a command that is not answered yet: it is not lost',
    async run(k) {
      const options = { name: 'd0', size: 1 << 20 };
      const first = await k.program('odd', [JSON.stringify(options)]);
      const read = (place: number, count: string) =>
        `dd if=${first.ready['disk']} of=/dev/null iflag=direct bs=4k status=none skip=${place} ${count}`;
      const held = k.start(['/bin/sh', '-c', read(11, 'count=1')], { name: 'held' });
      // Behind it in the ring, answered before it.
      await k.sh(read(20, 'count=16'));
      assert(held.running, 'the handler holds the first command');
      first.proc.kill('SIGKILL');
      await first.proc.wait();
      const again = JSON.stringify({ ...options, released: true });
      const second = await k.program('odd', [again]);
      // Its entry is behind the tail: only the reset of the ring brings it back before the time-out of 30 s.
      assert.equal((await held.wait(15)).code, 0, 'the command was run again');
      await k.sh(read(20, 'count=16'));
      await second.proc.stop();
    },
  }),
  scenario({
    name: 'kill.filesystem',
    about: 'SIGKILL while a tree is copied into ext4: the copy ends, the check is clean',
    timeoutSeconds: 120,
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 256M ${image}`);
      const first = await k.serve(image);
      const { proc, disk } = await copyAcrossKill(k, first, () => k.serve(image, ['--recover']));
      await k.sh('echo 3 > /proc/sys/vm/drop_caches');
      const again = await k.mount(disk, ['-o', 'ro']);
      for (const i of [1, 2, 3]) {
        await k.sh(`diff -r ${tree} ${again}/${i}`);
      }
      await k.sh(`umount ${again}`);
      await proc.stop();
    },
  }),
  scenario({
    name: 'kill.one-of-two',
    about: 'two processes with a device each, one killed: the other does not notice',
    timeoutSeconds: 120,
    async run(k) {
      const [one, two] = [`${k.dir}/one.img`, `${k.dir}/two.img`];
      await k.sh(`truncate -s 32M ${one} ${two}`);
      const first = await k.serve(one, ['--name', 'one']);
      const second = await k.serve(two, ['--name', 'two']);
      assert.notEqual(first.disk, second.disk);
      const busy = await startWriter(k, first.disk, one);
      const calm = await startWriter(k, second.disk, two);
      await k.waitFor(
        'writes on both',
        () => busy.acknowledged() > 200 && calm.acknowledged() > 200,
      );

      first.proc.kill('SIGKILL');
      await first.proc.wait();
      await busy.told();
      const stalled = busy.acknowledged();
      const running = calm.acknowledged();
      await k.waitFor('more writes on the other', () => calm.acknowledged() > running + 500);
      await busy.told();
      assert.equal(busy.acknowledged(), stalled, 'nothing acknowledges for a dead handler');
      assert(second.proc.running, 'the other process lives');

      const back = await k.serve(one, ['--name', 'one', '--recover']);
      const resumed = busy.acknowledged();
      await k.waitFor('writes on the first again', () => busy.acknowledged() > resumed + 200);
      await finishWriter(busy.writer);
      await finishWriter(calm.writer);
      await back.proc.stop();
      await second.proc.stop();
    },
  }),
  scenario({
    name: 'kill.no-successor',
    about:
      'nobody comes back: I/O fails at the time-out, nothing hangs, a late successor still can',
    timeoutSeconds: 150,
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 32M ${image}`);
      let { proc, disk } = await k.serve(image, ['--timeout', '5']);
      proc.kill('SIGKILL');
      await proc.wait();
      const started = Date.now();
      const { code } = await k.sh(`dd if=/dev/zero of=${disk} oflag=direct bs=4k count=1`, {
        anyCode: true,
        timeoutSeconds: 120,
      });
      assert.notEqual(code, 0, 'a write that nobody took must not succeed');
      assert(Date.now() - started > 3000, 'and it had the time-out to be taken');
      await k.assertNoStuckTasks();
      ({ proc, disk } = await k.serve(image, ['--timeout', '5', '--recover']));
      await k.sh(`dd if=/dev/zero of=${disk} oflag=direct bs=4k count=1`);
      await proc.stop();
    },
  }),
];
