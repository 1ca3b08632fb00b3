// SPDX-License-Identifier: Apache-2.0
/**
 * Looks at the built documentation as a reader does: every page in headless Chromium, as wide as a desk and as narrow
 * as a phone, and the search once in each.
 *
 *     npm run docs:look [-- --shots FOLDER] [-- PATTERN…]      pages whose path contains a pattern; default: all
 *
 * A page fails when it scrolls sideways as a whole (tables and code may, inside), when it asks for something that
 * isn't there, or when its scripts fail. Exit code 1 then. Chromium is Debian's; nothing leaves this machine.
 */
import { spawn, spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { extname, join, normalize } from 'node:path';
import { parseArgs } from 'node:util';
import { projectRoot, setupOrExit } from './setup.mjs';

const WIDTHS = [
  { name: 'desk', width: 1280, height: 900, mobile: false },
  { name: 'phone', width: 390, height: 844, mobile: true },
];
const PAGE_DEADLINE = 20_000;
const TYPES = {
  '.html': 'text/html; charset=utf-8',
  '.css': 'text/css',
  '.js': 'text/javascript',
  '.svg': 'image/svg+xml',
  '.png': 'image/png',
};

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { shots: { type: 'string' }, 'no-build': { type: 'boolean' } },
});
const { missing } = setupOrExit(['docs']);
if (missing.length > 0) process.exit(1);
const folder = join(projectRoot, 'docs/reference');
if (!values['no-build']) {
  const typedoc = join(projectRoot, 'node_modules/typedoc/bin/typedoc');
  const { status } = spawnSync(process.execPath, [typedoc], { cwd: projectRoot, stdio: 'inherit' });
  if (status !== 0) process.exit(status ?? 1);
}
if (values.shots !== undefined) mkdirSync(values.shots, { recursive: true });

