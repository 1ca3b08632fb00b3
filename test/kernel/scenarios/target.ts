// SPDX-License-Identifier: Apache-2.0
/** `tcmu/target` on a real kernel: one boot a part of the program `target`, which says what each does. */
import { scenario } from '../harness/scenario.js';

const parts = {
  backstore: 'a backstore is made, changed, found and removed, with nobody listening on netlink',
  loopback: 'disks over loopback: used, resized, mounted, several on a target, without a handler',
  iscsi: 'an iSCSI target lets in who may: anyone, by name, by CHAP, by mutual CHAP',
  vhost: 'a vhost-scsi target, or the error that says what is missing',
  errors: 'what is wrong is said, and nothing is left: names, limits, permission, modules',
  recover: 'devices whose handler was killed are taken back, one and all at once',
  dead: 'a disk whose handler is dead can be detached by force, without waiting',
  netlink: 'events come in order; with replies the kernel waits and is answered, hung handlers too',
  stuck: 'a listener killed while the kernel waits for it: a successor, or the rescue, lets go',
  overrun: 'events that the socket had no room for are made up for',
};

export default Object.entries(parts).map(([part, about]) =>
  scenario({
    name: `target.${part}`,
    about,
    timeoutSeconds: 90,
    modules: ['iscsi_target_mod'],
    async run(k) {
      await k.run('target', [part]);
    },
  }),
);
