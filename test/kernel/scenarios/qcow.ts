// SPDX-License-Identifier: Apache-2.0
/** A qcow2 image as a disk: QEMU makes it, we serve it, somebody kills us, QEMU finds all of it. */
import assert from 'node:assert/strict';
import { copyAcrossKill, tree } from '../harness/killed-copy.js';
import { type Kit, sleep } from '../harness/kit.js';
import type { Proc } from '../harness/process.js';
import { scenario } from '../harness/scenario.js';

const example = 'examples/qcow/dist/cli.js';

async function serve(
  k: Kit,
  image: string,
  args: readonly string[] = [],
): Promise<{ proc: Proc; disk: string }> {
  const proc = k.start([process.execPath, example, 'serve', image, '--name', 'd0', ...args], {
    name: 'qcow',
  });
  const ready = await proc.line(/^ready name=d0 uio=\/dev\/uio\d+ disk=(\/dev\/sd\w+)$/, 60);
  return { proc, disk: ready[1] ?? '' };
}

/** The images of the scenario: a file system of its own in the base, an empty disk over it. */
async function makeImages(k: Kit, size: string): Promise<string> {
  await k.sh(`cd ${k.dir} && qemu-img create -q -f raw base.raw ${size}
    qemu-img create -q -f qcow2 -b base.raw -F raw middle.qcow2
    qemu-img create -q -f qcow2 -o lazy_refcounts=off -b middle.qcow2 -F qcow2 disk.qcow2`);
  return `${k.dir}/disk.qcow2`;
}

/** The disk as QEMU sees it, in a raw file. A kill may leave space counted and not used, and nothing worse. */
async function exported(k: Kit, image: string): Promise<string> {
  const { code } = await k.sh(`qemu-img check -q ${image}`, {
    anyCode: true,
    quiet: true,
    timeoutSeconds: 60,
  });
  assert(code === 0 || code === 3, `qemu-img check finds more than leaks: exit code ${code}`);
  await k.sh(`${process.execPath} ${example} check ${image} --repair leaks`);
  await k.sh(`qemu-img check -q ${image}`, { timeoutSeconds: 60 });
  await k.sh(`qemu-img convert -f qcow2 -O raw ${image} ${k.dir}/seen.raw`, { timeoutSeconds: 60 });
  return `${k.dir}/seen.raw`;
}

export default [
  scenario({
    name: 'qcow.filesystem',
    about: 'qcow2 chain: ext4, a tree copied across a SIGKILL; clean and complete for QEMU',
    timeoutSeconds: 150,
    memoryMb: 1536,
    packages: ['qemu-utils'],
    async run(k) {
      const image = await makeImages(k, '256M');
      const first = await serve(k, image);
      k.step('locked against QEMU while it is served');
      const { code, stderr } = await k.sh(`qemu-img resize -q ${image} +1M`, { anyCode: true });
      assert.equal(code, 1);
      assert.match(stderr, /Failed to get|lock/);

      k.step('copy, and kill the handler in the middle');
      const { proc, disk } = await copyAcrossKill(k, first, () => serve(k, image, ['--recover']));

      k.step('discard, and what QEMU makes of it');
      const again = await k.mount(disk);
      await k.sh(`rm -r ${again}/1 && fstrim ${again} && umount ${again}`);
      await proc.stop();
      const raw = await exported(k, image);
      await k.sh(`e2fsck -fn ${raw}`, { timeoutSeconds: 60 });
      const seen = `${k.dir}/seen`;
      await k.sh(`mkdir ${seen} && debugfs -R 'rdump / ${seen}' ${raw}`, { timeoutSeconds: 60 });
      for (const i of [2, 3]) await k.sh(`diff -r ${tree} ${seen}/${i}`, { timeoutSeconds: 60 });
      await k.sh(`test ! -e ${seen}/1`);
    },
  }),
  scenario({
    name: 'qcow.fio',
    about: 'qcow2: fio at depth 32 across a SIGKILL verifies; clean for QEMU, same data',
    timeoutSeconds: 150,
    packages: ['qemu-utils'],
    async run(k) {
      const image = await makeImages(k, '64M');
      let { proc, disk } = await serve(k, image);
      const job = {
        name: 'across-the-kill',
        ioengine: 'libaio',
        direct: 1,
        rw: 'randwrite',
        bsrange: '4k-64k',
        iodepth: 32,
        size: '60M',
        verify: 'crc32c',
        verify_fatal: 1,
      };
      const fio = k.start(
        [
          'fio',
          '--output-format=json',
          '--output=/tmp/fio.json',
          // Slow enough to last over the kill and the wait.
          ...k.fioArguments({ ...job, filename: disk, rate: '10m', do_verify: 1 }),
        ],
        { name: 'fio' },
      );
      await sleep(2.5);
      proc.kill('SIGKILL');
      await proc.wait();
      await sleep(1);
      assert(fio.running, 'fio waits for the disk');
      ({ proc, disk } = await serve(k, image, ['--recover']));
      const { code } = await fio.wait(60);
      assert.equal(code, 0, `fio: ${fio.output}`);
      k.fioReport(await k.out('cat /tmp/fio.json', { quiet: true }));
      const sum = await k.out(`sha256sum < ${disk}`);
      await proc.stop();
      const raw = await exported(k, image);
      assert.equal(await k.out(`sha256sum < ${raw}`), sum, 'QEMU reads what we served');
    },
  }),
];
