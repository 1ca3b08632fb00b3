// SPDX-License-Identifier: Apache-2.0
/**
 * The documentation page of the commands is made from the table that decodes them, so they can't disagree.
 * After a change of the table: `npx vitest run test/scsi-docs.test.ts -u`.
 */
import { expect, test } from 'vitest';
import { type CdbField, type CommandSpec, CommandTable } from '../lib/scsi/command-spec.js';
import { blockCommands } from '../lib/scsi/commands/index.js';

const INTRODUCTION = `# SCSI commands

<!-- Made from the command table (lib/scsi/commands) by test/scsi-docs.test.ts: do not edit. -->

What a \`BlockDevice\` over a \`BlockStore\` answers, by operation code. The same table decodes CDBs, refuses
what it does not name, and answers REPORT SUPPORTED OPERATION CODES. The kernel answers REPORT LUNS, RESERVE,
RELEASE and PERSISTENT RESERVE IN and OUT itself.

- **Medium**: a command that reads, writes or flushes is refused without a medium (removable devices), and
  while or after a FORMAT UNIT or SANITIZE; one that writes also on a write-protected device.
- **Needs**: the method of the store, or the option of the device, that makes the command available.
- **Fields** in parentheses choose options that are not there: any bit set in them is INVALID FIELD IN CDB. Bits
  that no field names are ignored. NACA is refused everywhere.

Options of the device that change what it answers (\`scsi\` of \`serve\`, or \`BlockDevice\`'s own):

- \`longCommands\`: the 32-byte commands. They carry the reference tags of protection information, which this
  device does not have, so initiators do without them; off by default, since libiscsi 1.19 copies the 32 bytes
  of their usage maps into 16 when it lists what a device can do.
- \`removable\`: a medium to lock and eject. A prevention of removal ends by PREVENT ALLOW, by a reset, or with the
  nexuses there were when it began: an ejection waits until the kernel has told of them, at most 10 seconds, and
  is refused when it does not.
- \`modePageStorage\`: MODE SELECT can save. \`operationStorage\`: a FORMAT UNIT or SANITIZE that the end of the process
  cuts short has failed at the next start. \`StateFile\` keeps both in a file.
- \`copyGroup\`: EXTENDED COPY to other devices of the process. \`portGroups.set\`: SET TARGET PORT GROUPS.

START STOP UNIT knows the power conditions active, idle_a to idle_c, standby_y and standby_z; a virtual disk is
accessible in all of them and leaves idle and standby with the next command that needs the medium. Stopping
writes the cache out, and keeps nobody from the medium.
`;

const hex = (value: number, digits = 2) =>
  `${value.toString(16).toUpperCase().padStart(digits, '0')}h`;

function code({ opcode, serviceAction }: CommandSpec): string {
  if (serviceAction === undefined) return hex(opcode);
  return `${hex(opcode)}/${hex(serviceAction, opcode === 0x7f ? 4 : 2)}`;
}

function place({ byte, bytes, mask }: CdbField): string {
  const last = byte + bytes - 1;
  if (bytes > 1) return `${byte}–${last}`;
  if (mask === 0xff) return `${byte}`;
  const msb = 31 - Math.clz32(mask);
  const lsb = 31 - Math.clz32(mask & -mask);
  return msb === lsb ? `${byte}.${msb}` : `${byte}.${msb}–${lsb}`;
}

function fields(specs: readonly CommandSpec[]): string {
  const told = new Map<string, { at: string; refused: boolean; byte: number; mask: number }>();
  for (const field of specs.flatMap((spec) => spec.fields)) {
    const at = place(field);
    const key = `${field.name} ${at}`;
    const known = told.get(key);
    // Where a device may have the option or not, the table has the command twice.
    const refused = (known?.refused ?? true) && field.refused === true;
    told.set(key, { at, refused, byte: field.byte, mask: field.mask });
  }
  return [...told]
    .sort(([, a], [, b]) => a.byte - b.byte || b.mask - a.mask)
    .map(([key, { refused }]) => (refused ? `(${key})` : key))
    .join(', ');
}

function page(): string {
  const rows = new Map<string, CommandSpec[]>();
  for (const spec of blockCommands) rows.set(code(spec), [...(rows.get(code(spec)) ?? []), spec]);
  const lines = [
    '| Code | Command | Standard | Medium | Needs | Fields (byte.bits) |',
    '| --- | --- | --- | --- | --- | --- |',
  ];
  for (const [key, specs] of [...rows].sort(([a], [b]) => (a < b ? -1 : 1))) {
    const [first] = specs as [CommandSpec];
    const needs = first.needs === undefined ? '' : `\`${first.needs}\``;
    const medium = first.medium === 'none' ? '' : first.medium;
    const cells = [key, first.name, first.standard, medium, needs, fields(specs)];
    lines.push(`| ${cells.join(' | ')} |`);
  }
  return `${INTRODUCTION}\n${lines.join('\n')}\n`;
}

test('docs/scsi-commands.md says what the table says', async () => {
  await expect(page()).toMatchFileSnapshot('../docs/scsi-commands.md');
});

test('whatever is not always there says what it needs', () => {
  const entries = [...new CommandTable(blockCommands).entries()];
  const twice = new Set(
    blockCommands
      .filter((spec) => blockCommands.filter((o) => code(o) === code(spec)).length > 1)
      .map(code),
  );
  for (const { spec } of entries) {
    if (spec.available === undefined || twice.has(code(spec))) continue;
    expect(spec.needs, spec.name).toBeDefined();
  }
});
