// SPDX-License-Identifier: Apache-2.0
/**
 * The demonstration inside the guest: the main job of the package, step by step, with the commands a reader
 * could type. Every step is checked; a step that fails ends it with exit code 1.
 */
import assert from 'node:assert/strict';
import { statSync } from 'node:fs';
import { Kit, sleep } from '../harness/kit.js';

/** The kit's log lines as one would type them. */
function shown(text: string): string {
  return text.replace(/^& (?:\S+\/(?=node ))?(.*)/, '$ $1 &');
}

let steps = 0;
function step(title: string): void {
  console.log(`\n${++steps}. ${title}`);
}

function mebibytes(path: string): string {
  return `${((statSync(path).blocks * 512) / 1024 / 1024).toFixed(0)} MiB`;
}

const kit = new Kit('', (text) => console.log(`   ${shown(text)}`));

async function run(): Promise<void> {
  const image = `${kit.dir}/disk.img`;
  console.log(`Linux ${await kit.out('uname -r', { quiet: true })} is up, as an ordinary process.`);

  step('An empty image: 256 MiB long, no block allocated');
  await kit.sh(`truncate -s 256M ${image}`);

  step('The file example serves it; the kernel makes it a SCSI disk');
  let { proc, disk } = await kit.serve(image, ['--name', 'demo']);
  const device = `/sys/block/${disk.slice('/dev/'.length)}`;
  await kit.sh(`cat ${device}/device/vendor ${device}/device/model`);
  await kit.sh(`blockdev --getsize64 ${disk}`);

  step('A file system on it');
  await kit.sh(`mkfs.ext4 -q ${disk}`);
  const mount = await kit.mount(disk);

  step('Write 64 MiB, drop the page cache, read them back from the disk');
  await kit.sh(`head -c 64M /dev/urandom > ${kit.dir}/original`);
  await kit.sh(`cp ${kit.dir}/original ${mount}/copy && sync -f ${mount}`);
  await kit.sh('echo 3 > /proc/sys/vm/drop_caches');
  await kit.sh(`cmp ${kit.dir}/original ${mount}/copy && echo identical`);

  step('kill -9 the handler while a program writes');
  const writer = kit.start(
    ['dd', `if=${kit.dir}/original`, `of=${mount}/second`, 'bs=4k', 'oflag=direct', 'status=none'],
    { name: 'dd' },
  );
  await kit.waitFor('the first blocks of the second file', () => {
    try {
      return statSync(`${mount}/second`).blocks > 0;
    } catch {
      return false;
    }
  });
  console.log(`   $ kill -9 ${proc.pid}`);
  proc.kill('SIGKILL');
  await proc.wait();
  await sleep(2);
  assert(writer.running, 'the program waits for its disk');
  console.log(
    '   two seconds later the program still waits: no error, the kernel keeps its commands',
  );

  step('Start it again with --recover: the writes go on');
  ({ proc, disk } = await kit.serve(image, ['--name', 'demo', '--recover']));
  assert.equal((await writer.wait(60)).code, 0, 'the program ended well');
  await kit.sh(`sync -f ${mount} && echo 3 > /proc/sys/vm/drop_caches`);
  await kit.sh(`cmp ${kit.dir}/original ${mount}/second && echo identical`);

  step('Delete, trim: the image gives the space back');
  const before = mebibytes(image);
  await kit.sh(`rm ${mount}/second && sync -f ${mount} && fstrim -v ${mount}`);
  console.log(`   the image took ${before}, now it takes ${mebibytes(image)}`);

  step('Unmount, check');
  await kit.sh(`umount ${mount}`);
  await kit.sh(`e2fsck -fn ${disk}`);

  step('End the handler: disk, target and backstore go with it');
  await proc.stop();
  kit.assertNothingLeft();
  await kit.assertNoStuckTasks();
  await kit.sh(`e2fsck -fn ${image} > /dev/null && echo 'the image alone is a clean ext4'`);
}

try {
  await run();
} catch (error) {
  console.log(`\nfailed: ${error instanceof Error ? error.message : String(error)}`);
  process.exitCode = 1;
}
kit.destroy();
process.exit();
