// SPDX-License-Identifier: Apache-2.0
/** A disk that follows the size in configfs. */
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { type Backstore, createBackstore } from '../lib/target/backstore.js';
import { followSize } from '../lib/target/follow-size.js';
import type { TcmuNetlink } from '../lib/target/netlink.js';
import { FakeKernel } from './target-fake.js';

const MiB = 1 << 20;
let kernel: FakeKernel;
let backstore: Backstore;
let listener: TcmuNetlink | undefined;
let problems: Error[];

/** Grows, but shrinks for nobody. */
class Disk {
  size = MiB;
  readonly asked: number[] = [];
  resize = async (size: number): Promise<void> => {
    this.asked.push(size);
    if (size < this.size) throw new Error('would cut data off');
    this.size = size;
  };
}

beforeEach(async () => {
  kernel = new FakeKernel();
  problems = [];
  backstore = await createBackstore({ name: 'd', size: MiB, config: 'file/x', host: kernel.host });
});
afterEach(async () => {
  await listener?.close();
  kernel.destroy();
});

const announce = (size: number, name = 'd') =>
  kernel.netlink.emit({
    kind: 'reconfigured',
    name: `tcm-user/0/${name}/file/x`,
    minor: 4,
    id: 40,
    size: BigInt(size),
  });
const follow = async (disk: Disk) => {
  listener = await followSize(backstore, disk, (problem) => problems.push(problem));
};
const sizeTold = async () => (await backstore.settings()).size;

describe('followSize', () => {
  it('takes the size of its backstore over, and of no other', async () => {
    const disk = new Disk();
    await follow(disk);
    await announce(4 * MiB, 'other');
    await announce(2 * MiB);
    await expect.poll(() => disk.asked).toEqual([2 * MiB]);
    // What the disk did by itself is announced too.
    await announce(2 * MiB);
    await announce(3 * MiB);
    await expect.poll(() => disk.asked).toEqual([2 * MiB, 3 * MiB]);
    expect(problems).toEqual([]);
  });

  it('puts the size back that the disk can’t follow', async () => {
    const disk = new Disk();
    await follow(disk);
    await backstore.resize(MiB / 2);
    await announce(MiB / 2);
    await expect.poll(sizeTold).toBe(MiB);
    expect(problems.map(({ message }) => message)).toEqual([
      'd was not resized through configfs: would cut data off',
    ]);
    expect(problems[0]?.cause).toBeInstanceOf(Error);
  });

  it('is not there without netlink, and says so', async () => {
    const calls = await kernel.host.calls();
    vi.spyOn(kernel.host, 'calls').mockResolvedValue({
      ...calls,
      NetlinkSocket: class {
        constructor() {
          throw new Error('sandboxed');
        }
      } as unknown as typeof calls.NetlinkSocket,
    });
    await follow(new Disk());
    expect(listener).toBeUndefined();
    expect(problems[0]?.message).toMatch(/^d can not be resized through configfs: /);
  });
});
