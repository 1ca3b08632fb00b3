// SPDX-License-Identifier: Apache-2.0
/** What is done to both kernels. A name is a file of `fixtures/`; its steps must not depend on time. */
import {
  KEEP_BUF,
  READ_LEN,
  type Request,
  type Settings,
  UNKNOWN_OP,
  type World,
} from './world.js';

export interface Sequence {
  settings: Settings;
  /** The device is gone at the end. */
  removes?: boolean;
  run(world: World): Promise<void>;
}

const KIB = 1024;
const read10 = (bytes: number): Request => ({
  cdb: [0x28, 0, 0, 0, 0, 8, 0, 0, 1, 0],
  in: bytes,
});
const write10 = (bytes: number): Request => ({
  cdb: [0x2a, 0, 0, 0, 0, 8, 0, 0, 1, 0],
  out: bytes,
});
/** XDWRITEREAD(10): out and in, as long as each other. */
const exchange = (bytes: number): Request => ({
  cdb: [0x53, 0, 0, 0, 0, 8, 0, bytes >> 17, (bytes >> 9) & 0xff, 0],
  out: bytes,
  in: bytes,
});
const TEST_UNIT_READY: Request = { cdb: [0, 0, 0, 0, 0, 0] };
const MEDIUM_ERROR = { status: 2, sense: [3, 0x11, 0] } as const;

