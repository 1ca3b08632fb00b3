// SPDX-License-Identifier: Apache-2.0
/** One process for many devices, over netlink with replies on. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { listUio } from '../harness/configfs.js';
import type { Kit } from '../harness/kit.js';
import { scenario } from '../harness/scenario.js';

const mebibyte = 1024 * 1024;
const core = '/sys/kernel/config/target/core';

const size = 16 * mebibyte;

/** Shell lines that make a backstore; `enable` returns when the daemon has answered. */
function create(name: string, hba = 'user_0', how = ''): string {
  const dir = `${core}/${hba}/${name}`;
  const settings = `dev_config=many/${size}${how},dev_size=${size},hw_block_size=512,cmd_ring_size_mb=1,max_data_area_mb=4`;
  return `mkdir -p ${dir} && printf %s ${settings} > ${dir}/control && printf 1 > ${dir}/enable`;
}

function names(count: number): string[] {
  return Array.from({ length: count }, (_, i) => `n${i}`);
}

async function removeAll(k: Kit, all: readonly string[]): Promise<void> {
  await k.sh(`${all.map((name) => `rmdir ${core}/user_0/${name} &`).join('\n')}\nwait`, {
    quiet: true,
  });
  await k.sh(`rmdir ${core}/user_0`);
}

export default [
  scenario({
    name: 'many.at-once',
    about: '64 devices enabled at once with replies on: all open, all serve, all go',
    timeoutSeconds: 150,
    memoryMb: 1536,
    async run(k) {
      const { proc: daemon } = await k.program('daemon');
      const all = names(64);
      k.step('create');
      await k.sh(
        `${all.map((name) => `(${create(name)} || echo failed ${name}) &`).join('\n')}\nwait`,
        { timeoutSeconds: 60, quiet: true },
      );
      assert.equal(listUio().length, 64);
      // An enable returned: so its device is open already.
      const added = daemon.lines.filter((line) => line.startsWith('added')).length;
      assert.equal(added, 64, 'every enable waited for its answer');

      k.step('use some of them at a time');
      const tpgs: string[] = [];
      const disks: string[] = [];
      for (const name of ['n0', 'n31', 'n63']) {
        const { disk, tpg } = await k.configfs.attachLoopback(`${core}/user_0/${name}`);
        disks.push(disk);
        tpgs.push(tpg);
      }
      await Promise.all(
        disks.map((disk, i) =>
          k.fio({
            name: `disk${i}`,
            filename: disk,
            ioengine: 'libaio',
            direct: 1,
            rw: 'randwrite',
            bs: '4k',
            iodepth: 16,
            size: '8M',
            verify: 'crc32c',
            verify_fatal: 1,
          }),
        ),
      );
      for (const tpg of tpgs) await k.configfs.detachLoopback(tpg);

      k.step('remove');
      await removeAll(k, all);
      assert.equal(daemon.lines.filter((line) => line.startsWith('removed')).length, 64);
      await daemon.stop();
    },
  }),
  scenario({
    name: 'many.slow-and-bad',
    about: 'a slow open delays no other device, a failing one fails its own enable alone',
    async run(k) {
      const { proc: daemon } = await k.program('daemon');
      const slow = k.start(['/bin/sh', '-c', create('slow', 'user_0', '/slow')], {
        name: 'slow',
      });
      await k.waitFor('the slow device', () => listUio().length === 1);
      // Another HBA: configfs itself serialises what happens in one directory.
      await k.sh(create('quick', 'user_1'), { timeoutSeconds: 10 });
      assert(slow.running, 'the quick device did not wait for the slow one');
      assert.equal((await slow.wait(20)).code, 0);

      const failed = await k.sh(create('bad', 'user_2', '/bad'), {
        anyCode: true,
        timeoutSeconds: 20,
      });
      assert.notEqual(failed.code, 0, 'the handler refused it');
      await k.sh(
        `rmdir ${core}/user_2/bad ${core}/user_2 ${core}/user_1/quick ${core}/user_1 ${core}/user_0/slow ${core}/user_0`,
      );
      await daemon.stop();
    },
  }),
  scenario({
    name: 'many.daemon-killed',
    about:
      'SIGKILL of a daemon with replies on: its successor wakes who waits and takes all devices over',
    async run(k) {
      const first = await k.program('daemon', [], { name: 'first' });
      const all = names(8);
      await k.sh(all.map((name) => create(name)).join(' && '), { quiet: true });
      first.proc.kill('SIGKILL');
      await first.proc.wait();

      k.step('an enable that nobody answers');
      const stranded = k.start(['/bin/sh', '-c', create('late')], { name: 'late' });
      await k.waitFor('its device', () => listUio().length === 9);
      await k.waitFor('it to wait', () =>
        /State:\s*[DS]/.test(readFileSync(`/proc/${stranded.pid}/status`, 'utf8')),
      );
      assert(stranded.running);

      const second = await k.program('daemon', [], { name: 'second' });
      await stranded.wait(20);
      await k.waitFor(
        'all nine devices',
        () => second.proc.lines.filter((line) => line.startsWith('added')).length >= 9,
      );
      const { disk, tpg } = await k.configfs.attachLoopback(`${core}/user_0/n3`);
      await k.sh(`dd if=/dev/urandom of=${disk} oflag=direct bs=64k count=16 status=none`);
      await k.configfs.detachLoopback(tpg);
      await removeAll(k, [...all, 'late']);
      await second.proc.stop();
    },
  }),
];
