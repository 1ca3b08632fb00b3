// SPDX-License-Identifier: Apache-2.0
/**
 * A kernel's LIO in a temporary directory, for the unit tests of `tcmu/target`: configfs folders that come
 * with their attributes, attributes that take values as Linux 6.1 does, uio and SCSI devices in sysfs.
 *
 * What changes something goes through `calls`, as in the addon; `failures` makes any of it fail or hang.
 */
import {
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join, relative, resolve } from 'node:path';
import type { NativeNetlinkOptions } from '../lib/native.js';
import { type KernelCalls, TargetHost, type TargetHostOptions } from '../lib/target/host.js';
import { FakeNetlink } from './target-fake-netlink.js';

type CallName = Parameters<KernelCalls['blockingCall']>[0];

export interface Call {
  call: CallName;
  /** Below configfs' target folder, or below /sys. */
  path: string;
  data: string | undefined;
}

/** errno to fail with, `hang` to never come back, undefined to go on. */
export type Failure = (call: Call) => string | undefined;

const USER_ATTRIBUTES: Record<string, string> = {
  dev_config: '',
  dev_size: '0',
  hw_block_size: '0',
  hw_max_sectors: '0',
  nl_reply_supported: '0',
  max_data_area_mb: '1024',
  data_pages_per_blk: '1',
  cmd_ring_size_mb: '8',
  cmd_time_out: '30',
  qfull_time_out: '-1',
  emulate_write_cache: '0',
  tmr_notification: '0',
};
/** With the patches of `kernel/`. */
const ZERO_COPY_ATTRIBUTES: Record<string, string> = {
  zero_copy: '0',
  zc_area_mb: '256',
  zc_scrub: '1',
  zc_min_bytes: '0',
  zc_stats: 'cmds 7\ncopied 6\nnospace 5\nfaults 4\ndenied 3\nzaps 2\nscrubbed 1',
};
const GLOBAL_MAX_MB = 2048;
const READ_ONLY = [
  'max_data_area_mb',
  'data_pages_per_blk',
  'cmd_ring_size_mb',
  'hw_max_sectors',
  'zero_copy',
  'zc_area_mb',
  'zc_stats',
];

class FakeHost extends TargetHost {
  readonly #kernel: FakeKernel;

  constructor(kernel: FakeKernel, options: TargetHostOptions) {
    super(options);
    this.#kernel = kernel;
  }

  override async deviceNumber(path: string): Promise<string | undefined> {
    return this.#kernel.nodes.get(basename(path));
  }

  override async claimed(path: string): Promise<boolean | undefined> {
    const { claimed } = this.#kernel;
    return claimed.has(basename(path)) ? claimed.get(basename(path)) : false;
  }
}

export class FakeKernel {
  readonly root: string;
  readonly host: TargetHost;
  readonly netlink: FakeNetlink;
  /** Everything that was called, in order. */
  readonly log: Call[] = [];
  failures: Failure = () => undefined;
  /** Modules that can be found. */
  readonly modules = new Set(['target_core_user', 'tcm_loop', 'iscsi_target_mod', 'vhost_scsi']);
  /** Attributes that this kernel is too old for. */
  readonly lacks = new Set<string>();
  /** Device nodes: name → major:minor. */
  readonly nodes = new Map<string, string>();
  /** Disks that are mounted, or that don't answer (undefined). */
  readonly claimed = new Map<string, boolean | undefined>();
  /** The module has zero copy. */
  zeroCopy = false;
  /** Makes device nodes as devtmpfs does. */
  makesNodes = true;
  /** A handler answers INQUIRY. */
  handlerAnswers = true;
  /** SCSI peripheral device type of new LUNs. */
  deviceType = 0;
  #nextIndex = 1;

