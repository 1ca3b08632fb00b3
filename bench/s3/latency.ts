// SPDX-License-Identifier: Apache-2.0
/**
 * A relay that puts a time between a server's answer and its client, as a distant server would.
 *
 * Contract: what the server sends arrives so many milliseconds later, in order, however much it is: the time is added once a
 * request, and takes nothing from the bandwidth. What the client sends goes on at once. It knows nothing of HTTP.
 */
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net';

/** Bytes held back for one client before its server is made to wait. */
const held = 32 * 1024 * 1024;

export class LatencyRelay {
  delayMs = 0;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();

  /** @param upstream `http://host:port` */
  constructor(upstream: string) {
    const { hostname, port } = new URL(upstream);
    this.#server = createServer({ noDelay: true }, (client) => {
      const server = connect({ host: hostname, port: Number(port), noDelay: true });
      for (const [socket, peer] of [
        [client, server],
        [server, client],
      ] as const) {
        this.#sockets.add(socket);
        socket.once('close', () => {
          this.#sockets.delete(socket);
          peer.destroy();
        });
        // The other side learns of it by the end of its connection.
        socket.on('error', () => {});
      }
      client.pipe(server);
      this.#delay(server, client);
    });
  }

  get endpoint(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  start(): Promise<this> {
    return new Promise((resolve, reject) => {
      this.#server.once('error', reject);
      this.#server.listen(0, '127.0.0.1', () => resolve(this));
    });
  }

  stop(): Promise<void> {
    for (const socket of this.#sockets) socket.destroy();
    return new Promise((resolve) => this.#server.close(() => resolve()));
  }

  #delay(server: Socket, client: Socket): void {
    let waiting = 0;
    server.on('data', (data: Buffer) => {
      waiting += data.length;
      if (waiting > held) server.pause();
      setTimeout(() => {
        waiting -= data.length;
        if (waiting <= held) server.resume();
        if (!client.destroyed) client.write(data);
      }, this.delayMs);
    });
  }
}
