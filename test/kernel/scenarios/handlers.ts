// SPDX-License-Identifier: Apache-2.0
/** Handlers that break their contract, and initiators that give up: one command suffers, nothing else does. */
import assert from 'node:assert/strict';
import type { Kit } from '../harness/kit.js';
import type { Proc } from '../harness/process.js';
import { scenario } from '../harness/scenario.js';

const mebibyte = 1024 * 1024;

async function odd(
  k: Kit,
  options: Record<string, unknown> = {},
): Promise<{ proc: Proc; disk: string }> {
  const all = { name: 'd0', size: 64 * mebibyte, ...options };
  const { proc, ready } = await k.program('odd', [JSON.stringify(all)]);
  return { proc, disk: ready['disk'] ?? '' };
}

/** Reads the n-th odd place, 4 KiB, past the page cache. */
function readOdd(disk: string, n: number, more = ''): string {
  return `dd if=${disk} iflag=direct bs=4096 skip=${n} count=1 status=none ${more}`;
}

/** The disk still does what disks do. */
async function assertWorks(k: Kit, disk: string): Promise<void> {
  await k.sh(
    `head -c 1M /dev/urandom > /tmp/probe && dd if=/tmp/probe of=${disk} oflag=direct bs=64k seek=64 status=none && dd if=${disk} iflag=direct bs=64k skip=64 count=16 status=none | cmp - /tmp/probe`,
  );
}

