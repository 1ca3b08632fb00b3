// SPDX-License-Identifier: Apache-2.0
/** A tree is copied into a new ext4, its handler is killed in the middle, and a successor lets the copy end. */
import assert from 'node:assert/strict';
import { type Kit, sleep } from './kit.js';
import type { Proc } from './process.js';

/** Some 24 MB that every checkout has. */
export const tree = 'node_modules/typescript/lib';

/** @returns what `serveAgain` answers; the file system is clean, and not mounted */
export async function copyAcrossKill<T extends { disk: string }>(
  k: Kit,
  { proc, disk }: { proc: Proc; disk: string },
  serveAgain: () => Promise<T>,
): Promise<T> {
  await k.sh(`mkfs.ext4 -q ${disk}`);
  const mount = await k.mount(disk);
  const copy = k.start(
    ['/bin/sh', '-c', `for i in 1 2 3; do cp -a ${tree} ${mount}/$i || exit 1; sync; done`],
    { name: 'copy' },
  );
  // The seventh column counts sectors written: kill in the middle of the first sync.
  const written = (): number => Number(k.diskAttribute(disk, 'stat').split(/\s+/)[6]);
  const before = written();
  await k.waitFor('8 MiB of writes', () => written() > before + 16384);
  proc.kill('SIGKILL');
  await proc.wait();
  await sleep(1);
  assert(copy.running, 'the copy waits for the disk');
  const successor = await serveAgain();
  assert.equal((await copy.wait(60)).code, 0, 'the copy ended well');
  await k.sh(`umount ${mount} && e2fsck -fn ${successor.disk}`, { timeoutSeconds: 60 });
  return successor;
}
