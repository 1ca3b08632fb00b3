// SPDX-License-Identifier: Apache-2.0
/**
 * Commands to a running server, over a UNIX socket: one JSON request a line, one JSON answer a line. Who
 * may use it is decided by the socket's permissions: its owner.
 */
import { rm } from 'node:fs/promises';
import { createConnection, createServer, type Server } from 'node:net';
import { createInterface } from 'node:readline';
import { TcmuError } from 'tcmu';
import type { SnapshotAction } from './options.js';

export type Request = SnapshotAction | { action: 'resize'; size: number };
export type Answer = { result: unknown } | { error: string };

/** Longer requests are refused: nobody has so long a name. */
const MAX_REQUEST = 128 * 1024;

/** Answers requests at `path` one after the other, until closed. */
export async function listen(
  path: string,
  handle: (request: Request) => Promise<unknown>,
): Promise<Server> {
  // A socket that a killed server left; anything else makes listening fail.
  await new Promise<void>((resolve, reject) => {
    const probe = createConnection(path, () => {
      probe.destroy();
      reject(new Error(`--control ${path}: another server listens there`));
    });
    probe.on('error', () => resolve());
  });
  await rm(path, { force: true });
  let last: Promise<unknown> = Promise.resolve();
  const server = createServer((socket) => {
    socket.on('error', () => {});
    let received = 0;
    socket.on('data', (part: Buffer) => {
      received += part.length;
      if (received > MAX_REQUEST) socket.destroy();
    });
    createInterface(socket).on('line', (line) => {
      received = 0;
      last = last
        .then(() => respond(line, handle))
        .then((answer) => {
          if (!socket.destroyed) socket.write(`${JSON.stringify(answer)}\n`);
        });
    });
  });
  // The socket is made by `listen` itself, at once: never a moment when others may connect.
  const mask = process.umask(0o177);
  try {
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen(path, resolve);
      process.umask(mask);
    });
  } finally {
    process.umask(mask);
  }
  return server;
}

async function respond(
  line: string,
  handle: (request: Request) => Promise<unknown>,
): Promise<Answer> {
  try {
    return { result: (await handle(checked(JSON.parse(line)))) ?? null };
  } catch (error) {
    return { error: (error as Error).message };
  }
}

function checked(request: unknown): Request {
  const { action, name, size } = (request ?? {}) as Record<string, unknown>;
  if (action === 'list') return { action };
  if (action === 'resize' && typeof size === 'number') return { action, size };
  const named = action === 'create' || action === 'revert' || action === 'delete';
  if (named && typeof name === 'string') return { action, name };
  throw new Error('this request is not understood');
}

/** Sends one request. @throws TcmuError with what the server says is wrong */
export async function send(path: string, request: Request): Promise<unknown> {
  const socket = createConnection(path);
  try {
    socket.write(`${JSON.stringify(request)}\n`);
    for await (const line of createInterface(socket)) {
      const answer = JSON.parse(line) as Answer;
      if ('error' in answer) throw refusal(answer.error);
      return answer.result;
    }
    throw refusal(`--control ${path}: the server ended without an answer`);
  } finally {
    socket.destroy();
  }
}

function refusal(message: string): TcmuError {
  return new TcmuError('ERR_TCMU_QCOW_CONTROL', message);
}
