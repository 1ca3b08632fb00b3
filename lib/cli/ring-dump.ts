// SPDX-License-Identifier: Apache-2.0
/**
 * Reads a ring as it lies in memory: the mailbox, and every entry between tail and head, for people who
 * debug a handler. The layout is that of <linux/target_core_user.h>.
 *
 * The uio device can't be opened twice, so a live ring is read from the memory of the process that serves
 * it, which needs the rights of a debugger and stops nobody. What moves meanwhile may look torn.
 */
import { closeSync, openSync, readFileSync, readSync } from 'node:fs';
import { ArgumentError, errnoOf } from '../errors.js';
import { decodeEntries, type RingEntry } from '../sim/ring-entries.js';

const MAILBOX_BYTES = 128;
const FLAGS = ['OUT_OF_ORDER', 'READ_LEN', 'TMR', 'KEEP_BUF', undefined, 'KEEP_BUF_PER_COMMAND'];

export interface RingDump {
  version: number;
  flags: string[];
  /** Bytes from the start of the mapping. */
  ringOffset: number;
  ringBytes: number;
  /** Where the kernel writes next, and the oldest entry that is not given back: offsets in the ring. */
  head: number;
  tail: number;
  /** What contradicts the layout; empty for a sound ring. */
  problems: string[];
  entries: RingEntry[];
}

/** @param mapping the mapping from its start on; only mailbox and ring are looked at */
export function decodeRing(mapping: Uint8Array): RingDump {
  if (mapping.length < MAILBOX_BYTES) {
    throw new ArgumentError(
      `tcmu: ${mapping.length} bytes are no ring: a mailbox alone has ${MAILBOX_BYTES}`,
    );
  }
  const view = new DataView(mapping.buffer, mapping.byteOffset, mapping.byteLength);
  const bits = view.getUint16(2, true);
  const dump: RingDump = {
    version: view.getUint16(0, true),
    flags: FLAGS.filter((name, bit) => name !== undefined && bits & (1 << bit)) as string[],
    ringOffset: view.getUint32(4, true),
    ringBytes: view.getUint32(8, true),
    head: view.getUint32(12, true),
    tail: view.getUint32(64, true),
    problems: [],
    entries: [],
  };
  const { ringOffset, ringBytes, head, tail, problems } = dump;
  if (dump.version !== 2) problems.push(`mailbox version ${dump.version}, not 2`);
  if (ringOffset < MAILBOX_BYTES || ringOffset + ringBytes > mapping.length) {
    problems.push(
      `ring at ${ringOffset}, ${ringBytes} bytes, in ${mapping.length} bytes of memory`,
    );
  }
  for (const [name, value] of [
    ['head', head],
    ['tail', tail],
  ] as const) {
    if (value >= ringBytes || value % 8 !== 0)
      problems.push(`${name} ${value} in a ring of ${ringBytes}`);
  }
  if (problems.length > 0) return dump;
  const ring = mapping.subarray(ringOffset, ringOffset + ringBytes);
  // A pad entry fills the end of the ring, so no entry goes across it.
  const parts =
    head >= tail
      ? [[tail, head]]
      : [
          [tail, ringBytes],
          [0, head],
        ];
  for (const [from, to] of parts as [number, number][]) {
    try {
      dump.entries.push(...decodeEntries(ring.subarray(from, to), from, ringBytes));
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      problems.push(`an entry between ${from} and ${to} reaches past its end`);
    }
  }
  return dump;
}

/** The start of the mapping that process `pid` has of a uio device. */
export function readRingOf(pid: number): Uint8Array {
  const maps = ofProcess(pid, 'maps', (path) => readFileSync(path, 'utf8'));
  const found =
    /^([0-9a-f]+)-([0-9a-f]+) \S+ 0+ \S+ \d+ +\/(?:dev\/uio\d+|memfd:tcmu-sim)(?: .*)?$/m.exec(
      maps,
    );
  if (found === null) throw new ArgumentError(`tcmu: process ${pid} has no uio device mapped`);
  const [start, end] = [Number(`0x${found[1]}`), Number(`0x${found[2]}`)];
  const file = ofProcess(pid, 'mem', (path) => openSync(path, 'r'));
  try {
    const mailbox = new Uint8Array(MAILBOX_BYTES);
    readSync(file, mailbox, 0, MAILBOX_BYTES, start);
    const view = new DataView(mailbox.buffer);
    const bytes = Math.min(end - start, view.getUint32(4, true) + view.getUint32(8, true));
    const mapping = new Uint8Array(Math.max(bytes, MAILBOX_BYTES));
    let done = 0;
    while (done < mapping.length) {
      const got = readSync(file, mapping, done, mapping.length - done, start + done);
      if (got === 0) break;
      done += got;
    }
    return mapping.subarray(0, done);
  } finally {
    closeSync(file);
  }
}

function ofProcess<T>(pid: number, name: string, read: (path: string) => T): T {
  try {
    return read(`/proc/${pid}/${name}`);
  } catch (error) {
    const errno = errnoOf(error);
    const hints: Record<string, string> = {
      ENOENT: 'there is no such process',
      EACCES:
        "reading another process's memory takes the rights of a debugger: run as its user, or root",
    };
    const hint = hints[errno === 'EPERM' ? 'EACCES' : (errno ?? '')] ?? String(error);
    throw new ArgumentError(`tcmu: ring of process ${pid}: ${errno ?? 'failed'}; ${hint}`);
  }
}

/** For people. */
export function describeRing(dump: RingDump): string {
  const lines = [
    `mailbox version ${dump.version}, ${dump.flags.join(' ') || 'no flags'}`,
    `ring at ${dump.ringOffset}, ${dump.ringBytes} bytes; tail ${dump.tail}, head ${dump.head}`,
    ...dump.problems.map((problem) => `PROBLEM: ${problem}`),
    ...dump.entries.map(describeEntry),
  ];
  return `${lines.join('\n')}\n`;
}

function describeEntry(entry: RingEntry): string {
  const place = `${String(entry.at).padStart(8)} +${entry.length}`;
  switch (entry.op) {
    case 'pad':
      return `${place}  pad`;
    case 'unknown':
      return `${place}  unknown operation ${entry.code}`;
    case 'task-management':
      return `${place}  task management ${entry.type}: commands ${entry.ids.join(' ') || 'none'}`;
    case 'command': {
      const cdb = Array.from(entry.cdb, (byte) => byte.toString(16).padStart(2, '0')).join(' ');
      const memory = [...entry.segments, ...entry.bidirectional]
        .map(({ offset, length }) => `${offset}+${length}`)
        .join(' ');
      return `${place}  command ${entry.id}  cdb ${cdb}${memory === '' ? '' : `  data ${memory}`}`;
    }
  }
}
