// SPDX-License-Identifier: Apache-2.0
/**
 * What a READ (10) or WRITE (10) of 4 KiB costs in the SCSI layer: from `BlockDevice.handle` to the command's
 * completion, over a store that does nothing, on one thread. Processor time, the best of several rounds, since
 * whatever else the machine does can only add to it. The bar: 1 µs a command.
 */
import type { ScsiCommand } from '../../lib/device/handler.js';
import { BlockDevice } from '../../lib/scsi/index.js';
import { type BlockStore, MemoryDataIn, MemoryDataOut } from '../../lib/store/index.js';

const BAR_NS = 1000;
const ROUNDS = 9;
const BLOCKS = 1 << 20;
const LENGTH = 4096;

const commands = Math.round(Number(process.argv[2] ?? 1) * 1e6);
if (!(commands > 0)) throw new Error('how many million commands a round? Give a number above 0');

/** Takes and gives everything at once. */
const store: BlockStore = {
  size: BLOCKS * 512,
  read() {},
  write() {},
  flush() {},
  unmap() {},
};

/** Used again and again, as the device layer does with its own. */
class Command implements ScsiCommand {
  readonly cdb: Uint8Array;
  readonly dataLength = LENGTH;
  readonly dataIn = new MemoryDataIn(new Uint8Array(LENGTH));
  readonly dataOut = new MemoryDataOut(new Uint8Array(LENGTH));
  completed = 0;
  failed = 0;

  constructor(opcode: number) {
    this.cdb = Uint8Array.of(opcode, 0, 0, 0, 0, 0, 0, 0, LENGTH / 512, 0);
  }

  get signal(): AbortSignal {
    throw new Error('a command that succeeds needs no signal');
  }

  complete(status = 0): void {
    this.completed++;
    if (status !== 0) this.failed++;
  }
}

const device = new BlockDevice(store, { serial: 'bench', powerOnAttention: false });
device.open();

/** Nanoseconds a command of one round. */
function round(command: Command): number {
  const { cdb } = command;
  const before = command.completed;
  const start = process.cpuUsage();
  for (let i = 0; i < commands; i++) {
    // Any address: what would always be the same could be kept.
    cdb[3] = i & 0x0f;
    cdb[4] = i >>> 8;
    cdb[5] = i & 0xf8;
    device.handle(command);
  }
  const { user, system } = process.cpuUsage(start);
  const ns = (user + system) * 1000;
  if (command.completed - before !== commands || command.failed > 0) {
    throw new Error(`${command.failed} commands of ${command.completed} failed`);
  }
  return ns / commands;
}

let met = true;
for (const [name, opcode] of [
  ['READ (10) 4 KiB', 0x28],
  ['WRITE (10) 4 KiB', 0x2a],
] as const) {
  const command = new Command(opcode);
  const rounds = Array.from({ length: ROUNDS }, () => round(command)).sort((a, b) => a - b);
  const [best = Number.NaN] = rounds;
  const median = rounds[Math.floor(ROUNDS / 2)] as number;
  const verdict = best <= BAR_NS ? 'met' : 'NOT met';
  met &&= best <= BAR_NS;
  console.log(
    `${name.padEnd(18)} best ${best.toFixed(0).padStart(5)} ns, median ${median.toFixed(0).padStart(5)} ns; at most ${BAR_NS} ns: ${verdict}`,
  );
}
process.exitCode = met ? 0 : 1;
