// SPDX-License-Identifier: Apache-2.0
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  decodeAttributes,
  decodeError,
  decodeEvent,
  decodeFamily,
  decodeMessages,
  encodeAttributes,
  encodeDone,
  encodeFamilyRequest,
  encodeMessage,
  encodeReplySwitch,
  type TcmuEvent,
} from '../lib/target/netlink-codec.js';
import { cases } from './cases.js';
import { eventMessage, familyAnswer } from './target-fake-netlink.js';

const bytes = fc.uint8Array({ maxLength: 64 });
const u32 = fc.integer({ min: 0, max: 0xffffffff });
const u16 = fc.integer({ min: 0, max: 0xffff });

function decodeAll(datagram: Uint8Array): unknown[] {
  return decodeMessages(datagram).flatMap(({ payload }) => [
    decodeEvent(payload),
    decodeFamily(payload),
    decodeError(payload),
  ]);
}

describe('messages', () => {
  it('come back as they were sent, any number in a datagram', () => {
    const message = fc.record({ type: u16, flags: u16, sequence: u32, port: u32, payload: bytes });
    fc.assert(
      fc.property(fc.array(message, { maxLength: 5 }), (messages) => {
        const datagram = new Uint8Array(Buffer.concat(messages.map(encodeMessage)));
        expect(decodeMessages(datagram)).toEqual(messages);
      }),
      cases(100),
    );
  });

  it('never make the decoder throw or read beyond them', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), (datagram) => {
        // A view into something larger: what lies around it must not show.
        const around = new Uint8Array(datagram.length + 64).fill(0xaa);
        around.set(datagram, 32);
        const view = around.subarray(32, 32 + datagram.length);
        expect(decodeAll(view)).toEqual(decodeAll(datagram));
        for (const { payload } of decodeMessages(view)) {
          expect(payload.byteOffset).toBeGreaterThanOrEqual(32 + 16);
          expect(payload.byteOffset + payload.length).toBeLessThanOrEqual(32 + datagram.length);
        }
      }),
      cases(500),
    );
  });

  it('survive any byte of a real event being wrong', () => {
    const event = eventMessage({
      kind: 'reconfigured',
      name: 'tcm-user/0/disk0/file/x',
      minor: 3,
      id: 7,
      size: 1n << 40n,
      config: 'file/y',
      writeCache: 1,
    });
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: event.length - 1 }),
        fc.integer({ min: 0, max: 255 }),
        fc.integer({ min: 0, max: event.length }),
        (at, value, length) => {
          const broken = new Uint8Array(event);
          broken[at] = value;
          decodeAll(broken.subarray(0, length));
        },
      ),
      cases(2000),
    );
  });

  it.each([
    ['shorter than its header', [15, 0, 0, 0]],
    ['of length 0', [0, 0, 0, 0]],
    ['longer than the datagram', [17, 0, 0, 0]],
    ['of the largest length', [0xff, 0xff, 0xff, 0xff]],
  ])('end at one %s', (_what, length) => {
    const good = encodeMessage({
      type: 1,
      flags: 0,
      sequence: 0,
      port: 0,
      payload: new Uint8Array(),
    });
    const bad = Uint8Array.from([...length, ...new Array<number>(12).fill(0)]);
    expect(decodeMessages(Uint8Array.from([...good, ...bad]))).toHaveLength(1);
  });
});

describe('attributes', () => {
  it('come back as they were written', () => {
    const attribute = fc.tuple(fc.integer({ min: 0, max: 0x3fff }), bytes);
    const unique = fc.uniqueArray(attribute, { selector: ([type]) => type, maxLength: 6 });
    fc.assert(
      fc.property(unique, (attributes) => {
        expect([...decodeAttributes(encodeAttributes(attributes))]).toEqual(attributes);
      }),
      cases(100),
    );
  });

  it('that claim more than there is are none, nor what follows', () => {
    const good = [5, 0, 1, 0, 9, 0, 0, 0];
    for (const bad of [
      [8, 0, 2, 0, 1],
      [3, 0, 2, 0],
      [0, 0, 2, 0],
      [0xff, 0xff, 2, 0],
    ]) {
      expect([...decodeAttributes(Uint8Array.from([...good, ...bad]))]).toEqual([
        [1, Uint8Array.of(9)],
      ]);
    }
  });

  it('have their flags taken off', () => {
    const nested = Uint8Array.from([5, 0, 7, 0x80, 1, 0, 0, 0]);
    expect([...decodeAttributes(nested)]).toEqual([[7, Uint8Array.of(1)]]);
  });
});

