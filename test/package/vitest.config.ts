// SPDX-License-Identifier: Apache-2.0
import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    root: import.meta.dirname,
    include: ['*.test.ts'],
    globalSetup: './tarball.ts',
    pool: 'forks',
    // npm and tsc run inside the tests.
    testTimeout: 180_000,
    hookTimeout: 300_000,
  },
});
