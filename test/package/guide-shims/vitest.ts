// SPDX-License-Identifier: Apache-2.0
/** `vitest` for the guides' blocks, which run outside of it: the few calls they make. */
import { deepStrictEqual } from 'node:assert';

export async function test(_name: string, run: () => unknown): Promise<void> {
  await run();
}

export function expect(actual: unknown) {
  return {
    toEqual: (expected: unknown) => deepStrictEqual(actual, expected),
    toBe: (expected: unknown) => deepStrictEqual(actual, expected),
    rejects: {
      toMatchObject: async (expected: Record<string, unknown>) => {
        const error = await (actual as Promise<unknown>).then(
          () => undefined,
          (error: Record<string, unknown>) => error,
        );
        for (const [key, value] of Object.entries(expected)) deepStrictEqual(error?.[key], value);
      },
    },
  };
}
