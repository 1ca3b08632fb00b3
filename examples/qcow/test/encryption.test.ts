// SPDX-License-Identifier: Apache-2.0
import { createCipheriv, createDecipheriv, randomBytes } from 'node:crypto';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import * as fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { legacyAes } from '../src/encryption/aes.js';
import {
  addLuksKey,
  createLuks,
  openLuks,
  readLuks,
  removeLuksKey,
} from '../src/encryption/luks.js';
import { sectorCipher } from '../src/encryption/sector-cipher.js';
import { cases, failure, KiB, qemuImg, qemuIo, scratch } from './util.js';

const dir = scratch();
const CLUSTER = 64 * KiB;
const quick = { iterationTime: 1 };

/** The payload of a header extension. */
function extension(image: Buffer, type: number): Buffer {
  for (let at = image.readUInt32BE(100); ; ) {
    const length = image.readUInt32BE(at + 4);
    if (image.readUInt32BE(at) === type) return image.subarray(at + 8, at + 8 + length);
    if (image.readUInt32BE(at) === 0) throw new Error('no such extension');
    at += 8 + Math.ceil(length / 8) * 8;
  }
}

/** Where the crypto header of an image lies. */
function cryptoHeader(image: Buffer): { offset: number; length: number } {
  const pointer = extension(image, 0x0537be77);
  return {
    offset: Number(pointer.readBigUInt64BE(0)),
    length: Number(pointer.readBigUInt64BE(8)),
  };
}

/** Host offset of a guest cluster of the first L2 table. */
function hostOffset(image: Buffer, cluster: number): number {
  const mask = 0x00fffffffffffe00n;
  const l2 = Number(image.readBigUInt64BE(Number(image.readBigUInt64BE(40))) & mask);
  return Number(image.readBigUInt64BE(l2 + 8 * cluster) & mask);
}

function create(name: string, options: string): string {
  const image = join(dir, name);
  const secret = ['--object', 'secret,id=s,data=open sesame'];
  const all = `encrypt.key-secret=s,${options}`;
  for (let attempt = 1; ; attempt++) {
    try {
      qemuImg('create', '-q', ...secret, '-f', 'qcow2', '-o', all, image, '1M');
      return image;
    } catch (error) {
      // Its measurement of how fast keys are stretched fails where CPU time is counted in ticks.
      if (!String(error).includes('accurate CPU usage') || attempt === 30) throw error;
    }
  }
}

function io(image: string, passphrase: string, ...commands: string[]): string {
  const options = `driver=qcow2,file.filename=${image},encrypt.key-secret=s`;
  const secret = ['--object', `secret,id=s,data=${passphrase}`, '--image-opts'];
  return qemuIo(options, commands, ...secret);
}

describe('sector cipher', () => {
  test.each([16, 32])('xts with keys of %d bytes is that of OpenSSL', (bytes) => {
    const key = randomBytes(2 * bytes);
    const cipher = sectorCipher('xts-plain64', key);
    const plain = randomBytes(5 * 512);
    for (const sector of [0, 7, 2 ** 32 - 2, 2 ** 44]) {
      const data = Buffer.from(plain);
      cipher.encrypt(data, sector);
      for (let i = 0; i < 5; i++) {
        const tweak = Buffer.alloc(16);
        tweak.writeBigUInt64LE(BigInt(sector + i));
        const piece = plain.subarray(i * 512, (i + 1) * 512);
        const expected = createCipheriv(`aes-${8 * bytes}-xts`, key, tweak).update(piece);
        expect(data.subarray(i * 512, (i + 1) * 512)).toEqual(expected);
      }
      cipher.decrypt(data, sector);
      expect(data).toEqual(plain);
    }
  });

  test('cbc is that of OpenSSL, each sector for itself', () => {
    const key = randomBytes(32);
    const cipher = sectorCipher('cbc-plain', key);
    const data = randomBytes(1024);
    const plain = Buffer.from(data);
    cipher.encrypt(data, 2 ** 32 + 5);
    const vector = Buffer.alloc(16);
    vector.writeUInt32LE(6);
    const decipher = createDecipheriv('aes-256-cbc', key, vector).setAutoPadding(false);
    expect(decipher.update(data.subarray(512))).toEqual(plain.subarray(512));
    cipher.decrypt(data, 2 ** 32 + 5);
    expect(data).toEqual(plain);
  });

  test('works on memory that is not aligned', () => {
    const cipher = sectorCipher('xts-plain64', randomBytes(64));
    const memory = randomBytes(1024 + 3);
    const before = Buffer.from(memory);
    const data = memory.subarray(3);
    cipher.encrypt(data, 1);
    expect(data.equals(before.subarray(3))).toBe(false);
    cipher.decrypt(data, 1);
    expect(memory).toEqual(before);
  });

  test.each([
    ['ecb-plain', 32],
    ['xts-essiv', 64],
    ['xts-plain64:sha256', 64],
    ['cbc-essiv:md5', 32],
    ['xts-plain64', 33],
  ])('refuses %s with %d bytes', (mode, bytes) => {
    expect(() => sectorCipher(mode, new Uint8Array(bytes))).toThrow(RangeError);
  });
});

