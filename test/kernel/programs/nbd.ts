// SPDX-License-Identifier: Apache-2.0
/** A disk in memory over NBD: `nbd.js SOCKET SIZE`. Prints `ready`; ends on SIGTERM. */
import { serveNbd } from 'tcmu/sim';
import { MemoryStore } from 'tcmu/store';

const [path = '', size = ''] = process.argv.slice(2);
const server = await serveNbd(new MemoryStore({ size: Number(size) }), { path });
console.log(`ready path=${path}`);
process.once('SIGTERM', () => void server.close());
