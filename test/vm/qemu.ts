// SPDX-License-Identifier: Apache-2.0
/**
 * Boots Debian's own kernel in QEMU, without KVM, and runs one command in it as root: for kernel modules, and for figures
 * that repeat.
 *
 * Contract: the guest sees the host's root over 9p below an overlay on its own tmpfs, so every file of the host is there and
 * nothing written reaches the host, but for `outDir`, which is /run/out. Files named `hot` are part of the initramfs and thereby
 * of the overlay's upper layer, as an open or a page fault over 9p costs milliseconds. One CPU. No privilege is needed on
 * the host. The machine never outlives the promise, nor this process. x86-64 hosts and guests only.
 */
import { execFileSync, spawn } from 'node:child_process';
import {
  closeSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  realpathSync,
  rmSync,
  statSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { CpioWriter } from './cpio.js';
import { debianKernel, type Kernel } from './debian-kernel.js';
import {
  baseModules,
  kernelProblems,
  LineSplitter,
  ownGroup,
  shellQuote,
  type VmOptions,
  type VmResult,
} from './vm.js';

export interface QemuOptions extends VmOptions {
  /** Directory that keeps an unpacked kernel between runs. */
  cacheDir: string;
  /** Release of the Debian kernel to boot, or another kernel. Default: Debian's newest. */
  kernel?: string | Kernel;
  /**
   * Count instructions: the guest's clock advances 4 ns with each instruction and stands still otherwise, so guest times repeat
   * to 1–2 % whatever the host does. Guest seconds then take two to four of the host's.
   */
  icount?: boolean;
  /** Files and directories the command uses often; the shared libraries of executables among them come along. */
  hot?: readonly string[];
  /** Virtual processors, without `icount`. Default 1. */
  cpus?: number;
  /** Kernel parameters to add. */
  append?: string;
}

/** What the guest needs before it sees the host's files; dependencies and those built in are worked out. */
const bootModules = ['virtio_pci', 'virtio_console', '9pnet_virtio', '9p', 'overlay'];
const bootTools = ['sh', 'mount', 'insmod', 'chroot'];

const machine = [
  ['-M', 'q35,hpet=off,usb=off,sata=off,smbus=off'],
  ['-cpu', 'max,la57=off,smap=off,smep=off,erms=off,fsrm=off'],
  ['-nodefaults', '-no-user-config', '-no-reboot', '-display', 'none'],
].flat();
const fast = ['-accel', 'tcg,thread=multi,tb-size=512'];
const counting = [
  ['-accel', 'tcg,thread=single,tb-size=512'],
  ['-icount', 'shift=2,align=off,sleep=on'],
].flat();
const parameters = [
  'console=ttyS0 loglevel=3 panic=-1 log_buf_len=1M',
  'mitigations=off nokaslr audit=0 tsc=reliable nowatchdog clearcpuid=rep_good',
].join(' ');
const mountOptions = 'trans=virtio,version=9p2000.L,msize=512000';

/** Where the program is, or undefined when the package is not installed. */
export function findQemu(): string | undefined {
  return ['/usr/bin', '/usr/local/bin']
    .map((dir) => join(dir, 'qemu-system-x86_64'))
    .find((file) => existsSync(file));
}

/**
 * Runs one command in a machine of its own.
 *
 * @throws Error when QEMU can't be started or no kernel can be had; a guest that dies is a result without exit code
 */
export async function runQemu(options: QemuOptions): Promise<VmResult> {
  const qemu = findQemu();
  if (qemu === undefined) {
    throw new Error(
      'qemu-system-x86_64 is not installed; on Debian: apt-get install qemu-system-x86',
    );
  }
  const kernel =
    typeof options.kernel === 'object'
      ? options.kernel
      : debianKernel(options.cacheDir, options.kernel);
  const dir = mkdtempSync(join(tmpdir(), 'tcmu-qemu-'));
  const cleanUp = () => rmSync(dir, { recursive: true, force: true });
  process.once('exit', cleanUp); // A signal ends the process without the finally below.
  const started = process.hrtime.bigint();
  try {
    writeInitramfs(join(dir, 'initramfs'), kernel, options);
    mkdirSync(join(dir, 'result'));
    const { output, complaint, timedOut } = await boot(qemu, kernel, dir, options);
    const read = (name: string) => {
      const file = join(dir, name);
      return existsSync(file) ? readFileSync(file, 'utf8').replaceAll('\r', '') : undefined;
    };
    const code = read('result/exit')?.trim();
    // A guest that dies leaves only what the kernel put on its console, or QEMU's own complaint.
    const kernelLog = read('result/dmesg') ?? `${read('console') ?? ''}${complaint}`;
    return {
      exitCode: code ? Number(code) : undefined,
      timedOut,
      output,
      kernelLog,
      kernelProblems: kernelProblems(kernelLog),
      seconds: Number(process.hrtime.bigint() - started) / 1e9,
    };
  } finally {
    process.removeListener('exit', cleanUp);
    cleanUp();
  }
}

async function boot(qemu: string, kernel: Kernel, dir: string, options: QemuOptions) {
  const child = spawn(
    qemu,
    [
      ...machine,
      ...(options.icount ? counting : fast),
      ...['-smp', String(options.icount ? 1 : (options.cpus ?? 1))],
      ...['-m', String(options.memoryMb ?? 2048)],
      ...['-kernel', kernel.image, '-initrd', join(dir, 'initramfs')],
      ...['-append', `${parameters} ${options.append ?? ''}`],
      ...['-serial', `file:${join(dir, 'console')}`],
      ...['-device', 'virtio-serial-pci', '-chardev', 'stdio,id=output,signal=off'],
      ...['-device', 'virtserialport,chardev=output'],
      ...share('root', '/', 'readonly=on'),
      ...share('result', join(dir, 'result')),
      ...(options.outDir === undefined ? [] : share('out', resolve(options.outDir))),
    ],
    // With an open stdin: at its end QEMU takes the chardev for disconnected, and the guest's writes block.
    { detached: true, stdio: 'pipe' },
  );
  const kill = ownGroup(child);
  let timedOut = false;
  const limit = setTimeout(
    () => {
      timedOut = true;
      kill();
    },
    (options.timeoutSeconds ?? 120) * 1000,
  );
  let output = '';
  let complaint = '';
  const lines = new LineSplitter((line) => {
    output += `${line}\n`;
    options.onLine?.(line);
  });
  child.stdout.setEncoding('utf8').on('data', (text: string) => lines.push(text));
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    complaint += text;
  });
  try {
    await new Promise<void>((done, failed) => {
      child.once('error', failed);
      child.once('close', () => done());
    });
  } finally {
    clearTimeout(limit);
    kill();
  }
  lines.end();
  return { output, complaint, timedOut };
}

