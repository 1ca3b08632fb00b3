// SPDX-License-Identifier: Apache-2.0
/**
 * What must hold on a kernel with the patches of `kernel/`, in the order they run in one boot.
 *
 * `consumer` is the handler in C of programs/consumer.c: the bare ring, for what a handler in JavaScript can't
 * do or must not. Everything else is served by the file example as a user would start it.
 */
import assert from 'node:assert/strict';
import { suites } from '../../conformance/plan.js';
import { parseOutput } from '../../conformance/suite.js';
import { compareWithFixture } from '../fidelity/compare.js';
import type { FioJob, Kit, Served } from '../kernel/harness/kit.js';
import { sleep } from '../kernel/harness/kit.js';
import { type Proc, slowness } from '../kernel/harness/process.js';

export interface Scenario {
  readonly name: string;
  readonly about: string;
  /** Default 120. */
  readonly timeoutSeconds?: number;
  run(k: Kit): Promise<void>;
}

const MIB = 1 << 20;
const SIZE = 64 * MIB;
/** What the kernel's stock module says of every device: OOOC, READ_LEN, TMR, KEEP_BUF. */
const STOCK_FLAGS = 15;
const ZERO_COPY_FLAGS = 1 + 2 + 4 + 16 + 32;
const consumer = `${process.env['TCMU_ZERO_COPY_BUILD']}/consumer`;
const iqn = 'iqn.2026-01.org.example:zc';

/** The command that ends another. */
function timeout(seconds: number): string {
  return `timeout -k 5 ${seconds * slowness}`;
}

/** attrib/zc_stats. */
async function statistics(k: Kit, name: string): Promise<Record<string, number>> {
  const text = await k.out(`cat ${k.configfs.find(name)}/attrib/zc_stats`);
  return Object.fromEntries(
    text.split('\n').map((line) => [line.split(' ')[0], Number(line.split(' ')[1])]),
  );
}

interface Consumed {
  proc: Proc;
  disk: string;
  /** Removes everything, the consumer too. */
  end(): Promise<void>;
}

/** A disk that the consumer serves. */
async function consume(
  k: Kit,
  mode: string,
  extra: readonly string[] = ['zero_copy=1'],
): Promise<Consumed> {
  const backstore = await k.configfs.create({ name: 'c0', size: SIZE, extra });
  const proc = await startConsumer(k, mode);
  const { disk, tpg } = await k.configfs.attachLoopback(backstore);
  return {
    proc,
    disk,
    async end() {
      await k.configfs.detachLoopback(tpg);
      await k.configfs.remove(backstore);
      await proc.wait();
    },
  };
}

async function startConsumer(
  k: Kit,
  mode: string,
  { name = 'c0', path = '/dev/ram0' } = {},
): Promise<Proc> {
  const argv = [consumer, k.configfs.uio(name), String(SIZE), mode, path];
  const proc = k.start(argv, { name: mode });
  await proc.line(/^ready /);
  return proc;
}

async function serveFile(
  k: Kit,
  more: readonly string[] = [],
): Promise<Served & { image: string }> {
  const image = `${k.dir}/disk.img`;
  await k.sh(`truncate -s 64M ${image}`);
  return { ...(await k.serve(image, ['--zero-copy', 'always', ...more])), image };
}

function verified(k: Kit, filename: string, job: Record<string, string | number>): Promise<FioJob> {
  return k.fio({
    filename,
    ioengine: 'libaio',
    direct: 1,
    rw: 'randwrite',
    iodepth: 16,
    verify: 'crc32c',
    verify_fatal: 1,
    ...job,
  });
}

function startLoad(k: Kit, disk: string, job: Record<string, string | number> = {}): Proc {
  const args = k.fioArguments({
    name: 'load',
    filename: disk,
    ioengine: 'libaio',
    direct: 1,
    rw: 'randrw',
    bs: '64k',
    iodepth: 16,
    time_based: true,
    runtime: 60,
    ...job,
  });
  return k.start(['fio', ...args], { name: 'fio', echo: false });
}

/** Bytes of a file all have one value. */
async function assertFilled(k: Kit, file: string, bytes: number, octal: string): Promise<void> {
  assert.equal(await k.out(`stat -c %s ${file}`), String(bytes), `size of ${file}`);
  assert.equal(
    await k.out(`tr -d '\\${octal}' < ${file} | wc -c`),
    '0',
    `${file} is not all ${octal}`,
  );
}

/** A READ(10) or WRITE(10) of 64 KiB at a MiB of the disk. */
function cdb(opcode: string, mib: number): string {
  const lba = ((mib * MIB) / 512).toString(16).padStart(8, '0').replace(/../g, '$& ');
  return `${opcode} 00 ${lba} 00 00 80 00`;
}

