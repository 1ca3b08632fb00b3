// SPDX-License-Identifier: Apache-2.0
/**
 * Checks everything a caller may put into a configfs path or value, before anything is touched.
 *
 * Contract: what passes can neither leave its folder, nor be cut, split or reinterpreted by the kernel's
 * parsers; what does not is an `ArgumentError` that quotes the value (never a secret) and names the rule.
 */
import { isIP } from 'node:net';
import { ArgumentError } from '../errors.js';

/** Longest name of a configfs folder in bytes (NAME_MAX, linux/limits.h). */
const NAME_BYTES = 255;
/** Longest dev_config in bytes (TCMU_CONFIG_LEN - 1, target_core_user.c). */
const CONFIG_BYTES = 255;
/** Longest vpd_unit_serial in bytes (INQUIRY_VPD_SERIAL_LEN - 1, target_core_base.h). */
const SERIAL_BYTES = 253;
/** Longest iSCSI name in bytes (RFC 7143 4.2.7.1). */
const ISCSI_NAME_BYTES = 223;
/** Longest CHAP name or secret in bytes (MAX_USER_LEN - 1, iscsi_target_core.h). */
const CHAP_BYTES = 255;

/** A value as it may stand in a message: on one line, and not of any length. */
export function quoted(value: unknown): string {
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 80 ? `${text.slice(0, 76)}…"` : text;
}

function refuse(what: string, value: unknown, rule: string): never {
  throw new ArgumentError(`tcmu: ${what} ${quoted(value)}: ${rule}`);
}

/** What the rule is that `text` breaks, if any. */
function textProblem(text: unknown, maxBytes: number): string | undefined {
  if (typeof text !== 'string') return 'must be a string';
  if (text === '') return 'must not be empty';
  if (/\p{Cc}/u.test(text)) return 'must hold no control characters (newline, NUL, …)';
  if (/\p{Cs}/u.test(text)) return 'must be well-formed Unicode';
  const bytes = Buffer.byteLength(text);
  if (bytes > maxBytes) return `is ${bytes} bytes long, the kernel takes ${maxBytes}`;
  return undefined;
}

function checkText(what: string, text: unknown, maxBytes: number): asserts text is string {
  const problem = textProblem(text, maxBytes);
  if (problem !== undefined) refuse(what, text, problem);
}

/** The name of a backstore: one folder below core/user_N. */
export function checkName(name: string): void {
  checkText('backstore name', name, NAME_BYTES);
  if (name === '.' || name === '..' || name.includes('/')) {
    refuse('backstore name', name, 'must be one folder name: no "/", not "." or ".."');
  }
  if (name.trim() !== name) refuse('backstore name', name, 'must not begin or end with a space');
}

/** A dev_config string, `<subtype>/<rest>`. Commas are fine: it is not passed through `control`. */
export function checkConfig(config: string): void {
  checkText('config', config, CONFIG_BYTES);
  if (config.startsWith('/')) {
    refuse('config', config, 'must begin with a subtype: "<subtype>/<rest>"');
  }
}

export function checkSerial(serial: string): void {
  checkText('serial', serial, SERIAL_BYTES);
  if (!/^[\x21-\x7e]+$/.test(serial)) {
    refuse('serial', serial, 'must be printable ASCII without spaces, as in VPD page 80h');
  }
}

/** An integer option within bounds. */
export function checkInteger(what: string, value: number, min: number, max: number): void {
  if (!Number.isSafeInteger(value) || value < min || value > max) {
    throw new ArgumentError(`tcmu: ${what} ${quoted(value)}: must be an integer ${min}..${max}`);
  }
}

export function checkBlockSize(blockSize: number): void {
  if (![512, 1024, 2048, 4096].includes(blockSize)) {
    refuse('blockSize', blockSize, 'must be 512, 1024, 2048 or 4096 bytes');
  }
}

export function checkSize(size: number, blockSize: number): void {
  if (!Number.isSafeInteger(size) || size <= 0 || size % blockSize !== 0) {
    refuse(
      'size',
      size,
      `must be a positive number of bytes, a multiple of the block size ${blockSize}, at most 2^53 - 1`,
    );
  }
}

/** A SAS-style port name: `naa.` and 16 hexadecimal digits (NAA 5 or 6 short form as LIO takes it). */
export function checkWwn(wwn: string): void {
  if (!/^naa\.[0-9a-fA-F]{16}$/.test(wwn)) {
    refuse('wwn', wwn, 'must be "naa." and 16 hexadecimal digits');
  }
}

/** The name of an iSCSI target or initiator. */
export function checkIscsiName(what: string, name: string): void {
  checkText(what, name, ISCSI_NAME_BYTES);
  // RFC 7143 4.2.7.3..5 and RFC 3722: lower case after normalisation; "_" is not in it, but in use.
  const good =
    /^iqn\.\d{4}-\d{2}\.[a-z0-9][a-z0-9.-]*(:[a-z0-9._:-]+)?$/.test(name) ||
    /^eui\.[0-9a-f]{16}$/.test(name) ||
    /^naa\.([0-9a-f]{16}|[0-9a-f]{32})$/.test(name);
  if (!good) {
    refuse(
      what,
      name,
      'must be an iSCSI name in lower case, such as iqn.2026-01.org.example:disk0 (RFC 7143 4.2.7)',
    );
  }
}

/** `address`, `address:port` or `[address]:port`, as the folder name configfs wants. */
export function portalName(portal: string): string {
  checkText('portal', portal, NAME_BYTES);
  const match = /^(?:\[(?<v6>.+)\]|(?<v4>[^:]+))(?::(?<port>\d{1,5}))?$/.exec(portal);
  const address = isIP(portal) === 0 ? (match?.groups?.['v6'] ?? match?.groups?.['v4']) : portal;
  const port = Number(isIP(portal) === 0 ? (match?.groups?.['port'] ?? 3260) : 3260);
  if (address === undefined || isIP(address) === 0 || port < 1 || port > 65535) {
    refuse(
      'portal',
      portal,
      'must be an IP address with an optional port, such as 192.0.2.1:3260 or [::1]:3260',
    );
  }
  return isIP(address) === 6 ? `[${address}]:${port}` : `${address}:${port}`;
}

/** A CHAP name or secret. The message never holds the value. */
export function checkChap(what: string, value: string): void {
  const problem =
    textProblem(value, CHAP_BYTES) ??
    // The kernel takes anything that begins so for "forget it" (iscsi_target_configfs.c).
    (value.startsWith('NULL') ? 'must not begin with NULL, which LIO takes for "none"' : undefined);
  if (problem !== undefined) throw new ArgumentError(`tcmu: ${what}: ${problem}`);
}
