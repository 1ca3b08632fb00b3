// SPDX-License-Identifier: Apache-2.0
/**
 * Handlers to measure, over an existing uio device: `handlers.js null|socket UIO BYTES [SOCKET]`. Prints `ready`.
 *
 * `null` answers READ and WRITE without looking at their data. `socket` sends what is written to `peer.c`, and reads from it, as a
 * handler for an object store does: straight from the command's memory, pinned, one way; the other way through the buffers that
 * Node hands out.
 */
import { connect, type Socket } from 'node:net';
import { type CommandHandler, Device, openUio, type ScsiCommand } from 'tcmu';
import { BlockDevice } from 'tcmu/scsi';
import { MemoryStore } from 'tcmu/store';

const [kind = '', uio = '', bytes = '', path = ''] = process.argv.slice(2);
const disk = new BlockDevice(new MemoryStore({ size: Number(bytes) }), { serial: 'bench' });

function isRead(command: ScsiCommand): boolean {
  return command.cdb[0] === 0x28 || command.cdb[0] === 0x88;
}

function isWrite(command: ScsiCommand): boolean {
  return command.cdb[0] === 0x2a || command.cdb[0] === 0x8a;
}

const nothing: CommandHandler = {
  open: () => disk.open(),
  handle(command) {
    if (isRead(command) || isWrite(command)) command.complete();
    else return disk.handle(command);
  },
};

/** One request after another on one connection; answers come in order. */
class Peer implements CommandHandler {
  readonly #socket: Socket;
  readonly #waiting: { take(chunk: Buffer): number; done(): boolean; end(): void }[] = [];

  constructor(socket: Socket) {
    this.#socket = socket;
    socket.on('data', (chunk) => this.#receive(chunk));
  }

  open(): void | Promise<void> {
    return disk.open();
  }

  #receive(chunk: Buffer): void {
    let rest = chunk;
    for (let first = this.#waiting[0]; first !== undefined && rest.length > 0; ) {
      rest = rest.subarray(first.take(rest));
      if (!first.done()) return;
      this.#waiting.shift();
      first.end();
      first = this.#waiting[0];
    }
  }

  #request(write: boolean, length: number): void {
    const header = Buffer.alloc(8);
    header.writeUInt32LE(write ? 1 : 0, 0);
    header.writeUInt32LE(length, 4);
    this.#socket.write(header);
  }

  handle(command: ScsiCommand): void | Promise<void> {
    const read = isRead(command);
    if (!read && !isWrite(command)) return disk.handle(command);
    return new Promise((resolve) => {
      const end = (): void => {
        command.complete();
        resolve();
      };
      // Only what is used is asked for: copied memory that may be Data-In is zeroed where it was not written.
      if (read) {
        const { dataIn } = command;
        let at = 0;
        this.#waiting.push({
          take(chunk) {
            const part = chunk.subarray(0, dataIn.length - at);
            dataIn.copyFrom(part, at);
            at += part.length;
            return part.length;
          },
          done: () => at === dataIn.length,
          end,
        });
        this.#request(false, dataIn.length);
        return;
      }
      const { dataOut } = command;
      let acknowledged = false;
      this.#waiting.push({
        take: () => {
          acknowledged = true;
          return 1;
        },
        done: () => acknowledged,
        end,
      });
      // The acknowledgement comes after the last byte was read: nothing is pending in the socket then.
      this.#request(true, dataOut.length);
      for (const segment of dataOut.segments()) this.#socket.write(segment);
    });
  }
}

const handler =
  kind === 'socket'
    ? new Peer(
        await new Promise<Socket>((resolve) => {
          const socket = connect(path, () => resolve(socket));
        }),
      )
    : nothing;
const device = await Device.open(openUio(uio), { handler });
device.on('error', (error) => {
  throw error;
});
console.log('ready');