const server = createServer((request, response) => {
  const path = normalize(decodeURIComponent(new URL(request.url, 'http://x').pathname));
  try {
    const body = readFileSync(join(folder, path === '/' ? 'index.html' : path));
    response.setHeader('content-type', TYPES[extname(path)] ?? 'application/octet-stream');
    response.end(body);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
const origin = `http://127.0.0.1:${server.address().port}`;

const profile = mkdtempSync(join(tmpdir(), 'tcmu-docs-look-'));
const chromium = spawn(
  'chromium',
  [
    ...['--headless=new', '--remote-debugging-pipe', `--user-data-dir=${profile}`],
    ...['--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', '--hide-scrollbars'],
    ...(process.getuid?.() === 0 ? ['--no-sandbox'] : []),
  ],
  { stdio: ['ignore', 'ignore', 'ignore', 'pipe', 'pipe'] },
);
const cdp = connect(chromium.stdio[3], chromium.stdio[4]);
chromium.once('error', (error) => cdp.end(error));
chromium.once('exit', () => cdp.end(new Error('chromium has ended')));

const problems = [];
let looked = 0;
try {
  const { targetId } = await cdp.send('Target.createTarget', { url: 'about:blank' });
  const { sessionId } = await cdp.send('Target.attachToTarget', { targetId, flatten: true });
  const page = (method, parameters) => cdp.send(method, parameters, sessionId);
  for (const domain of ['Page', 'Runtime', 'Network', 'Log']) await page(`${domain}.enable`);
  const pages = readdirSync(folder, { recursive: true })
    .filter((path) => path.endsWith('.html'))
    .filter((path) => positionals.length === 0 || positionals.some((part) => path.includes(part)))
    .sort();
  for (const { name, width, height, mobile } of WIDTHS) {
    const deviceScaleFactor = 1;
    await page('Emulation.setDeviceMetricsOverride', { width, height, mobile, deviceScaleFactor });
    for (const path of pages) {
      looked++;
      for (const problem of await look(page, `${origin}/${path}`, width))
        problems.push(`${path} (${name}): ${problem}`);
      if (values.shots !== undefined) {
        const { data } = await page('Page.captureScreenshot', {});
        const file = `${path.replaceAll('/', '-').replace(/html$/, name)}.png`;
        writeFileSync(join(values.shots, file), Buffer.from(data, 'base64'));
      }
    }
    if (positionals.length === 0) {
      const found = await search(page);
      if (!found) problems.push(`search (${name}): it does not find BlockStore`);
    }
  }
} finally {
  server.close();
  server.closeAllConnections();
  const ended = new Promise((resolve) => chromium.removeAllListeners('exit').once('exit', resolve));
  // Asked, not killed: its children would go on writing to the profile.
  await cdp.send('Browser.close').catch(() => chromium.kill());
  await ended;
  await rm(profile, { recursive: true, force: true, maxRetries: 10 });
}
for (const problem of problems) console.log(problem);
console.log(`docs: looked at ${looked} pages, ${problems.length} problems`);
process.exitCode = problems.length > 0 || looked === 0 ? 1 : 0;

/** What is wrong with a page. `width` is the screen's: a phone's `innerWidth` grows with what sticks out. */
async function look(page, url, width) {
  const found = [];
  cdp.listen((method, event) => {
    if (method === 'Runtime.exceptionThrown') found.push(event.exceptionDetails.text);
    else if (method === 'Runtime.consoleAPICalled' && event.type === 'error')
      found.push(event.args.map(({ value }) => value).join(' '));
    else if (method === 'Log.entryAdded' && event.entry.level === 'error')
      found.push(`${event.entry.text} ${event.entry.url ?? ''}`);
    else if (method === 'Network.loadingFailed' && !event.canceled) found.push(event.errorText);
  });
  const loaded = cdp.once('Page.loadEventFired', PAGE_DEADLINE);
  await page('Page.navigate', { url });
  await loaded;
  const wide = await evaluate(
    page,
    `(() => {
      const width = ${width};
      if (document.documentElement.scrollWidth <= width) return [];
      const inside = (e) => { for (let p = e.parentElement; p; p = p.parentElement)
        if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return true; };
      const wide = [...document.querySelectorAll('body *')]
        .filter((e) => e.getBoundingClientRect().right > width + 1 && !inside(e));
      return [document.documentElement.scrollWidth + ' px in ' + width,
        ...wide.slice(0, 3).map((e) => e.tagName.toLowerCase() + (e.className ? '.' + e.className : ''))];
    })()`,
  );
  if (wide.length > 0) found.push(`scrolls sideways: ${wide.join(', ')}`);
  cdp.listen(undefined);
  return found;
}

/** Types into the search field; whether a result shows. */
async function search(page) {
  const loaded = cdp.once('Page.loadEventFired', PAGE_DEADLINE);
  await page('Page.navigate', { url: `${origin}/index.html` });
  await loaded;
  return evaluate(
    page,
    `(async () => {
      document.querySelector('#tsd-search-trigger').click();
      // Typing waits until the typist pauses: so does this, and types again where the index was not there yet.
      for (let i = 0; i < 20; i++) {
        const input = document.querySelector('#tsd-search-input');
        if (input) {
          input.value = 'BlockStore';
          input.dispatchEvent(new Event('input', { bubbles: true }));
        }
        await new Promise((resolve) => setTimeout(resolve, 1000));
        const results = document.querySelector('#tsd-search-results');
        if (results?.textContent.includes('BlockStore')) return true;
      }
      return false;
    })()`,
  );
}

async function evaluate(page, expression) {
  const { result, exceptionDetails } = await page('Runtime.evaluate', {
    expression,
    awaitPromise: true,
    returnByValue: true,
  });
  if (exceptionDetails !== undefined) throw new Error(exceptionDetails.exception.description);
  return result.value;
}

/** The DevTools protocol over a pair of pipes: JSON, each message ended by a zero byte. */
function connect(output, input) {
  const waiting = new Map();
  const events = [];
  let listener;
  let ended;
  let next = 1;
  let rest = Buffer.alloc(0);
  const end = (error) => {
    ended ??= error;
    for (const { reject } of [...waiting.values(), ...events]) reject(ended);
  };
  output.on('error', end);
  input.on('data', (bytes) => {
    rest = Buffer.concat([rest, bytes]);
    for (let at = rest.indexOf(0); at >= 0; at = rest.indexOf(0)) {
      const message = JSON.parse(rest.subarray(0, at).toString());
      rest = rest.subarray(at + 1);
      const { id, method, params, result, error } = message;
      if (id !== undefined) {
        const { resolve, reject } = waiting.get(id);
        waiting.delete(id);
        if (error === undefined) resolve(result);
        else reject(new Error(error.message));
        continue;
      }
      listener?.(method, params);
      for (const event of events.filter((entry) => entry.method === method)) event.resolve(params);
    }
  });
  return {
    end,
    send(method, parameters = {}, sessionId) {
      if (ended !== undefined) return Promise.reject(ended);
      const id = next++;
      output.write(`${JSON.stringify({ id, method, params: parameters, sessionId })}\0`);
      return new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
    },
    /** Gets every event; undefined: nobody does. */
    listen(to) {
      listener = to;
    },
    once(method, milliseconds) {
      return new Promise((resolve, reject) => {
        const entry = { method, resolve: done(resolve), reject: done(reject) };
        const timer = setTimeout(
          () => entry.reject(new Error(`no ${method} in ${milliseconds} ms`)),
          milliseconds,
        );
        function done(settle) {
          return (value) => {
            clearTimeout(timer);
            events.splice(events.indexOf(entry), 1);
            settle(value);
          };
        }
        events.push(entry);
      });
    },
  };
}
