#!/usr/bin/env node
// SPDX-License-Identifier: Apache-2.0
/**
 * `npx tcmu`: what to run before there is a handler, and when one misbehaves.
 *
 * Exit codes: 0 fine; 1 something is missing, or was found to be wrong; 2 wrong usage.
 */
import { readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';
import { describe, examine } from './doctor.js';
import { decodeRing, describeRing, readRingOf } from './ring-dump.js';

const USAGE = `Usage: tcmu COMMAND

  doctor [--json] [--root DIR]   what this machine lacks for serving devices, and the commands that mend it
  ring [--json] PID | FILE       decodes the ring of the process that serves a device, or of a file with the
                                 start of its memory: the mailbox, and the commands in flight
  compile [--debug]              compiles the native addon, where the package has no binary for the machine;
                                 --debug: without optimization, for a debugger
  --help, --version

Exit codes: 0 fine, 1 something is missing or wrong, 2 wrong usage.
`;

async function main(args: readonly string[]): Promise<number> {
  let parsed: ReturnType<typeof parse>;
  try {
    parsed = parse(args);
  } catch (error) {
    process.stderr.write(`tcmu: ${(error as Error).message}\n\n${USAGE}`);
    return 2;
  }
  const { values, positionals } = parsed;
  const [command, ...rest] = positionals;
  if (values.help) {
    process.stdout.write(USAGE);
    return 0;
  }
  if (values.version) {
    const { version } = JSON.parse(readFileSync(join(packageFolder(), 'package.json'), 'utf8'));
    process.stdout.write(`${version}\n`);
    return 0;
  }
  if (command === 'doctor' && rest.length === 0) {
    const diagnosis = examine({
      root: values.root ?? '/',
      platform: process.platform,
      arch: process.arch,
      node: process.version,
      uid: process.geteuid?.() ?? -1,
      // Imported here: without the addon the rest of this command still works.
      addonFailure: await import('../native.js').then(
        () => undefined,
        (error: Error) => error,
      ),
    });
    process.stdout.write(
      values.json ? `${JSON.stringify(diagnosis, null, 2)}\n` : describe(diagnosis),
    );
    return diagnosis.ok ? 0 : 1;
  }
  if (command === 'ring' && rest.length === 1) return ring(rest[0] as string, values.json === true);
  if (command === 'compile' && rest.length === 0) {
    const script = pathToFileURL(join(packageFolder(), 'scripts/compile.mjs')).href;
    const { compileAddon } = (await import(script)) as {
      compileAddon: (options: { debug: boolean }) => string;
    };
    process.stdout.write(`compiled ${compileAddon({ debug: values.debug === true })}\n`);
    return 0;
  }
  process.stderr.write(USAGE);
  return 2;
}

function parse(args: readonly string[]) {
  return parseArgs({
    args: [...args],
    allowPositionals: true,
    options: {
      debug: { type: 'boolean' },
      json: { type: 'boolean' },
      root: { type: 'string' },
      help: { type: 'boolean', short: 'h' },
      version: { type: 'boolean' },
    },
  });
}

function ring(source: string, json: boolean): number {
  const memory = /^\d+$/.test(source) ? readRingOf(Number(source)) : readFileSync(source);
  const dump = decodeRing(memory);
  if (json) {
    const hex = (_key: string, value: unknown): unknown =>
      value instanceof Uint8Array ? Buffer.from(value).toString('hex') : value;
    process.stdout.write(`${JSON.stringify(dump, hex, 2)}\n`);
  } else process.stdout.write(describeRing(dump));
  return dump.problems.length === 0 ? 0 : 1;
}

/** The package's root: this file is `dist/cli.js`. */
function packageFolder(): string {
  return dirname(dirname(fileURLToPath(import.meta.url)));
}

main(process.argv.slice(2)).then(
  (code) => {
    process.exitCode = code;
  },
  (error: Error) => {
    process.stderr.write(`${error.message}\n`);
    process.exitCode = 1;
  },
);
