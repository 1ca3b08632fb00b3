// SPDX-License-Identifier: Apache-2.0
/**
 * What was said on a command line, read by kind: flags, texts, numbers, sizes, choices, secrets. A mistake is a
 * `UsageError` whose message names the option and what it takes; nothing is opened but the file of a secret.
 */
import { readFileSync, statSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { TcmuError } from '../errors.js';
import { parseSize } from '../store/size.js';

/** A mistake on the command line; the program's exit code is then 2. Code: `ERR_TCMU_USAGE`. */
export class UsageError extends TcmuError {
  constructor(message: string, cause?: unknown) {
    super('ERR_TCMU_USAGE', message, { cause });
  }
}

/** What an option takes, as `parseArgs` of `node:util` wants it. */
export interface OptionKind {
  /** `boolean`: it stands alone; `string`: a value follows. */
  readonly type: 'boolean' | 'string';
  /** Whether it may be given several times. */
  readonly multiple?: boolean;
  /** The letter that stands for it. */
  readonly short?: string;
}

/** An option that stands alone. */
export const FLAG: OptionKind = { type: 'boolean' };
/** An option with a value. */
export const TEXT: OptionKind = { type: 'string' };
/** An option with a value, that may be given several times. */
export const LIST: OptionKind = { type: 'string', multiple: true };

/** What a number may be. */
export interface NumberRule {
  /** Default 1. */
  least?: number;
  /** Default: no bound but 2^53 - 1. */
  most?: number;
  /** Only these. */
  oneOf?: readonly number[];
}

/**
 * A command line that was taken apart. `Name` are the options that it may have.
 *
 * ```ts
 * import { CommandLine, FLAG, TEXT } from 'tcmu/program';
 *
 * const line = new CommandLine(['disk.img', '--size', '10G'], { size: TEXT, thick: FLAG });
 * console.log(line.words, line.size('size'), line.flag('thick'));
 * ```
 */
export class CommandLine<Name extends string> {
  /** What stands there besides options, in order. */
  readonly words: readonly string[];
  readonly #values: Readonly<Record<string, unknown>>;

  /**
   * @param args what follows the program's name: `process.argv.slice(2)`
   * @param kinds the options that there are, without their dashes
   * @throws UsageError for an option that is unknown, or lacks its value
   */
  constructor(args: readonly string[], kinds: Readonly<Partial<Record<Name, OptionKind>>>) {
    try {
      const { values, positionals } = parseArgs({
        args: [...args],
        allowPositionals: true,
        options: { ...kinds } as Record<string, OptionKind>,
      });
      this.words = positionals;
      this.#values = values;
    } catch (error) {
      throw new UsageError((error as Error).message, error);
    }
  }

  /** Whether the option was given, whatever its kind. */
  has(name: Name): boolean {
    return this.#values[name] !== undefined;
  }

  /** Whether an option that stands alone was given. */
  flag(name: Name): boolean {
    return this.#values[name] === true;
  }

  /** An option's value; undefined when it was not given. */
  text(name: Name): string | undefined {
    const value = this.#values[name];
    return typeof value === 'string' ? value : undefined;
  }

  /** Every value of an option that may be given several times. */
  list(name: Name): readonly string[] {
    const value = this.#values[name];
    return Array.isArray(value) ? value : [];
  }

  /** A whole number. @throws UsageError */
  number(name: Name, rule: NumberRule = {}): number | undefined {
    const text = this.text(name);
    if (text === undefined) return undefined;
    const { least = 1, most = Number.MAX_SAFE_INTEGER, oneOf } = rule;
    const value = Number(text);
    const whole = /^\d+$/.test(text) && Number.isSafeInteger(value);
    if (whole && (oneOf?.includes(value) ?? (value >= least && value <= most))) return value;
    const range = `a whole number from ${least} ${rule.most === undefined ? 'on' : `to ${most}`}`;
    throw new UsageError(`--${name} ${text}: give ${oneOf?.join(', ') ?? range}`);
  }

  /** Bytes, above 0, of a size as `parseSize` of `tcmu/store` reads it. @throws UsageError */
  size(name: Name): number | undefined {
    const text = this.text(name);
    return text === undefined ? undefined : sizeOf(`--${name}`, text);
  }

  /** One of the words that there are. @throws UsageError */
  choice<T extends string>(name: Name, allowed: readonly T[]): T | undefined {
    const text = this.text(name);
    if (text === undefined) return undefined;
    const found = allowed.find((value) => value === text);
    if (found === undefined) throw new UsageError(`--${name} ${text}: give ${allowed.join(', ')}`);
    return found;
  }

  /**
   * The first line of the file that the option names: a password, which a command line would show to everybody.
   * @throws UsageError when the file can't be read, everybody may read it, or that line is empty
   */
  secret(name: Name): string | undefined {
    const file = this.text(name);
    if (file === undefined) return undefined;
    const [first] = secretFile(`--${name} ${file}`, file).toString().split('\n');
    if (!first) throw new UsageError(`--${name} ${file}: its first line is empty`);
    return first;
  }
}

/**
 * Bytes, above 0, of a size on a command line.
 * @param what names it in the error's message: `--size`
 * @throws UsageError
 */
export function sizeOf(what: string, text: string): number {
  const size = parseSize(text);
  if (size === undefined || size === 0) {
    throw new UsageError(`${what} ${text}: give a size such as 512M, 10G or 1073741824`);
  }
  return size;
}

/**
 * Content of a file with a secret in it.
 * @param what names it in the error's message: `--key-file /etc/key`
 * @throws UsageError when it can't be read, or everybody may read it
 */
export function secretFile(what: string, file: string): Buffer {
  let open: boolean;
  let content: Buffer;
  try {
    open = (statSync(file).mode & 0o007) !== 0;
    content = readFileSync(file);
  } catch (error) {
    throw new UsageError(`${what}: ${(error as Error).message}`, error);
  }
  if (!open) return content;
  throw new UsageError(
    `${what}: everybody may read it; chmod 640 ${file} (what it says may be known already)`,
  );
}
