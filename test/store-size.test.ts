// SPDX-License-Identifier: Apache-2.0
import { describe, expect, it } from 'vitest';
import { formatSize, parseSize } from '../lib/store/index.js';

describe('parseSize', () => {
  it.each([
    ['4096', 4096],
    ['512B', 512],
    ['1k', 1024],
    ['10M', 10 * 1024 ** 2],
    ['1.5G', 1.5 * 1024 ** 3],
    ['2TiB', 2 * 1024 ** 4],
    ['3gb', 3 * 1024 ** 3],
  ])('takes %s', (text, bytes) => expect(parseSize(text)).toBe(bytes));

  it.each([
    '',
    'G',
    '-1',
    '1e3',
    '1 G',
    '0x10',
    '1.0001K',
    '9P9',
    '10E',
    '16777216T',
    ' 1',
    '1GiBs',
  ])('refuses %j', (text) => expect(parseSize(text)).toBeUndefined());
});

describe('formatSize', () => {
  it.each([
    [512, '512 B'],
    [1024 ** 3, '1 GiB'],
    [1.5 * 1024 ** 4, '1.5 TiB'],
    [1024 ** 3 + 512, '1 GiB (1073742336 bytes)'],
  ])('%d', (bytes, text) => expect(formatSize(bytes)).toBe(text));
});