function share(tag: string, path: string, extra?: string): string[] {
  // Commas in an option's value are written twice.
  const option = `local,path=${path.replaceAll(',', ',,')},mount_tag=${tag},security_model=none`;
  return ['-virtfs', `${option},multidevs=remap${extra ? `,${extra}` : ''}`];
}

function writeInitramfs(path: string, kernel: Kernel, options: QemuOptions): void {
  using archive = new CpioWriter(path);
  for (const dir of ['dev', 'proc', 'sys', 'lower', 'root', 'work', 'upper'])
    archive.directory(dir);
  archive.characterDevice('dev/console', 5, 1);
  // At the paths they are looked up by, so links are followed, not copied.
  for (const file of withLibraries(bootTools.map(findTool))) archive.file(file, file);
  const modules = inLoadingOrder(kernel, bootModules);
  modules.forEach((module, index) => {
    archive.file(`modules/${index}.ko`, join(kernel.modules, module));
  });
  archive.text('init', initScript(modules.length), 0o755);
  archive.text('upper/.vm/run', runScript(options), 0o755);
  const hot = withLibraries((options.hot ?? []).flatMap(filesBelow));
  for (const file of new Set([...hot].map((name) => realpathSync(name)))) {
    archive.file(join('upper', file), file);
  }
  // Where modprobe looks. What the host has there belongs to another kernel.
  const modulesDir = join(realpathSync('/lib'), 'modules');
  const own = realpathSync(dirname(kernel.modules));
  if (own !== modulesDir) archive.symlink(join('upper', modulesDir), own);
  archive.finish();
}