export const sequences: Record<string, Sequence> = {
  'entry-sizes': {
    settings: {},
    async run(world) {
      world.mailbox();
      const requests: Request[] = [
        TEST_UNIT_READY,
        { cdb: [0x12, 0, 0, 0, 96, 0], in: 96 },
        read10(512),
        { cdb: [0xa8, 0, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0], in: 4096 },
        { cdb: [0x88, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0], in: 4097 },
        { cdb: [0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0], out: 12 * KIB },
        { cdb: [0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, 0x20, ...new Array<number>(22).fill(0x5a)] },
        { cdb: [0xc5, 1, 2, 3, 4, 5, 6, 7, 8, 9] },
        write10(512 * KIB),
      ];
      for (const [i, request] of requests.entries()) {
        await world.send(`c${i}`, request);
        await world.finish(`c${i}`);
      }
    },
  },

  'iovec-merging': {
    settings: {},
    async run(world) {
      const labels = Array.from({ length: 16 }, (_, i) => `hole${i}`);
      for (const label of labels) await world.send(label, read10(4 * KIB));
      // Every other page is free then: segments of one page, and an entry beyond the smallest.
      for (const [i, label] of labels.entries()) if (i % 2 === 0) await world.finish(label);
      await world.send('scattered', write10(44 * KIB + 512));
      await world.send('behind', read10(20 * KIB));
      world.look();
      for (const [i, label] of labels.entries()) if (i % 2 === 1) await world.finish(label);
      await world.finish('behind');
      await world.finish('scattered');
      await world.send('whole', read10(64 * KIB));
      await world.finish('whole');
    },
  },

  'data-pages-per-block': {
    settings: { dataPagesPerBlock: 4 },
    async run(world) {
      await world.send('small', read10(512));
      await world.send('block', write10(16 * KIB));
      await world.send('more', write10(20_480));
      await world.finish('block');
      await world.send('again', read10(33 * KIB));
      world.look();
      for (const label of ['again', 'more', 'small']) await world.finish(label);
    },
  },

  'out-of-order': {
    settings: {},
    async run(world) {
      for (const label of ['a', 'b', 'c', 'd']) await world.send(label, read10(8 * KIB));
      await world.finish('c');
      await world.finish('a');
      world.look();
      await world.send('e', write10(4 * KIB));
      await world.finish('e');
      await world.finish('d', MEDIUM_ERROR);
      await world.finish('b', { status: 0x18 });
      world.look();
    },
  },

  'read-len': {
    settings: {},
    async run(world) {
      const answers = [
        { flags: READ_LEN, readLength: 100 },
        { flags: READ_LEN, readLength: 4096 },
        { flags: READ_LEN, readLength: 0 },
        { flags: READ_LEN, readLength: 100_000 },
        { readLength: 100 },
        { ...MEDIUM_ERROR },
        { ...MEDIUM_ERROR, flags: READ_LEN, readLength: 512 },
      ];
      for (const [i, answer] of answers.entries()) {
        await world.send(`r${i}`, read10(8 * KIB));
        await world.finish(`r${i}`, answer);
      }
      await world.send('w', write10(8 * KIB));
      await world.finish('w', { flags: READ_LEN, readLength: 512 });
    },
  },

  'keep-buf': {
    settings: {},
    async run(world) {
      await world.send('kept', write10(8 * KIB));
      await world.finish('kept', { flags: KEEP_BUF });
      await world.send('next', read10(8 * KIB));
      await world.finish('next');
      world.release('kept');
      world.release('kept');
      await world.send('after', read10(8 * KIB));
      await world.finish('after');
      // A second completion of a kept command is a handler gone mad.
      await world.send('twice', write10(4 * KIB));
      await world.send('slot', read10(4 * KIB));
      await world.finish('twice', { flags: KEEP_BUF });
      world.complete('twice');
      await world.sendRefused('broken', read10(4 * KIB));
      world.resetRing(2);
      await world.ends('slot');
      await world.send('mended', read10(4 * KIB));
      await world.finish('mended');
    },
  },

  'unknown-op': {
    settings: {},
    async run(world) {
      await world.send('a', read10(4 * KIB));
      await world.finish('a', { flags: UNKNOWN_OP });
      await world.send('b', write10(4 * KIB));
      await world.finish('b', { flags: UNKNOWN_OP, status: 2 });
    },
  },

  'unknown-id': {
    settings: {},
    async run(world) {
      await world.send('a', read10(4 * KIB));
      world.complete('a', { id: 4711 });
      await world.sendRefused('b', read10(4 * KIB));
      world.resetRing(2);
      await world.ends('a');
      await world.send('c', read10(4 * KIB));
      await world.finish('c');
    },
  },

  'task-management': {
    settings: { tmrNotification: true },
    async run(world) {
      await world.send('aborted', { ...read10(4 * KIB), abortAfter: 1 });
      await world.notified();
      world.complete('aborted');
      world.skip();
      await world.send('a', read10(4 * KIB));
      await world.send('b', write10(4 * KIB));
      const reset = world.beginLunReset();
      await world.notified();
      world.look();
      world.complete('b');
      world.complete('a');
      await reset();
      world.skip();
    },
  },

  expiry: {
    settings: { commandTimeout: 1 },
    async run(world) {
      await world.send('late', read10(8 * KIB));
      await world.ends('late');
      world.look();
      await world.send('next', read10(8 * KIB));
      await world.finish('next');
      // Id, slot and pages were the late command's until now.
      world.complete('late');
      await world.send('reuse', read10(8 * KIB));
      await world.finish('reuse');
    },
  },

  'data-area-full': {
    settings: {},
    async run(world) {
      await world.send('most', read10(600 * KIB));
      await world.sendWaiting('wait', write10(500 * KIB));
      await world.sendWaiting('behind', TEST_UNIT_READY);
      await world.finish('most');
      await world.arrives('wait');
      await world.arrives('behind');
      await world.finish('wait');
      await world.finish('behind');
      await world.send('all', read10(1024 * KIB));
      await world.finish('all');
    },
  },

  padding: {
    settings: {},
    async run(world) {
      // The ring is 8191 slots of 128 bytes.
      await world.turn(8180);
      const labels = Array.from({ length: 10 }, (_, i) => `hole${i}`);
      for (const label of labels) await world.send(label, read10(4 * KIB));
      for (const [i, label] of labels.entries()) if (i % 2 === 0) await world.finish(label);
      // One slot is left before the end; this takes more.
      await world.send('scattered', write10(40 * KIB));
      world.look();
      for (const [i, label] of labels.entries()) if (i % 2 === 1) await world.finish(label);
      await world.finish('scattered');
    },
  },

  'reset-ring': {
    settings: {},
    async run(world) {
      await world.send('a', read10(4 * KIB));
      await world.send('b', write10(4 * KIB));
      await world.finish('a');
      world.resetRing(2);
      await world.ends('b');
      await world.send('c', read10(4 * KIB));
      await world.finish('c');
    },
  },

  'reset-ring-busy': {
    settings: {},
    async run(world) {
      await world.send('first', read10(4 * KIB));
      // One alone: in which order an initiator sends several again is its own affair.
      await world.send('again', write10(4 * KIB));
      await world.finish('first');
      world.resetRing(1);
      // BUSY: the initiator sends it again.
      await world.arrives('again');
      await world.finish('again');
    },
  },

  'block-device': {
    settings: {},
    async run(world) {
      await world.send('flying', read10(600 * KIB));
      await world.sendWaiting('waiting', write10(500 * KIB));
      world.block();
      // A blocked device takes completions all the same.
      await world.finish('flying');
      await world.sendRefused('refused', { ...read10(4 * KIB), patience: 1 });
      world.unblock();
      await world.arrives('waiting');
      await world.finish('waiting');
    },
  },

  'queue-full-timeout': {
    settings: { queueFullTimeout: 1 },
    async run(world) {
      // Kept pages fill the data area: with a command under way, Linux holds back what was refused.
      await world.send('most', write10(600 * KIB));
      await world.finish('most', { flags: KEEP_BUF });
      await world.sendRefused('wait', { ...write10(500 * KIB), patience: 2 });
      world.look();
      world.release('most');
      await world.send('next', write10(500 * KIB));
      await world.finish('next');
    },
  },

  'queue-full-at-once': {
    settings: { queueFullTimeout: 0 },
    async run(world) {
      await world.send('most', read10(600 * KIB));
      await world.finish('most', { flags: KEEP_BUF });
      await world.sendRefused('refused', { ...write10(500 * KIB), patience: 1 });
      await world.send('small', read10(4 * KIB));
      await world.finish('small');
      world.release('most');
      await world.send('next', write10(500 * KIB));
      await world.finish('next');
    },
  },

  'expiry-keeps-pages': {
    settings: { commandTimeout: 1, queueFullTimeout: 1 },
    async run(world) {
      await world.send('late', read10(600 * KIB));
      await world.ends('late');
      // Answered, but its pages are still its own.
      await world.sendRefused('wait', { ...read10(500 * KIB), patience: 2 });
      world.complete('late');
      await world.send('next', write10(500 * KIB));
      await world.finish('next');
    },
  },

  'too-large': {
    // One block of 800 KiB is all that a data area of 1 MiB holds.
    settings: { dataPagesPerBlock: 200 },
    async run(world) {
      await world.sendRefused('two-blocks', write10(900 * KIB));
      await world.send('one', write10(4 * KIB));
      await world.sendWaiting('wait', read10(800 * KIB));
      await world.finish('one');
      await world.arrives('wait');
      await world.finish('wait');
    },
  },

  'task-management-waiting': {
    settings: { tmrNotification: true },
    async run(world) {
      await world.send('most', read10(600 * KIB));
      await world.sendWaiting('wait', { ...write10(500 * KIB), abortAfter: 1 });
      // It is gone from the queue at once; the handler never knew it.
      await world.notified();
      await world.ends('wait');
      await world.finish('most');
      world.skip();
      await world.send('next', write10(500 * KIB));
      await world.finish('next');
    },
  },

  'task-management-silent': {
    settings: {},
    async run(world) {
      await world.send('aborted', { ...read10(4 * KIB), abortAfter: 1 });
      await world.aborted('aborted');
      world.complete('aborted');
      await world.ends('aborted');
      await world.send('next', read10(4 * KIB));
      await world.finish('next');
    },
  },

  events: {
    settings: {},
    async run(world) {
      await world.send('a', read10(4 * KIB));
      world.events();
      world.events();
      await world.send('b', read10(4 * KIB));
      await world.send('c', read10(4 * KIB));
      await world.send('d', read10(4 * KIB));
      world.events();
      for (const label of ['a', 'b', 'c', 'd']) await world.finish(label);
      // A doorbell is no event.
      world.events();
    },
  },

  'second-open': {
    settings: {},
    async run(world) {
      world.openSecond();
      await world.send('a', write10(4 * KIB));
      world.openSecond();
      await world.finish('a');
    },
  },

  successor: {
    settings: {},
    async run(world) {
      await world.send('kept', write10(8 * KIB));
      await world.finish('kept', { flags: KEEP_BUF });
      await world.send('a', write10(4 * KIB));
      await world.send('b', read10(4 * KIB));
      await world.send('c', read10(4 * KIB));
      await world.finish('b');
      world.takeOver();
      // The pages of the kept command went with whom they were kept for.
      world.release('kept');
      await world.send('d', write10(8 * KIB));
      for (const label of ['c', 'd', 'a']) await world.finish(label);
    },
  },

  reconfiguration: {
    settings: {},
    async run(world) {
      await world.send('a', read10(4 * KIB));
      await world.reconfigure({ attribute: 'size', value: 32 << 20, accepted: true });
      await world.reconfigure({ attribute: 'size', value: 48 << 20, accepted: false });
      await world.reconfigure({ attribute: 'writeCache', value: true, accepted: true });
      await world.reconfigure({ attribute: 'writeCache', value: false, accepted: false });
      await world.reconfigure({ attribute: 'config', value: 'test/other', accepted: false });
      await world.reconfigure({ attribute: 'config', value: 'test/two', accepted: true });
      world.look();
      await world.finish('a');
    },
  },

  removal: {
    settings: {},
    removes: true,
    async run(world) {
      await world.send('a', read10(4 * KIB));
      await world.send('b', write10(4 * KIB));
      const removed = world.beginRemoval();
      // It waits for the two.
      await world.finish('b');
      await world.finish('a');
      await removed();
      world.look();
      world.events();
      world.openSecond();
    },
  },

  bidirectional: {
    settings: { bidirectional: true },
    async run(world) {
      await world.send('page', exchange(4 * KIB));
      await world.finish('page');
      // One at a time: the module has one Data-In.
      await world.send('odd', exchange(4 * KIB + 512));
      world.look();
      await world.finish('odd');
      await world.send('large', exchange(64 * KIB));
      await world.finish('large', MEDIUM_ERROR);
      await world.send('before', read10(4 * KIB));
      await world.send('hole', read10(16 * KIB));
      await world.send('after', read10(4 * KIB));
      await world.finish('hole');
      await world.send('scattered', exchange(12 * KIB));
      world.look();
      await world.finish('scattered');
      await world.finish('before');
      await world.finish('after');
      // Neither side of it can be cut short.
      await world.send('cut', exchange(8 * KIB));
      await world.finish('cut', { flags: READ_LEN, readLength: 512 });
      await world.send('unknown', exchange(4 * KIB));
      await world.finish('unknown', { flags: UNKNOWN_OP });
    },
  },
};
