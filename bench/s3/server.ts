// SPDX-License-Identifier: Apache-2.0
/**
 * Serves a disk in a bucket over NBD, as a process of its own: `server.mjs '{"location": …, "connect": {…}, "socket": …, "sizeBytes": …,
 * "cacheBytes": …, "restartFile": …}'`. Makes the disk when there is none. Prints `ready`, ends at SIGTERM after a flush.
 */
import { serveNbd } from 'tcmu/sim';
import { connect, createDisk, Requests, S3Disk, systemClock } from 'tcmu-s3';

export interface ServerPlan {
  location: string;
  connect: Parameters<typeof connect>[1];
  socket: string;
  sizeBytes: number;
  /** For what is written and for what is read, together. */
  cacheBytes: number;
  restartFile: string;
}

const plan = JSON.parse(process.argv[2] ?? '') as ServerPlan;
const { store, prefix } = await connect(plan.location, plan.connect);
const requests = new Requests(store, systemClock, () => {}, 30_000);
await createDisk(requests, prefix, { size: plan.sizeBytes }).catch((error: { code?: string }) => {
  if (error.code !== 'ERR_TCMU_S3_EXISTS') throw error;
});
const dirtyLimit = 64 * 1024 * 1024;
const disk = await S3Disk.open(store, prefix, {
  dirtyLimit,
  cacheSize: plan.cacheBytes - dirtyLimit,
  // As the command line does.
  restartFile: plan.restartFile,
});
const server = await serveNbd(disk, { path: plan.socket });
process.once('SIGTERM', () => {
  server
    .close()
    .then(() => store.close())
    .then(() => process.exit(0));
});
console.log('ready');
