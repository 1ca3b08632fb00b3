// SPDX-License-Identifier: Apache-2.0
/** The one error of a codec that can't make sense of its input. */
import { QcowError } from '../errors.js';

export function damaged(problem: string, cause?: unknown): QcowError {
  return new QcowError('ERR_TCMU_QCOW_CORRUPT', problem, {
    structure: 'compressed cluster',
    cause,
  });
}