  constructor(options: TargetHostOptions = {}) {
    this.root = mkdtempSync(join(tmpdir(), 'tcmu-target-'));
    this.netlink = new FakeNetlink(this);
    mkdirSync(join(this.configfs, 'core/alua'), { recursive: true });
    writeFileSync(join(this.configfs, 'version'), 'fake\n');
    const folders = ['class/uio', 'class/block', 'class/scsi_host/host0', 'bus/scsi/devices'];
    for (const folder of ['dev', ...folders.map((name) => `sys/${name}`)]) {
      mkdirSync(join(this.root, folder), { recursive: true });
    }
    writeFileSync(join(this.root, 'sys/class/scsi_host/host0/scan'), '');
    const parameters = join(this.root, 'sys/module/target_core_user/parameters');
    mkdirSync(parameters, { recursive: true });
    for (const name of ['block_netlink', 'reset_netlink'])
      writeFileSync(join(parameters, name), '');
    const { netlink } = this;
    const calls: KernelCalls = {
      blockingCall: (call, path, data) => this.#call(call, path, data),
      NetlinkSocket: class {
        readonly port = 1;
        readonly #socket;
        constructor(socketOptions: NativeNetlinkOptions) {
          this.#socket = netlink.open(socketOptions);
        }
        send(message: Uint8Array): void {
          this.#socket.send(message);
        }
        join(group: number): void {
          this.#socket.join(group);
        }
        close(): void {
          this.#socket.close();
        }
      },
    };
    this.host = new FakeHost(this, {
      configfs: this.configfs,
      sysfs: join(this.root, 'sys'),
      dev: join(this.root, 'dev'),
      // A busy machine must not miss them; who waits for one in vain passes a shorter one.
      deviceTimeout: 60_000,
      callTimeout: 60_000,
      calls: async () => calls,
      ...options,
    });
  }

  get configfs(): string {
    return join(this.root, 'target');
  }

  path(...parts: string[]): string {
    return join(this.configfs, ...parts);
  }

  exists(...parts: string[]): boolean {
    return existsSync(this.path(...parts));
  }

  read(...parts: string[]): string {
    return readFileSync(this.path(...parts), 'utf8').replace(/\n$/, '');
  }

  /** All folders and links below configfs' target folder that a test (or what it tests) made. */
  made(): string[] {
    const found: string[] = [];
    const walk = (folder: string): void => {
      for (const name of readdirSync(folder)) {
        const path = join(folder, name);
        const stat = lstatSync(path);
        if (stat.isSymbolicLink()) found.push(relative(this.configfs, path));
        if (!stat.isDirectory()) continue;
        if (this.#made.has(path)) found.push(relative(this.configfs, path));
        walk(path);
      }
    };
    walk(this.configfs);
    return found.sort();
  }

  /** What was called, as `call path`. */
  calls(): string[] {
    return this.log.map(({ call, path }) => `${call} ${path}`);
  }

  destroy(): void {
    rmSync(this.root, { recursive: true, force: true });
  }

  readonly #made = new Set<string>();

  async #call(call: CallName, path: string, data: string | undefined): Promise<void> {
    const inside = path.startsWith(`${this.configfs}/`) || path === this.configfs;
    const short = relative(inside ? this.configfs : join(this.root, 'sys'), path);
    const entry = { call, path: short, data };
    this.log.push(entry);
    await new Promise(setImmediate);
    const failure = this.failures(entry);
    if (failure === 'hang') return new Promise(() => {});
    if (failure !== undefined) throw systemError(failure, call);
    switch (call) {
      case 'mkdir':
        return this.#mkdir(path, short.split('/'));
      case 'rmdir':
        return this.#rmdir(path, short.split('/'));
      case 'symlink':
        return this.#symlink(path, data ?? '', short.split('/'));
      case 'unlink':
        return this.#unlink(path, short.split('/'));
      case 'open-write':
        return this.#write(path, data ?? '', short);
    }
  }