describe('TCM-USER', () => {
  it('events are understood', () => {
    const reconfigured = eventMessage({
      kind: 'reconfigured',
      name: 'tcm-user/0/größe/file//srv/x,y',
      minor: 3,
      id: 0xffffffff,
      size: 1n << 40n,
      config: 'file//srv/z',
      writeCache: 0,
    });
    const [message] = decodeMessages(reconfigured);
    expect(decodeEvent(message?.payload ?? new Uint8Array())).toEqual<TcmuEvent>({
      kind: 'reconfigured',
      uioName: 'tcm-user/0/größe/file//srv/x,y',
      minor: 3,
      deviceId: 0xffffffff,
      size: 2 ** 40,
      config: 'file//srv/z',
      writeCache: false,
    });
    for (const kind of ['added', 'removed'] as const) {
      const [plain] = decodeMessages(eventMessage({ kind, name: 'tcm-user/0/d', minor: 0, id: 1 }));
      expect(decodeEvent(plain?.payload ?? new Uint8Array())).toEqual<TcmuEvent>({
        kind,
        uioName: 'tcm-user/0/d',
        minor: 0,
        deviceId: 1,
      });
    }
  });

  it('events without what all events have, and other commands, are none', () => {
    const [message] = decodeMessages(
      eventMessage({ kind: 'added', name: 'tcm-user/0/d', minor: 0, id: 1 }),
    );
    const payload = message?.payload ?? new Uint8Array();
    for (let length = 0; length < payload.length; length += 1) {
      expect(decodeEvent(payload.subarray(0, length))).toBeUndefined();
    }
    for (const command of [0, 4, 7, 255]) {
      const other = Uint8Array.from(payload);
      other[0] = command;
      expect(decodeEvent(other)).toBeUndefined();
    }
  });

  it('requests are as the kernel wants them (linux/target_core_user.h)', () => {
    // command, version, 2 reserved; status (7) s32; device id (8) u32
    expect(Buffer.from(encodeDone('removed', 0x01020304, -110)).toString('hex')).toBe(
      '05020000' + '08000700' + '92ffffff' + '08000800' + '04030201',
    );
    expect(Buffer.from(encodeDone('added', 1, 0)).subarray(0, 2)).toEqual(Buffer.from([4, 2]));
    expect(Buffer.from(encodeDone('reconfigured', 1, 0)).subarray(0, 2)).toEqual(
      Buffer.from([6, 2]),
    );
    expect(Buffer.from(encodeReplySwitch(true)).toString('hex')).toBe(
      '07020000' + '0500090001000000',
    );
    expect(Buffer.from(encodeReplySwitch(false)).toString('hex')).toBe(
      '07020000' + '0500090000000000',
    );
    expect(Buffer.from(encodeFamilyRequest('TCM-USER')).toString('hex')).toBe(
      `03010000${'0d000200'}${Buffer.from('TCM-USER\0').toString('hex')}000000`,
    );
  });

  it('the family is found with its group', () => {
    expect(decodeFamily(familyAnswer())).toEqual({ id: 0x1c, groups: new Map([['config', 5]]) });
    expect(decodeFamily(new Uint8Array(3))).toBeUndefined();
    expect(decodeFamily(new Uint8Array(4))).toBeUndefined();
  });

  it('acknowledgements carry a status', () => {
    expect(decodeError(Uint8Array.of(0, 0, 0, 0))).toBe(0);
    expect(decodeError(Uint8Array.of(0xfe, 0xff, 0xff, 0xff))).toBe(-2);
    expect(decodeError(Uint8Array.of(0, 0, 0))).toBeUndefined();
  });
});
