// SPDX-License-Identifier: Apache-2.0
/** The options that every handler program has: who gets the disk, and the kernel's side of it. */
import type { ServeOptions } from '../serve.js';
import { type CommandLine, FLAG, LIST, type OptionKind, TEXT, UsageError } from './command-line.js';

/** Name of an option that goes with `--export iscsi` only. */
export type IscsiOption =
  | 'iqn'
  | 'portal'
  | 'initiator'
  | 'anyone'
  | 'chap-user'
  | 'chap-password-file';

const ISCSI_OPTIONS: Readonly<Record<IscsiOption, OptionKind>> = {
  iqn: TEXT,
  portal: LIST,
  initiator: LIST,
  anyone: FLAG,
  'chap-user': TEXT,
  'chap-password-file': TEXT,
};

/** Name of an option of `DEVICE_OPTIONS`. */
export type DeviceOption =
  | 'export'
  | IscsiOption
  | 'max-sectors'
  | 'data-area-mb'
  | 'ring-mb'
  | 'timeout'
  | 'concurrency'
  | 'recover';

/** For `CommandLine`: the options that `deviceOptions` reads. */
export const DEVICE_OPTIONS: Readonly<Record<DeviceOption, OptionKind>> = {
  export: TEXT,
  ...ISCSI_OPTIONS,
  'max-sectors': TEXT,
  'data-area-mb': TEXT,
  'ring-mb': TEXT,
  timeout: TEXT,
  concurrency: TEXT,
  recover: FLAG,
};

const FABRICS = ['loopback', 'iscsi', 'vhost', 'none'] as const;

/**
 * What `serve` wants to know of `DEVICE_OPTIONS`, for spreading into its options:
 *
 * | option | meaning |
 * | --- | --- |
 * | `--export <fabric>` | `loopback`, `iscsi`, `vhost` or `none` |
 * | `--iqn <name>` | iSCSI: name of the target; needed with it, as is one of the next two |
 * | `--initiator <name>` | iSCSI: who may log in; repeatable |
 * | `--anyone` | iSCSI: everybody who reaches a portal may log in |
 * | `--portal <address>` | iSCSI: address[:port] to listen on; repeatable |
 * | `--chap-user <name>`, `--chap-password-file <file>` | iSCSI: CHAP; without the file `$TCMU_CHAP_PASSWORD` |
 * | `--max-sectors`, `--data-area-mb`, `--ring-mb`, `--concurrency` | `maxSectors`, `dataAreaMiB`, `ringMiB`, `concurrency` |
 * | `--timeout <seconds>` | `commandTimeout`; 0: never |
 * | `--recover` | take back a device of that name; without it an existing one is an error |
 *
 * @param fallback the fabric without `--export`
 * @throws UsageError
 */
export function deviceOptions(
  line: CommandLine<DeviceOption>,
  env: NodeJS.ProcessEnv = process.env,
  fallback: 'loopback' | 'none' = 'loopback',
): Pick<
  ServeOptions,
  'export' | 'recover' | 'maxSectors' | 'dataAreaMiB' | 'ringMiB' | 'commandTimeout' | 'concurrency'
> {
  const numbers = {
    maxSectors: line.number('max-sectors'),
    dataAreaMiB: line.number('data-area-mb'),
    ringMiB: line.number('ring-mb'),
    commandTimeout: line.number('timeout', { least: 0 }),
    concurrency: line.number('concurrency'),
  };
  const given = Object.entries(numbers).filter(([, value]) => value !== undefined);
  return {
    export: exportOf(line, env, fallback),
    recover: line.flag('recover') ? 'auto' : false,
    ...(Object.fromEntries(given) as typeof numbers),
  };
}

function exportOf(
  line: CommandLine<DeviceOption>,
  env: NodeJS.ProcessEnv,
  fallback: 'loopback' | 'none',
): ServeOptions['export'] {
  const type = line.choice('export', FABRICS) ?? fallback;
  if (type !== 'iscsi') {
    const names = Object.keys(ISCSI_OPTIONS) as IscsiOption[];
    const wrong = names.find((option) => line.has(option));
    if (wrong !== undefined) throw new UsageError(`--${wrong} goes with --export iscsi only`);
    return type;
  }
  const iqn = line.text('iqn');
  if (iqn === undefined) throw new UsageError('--export iscsi needs --iqn, the name of the target');
  const anyone = line.flag('anyone');
  const initiators = line.list('initiator');
  if (anyone === initiators.length > 0) {
    throw new UsageError('--export iscsi needs either --initiator or --anyone: who may log in?');
  }
  const portals = [...line.list('portal')];
  const chap = chapOf(line, env);
  const login = chap === undefined ? {} : { chap };
  return {
    type,
    iqn,
    ...(portals.length === 0 ? {} : { portals }),
    ...(anyone
      ? { anyone: login }
      : { initiators: initiators.map((name) => ({ name, ...login })) }),
  };
}

function chapOf(
  line: CommandLine<DeviceOption>,
  env: NodeJS.ProcessEnv,
): { user: string; password: string } | undefined {
  const user = line.text('chap-user');
  if (user === undefined) {
    if (!line.has('chap-password-file')) return undefined;
    throw new UsageError('--chap-password-file needs --chap-user');
  }
  const password = line.secret('chap-password-file') ?? env['TCMU_CHAP_PASSWORD'];
  if (password) return { user, password };
  throw new UsageError('--chap-user needs --chap-password-file or $TCMU_CHAP_PASSWORD');
}