async function initiate(k: Kit, disk: string): Promise<void> {
  await k.sh(`head -c 65536 /dev/urandom > ${k.dir}/out`);
  const write = async (mib: number): Promise<void> => {
    await k.sh(`${timeout(30)} sg_raw -s 65536 -i ${k.dir}/out ${disk} ${cdb('2a', mib)}`);
    await k.sh(`${timeout(30)} sg_raw -r 65536 -o ${k.dir}/in ${disk} ${cdb('28', mib)}`);
    await k.sh(`cmp ${k.dir}/out ${k.dir}/in`);
  };
  // The order of probes[] in consumer.c.
  for (const mib of [1, 2, 3, 4, 8, 9]) await write(mib);
  await k.sh(`${timeout(30)} sg_raw -r 65536 -o ${k.dir}/short ${disk} ${cdb('28', 5)}`);
  await assertFilled(k, `${k.dir}/short`, 32768, '132');
  const failed = await k.sh(`${timeout(30)} sg_raw -r 65536 ${disk} ${cdb('28', 6)}`, {
    anyCode: true,
  });
  assert.match(failed.stderr, /Medium Error/i);
  await k.sh(`${timeout(30)} sg_raw -r 65536 -o ${k.dir}/unfilled ${disk} ${cdb('28', 7)}`);
  await assertFilled(k, `${k.dir}/unfilled`, 65536, '000');
}

/**
 * Counts, from now on, reads and writes that failed with EFAULT or EEXIST: pages that could not be pinned. The
 * answer is undefined on a kernel that can't trace system calls (kernel/debug).
 */
async function watchRefusals(k: Kit): Promise<() => Promise<number | undefined>> {
  const tracing = '/sys/kernel/tracing';
  const calls = ['pread64', 'pwrite64', 'preadv2', 'pwritev2'];
  const { code } = await k.sh(
    `(mountpoint -q ${tracing} || mount -t tracefs tracefs ${tracing}) && cd ${tracing}/events/syscalls || exit 1; for c in ${calls.join(' ')}; do echo 'ret == -14 || ret == -17' > sys_exit_$c/filter && echo 1 > sys_exit_$c/enable || exit 1; done; : > ${tracing}/trace`,
    { anyCode: true },
  );
  return async () =>
    code === 0 ? Number(await k.out(`grep -vc '^#' ${tracing}/trace; true`)) : undefined;
}

interface Target {
  url: string;
  remove(): Promise<void>;
}

/** An iSCSI target that everybody may use. */
async function exportIscsi(k: Kit, backstore: string, port = 3260): Promise<Target> {
  const name = `${iqn}${port}`;
  const tpg = `/sys/kernel/config/target/iscsi/${name}/tpgt_1`;
  await k.sh(
    `modprobe iscsi_target_mod; mkdir -p ${tpg}/lun/lun_0 ${tpg}/np/127.0.0.1:${port} && ln -s ${backstore} ${tpg}/lun/lun_0/store && cd ${tpg} && echo 0 > attrib/authentication && echo 1 > attrib/generate_node_acls && echo 1 > attrib/cache_dynamic_acls && echo 0 > attrib/demo_mode_write_protect && echo 1 > enable`,
  );
  return {
    url: `iscsi://127.0.0.1:${port}/${name}/0`,
    async remove() {
      await k.sh(
        `cd ${tpg} && echo 0 > enable && rm lun/lun_0/store && rmdir lun/lun_0 np/* && cd / && rmdir ${tpg} && rmdir ${tpg.slice(0, -'/tpgt_1'.length)}`,
      );
    },
  };
}

/** Runs libiscsi's tests against a file served with O_DIRECT; answers the verdict of each. */
async function conformance(
  k: Kit,
  mode: 'always' | 'never',
  tests: readonly string[],
): Promise<Map<string, string>> {
  const port = mode === 'always' ? 3260 : 3261;
  const name = `i${port}`;
  await k.sh(`truncate -s 48M /mnt/m-iscsi/${mode}.img`);
  const proc = k.start(
    [
      ...[process.execPath, 'examples/file/dist/cli.js', `/mnt/m-iscsi/${mode}.img`, '--direct'],
      ...['--physical-block-size', '512', '--name', name, '--export', 'none'],
      ...['--zero-copy', mode],
    ],
    { name: mode },
  );
  await proc.line(/^ready /, 60);
  const target = await exportIscsi(k, k.configfs.find(name), port);
  const verdicts = new Map<string, string>();
  for (const test of tests) {
    // A test that makes the suite hang or die has failed; so have those behind it, hence one at a time.
    const { stdout } = await k.sh(
      `${timeout(120)} iscsi-test-cu --dataloss --test=ALL.${test} -v ${target.url} 2>&1`,
      { anyCode: true, quiet: true, timeoutSeconds: 130 },
    );
    const results = parseOutput(stdout, 'no verdict');
    assert(results.length > 0, `${test} ran: ${stdout}`);
    for (const result of results) verdicts.set(result.name, result.verdict);
    k.log(`${mode}: ${results.map(({ name, verdict }) => `${name} ${verdict}`).join(', ')}`);
  }
  const moved = mode === 'always' ? await statistics(k, name) : undefined;
  await target.remove();
  await proc.stop();
  if (moved !== undefined) {
    assert((moved['cmds'] ?? 0) > 100, 'commands were not copied');
    assert.equal(moved['denied'], 0, 'nothing was touched that must not be');
  }
  return verdicts;
}

