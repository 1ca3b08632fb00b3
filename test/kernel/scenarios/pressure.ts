// SPDX-License-Identifier: Apache-2.0
/** A full ring, a full data area, commands as large as the data area: slower, never wrong, never stuck. */
import assert from 'node:assert/strict';
import type { Kit } from '../harness/kit.js';
import type { Proc } from '../harness/process.js';
import { scenario } from '../harness/scenario.js';

const mebibyte = 1024 * 1024;

async function gate(
  k: Kit,
  options: Record<string, unknown>,
): Promise<{ proc: Proc; disk: string }> {
  const all = { name: 'd0', size: 128 * mebibyte, ...options };
  const { proc, ready } = await k.program('gate', [JSON.stringify(all)]);
  return { proc, disk: ready['disk'] ?? '' };
}

function holding(proc: Proc): number {
  const last = proc.lines.filter((line) => line.startsWith('holding=')).at(-1);
  return Number(last?.slice('holding='.length) ?? 0);
}

export default [
  scenario({
    name: 'pressure.ring-full',
    about: 'more commands than a 1 MiB ring holds, all held: the rest waits, then all verify',
    timeoutSeconds: 150,
    async run(k) {
      // However slow the machine is, no time-out of kernel or initiator may answer what is held.
      const { proc, disk } = await gate(k, {
        serve: { ringMiB: 1, dataAreaMiB: 256, commandTimeout: 0 },
      });
      // One disk queues 1024 commands at most; nine of the same backstore overfill 8192 slots of 128 bytes.
      const backstore = k.configfs.find('d0');
      const disks = [disk];
      const tpgs: string[] = [];
      for (let i = 0; i < 8; i++) {
        const attached = await k.configfs.attachLoopback(backstore);
        disks.push(attached.disk);
        tpgs.push(attached.tpg);
      }
      for (const each of disks) {
        const block = `/sys/block/${each.slice('/dev/'.length)}`;
        await k.sh(
          `echo none > ${block}/queue/scheduler && echo 1024 > ${block}/queue/nr_requests && echo 300 > ${block}/device/timeout`,
          { quiet: true },
        );
      }
      proc.kill('SIGUSR1');
      await proc.line(/^closed/);
      const writers = disks.map((each, i) =>
        k.start(
          [
            'fio',
            ...k.fioArguments({
              name: `w${i}`,
              filename: each,
              ioengine: 'libaio',
              direct: 1,
              rw: 'randwrite',
              bs: 512,
              iodepth: 1024,
              iodepth_batch: 64,
              offset: `${i}M`,
              size: '1M',
              verify: 'crc32c',
              verify_fatal: 1,
              do_verify: 1,
              output: `/tmp/fio${i}`,
            }),
          ],
          { name: `fio${i}` },
        ),
      );
      k.step('held until the ring is full');
      let before = -1;
      await k.waitFor(
        'the number of held commands to stand still',
        async () => {
          const now = holding(proc);
          const still = now > 4000 && now === before;
          before = now;
          await new Promise((resolve) => setTimeout(resolve, 1000));
          return still;
        },
        60,
      );
      const held = holding(proc);
      k.log(`  ${held} commands held`);
      assert(held < disks.length * 1024, 'the ring is full before the queues are empty');
      proc.kill('SIGUSR2');
      for (const [i, writer] of writers.entries()) {
        const { code } = await writer.wait(60);
        assert.equal(code, 0, await k.out(`cat /tmp/fio${i}`));
      }
      for (const tpg of tpgs) await k.configfs.detachLoopback(tpg);
      await proc.stop();
    },
  }),
  scenario({
    name: 'pressure.data-area-full',
    about: 'a slow handler with a 1 MiB data area under depth 64: everything verifies',
    timeoutSeconds: 120,
    async run(k) {
      const { proc, disk } = await gate(k, {
        delay: 5,
        serve: { ringMiB: 1, dataAreaMiB: 1 },
      });
      for (const bs of ['4k-64k', '256k', '8m']) {
        await k.fio(
          {
            name: `deep-${bs}`,
            filename: disk,
            ioengine: 'libaio',
            direct: 1,
            rw: 'randwrite',
            [bs.includes('-') ? 'bsrange' : 'bs']: bs,
            iodepth: 64,
            size: '48M',
            verify: 'crc32c',
            verify_fatal: 1,
            do_verify: 1,
          },
          90,
        );
      }
      await proc.stop();
    },
  }),
  scenario({
    name: 'pressure.large-commands',
    about: 'the file example with a 1 MiB data area and commands as large: verified at every size',
    timeoutSeconds: 120,
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 128M ${image}`);
      const { proc, disk } = await k.serve(image, [
        '--data-area-mb',
        '1',
        '--ring-mb',
        '1',
        '--max-sectors',
        '2048',
      ]);
      // A command larger than the data area is refused: the disk has to say what it takes.
      const largest = Number(k.diskAttribute(disk, 'queue/max_sectors_kb'));
      assert(largest > 512 && largest <= 1024, `commands of up to ${largest} KiB`);
      for (const [bs, depth] of [
        ['1m', 1],
        ['1m', 16],
        ['8m', 4],
        ['4k-1m', 32],
      ] as const) {
        await k.fio({
          name: `large-${bs}-${depth}`,
          filename: disk,
          ioengine: 'libaio',
          direct: 1,
          rw: 'randwrite',
          [bs.includes('-') ? 'bsrange' : 'bs']: bs,
          iodepth: depth,
          size: '96M',
          verify: 'crc32c',
          verify_fatal: 1,
          do_verify: 1,
        });
      }
      await proc.stop();
    },
  }),
];
