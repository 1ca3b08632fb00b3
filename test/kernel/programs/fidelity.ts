// SPDX-License-Identifier: Apache-2.0
/**
 * One of the sequences of test/fidelity on this kernel: `fidelity.js NAME`. Prints `fixture NAME JSON`.
 *
 * The initiator is sg_raw on a loopback disk. The handler reads and writes the ring through /proc/self/mem:
 * the addon maps it, nothing of the package serves it.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import {
  closeSync,
  constants,
  openSync,
  readFileSync,
  readSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Device, openUio } from 'tcmu';
import { BlockDevice } from 'tcmu/scsi';
import { MemoryStore } from 'tcmu/store';
import { TcmuNetlink } from 'tcmu/target';
import { io } from '../../../lib/io/io-queue.js';
import { native } from '../../../lib/native.js';
import { sequences } from '../../fidelity/sequences.js';
import {
  type Change,
  DATA_BYTES,
  hash,
  type Outcome,
  pattern,
  type Request,
  RING_BYTES,
  type Settings,
  senseText,
  World,
} from '../../fidelity/world.js';
import { Kit } from '../harness/kit.js';

const kit = new Kit('', (text) => console.log(`# ${text}`));
const SIZE = 64 << 20;
/** Of the module that makes XDWRITEREAD bidirectional: the Data-In of the last one. */
const BIDIRECTIONAL_IN = '/sys/kernel/debug/tcmu_bidi_test/data_in';
const ATTRIBUTES = { size: 'dev_size', config: 'dev_config', writeCache: 'emulate_write_cache' };
const STATUS: Record<string, number> = {
  Good: 0x00,
  'Check Condition': 0x02,
  Busy: 0x08,
  'Reservation Conflict': 0x18,
  'Task Set Full': 0x28,
  'Task Aborted': 0x40,
};

interface Target {
  backstore: string;
  disk: string;
  /** Of the loopback target. */
  tpg: string;
  uio: string;
}

class KernelWorld extends World {
  readonly #target: Target;
  readonly #memory = openSync('/proc/self/mem', 'r+');
  #fd!: number;
  #ring!: { close(): boolean };
  /** Where the mapping begins. */
  #start!: number;
  readonly #children = new Map<string, Promise<Outcome>>();
  readonly #abortsBefore: number;
  #number = 0;

  constructor(target: Target, abortsBefore: number) {
    super();
    this.#target = target;
    this.#abortsBefore = abortsBefore;
    this.#map();
  }

