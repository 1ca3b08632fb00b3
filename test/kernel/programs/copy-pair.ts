// SPDX-License-Identifier: Apache-2.0
/**
 * Two disks in memory, served by one process, that EXTENDED COPY may copy between.
 *
 *     copy-pair.js <bytes of each>
 *
 * Prints `ready first=/dev/sdX second=/dev/sdY`.
 */
import { type Served, serve } from 'tcmu';
import { MemoryStore } from 'tcmu/store';

const size = Number(process.argv[2]);
const served: Served[] = [];
for (const name of ['first', 'second']) {
  served.push(
    await serve(new MemoryStore({ size }), {
      name,
      export: 'loopback',
      signals: false,
      scsi: { product: 'Copy pair', copyGroup: 'pair' },
    }),
  );
}
console.log(`ready first=${served[0]?.disk} second=${served[1]?.disk}`);
process.once('SIGTERM', async () => {
  for (const one of served) await one.close();
});
