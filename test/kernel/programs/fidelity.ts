/**
 * The sequences of test/fidelity on this kernel: `fidelity.js [name…]`. Prints `fixture NAME JSON` for each.
 *
 * The initiator is sg_raw on a loopback disk. The handler reads and writes the ring through /proc/self/mem:
 * the addon maps it, nothing of the package serves it.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { openSync, readFileSync, readSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Device, openUio } from 'tcmu';
import { BlockDevice } from 'tcmu/scsi';
import { MemoryStore } from 'tcmu/store';
import { io } from '../../../lib/io/io-queue.js';
import { native } from '../../../lib/native.js';
import { sequences } from '../../fidelity/sequences.js';
import {
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
const STATUS: Record<string, number> = {
  Good: 0x00,
  'Check Condition': 0x02,
  Busy: 0x08,
  'Reservation Conflict': 0x18,
  'Task Set Full': 0x28,
  'Task Aborted': 0x40,
};

class KernelWorld extends World {
  readonly #backstore: string;
  readonly #disk: string;
  readonly #fd: number;
  readonly #mapping: { memory: number; start: number };
  readonly #children = new Map<string, Promise<Outcome>>();
  #number = 0;

  constructor(backstore: string, disk: string, uio: string) {
    super();
    this.#backstore = backstore;
    this.#disk = disk;
    this.#fd = openSync(uio, 'r+');
    // Never started: it maps, and that is all.
    new native.Ring({
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
      .find((each) => each.endsWith(uio));
    this.#mapping = {
      memory: openSync('/proc/self/mem', 'r+'),
      start: Number.parseInt(line?.split('-')[0] ?? '', 16),
    };
  }

  protected override peek(offset: number, length: number): Uint8Array {
    const bytes = Buffer.alloc(length);
    const { memory, start } = this.#mapping;
    for (let at = 0; at < length; )
      at += readSync(memory, bytes, at, length - at, start + offset + at);
    return bytes;
  }
  protected override poke(offset: number, bytes: Uint8Array): void {
    const { memory, start } = this.#mapping;
    for (let at = 0; at < bytes.length; ) {
      at += writeSync(memory, bytes, at, bytes.length - at, start + offset + at);
    }
  }
  protected override doorbell(): void {
    writeSync(this.#fd, Buffer.alloc(4));
  }

  protected override begin(label: string, request: Request): void {
    const file = `/tmp/data${this.#number++}`;
    const hex = request.cdb.map((byte) => byte.toString(16).padStart(2, '0'));
    const args = ['-v', '-t', `${request.abortAfter ?? 60}`];
    if (request.out !== undefined) {
      writeFileSync(file, pattern(request.out));
      args.push('-s', `${request.out}`, '-i', file);
    }
    if (request.in !== undefined) {
      writeFileSync(file, '');
      args.push('-r', `${request.in}`, '-o', file);
    }
    const child = spawn('sg_raw', [...args, this.#disk, ...hex], {
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    this.#children.set(label, outcome(child, request.in === undefined ? undefined : file));
  }
  protected override outcomeOf(label: string): Promise<Outcome> {
    return this.#children.get(label) as Promise<Outcome>;
  }
  /** Nobody outside can see what waits inside the kernel. */
  protected override async queued(): Promise<void> {
    await sleep(500);
  }
  protected override async lunReset(): Promise<void> {
    await kit.sh(`sg_reset -d ${this.#disk}`, { quiet: true });
  }
  protected override reset(level: 1 | 2): void {
    this.#action('block_dev', '1');
    this.#action('reset_ring', `${level}`);
    this.#action('block_dev', '0');
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
    await kit.sh(`dd if=${this.#disk} of=/dev/null bs=512 iflag=direct count=${count}`, {
      quiet: true,
    });
  }

  #action(name: string, value: string): void {
    writeFileSync(join(this.#backstore, 'action', name), value);
  }
}

/** What sg_raw says of a command. */
async function outcome(child: ChildProcess, file: string | undefined): Promise<Outcome> {
  let said = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream?.setEncoding('latin1').on('data', (text: string) => (said += text));
  }
  await new Promise((resolve) => child.once('close', resolve));
  const status = STATUS[/SCSI Status: ([A-Za-z ]+)/.exec(said)?.[1]?.trim() ?? ''] ?? -1;
  if (status < 0) console.log(`# sg_raw: ${said.replaceAll('\n', ' | ')}`);
  const rows = /Raw sense data[^\n]*\n((?:\s+[0-9a-f]{2}\b)+)/.exec(said)?.[1];
  const sense = rows === undefined ? undefined : Buffer.from(rows.replaceAll(/\s/g, ''), 'hex');
  const data = file === undefined ? Buffer.alloc(0) : readFileSync(file);
  return {
    status,
    sense: senseText(sense),
    bytes: data.length,
    data: data.length === 0 ? undefined : hash(data),
  };
}

function serve(uio: string): Promise<Device> {
  return Device.open(openUio(uio), {
    handler: new BlockDevice(new MemoryStore({ size: SIZE }), { serial: 'FIDELITY' }),
  });
}

async function record(name: string, settings: Settings): Promise<void> {
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
  attribute('tmr_notification', settings.tmrNotification === true ? 1 : 0);
  const uio = kit.configfs.uio(name);
  const attached = await serve(uio);
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
  const world = new KernelWorld(backstore, disk, uio);
  await sequences[name]?.run(world);
  console.log(`fixture ${name} ${JSON.stringify(world.notes)}`);
  await kit.configfs.detachLoopback(tpg);
  // The mapping goes with this process, and the device then.
}

const [name = ''] = process.argv.slice(2);
await record(name, sequences[name]?.settings ?? {});
process.exit(0);
