// SPDX-License-Identifier: Apache-2.0
/**
 * LIO's configfs by hand, apart from `tcmu/target`: the harness must be able to build, break and inspect
 * what the package builds. Every step runs in a child process, since the kernel may block it for ever.
 */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { Kit } from './kit.js';

export const targetRoot = '/sys/kernel/config/target';

export interface BackstoreOptions {
  name: string;
  hba?: string;
  /** `<subtype>/<rest>`. */
  config?: string;
  /** Bytes. */
  size: number;
  blockSize?: number;
  maxSectors?: number;
  /** Further `key=value` settings for `control`, in order. */
  extra?: readonly string[];
}

export class Configfs {
  readonly #kit: Kit;
  #nextWwn = 1;

  constructor(kit: Kit) {
    this.#kit = kit;
  }

  /** Where a backstore is. */
  backstore(name: string, hba = 'user_0'): string {
    return join(targetRoot, 'core', hba, name);
  }

  /** Where an existing backstore is, whatever its HBA. */
  find(name: string): string {
    const core = join(targetRoot, 'core');
    for (const hba of readdirSync(core)) {
      if (hba.startsWith('user_') && existsSync(join(core, hba, name)))
        return join(core, hba, name);
    }
    throw new Error(`no user backstore is named ${name}`);
  }

  async write(path: string, value: string): Promise<void> {
    await this.#kit.sh(`printf %s '${value}' > '${path}'`);
  }

  /** Makes and enables a user backstore; answers its configfs directory. */
  async create(options: BackstoreOptions): Promise<string> {
    const dir = this.backstore(options.name, options.hba);
    const settings = [
      `dev_config=${options.config ?? 'test/none'}`,
      `dev_size=${options.size}`,
      `hw_block_size=${options.blockSize ?? 512}`,
      `hw_max_sectors=${options.maxSectors ?? 2048}`,
      ...(options.extra ?? []),
    ];
    await this.#kit.sh(`mkdir -p '${dir}'`);
    await this.write(join(dir, 'control'), settings.join(','));
    await this.write(join(dir, 'enable'), '1');
    return dir;
  }

  /** `/dev/uioN` of a backstore, by its name in sysfs. */
  uio(name: string, hba = 'user_0'): string {
    const prefix = `tcm-user/${hba.slice('user_'.length)}/${name}`;
    for (const uio of listUio()) {
      const label = readFileSync(`/sys/class/uio/${uio}/name`, 'utf8').trim();
      if (label === prefix || label.startsWith(`${prefix}/`)) return `/dev/${uio}`;
    }
    throw new Error(`no uio device is named ${prefix}`);
  }

  /** Gives a backstore a loopback LUN; answers the disk. The handler must be serving by now. */
  async attachLoopback(backstore: string): Promise<{ disk: string; tpg: string }> {
    const wwn = (this.#nextWwn++).toString(16).padStart(9, '0');
    const tpg = join(targetRoot, 'loopback', `naa.5001405${wwn}`, 'tpgt_1');
    const before = new Set(this.#kit.disks());
    await this.#kit.sh(
      `mkdir -p '${tpg}' && printf naa.6001405${wwn} > '${tpg}/nexus' && mkdir -p '${tpg}/lun/lun_0' && ln -s '${backstore}' '${tpg}/lun/lun_0/store'`,
    );
    const disk = await this.#kit.waitFor('a new disk', () =>
      this.#kit.disks().find((name) => !before.has(name)),
    );
    return { disk, tpg };
  }

  /** Removes a backstore, and its HBA when it was the last. */
  async remove(backstore: string): Promise<void> {
    await this.#kit.sh(
      // A handler that sees its device go may be the first to take the empty folder away.
      `rmdir '${backstore}' && { rmdir --ignore-fail-on-non-empty '${dirname(backstore)}' || ` +
        `[ ! -e '${dirname(backstore)}' ]; }`,
    );
  }

  async detachLoopback(tpg: string): Promise<void> {
    await this.#kit.sh(
      `rm '${tpg}/lun/lun_0/store' && rmdir '${tpg}/lun/lun_0' && rmdir '${tpg}' && rmdir '${dirname(tpg)}'`,
      { timeoutSeconds: 60 },
    );
  }

  /** Everything of LIO that exists now: backstores, targets and uio devices. */
  leftovers(): string[] {
    const found = listUio().map((uio) => `/dev/${uio}`);
    const core = join(targetRoot, 'core');
    for (const hba of existsSync(core) ? readdirSync(core) : []) {
      if (!/^(user|fileio)_\d+$/.test(hba)) continue;
      for (const name of readdirSync(join(core, hba))) {
        if (!['hba_info', 'hba_mode'].includes(name)) found.push(join(core, hba, name));
      }
    }
    for (const fabric of ['loopback', 'iscsi', 'vhost']) {
      const dir = join(targetRoot, fabric);
      for (const wwn of existsSync(dir) ? readdirSync(dir) : []) {
        if (/^(naa|iqn|eui)\./.test(wwn)) found.push(join(dir, wwn));
      }
    }
    return found;
  }
}

export function listUio(): string[] {
  return existsSync('/sys/class/uio') ? readdirSync('/sys/class/uio') : [];
}
