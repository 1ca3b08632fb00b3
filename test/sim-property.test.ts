// SPDX-License-Identifier: Apache-2.0
/**
 * Random commands under random faults against a model of a disk: every command is answered once, the
 * data is right, no byte of another command shows, and nothing is left in the kernel or the device.
 *
 * Commands go in rounds; within a round they run together on ranges of their own, so that the model
 * knows what each must see. Where an abort, an expiry or a reset came between, a write may or may not
 * have happened, block by block, and the model takes either.
 */
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { Device } from '../lib/device/device.js';
import { BlockDevice } from '../lib/scsi/block-device.js';
import { sense } from '../lib/scsi/sense.js';
import { type CommandResult, SimulatedDevice } from '../lib/sim/index.js';
import { MemoryStore } from '../lib/store/index.js';
import { cases } from './cases.js';

const BLOCK = 512;
const BLOCKS = 256;
const POISON = 0xdb;

const command = fc.record({
  kind: fc.constantFrom('read', 'write', 'unmap', 'writeSame', 'garbage'),
  blocks: fc.oneof(fc.integer({ min: 0, max: 40 }), fc.constantFrom(8, 16, 40)),
  fate: fc.constantFrom('run', 'run', 'run', 'run', 'abort', 'expire', 'fail'),
  pause: fc.integer({ min: 0, max: 4 }),
});
const round = fc.record({
  commands: fc.array(command, { minLength: 1, maxLength: 12 }),
  between: fc.constantFrom(
    'nothing',
    'nothing',
    'nothing',
    'lunReset',
    'resetRing',
    'reopen',
    'reclaim',
  ),
});
const scenario = fc.record({
  seed: fc.integer({ min: 1, max: 2 ** 31 }),
  ringPages: fc.constantFrom(1, 2, 16),
  dataPages: fc.constantFrom(8, 16, 256),
  pagesPerBlock: fc.constantFrom(1, 2, 5),
  concurrency: fc.constantFrom(1, 3, 64),
  zeroCopy: fc.constantFrom(
    false,
    false,
    { windowBytes: 32 << 10, minBytes: 0 },
    { scrub: false, minBytes: 0 },
  ),
  faults: fc.record({
    holdCommand: fc.constantFrom(0, 0.2),
    lateWakeup: fc.constantFrom(0, 0.3),
    lostWakeup: fc.constantFrom(0, 0.3),
    spuriousWakeup: fc.constantFrom(0, 0.3),
  }),
  rounds: fc.array(round, { minLength: 1, maxLength: 6 }),
});

type Command = typeof command extends fc.Arbitrary<infer T> ? T : never;
type Scenario = typeof scenario extends fc.Arbitrary<infer T> ? T : never;

/** What a block may hold: one or more contents. */
type Contents = Uint8Array[];

class SlowStore extends MemoryStore {
  /** First block of commands that are to fail half-way. */
  readonly failing = new Set<number>();
  readonly pauses = new Map<number, number>();

  override read(...args: Parameters<MemoryStore['read']>): Promise<void> {
    return this.#slow(args[0], async () => {
      if (!this.failing.has(args[0])) return void (await super.read(...args));
      args[1].fill(1, 0, Math.min(100, args[1].length));
      throw sense.mediumError('read');
    });
  }
  override write(...args: Parameters<MemoryStore['write']>): Promise<void> {
    return this.#slow(args[0], async () => {
      if (this.failing.has(args[0])) throw sense.mediumError('write');
      await super.write(...args);
    });
  }

  /** At once, after a microtask, a turn of the loop, or milliseconds. */
  async #slow(position: number, work: () => Promise<void>): Promise<void> {
    const pause = this.pauses.get(position) ?? 0;
    if (pause === 2) await new Promise((resolve) => setImmediate(resolve));
    if (pause > 2) await new Promise((resolve) => setTimeout(resolve, pause));
    await work();
  }
}

