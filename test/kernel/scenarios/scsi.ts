/** EXTENDED COPY as Linux' own tools send it, over loopback disks. */
import assert from 'node:assert/strict';
import type { Kit } from '../harness/kit.js';
import { scenario } from '../harness/scenario.js';

const MiB = 1024 * 1024;

async function md5(k: Kit, disk: string, skip: number, blocks: number): Promise<string> {
  return k.out(
    `dd if=${disk} iflag=direct bs=512 skip=${skip} count=${blocks} status=none | md5sum`,
  );
}

export default [
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
];
