// SPDX-License-Identifier: Apache-2.0
/**
 * `tcmu/target` on a real kernel, one part at a time; needs root in a machine of its own.
 *
 *     target.js backstore|loopback|iscsi|vhost|errors|recover|dead|netlink|stuck|overrun
 *     target.js serve NAME            a handler to be killed: serves a backstore that exists, prints `ready`
 *     target.js listen                a listener with replies to be killed: prints `ready`, `added NAME`
 *     target.js create NAME           makes a backstore that waits for its listener, prints `ready` or the error's code
 *
 * Every part ends by comparing all of LIO's configfs with what was there before it.
 */
import assert from 'node:assert/strict';
import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, lstatSync, mkdirSync, readdirSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as wait } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { Device, openUio } from 'tcmu';
import { BlockDevice } from 'tcmu/scsi';
import { MemoryStore } from 'tcmu/store';
import {
  attachIscsi,
  attachLoopback,
  attachVhost,
  type Backstore,
  type BackstoreOptions,
  createBackstore,
  createIscsiTarget,
  createLoopbackTarget,
  discover,
  exportsOf,
  listUio,
  openBackstore,
  recoverBackstore,
  rescueNetlink,
  type TargetError,
  TargetHost,
  TcmuNetlink,
  takeOver,
} from 'tcmu/target';

const MIB = 1 << 20;
const CONFIGFS = '/sys/kernel/config/target';
const IQN = 'iqn.2026-01.org.example:disk0';
const CLIENT = 'iqn.2026-01.org.example:client';
const MOUNT = '/mnt/target-test';
/** What a virtual machine monitor does to take a vhost-scsi target (linux/vhost.h), without a machine. */
const VMM = `
  open my $vhost, "+<", "/dev/vhost-scsi" or die "open: $!";
  my $memory = pack "LL", 0, 0;
  my $target = pack "la224SS", 1, $ARGV[0], 1, 0;
  ioctl $vhost, 0xAF01, 0 or die "owner: $!";
  ioctl $vhost, 0x4008AF03, $memory or die "memory: $!";
  ioctl $vhost, 0x40E8AF40, $target or die "endpoint: $!";
  $| = 1;
  print "taken\n";
  sleep 60;
`;
const self = fileURLToPath(import.meta.url);
const run = promisify(execFile);

function step(text: string): void {
  console.log(`== ${text}`);
}

/** Output of a command, or its failure. */
async function sh(command: string): Promise<string> {
  console.log(`$ ${command}`);
  const { stdout } = await run('/bin/sh', ['-c', command]);
  return stdout.trim();
}

async function failure(action: Promise<unknown>): Promise<TargetError> {
  const error = await action.then(
    () => assert.fail('it should have failed'),
    (reason: unknown) => reason as TargetError,
  );
  console.log(`   ${error.message}`);
  return error;
}

/** Everything in configfs that comes and goes: folders and links. */
function tree(folder = CONFIGFS): string[] {
  return readdirSync(folder).flatMap((name) => {
    const path = join(folder, name);
    const stat = lstatSync(path);
    if (stat.isSymbolicLink()) return [path];
    return stat.isDirectory() ? [path, ...tree(path)] : [];
  });
}

function make(name: string, more: Partial<BackstoreOptions> = {}): Promise<Backstore> {
  return createBackstore({ name, size: 64 * MIB, config: `test/${name}`, serial: name, ...more });
}

function open(
  backstore: Backstore,
  handler = new BlockDevice(new MemoryStore({ size: 64 * MIB }), { serial: backstore.name }),
): Promise<Device> {
  return Device.open(openUio(backstore.uioPath), { handler });
}

/** Writes and reads back through a disk, by other processes. */
async function use(disk: string): Promise<void> {
  const sum = (source: string): string =>
    `dd if=${source} bs=64k count=16 iflag=fullblock status=none | sha256sum`;
  await sh('dd if=/dev/urandom of=/tmp/data bs=64k count=16 status=none');
  await sh(`dd if=/tmp/data of=${disk} bs=64k oflag=direct status=none`);
  assert.equal(await sh(sum(disk)), await sh(sum('/tmp/data')));
}

