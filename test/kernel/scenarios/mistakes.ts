// SPDX-License-Identifier: Apache-2.0
/** Mistakes that other handlers have made in the field: each is looked for here. */
import assert from 'node:assert/strict';
import { scenario } from '../harness/scenario.js';

const mebibyte = 1024 * 1024;

export default [
  scenario({
    name: 'mistakes.unknown-commands',
    about: 'a CDB of every group, unknown ones included, is answered and forgotten',
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 16M ${image}`);
      const { proc, disk } = await k.serve(image);
      // Groups 0 to 7; 3, 6 and 7 have no CDB length of their own, 7f is the variable length command.
      for (const opcode of [
        '02',
        '26',
        '59',
        '60',
        '70',
        '7e',
        '98',
        'b0',
        'c0',
        'df',
        'e5',
        'ff',
      ]) {
        const { code } = await k.sh(
          `timeout 10 sg_raw -C 1 -r 512 -t 5 -o /dev/null ${disk} ${opcode} 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00`,
          { anyCode: true },
        );
        // sg3-utils: 9 is invalid opcode, 5 any other illegal request.
        assert([5, 9].includes(code), `operation code ${opcode}: exit code ${code}`);
      }
      const { code } = await k.sh(
        `timeout 10 sg_raw -C 1 -r 512 -t 5 -o /dev/null ${disk} 7f 00 00 00 00 00 00 18 ff ff 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00`,
        { anyCode: true },
      );
      assert([5, 9].includes(code), `variable length: exit code ${code}`);
      await k.sh(`dd if=/dev/urandom of=${disk} oflag=direct bs=64k count=16 status=none`);
      await proc.stop();
      assert(proc.lines.length < 20, `no line per unsupported command: ${proc.output}`);
    },
  }),
  scenario({
    name: 'mistakes.six-byte-length',
    about: 'READ(6) and WRITE(6) of length 0 move 256 blocks',
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 16M ${image}`);
      const { proc, disk } = await k.serve(image);
      await k.sh(`head -c 131072 /dev/urandom > /tmp/data`);
      await k.sh(`sg_raw -C 1 -s 131072 -i /tmp/data ${disk} 0a 00 01 00 00 00`);
      await k.sh(`dd if=${disk} iflag=direct bs=128k skip=1 count=1 status=none | cmp - /tmp/data`);
      await k.sh(
        `sg_raw -C 1 -r 131072 -o /tmp/read ${disk} 08 00 01 00 00 00 && cmp /tmp/read /tmp/data`,
      );
      await proc.stop();
    },
  }),
  scenario({
    name: 'mistakes.inquiry-padding',
    about: 'INQUIRY and VPD pages of any allocation length hold nothing but INQUIRY data',
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 16M ${image}`);
      const { proc, disk } = await k.serve(image);
      const pages = ['', '00', '80', '83', 'b0', 'b1', 'b2'];
      for (const page of pages) {
        for (const length of [5, 36, 96, 255, 4096]) {
          await k.sh(
            `yes S3CRET-OF-ANOTHER-COMMAND | dd of=${disk} oflag=direct bs=1M count=1 iflag=fullblock status=none`,
            { quiet: true },
          );
          const bytes = [length >> 8, length & 0xff].map((byte) =>
            byte.toString(16).padStart(2, '0'),
          );
          await k.sh(
            `rm -f /tmp/out; sg_raw -C 1 -r ${length} -o /tmp/out ${disk} 12 ${page === '' ? '00 00' : `01 ${page}`} ${bytes.join(' ')} 00`,
            { quiet: true },
          );
          const { stdout } = await k.sh('grep -c S3CRET /tmp/out', { anyCode: true, quiet: true });
          assert.equal(stdout.trim(), '0', `page ${page || 'standard'}, length ${length}`);
        }
      }
      await proc.stop();
    },
  }),
  scenario({
    name: 'mistakes.unmap-failure',
    about: 'an UNMAP or WRITE SAME that fails, at once or later, is not answered GOOD',
    async run(k) {
      for (const delay of [undefined, 5]) {
        const { proc, ready } = await k.program('odd', [
          JSON.stringify({
            name: 'd0',
            size: 16 * mebibyte,
            delay,
            faults: [{ operations: ['unmap', 'writeZeroes', 'writeSame'], range: [0, 65536] }],
          }),
        ]);
        const disk = ready['disk'] ?? '';
        for (const command of [
          `sg_unmap --lba=0 --num=8 --force ${disk}`,
          `sg_write_same --unmap --16 --lba=0 --num=8 ${disk}`,
          `blkdiscard -f -o 0 -l 4096 ${disk}`,
        ]) {
          assert.notEqual((await k.sh(command, { anyCode: true })).code, 0, command);
        }
        await k.sh(`sg_unmap --lba=256 --num=8 --force ${disk}`);
        await proc.stop();
      }
    },
  }),
  scenario({
    name: 'mistakes.write-same',
    about: 'WRITE SAME with UNMAP, NDOB and a pattern, of 10 and 16 bytes, do what they say',
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 16M ${image}`);
      const { proc, disk } = await k.serve(image);
      await k.sh('yes pattern | head -c 512 > /tmp/block');
      const fill = `yes filled | dd of=${disk} oflag=direct bs=64k count=1 iflag=fullblock status=none`;
      const read = `dd if=${disk} iflag=direct bs=4096 skip=1 count=1 status=none`;
      for (const how of ['--unmap --10', '--unmap --16', '--ndob --16', '--unmap --ndob --16']) {
        await k.sh(fill);
        await k.sh(`sg_write_same ${how} --lba=8 --num=8 ${disk}`);
        assert.equal(await k.out(`${read} | tr -d '\\0' | wc -c`), '0', how);
        const beside = await k.out(
          `dd if=${disk} iflag=direct bs=4096 count=1 status=none | tr -d '\\0' | wc -c`,
        );
        assert.equal(beside, '4096', `${how}: the block before stays`);
      }
      for (const how of ['--10', '--16']) {
        await k.sh(fill);
        await k.sh(`sg_write_same ${how} --in=/tmp/block --lba=8 --num=8 ${disk}`);
        assert.equal(
          await k.out(`${read} | md5sum`),
          await k.out('for i in 1 2 3 4 5 6 7 8; do cat /tmp/block; done | md5sum'),
          how,
        );
      }
      await proc.stop();
    },
  }),
  scenario({
    name: 'mistakes.flush-without-deadline',
    about: 'a flush that never ends does not keep the handler from ending',
    async run(k) {
      const { proc } = await k.program('odd', [
        JSON.stringify({
          name: 'd0',
          size: 16 * mebibyte,
          hangFlush: true,
          deadline: 2000,
          serve: { commandTimeout: 3 },
        }),
      ]);
      const started = Date.now();
      await proc.stop(60);
      k.log(`  ended after ${Date.now() - started} ms`);
    },
  }),
];
