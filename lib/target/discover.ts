// SPDX-License-Identifier: Apache-2.0
/**
 * What is there: every user backstore, enabled or not, with its settings, its uio device and the LUNs that
 * lead to it. Reads only.
 */
import type { TargetError } from '../errors.js';
import { Backstore, type BackstoreSettings, userHbas } from './backstore.js';
import { isProblem, localHost, type TargetHost } from './host.js';
import { allLuns, type LunLink } from './luns.js';
import { findUio } from './uio.js';

/** One backstore of the machine, with what was read of it. */
export interface FoundBackstore {
  /** To configure, recover or remove it by. */
  backstore: Backstore;
  /** As they were when it was looked at. */
  settings: BackstoreSettings;
  /** Through which fabrics it is reachable. */
  luns: LunLink[];
}

/** What `discover` found. */
export interface Discovery {
  /** Of all `user_N`. */
  backstores: FoundBackstore[];
  /** What could not be looked at, such as a `user_N` that is held by a removal stuck in the kernel. */
  problems: TargetError[];
}

/** Attributes of `user_N`; all else in it is a backstore. */
const HBA_ATTRIBUTES: readonly string[] = ['hba_info', 'hba_mode'];

/**
 * Finds all user backstores of the machine.
 *
 * @throws TargetError only when nothing at all can be read
 */
export async function discover(host: TargetHost = localHost): Promise<Discovery> {
  const [hbas, luns] = await Promise.all([userHbas(host), allLuns(host)]);
  const problems: TargetError[] = [];
  const found = await Promise.all(
    hbas.map(async (hba) => {
      const names = await host
        .list(host.target('core', `user_${hba}`))
        .catch((error: unknown) => noteProblem(problems, error, []));
      const backstores = names
        .filter((name) => !HBA_ATTRIBUTES.includes(name))
        .map((name) => look(host, hba, name, luns, problems));
      return Promise.all(backstores);
    }),
  );
  return { backstores: found.flat().filter((entry) => entry !== undefined), problems };
}

async function look(
  host: TargetHost,
  hba: number,
  name: string,
  luns: readonly LunLink[],
  problems: TargetError[],
): Promise<FoundBackstore | undefined> {
  try {
    const backstore = new Backstore(host, hba, name, await findUio(host, hba, name));
    return {
      backstore,
      settings: await backstore.settings(),
      luns: luns.filter((lun) => lun.backstore === backstore.path),
    };
  } catch (error) {
    // Removed while it was looked at: not there.
    return isProblem(error, 'NOT_FOUND') ? undefined : noteProblem(problems, error, undefined);
  }
}

function noteProblem<T>(problems: TargetError[], error: unknown, otherwise: T): T {
  problems.push(error as TargetError);
  return otherwise;
}
