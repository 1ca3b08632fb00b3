// SPDX-License-Identifier: Apache-2.0
/** The harness itself, without the package under test: the kernel it boots, and another project's handler. */
import assert from 'node:assert/strict';
import { scenario } from '../harness/scenario.js';

const mebibyte = 1024 * 1024;

export default [
  scenario({
    name: 'harness.backstore',
    about: 'a user backstore appears and goes, with the ring this package is written for',
    timeoutSeconds: 40,
    async run(k) {
      const dir = await k.configfs.create({
        name: 'plain',
        config: 'test/a b',
        size: 64 * mebibyte,
        extra: ['max_data_area_mb=8', 'cmd_ring_size_mb=1'],
      });
      const uio = k.configfs.uio('plain');
      const sys = `/sys/class/uio/${uio.slice('/dev/'.length)}`;
      assert.equal(await k.out(`cat ${sys}/name`), 'tcm-user/0/plain/test/a b');
      // Ring and data area: 1 MiB and 8 MiB; the mailbox lies inside the ring's part.
      assert.equal(Number(await k.out(`cat ${sys}/maps/map0/size`)), 9 * mebibyte);
      // No handler yet: the event counter can be read only when something is in the ring.
      const { code } = await k.sh(`timeout 1 head -c 4 ${uio}`, { anyCode: true });
      assert.equal(code, 124, 'an empty ring raises no event');
      await k.configfs.remove(dir);
    },
  }),
  scenario({
    name: 'harness.peer',
    about: 'the steps of the file system scenarios hold with tcmu-runner as the handler',
    timeoutSeconds: 60,
    packages: ['tcmu-runner', 'dbus'],
    async run(k) {
      const image = `${k.dir}/peer.img`;
      await k.sh(`truncate -s 128M ${image} && dbus-daemon --system --fork`);
      const runner = k.start(['tcmu-runner'], { name: 'tcmu-runner' });
      await k.waitFor('tcmu-runner on the bus', async () => {
        const names = await k.sh(
          'dbus-send --system --print-reply --dest=org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus.NameHasOwner string:org.kernel.TCMUService1',
          { anyCode: true, quiet: true },
        );
        return names.stdout.includes('true');
      });
      const dir = await k.configfs.create({
        name: 'peer',
        config: `qcow/${image}`,
        size: 128 * mebibyte,
      });
      const { disk, tpg } = await k.configfs.attachLoopback(dir);
      await k.sh(`mkfs.ext4 -q ${disk}`);
      const mount = await k.mount(disk);
      await k.sh(`cp -a scripts ${mount}/ && diff -r scripts ${mount}/scripts && umount ${mount}`);
      await k.sh(`e2fsck -fn ${disk}`);
      await k.configfs.detachLoopback(tpg);
      await k.configfs.remove(dir);
      runner.kill('SIGKILL');
      await runner.wait();
    },
  }),
];
