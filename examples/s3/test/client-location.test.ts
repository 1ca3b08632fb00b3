// SPDX-License-Identifier: Apache-2.0
/** Where a bucket is, and which proxy leads there. */
import { describe, expect, it } from 'vitest';
import { bucketAddress, parseLocation } from '../src/client/location.js';
import { CONNECT_OPTIONS, connectOptions } from '../src/client/options.js';
import { proxyFor } from '../src/client/proxy.js';
import { homeOf, isPinName, pinName } from '../src/engine/names.js';

describe('parseLocation', () => {
  it('takes a bucket and a prefix', () => {
    expect(parseLocation('s3://b-1.x/disks/d0/')).toEqual({ bucket: 'b-1.x', prefix: 'disks/d0' });
  });

  it('takes a prefix as long as leaves room for the names in it', () => {
    const prefix = 'x'.repeat(880);
    expect(parseLocation(`s3://bucket/${prefix}`).prefix).toBe(prefix);
    const longest = `${homeOf(prefix, 'f'.repeat(32))}/${pinName('y'.repeat(100))}`;
    expect(isPinName('y'.repeat(101))).toBe(false);
    expect(longest.length).toBeLessThanOrEqual(1024);
  });

  it.each([
    's3://bucket',
    's3://bucket/',
    's3:///prefix',
    'http://bucket/prefix',
    's3://bucket/a//b',
    's3://bucket/a/../b',
    's3://bucket/white space',
    's3://bucket/a+b',
    's3://bucket/a%20b',
    's3://bucket/ünïcode',
    's3://bucket/a//',
    's3://bucket/..',
    's3://bucket/a/./b',
    `s3://bucket/${'x'.repeat(881)}`,
    's3://bu%63ket/a',
    '',
  ])('refuses %j and says what it wants', (location) => {
    expect(() => parseLocation(location)).toThrow(/s3:\/\/bucket\/prefix/);
  });
});

describe('bucketAddress', () => {
  const base = { bucket: 'data', region: 'eu-west-1', endpoint: undefined, pathStyle: undefined };

  it('is a virtual host of Amazon by default', () => {
    expect(bucketAddress(base)).toEqual({
      origin: 'https://data.s3.eu-west-1.amazonaws.com',
      host: 'data.s3.eu-west-1.amazonaws.com',
      path: '',
    });
    expect(bucketAddress({ ...base, region: 'cn-north-1' }).host).toBe(
      'data.s3.cn-north-1.amazonaws.com.cn',
    );
  });

  it('keeps a bucket with a dot out of the host, where no certificate covers it', () => {
    expect(bucketAddress({ ...base, bucket: 'my.data' })).toEqual({
      origin: 'https://s3.eu-west-1.amazonaws.com',
      host: 's3.eu-west-1.amazonaws.com',
      path: '/my.data',
    });
  });

  it('is in the path of an endpoint, or in its host when asked for', () => {
    const endpoint = 'http://store.example:9000/s3/';
    expect(bucketAddress({ ...base, endpoint })).toEqual({
      origin: 'http://store.example:9000',
      host: 'store.example:9000',
      path: '/s3/data',
    });
    expect(bucketAddress({ ...base, endpoint, pathStyle: false })).toEqual({
      origin: 'http://data.store.example:9000',
      host: 'data.store.example:9000',
      path: '/s3',
    });
  });

  it('refuses what is no endpoint and no region', () => {
    for (const endpoint of ['store:9000', 'ftp://store', 'http://user:pass@store', 'x', '']) {
      expect(() => bucketAddress({ ...base, endpoint })).toThrow(/http:\/\/ or https:\/\//);
    }
    expect(() => bucketAddress({ ...base, region: 'evil.example/' })).toThrow(/region/);
  });
});

describe('proxyFor', () => {
  const env = { HTTPS_PROXY: 'http://proxy:3128', http_proxy: 'plain:8080' };

  it('follows the scheme, in either case, and ALL_PROXY last', () => {
    expect(proxyFor('https://s3.amazonaws.com', env)).toBe('http://proxy:3128');
    expect(proxyFor('http://store.example', env)).toBe('http://plain:8080');
    expect(proxyFor('https://store.example', { ALL_PROXY: 'http://all:1' })).toBe('http://all:1');
    expect(proxyFor('https://store.example', { HTTPS_PROXY: '' })).toBeUndefined();
  });

  it('leaves out what NO_PROXY names, and this host', () => {
    const exempt = (no_proxy: string, origin: string) =>
      proxyFor(origin, { ...env, no_proxy }) === undefined;
    expect(exempt('example.com', 'https://a.example.com')).toBe(true);
    expect(exempt('.example.com', 'https://example.com')).toBe(true);
    expect(exempt('example.com', 'https://badexample.com')).toBe(false);
    expect(exempt('x, 10.0.0.7 y', 'http://10.0.0.7:9000')).toBe(true);
    expect(exempt('10.0.0.7:9000', 'http://10.0.0.7:9000')).toBe(true);
    expect(exempt('10.0.0.7:9001', 'http://10.0.0.7:9000')).toBe(false);
    expect(exempt('example.com:443', 'https://example.com')).toBe(true);
    expect(exempt('*', 'https://example.com')).toBe(true);
    expect(exempt('', 'http://127.0.0.1:9000')).toBe(true);
    expect(exempt('', 'http://localhost:9000')).toBe(true);
  });
});

describe('connectOptions', () => {
  it('reads the command line', () => {
    expect(Object.keys(CONNECT_OPTIONS)).toContain('endpoint');
    const values = { endpoint: 'http://e', 'virtual-host': true, 'request-timeout': '3' };
    expect(connectOptions(values, {})).toMatchObject({
      endpoint: 'http://e',
      pathStyle: false,
      requestTimeoutMs: 3000,
    });
    expect(connectOptions({ 'path-style': true }, {}).pathStyle).toBe(true);
  });

  it('refuses what can not be meant', () => {
    expect(() => connectOptions({ 'path-style': true, 'virtual-host': true }, {})).toThrow(
      /exclude/,
    );
    for (const bad of ['0', '-1', 'x', '1.5', '']) {
      expect(() => connectOptions({ 'request-timeout': bad }, {})).toThrow(/--request-timeout/);
    }
  });
});