/** PID 1 until the host's root is there. The initramfs's own files are the overlay's upper layer, so nothing is copied twice. */
function initScript(modules: number): string {
  return `#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -n -t proc proc /proc
mount -n -t sysfs sysfs /sys
mount -n -t devtmpfs devtmpfs /dev
i=0
while [ $i -lt ${modules} ]; do insmod /modules/$i.ko; i=$((i + 1)); done
mount -n -t 9p -o ro,${mountOptions},cache=loose root /lower
mount -n -t overlay -o lowerdir=/lower,upperdir=/upper,workdir=/work root /root
for dir in dev proc sys; do mount -n --move /$dir /root/$dir; done
cd /root
mount -n --move . /
# What switch_root does, without removing the initramfs: it holds the upper layer. PID 1 itself changes its root, so that
# programs which the kernel starts (modprobe) find the new one too.
exec chroot . /.vm/run
`;
}

function runScript(options: QemuOptions): string {
  const env = Object.entries(options.env ?? {}).map(
    ([name, value]) => `export ${name}=${shellQuote(value)}`,
  );
  return `#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
exec </dev/null >/dev/vport0p1 2>&1
mount -t tmpfs tmpfs /run
mkdir -p /dev/pts /dev/shm /run/out /run/result /run/lock /run/dbus /etc/target/pr /etc/target/alua
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t 9p -o ${mountOptions},cache=none result /run/result
${options.outDir === undefined ? '' : `mount -t 9p -o ${mountOptions},cache=none out /run/out`}
ip link set lo up
for module in ${(options.modules ?? baseModules).join(' ')}; do
  modprobe $module || echo "vm: no module $module"
done
[ ! -d /sys/kernel/config ] || mount -t configfs configfs /sys/kernel/config
${env.join('\n')}
cd ${shellQuote(resolve(options.cwd ?? '.'))} && ${options.command.map(shellQuote).join(' ')}
code=$?
dmesg >/run/result/dmesg
echo $code >/run/result/exit
echo o >/proc/sysrq-trigger
sleep 60
`;
}

function findTool(name: string): string {
  const found = ['/bin', '/sbin', '/usr/bin', '/usr/sbin']
    .map((dir) => join(dir, name))
    .find((file) => existsSync(file));
  if (found === undefined) throw new Error(`${name} is missing; a guest can't boot without it`);
  return found;
}

function filesBelow(path: string): string[] {
  if (!statSync(path).isDirectory()) return [path];
  return readdirSync(path, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name));
}

/** The files, and what the dynamic loader maps for those that are executables or shared objects. */
function withLibraries(files: readonly string[]): Set<string> {
  const all = new Set(files);
  for (const file of files.filter(isElf)) {
    let listing: string;
    try {
      listing = execFileSync('ldd', [file], {
        encoding: 'utf8',
        stdio: ['ignore', 'pipe', 'ignore'],
      });
    } catch {
      continue; // Linked statically.
    }
    for (const [, library] of listing.matchAll(/(?:=> |^\s*)(\/\S+) \(0x/gm)) {
      if (library) all.add(library);
    }
  }
  return all;
}

function isElf(file: string): boolean {
  const head = Buffer.alloc(4);
  const fd = openSync(file, 'r');
  try {
    readSync(fd, head);
  } finally {
    closeSync(fd);
  }
  return head.toString('latin1') === '\x7fELF';
}

/** Paths below the module directory, each after what it depends on. */
function inLoadingOrder(kernel: Kernel, names: readonly string[]): string[] {
  const needs = new Map<string, string[]>();
  for (const line of readFileSync(join(kernel.modules, 'modules.dep'), 'utf8').split('\n')) {
    const [path, list = ''] = line.split(':');
    if (path) needs.set(path, list.split(' ').filter(Boolean));
  }
  const order = new Set<string>();
  for (const name of names) {
    const file = new RegExp(`/${name.replaceAll('_', '[-_]')}\\.ko`);
    const path = [...needs.keys()].find((candidate) => file.test(candidate));
    if (path === undefined) continue; // Built in.
    // modules.dep lists the nearest dependency first.
    for (const need of (needs.get(path) ?? []).slice().reverse()) order.add(need);
    order.add(path);
  }
  return [...order];
}