  #attributes(path: string, attributes: Record<string, string>): void {
    for (const [name, value] of Object.entries(attributes)) {
      if (this.lacks.has(basename(name))) continue;
      mkdirSync(dirname(join(path, name)), { recursive: true });
      writeFileSync(join(path, name), `${value}\n`);
    }
  }

  #mkdir(path: string, parts: string[]): void {
    if (existsSync(path)) throw systemError('EEXIST', 'mkdir');
    if (!existsSync(dirname(path))) throw systemError('ENOENT', 'mkdir');
    const [top, second, third, fourth] = parts;
    if (top === 'core' && parts.length === 2) {
      if (!/^user_\d+$/.test(second ?? '')) throw systemError('EINVAL', 'mkdir');
      if (!this.modules.has('target_core_user')) throw systemError('EINVAL', 'mkdir');
      mkdirSync(path);
      this.#attributes(path, { hba_info: '', hba_mode: '0' });
    } else if (top === 'core') {
      mkdirSync(path);
      this.#attributes(path, {
        ...Object.fromEntries(
          Object.entries({
            ...USER_ATTRIBUTES,
            ...(this.zeroCopy ? ZERO_COPY_ATTRIBUTES : {}),
          }).map(([name, value]) => [`attrib/${name}`, value]),
        ),
        control: '',
        enable: '0',
        info: 'Status: DEACTIVATED',
        'action/block_dev': 'unblocked',
        'action/reset_ring': '',
        'action/free_kept_buf': '',
        'wwn/vpd_unit_serial': 'T10 VPD Unit Serial Number: ',
        'statistics/scsi_dev/indx': '0',
      });
    } else if (parts.length === 1) {
      const modules: Record<string, string> = {
        loopback: 'tcm_loop',
        iscsi: 'iscsi_target_mod',
        vhost: 'vhost_scsi',
      };
      if (!this.modules.has(modules[top ?? ''] ?? '')) throw systemError('EINVAL', 'mkdir');
      mkdirSync(path);
      mkdirSync(join(path, 'discovery_auth'));
    } else if (parts.length === 3) {
      mkdirSync(path);
      for (const folder of ['lun', 'acls', 'np', 'param']) mkdirSync(join(path, folder));
      const auth = { userid: '', password: '', userid_mutual: '', password_mutual: '' };
      if (top === 'iscsi') {
        this.#attributes(path, {
          enable: '0',
          'attrib/authentication': '0',
          'attrib/generate_node_acls': '0',
          'attrib/cache_dynamic_acls': '0',
          'attrib/demo_mode_write_protect': '1',
          'auth/authenticate_target': '0',
        });
        for (const name of Object.keys(auth)) this.#attributes(path, { [`auth/${name}`]: '' });
      } else {
        this.#attributes(path, { nexus: '', address: '0:0:1' });
      }
    } else if (fourth === 'acls' && parts.length === 5) {
      mkdirSync(path);
      this.#attributes(path, {
        'attrib/authentication': '-1',
        'auth/userid': '',
        'auth/password': '',
        'auth/userid_mutual': '',
        'auth/password_mutual': '',
        'auth/authenticate_target': '0',
      });
    } else if (fourth === 'acls') {
      mkdirSync(path);
      this.#attributes(path, { write_protect: '0' });
    } else {
      if (third === undefined || parts.length > 5) mkdirSync(path);
      else {
        mkdirSync(path);
        if (fourth === 'lun') this.#attributes(path, { alua_tg_pt_gp: '', 'statistics/x': '' });
      }
    }
    this.#made.add(path);
  }

  #rmdir(path: string, parts: string[]): void {
    if (!existsSync(path)) throw systemError('ENOENT', 'rmdir');
    if (this.#linkedTo(path)) throw systemError('EBUSY', 'rmdir');
    const children = [...this.#made].some((made) => made.startsWith(`${path}/`));
    const links = readdirSync(path, { withFileTypes: true }).some((entry) =>
      entry.isSymbolicLink(),
    );
    if (children || links) throw systemError('ENOTEMPTY', 'rmdir');
    if (parts[0] === 'core' && parts.length === 3) this.#disable(parts);
    rmSync(path, { recursive: true });
    this.#made.delete(path);
  }

  #linkedTo(path: string): boolean {
    return this.made().some((entry) => {
      const link = this.path(entry);
      return (
        lstatSync(link).isSymbolicLink() && resolve(dirname(link), readlinkSync(link)) === path
      );
    });
  }

  #symlink(path: string, target: string, parts: string[]): void {
    if (existsSync(path)) throw systemError('EEXIST', 'symlink');
    if (!existsSync(target)) throw systemError('ENOENT', 'symlink');
    if (parts[3] === 'lun' && readFileSync(join(target, 'enable'), 'utf8') !== '1\n') {
      throw systemError('ENODEV', 'symlink');
    }
    // As configfs shows it.
    symlinkSync(relative(dirname(path), target), path);
    if (parts[0] === 'loopback') this.#addDisk(parts);
  }

  #unlink(path: string, parts: string[]): void {
    if (!existsSync(path)) throw systemError('ENOENT', 'unlink');
    unlinkSync(path);
    if (parts[0] === 'loopback') {
      const sys = this.#scsi(parts);
      const [disk] = existsSync(`${sys}/block`) ? readdirSync(`${sys}/block`) : [];
      if (disk !== undefined) {
        this.nodes.delete(disk);
        rmSync(join(this.root, 'sys/class/block', disk), { recursive: true, force: true });
        rmSync(join(this.root, 'dev', disk), { force: true });
      }
      rmSync(sys, { recursive: true, force: true });
    }
  }

  #scsi(parts: string[]): string {
    return join(this.root, 'sys/bus/scsi/devices', `0:0:1:${parts[4]?.slice('lun_'.length)}`);
  }

  #addDisk(parts: string[]): void {
    if (!this.handlerAnswers) return;
    const sys = this.#scsi(parts);
    const disk = `sd${String.fromCharCode(97 + readdirSync(join(this.root, 'sys/class/block')).length)}`;
    const number = `8:${16 * readdirSync(join(this.root, 'sys/class/block')).length}`;
    this.#attributes(sys, { type: String(this.deviceType), state: 'running', rescan: '' });
    mkdirSync(`${sys}/scsi_generic/sg0`, { recursive: true });
    if (this.deviceType !== 0) return;
    this.#attributes(sys, { [`block/${disk}/dev`]: number });
    this.#attributes(join(this.root, 'sys/class/block', disk), { size: '2048' });
    this.#node(disk, number);
  }

  #node(name: string, number: string): void {
    if (!this.makesNodes) return;
    writeFileSync(join(this.root, 'dev', name), '');
    this.nodes.set(name, number);
  }

  #write(path: string, value: string, short: string): void {
    if (!existsSync(path)) throw systemError('ENOENT', 'open');
    const parts = short.split('/');
    const set = (file: string, text: string): void => writeFileSync(file, `${text}\n`);
    const name = basename(path);
    if (short.startsWith('module/')) {
      this.netlink.parameter(name, value);
    } else if (name === 'scan') {
      for (const link of this.made().filter((entry) => /^loopback.*\/lun\//.test(entry))) {
        const lun = link.split('/');
        if (lun.length > 5 && !existsSync(this.#scsi(lun))) this.#addDisk(lun);
      }
    } else if (name === 'control') {
      for (const pair of value.split(/[,\n]/)) {
        const [key = '', text = ''] = pair.split(/=(.*)/s);
        const attribute = join(dirname(path), 'attrib', key);
        const limit = key === 'max_data_area_mb' ? GLOBAL_MAX_MB : Number.POSITIVE_INFINITY;
        const cut = Number(text) > limit ? String(limit) : text;
        if (existsSync(attribute)) set(attribute, cut);
        if (key === 'zero_copy') set(join(dirname(path), 'attrib/cmd_time_out'), '0');
      }
    } else if (parts[0] === 'core' && name === 'enable') {
      this.#enable(path, parts);
    } else if (parts[0] === 'core' && parts[3] === 'attrib') {
      if (READ_ONLY.includes(name)) throw systemError('EACCES', 'open');
      this.#setAttribute(path, parts, name, value);
    } else if (name === 'vpd_unit_serial') {
      set(path, `T10 VPD Unit Serial Number: ${value}`);
    } else if (name === 'block_dev') {
      set(path, value === '1' ? 'blocked' : 'unblocked');
    } else {
      set(path, value);
      const auth = dirname(path);
      if (name === 'password_mutual') set(join(auth, 'authenticate_target'), '1');
    }
  }

  #setAttribute(path: string, parts: string[], name: string, value: string): void {
    const dir = this.path(...parts.slice(0, 3));
    const enabled = readFileSync(join(dir, 'enable'), 'utf8') === '1\n';
    const sends = ['dev_size', 'dev_config', 'emulate_write_cache'].includes(name);
    if (enabled && sends && !this.netlink.heard) throw systemError('ESRCH', 'write');
    if (name === 'cmd_time_out' && this.#linkedTo(dir)) throw systemError('EINVAL', 'write');
    writeFileSync(path, `${value}\n`);
    if (enabled && name === 'dev_config') {
      const uio = this.#uioOf(parts);
      if (uio !== undefined) writeFileSync(`${uio}/name`, `${this.#label(parts)}\n`);
    }
  }

  #label(parts: string[]): string {
    const config = this.read(...parts.slice(0, 3), 'attrib/dev_config');
    const label = `tcm-user/${parts[1]?.slice('user_'.length)}/${parts[2]}`;
    return config === '' ? label : `${label}/${config}`;
  }

  #uioOf(parts: string[]): string | undefined {
    const folder = join(this.root, 'sys/class/uio');
    const label = `tcm-user/${parts[1]?.slice('user_'.length)}/${parts[2]}`;
    return readdirSync(folder)
      .map((uio) => join(folder, uio))
      .find((uio) => {
        const name = readFileSync(join(uio, 'name'), 'utf8').trim();
        return name === label || name.startsWith(`${label}/`);
      });
  }

  #enable(path: string, parts: string[]): void {
    if (readFileSync(path, 'utf8') === '1\n') throw systemError('EEXIST', 'write');
    const dir = this.path(...parts.slice(0, 3));
    const sectors = Number(this.read(...parts.slice(0, 3), 'attrib/hw_max_sectors'));
    const block = Number(this.read(...parts.slice(0, 3), 'attrib/hw_block_size'));
    const rounded = Math.floor(sectors / (4096 / block)) * (4096 / block);
    this.#attributes(dir, {
      enable: '1',
      info: 'Status: ACTIVATED',
      'attrib/hw_max_sectors': String(rounded),
      'statistics/scsi_dev/indx': String(this.#nextIndex++),
    });
    this.addUio(this.#label(parts));
  }

  /** Adds a uio device of any name; answers its number. */
  addUio(label: string): number {
    const folder = join(this.root, 'sys/class/uio');
    let minor = 0;
    while (existsSync(join(folder, `uio${minor}`))) minor += 1;
    this.#attributes(join(folder, `uio${minor}`), {
      name: label,
      dev: `252:${minor}`,
      'maps/map0/size': '1082130432',
    });
    this.#node(`uio${minor}`, `252:${minor}`);
    return minor;
  }

  #disable(parts: string[]): void {
    const uio = this.#uioOf(parts);
    if (uio === undefined) return;
    rmSync(uio, { recursive: true });
    this.nodes.delete(basename(uio));
    rmSync(join(this.root, 'dev', basename(uio)), { force: true });
  }
}

export function systemError(code: string, syscall: string): Error {
  return Object.assign(new Error(`${code}, ${syscall}`), { code, syscall });
}
