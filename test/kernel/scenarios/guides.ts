// SPDX-License-Identifier: Apache-2.0
/** What the guides tell people to type, typed: their shell lines are read from the guides themselves. */
import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import { transform } from 'esbuild';
import type { Kit } from '../harness/kit.js';
import { scenario } from '../harness/scenario.js';

/** The shell block of a guide that holds `part`. */
function shellBlock(guide: string, part: string): string {
  const blocks = readFileSync(guide, 'utf8').matchAll(/^```sh\n([\s\S]*?)^```/gm);
  for (const [, block = ''] of blocks) if (block.includes(part)) return block;
  throw new Error(`${guide} has no shell block with ${part}`);
}

/** The programs of a guide, without their types, as files of a project that depends on this package. */
async function programsOf(k: Kit, guide: string, names: readonly string[]): Promise<string> {
  const folder = `${k.dir}/project`;
  await k.sh(`mkdir -p ${folder}/node_modules && ln -s "$PWD" ${folder}/node_modules/tcmu`);
  writeFileSync(`${folder}/package.json`, '{ "type": "module" }');
  const blocks = [...readFileSync(guide, 'utf8').matchAll(/^```ts\n([\s\S]*?)^```/gm)];
  for (const [index, name] of names.entries()) {
    const { code } = await transform(blocks[index]?.[1] ?? '', { loader: 'ts', target: 'node20' });
    writeFileSync(`${folder}/${name}.js`, code);
  }
  return folder;
}

interface Diagnosis {
  ok: boolean;
  findings: { name: string; verdict: string; found: string; mend?: string }[];
}

