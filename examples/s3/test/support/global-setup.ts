// SPDX-License-Identifier: Apache-2.0
/** Starts radosgw once for a whole test run, where Debian's packages for it are installed. */
import type { TestProject } from 'vitest/node';
import { missingPrograms, startRadosgw } from './radosgw.js';

declare module 'vitest' {
  export interface ProvidedContext {
    /** Undefined where it can't run. */
    radosgw:
      | { endpoint: string; accessKeyId: string; secretAccessKey: string; region: string }
      | undefined;
  }
}

export default async function setup(project: TestProject): Promise<(() => Promise<void>) | void> {
  const missing = missingPrograms();
  if (missing.length > 0) {
    console.log(`radosgw can't run, its tests are skipped; missing: ${missing.join(' ')}`);
    project.provide('radosgw', undefined);
    return;
  }
  const { endpoint, accessKeyId, secretAccessKey, region, stop } = await startRadosgw();
  project.provide('radosgw', { endpoint, accessKeyId, secretAccessKey, region });
  return stop;
}