async function until(condition: () => boolean, poll: () => void = () => {}): Promise<void> {
  const limit = Date.now() + 30_000;
  while (!condition()) {
    if (Date.now() > limit) throw new Error('it never came to rest');
    poll();
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
}

class Run {
  readonly #store = new SlowStore({ size: BLOCKS * BLOCK });
  readonly #kernel: SimulatedDevice;
  #device!: Device;
  readonly #model: Contents[] = Array.from({ length: BLOCKS }, () => [new Uint8Array(BLOCK)]);
  readonly #scenario: Scenario;
  #version = 0;
  answers = 0;

  constructor(scenario: Scenario) {
    this.#scenario = scenario;
    this.#kernel = new SimulatedDevice({
      ringBytes: scenario.ringPages * 4096,
      dataAreaBytes: scenario.dataPages * 4096,
      dataPagesPerBlock: scenario.pagesPerBlock,
      poison: POISON,
      zeroCopy: scenario.zeroCopy,
      commandTimeout: 0,
      queueFullTimeout: 20_000,
    });
    this.#kernel.setFaults({ seed: scenario.seed, ...scenario.faults, maxDelay: 3 });
  }

  async all(): Promise<void> {
    // A lost wake-up is made up for by the next one: here is the next one.
    const kicks = setInterval(() => this.#kernel.kick(), 2);
    try {
      await this.#open();
      for (const round of this.#scenario.rounds) await this.#round(round);
      expect(this.#device.lost).toBe(undefined);
      await this.#device.close();
      expect(this.#kernel.state()).toMatchObject({
        broken: null,
        inFlight: 0,
        waiting: 0,
        idsInUse: 0,
        blocksInUse: 0,
      });
      expect(this.#kernel.pending).toBe(0);
    } finally {
      clearInterval(kicks);
      this.#kernel.close();
    }
  }

  async #open(): Promise<void> {
    this.#device = await Device.open(this.#kernel.open(), {
      handler: new BlockDevice(this.#store, { serial: 'PROPERTY', powerOnAttention: false }),
      concurrency: this.#scenario.concurrency,
    });
  }

  async #round({ commands, between }: Scenario['rounds'][number]): Promise<void> {
    let next = 0;
    const running: Promise<void>[] = [];
    let disturbed = between === 'lunReset' || between === 'resetRing';
    this.#store.failing.clear();
    this.#store.pauses.clear();
    for (const each of commands) {
      if (next + each.blocks > BLOCKS) break;
      if (each.blocks > 0) this.#store.pauses.set(next * BLOCK, each.pause);
      if (each.blocks > 0 && each.fate === 'fail') this.#store.failing.add(next * BLOCK);
      running.push(this.#command(each, next, disturbed));
      next += each.blocks;
      disturbed ||= each.fate === 'expire';
    }
    if (between === 'lunReset') await this.#kernel.lunReset();
    if (between === 'resetRing') this.#kernel.resetRing(1);
    await Promise.all(running);
    // What was answered in the handler's place may still run: the next round must not meet it.
    await until(
      () => this.#device.inFlight === 0 && this.#kernel.state().idsInUse === 0,
      () => this.#kernel.kick(),
    );
    if (between === 'reclaim') this.#kernel.reclaim();
    if (between === 'reopen') {
      await this.#device.close();
      await this.#open();
    }
  }

  async #command(command: Command, lba: number, disturbed: boolean): Promise<void> {
    const { kind, blocks, fate } = command;
    const before = this.#model.slice(lba, lba + blocks);
    const version = ++this.#version;
    const written = Uint8Array.from(
      { length: blocks * BLOCK },
      // Never the poison, never zero.
      (_, i) => ((version * 7 + (i >> 9) * 3 + i) % 200) + 1,
    );
    const pending = this.#kernel.submit(request(kind, lba, blocks, written));
    let ended = false;
    pending.then(() => {
      expect(ended).toBe(false);
      ended = true;
    });
    if (fate === 'abort') this.#kernel.abort(pending);
    if (fate === 'expire') setTimeout(() => this.#kernel.expire(pending), command.pause);
    const result = await pending;
    this.answers++;
    expect(result.buffer.includes(POISON), `a stale byte in ${kind}`).toBe(false);

    const after = afterwards(kind, blocks, written);
    if (kind === 'read' && result.status === 0) this.#judgeRead(result, lba, before);
    if (after === undefined) {
      if (fate === 'run' && !disturbed) expect(result.status).toBe(kind === 'garbage' ? 2 : 0);
      return;
    }
    const certain = result.status === 0;
    if (fate === 'run' && !disturbed) expect(certain, `${kind} of ${blocks} at ${lba}`).toBe(true);
    for (let i = 0; i < blocks; i++) {
      const block = after.subarray(i * BLOCK, (i + 1) * BLOCK);
      this.#model[lba + i] = certain ? [block] : [...(before[i] as Contents), block];
    }
  }

  #judgeRead(result: CommandResult, lba: number, before: Contents[]): void {
    expect(result.data.length).toBe(before.length * BLOCK);
    for (let i = 0; i < before.length; i++) {
      const got = result.data.subarray(i * BLOCK, (i + 1) * BLOCK);
      const possible = before[i] as Contents;
      const matches = possible.some((content) => Buffer.compare(content, got) === 0);
      expect(matches, `block ${lba + i}`).toBe(true);
      this.#model[lba + i] = [got.slice()];
    }
  }
}

function afterwards(kind: string, blocks: number, written: Uint8Array): Uint8Array | undefined {
  if (kind === 'write') return written;
  if (kind === 'unmap') return new Uint8Array(blocks * BLOCK);
  if (kind !== 'writeSame') return undefined;
  const all = new Uint8Array(blocks * BLOCK);
  for (let i = 0; i < blocks; i++) all.set(written.subarray(0, BLOCK), i * BLOCK);
  return all;
}

function request(kind: string, lba: number, blocks: number, written: Uint8Array) {
  const cdb = Buffer.alloc(10);
  cdb.writeUInt32BE(lba, 2);
  cdb.writeUInt16BE(blocks, 7);
  switch (kind) {
    case 'read':
      cdb[0] = 0x28;
      return { cdb, dataInLength: blocks * BLOCK };
    case 'write':
      cdb[0] = 0x2a;
      return { cdb, dataOut: written };
    case 'writeSame':
      // Zero blocks would mean to the end of the disk: a command that does nothing instead.
      if (blocks === 0) return { cdb: [0, 0, 0, 0, 0, 0] };
      cdb[0] = 0x41;
      return { cdb, dataOut: written.slice(0, BLOCK) };
    case 'unmap': {
      const list = Buffer.alloc(24);
      list.writeUInt16BE(22, 0);
      list.writeUInt16BE(16, 2);
      list.writeUInt32BE(lba, 12);
      list.writeUInt32BE(blocks, 16);
      return { cdb: [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], dataOut: list };
    }
    default:
      return { cdb: [0xff, lba, blocks], dataInLength: 100 };
  }
}

test('random commands under random faults', async () => {
  await fc.assert(
    fc.asyncProperty(scenario, async (each) => {
      await new Run(each).all();
    }),
    cases(150),
  );
});
