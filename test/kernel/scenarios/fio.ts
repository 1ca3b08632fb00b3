// SPDX-License-Identifier: Apache-2.0
/** What was written is what is read: every block carries a checksum and its own offset (fio's crc32c verification). */
import type { Kit } from '../harness/kit.js';
import { scenario } from '../harness/scenario.js';

interface Pass {
  rw: 'write' | 'randwrite';
  bs: string;
  depth: number;
  size: string;
}

async function verify(k: Kit, args: readonly string[], passes: readonly Pass[]): Promise<void> {
  const image = `${k.dir}/disk.img`;
  await k.sh(`truncate -s 256M ${image}`);
  const { proc, disk } = await k.serve(image, args);
  for (const { rw, bs, depth, size } of passes) {
    await k.fio(
      {
        name: `${rw}-${bs}-${depth}`,
        filename: disk,
        ioengine: 'libaio',
        direct: 1,
        rw,
        [bs.includes('-') ? 'bsrange' : 'bs']: bs,
        iodepth: depth,
        size,
        verify: 'crc32c',
        verify_fatal: 1,
        do_verify: 1,
        verify_dump: 0,
        // Nothing of an earlier pass may satisfy a later one.
        randseed: depth + size.length + bs.length * 1000,
      },
      90,
    );
  }
  await proc.stop();
}

export default [
  scenario({
    name: 'fio.random',
    about: 'random writes of 512 B to 8 MiB at depths 1 to 64 read back right',
    timeoutSeconds: 150,
    async run(k) {
      await verify(
        k,
        [],
        [
          { rw: 'randwrite', bs: '512', depth: 1, size: '1M' },
          { rw: 'randwrite', bs: '512', depth: 64, size: '4M' },
          { rw: 'randwrite', bs: '4k', depth: 1, size: '8M' },
          { rw: 'randwrite', bs: '4k', depth: 64, size: '48M' },
          { rw: 'randwrite', bs: '512-128k', depth: 32, size: '96M' },
          { rw: 'randwrite', bs: '64k', depth: 16, size: '128M' },
          { rw: 'randwrite', bs: '1m', depth: 8, size: '192M' },
          { rw: 'randwrite', bs: '8m', depth: 4, size: '192M' },
        ],
      );
    },
  }),
  scenario({
    name: 'fio.sequential',
    about: 'sequential writes of 512 B to 8 MiB at depths 1 to 64 read back right',
    timeoutSeconds: 150,
    async run(k) {
      await verify(
        k,
        [],
        [
          { rw: 'write', bs: '512', depth: 64, size: '4M' },
          { rw: 'write', bs: '4k', depth: 1, size: '8M' },
          { rw: 'write', bs: '4k', depth: 16, size: '48M' },
          { rw: 'write', bs: '128k', depth: 32, size: '192M' },
          { rw: 'write', bs: '1m', depth: 64, size: '192M' },
          { rw: 'write', bs: '8m', depth: 2, size: '192M' },
        ],
      );
    },
  }),
  scenario({
    name: 'fio.write-through',
    about: '4 KiB blocks without a write cache: every pass reads back right',
    timeoutSeconds: 120,
    async run(k) {
      await verify(
        k,
        ['--block-size', '4096', '--no-write-cache'],
        [
          { rw: 'randwrite', bs: '4k', depth: 32, size: '32M' },
          { rw: 'randwrite', bs: '4k-256k', depth: 16, size: '96M' },
          { rw: 'write', bs: '1m', depth: 4, size: '128M' },
        ],
      );
    },
  }),
];
