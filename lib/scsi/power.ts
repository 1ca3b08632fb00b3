// SPDX-License-Identifier: Apache-2.0
/**
 * Power conditions (SPC-5, power conditions; SBC-4, START STOP UNIT). A virtual disk saves nothing in any of
 * them: it is told which one it is in, says so, and leaves an idle or standby condition with the next command
 * that needs the medium, as the standards want. There are no timers that enter one.
 */
import { type Sense, SenseKey, sense } from './sense.js';

/** POWER CONDITION of START STOP UNIT, with its modifier: what REQUEST SENSE calls it (ASC 5Eh). */
const CONDITIONS: ReadonlyMap<number, number | undefined> = new Map([
  [0x00, undefined], // START_VALID
  [0x10, undefined], // ACTIVE
  [0x20, 0x03], // IDLE_A
  [0x21, 0x06], // IDLE_B
  [0x22, 0x08], // IDLE_C
  [0x30, 0x04], // STANDBY_Z
  [0x31, 0x0a], // STANDBY_Y
  [0x70, undefined], // LU_CONTROL: its timers, of which there are none
  [0xa0, 0x03], // FORCE_IDLE_0
  [0xa1, 0x06], // FORCE_IDLE_1
  [0xa2, 0x08], // FORCE_IDLE_2
  [0xb0, 0x04], // FORCE_STANDBY_0
  [0xb1, 0x0a], // FORCE_STANDBY_1
]);

/** POWER CONDITION 0h: START and LOEJ say what to do. */
export const START_VALID = 0x0;

/**
 * Whether there is such a POWER CONDITION. The others are reserved or obsolete (5h, sleep) and change nothing:
 * initiators send them, libiscsi's suite among them, and expect GOOD.
 */
export function isPowerCondition(condition: number): boolean {
  return CONDITIONS.has(condition << 4);
}

/**
 * What REQUEST SENSE reports in a power condition, by POWER CONDITION and its MODIFIER; undefined for the
 * active one.
 *
 * @throws SenseError INVALID FIELD IN CDB for a modifier that the condition does not have.
 */
export function powerReport(condition: number, modifier: number): Sense | undefined {
  const code = (condition << 4) | modifier;
  if (!CONDITIONS.has(code)) throw sense.invalidFieldInCdb({ byte: 3, bit: 3 });
  const ascq = CONDITIONS.get(code);
  return ascq === undefined ? undefined : { key: SenseKey.NO_SENSE, asc: 0x5e, ascq };
}

/** Standby conditions: the medium need not be accessible in them (SBC-4, NO_FLUSH). */
export function needsFlush(condition: number): boolean {
  return condition === 0x3 || condition === 0xb;
}

/** Power Condition VPD page (SPC-5) behind its header: all conditions, left without delay (0 ms). */
export function powerConditions(): Uint8Array {
  const page = new Uint8Array(14);
  page[0] = 0x03; // STANDBY_Y, STANDBY_Z
  page[1] = 0x07; // IDLE_C, IDLE_B, IDLE_A
  return page;
}
