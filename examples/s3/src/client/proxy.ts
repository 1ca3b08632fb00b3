// SPDX-License-Identifier: Apache-2.0
/**
 * Which proxy the environment names for a URL: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY, in lower or upper case, as curl
 * and most programs read them.
 */
export type Environment = Readonly<Record<string, string | undefined>>;

/** @returns the proxy's URL, or undefined to go straight to the host */
export function proxyFor(origin: string, env: Environment): string | undefined {
  const url = new URL(origin);
  const scheme = url.protocol.slice(0, -1);
  const proxy = read(env, `${scheme}_proxy`) ?? read(env, 'all_proxy');
  if (proxy === undefined || isLoopback(url.hostname)) return undefined;
  if (isExempt(url, read(env, 'no_proxy') ?? '')) return undefined;
  return proxy.includes('://') ? proxy : `http://${proxy}`;
}

function read(env: Environment, name: string): string | undefined {
  return env[name] || env[name.toUpperCase()] || undefined;
}

function isLoopback(host: string): boolean {
  return host === 'localhost' || host === '[::1]' || /^127(\.\d+){3}$/.test(host);
}

/** `*`, or names separated by commas: a name stands for itself and all below it, with a port for that port only. */
function isExempt(url: URL, list: string): boolean {
  const port = url.port || (url.protocol === 'https:' ? '443' : '80');
  return list
    .split(/[\s,]+/)
    .filter(Boolean)
    .some((entry) => {
      if (entry === '*') return true;
      const [, name = '', wanted] = /^\*?\.?(.*?)(?::(\d+))?$/.exec(entry.toLowerCase()) ?? [];
      if (wanted !== undefined && wanted !== port) return false;
      return url.hostname === name || url.hostname.endsWith(`.${name}`);
    });
}
