/** `tcmu/target` for the guides' blocks: one backstore's uio device is there, and whatever is asked for is done. */
export * from 'tcmu/target';

export async function listUio() {
  return [{ name: 'd0', uioPath: '/dev/uio0' }];
}

export async function openBackstore() {
  throw Object.assign(new Error('not there'), { code: 'ERR_TCMU_TARGET_NOT_FOUND' });
}

export async function createBackstore() {}
