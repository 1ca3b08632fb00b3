// SPDX-License-Identifier: Apache-2.0
/** The backing file gives space back, keeps its neighbours, and grows while in use. */
import assert from 'node:assert/strict';
import { statSync } from 'node:fs';
import { scenario } from '../harness/scenario.js';

const mebibyte = 1024 * 1024;

/** Mebibytes a file really takes. */
function allocated(path: string): number {
  return (statSync(path).blocks * 512) / mebibyte;
}

export default [
  scenario({
    name: 'unmap.frees-blocks',
    about: 'a discard punches a hole, reads as zeros, and leaves its neighbours alone',
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 256M ${image}`);
      const { proc, disk } = await k.serve(image);
      const hash = (skip: number, count: number): Promise<string> =>
        k.out(`dd if=${disk} iflag=direct bs=1M skip=${skip} count=${count} status=none | md5sum`);
      const zeros = (count: number): Promise<string> =>
        k.out(`head -c ${count}M /dev/zero | md5sum`);

      k.step('fill 96 MiB, discard the middle third');
      await k.sh(`dd if=/dev/urandom of=${disk} oflag=direct bs=1M count=96 status=none`);
      const before = [await hash(0, 32), await hash(64, 32)];
      assert(allocated(image) >= 96, `${allocated(image)} MiB allocated after 96 were written`);
      await k.sh(`blkdiscard -o 32M -l 32M ${disk}`);
      const left = allocated(image);
      assert(left <= 65 && left >= 64, `${left} MiB allocated after 32 of 96 were discarded`);
      assert.equal(await hash(32, 32), await zeros(32), 'discarded blocks read as zeros');
      assert.deepEqual([await hash(0, 32), await hash(64, 32)], before, 'the neighbours stay');

      k.step('zeroing (WRITE SAME) reads as zeros too');
      assert(
        Number(k.diskAttribute(disk, 'queue/write_zeroes_max_bytes')) > 0,
        'the disk offers WRITE SAME',
      );
      await k.sh(`blkdiscard -z -o 64M -l 16M ${disk}`);
      assert.equal(await hash(64, 16), await zeros(16));

      k.step('a discard of single blocks frees nothing around them');
      await k.sh(`dd if=/dev/urandom of=${disk} oflag=direct bs=64k count=1 status=none`);
      const part = (skip: number, count: number): Promise<string> =>
        k.out(`dd if=${disk} iflag=direct bs=512 skip=${skip} count=${count} status=none | md5sum`);
      const around = [await part(0, 3), await part(10, 118)];
      await k.sh(`blkdiscard -o 1536 -l 3584 ${disk}`);
      assert.deepEqual([await part(0, 3), await part(10, 118)], around);
      assert.equal(await part(3, 7), await k.out('head -c 3584 /dev/zero | md5sum'));

      k.step('fstrim of a file system gives back what a deleted file took');
      await k.sh(`mkfs.ext4 -q ${disk}`);
      const mount = await k.mount(disk);
      await k.sh(
        `dd if=/dev/urandom of=${mount}/big bs=1M count=100 status=none && sync ${mount}/big`,
      );
      const full = allocated(image);
      assert(full >= 100, `${full} MiB allocated with a file of 100`);
      await k.sh(`rm ${mount}/big && sync -f ${mount} && fstrim -v ${mount}`);
      const trimmed = allocated(image);
      assert(trimmed < full - 95, `${trimmed} MiB allocated after fstrim, ${full} before`);
      await k.sh(`umount ${mount} && e2fsck -fn ${disk}`);
      await proc.stop();
    },
  }),
  scenario({
    name: 'resize.grow',
    about: 'a larger backing file becomes a larger disk under a mounted file system, twice',
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 64M ${image}`);
      const { proc, disk, name } = await k.serve(image);
      await k.sh(`mkfs.ext4 -q ${disk}`);
      const mount = await k.mount(disk);
      await k.sh(`dd if=/dev/urandom of=${mount}/kept bs=1M count=20 status=none`);
      const kept = await k.out(`md5sum ${mount}/kept`);
      const capacity = (): Promise<string> =>
        k.out(`blockdev --getsize64 ${disk}`, { quiet: true });
      const rescan = `echo 1 > /sys/block/${disk.slice('/dev/'.length)}/device/rescan`;

      k.step('the file grew: SIGHUP');
      const larger = String(128 * mebibyte);
      await k.sh(`truncate -s ${larger} ${image}`);
      proc.kill('SIGHUP');
      const dmesg = await k.waitFor('the unit attention', async () => {
        // It is told to the first command that comes.
        await k.sh(`sg_turs ${disk}`, { anyCode: true, quiet: true });
        const log = await k.out('dmesg', { quiet: true });
        return /capacity data has changed/i.test(log) ? log : undefined;
      });
      assert.match(dmesg, /sda/);
      await k.sh(rescan);
      assert.equal(await capacity(), larger);

      k.step('grown through configfs, as an administrator does');
      const largest = String(192 * mebibyte);
      await k.configfs.write(`${k.configfs.find(name)}/attrib/dev_size`, largest);
      await k.waitFor('the new capacity', async () => {
        await k.sh(rescan, { quiet: true });
        return (await capacity()) === largest;
      });
      assert.equal(String(statSync(image).size), largest, 'the file has grown with its disk');

      k.step('the file system takes the room');
      await k.sh(`resize2fs ${disk}`);
      await k.sh(`dd if=/dev/urandom of=${mount}/new bs=1M count=120 status=none`);
      assert.equal(await k.out(`md5sum ${mount}/kept`), kept);
      await k.sh(`umount ${mount} && e2fsck -fn ${disk}`);
      await proc.stop();
    },
  }),
];
