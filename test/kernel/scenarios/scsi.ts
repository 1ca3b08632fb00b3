// SPDX-License-Identifier: Apache-2.0
/**
 * The SCSI commands as Linux' own tools send them, over loopback disks: sg3_utils, sdparm, blkdiscard, and what stands
 * on them (XFS, LVM, device-mapper multipath).
 */
import assert from 'node:assert/strict';
import { statSync } from 'node:fs';
import type { Kit } from '../harness/kit.js';
import { scenario } from '../harness/scenario.js';

const MiB = 1024 * 1024;

async function md5(k: Kit, disk: string, skip: number, blocks: number): Promise<string> {
  return k.out(
    `dd if=${disk} iflag=direct bs=512 skip=${skip} count=${blocks} status=none | md5sum`,
  );
}

/** Mebibytes a file really takes. */
function allocated(path: string): number {
  return (statSync(path).blocks * 512) / MiB;
}

/** Writes bytes to a file of the guest. */
async function pattern(k: Kit, path: string, byte: string, count: number): Promise<void> {
  await k.sh(`head -c ${count} /dev/zero | tr '\\0' '\\${byte}' > ${path}`);
}

/** LVM and device-mapper without udev. */
const lvm =
  "--config 'devices { use_devicesfile=0 } activation { udev_sync=0 udev_rules=0 monitoring=0 } global { use_lvmpolld=0 } backup { archive=0 backup=0 }'";