/** Both modes side by side, on the same kind of file. */
async function sameScore(k: Kit, tests: readonly string[]): Promise<void> {
  await k.sh('mkfs.ext4 -q -F /dev/ram0 && mkdir -p /mnt/m-iscsi && mount /dev/ram0 /mnt/m-iscsi');
  const refusals = await watchRefusals(k);
  const [zeroCopy, copied] = await Promise.all([
    conformance(k, 'always', tests),
    conformance(k, 'never', tests),
  ]);
  const count = (verdict: string): number =>
    [...zeroCopy.values()].filter((one) => one === verdict).length;
  k.log(
    `== ${count('passed')} passed, ${count('failed')} failed, ${count('skipped')} skipped with zero copy`,
  );
  assert.deepEqual(zeroCopy, copied, 'the verdicts with zero copy and without');
  assert(count('passed') > count('failed') + count('skipped'), 'most tests passed');
  assert.equal((await refusals()) ?? 0, 0, "the library's O_DIRECT worked on the pages themselves");
  await k.sh('umount /mnt/m-iscsi');
}

const wholeSuite: Scenario = {
  name: 'suite.whole',
  about: "libiscsi's whole suite scores the same with zero copy and without",
  timeoutSeconds: 3000,
  run: (k) =>
    sameScore(
      k,
      Object.keys(suites).filter((suite) => !/^(Sanitize|MultipathIO)/.test(suite)),
    ),
};

/** For kernels built to fail, with CONFIG_FAULT_INJECTION: `kernel/debug`. */
const faultInjection: Scenario = {
  name: 'fault-injection',
  about:
    'allocations of the handler and the initiator fail at random: errors or retries, never a crash',
  timeoutSeconds: 240,
  async run(k) {
    await k.sh('mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null; true');
    const { proc, disk, end } = await consume(k, 'memory');
    const knobs = '/sys/kernel/debug/failslab /sys/kernel/debug/fail_page_alloc';
    const most = 1_000_000;
    const probability = async (percent: number): Promise<void> => {
      await k.sh(
        `for k in ${knobs}; do cd $k && echo ${percent} > probability && echo ${most} > times && echo 1 > task-filter && echo 0 > verbose && echo 0 > ignore-gfp-wait && if [ -e min-order ]; then echo 0 > min-order; fi; done`,
      );
    };
    const failures = async (): Promise<number> =>
      (await k.out(`for k in ${knobs}; do cat $k/times; done`))
        .split('\n')
        .reduce((sum, left) => sum + most - Number(left), 0);
    // The handler alone: a fault that finds no memory for a page table is repeated, and the initiator sees nothing.
    await k.sh(`echo 1 > /proc/${proc.pid}/make-it-fail`);
    await probability(30);
    const load = startLoad(k, disk, { bsrange: '4k-256k', runtime: 20 });
    assert.equal((await load.wait(200)).code, 0, load.output);
    assert((await failures()) > 0, 'no allocation of the handler failed');
    // The initiator too: errors of its own, which end it.
    await probability(5);
    const fio = startLoad(k, disk, { bsrange: '4k-256k', continue_on_error: 'all', runtime: 20 });
    await sleep(2);
    await k.sh(`for p in $(pidof fio); do echo 1 > /proc/$p/make-it-fail; done`);
    await fio.wait(200);
    await probability(0);
    assert(proc.running, 'the handler lives');
    await verified(k, disk, { bs: '64k', size: '4M' });
    await end();
  },
};

