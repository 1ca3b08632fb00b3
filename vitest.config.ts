// SPDX-License-Identifier: Apache-2.0
import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: ['test/*.test.ts'],
    // The addon keeps state per environment, and some tests end workers and processes: forks isolate.
    pool: 'forks',
    testTimeout: 20_000,
  },
});
