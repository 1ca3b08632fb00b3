// SPDX-License-Identifier: Apache-2.0
/**
 * Target port groups (SPC-5, asymmetric logical unit access): which ports lead to the logical unit and in
 * what state. Where they come from (configfs, say) is not this module's business.
 */
import type { MaybePromise } from '../device/data.js';

/** ASYMMETRIC ACCESS STATE (SPC-5, REPORT TARGET PORT GROUPS). */
export type AccessState =
  | 'active-optimized'
  | 'active-non-optimized'
  | 'standby'
  | 'unavailable'
  | 'offline'
  | 'transitioning';

export const ACCESS_STATE_CODES: Readonly<Record<AccessState, number>> = {
  'active-optimized': 0x0,
  'active-non-optimized': 0x1,
  standby: 0x2,
  unavailable: 0x3,
  offline: 0xe,
  transitioning: 0xf,
};

/** A target port group (SPC-5): ports whose paths are in the same state. */
export interface PortGroup {
  /** TARGET PORT GROUP, 0 to 65535. */
  readonly id: number;
  /** How good paths through its ports are. */
  readonly state: AccessState;
  /** Whether the target would rather be used through it (PREF). Default false. */
  readonly preferred?: boolean;
  /** States the group can be in. Default: its own. */
  readonly supported?: readonly AccessState[];
  /** RELATIVE TARGET PORT IDENTIFIERs, 1 to 65535. */
  readonly ports: readonly number[];
}

/** A change that SET TARGET PORT GROUPS asks for. */
export interface PortGroupChange {
  /** The group's `PortGroup.id`. */
  readonly id: number;
  /** The state it is to be in. */
  readonly state: AccessState;
}

/**
 * Where the target port groups of a device come from: REPORT and SET TARGET PORT GROUPS ask it
 * (SPC-5).
 */
export interface PortGroups {
  /** The groups as they are now; the first one is reported as the unit's own. */
  list(): MaybePromise<readonly PortGroup[]>;
  /** Carries out SET TARGET PORT GROUPS; without it the states can only change by themselves (implicit). */
  set?(changes: readonly PortGroupChange[]): MaybePromise<unknown>;
}

export const SINGLE_PORT_GROUP: PortGroups = {
  list: () => [{ id: 0, state: 'active-optimized', ports: [1] }],
};
