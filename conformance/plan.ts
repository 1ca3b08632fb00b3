// SPDX-License-Identifier: Apache-2.0
/**
 * What is run: LUNs (a backstore in a configuration) and the suites to run on each.
 *
 * An example joins by a file `conformance.json` beside its package.json, see README.md. The peers run in
 * the everyday configuration: thin, writable, 512-byte blocks, two portals.
 */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';

/** A backstore in one configuration, and what to run on it. */
export interface Lun {
  /** The example's name, or `fileio` or `tcmu-runner`. */
  readonly subject: string;
  readonly configuration: string;
  /** Shell commands that prepare what is served, in an empty directory of its own, with the server's environment. */
  readonly prepare: readonly string[];
  /** A program of test/kernel/programs that runs beside it, and its arguments. */
  readonly beside: readonly string[];
  /** Of the server. */
  readonly env: Readonly<Record<string, string>>;
  /** The server's command line; empty for what the kernel and tcmu-runner serve by themselves. */
  readonly serve: readonly string[];
  /** Suites or tests, `Read10` or `Read10.Simple`. */
  readonly tests: readonly string[];
}

export interface Plan {
  readonly luns: readonly Lun[];
  /** Seconds one suite may take; what has no verdict by then has failed. */
  readonly suiteSeconds: number;
}

/** Every suite of libiscsi 1.19 (`iscsi-test-cu --list`), with the number of its tests. */
export const suites: Readonly<Record<string, number>> = {
  CompareAndWrite: 5,
  ExtendedCopy: 6,
  GetLBAStatus: 3,
  Inquiry: 7,
  Mandatory: 1,
  ModeSense6: 5,
  NoMedia: 1,
  OrWrite: 6,
  Prefetch10: 4,
  Prefetch16: 4,
  PreventAllow: 8,
  PrinReadKeys: 2,
  PrinServiceactionRange: 1,
  PrinReportCapabilities: 1,
  ProutRegister: 1,
  ProutReserve: 13,
  ProutClear: 1,
  ProutPreempt: 1,
  Read6: 2,
  Read10: 6,
  Read12: 5,
  Read16: 5,
  ReadCapacity10: 1,
  ReadCapacity16: 4,
  ReadDefectData10: 1,
  ReadDefectData12: 1,
  ReadOnly: 1,
  ReceiveCopyResults: 2,
  ReportSupportedOpcodes: 4,
  Reserve6: 7,
  Sanitize: 11,
  StartStopUnit: 3,
  TestUnitReady: 1,
  Unmap: 3,
  Verify10: 8,
  Verify12: 8,
  Verify16: 8,
  Write10: 6,
  Write12: 5,
  Write16: 5,
  WriteAtomic16: 6,
  WriteSame10: 10,
  WriteSame16: 10,
  WriteVerify10: 6,
  WriteVerify12: 6,
  WriteVerify16: 6,
  iSCSIcmdsn: 2,
  iSCSIdatasn: 1,
  iSCSIResiduals: 10,
  iSCSITMF: 2,
  MultipathIO: 4,
};

const all = Object.keys(suites);

const words = (text: string) => text.trim().split(/\s+/);

/**
 * What differs where a physical block has eight logical ones. The suite's GetLBAStatus.UnmapSingle asks for
 * the status of the block behind the one it unmapped, and expects that of the next physical block.
 */
const emulated512 = words(
  `CompareAndWrite GetLBAStatus.Simple GetLBAStatus.BeyondEol Inquiry ReadCapacity16 Unmap WriteSame10
   WriteSame16`,
);

/** All but Sanitize.Reset, which wants to find a SANITIZE still under way after five seconds. */
const sanitize = words(
  `BlockErase BlockEraseReserved CryptoErase CryptoEraseReserved ExitFailureMode InvalidServiceAction
   Overwrite OverwriteReserved Readonly Reservations`,
).map((test) => `Sanitize.${test}`);

const aboutRemoval = words('NoMedia PreventAllow StartStopUnit');

