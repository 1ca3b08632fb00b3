// SPDX-License-Identifier: Apache-2.0
/**
 * What a scenario is: one boot of a real kernel, one thing that must hold there.
 *
 * Contract: `run` executes inside the guest, as root, and fails by throwing. Scenario files import nothing of
 * the package under test: handlers run in processes of their own (the file example's command line, or a
 * script of `programs/`), so that they can be killed, and so that a list of scenarios needs no build.
 */
import type { Kit } from './kit.js';

export interface Scenario {
  /** Dotted, `<subject>.<case>`; unique. What `npm run test:kernel -- <part of it>` matches. */
  readonly name: string;
  /** What must hold, in one line. */
  readonly about: string;
  /** Limit for `run` alone. Default 120. */
  readonly timeoutSeconds?: number;
  /** Guest memory in MiB; half of it is the tmpfs that backing files live on. Default 1024. */
  readonly memoryMb?: number;
  /** Debian packages of scripts/packages.json it needs besides those for `kernel`. */
  readonly packages?: readonly string[];
  /** Modules to load besides the usual ones. */
  readonly modules?: readonly string[];
  /**
   * Kernel log lines that this scenario causes on purpose; any other sign of trouble there fails it.
   */
  readonly expectedInKernelLog?: RegExp;
  run(kit: Kit): Promise<void>;
}

/** Types a scenario where it is written. */
export function scenario(definition: Scenario): Scenario {
  return definition;
}
