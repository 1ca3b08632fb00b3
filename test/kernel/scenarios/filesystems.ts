// SPDX-License-Identifier: Apache-2.0
/** A file system lives on the file example: made, filled, checked, and found again in the backing file. */
import assert from 'node:assert/strict';
import { type Scenario, scenario } from '../harness/scenario.js';

/** Some 30 MB in a few hundred files, small and large, that every checkout has. */
const trees = ['node_modules/typescript/lib', 'node_modules/@types'];

function lifeOf(
  kind: string,
  details: { make: string; check: string; checkFile: string; size: string; args: string[] },
): Scenario {
  return scenario({
    name: `mkfs.${kind}`,
    about: `${kind}: make, mount, copy a tree, unmount, check, compare`,
    timeoutSeconds: 120,
    memoryMb: 1536,
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s ${details.size} ${image}`);
      const { proc, disk } = await k.serve(image, details.args);
      assert.equal(
        await k.out(`blockdev --getsize64 ${disk}`),
        await k.out(`stat -c %s ${image}`),
        'the disk is as large as its file',
      );

      k.step('make, fill');
      await k.sh(`${details.make} ${disk}`, { timeoutSeconds: 60 });
      let mount = await k.mount(disk);
      await k.sh(`mkdir ${mount}/tree && cp -a ${trees.join(' ')} ${mount}/tree`, {
        timeoutSeconds: 60,
      });
      await k.sh(`umount ${mount}`);
      await k.sh(`${details.check} ${disk}`, { timeoutSeconds: 60 });

      k.step('compare, from the disk and not from the page cache');
      await k.sh('echo 3 > /proc/sys/vm/drop_caches');
      mount = await k.mount(disk, ['-o', 'ro']);
      for (const tree of trees) {
        await k.sh(`diff -r ${tree} ${mount}/tree/$(basename ${tree})`, { timeoutSeconds: 60 });
      }
      await k.sh(`umount ${mount}`);

      k.step('the file system is in the file, without the handler');
      await proc.stop();
      await k.sh(`${details.checkFile} ${image}`, { timeoutSeconds: 60 });
    },
  });
}

export default [
  lifeOf('ext4', {
    make: 'mkfs.ext4 -q',
    check: 'e2fsck -fn',
    checkFile: 'e2fsck -fn',
    size: '512M',
    args: [],
  }),
  lifeOf('xfs', {
    make: 'mkfs.xfs -q',
    check: 'xfs_repair -n',
    checkFile: 'xfs_repair -n -f',
    size: '512M',
    args: [],
  }),
  // 4 KiB blocks and a write-through disk: other paths in the driver, the file system and the example.
  lifeOf('ext4-4k', {
    make: 'mkfs.ext4 -q',
    check: 'e2fsck -fn',
    checkFile: 'e2fsck -fn',
    size: '512M',
    args: ['--block-size', '4096', '--no-write-cache'],
  }),
];
