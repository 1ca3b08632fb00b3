// SPDX-License-Identifier: Apache-2.0
/** CDBs and parameter lists of EXTENDED COPY (SPC-5), LID1 and LID4. */
import { cdb } from './scsi-fake-command.js';

export const e4 = (naa: Uint8Array, blockSize = 512) => [
  ...[0xe4, 0, 0, 0, 0x01, 0x03, 0, naa.length, ...naa],
  ...new Array(20 - naa.length).fill(0),
  ...cdb(0, [blockSize, 3]),
];

interface Segment {
  from?: number;
  to?: number;
  blocks: number;
  source: number;
  target: number;
  dc?: boolean;
}

export const segment = ({ from = 0, to = 1, blocks, source, target, dc = false }: Segment) =>
  cdb(0x02, dc ? 2 : 0, [24, 2], [from, 2], [to, 2], 0, 0, [blocks, 2], [source, 8], [target, 8]);

export function list1(
  units: number[][],
  segments: number[][],
  options: { id?: number; usage?: number } = {},
) {
  const { id = 1, usage = 0 } = options;
  const [first, second] = [units.flat(), segments.flat()];
  const lengths = cdb([first.length, 2], 0, 0, 0, 0, [second.length, 4], [0, 4]);
  return Uint8Array.from([id, usage << 3, ...lengths, ...first, ...second]);
}

export function list4(
  units: number[][],
  segments: number[][],
  options: { id?: number; immed?: boolean } = {},
) {
  const { id = 0x01020304, immed = false } = options;
  const [first, second] = [units.flat(), segments.flat()];
  const header = cdb(1, 0, [0x20, 2], ...new Array(11).fill(0), immed ? 1 : 0, 0xff, 0, 0, 0, [
    id,
    4,
  ]);
  const lengths = cdb([first.length, 2], [second.length, 2], [0, 2]);
  return Uint8Array.from([...header, ...new Array(18).fill(0), ...lengths, ...first, ...second]);
}

export const xcopy = (out: Uint8Array, action = 0) =>
  cdb(0x83, action, [0, 8], [out.length, 4], 0, 0);