export default [
  scenario({
    name: 'guides.doctor',
    about: 'npx tcmu doctor finds what a kernel with TCMU has and lacks, and what it says mends it',
    async run(k) {
      const doctor = 'node dist/cli.js doctor';
      const diagnose = async (code: number): Promise<Diagnosis> => {
        const result = await k.sh(`${doctor} --json`, { anyCode: true, quiet: true });
        assert.equal(result.code, code, result.stdout);
        return JSON.parse(result.stdout) as Diagnosis;
      };
      const finding = ({ findings }: Diagnosis, name: string) => {
        const found = findings.find((entry) => entry.name === name);
        assert.ok(found, `no finding ${name}`);
        return found;
      };
      const whole = await diagnose(0);
      for (const name of ['addon', 'module:target_core_user', 'module:tcm_loop', 'configfs'])
        assert.equal(finding(whole, name).verdict, 'ok', name);
      assert.match(await k.out(doctor), /Devices can be served here\.$/);

      k.step('a module is missing');
      await k.sh('modprobe -r tcm_loop');
      const without = finding(await diagnose(0), 'module:tcm_loop');
      assert.equal(without.verdict, 'warning');
      await k.sh(without.mend ?? '');
      assert.equal(finding(await diagnose(0), 'module:tcm_loop').verdict, 'ok');

      k.step('configfs is missing');
      await k.sh('umount /sys/kernel/config');
      const unmounted = await diagnose(1);
      assert.equal(unmounted.ok, false);
      await k.sh(finding(unmounted, 'configfs').mend ?? '');
      await diagnose(0);

      k.step('netlink is blocked');
      const parameters = '/sys/module/target_core_user/parameters';
      await k.sh(`echo 1 > ${parameters}/block_netlink`);
      const blocked = finding(await diagnose(0), 'netlink');
      await k.sh(blocked.mend ?? '');
      assert.equal(await k.out(`cat ${parameters}/block_netlink`), 'unblocked');

      k.step('a device, and a user who may not open it');
      await k.sh(`truncate -s 8M ${k.dir}/disk.img`);
      const { proc, uio } = await k.serve(`${k.dir}/disk.img`);
      const name = `device:${uio.slice('/dev/'.length)}`;
      assert.equal(finding(await diagnose(0), name).verdict, 'ok');
      const other = await k.sh(`setpriv --reuid 65534 --clear-groups ${doctor} --json`, {
        quiet: true,
      });
      const seen = JSON.parse(other.stdout) as Diagnosis;
      assert.equal(finding(seen, name).verdict, 'warning');
      assert.equal(finding(seen, 'permission').verdict, 'warning');
      await proc.stop();
    },
  }),
  scenario({
    name: 'guides.deployment',
    about:
      "the deployment guide's programs: root prepares, a user without rights serves, a crash between",
    async run(k) {
      const folder = await programsOf(k, 'docs/deployment.md', [
        'serve',
        'program',
        'handler',
        'manage',
      ]);
      const manage = async (verb: string, env: Record<string, string> = {}) =>
        k.sh(`node ${folder}/manage.js ${verb} d0`, {
          env: { STATE_DIRECTORY: `${k.dir}/state`, ...env },
        });
      const user = 65534;
      await k.sh(`mkdir -m 700 ${k.dir}/state && chown ${user} ${k.dir}/state; chmod 755 ${k.dir}`);
      const confined = ['--reuid', `${user}`, '--clear-groups', '--bounding-set', '-all'];
      const serve = async () => {
        const argv = [
          'setpriv',
          ...confined,
          '--no-new-privs',
          'node',
          `${folder}/handler.js`,
          'd0',
        ];
        const proc = k.start(argv, { name: 'handler', env: { STATE_DIRECTORY: `${k.dir}/state` } });
        await proc.line(/^serving d0$/, 30);
        return proc;
      };
      await manage('prepare');
      const first = await serve();
      await manage('attach');
      const [disk = ''] = k.disks();
      await k.sh(`mkfs.ext4 -q ${disk}`);
      const folderOfDisk = await k.mount(disk);
      await k.sh(`head -c 4M /dev/urandom > ${folderOfDisk}/a && sync ${folderOfDisk}/a`);

      k.step('mounted: it is not taken away');
      const refused = await k.sh(`node ${folder}/manage.js detach d0`, { anyCode: true });
      assert.match(refused.stderr, /ERR_TCMU_TARGET_BUSY/);

      k.step('a crash in the middle of a copy');
      first.kill('SIGKILL');
      await first.exited;
      const copy = k.sh(`cp ${folderOfDisk}/a ${folderOfDisk}/b && sync ${folderOfDisk}/b`);
      await manage('remove', { SERVICE_RESULT: 'signal' });
      await manage('prepare');
      const second = await serve();
      await manage('attach');
      await copy;
      await k.sh(`umount ${folderOfDisk} && mount ${disk} ${folderOfDisk}`);
      await k.sh(`cmp ${folderOfDisk}/a ${folderOfDisk}/b && umount ${folderOfDisk}`);

      k.step('the end');
      await manage('detach');
      await second.stop();
      await manage('remove', { SERVICE_RESULT: 'success' });
    },
  }),
  scenario({
    name: 'guides.iscsi',
    about:
      "the iSCSI guide's lines: CHAP both ways from Linux' own initiator, two paths, ALUA states",
    modules: ['iscsi_target_mod', 'iscsi_tcp'],
    timeoutSeconds: 180,
    async run(k) {
      await k.sh('ip addr add 192.0.2.1/32 dev lo; ip addr add 192.0.2.2/32 dev lo');
      const { proc, ready } = await k.program('two-paths');
      assert.equal(ready['url'], 'iscsi://192.0.2.1:3260/iqn.2026-01.org.example:d1/0');

      k.step('the initiator, as the guide has it');
      await k.sh(
        'mkdir -p /run/iscsi /run/lock/iscsi; cp -r /etc/iscsi /run/etc-iscsi; mount --bind /run/etc-iscsi /etc/iscsi; ' +
          'echo InitiatorName=iqn.2026-01.org.example:host1 > /etc/iscsi/initiatorname.iscsi',
      );
      k.start(['iscsid', '--foreground'], { name: 'iscsid' });
      const env = { CHAP_PASSWORD: 'at-least-12-chars', MUTUAL_PASSWORD: 'another-secret-of-it' };
      const lines = shellBlock('docs/iscsi.md', '--login');
      const wrong = { CHAP_PASSWORD: 'at-least-12-signs', MUTUAL_PASSWORD: env.MUTUAL_PASSWORD };
      const refused = await k.sh(`set -e\n${lines}`, { env: wrong, anyCode: true });
      assert.match(refused.stderr, /authorization failure/);
      await k.sh(`set -ex\n${lines}`, { env });
      const other = lines.replaceAll(':d1', ':d1-b').replaceAll('192.0.2.1', '192.0.2.2');
      await k.sh(`set -ex\n${other}`, { env });
      await k.waitFor('two disks', () => k.disks().length === 2);
      const [first = '', second = ''] = k.disks();
      await k.sh(`dd if=/dev/urandom of=${first} bs=1M count=8 oflag=direct status=none`);
      const sum = (disk: string) =>
        k.out(`dd if=${disk} bs=1M count=8 iflag=direct status=none | md5sum`);
      assert.equal(await sum(first), await sum(second), 'two paths to one disk');

      k.step('ALUA');
      await k.sh(`set -ex\n${shellBlock('docs/iscsi.md', 'tg_pt_gp_id')}`);
      // The first command after the change may be answered by a unit attention.
      await k.waitFor('a path that is a standby', async () => {
        const { stdout } = await k.sh(`sg_rtpg -d ${first}; sg_rtpg -d ${second}`, {
          anyCode: true,
        });
        return /access state : 0x02 \(standby\)/.test(stdout);
      });
      await k.sh('iscsiadm -m node --logoutall=all');
      await proc.stop();
    },
  }),
];
