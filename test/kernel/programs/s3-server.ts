// SPDX-License-Identifier: Apache-2.0
/** The S3 server in memory that the example's tests use: `s3-server.js BUCKET`. Prints `ready endpoint=…`; ends on SIGTERM. */
import { MemoryServer } from '../../../examples/s3/test/support/memory-server.js';

const server = await new MemoryServer({ accessKeyId: 'kernel-test' }).start();
server.buckets.set(process.argv[2] ?? '', new Map());
console.log(`ready endpoint=${server.endpoint}`);
process.once('SIGTERM', () => void server.stop());
