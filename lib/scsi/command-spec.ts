// SPDX-License-Identifier: Apache-2.0
/**
 * The table that describes commands. One `CommandSpec` says how a CDB is laid out, what it needs
 * and what runs it; the same table decodes operation codes and service actions, refuses options
 * that this device does not have, and answers REPORT SUPPORTED OPERATION CODES, so they cannot
 * disagree. Immutable once built.
 */
import type { MaybePromise } from '../device/data.js';
import type { ScsiCommand } from '../device/handler.js';
import type { LogicalUnit } from './logical-unit.js';

/**
 * One field of a CDB: the bits from (`byte`, `msb`) on, `width` bits, as the standard's table draws
 * it.
 */
export interface CdbField {
  readonly name: string;
  readonly byte: number;
  /** Bytes the field takes. Only the first and last may be partly used. */
  readonly bytes: number;
  /** Bits used of the first byte. A `refused` field has one byte. */
  readonly mask: number;
  /** An option that the standard defines and this device does not have: any bit set is refused. */
  readonly refused?: boolean;
}

/** Whole bytes. */
export function bytes(name: string, byte: number, count: number): CdbField {
  return { name, byte, bytes: count, mask: 0xff };
}

/** Bits `msb` to `lsb` of one byte. */
export function bits(name: string, byte: number, msb: number, lsb = msb): CdbField {
  return { name, byte, bytes: 1, mask: (2 << msb) - (1 << lsb) };
}

/** Bits that must be zero, because the option they choose is not there (INVALID FIELD IN CDB). */
export function refused(name: string, byte: number, msb: number, lsb = msb): CdbField {
  return { ...bits(name, byte, msb, lsb), refused: true };
}

/**
 * The fields of a command on a range of blocks in one of its forms: they stand at the same bytes whatever the
 * command (SBC-4 5; the 6-byte form SBC-2 5).
 *
 * @param length of the CDB
 * @param options the command's own, before the range
 * @param blocks name of the field with the number of blocks
 */
export function rangeFields(
  length: 6 | 10 | 12 | 16,
  options: readonly CdbField[],
  blocks = 'TRANSFER LENGTH',
): readonly CdbField[] {
  const name = 'LOGICAL BLOCK ADDRESS';
  if (length === 6) {
    return [...options, { name, byte: 1, bytes: 3, mask: 0x1f }, bytes(blocks, 4, 1)];
  }
  const lba = bytes(name, 2, length === 16 ? 8 : 4);
  const group = bits('GROUP NUMBER', length === 10 ? 6 : length - 2, 5, 0);
  return length === 10
    ? [...options, lba, group, bytes(blocks, 7, 2)]
    : [...options, lba, bytes(blocks, length - 6, 4), group];
}

/** A command of the table. */
export interface CommandSpec {
  /** As the standard spells it: `READ (10)`. */
  readonly name: string;
  /**
   * The standard that defines it, in the clause of its name. (Clause numbers differ between a
   * standard's revisions; titles do not.)
   */
  readonly standard: 'SPC-5' | 'SBC-4' | 'SBC-2';
  readonly opcode: number;
  /** For operation codes with service actions: in byte 1 bits 4..0, or bytes 8..9 of a 7Fh CDB. */
  readonly serviceAction?: number;
  /** Bytes of the CDB. */
  readonly length: number;
  /** Everything between the operation code (and service action) and the CONTROL byte. */
  readonly fields: readonly CdbField[];
  /**
   * What it does to the medium. All but `none` are refused without one, and `write` is also refused
   * on a write-protected device. A failure of the store is a failure to read only for `read`.
   */
  readonly medium: 'none' | 'read' | 'write' | 'flush';
  /**
   * Runs even with a unit attention pending, and does not clear it (SAM-5, unit attention
   * conditions).
   */
  readonly ignoresAttention?: boolean;
  /** Runs also while a FORMAT UNIT or SANITIZE is under way (SBC-4 names those commands). */
  readonly whileHindered?: boolean;
  /** Ends the state that a failed FORMAT UNIT leaves; with `sanitize` also that of a failed SANITIZE. */
  readonly mendsMedium?: 'format' | 'sanitize';
  /** Whether this device has the command; default yes. */
  readonly available?: (unit: LogicalUnit) => boolean;
  /** Only moves data between medium and initiator: the device's express lane may stay open meanwhile. */
  readonly plain?: boolean;
  /** For people: the option, or method of the store, that makes it available. */
  readonly needs?: string;
  /** RECOMMENDED COMMAND TIMEOUT in seconds; default: none given. */
  readonly timeout?: number;
  /**
   * Carries the command out. Settling means GOOD; a throw is CHECK CONDITION. Must not complete the
   * command itself.
   */
  run(unit: LogicalUnit, command: ScsiCommand): MaybePromise<unknown>;
}

