// SPDX-License-Identifier: Apache-2.0
import { describe, expect, it } from 'vitest';
import { GroupSync } from '../src/group-sync.js';

/** A sync that settles when told to. */
class ManualSync {
  readonly calls: { resolve(): void; reject(error: Error): void }[] = [];
  most = 0;
  #running = 0;

  readonly run = (): Promise<void> => {
    this.most = Math.max(this.most, ++this.#running);
    return new Promise<void>((resolve, reject) => this.calls.push({ resolve, reject })).finally(
      () => {
        this.#running--;
      },
    );
  };
}

function grouped(run: () => void | Promise<void>) {
  const failures: unknown[] = [];
  const group = new GroupSync(run, (cause) => {
    failures.push(cause);
    return new Error('final', { cause });
  });
  return { group, failures };
}

describe('GroupSync', () => {
  it('answers at once when the sync does', () => {
    const { group } = grouped(() => {});
    expect(group.sync()).toBeUndefined();
  });

  it('gives later callers a sync that began after they called, one for all of them', async () => {
    const manual = new ManualSync();
    const { group } = grouped(manual.run);
    const settled: string[] = [];
    const wait = (name: string) => Promise.resolve(group.sync()).then(() => settled.push(name));
    const first = wait('first');
    const others = [wait('second'), wait('third')];
    expect(manual.calls).toHaveLength(1);
    manual.calls[0]?.resolve();
    await first;
    expect(settled).toEqual(['first']);
    // Joins the one that has not begun, or gets one of its own; never the first.
    const late = wait('fourth');
    while (manual.calls.length < 2) await null;
    manual.calls[1]?.resolve();
    await Promise.all(others);
    manual.calls[2]?.resolve();
    await late;
    expect(manual.most).toBe(1);
    expect(settled).toEqual(['first', 'second', 'third', 'fourth']);
  });

  it('never runs two syncs at once, whenever callers come', async () => {
    const manual = new ManualSync();
    const { group } = grouped(manual.run);
    const all: Promise<void>[] = [];
    for (let round = 0; round < 50; round++) {
      all.push(Promise.resolve(group.sync()));
      if (round % 3 === 0) manual.calls.at(-1)?.resolve();
      for (let turn = 0; turn < round % 7; turn++) await null;
    }
    const done = Promise.all(all);
    let open = true;
    void done.then(() => {
      open = false;
    });
    while (open) {
      for (const call of manual.calls) call.resolve();
      await null;
    }
    expect(manual.most).toBe(1);
  });

  it('fails for ever after one failure, those who waited included, and reports it once', async () => {
    const manual = new ManualSync();
    const { group, failures } = grouped(manual.run);
    const eio = new Error('EIO');
    const waiting = [group.sync(), group.sync(), group.sync()].map((sync) =>
      Promise.resolve(sync).then(
        () => 'durable',
        (error: Error) => error.cause,
      ),
    );
    manual.calls[0]?.reject(eio);
    expect(await Promise.all(waiting)).toEqual([eio, eio, eio]);
    expect(() => group.sync()).toThrow('final');
    expect(group.failure?.cause).toBe(eio);
    expect(failures).toEqual([eio]);
    expect(manual.calls).toHaveLength(1);
  });

  it('fails for ever after a sync that threw', () => {
    let calls = 0;
    const { group } = grouped(() => {
      calls++;
      throw new Error('EIO');
    });
    expect(() => group.sync()).toThrow('final');
    expect(() => group.sync()).toThrow('final');
    expect(calls).toBe(1);
  });
});
