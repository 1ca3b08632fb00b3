// SPDX-License-Identifier: Apache-2.0
/** The simulated kernel's thread and handles when an environment ends. */
import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';

const addon = JSON.stringify(
  fileURLToPath(new URL('../build/addon/Release/tcmu.node', import.meta.url)),
);

const PRELUDE = `
  const { SimDevice } = require(${addon});
  function simulate(commandTimeout = 0) {
    const sim = new SimDevice({
      ringBytes: 65536, dataBytes: 1 << 20, pagesPerBlock: 1, capabilities: 15, poison: -1,
      commandTimeout, queueFullTimeout: -1, tmrNotification: true, scrub: true, zeroCopyBytes: 0,
      zeroCopy: false, windowBytes: 0,
      finished: (count) => console.log('finished', count, sim.results[1] & 0xff),
    });
    return sim;
  }
  const submit = (sim, tag) =>
    sim.submit(tag, new Uint8Array(6), undefined, new Uint8Array(4096), 0);
`;

function run(script: string): { output: string; status: number | null; signal: string | null } {
  const { stdout, stderr, status, signal } = spawnSync(process.execPath, ['-e', PRELUDE + script], {
    encoding: 'utf8',
    timeout: 100_000,
  });
  return { output: stdout + stderr, status, signal };
}

const CLEAN = { status: 0, signal: null };

test('an idle device does not keep the process', () => {
  expect(run(`simulate();`)).toEqual({ output: '', ...CLEAN });
});

test('a pending command does, until it has ended', () => {
  const script = `submit(simulate(50), 1);`;
  expect(run(script)).toEqual({ output: 'finished 1 2\n', ...CLEAN });
});

test('close delivers what is pending before it returns', () => {
  const script = `
    const sim = simulate();
    submit(sim, 1);
    submit(sim, 2);
    sim.close();
    console.log('closed');`;
  expect(run(script)).toEqual({ output: 'finished 2 2\nclosed\n', ...CLEAN });
});

test('process.exit with commands in flight', () => {
  const script = `
    const sim = simulate();
    sim.open();
    for (let i = 0; i < 300; i++) submit(sim, i);
    process.exit(0);`;
  expect(run(script)).toEqual({ output: '', ...CLEAN });
});

test('an uncaught exception in the callback', () => {
  const script = `
    process.once('uncaughtException', (error) => console.log(error.message));
    const sim = new SimDevice({
      ringBytes: 65536, dataBytes: 1 << 20, pagesPerBlock: 1, capabilities: 15, poison: -1,
      commandTimeout: 10, queueFullTimeout: -1, tmrNotification: true, scrub: true, zeroCopyBytes: 0,
      zeroCopy: false, windowBytes: 0,
      finished: () => { throw new Error('thrown'); },
    });
    submit(sim, 1);`;
  expect(run(script)).toEqual({ output: 'thrown\n', ...CLEAN });
});

test('worker.terminate() under I/O, again and again', () => {
  const script = `
    const { Worker } = require('node:worker_threads');
    const code = ${JSON.stringify(PRELUDE)} + \`
      const sim = simulate(1);
      sim.open();
      let tag = 0;
      setInterval(() => { for (let i = 0; i < 100; i++) submit(sim, tag++); }, 1);
      require('node:worker_threads').parentPort.postMessage('up');\`;
    (async () => {
      for (let i = 0; i < 10; i++) {
        const worker = new Worker(code, { eval: true, stdout: true });
        await new Promise((resolve) => worker.once('message', resolve));
        await new Promise((resolve) => setTimeout(resolve, 10 * (i % 4)));
        await worker.terminate();
      }
      console.log('done');
    })();`;
  expect(run(script)).toEqual({ output: 'done\n', ...CLEAN });
});
