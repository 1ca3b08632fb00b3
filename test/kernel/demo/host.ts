// SPDX-License-Identifier: Apache-2.0
/** Boots user-mode Linux for the demonstration and shows what happens in it as it happens. */
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { runUml } from '../../vm/uml.js';

const here = dirname(fileURLToPath(import.meta.url));

const { exitCode, kernelProblems, kernelLog, timedOut, seconds } = await runUml({
  command: [process.execPath, join(here, 'guest.js')],
  timeoutSeconds: 180,
  onLine: (line) => console.log(line),
});
if (exitCode === 0 && kernelProblems.length === 0) {
  console.log(`\nAll of it worked, in ${seconds.toFixed(0)} s with the boot.`);
} else {
  if (timedOut) console.log('\nOut of time.');
  console.log(`\nThe end of the kernel log:\n${kernelLog.split('\n').slice(-30).join('\n')}`);
  process.exit(1);
}
