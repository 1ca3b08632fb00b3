// SPDX-License-Identifier: Apache-2.0
/**
 * The target port groups that LIO keeps for a backstore (its `alua` folder), as REPORT TARGET PORT GROUPS wants
 * them: the kernel passes that command on. Only reads; an administrator, or LIO's explicit ALUA, sets states.
 */
import type { AccessState, PortGroup } from '../scsi/port-groups.js';
import type { Backstore } from './backstore.js';

/** Values of `alua_access_state` (kernel header: target_core_alua.h). */
const STATES: Readonly<Record<string, AccessState>> = {
  0: 'active-optimized',
  1: 'active-non-optimized',
  2: 'standby',
  3: 'unavailable',
  14: 'offline',
  15: 'transitioning',
};

const SUPPORT: readonly [attribute: string, state: AccessState][] = [
  ['active_optimized', 'active-optimized'],
  ['active_nonoptimized', 'active-non-optimized'],
  ['standby', 'standby'],
  ['unavailable', 'unavailable'],
  ['offline', 'offline'],
  ['transitioning', 'transitioning'],
];

/**
 * The groups that have a number, by that number. Kernels before 6.3 don't tell relative target port identifiers;
 * ports are counted from 1 then, over all groups in order.
 *
 * @throws TargetError
 */
export async function portGroupsOf(backstore: Backstore): Promise<PortGroup[]> {
  const { host } = backstore;
  const folder = `${backstore.path}/alua`;
  const groups: (Omit<PortGroup, 'ports'> & { members: string[] })[] = [];
  for (const name of await host.list(folder)) {
    const read = async (attribute: string) =>
      (await host.readOptional(`${folder}/${name}/${attribute}`)) ?? '';
    const id = await read('tg_pt_gp_id');
    if (!/^\d+$/.test(id)) continue;
    const supported: AccessState[] = [];
    for (const [attribute, state] of SUPPORT) {
      if ((await read(`alua_support_${attribute}`)) === '1') supported.push(state);
    }
    groups.push({
      id: Number(id),
      state: STATES[await read('alua_access_state')] ?? 'unavailable',
      preferred: (await read('preferred')) === '1',
      supported,
      members: (await read('members')).split('\n').filter((line) => line !== ''),
    });
  }
  groups.sort((a, b) => a.id - b.id);
  let next = 1;
  return Promise.all(
    groups.map(async ({ members, ...group }) => {
      const ports = members.map((member) => ({ member, fallback: next++ }));
      const told = ports.map(async ({ member, fallback }) => {
        // `iscsi/iqn…/tpgt_1/lun_0`: the port is the target portal group.
        const rtpi = await host.readOptional(host.target(member.replace(/\/[^/]*$/, ''), 'rtpi'));
        return rtpi !== undefined && /^\d+$/.test(rtpi) ? Number(rtpi) : fallback;
      });
      return { ...group, ports: [...new Set(await Promise.all(told))] };
    }),
  );
}
