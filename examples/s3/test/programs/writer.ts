// SPDX-License-Identifier: Apache-2.0
/**
 * Opens a disk in a process of its own and writes a history to it until it fails or is killed.
 *
 *     writer.mjs '{"location": …, "connect": {…}, "disk": {…}, "history": {…}, "flushes": 0.05}'
 *
 * Prints `open` when it has the disk, `i N` before step N may be begun (some steps ahead), `f N` when a flush has succeeded that covers step N, and
 * when something fails `failed CODE`, then the outcome of further writes and flushes, `w CODE` and `f CODE` (`ok` for success), and ends.
 * What it has printed has left the process: a pipe is written synchronously.
 */
import { connect } from '../../src/client/index.js';
import { S3Disk } from '../../src/index.js';
import { carryOut, drive } from '../support/drive.js';
import type { HistoryOptions } from '../support/model.js';

export interface WriterPlan {
  location: string;
  connect: Parameters<typeof connect>[1];
  disk: Parameters<typeof S3Disk.open>[2];
  history: HistoryOptions;
  flushes?: number;
  fua?: number;
}

/** Steps that one line announces. */
const ahead = 16;

function say(text: string): void {
  process.stdout.write(`${text}\n`);
}

async function outcome(what: Promise<unknown> | undefined): Promise<string> {
  try {
    await what;
    return 'ok';
  } catch (error) {
    return reason(error);
  }
}

/** The code of what is behind the sense data that an initiator would see. */
function reason(error: unknown): string {
  const { code, cause } = error as { code?: unknown; cause?: { code?: unknown } };
  return String(cause?.code ?? code ?? error);
}

const plan = JSON.parse(process.argv[2] ?? '') as WriterPlan;
const { store, prefix } = await connect(plan.location, plan.connect);
const disk = await S3Disk.open(store, prefix, plan.disk);
say('open');
let announced = plan.history.after ?? 0;
let issued = announced;
try {
  await drive(disk, {
    ...plan,
    onIssued: (seq) => {
      issued = seq;
      if (seq > announced) {
        announced = seq + ahead - 1;
        say(`i ${announced}`);
      }
    },
    onFlushed: (seq) => say(`f ${seq}`),
  });
} catch (error) {
  say(`failed ${reason(error)}`);
  for (let more = 1; more <= 10; more++) {
    const step = { seq: issued + more, kind: 'write', first: more, count: 1 } as const;
    say(`w ${await outcome(carryOut(disk, step))}`);
    say(`f ${await outcome(Promise.resolve(disk.flush()))}`);
  }
  await store.close();
}
process.exit(0);