export default [
  scenario({
    name: 'scsi.utilities',
    about:
      'sg3_utils and sdparm find what the device says of itself, and their commands do what they say',
    packages: ['sdparm'],
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 64M ${image}`);
      const { proc, disk } = await k.serve(image);

      k.step('who it is');
      const inquiry = await k.out(`sg_inq ${disk}`);
      assert.match(inquiry, /3PC=1/);
      assert.match(inquiry, /TPGS=1/);
      assert.match(inquiry, /Product identification: File/);
      assert.match(inquiry, /version=0x06/);
      for (const page of ['sv', 'sn', 'di', 'ei', 'mpp', 'tpc', 'bl', 'bdc', 'lbpv']) {
        await k.sh(`sg_vpd --page=${page} ${disk}`);
      }
      assert.match(await k.out(`sg_vpd --page=di ${disk}`), /Relative target port: 0x1/);
      const copies = await k.out(`sg_vpd --page=tpc ${disk}`);
      assert.match(copies, /Copy operation abort/i);
      assert.match(copies, /Maximum CSCD descriptor count: 16/i);
      assert.match(await k.out(`sg_vpd --page=bdc ${disk}`), /WABEREQ=1/);
      assert.match(await k.out(`sg_readcap --16 ${disk}`), /Number of logical blocks=131072/);
      assert.match(await k.out(`sg_luns ${disk}`), /Lun list length = 8/);

      k.step('what it can do');
      const opcodes = await k.out(`sg_opcodes -n ${disk}`);
      for (const name of [
        'Format unit',
        'Sanitize',
        'Log sense',
        'Compare and write',
        'Extended copy',
      ])
        assert.match(opcodes, new RegExp(name, 'i'));
      assert.match(
        await k.out(`sg_opcodes --opcode=0x28 ${disk}`),
        /28 18 ff ff ff ff 3f ff ff 00/i,
      );
      assert.match(await k.out(`sg_opcodes --tmf ${disk}`), /Abort task/i);
      assert.match(await k.out(`sg_rtpg --decode ${disk}`), /active\/optimized/);
      await k.sh(`sg_timestamp ${disk}`);
      assert.match(
        await k.out(`sg_copy_results --params ${disk}`),
        /Maximum target descriptor count: 16/i,
      );

      k.step('mode and log pages');
      assert.match(await k.out(`sg_modes -a ${disk}`), /Caching/);
      await k.sh(`sdparm --get=WCE ${disk} | grep -q 'WCE *1'`);
      await k.sh(`sdparm --clear=WCE ${disk} && sdparm --get=WCE ${disk} | grep -q 'WCE *0'`);
      await k.sh(`sdparm --set=WCE ${disk}`);
      await k.sh(`sdparm --all ${disk} | grep -q 'Control mode page'`);
      const logs = await k.out(`sg_logs -a ${disk}`);
      for (const name of [
        'Temperature',
        'Start-stop',
        'General statistics',
        'Informational exceptions',
      ])
        assert.match(logs, new RegExp(name, 'i'));

      k.step('writing, comparing, unmapping');
      await pattern(k, '/tmp/a', '101', 4096);
      await pattern(k, '/tmp/b', '102', 4096);
      await k.sh(`sg_write_same --16 --lba=64 --num=64 --in=/tmp/a --xferlen=512 ${disk}`);
      await k.sh(
        'head -c 512 /tmp/a > /tmp/a1; head -c 512 /tmp/b > /tmp/b1; cat /tmp/a1 /tmp/b1 > /tmp/ab',
      );
      assert.equal(await md5(k, disk, 64, 8), await k.out('md5sum < /tmp/a'));
      await k.sh(`sg_verify --16 --lba=64 --count=8 --bpc=8 ${disk}`);
      await k.sh(`sg_verify --16 --ebytchk=1 --ndo=4096 --lba=64 --count=8 --in=/tmp/a ${disk}`);
      const differs = await k.sh(
        `sg_verify --16 --ebytchk=1 --ndo=4096 --lba=64 --count=8 --in=/tmp/b ${disk}`,
        {
          anyCode: true,
        },
      );
      assert.equal(differs.code, 14, 'sg_verify tells a miscompare');
      await k.sh(`sg_compare_and_write --in=/tmp/ab --lba=64 --num=1 --xferlen=1024 ${disk}`);
      const again = await k.sh(
        `sg_compare_and_write --in=/tmp/ab --lba=64 --num=1 --xferlen=1024 ${disk}`,
        {
          anyCode: true,
        },
      );
      assert.equal(again.code, 14, 'the block is not the old one any more');
      assert.match(await k.out(`sg_get_lba_status --lba=64 ${disk}`), /mapped/i);
      await k.sh(`sg_unmap --lba=64 --num=64 ${disk}`);
      assert.match(await k.out(`sg_get_lba_status --lba=64 ${disk}`), /deallocated/i);
      assert.equal(await md5(k, disk, 64, 64), await k.out('head -c 32768 /dev/zero | md5sum'));

      k.step('erasing');
      await k.sh(`dd if=/dev/urandom of=${disk} oflag=direct bs=1M count=16 status=none`);
      assert(allocated(image) >= 16);
      await k.sh(`sg_sanitize --block --quick --wait ${disk}`);
      assert(allocated(image) < 1, `${allocated(image)} MiB after a block erase`);
      await k.sh('head -c 512 /tmp/a > /tmp/pattern');
      await k.sh(`sg_sanitize --overwrite --pattern=/tmp/pattern --ipl=512 --quick --wait ${disk}`);
      assert.equal(await md5(k, disk, 131064, 8), await k.out('md5sum < /tmp/a'));
      await k.sh(`sg_format --format --wait --quick ${disk}`);
      assert.equal(await md5(k, disk, 131064, 8), await k.out('head -c 4096 /dev/zero | md5sum'));
      await proc.stop();
    },
  }),

  scenario({
    name: 'scsi.copy-offload',
    about: 'sg_xcopy copies between two disks of one process, which the initiator never reads',
    async run(k) {
      const { proc, ready } = await k.program('copy-pair', [String(64 * MiB)]);
      const { first = '', second = '' } = ready;
      await k.sh(`dd if=/dev/urandom of=${first} oflag=direct bs=1M count=32 status=none`);
      const reads = async (disk: string) =>
        Number((await k.out(`cat /sys/block/${disk.slice(5)}/stat`)).split(/ +/)[2]);
      const before = await reads(first);
      const generic = async (disk: string) =>
        `/dev/${await k.out(`ls /sys/block/${disk.slice(5)}/device/scsi_generic`)}`;
      const [from, to] = [await generic(first), await generic(second)];
      await k.sh(`sg_xcopy if=${from} of=${to} bs=512 count=65536 seek=1024 skip=0 bpt=8192`);
      assert.equal(await reads(first), before, 'no block came to the initiator');
      assert.equal(await md5(k, second, 1024, 65536), await md5(k, first, 0, 65536));
      await proc.stop();
    },
  }),
  scenario({
    name: 'scsi.stack',
    about: 'blkdiscard, XFS with discard, LVM and device-mapper multipath on the disk',
    packages: ['lvm2', 'dmsetup'],
    memoryMb: 2048,
    modules: ['dm-mod', 'dm-multipath', 'dm-round-robin', 'xfs'],
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 640M ${image}`);
      const { proc, disk, name } = await k.serve(image);

      k.step('blkdiscard');
      await k.sh(`dd if=/dev/urandom of=${disk} oflag=direct bs=1M count=32 status=none`);
      await k.sh(`blkdiscard ${disk}`);
      assert(allocated(image) < 1, `${allocated(image)} MiB after a discard of all`);

      k.step('two paths to one disk');
      const { disk: other, tpg } = await k.configfs.attachLoopback(k.configfs.find(name));
      const wwid = async (path: string) => k.out(`cat /sys/block/${path.slice(5)}/device/wwid`);
      assert.equal(await wwid(other), await wwid(disk), 'both paths name the same disk');
      const sectors = 640 * 2048;
      await k.sh(
        `dmsetup create --noudevsync mp --table '0 ${sectors} multipath 0 0 2 1 round-robin 0 1 1 ${disk} 100 round-robin 0 1 1 ${other} 100'`,
      );
      await k.sh('dmsetup mknodes');
      const map = '/dev/mapper/mp';
      await k.sh(`dd if=/dev/urandom of=${map} oflag=direct bs=1M count=8 status=none`);
      const written = await md5(k, map, 0, 16384);
      k.step('one path fails, the other takes over');
      await k.sh(`dmsetup message mp 0 "fail_path ${disk}"`);
      assert.match(await k.out('dmsetup status mp'), /\bF\b.*\bA\b/s);
      assert.equal(await md5(k, map, 0, 16384), written);
      await k.sh(`dd if=/dev/urandom of=${map} oflag=direct bs=1M count=8 seek=8 status=none`);
      await k.sh(`dmsetup message mp 0 "reinstate_path ${disk}"`);
      assert.equal(await md5(k, disk, 0, 32768), await md5(k, map, 0, 32768));

      k.step('LVM and XFS on the map');
      const filter = `${lvm.slice(0, -1)} devices { filter=["a|${map}|","r|.*|"] scan="/dev/mapper" }'`;
      await k.sh(`pvcreate ${filter} ${map} && vgcreate ${filter} vg ${map}`);
      await k.sh(`lvcreate ${filter} -y -Wn -Zn -L 400M -n lv vg`);
      await k.sh(`mkfs.xfs -q /dev/vg/lv || { vgmknodes ${filter}; mkfs.xfs -q /dev/vg/lv; }`);
      const mount = await k.mount('/dev/vg/lv', ['-o', 'discard']);
      await k.sh(
        `dd if=/dev/urandom of=${mount}/big bs=1M count=100 status=none && sync ${mount}/big`,
      );
      const full = allocated(image);
      assert(full >= 100, `${full} MiB with a file of 100`);
      await k.sh(`rm ${mount}/big && sync && sleep 1 && sync && fstrim ${mount}`);
      const freed = allocated(image);
      assert(freed < full - 90, `${freed} MiB of ${full} after the file was deleted`);
      await k.sh(`umount ${mount} && xfs_repair -n /dev/vg/lv`);
      await k.sh(
        `lvremove ${filter} -y vg/lv && vgremove ${filter} vg && dmsetup remove --noudevsync mp`,
      );
      await k.configfs.detachLoopback(tpg);
      await proc.stop();
    },
  }),
];
