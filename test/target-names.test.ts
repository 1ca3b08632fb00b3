// SPDX-License-Identifier: Apache-2.0
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ArgumentError } from '../lib/errors.js';
import {
  checkBlockSize,
  checkChap,
  checkConfig,
  checkInteger,
  checkIscsiName,
  checkName,
  checkSerial,
  checkSize,
  checkWwn,
  portalName,
} from '../lib/target/names.js';
import { cases } from './cases.js';

function refusal(check: () => unknown): string {
  try {
    check();
  } catch (error) {
    expect(error).toBeInstanceOf(ArgumentError);
    return (error as Error).message;
  }
  return 'accepted';
}

describe('backstore name', () => {
  it.each([
    ['', 'must not be empty'],
    ['.', 'one folder name'],
    ['..', 'one folder name'],
    ['../../iscsi', 'one folder name'],
    ['a/b', 'one folder name'],
    ['/etc', 'one folder name'],
    ['a\nb', 'no control characters'],
    ['a\0b', 'no control characters'],
    ['a\u0085b', 'no control characters'],
    [' a', 'space'],
    ['a ', 'space'],
    ['\ud800', 'well-formed'],
    ['x'.repeat(256), '256 bytes'],
    ['é'.repeat(128), '256 bytes'],
  ])('refuses %j', (name, rule) => {
    expect(refusal(() => checkName(name))).toContain(rule);
  });

  it.each(['disk0', 'a b', 'größe', '..a', '%s', 'x'.repeat(255)])('takes %j', (name) => {
    expect(refusal(() => checkName(name))).toBe('accepted');
  });

  it('refuses what is no string', () => {
    expect(refusal(() => checkName(3 as unknown as string))).toContain('must be a string');
  });

  it('lets nothing pass that leaves its folder', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'binary', maxLength: 300 }), (name) => {
        if (refusal(() => checkName(name)) !== 'accepted') return;
        expect(name).not.toMatch(/[/\p{Cc}]|^\.{1,2}$/u);
        expect(Buffer.byteLength(name)).toBeLessThanOrEqual(255);
        expect(Buffer.from(name).toString()).toBe(name);
      }),
      cases(100),
    );
  });
});

describe('config', () => {
  it.each([
    ['', 'must not be empty'],
    ['file/a\nb', 'no control characters'],
    ['/path', 'subtype'],
    [`file/${'x'.repeat(251)}`, '256 bytes'],
    ['file/\udc00', 'well-formed'],
  ])('refuses %j', (config, rule) => {
    expect(refusal(() => checkConfig(config))).toContain(rule);
  });

  it.each(['file//srv/a,b=c', 'file', `file/${'x'.repeat(250)}`])('takes %j', (config) => {
    expect(refusal(() => checkConfig(config))).toBe('accepted');
  });

  it('keeps a long value out of the message', () => {
    expect(refusal(() => checkConfig('x'.repeat(5000))).length).toBeLessThan(200);
  });
});

describe('sizes', () => {
  it.each([0, -512, 511, 1.5, Number.NaN, Number.POSITIVE_INFINITY, 2 ** 53, '512'])(
    'refuses %s',
    (size) => {
      expect(refusal(() => checkSize(size as number, 512))).toContain('multiple of the block size');
    },
  );

  it('wants whole blocks', () => {
    expect(refusal(() => checkSize(4608, 512))).toBe('accepted');
    expect(refusal(() => checkSize(4608, 4096))).toContain('4096');
  });

  it.each([0, 256, 520, 8192, 512.5])('refuses blocks of %s', (size) => {
    expect(refusal(() => checkBlockSize(size))).toContain('512, 1024, 2048 or 4096');
  });

  it('names the bounds of an integer', () => {
    expect(refusal(() => checkInteger('ringMiB', 9, 1, 8))).toContain(
      'ringMiB 9: must be an integer 1..8',
    );
    expect(refusal(() => checkInteger('ringMiB', 8, 1, 8))).toBe('accepted');
  });
});

describe('names of ports', () => {
  it.each(['naa.500140500000000', 'naa.50014050000000011', 'naa.5001405zzzzzzzzz', '../x', 'naa.'])(
    'refuses wwn %j',
    (wwn) => {
      expect(refusal(() => checkWwn(wwn))).toContain('16 hexadecimal digits');
    },
  );

  it.each([
    'iqn.2026-01.org.example:disk0',
    'iqn.2026-01.org.example',
    'iqn.2003-01.org.linux-iscsi.host.x8664:sn.0123_4',
    'eui.0123456789abcdef',
    'naa.5001405000000001',
    'naa.50014050000000015001405000000001',
  ])('takes iSCSI name %j', (name) => {
    expect(refusal(() => checkIscsiName('iqn', name))).toBe('accepted');
  });

  it.each([
    'disk0',
    'iqn.2026-1.org.example:a',
    'iqn.2026-01.org.example:A',
    'iqn.2026-01.org.example:a/b',
    'iqn.2026-01.org.example:',
    'iqn.2026-01...:a\n',
    `iqn.2026-01.org.example:${'x'.repeat(200)}`,
    'eui.0123',
  ])('refuses iSCSI name %j', (name) => {
    expect(refusal(() => checkIscsiName('iqn', name))).not.toBe('accepted');
  });

  it.each([
    ['127.0.0.1', '127.0.0.1:3260'],
    ['127.0.0.1:860', '127.0.0.1:860'],
    ['::1', '[::1]:3260'],
    ['[::1]', '[::1]:3260'],
    ['[2001:db8::1]:3261', '[2001:db8::1]:3261'],
  ])('takes portal %j', (portal, name) => {
    expect(portalName(portal)).toBe(name);
  });

  it.each([
    '',
    'localhost',
    '127.0.0.1:0',
    '127.0.0.1:65536',
    '[127.0.0.1',
    '::1:',
    '1.2.3.4/x:1',
    '[::1]x',
    '1.2.3',
  ])('refuses portal %j', (portal) => {
    expect(refusal(() => portalName(portal))).toContain('portal');
  });
});

describe('secrets', () => {
  it.each(['', 'a\nb', 'NULL', 'NULLx', 'x'.repeat(256), '\ud800secret'])(
    'refuses %j without saying it',
    (value) => {
      const message = refusal(() => checkChap('chap.password', value));
      expect(message).toMatch(/^tcmu: chap\.password: must|is \d+ bytes/);
      if (value.length > 5) expect(message).not.toContain(value);
    },
  );

  it('takes 255 bytes', () => {
    expect(refusal(() => checkChap('chap.password', 'x'.repeat(255)))).toBe('accepted');
  });

  it.each(['a b', 'a\tb', 'é', 'x'.repeat(254), ''])('refuses serial %j', (serial) => {
    expect(refusal(() => checkSerial(serial))).toContain('serial');
  });
});
