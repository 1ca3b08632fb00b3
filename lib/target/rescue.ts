// SPDX-License-Identifier: Apache-2.0
/**
 * The way out of netlink waits that nobody will ever answer: the kernel waits for a reply without any
 * time limit, and a listener killed meanwhile takes the answer with it.
 */
import type { Advice } from './explain.js';
import { localHost, type TargetHost } from './host.js';

const ADVICE: Advice = {
  ENOENT: ['NO_MODULE', 'the module is not loaded, or too old for it: modprobe target_core_user'],
};

/**
 * Fails every `enable`, resize and removal that waits for a netlink reply, with EINTR; on any device of
 * the machine, so call it when they are stuck, or when no listener is alive. The order is the only one
 * that works: block new waits, fail the present ones, let new ones in again.
 *
 * @param beforeReset runs while no new wait can begin, and may end waits by answering them
 * @throws TargetError `ERR_TCMU_TARGET_NO_MODULE`, `_PERMISSION`
 */
export async function rescueNetlink(
  host: TargetHost = localHost,
  beforeReset: () => Promise<void> = async () => {},
): Promise<void> {
  const parameters = `${host.sysfs}/module/target_core_user/parameters`;
  const set = (name: string, value: string): Promise<void> =>
    host.write(`${parameters}/${name}`, value, { advice: ADVICE });
  await set('block_netlink', '1');
  try {
    await beforeReset();
    await set('reset_netlink', '1');
  } finally {
    await set('block_netlink', '0');
  }
}
