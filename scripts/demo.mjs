// SPDX-License-Identifier: Apache-2.0
/**
 * npm run demo: the file example behind a simulated kernel, used by a real client over NBD where one is
 * installed and by the package's own where not. No root, no kernel support; each step is shown and checked.
 */
import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { createHash, randomFillSync } from 'node:crypto';
import {
  createReadStream,
  mkdtempSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { projectRoot, setupOrExit } from './setup.mjs';

const started = Date.now();
setupOrExit([], undefined, { demo: true });

// After the setup: it is what builds these.
const { Device } = await import('tcmu');
const { BlockDevice } = await import('tcmu/scsi');
const { NbdClient, serveNbd, SimulatedDevice } = await import('tcmu/sim');
const { FileStore } = await import(join(projectRoot, 'examples/file/dist/index.js'));

const MiB = 1 << 20;
const directory = mkdtempSync(join(tmpdir(), 'tcmu-demo-'));
const image = join(directory, 'disk.img');
const source = join(directory, 'source');
const copy = join(directory, 'copy');
process.once('exit', () => rmSync(directory, { recursive: true, force: true }));
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => process.exit(130));

let steps = 0;
const step = (title) => console.log(`\n${++steps}. ${title}`);
const say = (text) => console.log(`   ${text}`);
const has = (program) => spawnSync('sh', ['-c', `command -v ${program}`]).status === 0;
const onDisk = () => `${((statSync(image).blocks * 512) / MiB).toFixed(0)} MiB`;
const rate = (bytes, since) => `${(bytes / MiB / ((Date.now() - since) / 1000)).toFixed(0)} MB/s`;

/** Runs a client as one would type it. */
async function client(...command) {
  say(`$ ${command.join(' ').replaceAll(directory, '$DIR')}`);
  const [program, ...args] = command;
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'pipe'] });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (text) => (output += text));
  const code = await new Promise((resolve) => child.once('close', resolve));
  assert.equal(code, 0, `${program} failed: ${output}`);
  return output;
}

async function hashOf(path) {
  const hash = createHash('sha256');
  for await (const chunk of createReadStream(path)) hash.update(chunk);
  return hash.digest('hex').slice(0, 16);
}

/** The package's own client, for the jobs of `nbdcopy`. */
async function withOwnClient(path, work) {
  say("(neither nbdcopy nor qemu-img is here: the package's own client does it)");
  const own = await NbdClient.connect({ path });
  try {
    await work(own);
  } finally {
    await own.close();
  }
}

async function serveFile(kernel) {
  const store = await FileStore.open(image, { size: 256 * MiB });
  return Device.open(kernel.open(), {
    handler: new BlockDevice(store, { vendor: 'TCMU', product: 'File', serial: 'DEMO' }),
  });
}

step('An empty image: 256 MiB long, no block allocated');
const kernel = new SimulatedDevice({ name: 'demo' });
let device = await serveFile(kernel);
say(`${image}: ${onDisk()} on disk`);

step('The file example serves it on the ring of a simulated kernel; NBD clients can use it');
const server = await serveNbd(kernel, { path: join(directory, 'nbd.sock') });
say(server.uri);
if (has('nbdinfo')) {
  const info = await client('nbdinfo', server.uri);
  for (const line of info.split('\n').filter((each) => /size:|can_(fua|trim|zero)/.test(each))) {
    say(`  ${line.trim()}`);
  }
}

step('64 MiB of random bytes, written and read back');
const bytes = new Uint8Array(64 * MiB);
randomFillSync(bytes);
writeFileSync(source, bytes);
const copied = Date.now();
if (has('nbdcopy')) {
  await client('nbdcopy', '--flush', source, server.uri);
  await client('nbdcopy', '--', server.uri, copy);
} else if (has('qemu-img')) {
  const convert = ['qemu-img', 'convert', '-f', 'raw', '-O', 'raw'];
  await client(...convert, '-n', source, server.uri);
  await client(...convert, server.uri, copy);
} else {
  await withOwnClient(server.path, async (own) => {
    for (let at = 0; at < bytes.length; at += MiB) {
      await own.write(at, bytes.subarray(at, at + MiB));
    }
    await own.flush();
    const back = Buffer.alloc(own.size);
    for (let at = 0; at < back.length; at += MiB) back.set(await own.read(at, MiB), at);
    writeFileSync(copy, back);
  });
}
truncateSync(source, 256 * MiB);
const [expected, got] = [await hashOf(source), await hashOf(copy)];
assert.equal(got, expected, 'what was read is not what was written');
say(`the copies agree, sha256 ${got}…; ${rate(320 * MiB, copied)}; ${onDisk()} on disk`);

step('Half of it is trimmed: the file gives the blocks back');
const trimmed = await NbdClient.connect({ path: server.path });
await trimmed.trim(0, 32 * MiB);
await trimmed.flush();
assert.ok((await trimmed.read(0, 4096)).every((byte) => byte === 0));
await trimmed.close();
say(`${onDisk()} on disk`);

step('The handler goes away while a client is writing, and another takes over: nothing is lost');
const writer = await NbdClient.connect({ path: server.path });
const writes = [];
for (let i = 0; i < 256; i++)
  writes.push(writer.write(i * 65536, bytes.subarray(i * 65536, (i + 1) * 65536)));
kernel.block();
await device.close();
say(`closed with ${writes.length} writes on their way`);
device = await serveFile(kernel);
kernel.unblock();
await Promise.all(writes);
const again = Buffer.from(await writer.read(0, 16 * MiB));
assert.equal(Buffer.compare(again, bytes.subarray(0, 16 * MiB)), 0, 'a write was lost');
await writer.close();
say('every write was acknowledged, and every byte is there');

step('Random 4 KiB reads and writes, 32 at a time, every byte verified');
const load = await kernel.load({
  depth: 32,
  bytes: 4096,
  blocks: (256 * MiB) / 512,
  readShare: 0.7,
  verify: true,
  duration: 3000,
});
assert.equal(load.failed + load.corrupt, 0, 'the load met errors');
const microseconds = (seconds) => `${(seconds * 1e6).toFixed(0)} µs`;
say(`${Math.round(load.commandsPerSecond).toLocaleString('en')} commands a second`);
say(`latency: median ${microseconds(load.latency.p50)}, 99 % ${microseconds(load.latency.p99)}`);

await server.close();
await device.close();
kernel.close();
console.log(`
All of it worked, in ${((Date.now() - started) / 1000).toFixed(0)} s.

What to try next
  npm run demo:kernel                 the same handler as /dev/sda of a real Linux kernel: mkfs, kill -9, fsck
  npm test                            unit tests, sanitizers, and every scenario on a real kernel
  npm run bench:ring                  how fast a handler can be, beside one in C++ and other NBD servers
  docs/simulator.md                   test a handler of your own in ten lines
  README.md                           a handler of your own in 20 lines`);