/** A command with what follows from its fields worked out once. */
export class CommandEntry {
  readonly spec: CommandSpec;
  readonly run: CommandSpec['run'];
  readonly length: number;
  readonly medium: CommandSpec['medium'];
  readonly ignoresAttention: boolean;
  readonly whileHindered: boolean;
  readonly mendsMedium: CommandSpec['mendsMedium'];
  readonly plain: boolean;
  /** CDB USAGE DATA: the bits that this device evaluates. */
  readonly usage: Uint8Array;
  /** Fields that must be zero: the checks of the decoder. */
  readonly refusals: readonly CdbField[];
  /** Their bits of byte 1, of CONTROL, and the bytes of any others, so that most CDBs pass at a glance. */
  readonly refusedFlags: number;
  readonly refusedControl: number;
  readonly controlByte: number;
  readonly refusesElsewhere: boolean;

  constructor(spec: CommandSpec) {
    this.spec = spec;
    this.run = spec.run;
    this.length = spec.length;
    this.medium = spec.medium;
    this.ignoresAttention = spec.ignoresAttention ?? false;
    this.whileHindered = spec.whileHindered ?? false;
    this.mendsMedium = spec.mendsMedium;
    this.plain = spec.plain ?? false;
    // SAM-5, CONTROL byte: a device server without ACA refuses NACA, bit 2 of CONTROL.
    const naca = refused('NACA', spec.opcode === 0x7f ? 1 : spec.length - 1, 2);
    this.refusals = [...spec.fields.filter((field) => field.refused), naca];
    this.controlByte = naca.byte;
    this.refusedFlags = masks(this.refusals, 1);
    this.refusedControl = masks(this.refusals, naca.byte);
    this.refusesElsewhere = this.refusals.some(({ byte }) => byte !== 1 && byte !== naca.byte);
    this.usage = new Uint8Array(spec.length);
    for (const field of spec.fields) {
      if (field.refused) continue;
      for (let i = 0; i < field.bytes; i++) {
        (this.usage[field.byte + i] as number) |= i === 0 ? field.mask : 0xff;
      }
    }
    this.usage[0] = spec.opcode;
    if (spec.serviceAction !== undefined) {
      if (spec.opcode === 0x7f) {
        this.usage[7] = spec.length - 8;
        this.usage[8] = spec.serviceAction >>> 8;
        this.usage[9] = spec.serviceAction & 0xff;
      } else {
        (this.usage[1] as number) |= spec.serviceAction;
      }
    }
  }
}

function masks(fields: readonly CdbField[], byte: number): number {
  return fields.reduce((all, field) => (field.byte === byte ? all | field.mask : all), 0);
}

/** The commands a device has, by operation code; by service action where the code has them. */
export class CommandTable {
  readonly #entries: (CommandEntry | Map<number, CommandEntry> | undefined)[] = new Array(256).fill(
    undefined,
  );

  constructor(specs: Iterable<CommandSpec>) {
    for (const spec of specs) {
      const entry = new CommandEntry(spec);
      if (spec.serviceAction === undefined) {
        this.#entries[spec.opcode] = entry;
      } else {
        let actions = this.#entries[spec.opcode];
        if (!(actions instanceof Map)) {
          actions = new Map();
          this.#entries[spec.opcode] = actions;
        }
        actions.set(spec.serviceAction, entry);
      }
    }
  }

  /** What stands at an operation code. */
  at(opcode: number): CommandEntry | ReadonlyMap<number, CommandEntry> | undefined {
    return this.#entries[opcode];
  }

  /** All commands, by operation code, then service action. */
  *entries(): Generator<CommandEntry> {
    for (const slot of this.#entries) {
      if (slot instanceof CommandEntry) yield slot;
      else if (slot !== undefined) {
        yield* [...slot.values()].sort(
          (a, b) => (a.spec.serviceAction as number) - (b.spec.serviceAction as number),
        );
      }
    }
  }
}
