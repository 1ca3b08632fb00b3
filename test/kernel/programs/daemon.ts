// SPDX-License-Identifier: Apache-2.0
/**
 * One process for all devices, as tcmu-runner is: opens what netlink announces, with replies on.
 *
 *     daemon.js
 *
 * The configuration string is `many/<bytes>`; `many/<bytes>/slow` takes two seconds to open, `many/<bytes>/bad`
 * fails to. Prints `ready`, `added NAME`, `removed NAME`. SIGTERM closes everything and leaves the kernel's replies off.
 */
import { setTimeout as wait } from 'node:timers/promises';
import { Device, openUio } from 'tcmu';
import { BlockDevice } from 'tcmu/scsi';
import { MemoryStore } from 'tcmu/store';
import { type NetlinkDevice, TcmuNetlink } from 'tcmu/target';

const devices = new Map<string, Device>();

const listener = await TcmuNetlink.open(
  {
    async added({ name, config, uioPath }: NetlinkDevice) {
      const [, size, how] = config.split('/');
      if (how === 'slow') await wait(2000);
      if (how === 'bad') throw Object.assign(new Error('cannot open it'), { code: 'EACCES' });
      const disk = new BlockDevice(new MemoryStore({ size: Number(size) }), { serial: name });
      devices.set(name, await Device.open(openUio(uioPath), { handler: disk }));
      console.log(`added ${name}`);
    },
    async removed({ name }: NetlinkDevice) {
      await devices.get(name)?.close();
      devices.delete(name);
      console.log(`removed ${name}`);
    },
    error: (error) => console.log(`error ${error.code} ${error.message}`),
  },
  { replies: true, existing: true },
);
process.once('SIGTERM', () => {
  void (async () => {
    await listener.close();
    await Promise.all([...devices.values()].map((device) => device.close()));
    process.exit(0);
  })();
});
console.log('ready');
