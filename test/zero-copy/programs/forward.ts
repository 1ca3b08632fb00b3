// SPDX-License-Identifier: Apache-2.0
/**
 * A handler that keeps its data at the other end of a socket, as one for an object store does.
 *
 *     forward.js NAME
 *
 * Makes the backstore, prints `ready uio=… disk=…`. WRITE sends the command's own pages, READ fills them from what the
 * socket has received. Prints `error CODE MESSAGE` for what the device reports.
 *
 * The other end is a server in this process, over a Unix socket: u32 kind (1: write), u64 offset, u32 length, then the data
 * of a write, which is acknowledged with one byte.
 */
import { connect, createServer, type Socket } from 'node:net';
import { type CommandHandler, type ScsiCommand, serveHandler } from 'tcmu';
import { BlockDevice } from 'tcmu/scsi';
import { MemoryStore } from 'tcmu/store';

const HEADER = 16;
const [name = 'forward'] = process.argv.slice(2);
const path = `/run/${name}.socket`;
const size = 64 << 20;

/** The other end. */
function serveData(socket: Socket): void {
  const data = Buffer.alloc(size);
  let pending = Buffer.alloc(0);
  socket.on('data', (chunk) => {
    pending = Buffer.concat([pending, chunk]);
    while (pending.length >= HEADER) {
      const write = pending.readUInt32LE(0) === 1;
      const offset = Number(pending.readBigUInt64LE(4));
      const length = pending.readUInt32LE(12);
      const end = HEADER + (write ? length : 0);
      if (pending.length < end) return;
      if (write) pending.copy(data, offset, HEADER, end);
      socket.write(write ? 'a' : Buffer.from(data.subarray(offset, offset + length)));
      pending = pending.subarray(end);
    }
  });
}

createServer(serveData).listen(path);
const socket = await new Promise<Socket>((resolve) => {
  const made = connect(path, () => resolve(made));
});
/** In the order of the requests; each takes what it needs of a chunk, and says how much and whether it has all. */
const waiting: ((chunk: Buffer) => { taken: number; done: boolean })[] = [];
socket.on('data', (chunk) => {
  for (let rest = chunk; rest.length > 0; ) {
    const step = waiting[0]?.(rest) ?? { taken: rest.length, done: false };
    if (step.done) waiting.shift();
    rest = rest.subarray(step.taken);
  }
});

function transfer(command: ScsiCommand, write: boolean): Promise<void> {
  // Both buffers are asked for, whichever way the data goes.
  const { cdb, dataIn, dataOut } = command;
  const header = Buffer.alloc(HEADER);
  header.writeUInt32LE(write ? 1 : 0, 0);
  const view = Buffer.from(cdb);
  header.writeBigUInt64LE(BigInt(view.readUInt32BE(2)) * 512n, 4);
  header.writeUInt32LE(write ? dataOut.length : dataIn.length, 12);
  socket.write(header);
  if (write) for (const segment of dataOut.segments()) socket.write(segment);
  return new Promise((resolve) => {
    let at = 0;
    waiting.push((chunk) => {
      const part = chunk.subarray(0, write ? 1 : dataIn.length - at);
      if (!write) dataIn.copyFrom(part, at);
      at += part.length;
      const done = write || at === dataIn.length;
      if (done) {
        command.complete();
        resolve();
      }
      return { taken: part.length, done };
    });
  });
}

const inner = new BlockDevice(new MemoryStore({ size }), { serial: name });
const handler: CommandHandler = {
  open: () => inner.open(),
  handle(command) {
    const [code] = command.cdb;
    if (code === 0x28 || code === 0x2a) return transfer(command, code === 0x2a);
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
process.once('SIGTERM', async () => {
  await served.close();
  process.exit(0);
});
served.device.on('error', (error: Error & { code?: string }) => {
  console.log(`error ${error.code} ${error.message}`);
});
console.log(`ready uio=${served.uioPath} disk=${served.disk}`);
