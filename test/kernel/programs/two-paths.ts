// SPDX-License-Identifier: Apache-2.0
/** The program of docs/iscsi.md, with its second path: serves until SIGTERM, prints `ready`. */
import { serve } from 'tcmu';
import { MemoryStore } from 'tcmu/store';
import { attachIscsi } from 'tcmu/target';

const iqn = 'iqn.2026-01.org.example:d1';
const initiators = [
  {
    name: 'iqn.2026-01.org.example:host1',
    chap: {
      user: 'host1',
      password: 'at-least-12-chars',
      mutual: { user: 'd1', password: 'another-secret-of-it' },
    },
  },
];
const served = await serve(new MemoryStore({ size: 64 << 20 }), {
  name: 'd1',
  export: { type: 'iscsi', iqn, portals: ['192.0.2.1'], initiators },
  signals: false,
});
const second = await attachIscsi(served.backstore, {
  iqn: `${iqn}-b`,
  portals: ['192.0.2.2'],
  initiators,
});
console.log(`ready url=${served.iscsi?.url}`);
process.once('SIGTERM', async () => {
  await second.detach();
  await served.close();
});
