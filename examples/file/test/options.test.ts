// SPDX-License-Identifier: Apache-2.0
import { UsageError } from 'tcmu/program';
import { describe, expect, it } from 'vitest';
import { HELP, type Options, parseOptions } from '../src/options.js';

const options = (line: string, env = {}) => parseOptions(line.split(' '), env) as Options;
const mistake = (line: string, env = {}) => {
  try {
    parseOptions(line === '' ? [] : line.split(' '), env);
  } catch (error) {
    if (error instanceof UsageError) return error.message;
    throw error;
  }
  return 'none';
};

describe('parseOptions', () => {
  it('has defaults that are safe', () => {
    expect(options('/a --name d0')).toMatchObject({
      path: '/a',
      name: 'd0',
      size: undefined,
      physicalBlockSize: undefined,
      readOnly: false,
      thick: false,
      bandwidth: undefined,
      removable: false,
      writeCache: true,
      direct: false,
      io: 'auto',
      allowShrink: false,
      device: { recover: false, export: 'loopback' },
    });
  });

  it('reads sizes and numbers', () => {
    expect(
      options('/a --name d0 --size 1.5G --block-size 4096 --max-sectors 256 --timeout 0'),
    ).toMatchObject({
      size: 1.5 * 1024 ** 3,
      blockSize: 4096,
      device: { maxSectors: 256, commandTimeout: 0 },
    });
  });

  it('reads what zero copy is wanted', () => {
    expect(options('/a --name d0')).toMatchObject({ zeroCopy: 'never', zeroCopyScrub: true });
    expect(options('/a --name d0 --zero-copy auto --no-zero-copy-scrub')).toMatchObject({
      zeroCopy: 'auto',
      zeroCopyScrub: false,
    });
  });

  it.each([
    ['', /which file/],
    ['/a', /--name is missing/],
    ['/a /b --name d0', /\/b is too much/],
    ['/a --name d0 --frobnicate', /--frobnicate/],
    ['/a --name d0 --size 0', /--size 0/],
    ['/a --name d0 --size 1X', /--size 1X/],
    ['/a --name d0 --block-size 513', /512, 1024, 2048, 4096/],
    ['/a --name d0 --io uring', /auto, inline, pool/],
    ['/a --name d0 --max-sectors 0', /from 1 on/],
    ['/a --name d0 --zero-copy yes', /never, auto, always/],
    ['/a --name d0 --concurrency 1.5', /whole number/],
    ['/a --name d0 --nice 20', /from 0 to 19/],
    ['/a --name d0 --nice -1', /--nice/],
    ['/a --name d0 --export nfs', /loopback, iscsi, vhost, none/],
    ['/a --uio /dev/uio0 --name d0', /--name does not go with --uio/],
    ['/a --uio /dev/uio0 --recover', /--recover does not go with --uio/],
    ['/a --uio /dev/uio0 --timeout 0', /--timeout does not go with --uio/],
  ])('refuses %j', (line, message) => expect(mistake(line)).toMatch(message));

  it('lets an initiator log in', () => {
    const line = '/a --name d0 --export iscsi --iqn i --anyone --chap-user me';
    expect(options(line, { TCMU_CHAP_PASSWORD: 'secret' }).device.export).toEqual({
      type: 'iscsi',
      iqn: 'i',
      anyone: { chap: { user: 'me', password: 'secret' } },
    });
  });

  it('takes no password from the command line', () => {
    expect(mistake('/a --name d0 --chap-password x')).toMatch(/--chap-password/);
  });

  it('serves an existing device without a name', () => {
    expect(options('/a --uio /dev/uio0')).toMatchObject({
      uio: '/dev/uio0',
      device: { export: 'none' },
    });
  });

  it('helps', () => {
    expect(parseOptions(['--help'])).toBe('help');
    expect(parseOptions(['-h', 'x', 'y'])).toBe('help');
    expect(parseOptions(['--version'])).toBe('version');
    // What is documented is taken, and the other way round.
    const documented = [...HELP.matchAll(/^ {2}(--[a-z-]+)/gm)].map((match) => match[1] as string);
    expect(documented.length).toBeGreaterThan(20);
    for (const option of documented.filter((name) => name !== '--help')) {
      expect(mistake(`/a --name d0 ${option}`)).not.toMatch(/Unknown option/);
    }
    for (const line of HELP.split('\n')) expect(line.length).toBeLessThanOrEqual(110);
  });
});
