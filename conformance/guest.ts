// SPDX-License-Identifier: Apache-2.0
/**
 * Runs inside the guest: serves each LUN of the plan over iSCSI on two portals, and runs the suites on it.
 *
 * Contract: the plan is /run/out/plan.json. For each LUN and suite a file of /run/out, named
 * `<LUN number>.<suite>.txt`, holds what the suite printed. A LUN that could not be served, or whose
 * server died, leaves `<number>.failed` with the reason. The machine is thrown away afterwards, so little
 * is undone.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { targetRoot } from '../test/kernel/harness/configfs.js';
import { Kit } from '../test/kernel/harness/kit.js';
import type { Proc } from '../test/kernel/harness/process.js';
import type { Lun, Plan } from './plan.js';
import { parseOutput } from './suite.js';

const out = '/run/out';
/** The names by which iscsi-test-cu logs in. */
const initiators = ['', '-2'].map(
  (end) => `iqn.2007-10.com.github:sahlberg:libiscsi:iscsi-test${end}`,
);

const plan = JSON.parse(readFileSync(join(out, 'plan.json'), 'utf8')) as Plan;
const kit = new Kit(join(import.meta.dirname, 'programs'), (text) =>
  console.log(`conformance: ${text}`),
);
let runner: Proc | undefined;

/** Makes the backstore; answers its configfs directory and how to end its server. */
async function makeBackstore(lun: Lun, number: number): Promise<{ path: string; server?: Proc }> {
  const dir = `${kit.dir}/${number}`;
  const name = `lun${number}`;
  await kit.sh(`mkdir -p ${dir}`);
  if (lun.subject === 'fileio') {
    const path = join(targetRoot, 'core/fileio_1', name);
    await kit.sh(`truncate -s 1G ${dir}/disk && mkdir -p ${path}`);
    await kit.configfs.write(`${path}/control`, `fd_dev_name=${dir}/disk,fd_dev_size=${1 << 30}`);
    await kit.configfs.write(`${path}/enable`, '1');
    for (const attribute of ['emulate_tpu', 'emulate_tpws']) {
      await kit.configfs.write(`${path}/attrib/${attribute}`, '1');
    }
    await kit.configfs.write(`${path}/wwn/vpd_unit_serial`, `serial-${number}`);
    return { path };
  }
  if (lun.subject === 'tcmu-runner') {
    await kit.sh(`truncate -s 1G ${dir}/disk`);
    const path = await kit.configfs.create({
      name,
      hba: 'user_9',
      config: `qcow/${dir}/disk`,
      size: 1 << 30,
    });
    await kit.configfs.write(`${path}/wwn/vpd_unit_serial`, `serial-${number}`);
    await kit.sh('mkdir -p /run/dbus && dbus-daemon --system --fork');
    runner = kit.start(['tcmu-runner'], { name: 'tcmu-runner', echo: false });
    await kit.waitFor('tcmu-runner to serve', async () =>
      (
        await kit.sh(`ls -l /proc/${runner?.pid}/fd`, { quiet: true, anyCode: true })
      ).stdout.includes('/dev/uio'),
    );
    return { path };
  }
  const [program, ...args] = lun.beside;
  const beside = program === undefined ? {} : (await kit.program(program, args)).ready;
  const known: Readonly<Record<string, string>> = { dir, name, node: process.execPath, ...beside };
  const fill = (text: string) => text.replaceAll(/\{(\w+)\}/g, (all, word) => known[word] ?? all);
  const env = Object.fromEntries(Object.entries(lun.env).map(([key, value]) => [key, fill(value)]));
  for (const command of lun.prepare) await kit.sh(fill(command), { env });
  const server = kit.start(lun.serve.map(fill), { name, env });
  await server.line(/^ready\b/, 60);
  return { path: kit.configfs.find(name), server };
}

/** An iSCSI target of its own for the backstore, for the suite's two initiators; answers its name. */
async function attach(backstore: string, number: number): Promise<string> {
  const iqn = `iqn.2026-01.org.example:lun${number}`;
  const tpg = join(targetRoot, 'iscsi', iqn, 'tpgt_1');
  const steps = [`mkdir -p ${tpg}/lun/lun_0`, `ln -s ${backstore} ${tpg}/lun/lun_0/store`];
  for (const portal of [3260, 3261]) steps.push(`mkdir ${tpg}/np/127.0.0.1:${portal}`);
  steps.push(`echo 0 > ${tpg}/attrib/authentication`);
  for (const initiator of initiators) {
    const acl = `${tpg}/acls/${initiator}`;
    steps.push(`mkdir -p ${acl}/lun_0`, `ln -s ${tpg}/lun/lun_0 ${acl}/lun_0/lun`);
    // A test that sits on its connection must not be logged out for not answering a ping.
    steps.push(`echo 0 > ${acl}/attrib/nopin_timeout`);
    steps.push(`echo 0 > ${acl}/lun_0/write_protect`);
  }
  steps.push(`echo 1 > ${tpg}/enable`);
  await kit.sh(`set -e; ${steps.join('; ')}`, { quiet: true });
  return iqn;
}

/** Runs one suite, or one test of it, for a limited time. */
async function runSuite(number: number, iqn: string, suite: string): Promise<void> {
  const urls = [3260, 3261].map((port) => `iscsi://127.0.0.1:${port}/${iqn}/0`);
  const both = suite.startsWith('MultipathIO') ? urls.join(' ') : urls[0];
  const options = suite.startsWith('Sanitize') ? '--dataloss --allow-sanitize' : '--dataloss';
  const base = `${out}/${number}.${suite}`;
  const started = Date.now();
  const { code } = await kit.sh(
    `timeout -k 2 ${plan.suiteSeconds} iscsi-test-cu ${options} --test=ALL.${suite} -v ${both} >${base}.txt 2>&1`,
    { anyCode: true, quiet: true, timeoutSeconds: plan.suiteSeconds + 20 },
  );
  writeFileSync(`${base}.txt`, `\nexit ${code}\n`, { flag: 'a' });
  const results = parseOutput(readFileSync(`${base}.txt`, 'utf8'), '');
  const count = (verdict: string) => results.filter((entry) => entry.verdict === verdict).length;
  console.log(
    `conformance: ${number} ${suite} ${count('passed')} ${count('failed')} ${count('skipped')} ${((Date.now() - started) / 1000).toFixed(1)} s`,
  );
}

for (const [number, lun] of plan.luns.entries()) {
  try {
    const { path, server } = await makeBackstore(lun, number);
    const iqn = await attach(path, number);
    console.log(`conformance: ${number} is ${lun.subject} ${lun.configuration}`);
    for (const suite of lun.tests) await runSuite(number, iqn, suite);
    if (server !== undefined && !server.running)
      throw new Error(`${server.name} ended: ${server.output}`);
  } catch (error) {
    writeFileSync(`${out}/${number}.failed`, (error as Error).message);
    console.log(`conformance: ${number} failed: ${(error as Error).message}`);
  }
}
kit.destroy();
process.exit(0);