/** Another role of this program. */
class Child {
  readonly lines: string[] = [];
  readonly process: ChildProcess;

  constructor(...args: string[]) {
    this.process = spawn(process.execPath, [self, ...args], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    if (this.process.stdout === null) throw new Error('no pipe');
    createInterface({ input: this.process.stdout }).on('line', (line) => {
      console.log(`   ${args.join(' ')}: ${line}`);
      this.lines.push(line);
    });
  }

  async line(start: string): Promise<string> {
    for (const end = Date.now() + 20_000; Date.now() < end; await wait(20)) {
      const line = this.lines.find((candidate) => candidate.startsWith(start));
      if (line !== undefined) return line;
    }
    throw new Error(`no line "${start}"`);
  }

  async kill(): Promise<void> {
    const gone = new Promise((resolve) => this.process.once('exit', resolve));
    this.process.kill('SIGKILL');
    await gone;
  }
}

async function backstorePart(): Promise<void> {
  step('create');
  const backstore = await make('disk0', {
    config: 'test/a,b=c d',
    maxSectors: 2047,
    dataAreaMiB: 64,
    pagesPerBlock: 2,
    ringMiB: 2,
    commandTimeout: 20,
    queueFullTimeout: 7,
    writeCache: true,
  });
  assert.deepEqual(await backstore.settings(), {
    enabled: true,
    blocked: false,
    size: 64 * MIB,
    blockSize: 512,
    maxSectors: 2040,
    config: 'test/a,b=c d',
    serial: 'disk0',
    commandTimeout: 20,
    queueFullTimeout: 7,
    dataAreaMiB: 64,
    pagesPerBlock: 2,
    ringMiB: 2,
    netlinkReply: -1,
    taskManagement: true,
    writeCache: true,
    zeroCopy: false,
  });
  assert.equal(backstore.uio?.mapSize, 66 * MIB);
  assert.deepEqual(await listUio(), [backstore.uio]);

  step('change, with nobody listening on netlink');
  await backstore.resize(128 * MIB);
  await backstore.setConfig('test/other');
  await backstore.setWriteCache(false);
  await backstore.setCommandTimeout(5);
  const { size, config, writeCache, commandTimeout } = await backstore.settings();
  assert.deepEqual([size, config, writeCache, commandTimeout], [128 * MIB, 'test/other', false, 5]);
  assert.equal((await listUio())[0]?.config, 'test/other');

  step('find again');
  const { backstores, problems } = await discover();
  assert.deepEqual(problems, []);
  assert.deepEqual(
    backstores.map((found) => [found.backstore.path, found.settings.enabled, found.luns]),
    [[backstore.path, true, []]],
  );
  const second = await make('disk1');
  assert.equal(second.hba, backstore.hba + 1);
  await second.remove();
  await (await openBackstore('disk0')).remove();
}

async function loopbackPart(): Promise<void> {
  step('a disk');
  const backstore = await make('disk0');
  const store = new MemoryStore({ size: 64 * MIB });
  const handler = new BlockDevice(store, { serial: backstore.name });
  const device = await open(backstore, handler);
  const disk = await attachLoopback(backstore);
  console.log(`   ${disk.path} ${disk.genericPath} ${disk.address}`);
  assert.equal(await disk.size(), 64 * MIB);
  assert.match(await sh(`sg_inq ${disk.genericPath}`), /Unit serial number: disk0/);
  await use(disk.path);

  step('resize and rescan');
  await store.resize(96 * MIB);
  handler.capacityChanged();
  await backstore.resize(96 * MIB);
  await disk.rescan();
  assert.equal(await disk.size(), 96 * MIB);

  step('mounted: refused, until it is not');
  mkdirSync(MOUNT, { recursive: true });
  await sh(`mkfs.ext4 -q ${disk.path} && mount ${disk.path} ${MOUNT}`);
  assert.equal((await failure(disk.detach())).code, 'ERR_TCMU_TARGET_BUSY');
  const busy = await failure(backstore.remove());
  assert.equal(busy.code, 'ERR_TCMU_TARGET_BUSY');
  assert.match(busy.message, /still attached as .*loopback.*lun_0/);
  await sh(`umount ${MOUNT}`);

  step('found by a successor');
  const found = await exportsOf(await openBackstore('disk0'));
  assert.equal(found.loopback[0]?.path, disk.path);
  await found.loopback[0]?.detach();
  assert(!existsSync(disk.path));
  await disk.detach();

  step('two LUNs of one target');
  const other = await make('disk1');
  const otherDevice = await open(other);
  const target = await createLoopbackTarget('naa.5001405000000001');
  const [one, two] = [await target.attach(backstore), await target.attach(other)];
  assert.notEqual(one.path, two.path);
  assert.equal(one.address.replace(/\d+$/, '1'), two.address);
  await Promise.all([use(one.path), sh(`dd if=${two.path} of=/dev/null bs=1M status=none`)]);
  await target.remove();

  step('a disk whose handler died while the kernel was probing it');
  const late = await make('late', { commandTimeout: 2 });
  const tpg = `${CONFIGFS}/loopback/naa.5001405000000002/tpgt_1`;
  await sh(`mkdir -p ${tpg} && printf naa.5001405000000003 > ${tpg}/nexus`);
  await sh(`mkdir ${tpg}/lun/lun_0 && ln -s ${late.path} ${tpg}/lun/lun_0/x`);
  const lateDevice = await recoverBackstore(late, (given) => open(given));
  const [lateDisk] = (await exportsOf(late)).loopback;
  assert(lateDisk !== undefined);
  await use(lateDisk.path);
  await lateDisk.detach();
  await lateDevice.close();
  await late.remove();
  // The fabric's folder is not ours: it stays.
  await sh(`rmdir ${CONFIGFS}/loopback`);

  step('no handler');
  await otherDevice.close();
  const silent = await make('disk2', { commandTimeout: 2 });
  const nobody = await failure(attachLoopback(silent));
  assert.equal(nobody.code, 'ERR_TCMU_TARGET_NO_DEVICE');
  await silent.remove();
  await other.remove();
  await device.close();
  await backstore.remove();
}

async function iscsiPart(): Promise<void> {
  const url = (credentials = '', query = ''): string =>
    `iscsi://${credentials}127.0.0.1:3260/${IQN}/0${query}`;
  const inquire = (name: string, address: string): Promise<string> =>
    sh(`timeout 20 iscsi-inq -i ${name} '${address}'`);
  const refused = (name: string, address: string): Promise<void> =>
    assert.rejects(inquire(name, address));
  const backstore = await make('disk0');
  const device = await open(backstore);

  step('anyone');
  const lun = await attachIscsi(backstore, { iqn: IQN, anyone: {} });
  assert.equal(lun.url, url());
  assert.match(await inquire(CLIENT, url()), /Peripheral Device Type:DIRECT_ACCESS/i);
  assert.equal(await sh(`timeout 20 iscsi-ls iscsi://127.0.0.1 | grep -c ${IQN}`), '1');

  step('found by a successor, removed with a session on it');
  const session = spawn('iscsi-perf', ['-i', CLIENT, '-t', '20', url()], { stdio: 'ignore' });
  await wait(1000);
  const found = await exportsOf(await openBackstore('disk0'));
  assert.equal(found.iscsi[0]?.url, url());
  await found.iscsi[0]?.target.remove();
  session.kill('SIGKILL');
  assert(!existsSync(`${CONFIGFS}/iscsi/${IQN}`));
  await lun.detach();

  step('anyone, with CHAP, read-only');
  const chap = { user: 'user', password: 'one-secret-of-16' };
  const closed = await attachIscsi(backstore, { iqn: IQN, anyone: { chap, readOnly: true } });
  await refused(CLIENT, url());
  await refused(CLIENT, url('user%wrong-secret-xxxx@'));
  await inquire(CLIENT, url('user%one-secret-of-16@'));
  await closed.detach();

  step('by name: one without CHAP, one with, one with mutual CHAP');
  const mutual = { user: 'target', password: 'another-secret-x' };
  const listed = await attachIscsi(backstore, {
    iqn: IQN,
    initiators: [
      { name: CLIENT },
      { name: `${CLIENT}2`, chap },
      { name: `${CLIENT}3`, chap: { ...chap, mutual } },
    ],
  });
  await inquire(CLIENT, url());
  await refused(`${CLIENT}4`, url());
  await refused(`${CLIENT}2`, url());
  await inquire(`${CLIENT}2`, url('user%one-secret-of-16@'));
  const theirs = '?target_user=target&target_password=';
  await inquire(`${CLIENT}3`, url('user%one-secret-of-16@', `${theirs}another-secret-x`));
  await refused(`${CLIENT}3`, url('user%one-secret-of-16@', `${theirs}some-other-secret`));
  await listed.detach();

  step('two portals, two LUNs');
  const other = await make('disk1');
  const otherDevice = await open(other);
  const target = await createIscsiTarget({
    iqn: IQN,
    portals: ['127.0.0.1', '127.0.0.1:3261'],
    initiators: [{ name: CLIENT }],
  });
  await target.attach(backstore);
  const second = await target.attach(other);
  assert.equal(second.lun, 1);
  await inquire(CLIENT, `iscsi://127.0.0.1:3261/${IQN}/1`);
  const taken = await failure(createIscsiTarget({ iqn: IQN, anyone: {} }));
  assert.equal(taken.code, 'ERR_TCMU_TARGET_NAME_TAKEN');
  await target.remove();

  step('a port that another program has');
  const web = createServer().listen(3262, '127.0.0.1');
  await once(web, 'listening');
  const port = await failure(
    createIscsiTarget({ iqn: IQN, portals: ['127.0.0.1:3262'], anyone: {} }),
  );
  assert.equal(port.code, 'ERR_TCMU_TARGET_REJECTED');
  web.close();
  for (const each of [device, otherDevice]) await each.close();
  for (const each of [backstore, other]) await each.remove();
}

async function vhostPart(): Promise<void> {
  const backstore = await make('disk0');
  const device = await open(backstore);
  const available = await sh('modprobe vhost_scsi 2>/dev/null && echo yes || echo no');
  if (available === 'no') {
    step('no vhost_scsi in this kernel');
    assert.equal((await failure(attachVhost(backstore))).code, 'ERR_TCMU_TARGET_NO_MODULE');
  } else {
    step('attach, find again, detach');
    const lun = await attachVhost(backstore);
    assert.equal((await exportsOf(backstore)).vhost[0]?.wwn, lun.wwn);
    assert.equal((await failure(backstore.remove())).code, 'ERR_TCMU_TARGET_BUSY');
    const machine = spawn('perl', ['-e', VMM, lun.wwn], { stdio: ['ignore', 'pipe', 'inherit'] });
    await once(machine.stdout, 'data');
    assert.equal((await failure(lun.detach())).code, 'ERR_TCMU_TARGET_BUSY');
    assert(
      existsSync(`${CONFIGFS}/vhost/${lun.wwn}/tpgt_1/lun/lun_0/disk0`),
      'nothing has changed',
    );
    machine.kill('SIGKILL');
    await once(machine, 'exit');
    await (await exportsOf(backstore)).vhost[0]?.detach();
    await lun.detach();
  }
  await device.close();
  await backstore.remove();
}

async function errorsPart(): Promise<void> {
  step('a name that is taken');
  const backstore = await make('disk0');
  assert.equal((await failure(make('disk0'))).code, 'ERR_TCMU_TARGET_NAME_TAKEN');
  assert.equal((await failure(make('disk0', { hba: 9 }))).code, 'ERR_TCMU_TARGET_NAME_TAKEN');
  assert.equal((await failure(make('hba_mode', { hba: 0 }))).code, 'ERR_TCMU_TARGET_NAME_TAKEN');

  step('more data area than there may be');
  const large = await failure(make('disk1', { dataAreaMiB: 4096 }));
  assert.equal(large.code, 'ERR_TCMU_TARGET_NO_EFFECT');

  step('data blocks larger than the data area');
  const blocks = await failure(make('disk1', { dataAreaMiB: 1, pagesPerBlock: 512 }));
  assert.equal(blocks.code, 'ERR_TCMU_TARGET_REJECTED');
  assert.match(blocks.message, /"data_pages_per_blk=512"/);

  step('odd names and configurations that are none');
  const odd = await make('%s %n größe', { config: `test/${'x'.repeat(250)}`, serial: 'odd' });
  assert.equal((await listUio())[1]?.name, '%s %n größe');
  assert.equal((await listUio())[1]?.config.length, 255);
  await odd.remove();
  await make('x'.repeat(255), { config: 'test', serial: 'long' }).then((longest) =>
    longest.remove(),
  );

  step('not root');
  process.seteuid?.(65534);
  try {
    const denied = await failure(make('disk1'));
    assert.equal(denied.code, 'ERR_TCMU_TARGET_PERMISSION');
    assert.match(denied.message, /as root/);
    // Reading and serving need no root.
    assert.equal((await discover()).backstores[0]?.settings.size, 64 * MIB);
  } finally {
    process.seteuid?.(0);
  }

  step('no configfs, no module');
  const nowhere = await failure(
    make('disk1', { host: new TargetHost({ configfs: '/nowhere/x' }) }),
  );
  assert.equal(nowhere.code, 'ERR_TCMU_TARGET_NO_CONFIGFS');
  await backstore.remove();
  await sh('rmmod target_core_user');
  try {
    // The kernel looks for backends once in its life only: it does not load the module again.
    const missing = await failure(make('disk1'));
    assert.equal(missing.code, 'ERR_TCMU_TARGET_NO_MODULE');
    const deaf = await failure(TcmuNetlink.open({}));
    assert.equal(deaf.code, 'ERR_TCMU_TARGET_NO_MODULE');
    assert.equal((await failure(rescueNetlink())).code, 'ERR_TCMU_TARGET_NO_MODULE');
  } finally {
    await sh('modprobe target_core_user');
  }
}

async function recoverPart(): Promise<void> {
  step('a handler is killed under I/O; its successor takes the disk back');
  const backstore = await make('disk0', { commandTimeout: 0 });
  const first = new Child('serve', 'disk0');
  await first.line('ready');
  const disk = await attachLoopback(backstore);
  await use(disk.path);
  const busy = await failure(recoverBackstore(backstore, () => {}));
  assert.equal(busy.code, 'ERR_TCMU_TARGET_BUSY');
  assert.equal((await backstore.settings()).blocked, false);
  await first.kill();
  const reading = sh(`dd if=${disk.path} of=/dev/null bs=64k count=16 iflag=direct status=none`);
  await wait(300);
  const failed = await failure(
    recoverBackstore(backstore, async () => {
      assert.equal((await backstore.settings()).blocked, true);
      throw new Error('not this time');
    }),
  );
  assert.match(failed.message, /not this time/);
  assert.equal((await backstore.settings()).blocked, false);
  const device = await recoverBackstore(backstore, (found) => open(found));
  await reading;
  await use(disk.path);

  step('every device at once: one blocked, one disabled, one foreign, one served');
  await device.close();
  await backstore.block();
  const other = await make('disk1', { config: 'other/disk1' });
  const served = await make('disk2');
  const living = await open(served);
  await sh(`mkdir -p ${CONFIGFS}/core/user_9/half`);
  await sh(
    `printf dev_config=test/half,dev_size=67108864,hw_block_size=512 > ${CONFIGFS}/core/user_9/half/control`,
  );
  const taken = await takeOver((found) => open(found), { subtype: 'test' });
  const byName = Object.fromEntries(taken.map((result) => [result.backstore.name, result]));
  assert.deepEqual(Object.keys(byName).sort(), ['disk0', 'disk2', 'half']);
  assert.equal(byName['disk2']?.error?.code, 'ERR_TCMU_TARGET_BUSY');
  await use(disk.path);
  await disk.detach();
  await living.close();
  for (const result of taken) {
    await result.value?.close();
    await result.backstore.remove();
  }
  await other.remove();
}

async function deadPart(): Promise<void> {
  step('detach by force when the handler is dead');
  const backstore = await make('disk0', { commandTimeout: 10 });
  const handler = new Child('serve', 'disk0');
  await handler.line('ready');
  const disk = await attachLoopback(backstore);
  await sh(`dd if=/dev/zero of=${disk.path} bs=64k count=16 status=none`);
  await handler.kill();
  const start = performance.now();
  await disk.detach({ force: true });
  const seconds = (performance.now() - start) / 1000;
  console.log(`   took ${seconds.toFixed(1)} s`);
  assert(seconds < 15, 'it did not wait for the handler');
  await backstore.remove();
}

async function netlinkPart(): Promise<void> {
  step('events, without replies');
  const seen: unknown[] = [];
  const listener = await TcmuNetlink.open({
    added: ({ name, config, uioPath }) => void seen.push(['added', name, config, uioPath]),
    removed: ({ name }) => void seen.push(['removed', name]),
    reconfigured: ({ name }, change) => void seen.push(['reconfigured', name, change]),
  });
  const backstore = await make('disk0');
  await backstore.resize(128 * MIB);
  await backstore.setConfig('test/x,y');
  await backstore.setWriteCache(true);
  await backstore.remove();
  await wait(200);
  assert.deepEqual(seen, [
    ['added', 'disk0', 'test/disk0', '/dev/uio0'],
    ['reconfigured', 'disk0', { size: 128 * MIB }],
    ['reconfigured', 'disk0', { config: 'test/x,y' }],
    ['reconfigured', 'disk0', { writeCache: true }],
    ['removed', 'disk0'],
  ]);
  await listener.close();

  step('with replies: the kernel waits, and is answered');
  const log: string[] = [];
  const answering = await TcmuNetlink.open(
    {
      added: async ({ name }, signal) => {
        await wait(100);
        if (name === 'denied') throw Object.assign(new Error('no'), { code: 'EROFS' });
        if (name === 'hung') await new Promise((_r, no) => signal.addEventListener('abort', no));
        log.push(name);
      },
      reconfigured: (_device, { size }) => {
        if (size === 512) throw Object.assign(new Error('too small'), { code: 'EINVAL' });
      },
      error: (error) => log.push(error.code),
    },
    { replies: true, deadline: 1000 },
  );
  const waited = await make('disk0', { waitForListener: true });
  assert.deepEqual(log, ['disk0']);
  assert.equal((await waited.settings()).netlinkReply, 1);
  assert.equal((await failure(waited.resize(512))).code, 'ERR_TCMU_TARGET_REJECTED');
  assert.equal((await waited.settings()).size, 64 * MIB);
  await waited.resize(128 * MIB);
  const denied = await failure(make('denied', { waitForListener: true }));
  assert.equal(denied.errno, 'EROFS');
  const [hung, quick] = await Promise.all([
    failure(make('hung', { waitForListener: true })),
    make('quick', { waitForListener: true }),
  ]);
  assert.equal(hung.errno, 'ETIMEDOUT');
  await make('careless').then((careless) => careless.remove());
  await quick.remove();
  await answering.close();
  // Switched off: nobody is waited for any more.
  await waited.resize(64 * MIB);
  await waited.remove();
}

async function stuckPart(): Promise<void> {
  step('a listener with replies is killed while an enable waits');
  const listener = new Child('listen');
  await listener.line('ready');
  const hanging = new Child('create', 'hang0');
  await listener.line('added hang0');
  await listener.kill();
  const host = new TargetHost({ callTimeout: 1500 });
  const stuck = await failure(make('disk1', { waitForListener: true, host }));
  assert.equal(stuck.code, 'ERR_TCMU_TARGET_STUCK');
  assert.match(stuck.message, /rescueNetlink\(\)/);
  assert.match(stuck.message, /Left as it is/);

  step('devices that never wait are not touched by it');
  const free = await make('free');
  await free.resize(128 * MIB);
  await free.remove();

  step('a successor wakes the waiting ones, and takes them');
  const added: string[] = [];
  const successor = await TcmuNetlink.open(
    { added: ({ name }) => void added.push(name), error: (error) => console.log(error.message) },
    { replies: true },
  );
  assert.deepEqual(added.sort(), ['disk1', 'hang0']);
  await hanging.line('ready');
  await (await openBackstore('hang0')).resize(128 * MIB);
  await (await openBackstore('hang0')).remove();
  const late = await openBackstore('disk1');
  assert.equal((await late.settings()).enabled, true);
  await late.remove();
  await successor.close();

  step('without a successor: the rescue');
  const again = new Child('listen');
  await again.line('ready');
  const other = new Child('create', 'hang1');
  await again.line('added hang1');
  await again.kill();
  await rescueNetlink();
  assert.equal(await other.line('ERR'), 'ERR_TCMU_TARGET_BUSY');
  // The switch is still on: close a listener to have it off.
  await (await TcmuNetlink.open({}, { replies: true })).close();
}

async function overrunPart(): Promise<void> {
  for (const replies of [false, true]) {
    step(`more events than the socket holds, ${replies ? 'with' : 'without'} replies`);
    const known = new Set<string>();
    const errors: string[] = [];
    const listener = await TcmuNetlink.open(
      {
        added: ({ name }) => void known.add(name),
        removed: ({ name }) => void known.delete(name),
        error: (error) => errors.push(error.message),
      },
      { receiveBuffer: 4096, replies },
    );
    const names = Array.from({ length: 20 }, (_, i) => `many${i}`);
    const core = `${CONFIGFS}/core`;
    const made = names
      .map(
        (name, i) =>
          `mkdir -p ${core}/user_${i}/${name} && printf dev_size=1048576,hw_block_size=512,nl_reply_supported=-1 > ${core}/user_${i}/${name}/control && printf 1 > ${core}/user_${i}/${name}/enable`,
      )
      .join(' && ');
    // Synchronously: this process reads nothing meanwhile.
    await blockLoop(made);
    await until(() => known.size === names.length);
    await blockLoop(names.map((name, i) => `rmdir ${core}/user_${i}/${name}`).join(' && '));
    await until(() => known.size === 0);
    await sh(`rmdir ${names.map((_, i) => `${core}/user_${i}`).join(' ')}`);
    const after = await make('disk0', { waitForListener: replies });
    await until(() => known.has('disk0'));
    await after.remove();
    assert.deepEqual(errors, []);
    await listener.close();
  }
}

async function blockLoop(command: string): Promise<void> {
  const { execFileSync } = await import('node:child_process');
  execFileSync('/bin/sh', ['-c', command], { stdio: 'inherit' });
}

async function until(condition: () => boolean): Promise<void> {
  for (const end = Date.now() + 20_000; !condition(); await wait(20)) {
    assert(Date.now() < end, `not within 20 s: ${condition}`);
  }
}

const PARTS: Record<string, () => Promise<void>> = {
  backstore: backstorePart,
  loopback: loopbackPart,
  iscsi: iscsiPart,
  vhost: vhostPart,
  errors: errorsPart,
  recover: recoverPart,
  dead: deadPart,
  netlink: netlinkPart,
  stuck: stuckPart,
  overrun: overrunPart,
};

const ROLES: Record<string, (name: string) => Promise<void>> = {
  async serve(name) {
    await open(await openBackstore(name));
    console.log('ready');
  },
  async listen() {
    await TcmuNetlink.open(
      {
        async added({ name }) {
          console.log(`added ${name}`);
          if (name.startsWith('hang')) await new Promise(() => {});
        },
      },
      { replies: true, deadline: 60_000 },
    );
    console.log('ready');
  },
  async create(name) {
    try {
      await make(name, { waitForListener: true });
      console.log('ready');
    } catch (error) {
      console.log((error as TargetError).code);
    }
  },
};

const [what = '', name = ''] = process.argv.slice(2);
const role = ROLES[what];
if (role !== undefined) {
  await role(name);
} else {
  const part = PARTS[what];
  if (part === undefined)
    throw new Error(`no part ${what}: one of ${Object.keys(PARTS).join(' ')}`);
  const before = tree();
  await part();
  step('nothing is left');
  assert.deepEqual(tree(), before);
  assert.deepEqual(await listUio(), []);
  console.log(`passed ${what}`);
  process.exit(0);
}
