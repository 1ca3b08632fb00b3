/**
 * The way out of netlink waits that nobody will ever answer: the kernel waits for a reply without any
 * time limit, and a listener killed meanwhile takes the answer with it.
 */
import type { Advice } from './explain.js';
import { localHost, type TargetHost } from './host.js';

const ADVICE: Advice = {
  ENOENT: ['NO_MODULE', 'the module is not loaded, or too old for it: modprobe target_core_user'],
};

/** Where a listener that replies fits its own work in. */
export interface RescueSteps {
  /** No new wait can begin; the present ones still can be answered. */
  blocked?(): void;
  /** The present ones have been failed too. */
  reset?(): Promise<void>;
}

/**
 * Fails every `enable`, resize and removal that waits for a netlink reply, with EINTR; on any device of
 * the machine, so call it when they are stuck, or when no listener is alive. The order is the only one
 * that works: block new waits, fail the present ones, let new ones in again.
 *
 * @throws TargetError `ERR_TCMU_TARGET_NO_MODULE`, `_PERMISSION`
 */
export async function rescueNetlink(
  host: TargetHost = localHost,
  steps: RescueSteps = {},
): Promise<void> {
  const parameters = `${host.sysfs}/module/target_core_user/parameters`;
  const set = (name: string, value: string): Promise<void> =>
    host.write(`${parameters}/${name}`, value, { advice: ADVICE });
  await set('block_netlink', '1');
  try {
    steps.blocked?.();
    await set('reset_netlink', '1');
    await steps.reset?.();
  } finally {
    await set('block_netlink', '0');
  }
}