// QEMU measures for seconds how fast keys are stretched, longer on a busy machine.
describe('LUKS and QEMU', { timeout: 120_000 }, () => {
  test.each([
    ['aes-256', 'xts', 'plain64', 'sha256', ''],
    ['aes-128', 'xts', 'plain64', 'sha1', ''],
    ['aes-256', 'cbc', 'essiv', 'sha512', ',encrypt.ivgen-hash-alg=sha256'],
  ])('reads %s %s %s %s', async (alg, mode, ivgen, hash, more) => {
    const image = create(
      `${alg}-${mode}-${ivgen}.qcow2`,
      `encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg=${alg},encrypt.cipher-mode=${mode},encrypt.ivgen-alg=${ivgen},encrypt.hash-alg=${hash}${more}`,
    );
    io(image, 'open sesame', 'write -P 1 0 64k', 'write -P 3 192k 64k');
    const bytes = readFileSync(image);
    const { offset, length } = cryptoHeader(bytes);
    const header = bytes.subarray(offset, offset + length);
    const cipher = await openLuks(header, 'open sesame', image);
    expect(cipher.tweak).toBe('host');
    for (const [cluster, value] of [
      [0, 1],
      [3, 3],
    ] as const) {
      const host = hostOffset(bytes, cluster);
      const data = Buffer.from(bytes.subarray(host, host + CLUSTER));
      cipher.decrypt(data, host);
      expect(data.equals(Buffer.alloc(CLUSTER, value))).toBe(true);
    }
    expect(await failure(() => openLuks(header, 'wrong', image))).toMatchObject({
      code: 'ERR_TCMU_QCOW_PASSPHRASE',
      path: image,
      structure: 'LUKS header',
    });
  });

  test('opens what is written here; added and removed keys count for QEMU, too', async () => {
    const image = create('ours.qcow2', 'encrypt.format=luks,encrypt.iter-time=10');
    const { offset, length } = cryptoHeader(readFileSync(image));
    const { header, cipher } = await createLuks('first', quick);
    expect(header.length).toBe(length);
    const store = () => {
      const bytes = readFileSync(image);
      bytes.set(header, offset);
      writeFileSync(image, bytes);
    };
    store();
    io(image, 'first', 'write -P 5 0 64k', 'read -P 5 0 64k');
    const bytes = readFileSync(image);
    const host = hostOffset(bytes, 0);
    const data = Buffer.from(bytes.subarray(host, host + CLUSTER));
    cipher.decrypt(data, host);
    expect(data.equals(Buffer.alloc(CLUSTER, 5))).toBe(true);

    const added = await addLuksKey(header, 'first', 'second', quick);
    expect(added.slot).toBe(1);
    for (const { offset: at, bytes: change } of added.changes) header.set(change, at);
    store();
    io(image, 'second', 'read -P 5 0 64k');
    io(image, 'first', 'read -P 5 0 64k');

    const removed = await removeLuksKey(header, 'first');
    expect(removed.slot).toBe(0);
    for (const { offset: at, bytes: change } of removed.changes) header.set(change, at);
    store();
    io(image, 'second', 'read -P 5 0 64k');
    expect(() => io(image, 'first', 'read -P 5 0 64k')).toThrow(/Invalid password/);
    expect(await failure(() => openLuks(header, 'first'))).toMatchObject({
      code: 'ERR_TCMU_QCOW_PASSPHRASE',
    });
    expect(await failure(() => removeLuksKey(header, 'second'))).toMatchObject({
      code: 'ERR_TCMU_QCOW_STATE',
    });
    expect(await failure(() => addLuksKey(header, 'first', 'x', quick))).toMatchObject({
      code: 'ERR_TCMU_QCOW_PASSPHRASE',
    });
  });

  test('a key that QEMU added opens here', async () => {
    const image = create('added.qcow2', 'encrypt.format=luks,encrypt.iter-time=10');
    const secrets = ['open sesame', 'another'].flatMap((data, i) => [
      '--object',
      `secret,id=s${i},data=${data}`,
    ]);
    const options = 'encrypt.state=active,encrypt.new-secret=s1,encrypt.iter-time=10';
    const opened = `driver=qcow2,file.filename=${image},encrypt.key-secret=s0`;
    qemuImg('amend', ...secrets, '--image-opts', '-o', options, opened);
    const bytes = readFileSync(image);
    const { offset, length } = cryptoHeader(bytes);
    const header = bytes.subarray(offset, offset + length);
    expect(readLuks(header).slots.filter(({ active }) => active)).toHaveLength(2);
    await openLuks(header, 'another');
  });

  test('all slots can be filled, no more', async () => {
    const { header } = await createLuks('0', quick);
    for (let i = 1; i < 8; i++) {
      const { slot, changes } = await addLuksKey(header, '0', String(i), quick);
      expect(slot).toBe(i);
      for (const { offset, bytes } of changes) header.set(bytes, offset);
    }
    await openLuks(header, '7');
    expect(await failure(() => addLuksKey(header, '7', '8', quick))).toMatchObject({
      code: 'ERR_TCMU_QCOW_STATE',
    });
  });
});

