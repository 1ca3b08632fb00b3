// SPDX-License-Identifier: Apache-2.0
/**
 * A real S3 server for tests and benchmarks: Ceph's radosgw over one monitor and one OSD that keeps its objects in memory.
 *
 * Contract: everything listens on 127.0.0.1 on ports that were free, and lives in a directory of its own; `stop` ends the three
 * daemons by the ids they were started with and removes the directory, and so does the end of this process. Nothing is
 * installed: `missingPrograms` says what is not there.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { randomBytes, randomUUID } from 'node:crypto';
import {
  accessSync,
  constants,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { connect, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { delimiter, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { onLeash } from './leash.js';

const adminSocket = 'radosgw.asok';
const programs = ['ceph-mon', 'ceph-osd', 'radosgw', 'radosgw-admin', 'ceph', 'monmaptool'];

/** Programs of Debian's ceph-mon, ceph-osd, radosgw and ceph-common that this machine lacks. */
export function missingPrograms(): string[] {
  const dirs = [...(process.env['PATH'] ?? '').split(delimiter), '/usr/sbin', '/usr/bin'];
  return programs.filter(
    (name) =>
      !dirs.some((dir) => {
        try {
          accessSync(join(dir, name), constants.X_OK);
          return true;
        } catch {
          return false;
        }
      }),
  );
}

export interface RadosgwOptions {
  /** What the OSD may hold, MiB. Default 4096. Memory is taken as it is written. */
  readonly capacityMb?: number;
  /** Where the directory of its own is made. Default: the system's temporary directory. */
  readonly parentDir?: string;
}

export interface Radosgw {
  /** `http://127.0.0.1:PORT` */
  readonly endpoint: string;
  readonly accessKeyId: string;
  readonly secretAccessKey: string;
  readonly region: string;
  /** Ids of the daemons, for measurements. */
  readonly pids: readonly number[];
  /** Requests that the gateway has answered so far, by its own count. */
  requests(): Promise<number>;
  stop(): Promise<void>;
}

/** @throws Error naming the step that failed, with the end of the daemon's own log */
export async function startRadosgw(options: RadosgwOptions = {}): Promise<Radosgw> {
  const missing = missingPrograms();
  if (missing.length > 0) {
    throw new Error(
      `missing: ${missing.join(' ')}; on Debian: apt-get install --no-install-recommends ceph-mon ceph-osd radosgw ceph-common`,
    );
  }
  const cluster = new Cluster(options);
  try {
    return await cluster.start();
  } catch (error) {
    await cluster.stop();
    throw error;
  }
}

