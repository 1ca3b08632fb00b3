// SPDX-License-Identifier: Apache-2.0
/** npm run bench:scsi [-- <million commands a round>]: what the SCSI layer itself costs a command. */
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { bundlePrograms } from '../../scripts/bundle.mjs';

const built = await bundlePrograms('bench/scsi', ['main']);
await import(pathToFileURL(join(built, 'main.mjs')).href);