test('method 1 decrypts what QEMU encrypted', () => {
  const image = create('aes.qcow2', 'encrypt.format=aes');
  io(image, 'open sesame', 'write -P 9 128k 64k');
  const bytes = readFileSync(image);
  const host = hostOffset(bytes, 2);
  const data = Buffer.from(bytes.subarray(host, host + CLUSTER));
  const cipher = legacyAes('open sesame');
  expect(cipher.tweak).toBe('guest');
  cipher.decrypt(data, 128 * KiB);
  expect(data.equals(Buffer.alloc(CLUSTER, 9))).toBe(true);
});

describe('hostile LUKS headers', async () => {
  const { header } = await createLuks('x', quick);

  test.each([
    ['cut short', (h: Buffer) => h.subarray(0, 591), 'FORMAT', '591 bytes'],
    ['another magic', (h: Buffer) => h.fill(0, 0, 1), 'FORMAT', 'magic'],
    ['version 2', (h: Buffer) => h.fill(2, 7, 8), 'UNSUPPORTED', 'version 2'],
    ['another cipher', (h: Buffer) => h.fill('serpent\0', 8, 16), 'UNSUPPORTED', 'serpent'],
    ['another mode', (h: Buffer) => h.fill('ctr-', 40, 44), 'UNSUPPORTED', 'ctr-plain64'],
    ['another hash', (h: Buffer) => h.fill('md5\0', 72, 76), 'UNSUPPORTED', 'md5'],
    ['endless stretching', (h: Buffer) => h.fill(0xff, 212, 216), 'FORMAT', 'iterations'],
    ['no stretching', (h: Buffer) => h.fill(0, 164, 168), 'FORMAT', 'iterations'],
    ['a slot outside', (h: Buffer) => h.fill(0xff, 248, 252), 'FORMAT', 'outside'],
    ['a slot on the header', (h: Buffer) => h.fill(0, 248, 252), 'FORMAT', 'outside'],
    ['huge stripes', (h: Buffer) => h.fill(0xff, 252, 256), 'FORMAT', 'outside'],
    ['overlapping slots', (h: Buffer) => h.fill(9, 299, 300), 'FORMAT', 'overlaps'],
    ['a huge key', (h: Buffer) => h.fill(0xff, 108, 112), 'FORMAT', 'outside'],
    ['an odd key', (h: Buffer) => h.fill(33, 111, 112), 'UNSUPPORTED', 'key of 16.5 bytes'],
    ['a strange state', (h: Buffer) => h.fill(1, 208, 209), 'FORMAT', 'state 0x1ac71f3'],
  ] as const)('%s', async (_name, mutate, code, problem) => {
    const bad = mutate(Buffer.from(header));
    expect(await failure(() => openLuks(bad, 'x', '/image'))).toMatchObject({
      code: `ERR_TCMU_QCOW_${code}`,
      structure: 'LUKS header',
      message: expect.stringMatching(new RegExp(`/image: LUKS header at 0x\\w+: .*${problem}`)),
    });
  });

  test('whatever bytes: known codes, nothing else', () => {
    const flips = fc.array(fc.tuple(fc.nat(591), fc.nat(255)), { minLength: 1, maxLength: 6 });
    fc.assert(
      fc.property(flips, (changes) => {
        const bad = Buffer.from(header);
        for (const [at, value] of changes) bad[at] = value;
        try {
          readLuks(bad);
        } catch (error) {
          expect((error as { code: string }).code).toMatch(/^ERR_TCMU_QCOW_(FORMAT|UNSUPPORTED)$/);
        }
      }),
      cases(500),
    );
  });
});