  #map(): void {
    this.#fd = openDevice(this.#target.uio);
    // Never started: it maps, and that is all.
    this.#ring = new native.Ring({
      memoryFd: this.#fd,
      eventFd: this.#fd,
      doorbellFd: this.#fd,
      mapSize: RING_BYTES + DATA_BYTES,
      batchSize: 1,
      io,
      dispatch: () => {},
      lost: () => {},
      escaped: () => {},
    });
    const line = readFileSync('/proc/self/maps', 'latin1')
      .split('\n')
      .find((each) => each.endsWith(this.#target.uio));
    this.#start = Number.parseInt(line?.split('-')[0] ?? '', 16);
  }

  protected override peek(offset: number, length: number): Uint8Array {
    const bytes = Buffer.alloc(length);
    for (let at = 0; at < length; ) {
      at += readSync(this.#memory, bytes, at, length - at, this.#start + offset + at);
    }
    return bytes;
  }
  protected override poke(offset: number, bytes: Uint8Array): void {
    for (let at = 0; at < bytes.length; ) {
      at += writeSync(this.#memory, bytes, at, bytes.length - at, this.#start + offset + at);
    }
  }
  protected override doorbell(): void {
    writeSync(this.#fd, Buffer.alloc(4));
  }

  protected override begin(label: string, request: Request): void {
    const file = `/tmp/data${this.#number++}`;
    const hex = request.cdb.map((byte) => byte.toString(16).padStart(2, '0'));
    const bidirectional = request.in !== undefined && request.out !== undefined;
    const args = ['-v', '-t', `${request.abortAfter ?? request.patience ?? 60}`];
    if (request.out !== undefined) {
      writeFileSync(file, pattern(request.out));
      args.push('-s', `${request.out}`, '-i', file);
    }
    if (request.in !== undefined && !bidirectional) {
      writeFileSync(file, '');
      args.push('-r', `${request.in}`, '-o', file);
    }
    const child = spawn('sg_raw', [...args, this.#target.disk, ...hex], {
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    const read = () => {
      if (request.in === undefined) return Buffer.alloc(0);
      return readFileSync(bidirectional ? BIDIRECTIONAL_IN : file);
    };
    this.#children.set(label, outcome(child, read));
  }
  protected override outcomeOf(label: string): Promise<Outcome> {
    return this.#children.get(label) as Promise<Outcome>;
  }
  /** Nobody outside can see what waits inside the kernel. */
  protected override async queued(): Promise<void> {
    await sleep(500);
  }
  protected override async lunReset(): Promise<void> {
    await kit.sh(`sg_reset -d ${this.#target.disk}`, { quiet: true });
  }
  /** The target core logs that it has found the command, then waits for the handler to complete it. */
  protected override async givenUp(): Promise<void> {
    await kit.waitFor('the abort', async () => (await abortsLogged()) > this.#abortsBefore);
  }
  protected override reset(level: 1 | 2): void {
    this.setBlocked(true);
    this.#action('reset_ring', `${level}`);
    this.setBlocked(false);
  }
  protected override setBlocked(blocked: boolean): void {
    this.#action('block_dev', blocked ? '1' : '0');
  }
  protected override freeKept(id: number): boolean {
    try {
      this.#action('free_kept_buf', `${id}`);
      return true;
    } catch {
      return false;
    }
  }
  protected override async reads(count: number): Promise<void> {
    await kit.sh(`dd if=${this.#target.disk} of=/dev/null bs=512 iflag=direct count=${count}`, {
      quiet: true,
    });
  }

  protected override async change({ attribute, value, accepted }: Change) {
    let announced = {};
    const listener = await TcmuNetlink.open(
      {
        reconfigured(_device, change) {
          announced = change;
          if (!accepted) throw new Error('refused');
        },
      },
      { replies: true },
    );
    const file = join(this.#target.backstore, 'attrib', ATTRIBUTES[attribute]);
    const text = typeof value === 'boolean' ? Number(value) : value;
    // In a process of its own: the kernel holds it until the listener has answered.
    const { code } = await kit.sh(`printf %s ${text} > ${file}`, { anyCode: true, quiet: true });
    await listener.close();
    return { announced, taken: code === 0 };
  }

  protected override openAgain() {
    try {
      closeSync(openDevice(this.#target.uio));
      return 'open';
    } catch (error) {
      return (error as NodeJS.ErrnoException).code === 'EBUSY' ? 'busy' : 'gone';
    }
  }
  protected override reopen(): void {
    this.#ring.close();
    this.#map();
  }

  protected override event() {
    const bytes = Buffer.alloc(4);
    try {
      readSync(this.#fd, bytes);
      return bytes.readInt32LE(0);
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code === 'EAGAIN') return undefined;
      if (code === 'EIO') return 'gone';
      throw error;
    }
  }
  protected override async removal(): Promise<void> {
    await kit.configfs.detachLoopback(this.#target.tpg);
    await kit.configfs.remove(this.#target.backstore);
  }

  #action(name: string, value: string): void {
    writeFileSync(join(this.#target.backstore, 'action', name), value);
  }
}

async function abortsLogged(): Promise<number> {
  const log = await kit.out('dmesg', { quiet: true });
  return log.split('ABORT_TASK: Found referenced').length;
}

function openDevice(uio: string): number {
  return openSync(uio, constants.O_RDWR | constants.O_NONBLOCK);
}

/** What sg_raw says of a command. */
async function outcome(child: ChildProcess, read: () => Buffer): Promise<Outcome> {
  let said = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream?.setEncoding('latin1').on('data', (text: string) => (said += text));
  }
  await new Promise((resolve) => child.once('close', resolve));
  // What it says of the status of a command that was given up is no status.
  const aborted = /^>>> transport error|: timeout$/m.test(said);
  const reported = /SCSI Status: ([A-Za-z ]+)/.exec(said)?.[1]?.trim() ?? '';
  const status = aborted ? -1 : (STATUS[reported] ?? -1);
  if (status < 0) console.log(`# sg_raw: ${said.replaceAll('\n', ' | ')}`);
  const rows = /Raw sense data[^\n]*\n((?:\s+[0-9a-f]{2}\b)+)/.exec(said)?.[1];
  const sense = rows === undefined ? undefined : Buffer.from(rows.replaceAll(/\s/g, ''), 'hex');
  // An initiator gets no data of a command that failed.
  const data = status === 0 ? read() : Buffer.alloc(0);
  return {
    status,
    sense: senseText(sense),
    bytes: data.length,
    data: data.length === 0 ? undefined : hash(data),
  };
}

/** The handler that the disk needs when it appears; everything is as new when it has gone. */
async function prepare(name: string, settings: Settings): Promise<Target> {
  const backstore = await kit.configfs.create({
    name,
    config: 'test/one',
    size: SIZE,
    extra: [
      'max_data_area_mb=1',
      'cmd_ring_size_mb=1',
      `data_pages_per_blk=${settings.dataPagesPerBlock ?? 1}`,
      'hw_max_sectors=4096',
    ],
  });
  const attribute = (key: string, value: number) =>
    writeFileSync(join(backstore, 'attrib', key), `${value}`);
  attribute('cmd_time_out', settings.commandTimeout ?? 0);
  attribute('qfull_time_out', settings.queueFullTimeout ?? -1);
  // Only now: enabling has set it to whether a listener was there.
  attribute('nl_reply_supported', 1);
  attribute('tmr_notification', settings.tmrNotification === true ? 1 : 0);
  const uio = kit.configfs.uio(name);
  const attached = await Device.open(openUio(uio), {
    handler: new BlockDevice(new MemoryStore({ size: SIZE }), { serial: 'FIDELITY' }),
  });
  const { disk, tpg } = await kit.configfs.attachLoopback(backstore);
  await kit.sh(`dd if=${disk} of=/dev/null bs=512 count=1 iflag=direct`, { quiet: true });
  await attached.close();
  for (const [file, value] of [
    ['block_dev', '1'],
    ['reset_ring', '2'],
    ['block_dev', '0'],
  ] as const) {
    writeFileSync(join(backstore, 'action', file), value);
  }
  return { backstore, disk, tpg, uio };
}

const [name = ''] = process.argv.slice(2);
const sequence = sequences[name];
if (sequence === undefined) throw new Error(`no sequence is named ${name}`);
const target = await prepare(name, sequence.settings);
const world = new KernelWorld(target, await abortsLogged());
await sequence.run(world);
console.log(`fixture ${name} ${JSON.stringify(world.notes)}`);
if (!sequence.removes) await kit.configfs.detachLoopback(target.tpg);
// The mapping goes with this process, and the device then.
process.exit(0);