class Cluster {
  readonly #dir: string;
  readonly #capacityMb: number;
  readonly #daemons: { name: string; child: ChildProcess }[] = [];
  readonly #onExit = () => {
    for (const { child } of this.#daemons) child.kill('SIGKILL');
    rmSync(this.#dir, { recursive: true, force: true });
  };

  constructor({ capacityMb = 4096, parentDir = tmpdir() }: RadosgwOptions) {
    this.#dir = mkdtempSync(join(parentDir, 'tcmu-rgw-'));
    this.#capacityMb = capacityMb;
    process.once('exit', this.#onExit);
  }

  async start(): Promise<Radosgw> {
    const [monitorPort = 0, gatewayPort = 0] = await freePorts(2);
    const fsid = randomUUID();
    const keys = {
      accessKeyId: randomBytes(10).toString('hex').toUpperCase(),
      secretAccessKey: randomBytes(20).toString('hex'),
    };
    for (const name of ['mon', 'osd', 'run']) mkdirSync(join(this.#dir, name));
    writeFileSync(this.#file('ceph.conf'), this.#configuration(fsid, monitorPort, gatewayPort));

    const monmap = this.#file('monmap');
    const address = `[v1:127.0.0.1:${monitorPort}]`;
    await this.#run('monmaptool', ['--create', '--fsid', fsid, '--addv', 'a', address, monmap]);
    await this.#run('ceph-mon', ['--mkfs', '-i', 'a', '--monmap', monmap]);
    const monitor = this.#daemon('ceph-mon', ['-i', 'a']);

    const osdId = randomUUID();
    await this.#ask(['osd', 'new', osdId], monitor);
    await this.#ask(['osd', 'crush', 'add', '0', '1', 'root=default', 'host=lab'], monitor);
    await this.#run('ceph-osd', ['-i', '0', '--mkfs', '--osd-uuid', osdId, '--no-mon-config']);
    const osd = this.#daemon('ceph-osd', ['-i', '0']);

    const admin = ['user', 'create', '--uid=lab', '--display-name=lab', '--max-buckets=0'];
    const { accessKeyId, secretAccessKey } = keys;
    const credentials = [`--access-key=${accessKeyId}`, `--secret=${secretAccessKey}`];
    await this.#run('radosgw-admin', [...admin, ...credentials], osd);
    const gateway = this.#daemon('radosgw', ['-n', 'client.rgw']);
    await this.#listening(gatewayPort, gateway);
    return {
      endpoint: `http://127.0.0.1:${gatewayPort}`,
      ...keys,
      region: 'default',
      pids: this.#daemons.map(({ child }) => child.pid ?? 0),
      requests: () => countRequests(this.#file(adminSocket)),
      stop: () => this.stop(),
    };
  }

  async stop(): Promise<void> {
    // The gateway first: the others would keep it waiting. Nothing here needs a clean end.
    for (const { child } of this.#daemons.reverse()) {
      if (child.exitCode !== null || child.signalCode !== null) continue;
      const ended = new Promise((resolve) => child.once('exit', resolve));
      child.ref();
      child.kill('SIGKILL');
      await ended;
    }
    process.off('exit', this.#onExit);
    rmSync(this.#dir, { recursive: true, force: true });
  }

  #file(name: string): string {
    return join(this.#dir, name);
  }

  #configuration(fsid: string, monitorPort: number, gatewayPort: number): string {
    const osdBytes = this.#capacityMb * 1024 * 1024;
    return `[global]
fsid = ${fsid}
mon_host = v1:127.0.0.1:${monitorPort}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr2 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
run_dir = ${this.#file('run')}
pid_file =
admin_socket =
log_file = ${this.#file('$name.log')}
log_to_stderr = false
crash_dir = ${this.#dir}
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
[mon]
mon_data = ${this.#file('mon')}
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 1
paxos_propose_interval = 0.05
[osd]
osd_data = ${this.#file('osd')}
osd_objectstore = memstore
memstore_device_bytes = ${osdBytes}
osd_class_update_on_start = false
osd_crush_update_on_start = false
osd_class_load_list = *
osd_class_default_list = *
[client.rgw]
rgw_data = ${this.#dir}
rgw_frontends = beast endpoint=127.0.0.1:${gatewayPort} tcp_nodelay=1
rgw_rados_pool_pg_num_min = 1
rgw_enable_usage_log = false
admin_socket = ${this.#file(adminSocket)}
[client]
rgw_rados_pool_pg_num_min = 1
`;
  }

  /** A command to the monitor, which refuses the first (EPERM) of a client that asks before it has the cluster's id. */
  async #ask(command: readonly string[], monitor: ChildProcess): Promise<void> {
    for (let attempt = 1; ; attempt++) {
      try {
        return await this.#run('ceph', command, monitor);
      } catch (error) {
        if (attempt === 5) throw error;
      }
    }
  }

  /** Runs a program to its end; a daemon it depends on must not die meanwhile. */
  async #run(program: string, args: readonly string[], needs?: ChildProcess): Promise<void> {
    const child = spawn(program, ['-c', this.#file('ceph.conf'), ...args], {
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, CEPH_CONF: this.#file('ceph.conf') },
    });
    let output = '';
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', (text: string) => (output += text));
    }
    const stop = () => child.kill('SIGKILL');
    const limit = setTimeout(stop, 60_000);
    needs?.once('exit', stop);
    const code = await new Promise<number | null>((resolve, reject) => {
      child.once('error', reject);
      child.once('close', resolve);
    });
    clearTimeout(limit);
    needs?.off('exit', stop);
    if (code !== 0) {
      throw new Error(
        `${program} ${args.join(' ')} failed (${code ?? 'stopped'}): ${lastLines(output)}\n${this.#logs()}`,
      );
    }
  }

  #daemon(name: string, args: readonly string[]): ChildProcess {
    const [program, line] = onLeash([name, '-f', '-c', this.#file('ceph.conf'), ...args]);
    const child = spawn(program, line, {
      stdio: ['ignore', 'ignore', 'ignore'],
      // A Ctrl-C in the terminal is for the tests, which stop us.
      detached: true,
    });
    child.unref();
    this.#daemons.push({ name, child });
    return child;
  }

  async #listening(port: number, daemon: ChildProcess): Promise<void> {
    const deadline = Date.now() + 60_000;
    while (!(await canConnect(port))) {
      if (daemon.exitCode !== null || daemon.signalCode !== null || Date.now() > deadline) {
        throw new Error(`radosgw does not listen on port ${port}\n${this.#logs()}`);
      }
      await sleep(20);
    }
  }

  #logs(): string {
    return ['mon.a', 'osd.0', 'client.rgw']
      .map((name) => {
        try {
          return `-- ${name}\n${lastLines(readFileSync(this.#file(`${name}.log`), 'utf8'))}`;
        } catch {
          return `-- ${name}: no log`;
        }
      })
      .join('\n');
  }
}

function lastLines(text: string): string {
  return text.trim().split('\n').slice(-15).join('\n');
}

/** Ports that nothing listens on now. */
export async function freePorts(count: number): Promise<number[]> {
  const servers = Array.from({ length: count }, () => createServer().listen(0, '127.0.0.1'));
  const ports = await Promise.all(
    servers.map(
      (server) =>
        new Promise<number>((resolve) =>
          server.once('listening', () => {
            const address = server.address();
            resolve(typeof address === 'object' && address !== null ? address.port : 0);
          }),
        ),
    ),
  );
  for (const server of servers) await new Promise((resolve) => server.close(resolve));
  return ports;
}

function canConnect(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(port, '127.0.0.1');
    socket.once('connect', () => resolve(true)).once('error', () => resolve(false));
    socket.once('close', () => resolve(false));
    socket.once('connect', () => socket.destroy());
  });
}

/** Asks a daemon over its admin socket: a command as JSON and a zero byte, answered by a length and JSON. */
function countRequests(path: string): Promise<number> {
  return new Promise((resolve, reject) => {
    const socket = connect(path);
    const chunks: Buffer[] = [];
    socket.on('error', reject);
    socket.on('data', (chunk: Buffer) => chunks.push(chunk));
    socket.on('end', () => {
      const text = Buffer.concat(chunks).subarray(4).toString();
      const counters = JSON.parse(text) as { rgw?: { req?: number } };
      const count = counters.rgw?.req;
      if (count === undefined) reject(new Error(`radosgw counts no requests: ${text}`));
      else resolve(count);
    });
    socket.write('{"prefix": "perf dump", "format": "json"}\0');
  });
}
