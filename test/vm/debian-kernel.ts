// SPDX-License-Identifier: Apache-2.0
/**
 * Finds a Debian kernel with its modules: the installed one if there is one, else a copy unpacked from the package
 * `linux-image-amd64` depends on, kept below the repository's build directory. Nothing is installed on the host.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, renameSync, rmSync } from 'node:fs';
import { join } from 'node:path';

export interface Kernel {
  /** As `uname -r` prints it inside. */
  readonly release: string;
  /** The bootable image. */
  readonly image: string;
  /** The directory that holds `modules.dep`, readable on the host. */
  readonly modules: string;
}

const META_PACKAGE = 'linux-image-amd64';
/** Left out of cloud images, so it tells a usable kernel from one that is not. */
const NEEDED_MODULE = 'kernel/drivers/target/target_core_user.ko';

/**
 * @param cache directory the unpacked kernel is kept in
 * @param release the one wanted; default: the newest there is, else what `linux-image-amd64` leads to
 * @throws Error naming the step that failed and the package to install by hand
 */
export function debianKernel(cache: string, release?: string): Kernel {
  return kernelIn('/', release) ?? newestUnpacked(cache, release) ?? unpack(cache, release);
}

function kernelIn(root: string, wanted?: string): Kernel | undefined {
  const boot = join(root, 'boot');
  if (!existsSync(boot)) return undefined;
  return readdirSync(boot)
    .filter((name) => name.startsWith('vmlinuz-'))
    .map((name) => name.slice('vmlinuz-'.length))
    .filter((release) => wanted === undefined || release === wanted)
    .sort((a, b) => b.localeCompare(a, 'en', { numeric: true }))
    .map((release) => ({
      release,
      image: join(boot, `vmlinuz-${release}`),
      modules: join(root, 'lib/modules', release),
    }))
    .find(
      ({ modules }) =>
        existsSync(join(modules, 'modules.dep')) &&
        (existsSync(join(modules, NEEDED_MODULE)) ||
          existsSync(join(modules, `${NEEDED_MODULE}.xz`))),
    );
}

function newestUnpacked(cache: string, wanted?: string): Kernel | undefined {
  if (!existsSync(cache)) return undefined;
  return readdirSync(cache)
    .filter((name) => name.startsWith('linux-image-'))
    .sort((a, b) => b.localeCompare(a, 'en', { numeric: true }))
    .map((name) => kernelIn(join(cache, name), wanted))
    .find((kernel) => kernel !== undefined);
}

function unpack(cache: string, wanted?: string): Kernel {
  mkdirSync(cache, { recursive: true });
  // A directory of its own, renamed at the end: an interrupted run leaves nothing that looks complete.
  const work = mkdtempSync(join(cache, 'unpack-'));
  try {
    const name =
      wanted === undefined
        ? /^\s*Depends: (linux-image-\S+)$/m.exec(run('apt-cache', ['depends', META_PACKAGE]))?.[1]
        : `linux-image-${wanted}`;
    if (!name)
      throw new Error(`apt knows no ${META_PACKAGE}: run apt-get update, or install a kernel`);
    run('apt-get', ['-qq', '-o', 'APT::Sandbox::User=root', 'download', name], work);
    const archive = readdirSync(work).find((file) => file.endsWith('.deb'));
    if (!archive) throw new Error(`apt-get download ${name} left no package in ${work}`);
    const root = join(work, 'root');
    run('dpkg', ['-x', join(work, archive), root]);
    const release = name.slice('linux-image-'.length);
    run('depmod', ['-b', root, release]);
    const target = join(cache, name);
    rmSync(target, { recursive: true, force: true });
    renameSync(root, target);
    const kernel = kernelIn(target);
    if (!kernel) throw new Error(`${name} holds no ${NEEDED_MODULE}`);
    return kernel;
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

function run(command: string, args: readonly string[], cwd?: string): string {
  try {
    return execFileSync(command, args, {
      cwd,
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'pipe'],
    });
  } catch (cause) {
    const detail = (cause as { stderr?: string }).stderr?.trim() || String(cause);
    throw new Error(
      `${command} ${args.join(' ')}: ${detail} (needed for a kernel to boot; or install ${META_PACKAGE})`,
      { cause },
    );
  }
}
