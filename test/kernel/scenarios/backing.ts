// SPDX-License-Identifier: Apache-2.0
/** What is under the file example: full and cut files, failing flushes, block devices, O_DIRECT, an unprivileged server. */
import assert from 'node:assert/strict';
import { constants, readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs';
import { dirname } from 'node:path';
import { type Kit, sleep } from '../harness/kit.js';
import type { Proc } from '../harness/process.js';
import { scenario } from '../harness/scenario.js';

const mebibyte = 1024 * 1024;
const cli = 'node examples/file/dist/cli.js';

/** A file system of its own for a backing file, so that it can be full. */
async function tmpfs(k: Kit, size: string): Promise<string> {
  const dir = `/mnt/room-${size}`;
  await k.sh(`mkdir -p ${dir} && mount -t tmpfs -o size=${size} tmpfs ${dir}`);
  return dir;
}

/** A loop device over a sparse file of 64 MiB in `dir`. */
async function loopDevice(k: Kit, dir: string, options = ''): Promise<string> {
  await k.sh(`truncate -s 64M ${dir}/loop.img`);
  return k.out(`losetup -f --show ${options} ${dir}/loop.img`);
}

/** A command that must fail; its standard error. */
async function fails(k: Kit, command: string): Promise<string> {
  const { code, stderr } = await k.sh(command, { anyCode: true });
  assert.notEqual(code, 0, `\`${command}\` must fail`);
  return stderr;
}

const capacity = (k: Kit, disk: string): Promise<string> =>
  k.out(`blockdev --getsize64 ${disk}`, { quiet: true });

/** Lets the initiator notice a new size. */
async function rescanned(k: Kit, disk: string): Promise<string> {
  const name = disk.slice('/dev/'.length);
  await k.sh(`sg_turs ${disk}; echo 1 > /sys/block/${name}/device/rescan`, { quiet: true });
  return capacity(k, disk);
}

const fill = (disk: string, seek: number, count: number): string =>
  `dd if=/dev/urandom of=${disk} oflag=direct bs=1M seek=${seek} count=${count} status=none`;
const hash = (k: Kit, disk: string, skip: number, count: number): Promise<string> =>
  k.out(`dd if=${disk} iflag=direct bs=1M skip=${skip} count=${count} status=none | md5sum`);

export default [
  scenario({
    name: 'backing.full',
    about:
      'a full file system is "no space left" to the initiator, loses nothing, and can be mended',
    async run(k) {
      const dir = await tmpfs(k, '32m');
      const { proc, disk } = await k.serve(`${dir}/disk.img`, ['--size', '64M']);
      await k.sh(fill(disk, 0, 16));
      const kept = await hash(k, disk, 0, 16);
      assert.match(await fails(k, fill(disk, 16, 40)), /No space left on device/);
      await proc.line(/warning: write .*disk\.img: ENOSPC; the file system is full/);
      assert.equal(await hash(k, disk, 0, 16), kept, 'what was written before is there');
      k.step('room is made: through the disk, then beside it');
      await k.sh(`blkdiscard -o 16M -l 48M ${disk}`);
      await k.sh(fill(disk, 40, 8));
      await k.sh(`mount -o remount,size=128m ${dir}`);
      await k.sh(fill(disk, 16, 40));
      assert.equal(await hash(k, disk, 0, 16), kept);
      await proc.stop();
    },
  }),
  scenario({
    name: 'backing.cut',
    about: 'a file that is cut under its server is no disk of zeros; a deleted one is served on',
    async run(k) {
      const image = `${k.dir}/disk.img`;
      const { proc, disk } = await k.serve(image, ['--size', '64M']);
      await k.sh(fill(disk, 0, 64));
      const kept = await hash(k, disk, 0, 32);
      await k.sh(`truncate -s 32M ${image}`);
      await proc.line(/warning: .*disk\.img was cut to 32 MiB/);
      const read = (skip: number): string =>
        `dd if=${disk} iflag=direct bs=1M skip=${skip} count=1`;
      assert.match(await fails(k, `${read(40)} of=/dev/null`), /No data available/);
      assert.match(await fails(k, fill(disk, 40, 1)), /Input\/output error/);
      await fails(k, `sg_sync ${disk}`);
      assert.equal(statSync(image).size, 32 * mebibyte, 'no write made a hole of the rest');
      assert.equal(await hash(k, disk, 0, 32), kept, 'what is left is served');
      k.step('mended');
      await k.sh(`truncate -s 64M ${image}`);
      await proc.line(/made longer again/);
      await k.sh(`sg_sync ${disk}`);
      await k.sh(fill(disk, 40, 1));
      k.step('deleted');
      await k.sh(`rm ${image}`);
      const [, fd] = await proc.line(/was deleted.*copy (\/proc\/\d+\/fd\/\d+)/);
      assert.equal(await hash(k, disk, 0, 32), kept);
      await k.sh(`cp ${fd} ${k.dir}/saved && cmp -n 33554432 ${k.dir}/saved ${disk}`);
      await proc.stop();
    },
  }),
  scenario({
    name: 'backing.flush-fails',
    about: 'after one failed fdatasync no flush and no write is acknowledged any more',
    modules: ['loop'],
    async run(k) {
      const dir = await tmpfs(k, '16m');
      const loop = await loopDevice(k, dir);
      const { proc, disk } = await k.serve(loop);
      await k.sh(fill(disk, 0, 4));
      await k.sh(`sg_sync ${disk}`);
      const kept = await hash(k, disk, 0, 4);
      k.step('more than there is room for: acknowledged by the cache, lost at write-back');
      await k.sh(fill(disk, 4, 40));
      await fails(k, `sg_sync ${disk}`);
      await proc.line(/fdatasync of \/dev\/loop0 failed/);
      k.step(
        'there is room again, and the kernel has told of the failure: still no flush succeeds',
      );
      await k.sh(`mount -o remount,size=128m ${dir}`);
      for (let attempt = 0; attempt < 3; attempt++) await fails(k, `sg_sync ${disk}`);
      assert.match(await fails(k, fill(disk, 0, 1)), /Input\/output error/);
      assert.equal(await hash(k, disk, 0, 4), kept, 'reading goes on');
      proc.kill('SIGTERM');
      assert.equal((await proc.wait()).code, 1, 'its end tells of the failure too');
      k.step('served anew');
      const again = await k.serve(loop);
      await k.sh(fill(again.disk, 4, 40));
      await k.sh(`sg_sync ${again.disk}`);
      assert.equal(await hash(k, again.disk, 0, 4), kept);
      await again.proc.stop();
    },
  }),
  scenario({
    name: 'backing.block-device',
    about: 'a block device: verified I/O, discards passed down, claimed for itself, resized',
    modules: ['loop'],
    async run(k) {
      const loop = await loopDevice(k, k.dir);
      const image = `${k.dir}/loop.img`;
      const allocated = (): number => (statSync(image).blocks * 512) / mebibyte;

      k.step('a mounted device is not served');
      await k.sh(`mkfs.ext4 -q ${loop}`);
      const mount = await k.mount(loop);
      assert.match(await fails(k, `${cli} ${loop} --name d0`), /loop0: EBUSY/);
      await k.sh(`umount ${mount}`);

      k.step('a served device is not mounted');
      const { proc, disk } = await k.serve(loop);
      await proc.line(/\(block device, 64 MiB, blocks of 512 bytes, write cache on, thin\)/);
      assert.match(await fails(k, `mount ${loop} ${mount}`), /already mounted or mount point busy/);

      k.step('data and discards');
      await k.fio({
        name: 'verify',
        filename: disk,
        rw: 'randwrite',
        bsrange: '512-256k',
        ioengine: 'libaio',
        direct: 1,
        iodepth: 16,
        verify: 'crc32c',
        size: '64m',
        end_fsync: 1,
      });
      const full = allocated();
      await k.sh(`blkdiscard -o 16M -l 32M ${disk} && sg_sync ${disk}`);
      assert(
        allocated() <= full - 31,
        `${allocated()} MiB allocated after a discard, ${full} before`,
      );
      assert.equal(
        await hash(k, disk, 16, 32),
        await k.out('head -c 32M /dev/zero | md5sum'),
        'discarded blocks read as zeros',
      );
      await k.sh(`blkdiscard -z -o 0 -l 16M ${disk}`);
      assert.equal(await hash(k, disk, 0, 16), await k.out('head -c 16M /dev/zero | md5sum'));

      k.step('larger');
      await k.sh(`truncate -s 96M ${image} && losetup -c ${loop}`);
      proc.kill('SIGHUP');
      await proc.line(/resized to 96 MiB/);
      assert.equal(await rescanned(k, disk), String(96 * mebibyte));
      await proc.stop();

      k.step("blocks of 4096 bytes: the disk's can't be smaller");
      await k.sh(`losetup -d ${loop}`);
      const large = await k.out(`losetup -f --show --sector-size 4096 ${image}`);
      assert.match(await fails(k, `${cli} ${large} --name d0 --block-size 512`), /4096 bytes/);
      const served = await k.serve(large);
      assert.equal(k.diskAttribute(served.disk, 'queue/logical_block_size'), '4096');
      await k.sh(fill(served.disk, 1, 4));
      await served.proc.stop();
    },
  }),
  scenario({
    name: 'backing.direct',
    about: 'O_DIRECT on a real file system: verified I/O of every size, nothing in the page cache',
    modules: ['loop'],
    async run(k) {
      const loop = await loopDevice(k, k.dir);
      await k.sh(`mkfs.ext4 -q -O ^has_journal ${loop}`);
      const image = `${await k.mount(loop)}/disk.img`;
      for (const blockSize of [512, 4096]) {
        const { proc, disk } = await k.serve(image, [
          ...['--size', '48M', '--direct', '--block-size', String(blockSize)],
        ]);
        const open = readdirSync(`/proc/${proc.pid}/fd`)
          .filter((fd) => readlinkSync(`/proc/${proc.pid}/fd/${fd}`) === image)
          .map((fd) => readFileSync(`/proc/${proc.pid}/fdinfo/${fd}`, 'utf8'))
          .map((info) => Number.parseInt(/^flags:\s+(\d+)/m.exec(info)?.[1] ?? '', 8));
        assert.deepEqual(open.map((flags) => (flags & constants.O_DIRECT) !== 0).sort(), [
          false,
          true,
        ]);
        await k.fio({
          name: `direct-${blockSize}`,
          filename: disk,
          rw: 'randwrite',
          bsrange: `${blockSize}-1m`,
          ioengine: 'libaio',
          direct: 1,
          iodepth: 8,
          verify: 'crc32c',
          size: '48m',
        });
        assert.equal(
          await k.out(`fincore -n -o PAGES ${image}`),
          '0',
          'nothing is in the page cache',
        );
        // Patterns come from memory that no device likes.
        await k.sh(`sg_write_same --16 --in=/dev/urandom --num=64 --xferlen=${blockSize} ${disk}`);
        await k.sh(`sg_sync ${disk}`);
        await proc.stop();
      }
    },
  }),
  scenario({
    name: 'backing.shrink',
    about: 'a disk becomes shorter only where that was allowed by name',
    async run(k) {
      const image = `${k.dir}/disk.img`;
      const cut = async (proc: Proc, size: string): Promise<void> => {
        await k.sh(`truncate -s ${size} ${image}`);
        proc.kill('SIGHUP');
      };
      const first = await k.serve(image, ['--size', '64M']);
      await cut(first.proc, '32M');
      await first.proc.line(/would cut data off/);
      assert.equal(await rescanned(k, first.disk), String(64 * mebibyte));
      // Noticed once a second: only then is there something to mend.
      await first.proc.line(/was cut to 32 MiB/);
      await k.sh(`truncate -s 64M ${image}`);
      await first.proc.line(/made longer again/);

      k.step('through configfs: refused, and put back');
      const attribute = `${k.configfs.find(first.name)}/attrib/dev_size`;
      await k.configfs.write(attribute, String(32 * mebibyte));
      await first.proc.line(/not resized through configfs: .*would cut data off/);
      await k.waitFor(
        'the old size',
        () => readFileSync(attribute, 'utf8').trim() === String(64 * mebibyte),
      );
      assert.equal(await rescanned(k, first.disk), String(64 * mebibyte));
      assert.equal(statSync(image).size, 64 * mebibyte);
      await first.proc.stop();

      k.step('allowed');
      const second = await k.serve(image, ['--allow-shrink']);
      await cut(second.proc, '32M');
      await second.proc.line(/resized to 32 MiB/);
      assert.equal(await rescanned(k, second.disk), String(32 * mebibyte));
      await k.configfs.write(
        `${k.configfs.find(second.name)}/attrib/dev_size`,
        String(16 * mebibyte),
      );
      await k.waitFor('the shorter file', () => statSync(image).size === 16 * mebibyte);
      assert.equal(await rescanned(k, second.disk), String(16 * mebibyte));
      await k.sh(fill(second.disk, 0, 16));
      await second.proc.stop();
    },
  }),
  scenario({
    name: 'backing.unprivileged',
    about: 'a user with nothing but the uio device and the file serves a disk',
    async run(k) {
      const image = `${k.dir}/disk.img`;
      const dir = await k.configfs.create({ name: 'd0', config: 'file/x', size: 64 * mebibyte });
      const uio = k.configfs.uio('d0');
      await k.sh(`truncate -s 64M ${image} && chown 65534 ${image} ${uio} && chmod 755 ${k.dir}`);
      const start = (): Proc =>
        k.start(
          [
            ...['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups', '--no-new-privs'],
            ...['--bounding-set=-all', ...`${cli} ${image} --uio ${uio} --serial s1`.split(' ')],
          ],
          { name: 'nobody' },
        );
      const ready = new RegExp(`^ready name=d0 uio=${uio}$`);
      let proc = start();
      await proc.line(ready);
      assert.match(readFileSync(`/proc/${proc.pid}/status`, 'utf8'), /^CapEff:\s0+$/m);
      const { disk, tpg } = await k.configfs.attachLoopback(dir);
      await k.sh(`mkfs.ext4 -q ${disk} && e2fsck -fn ${disk}`);
      assert.match(await k.out(`sg_inq -p 0x80 ${disk}`), /serial number: s1/);
      k.step('larger, by the server alone');
      await k.sh(`truncate -s 96M ${image}`);
      proc.kill('SIGHUP');
      await proc.line(/resized to 96 MiB/);
      assert.equal(await rescanned(k, disk), String(96 * mebibyte));
      k.step('killed under load: root resets the ring, the user serves again');
      const load = k.fio({
        name: 'load',
        filename: disk,
        rw: 'randwrite',
        bs: '4k',
        ioengine: 'libaio',
        direct: 1,
        iodepth: 16,
        size: '32m',
        io_size: '96m',
        verify: 'crc32c',
      });
      await sleep(2);
      proc.kill('SIGKILL');
      await proc.wait();
      await k.configfs.write(`${dir}/action/reset_ring`, '1');
      proc = start();
      await proc.line(ready);
      await load;
      await k.configfs.detachLoopback(tpg);
      await proc.stop();
      assert.equal(k.configfs.uio('d0'), uio, 'the device is left to whoever made it');
      await k.sh(`rmdir ${dir} ${dirname(dir)}`);
    },
  }),
  scenario({
    name: 'serve.mounted',
    about: 'a server that is told to end while its disk is mounted says so and serves on',
    async run(k) {
      const { proc, disk } = await k.serve(`${k.dir}/disk.img`, ['--size', '64M']);
      await k.sh(`mkfs.ext4 -q ${disk}`);
      const mount = await k.mount(disk);
      proc.kill('SIGTERM');
      await proc.line(/error: .*mounted/);
      await k.sh(
        `dd if=/dev/urandom of=${mount}/file bs=1M count=8 status=none && sync ${mount}/file`,
      );
      await k.sh(`umount ${mount} && e2fsck -fn ${disk}`);
      await proc.stop();
    },
  }),
  scenario({
    name: 'serve.iscsi',
    about:
      'the file example over iSCSI: CHAP from a file, the wrong password and strangers refused',
    modules: ['iscsi_target_mod'],
    async run(k) {
      const image = `${k.dir}/disk.img`;
      const iqn = 'iqn.2026-01.org.example:d0';
      const me = 'iqn.2026-01.org.example:me';
      const password = 'a-password-of-96-random-bits';
      await k.sh(`printf '${password}\\n' > ${k.dir}/secret && chmod 600 ${k.dir}/secret`);
      const { proc } = await k.serve(image, [
        ...['--size', '64M', '--export', 'iscsi', '--iqn', iqn, '--portal', '127.0.0.1:3261'],
        ...['--initiator', me, '--chap-user', 'alice', '--chap-password-file', `${k.dir}/secret`],
      ]);
      const inquiry = (initiator: string, login: string): string =>
        `iscsi-inq -i ${initiator} iscsi://${login}127.0.0.1:3261/${iqn}/0`;
      assert.match(await k.out(inquiry(me, `alice%${password}@`)), /Vendor:TCMU-JS/);
      await fails(k, inquiry(me, 'alice%wrong-password-entirely@'));
      await fails(k, inquiry(me, ''));
      await fails(k, inquiry('iqn.2026-01.org.example:stranger', `alice%${password}@`));
      assert(!proc.output.includes(password), 'the password is not told');
      await proc.stop();
    },
  }),
];
