// SPDX-License-Identifier: Apache-2.0
/**
 * What goes wrong with an image. Every error names the image, the structure and, where there is one,
 * the offset of the structure in the file.
 *
 * | code | meaning |
 * | --- | --- |
 * | `ERR_TCMU_QCOW_FORMAT` | this is no qcow image, or a structure in it can't be right |
 * | `ERR_TCMU_QCOW_UNSUPPORTED` | right, but something this package does not do; unknown feature bits |
 * | `ERR_TCMU_QCOW_CORRUPT` | met while serving: the image contradicts itself; repair it |
 * | `ERR_TCMU_QCOW_BACKING` | the backing chain can't be opened |
 * | `ERR_TCMU_QCOW_LOCKED` | another process uses the image |
 * | `ERR_TCMU_QCOW_PASSPHRASE` | it is encrypted, and the passphrase is missing or wrong |
 * | `ERR_TCMU_QCOW_READ_ONLY` | a change of an image that was opened for reading |
 * | `ERR_TCMU_QCOW_STATE` | the operation does not fit the image as it is |
 * | `ERR_TCMU_QCOW_CONTROL` | what the server of a served image answered to a request; a plain `TcmuError` |
 */
import { TcmuError, type TcmuErrorDetails } from 'tcmu';

export type QcowErrorCode = `ERR_TCMU_QCOW_${
  | 'FORMAT'
  | 'UNSUPPORTED'
  | 'CORRUPT'
  | 'BACKING'
  | 'LOCKED'
  | 'PASSPHRASE'
  | 'READ_ONLY'
  | 'STATE'}`;

export interface QcowErrorDetails extends TcmuErrorDetails {
  /** The structure of the format: `L2 table`, `header extension 0x23852875`. */
  structure?: string | undefined;
  /** Where it is in the image file, in bytes. */
  offset?: number | undefined;
}

export class QcowError extends TcmuError {
  readonly structure: string | undefined;
  readonly offset: number | undefined;

  /** @param problem what is wrong and what to do; path, structure and offset are put before it */
  constructor(code: QcowErrorCode, problem: string, details: QcowErrorDetails = {}) {
    const { path, structure, offset } = details;
    const at = offset === undefined ? '' : ` at 0x${offset.toString(16)}`;
    const where = [path, structure === undefined ? undefined : `${structure}${at}`];
    super(code, ['tcmu', ...where.filter(Boolean), problem].join(': '), details);
    this.structure = structure;
    this.offset = offset;
  }
}
