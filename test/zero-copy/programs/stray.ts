// SPDX-License-Identifier: Apache-2.0
/**
 * A handler that stores into Data-Out, which with zero copy is the initiator's own memory.
 *
 *     stray.js NAME
 *
 * Makes the backstore, prints `ready uio=… disk=…`, and answers reads with zeros. Of the first WRITE it takes `dataIn` alone, tries
 * to fill it, prints `refused CODE`, and completes it; into the data of the second it stores a byte. Prints
 * `error CODE MESSAGE` for what the device reports, and stays.
 */
import { type CommandHandler, serveHandler } from 'tcmu';
import { BlockDevice } from 'tcmu/scsi';
import { MemoryStore } from 'tcmu/store';

const [name = 'stray'] = process.argv.slice(2);
const size = 64 << 20;
const inner = new BlockDevice(new MemoryStore({ size }), { serial: name });
let writes = 0;
const handler: CommandHandler = {
  open: () => inner.open(),
  handle(command) {
    if (command.cdb[0] === 0x2a && writes++ === 0) {
      try {
        command.dataIn.fill(0xee);
      } catch (error) {
        console.log(`refused ${(error as { code?: string }).code}`);
      }
      command.complete();
      return;
    }
    if (command.cdb[0] === 0x2a) {
      const [segment] = command.dataOut.segments();
      (segment as Uint8Array)[8] = 0xee;
      command.complete();
      return;
    }
    return inner.handle(command);
  },
};
const served = await serveHandler(handler, {
  name,
  size,
  export: 'loopback',
  zeroCopy: true,
  signals: false,
});
served.device.on('error', (error: Error & { code?: string }) => {
  console.log(`error ${error.code} ${error.message}`);
});
console.log(`ready uio=${served.uioPath} disk=${served.disk}`);
setInterval(() => {}, 1000);
