// SPDX-License-Identifier: Apache-2.0
/** The kernel's own NBD client against the server in front of the simulated kernel. */
import assert from 'node:assert/strict';
import { scenario } from '../harness/scenario.js';

const mebibyte = 1024 * 1024;

export default [
  scenario({
    name: 'nbd.client',
    about: "the kernel's nbd driver makes a file system on it, trims it, and finds it again",
    packages: ['nbd-client'],
    modules: ['nbd'],
    async run(k) {
      const socket = `${k.dir}/nbd.sock`;
      const { proc } = await k.program('nbd', [socket, `${256 * mebibyte}`]);
      const attach = `nbd-client -unix ${socket} /dev/nbd0 -connections 2`;
      await k.sh(attach);
      assert.equal(await k.out('blockdev --getsize64 /dev/nbd0'), `${256 * mebibyte}`);
      assert.equal(await k.out('cat /sys/block/nbd0/ro'), '0');
      assert.notEqual(await k.out('cat /sys/block/nbd0/queue/discard_max_bytes'), '0');
      await k.sh('mkfs.ext4 -q /dev/nbd0');
      const mount = await k.mount('/dev/nbd0');
      await k.sh(`cp -a scripts ${mount}/ && fstrim ${mount} && sync`);
      await k.sh(`umount ${mount} && nbd-client -d /dev/nbd0`);
      await k.sh(attach);
      await k.sh('e2fsck -fn /dev/nbd0');
      const again = await k.mount('/dev/nbd0');
      await k.sh(`diff -r scripts ${again}/scripts && umount ${again}`);
      await k.fio({
        name: 'verify',
        filename: '/dev/nbd0',
        rw: 'randwrite',
        bs: '4k',
        size: '16m',
        ioengine: 'libaio',
        iodepth: 16,
        direct: 1,
        verify: 'crc32c',
        verify_state_save: 0,
      });
      await k.sh('nbd-client -d /dev/nbd0');
      await proc.stop();
    },
  }),
];
