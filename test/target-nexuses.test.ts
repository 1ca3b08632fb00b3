// SPDX-License-Identifier: Apache-2.0
/** What configfs tells of initiators and ports. */
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { type Backstore, createBackstore } from '../lib/target/backstore.js';
import { attachIscsi } from '../lib/target/iscsi.js';
import { attachLoopback } from '../lib/target/loopback.js';
import { nexusesOf } from '../lib/target/nexuses.js';
import { portGroupsOf } from '../lib/target/port-groups.js';
import { FakeKernel } from './target-fake.js';

const IQN = 'iqn.2026-01.org.example:disk0';
const CLIENT = 'iqn.2026-01.org.example:client';
let kernel: FakeKernel;
let backstore: Backstore;

beforeEach(async () => {
  kernel = new FakeKernel();
  backstore = await createBackstore({ name: 'disk0', size: 1 << 20, host: kernel.host });
});
afterEach(() => kernel.destroy());

/** Gives an attribute the value that a kernel would show. */
function show(path: string, text: string): void {
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, `${text}\n`);
}

describe('nexusesOf', () => {
  const none = { names: new Set(), incomplete: false };
  const session = (id: number) => `InitiatorName: ${CLIENT}\nLIO Session ID: ${id}   ISID: 0x00`;
  /** LIO counts the sessions of a target, those it does not show among them. */
  const count = (sessions: number) =>
    show(
      kernel.host.target('iscsi', IQN, 'fabric_statistics/iscsi_instance/sessions'),
      `${sessions}`,
    );

  it('knows none while nothing is exported', async () => {
    expect(await nexusesOf(backstore)).toEqual(none);
  });

  it('names an iSCSI session by its number, so that it has another name when it comes again', async () => {
    const { target } = await attachIscsi(backstore, { iqn: IQN, initiators: [{ name: CLIENT }] });
    const info = join(target.path, 'acls', CLIENT, 'info');
    show(info, `No active iSCSI Session for Initiator Endpoint: ${CLIENT}`);
    expect(await nexusesOf(backstore)).toEqual(none);
    show(info, session(7));
    const first = await nexusesOf(backstore);
    expect(first.names.size).toBe(1);
    show(info, session(8));
    const second = await nexusesOf(backstore);
    expect(second.names.size).toBe(1);
    expect(second).not.toEqual(first);
  });

  it('tells when there are more sessions than the access list shows', async () => {
    const { target } = await attachIscsi(backstore, { iqn: IQN, initiators: [{ name: CLIENT }] });
    show(join(target.path, 'acls', CLIENT, 'info'), session(8));
    count(2);
    expect(await nexusesOf(backstore)).toMatchObject({ incomplete: true });
    count(1);
    expect(await nexusesOf(backstore)).toMatchObject({ incomplete: false });
  });

  it('counts the sessions of all portal groups of the target, and names those of its own', async () => {
    await attachIscsi(backstore, { iqn: IQN, anyone: {} });
    const other = kernel.host.target('iscsi', IQN, 'tpgt_2');
    show(join(other, 'dynamic_sessions'), `${CLIENT}\0`);
    count(1);
    expect(await nexusesOf(backstore)).toEqual(none);
    count(2);
    expect(await nexusesOf(backstore)).toMatchObject({ incomplete: true });
  });

  it('names an initiator without an entry of its own, and a loopback nexus', async () => {
    const { target } = await attachIscsi(backstore, { iqn: IQN, anyone: {} });
    show(join(target.path, 'dynamic_sessions'), `${CLIENT}\0\n${CLIENT}2\0`);
    expect((await nexusesOf(backstore)).names.size).toBe(2);
    await attachLoopback(backstore);
    expect((await nexusesOf(backstore)).names.size).toBe(3);
  });

  it('leaves other backstores out', async () => {
    const other = await createBackstore({ name: 'disk1', size: 1 << 20, host: kernel.host });
    await attachLoopback(other);
    expect(await nexusesOf(backstore)).toEqual(none);
  });
});

describe('portGroupsOf', () => {
  const group = (name: string, values: Record<string, string>) => {
    for (const [attribute, value] of Object.entries(values)) {
      show(join(backstore.path, 'alua', name, attribute), value);
    }
  };
  const MEMBERS = `iscsi/${IQN}/tpgt_1/lun_0\nloopback/naa.5001405000000001/tpgt_1/lun_0`;

  it('is empty where LIO keeps none', async () => {
    rmSync(join(backstore.path, 'alua'), { recursive: true, force: true });
    expect(await portGroupsOf(backstore)).toEqual([]);
  });

  it('tells groups by number, with their states, and counts ports where the kernel does not', async () => {
    group('default_tg_pt_gp', {
      tg_pt_gp_id: '0',
      alua_access_state: '0',
      alua_support_active_optimized: '1',
      alua_support_standby: '1',
      preferred: '1',
      members: MEMBERS,
    });
    group('passive', { tg_pt_gp_id: '16', alua_access_state: '2', members: '' });
    group('unnumbered', { tg_pt_gp_id: '', alua_access_state: '0', members: '' });
    expect(await portGroupsOf(backstore)).toEqual([
      {
        id: 0,
        state: 'active-optimized',
        preferred: true,
        supported: ['active-optimized', 'standby'],
        ports: [1, 2],
      },
      { id: 16, state: 'standby', preferred: false, supported: [], ports: [] },
    ]);
  });

  it('takes the kernel’s relative target port identifiers where it tells them', async () => {
    group('default_tg_pt_gp', { tg_pt_gp_id: '0', alua_access_state: '1', members: MEMBERS });
    show(kernel.host.target('iscsi', IQN, 'tpgt_1', 'rtpi'), '41');
    show(kernel.host.target('loopback', 'naa.5001405000000001', 'tpgt_1', 'rtpi'), '42');
    const [only] = await portGroupsOf(backstore);
    expect([only?.state, only?.ports]).toEqual(['active-non-optimized', [41, 42]]);
  });
});
