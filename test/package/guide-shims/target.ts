// SPDX-License-Identifier: Apache-2.0
/** `tcmu/target` for the guides' blocks: one backstore's uio device is there, others are made, as files. */
import { writeFileSync } from 'node:fs';

export * from 'tcmu/target';

export async function listUio() {
  return [{ name: 'd0', uioPath: '/dev/uio0' }];
}

export async function openBackstore() {
  throw Object.assign(new Error('not there'), { code: 'ERR_TCMU_TARGET_NOT_FOUND' });
}

export async function createBackstore() {
  const uioPath = `${process.env['STATE_DIRECTORY']}/uio0`;
  writeFileSync(uioPath, '');
  return { uioPath };
}
