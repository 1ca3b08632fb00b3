// SPDX-License-Identifier: Apache-2.0
/** Serves a qcow2 image over NBD through the simulated kernel, until it is told to end: `server.mjs IMAGE SOCKET`. */
import { serveNbd } from 'tcmu/sim';
import { QcowStore } from 'tcmu-qcow';

const [image = '', path = ''] = process.argv.slice(2);
const server = await serveNbd(await QcowStore.open(image), { path });
process.once('SIGTERM', () => void server.close());
process.stdout.write('ready\n');
await server.closed;