/** The configurations of an example, and the suites that they can make a difference for. */
const configurations: Readonly<Record<string, readonly string[]>> = {
  thin: [...all.filter((suite) => suite !== 'Sanitize'), ...sanitize],
  '512e': emulated512,
  thick: words(
    `GetLBAStatus Inquiry Mandatory ReadCapacity16 ReportSupportedOpcodes Unmap WriteSame10 WriteSame16`,
  ),
  'read-only': words('Inquiry Mandatory ModeSense6 Read10 ReadOnly Sanitize.Readonly'),
  removable: [...words('Inquiry Mandatory ModeSense6'), ...aboutRemoval],
  slow: ['Sanitize.Reset'],
  '4k': all.filter(
    (suite) => !/^(Prin|Prout|PreventAllow|Reserve|Receive|Report|Sanitize|iSCSI)/.test(suite),
  ),
};

/** Left out of the shortened run: what waits, what the kernel answers by itself, all but one form of a command. */
const long =
  /^(Prin|Prout|Reserve6|Sanitize|MultipathIO|PreventAllow|iSCSI(cmdsn|datasn)|CompareAndWrite$|WriteSame10|Verify1[02]|WriteVerify1[02]|Read12|Write12)/;

/** What `npm test` runs. */
const short: Readonly<Record<string, readonly string[]>> = {
  thin: [
    ...all.filter((suite) => !long.test(suite)),
    ...sanitize.filter((test) => test !== 'Sanitize.Overwrite'),
  ],
  '512e': words('CompareAndWrite.InvalidDataOutSize WriteSame10.UnmapUnaligned'),
  'read-only': ['ReadOnly'],
  removable: aboutRemoval,
};

interface ExampleConfiguration {
  beside?: readonly string[];
  env?: Readonly<Record<string, string>>;
  prepare?: readonly string[];
  serve: readonly string[];
}

/** What `conformance.json` of an example says. */
function exampleFile(root: string, example: string): Record<string, ExampleConfiguration> {
  const file = join(root, 'examples', example, 'conformance.json');
  if (!existsSync(file)) {
    throw new Error(`examples/${example}/conformance.json does not exist: it says how to serve`);
  }
  return JSON.parse(readFileSync(file, 'utf8')) as Record<string, ExampleConfiguration>;
}

export interface PlanOptions {
  readonly root: string;
  readonly examples: readonly string[];
  readonly peers: boolean;
  readonly short: boolean;
  /** Only these configurations; default all. */
  readonly configurations?: readonly string[] | undefined;
  /** Only these suites or tests, whatever the configuration; default all that matter to it. */
  readonly tests?: readonly string[] | undefined;
  /** How often everything is run, each time on a LUN of its own; default once. */
  readonly repeat?: number | undefined;
}

export function makePlan(options: PlanOptions): Plan {
  const luns: Lun[] = [];
  const chosen = options.short ? short : configurations;
  for (const example of options.examples) {
    const known = exampleFile(options.root, example);
    for (const [configuration, tests] of Object.entries(chosen)) {
      const how = known[configuration];
      if (how === undefined || options.configurations?.includes(configuration) === false) continue;
      luns.push({
        subject: example,
        configuration,
        prepare: how.prepare ?? [],
        beside: how.beside ?? [],
        env: how.env ?? {},
        serve: [
          process.execPath,
          join(options.root, 'examples', example, 'dist/cli.js'),
          ...how.serve,
        ],
        tests: options.tests ?? tests,
      });
    }
  }
  if (options.peers) {
    for (const subject of ['fileio', 'tcmu-runner']) {
      const tests = options.tests ?? all.filter((suite) => suite !== 'Sanitize');
      const nothing = { prepare: [], beside: [], env: {}, serve: [] };
      luns.push({ subject, configuration: 'thin', ...nothing, tests });
    }
  }
  const { repeat = 1 } = options;
  return { luns: Array.from({ length: repeat }, () => luns).flat(), suiteSeconds: 120 };
}