const scenarios: readonly Scenario[] = [
  {
    name: 'default',
    about: 'a device that does not ask for it is what the stock module makes',
    async run(k) {
      const { proc, disk, end } = await consume(k, 'memory', []);
      assert.match(proc.output, new RegExp(`^ready flags=${STOCK_FLAGS} window=0\\+0$`, 'm'));
      const uio = k.configfs.uio('c0').slice('/dev/'.length);
      const size = await k.out(`cat /sys/class/uio/${uio}/maps/map0/size`);
      assert.equal(Number(size), (8 + 1024) * MIB, 'the size of the mapping');
      const dir = k.configfs.find('c0');
      await verified(k, disk, { bs: '64k', size: '4M' });
      assert.equal(await k.out(`cat ${dir}/attrib/zero_copy`), '0');
      assert.deepEqual(new Set(Object.values(await statistics(k, 'c0'))), new Set([0]));
      await end();
      await k.configfs.create({ name: 'c0', size: SIZE });
      await k.configfs.write(`${dir}/attrib/cmd_time_out`, '7');
      assert.equal(await k.out(`cat ${dir}/attrib/cmd_time_out`), '7');
      await k.configfs.remove(dir);
    },
  },
  {
    name: 'settings',
    about: 'the time-out is 0 and stays so; what is wrong or too late is refused',
    async run(k) {
      const dir = await k.configfs.create({
        name: 'c0',
        size: SIZE,
        extra: ['zero_copy=1', 'zc_area_mb=4'],
      });
      const refused = async (file: string, value: string): Promise<void> => {
        const { code } = await k.sh(`printf %s '${value}' > ${dir}/${file}`, { anyCode: true });
        assert.notEqual(code, 0, `${value} was taken by ${file}`);
      };
      assert.equal(await k.out(`cat ${dir}/attrib/cmd_time_out`), '0');
      await refused('attrib/cmd_time_out', '30');
      await k.configfs.write(`${dir}/attrib/cmd_time_out`, '0');
      await refused('control', 'zero_copy=0');
      await refused('control', 'zc_area_mb=8');
      await refused('attrib/zero_copy', '0');
      await refused('attrib/zc_scrub', '2');
      assert.equal(await k.out(`cat ${dir}/attrib/zc_area_mb`), '4');
      await k.configfs.remove(dir);
      await k.sh(`mkdir -p ${dir}`);
      await refused('control', 'zc_area_mb=0');
      await refused('control', 'zero_copy=2');
      await k.configfs.remove(dir);
    },
  },
  {
    name: 'node',
    about: 'a device that is removed while it is open lets go of its node when it is closed',
    async run(k) {
      const dir = `${k.dir}/nodes`;
      await k.sh(`mkdir ${dir} && mount -t tmpfs tmpfs ${dir}`);
      const backstore = await k.configfs.create({ name: 'c0', size: SIZE, extra: ['zero_copy=1'] });
      const uio = k.configfs.uio('c0').slice('/dev/'.length);
      await k.sh(`mknod ${dir}/${uio} c $(tr : ' ' < /sys/class/uio/${uio}/dev)`);
      const proc = k.start([consumer, `${dir}/${uio}`, String(SIZE), 'memory'], { name: 'node' });
      await proc.line(/^ready /);
      await k.configfs.remove(backstore);
      await proc.wait();
      await k.sh(`umount ${dir}`);
      assert.doesNotMatch(await k.out('dmesg | tail -n 20'), /Busy inodes after unmount/);
    },
  },
  {
    name: 'access',
    about:
      'Data-Out is read-only; late touches fail in every mapping and process; short, failed and unfilled reads; KEEP_BUF and a scribbled entry do no harm',
    async run(k) {
      const { proc, disk, end } = await consume(k, 'probe');
      assert.match(proc.output, new RegExp(`^ready flags=${ZERO_COPY_FLAGS} `, 'm'));
      await initiate(k, disk);
      const lines = proc.lines.filter((line) => line.startsWith('probe '));
      assert.deepEqual(
        lines.filter((line) => !/^probe \S+ ok$/.test(line)),
        [],
      );
      const names = new Set(lines.map((line) => line.split(' ')[1]));
      for (const name of ['read-only', 'late', 'elsewhere', 'direct', 'keep', 'scribble']) {
        assert(names.has(name), `probe ${name} ran`);
      }
      const { denied = 0, nospace, cmds = 0 } = await statistics(k, 'c0');
      assert(denied > 10 && nospace === 0 && cmds >= 15, 'statistics');
      await end();
    },
  },
  {
    name: 'bidi',
    about: 'a bidirectional command has both lists in the window, Data-In scrubbed',
    async run(k) {
      await k.sh('mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null; true');
      await k.sh(`insmod ${process.env['TCMU_ZERO_COPY_BUILD']}/tcmu_bidi_test.ko`);
      const { proc, disk, end } = await consume(k, 'probe');
      for (const pages of [1, 16]) {
        const bytes = pages * 4096;
        const blocks = (bytes / 512).toString(16).padStart(4, '0').replace(/../, '$& ');
        await k.sh(`head -c ${bytes} /dev/urandom > ${k.dir}/out`);
        const command = `53 00 00 00 00 00 00 ${blocks} 00`;
        await k.sh(`${timeout(30)} sg_raw -s ${bytes} -i ${k.dir}/out ${disk} ${command}`);
        await k.sh(
          `perl -e 'local $/; open F, "${k.dir}/out"; print ~<F>' | cmp - /sys/kernel/debug/tcmu_bidi_test/data_in`,
        );
      }
      assert.deepEqual(
        proc.lines.filter((line) => line.startsWith('probe ')),
        ['probe bidi ok', 'probe bidi ok'],
      );
      await end();
      await k.sh('rmmod tcmu_bidi_test');
    },
  },
  {
    name: 'fidelity',
    about:
      "bidirectional commands on the kernel's own module are what the simulated kernel makes of them",
    async run(k) {
      const build = process.env['TCMU_ZERO_COPY_BUILD'];
      await k.sh('mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null; true');
      await k.sh('rmmod target_core_user && modprobe target_core_user');
      await k.sh(`insmod ${build}/tcmu_bidi_test.ko`);
      try {
        await compareWithFixture(k, 'bidirectional');
      } finally {
        await k.sh('rmmod tcmu_bidi_test target_core_user');
        await k.sh(`insmod ${build}/target_core_user.ko`);
      }
    },
  },
  {
    name: 'window',
    about: 'a 4 MiB window driven full: what finds no room is copied, nothing waits, all verifies',
    async run(k) {
      const { disk, end } = await consume(k, 'memory', ['zero_copy=1', 'zc_area_mb=4']);
      await k.sh(`echo 1024 > /sys/block/${disk.slice('/dev/'.length)}/queue/max_sectors_kb`);
      await verified(k, disk, { bs: '1M', size: '24M', iodepth: 16 });
      const { cmds = 0, copied = 0, nospace = 0 } = await statistics(k, 'c0');
      assert(cmds > 10 && nospace > 0 && copied >= nospace, 'commands of all kinds');
      await end();
    },
  },
  {
    name: 'successor',
    about: 'a handler killed with pages mapped: a new one finds them and the I/O goes on',
    async run(k) {
      const { proc, disk, end } = await consume(k, 'hold');
      await k.sh(`head -c 1048576 /dev/urandom > ${k.dir}/data`);
      const dd = k.start(
        ['dd', `if=${k.dir}/data`, `of=${disk}`, 'bs=1M', 'seek=20', 'oflag=direct'],
        { name: 'dd' },
      );
      await proc.line(/^holding /);
      proc.kill('SIGKILL');
      await proc.wait();
      const next = await startConsumer(k, 'memory');
      assert.equal((await dd.wait()).code, 0, dd.output);
      await k.sh(
        `dd if=${disk} bs=1M skip=20 count=1 iflag=direct status=none | cmp - ${k.dir}/data`,
      );
      await end();
      await next.wait();
    },
  },
  {
    name: 'file.integrity',
    about: 'the file example: aligned and unaligned, random sizes, O_DIRECT and page cache, ext4',
    timeoutSeconds: 240,
    async run(k) {
      const { proc, disk, name, image } = await serveFile(k);
      await verified(k, disk, { name: 'aligned', bsrange: '4k-1M', blockalign: '4k', size: '24M' });
      await verified(k, disk, {
        name: 'odd',
        bsrange: '512-96k',
        blockalign: 512,
        iomem_align: 512,
        size: '4M',
      });
      await verified(k, disk, {
        name: 'cached',
        direct: 0,
        ioengine: 'sync',
        iodepth: 1,
        bsrange: '4k-128k',
        size: '8M',
        end_fsync: 1,
      });
      const { cmds = 0, copied = 0, denied } = await statistics(k, name);
      assert(cmds > 100 && copied > 0, `both ways were taken: ${cmds} ${copied}`);
      assert.equal(denied, 0, 'nothing was touched that must not be');
      await k.sh(`mkfs.ext4 -q -F ${disk}`);
      const dir = await k.mount(disk);
      await k.sh(`cp -r lib docs ${dir}/ && sync && echo 3 > /proc/sys/vm/drop_caches`);
      await k.sh(`diff -r lib ${dir}/lib && diff -r docs ${dir}/docs`);
      await k.sh(`umount ${dir} && e2fsck -fn ${disk}`);
      await proc.stop();
      await k.sh(`e2fsck -fn ${image}`);
    },
  },
  {
    name: 'file.scrub-off',
    about: 'a trusted handler: Data-In is not zeroed, and still nothing but the file is read',
    async run(k) {
      const { proc, disk, name, image } = await serveFile(k, ['--no-zero-copy-scrub']);
      await k.sh(`head -c 8388608 /dev/urandom > ${k.dir}/data && cp ${k.dir}/data ${image}.half`);
      await k.sh(`dd if=${k.dir}/data of=${disk} bs=1M oflag=direct status=none`);
      await k.sh(`cmp -n 8388608 ${disk} ${k.dir}/data && cmp -n 8388608 ${image} ${k.dir}/data`);
      assert.equal((await statistics(k, name))['scrubbed'], 0);
      await proc.stop();
    },
  },
  {
    name: 'file.direct',
    about:
      "a file opened with O_DIRECT: the initiator's own pages can't be pinned, the library copies by itself",
    async run(k) {
      await k.sh('mkfs.ext4 -q -F /dev/ram0');
      const dir = await k.mount('/dev/ram0');
      await k.sh(`truncate -s 64M ${dir}/disk.img`);
      const { proc, disk, name } = await k.serve(`${dir}/disk.img`, [
        ...['--zero-copy', 'always', '--direct', '--physical-block-size', '512'],
      ]);
      const refusals = await watchRefusals(k);
      await verified(k, disk, { bsrange: '4k-256k', blockalign: '4k', size: '8M' });
      assert.notEqual(await refusals(), 0, 'nothing was refused');
      assert(((await statistics(k, name))['cmds'] ?? 0) > 20, 'commands were not copied');
      await proc.stop();
      await k.sh(`umount ${dir}`);
    },
  },
  {
    name: 'file.kill',
    about: 'SIGKILL under load, a successor takes the device back, everything verifies',
    async run(k) {
      let { proc, disk, image } = await serveFile(k);
      const fio = startLoad(k, disk, {
        rw: 'randwrite',
        time_based: 0,
        runtime: 0,
        size: '24M',
        rate: '4m',
        verify: 'crc32c',
        verify_fatal: 1,
      });
      await sleep(3);
      proc.kill('SIGKILL');
      await proc.wait();
      assert(fio.running, `fio waits: ${fio.output}`);
      ({ proc, disk } = await k.serve(image, ['--zero-copy', 'always', '--recover']));
      assert.equal((await fio.wait(90)).code, 0, fio.output);
      await proc.stop();
    },
  },
  {
    name: 'file.reset',
    about:
      'reset_ring 1 and 2 and block_dev under load: nothing hangs, and the disk works afterwards',
    timeoutSeconds: 180,
    async run(k) {
      const { proc, disk, name } = await serveFile(k);
      const fio = startLoad(k, disk, { continue_on_error: 'all' });
      const dir = k.configfs.find(name);
      for (const level of ['1', '2', '1', '2']) {
        await sleep(1);
        await k.configfs.write(`${dir}/action/reset_ring`, level);
      }
      for (let round = 0; round < 3; round++) {
        await k.configfs.write(`${dir}/action/block_dev`, '1');
        await sleep(0.3);
        await k.configfs.write(`${dir}/action/block_dev`, '0');
        await sleep(0.3);
      }
      fio.kill('SIGINT');
      await fio.wait(60);
      await verified(k, disk, { bs: '64k', size: '4M' });
      await proc.stop();
    },
  },
  {
    name: 'file.remove',
    about: 'SIGTERM under load: the handler undoes everything, the initiator gets errors, no hang',
    async run(k) {
      const { proc, disk } = await serveFile(k);
      const fio = startLoad(k, disk);
      await sleep(3);
      await proc.stop(60);
      assert.notEqual((await fio.wait(60)).code, 0, 'the disk is gone under fio');
    },
  },
  {
    name: 'stray',
    about:
      "JavaScript stores into Data-Out: the initiator's memory is as it was, the device ends with a diagnosis that names the command; the library's own methods refuse, and nothing happens",
    async run(k) {
      const { proc, ready } = await k.program('stray', ['c0']);
      await k.sh(`head -c 65536 /dev/zero > ${k.dir}/zeros`);
      await k.sh(
        `${timeout(60)} sg_raw -s 65536 -i ${k.dir}/zeros ${ready['disk']} ${cdb('2a', 1)}`,
      );
      await proc.line(/^refused ERR_TCMU_BUFFER_READ_ONLY$/);
      const sg = k.start(
        [
          ...timeout(60).split(' '),
          'sg_raw',
          '-s',
          '65536',
          '-i',
          `${k.dir}/zeros`,
          ready['disk'] ?? '',
          ...cdb('2a', 1).split(/\s+/),
        ],
        { name: 'sg_raw' },
      );
      await proc.line(/^error ERR_TCMU_RING_MEMORY .*c0.*command id \d+ \(operation code 0x2a\)/);
      proc.kill('SIGKILL');
      await proc.wait();
      const dir = k.configfs.find('c0');
      await k.configfs.write(`${dir}/action/block_dev`, '1');
      await k.configfs.write(`${dir}/action/reset_ring`, '2');
      await k.configfs.write(`${dir}/action/block_dev`, '0');
      const next = k.start([consumer, ready['uio'] ?? '', String(SIZE), 'memory'], {
        name: 'next',
      });
      await next.line(/^ready /);
      await sg.wait(60);
      await k.sh(
        `for l in $(find /sys/kernel/config/target/loopback -type l -lname '*/c0'); do t=\${l%/lun/*}; rm $l && rmdir \${l%/*} && rmdir $t && rmdir \${t%/*}; done`,
      );
      await k.configfs.remove(dir);
      await next.wait();
    },
  },
  {
    name: 'socket',
    about: 'a handler that sends Data-Out over a socket from its pages, and fills Data-In from one',
    async run(k) {
      const { proc, ready } = await k.program('forward', ['c0']);
      const disk = ready['disk'] ?? '';
      await verified(k, disk, { bs: '4k', size: '1M' });
      await verified(k, disk, { bs: '1M', iodepth: 1, size: '4M' });
      await verified(k, disk, { bs: '256k', size: '8M' });
      const { cmds = 0, denied } = await statistics(k, 'c0');
      assert(cmds > 500, 'commands were not copied');
      assert.equal(denied, 0, 'nothing was touched that must not be');
      await proc.stop();
    },
  },
  {
    name: 'threads',
    about: 'several threads touch the pages of one command at once, on two processors',
    async run(k) {
      const { disk, end } = await consume(k, 'threads');
      await verified(k, disk, { bsrange: '4k-256k', blockalign: '4k', size: '8M' });
      const { denied, cmds = 0 } = await statistics(k, 'c0');
      assert(cmds > 20 && denied === 0, 'statistics');
      await end();
    },
  },
  {
    name: 'reset-race',
    about: 'reset_ring as fast as it goes against a handler that completes: no hang, no warning',
    async run(k) {
      const { proc, disk, name } = await serveFile(k);
      const fio = startLoad(k, disk, { bsrange: '4k-64k', continue_on_error: 'all' });
      const dir = k.configfs.find(name);
      await sleep(1);
      await k.sh(
        `for i in $(seq 60); do echo $((i % 2 + 1)) > ${dir}/action/reset_ring; cat ${dir}/attrib/zc_stats > /dev/null; done`,
        { timeoutSeconds: 90 },
      );
      assert(proc.running, 'the handler lives');
      fio.kill('SIGINT');
      await fio.wait(60);
      await verified(k, disk, { bs: '64k', size: '4M' });
      await proc.stop();
    },
  },
  {
    name: 'pressure',
    about:
      'page cache over the disk while memory is short: reclaim writes to the device and it all ends',
    timeoutSeconds: 180,
    async run(k) {
      const { disk, end } = await consume(k, 'memory');
      await k.sh(`mkfs.ext4 -q -F ${disk}`);
      const dir = await k.mount(disk);
      // All but some 200 MiB of the machine's memory is taken; there is no swap.
      const free = Number(
        await k.out("awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo"),
      );
      await k.sh(
        `mkdir -p /mnt/taken && mount -t tmpfs -o size=100% tmpfs /mnt/taken && fallocate -l ${Math.max(1, free - 200)}M /mnt/taken/all`,
      );
      for (let round = 0; round < 2; round++) {
        await k.sh(
          `head -c 25165824 /dev/zero | tr '\\0' '\\${1 + round}' > ${dir}/file && sync && echo 1 > /proc/sys/vm/drop_caches && tr -d '\\${1 + round}' < ${dir}/file | wc -c | grep -qx 0`,
          { timeoutSeconds: 120 },
        );
      }
      await k.sh('umount /mnt/taken');
      await k.sh(`umount ${dir} && e2fsck -fn ${disk}`);
      await end();
    },
  },
  {
    name: 'iscsi.suite',
    about:
      "libiscsi's tests of what moves data, on a file opened with O_DIRECT, score the same with zero copy and without",
    timeoutSeconds: 400,
    run: (k) =>
      sameScore(k, [
        ...['Read10.Simple', 'Write10.Simple', 'Write10.Async', 'Read10.BeyondEol'],
        ...[
          'CompareAndWrite.InvalidDataOutSize',
          'WriteSame16.Simple',
          'iSCSIResiduals',
          'Inquiry',
        ],
      ]),
  },
  {
    name: 'iscsi.direct-io',
    about: 'a handler in C opens its file with O_DIRECT: pages of the target core can be pinned',
    async run(k) {
      const backstore = await k.configfs.create({ name: 'c0', size: SIZE, extra: ['zero_copy=1'] });
      const proc = await startConsumer(k, 'direct');
      const target = await exportIscsi(k, backstore);
      for (const family of ['Read10.Simple', 'Write10.Simple']) {
        await k.sh(`${timeout(60)} iscsi-test-cu --dataloss --test=SCSI.${family} ${target.url}`, {
          timeoutSeconds: 70,
        });
      }
      await target.remove();
      await k.configfs.remove(backstore);
      await proc.wait();
      assert.match(proc.output, /^direct [1-9]\d* refused 0$/m);
    },
  },
  {
    name: 'iscsi.in-flight',
    about:
      "direct I/O on the pages still in flight when their command is completed, and when its handler is killed: it ends in nobody's memory",
    timeoutSeconds: 240,
    async run(k) {
      for (const [mode, load] of [
        ['careless', 'iscsi-perf -b 256 -m 8 -t 4 -i iqn.2026-01.org.example:perf'],
        ['direct', 'iscsi-perf -b 256 -m 8 -t 4 -i iqn.2026-01.org.example:perf'],
        ['direct', 'iscsi-test-cu --dataloss --test=SCSI.Write10.Simple'],
      ] as const) {
        k.step(`${mode}, ${load}`);
        // The file of the handler is a disk whose own handler holds what it gets, for as long as we like.
        const inner = await k.configfs.create({ name: 'b0', size: SIZE, extra: ['zero_copy=1'] });
        let below = await startConsumer(k, 'hold', { name: 'b0' });
        const { disk, tpg } = await k.configfs.attachLoopback(inner);
        const outer = await k.configfs.create({ name: 'c0', size: SIZE, extra: ['zero_copy=1'] });
        let proc = await startConsumer(k, mode, { path: disk });
        const target = await exportIscsi(k, outer);
        const initiator = k.start(['sh', '-c', `exec ${timeout(90)} ${load} ${target.url}`], {
          name: 'initiator',
          echo: false,
        });
        if (mode === 'careless') await proc.line(/^left behind 2$/);
        await below.line(/^holding /);
        if (mode === 'direct') {
          // It can't die before its I/O is done; its commands are gone long before that.
          proc.kill('SIGKILL');
          await k.configfs.write(`${outer}/action/block_dev`, '1');
          await k.configfs.write(`${outer}/action/reset_ring`, '1');
          assert(proc.running, 'the handler waits for its I/O');
        }
        // Whoever gets the pages now must find in them what he put there.
        await k.sh(`head -c ${64 * MIB} /dev/zero | tr '\\0' '\\125' > /mnt/others`);
        below.kill('SIGKILL');
        await below.wait();
        below = await startConsumer(k, 'memory', { name: 'b0' });
        if (mode === 'direct') {
          await proc.wait();
          proc = await startConsumer(k, mode, { path: disk });
          await k.configfs.write(`${outer}/action/block_dev`, '0');
        }
        initiator.kill('SIGTERM');
        await initiator.wait();
        if (mode === 'direct') {
          await k.sh(
            `${timeout(60)} iscsi-test-cu --dataloss --test=SCSI.Read10.Simple ${target.url}`,
            {
              timeoutSeconds: 70,
            },
          );
        }
        await target.remove();
        await k.configfs.remove(outer);
        await proc.wait();
        await assertFilled(k, '/mnt/others', 64 * MIB, '125');
        await k.sh('rm /mnt/others');
        await k.configfs.detachLoopback(tpg);
        await k.configfs.remove(inner);
        await below.wait();
      }
    },
  },
  {
    name: 'runner',
    about: 'tcmu-runner, unchanged, on such a device',
    async run(k) {
      await k.sh(`truncate -s 64M ${k.dir}/raw`);
      const backstore = await k.configfs.create({
        name: 'r0',
        size: SIZE,
        config: `qcow/${k.dir}/raw`,
        extra: ['zero_copy=1'],
      });
      await k.sh('mkdir -p /run/dbus && (pgrep dbus-daemon || dbus-daemon --system --fork)');
      const runner = k.start(['tcmu-runner'], { name: 'tcmu-runner', echo: false });
      await k.waitFor(
        'tcmu-runner to serve',
        async () =>
          (
            await k.sh(`ls -l /proc/${runner.pid}/fd | grep -q /dev/uio`, {
              anyCode: true,
              quiet: true,
            })
          ).code === 0,
      );
      const { disk, tpg } = await k.configfs.attachLoopback(backstore);
      await verified(k, disk, { bsrange: '4k-256k', blockalign: '4k', size: '16M' });
      const { cmds = 0, denied } = await statistics(k, 'r0');
      assert(cmds > 50, 'commands were not copied');
      assert.equal(denied, 0);
      await k.configfs.detachLoopback(tpg);
      // It has switched the module's netlink replies on: it has to be there for the removal.
      await k.configfs.remove(backstore);
      runner.kill('SIGTERM');
      await runner.wait();
    },
  },
];

/**
 * What to run: all, or those with one of the parts in their names. `faults`: the kernel can be made to fail. The
 * whole suite takes too long for every day: only by its name.
 */
export function choose(parts: readonly string[], faults: boolean): Scenario[] {
  // `runner` stays last: tcmu-runner leaves the module's netlink replies on, and the next device waits for them.
  const all = [...(faults ? [faultInjection] : []), ...scenarios];
  return [
    ...all.filter(({ name }) => parts.length === 0 || parts.some((part) => name.includes(part))),
    ...(parts.includes(wholeSuite.name) ? [wholeSuite] : []),
  ];
}
