// SPDX-License-Identifier: Apache-2.0
/** Devices that go while they are in use, and several that come and go. */
import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import type { Kit, Served } from '../harness/kit.js';
import { sleep } from '../harness/kit.js';
import type { Proc } from '../harness/process.js';
import { scenario } from '../harness/scenario.js';

function load(k: Kit, disk: string): Proc {
  const job = k.fioArguments({
    name: 'load',
    filename: disk,
    ioengine: 'libaio',
    direct: 1,
    rw: 'randrw',
    bs: '16k',
    iodepth: 32,
    time_based: true,
    runtime: 60,
  });
  return k.start(['fio', ...job], { name: 'fio', echo: false });
}

async function serveLoaded(k: Kit): Promise<{ served: Served; fio: Proc }> {
  const image = `${k.dir}/disk.img`;
  await k.sh(`truncate -s 64M ${image}`);
  const served = await k.serve(image);
  const fio = load(k, served.disk);
  await sleep(2);
  assert(fio.running, `fio runs: ${fio.output}`);
  return { served, fio };
}

export default [
  scenario({
    name: 'remove.served',
    about:
      'SIGTERM under load: the handler undoes everything, the initiator gets errors and no hang',
    async run(k) {
      const { served, fio } = await serveLoaded(k);
      await served.proc.stop(60);
      const { code } = await fio.wait(60);
      assert.notEqual(code, 0, 'the disk is gone under fio');
      assert(!existsSync(`/sys/block/${served.disk.slice('/dev/'.length)}`), 'the disk is gone');
    },
  }),
  scenario({
    name: 'remove.by-hand',
    about:
      'an administrator takes LUN and backstore away under load: the handler ends by itself or when told',
    async run(k) {
      const { served, fio } = await serveLoaded(k);
      const backstore = k.configfs.find(served.name);
      const link = await k.out(
        `find /sys/kernel/config/target/loopback -type l -lname '*core/user_*/${served.name}'`,
      );
      assert.notEqual(link, '', 'the LUN is linked to the backstore');
      await k.sh(`rm ${link}`, { timeoutSeconds: 60 });
      assert.notEqual((await fio.wait(60)).code, 0, 'the disk is gone under fio');
      await k.sh(`rmdir ${link.slice(0, link.lastIndexOf('/'))}`);
      await k.configfs.remove(backstore);
      served.proc.kill('SIGTERM');
      await served.proc.wait(30);
    },
  }),
  scenario({
    name: 'serve.again',
    about: 'ten times in a row: serve, use, end; nothing is left and the name is free again',
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 16M ${image}`);
      for (let round = 0; round < 10; round++) {
        const { proc, disk } = await k.serve(image);
        await k.sh(`dd if=/dev/urandom of=${disk} oflag=direct bs=64k count=16 status=none`);
        await proc.stop();
        k.assertNothingLeft();
      }
    },
  }),
  scenario({
    name: 'serve.refused',
    about:
      'a second process on the same file, a path outside the allowed directory, a read-only disk',
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 16M ${image} && mkdir ${k.dir}/allowed`);
      const cli = 'node examples/file/dist/cli.js';
      const { proc } = await k.serve(image);

      const second = await k.sh(`${cli} ${image} --name d1`, { anyCode: true });
      assert.notEqual(second.code, 0, 'the file is locked');
      assert.match(second.stderr, /disk\.img/, 'the error names the file');
      const taken = await k.sh(
        `truncate -s 16M ${k.dir}/other && ${cli} ${k.dir}/other --name d0`,
        {
          anyCode: true,
        },
      );
      assert.notEqual(taken.code, 0, 'the name is taken');
      assert.match(taken.stderr, /d0/, 'the error names the device');
      await proc.stop();

      for (const path of [image, `${k.dir}/allowed/../disk.img`]) {
        const outside = await k.sh(`${cli} ${path} --name d0 --allow-dir ${k.dir}/allowed`, {
          anyCode: true,
        });
        assert.notEqual(outside.code, 0, `${path} is outside the allowed directory`);
        assert.match(outside.stderr, /allowed/, 'the error names the directory');
      }
      await k.sh(`ln -s ${image} ${k.dir}/allowed/link`);
      const linked = await k.sh(
        `${cli} ${k.dir}/allowed/link --name d0 --allow-dir ${k.dir}/allowed`,
        {
          anyCode: true,
        },
      );
      assert.notEqual(linked.code, 0, 'a link does not lead out of the allowed directory');

      const readOnly = await k.serve(image, ['--read-only']);
      assert.equal(await k.out(`blockdev --getro ${readOnly.disk}`), '1', 'the disk is read-only');
      const write = await k.sh(`sg_dd if=/dev/zero of=${readOnly.disk} bs=512 count=1 oflag=sgio`, {
        anyCode: true,
      });
      assert.notEqual(write.code, 0, 'a write past the block layer is refused too');
      await readOnly.proc.stop();
    },
  }),
];
