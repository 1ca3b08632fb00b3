// SPDX-License-Identifier: Apache-2.0
/**
 * A disk whose handler breaks its contract where it is told to: reading block LBA 8 n of 512 bytes does what
 * `oddities[n]` says. All else works, over a MemoryStore.
 *
 *     odd.js '{"name":"d0","size":67108864,"serve":{…},"faults":[…],"delay":5,"hangFlush":true}'
 *
 * Prints `ready …`, and a line for everything that a scenario waits for: `error CODE message`, `second CODE`,
 * `aborted n CODE`, `tmr TYPE commands=N`. SIGTERM closes.
 */
import { type Command, type CommandHandler, Status, serveHandler } from 'tcmu';
import { BlockDevice } from 'tcmu/scsi';
import { delay, type FaultRule, faults, MemoryStore } from 'tcmu/store';

interface Arguments {
  name: string;
  size: number;
  serve?: Partial<Parameters<typeof serveHandler>[1]>;
  faults?: FaultRule[];
  /** Milliseconds before each operation, so that it answers (and fails) by a promise. */
  delay?: number;
  hangFlush?: boolean;
  /** What place 11 waits for has happened already. */
  released?: boolean;
  /** Milliseconds that commands get at the end. */
  deadline?: number;
}

const options = JSON.parse(process.argv[2] ?? '{}') as Arguments;

/** MEDIUM ERROR / UNRECOVERED READ ERROR, fixed format. */
const mediumError = Uint8Array.of(0x70, 0, 3, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0);

let released = options.released ?? false;
process.on('SIGUSR2', () => {
  released = true;
});

function held(command: Command, n: number, complete: boolean): void | Promise<void> {
  return new Promise((resolve) => {
    command.signal.addEventListener('abort', () => {
      console.log(`aborted ${n} ${(command.signal.reason as { code?: string }).code}`);
      released = true;
      if (!complete) return;
      command.complete(Status.TASK_ABORTED);
      resolve();
    });
  });
}

type Oddity = (command: Command, n: number) => void | Promise<void> | undefined;

/** What is odd about the n-th place; `undefined` for an answer: nothing, let the disk do it. */
const oddities: Record<number, Oddity> = {
  1: () => {
    throw new Error('thrown by the handler');
  },
  2: () => Promise.reject(new TypeError('rejected by the handler')),
  3: (command) => {
    command.dataIn.fill(0x33);
    command.complete();
    try {
      command.complete();
    } catch (error) {
      console.log(`second ${(error as { code?: string }).code}`);
    }
  },
  4: () => Promise.resolve(),
  // Never settles by itself, whatever happens.
  5: (command, n) => held(command, n, false),
  6: (command) => command.complete(),
  7: (command) => {
    command.dataIn.slice(0, 512).fill(0x37);
    command.complete();
  },
  8: (command) => command.complete(Status.CHECK_CONDITION, mediumError),
  9: (command) => {
    command.dataIn.slice(0, 512).fill(0x39);
    command.complete(Status.CHECK_CONDITION, mediumError);
  },
  10: (command) => {
    command.dataIn.segments();
    command.complete();
  },
  // Waits until the initiator gives up, once.
  11: (command, n) => (released ? undefined : held(command, n, true)),
  // Written, but not from the start.
  12: (command) => {
    command.dataIn.slice(1024, 1536).fill(0x3c);
    command.complete();
  },
};

const memory = new MemoryStore({ size: options.size });
const faulty = options.faults === undefined ? memory : faults(memory, options.faults);
const store = options.delay === undefined ? faulty : delay(faulty, options.delay);
if (options.hangFlush === true) {
  Object.assign(store, { flush: () => new Promise<void>(() => {}), writeCache: true });
}
const disk = new BlockDevice(store, { serial: options.name });

const handler: CommandHandler<Command> = {
  open: () => disk.open(),
  close: () => disk.close(),
  handle(command) {
    const { cdb } = command;
    // READ(10), from a multiple of 8 blocks.
    if (cdb[0] === 0x28) {
      const lba = new DataView(cdb.buffer, cdb.byteOffset).getUint32(2);
      const oddity = lba % 8 === 0 ? oddities[lba / 8] : undefined;
      if (oddity !== undefined && !(lba === 88 && released)) return oddity(command, lba / 8);
    }
    return disk.handle(command);
  },
  taskManagement(tmr) {
    console.log(`tmr ${tmr.type} commands=${tmr.commands.length}`);
    disk.taskManagement(tmr);
  },
};

const served = await serveHandler(handler, {
  name: options.name,
  size: options.size,
  export: 'loopback',
  signals: false,
  ...options.serve,
});
served.device.on('error', (error) => {
  console.log(`error ${(error as { code?: string }).code} ${error.message}`);
});
process.once('SIGTERM', () => {
  const { deadline } = options;
  served.close(deadline === undefined ? {} : { deadline }).then(
    () => process.exit(0),
    (error: Error) => {
      console.log(`close ${(error as { code?: string }).code} ${error.message}`);
      process.exit(3);
    },
  );
});
console.log(`ready name=${options.name} uio=${served.uioPath} disk=${served.disk ?? ''}`);
