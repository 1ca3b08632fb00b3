// SPDX-License-Identifier: Apache-2.0
import { defineConfig } from 'tsup';

export default defineConfig({
  entry: {
    index: 'lib/index.ts',
    scsi: 'lib/scsi/index.ts',
    store: 'lib/store/index.ts',
    target: 'lib/target/index.ts',
    sim: 'lib/sim/index.ts',
    program: 'lib/program/index.ts',
    cli: 'lib/cli/main.ts',
  },
  format: ['esm', 'cjs'],
  dts: { compilerOptions: { ignoreDeprecations: '6.0', stripInternal: true } },
  shims: true,
  splitting: true,
  sourcemap: true,
  clean: true,
  target: 'node20',
  platform: 'node',
});
