// SPDX-License-Identifier: Apache-2.0
/** The file example as an iSCSI target on this machine's loopback network, reached by libiscsi's tools. */
import assert from 'node:assert/strict';
import { scenario } from '../harness/scenario.js';

const iqn = 'iqn.2026-01.org.example:disk0';

export default [
  scenario({
    name: 'iscsi.anyone',
    about: 'a LUN that everybody may use: found by discovery, read and written, gone at the end',
    async run(k) {
      const image = `${k.dir}/disk.img`;
      await k.sh(`truncate -s 64M ${image}`);
      const { proc } = await k.serve(image, ['--export', 'iscsi', '--iqn', iqn, '--anyone']);
      const found = await k.out('iscsi-ls -s iscsi://127.0.0.1');
      assert.match(found, new RegExp(`Target:${iqn}`));
      assert.match(found, /Lun:0 .*Size:6[0-9]M/);
      const url = `iscsi://127.0.0.1/${iqn}/0`;
      assert.match(await k.out(`iscsi-readcapacity16 ${url}`), /67108864/);
      for (const suite of ['Read10.Simple', 'Write10.Simple', 'Read16.Simple', 'Write16.Simple']) {
        await k.sh(`timeout 60 iscsi-test-cu --dataloss --test=SCSI.${suite} ${url}`, {
          timeoutSeconds: 70,
        });
      }
      // The suite's writes have reached the file.
      await k.sh(`test "$(stat -c %b ${image})" -gt 0`);
      await proc.stop();
    },
  }),
];