export default [
  scenario({
    name: 'handler.throws',
    about:
      'a handler that throws, rejects, or resolves without an answer: an I/O error each, and a report',
    async run(k) {
      const { proc, disk } = await odd(k);
      for (const [n, message] of [
        [1, /thrown by the handler/],
        [2, /rejected by the handler/],
        [4, /ERR_TCMU_COMMAND_UNCOMPLETED/],
      ] as const) {
        const { code } = await k.sh(readOdd(disk, n, 'of=/dev/null'), { anyCode: true });
        assert.notEqual(code, 0, `place ${n} must fail`);
        await proc.line(message, 5);
        await assertWorks(k, disk);
      }
      await proc.stop();
    },
  }),
  scenario({
    name: 'handler.completes-twice',
    about: 'a second completion is an error to the handler and nothing to the kernel',
    async run(k) {
      const { proc, disk } = await odd(k);
      for (let round = 0; round < 20; round++) {
        const first = await k.out(
          `${readOdd(disk, 3)} | od -An -tx1 -w4096 | sort -u | cut -c1-12`,
        );
        assert.equal(first, '33 33 33 33', 'the first completion counts');
      }
      await proc.line(/^second ERR_TCMU_COMMAND_COMPLETED/, 5);
      await assertWorks(k, disk);
      await proc.stop();
    },
  }),
  scenario({
    name: 'handler.never-settles',
    about:
      'the kernel answers at its time-out, the signal is aborted, the rest goes on, the end is bounded',
    async run(k) {
      const { proc, disk } = await odd(k, { serve: { commandTimeout: 6 }, deadline: 2000 });
      const { code } = await k.sh(readOdd(disk, 5, 'of=/dev/null'), { anyCode: true });
      assert.notEqual(code, 0, 'nobody answered it');
      await proc.line(/^aborted 5 ERR_TCMU_COMMAND_ABORTED/, 15);
      await assertWorks(k, disk);
      const started = Date.now();
      await proc.stop(30);
      assert(Date.now() - started < 20_000, 'close keeps its deadline');
    },
  }),
  scenario({
    name: 'handler.abort',
    about: 'an initiator that gives up on a command reaches command.signal; the retry succeeds',
    async run(k) {
      const { proc, disk } = await odd(k);
      await k.sh(`echo 2 > /sys/block/${disk.slice('/dev/'.length)}/device/timeout`);
      await k.sh(readOdd(disk, 11, 'of=/dev/null'), { timeoutSeconds: 60 });
      await proc.line(/^aborted 11 ERR_TCMU_COMMAND_ABORTED/, 1);
      await proc.line(/^tmr abort-task commands=1/, 1);
      await assertWorks(k, disk);
      await proc.stop();
    },
  }),
  scenario({
    name: 'handler.lun-reset',
    about: 'a LUN reset reaches command.signal and the handler; the command is retried',
    async run(k) {
      const { proc, disk } = await odd(k);
      const reader = k.start(['/bin/sh', '-c', readOdd(disk, 11, 'of=/dev/null')], { name: 'dd' });
      await k.waitFor('the read to be held', async () => {
        const inflight = await k.out(`cat /sys/block/${disk.slice('/dev/'.length)}/inflight`, {
          quiet: true,
        });
        return Number(inflight.split(/\s+/)[0]) > 0;
      });
      await k.sh(`sg_reset --no-esc --device ${disk}`);
      await proc.line(/^aborted 11 ERR_TCMU_COMMAND_ABORTED/, 10);
      await proc.line(/^tmr lun-reset commands=1/, 1);
      assert.equal((await reader.wait(40)).code, 0, 'the retry succeeds');
      await assertWorks(k, disk);
      await proc.stop();
    },
  }),
  scenario({
    name: 'handler.stale-bytes',
    about: 'no byte of another command in a short, empty or failed read',
    async run(k) {
      const { proc, disk } = await odd(k);
      const secret = 'S3CRET-OF-ANOTHER-COMMAND';
      /** Leaves the secret all over the pages that the next command gets. */
      const spill = `yes ${secret} | dd of=${disk} oflag=direct bs=1M seek=32 count=16 iflag=fullblock status=none`;
      const found = async (file: string): Promise<number> => {
        const { stdout } = await k.sh(`grep -c S3CRET ${file}`, { anyCode: true, quiet: true });
        return Number(stdout);
      };
      for (const n of [6, 7, 8, 9, 10, 12]) {
        await k.sh(spill, { quiet: true });
        const lba = (8 * n).toString(16).padStart(2, '0');
        const { code, stderr } = await k.sh(
          `rm -f /tmp/out; sg_raw -C 1 -r 4096 -o /tmp/out ${disk} 28 00 00 00 00 ${lba} 00 00 08 00`,
          { anyCode: true },
        );
        assert.equal(await found('/tmp/out'), 0, `place ${n}: somebody else's bytes`);
        if (n === 8 || n === 9) {
          assert.notEqual(code, 0, `place ${n} fails`);
          assert.match(stderr, /Medium Error/i);
          continue;
        }
        assert.equal(code, 0, `place ${n} is answered with GOOD`);
        const bytes = await k.out(
          `od -An -v -tx1 -w512 /tmp/out | awk '{ print $1, $512 }' | sort | uniq -c | tr -s ' '`,
        );
        k.log(`  place ${n}: ${bytes.replaceAll('\n', ';')}`);
        if (n === 6 || n === 10) assert.equal(bytes.replace(/^ *\d+ /, ''), '00 00');
        if (n === 7) assert.match(bytes, /1 37 37/);
        if (n === 12) assert.match(bytes, /1 3c 3c/);
      }
      k.step('through the block layer, in pages that the reader knows');
      for (const n of [6, 7, 8, 9, 10, 12]) {
        await k.sh(spill, { quiet: true });
        const seen = await k.run('peek', [disk, String(4096 * n), '4096', 'S3CRET']);
        assert.match(seen, n === 8 || n === 9 ? /error=ENODATA/ : /error=none bytes=4096/);
        assert.match(seen, /found=false/, `place ${n}: somebody else's bytes`);
      }
      k.step('the control: what was spilt is found where it was written');
      const control = await k.run('peek', [disk, String(32 * mebibyte), '4096', 'S3CRET']);
      assert.match(control, /error=none bytes=4096 found=true/);
      await proc.stop();
    },
  }),
];
